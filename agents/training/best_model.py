"""The model as it was when it predicted validation text best, beside a run's final one."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from agents.training.checkpoint import remove_partial
from avatarl_env.lm.gpt import GPT
from avatarl_env.lm.storage import load_weights, save_model
from avatarl_env.lm.tokenizer import CharTokenizer


class BestModel:
    """Keeps the weights that had the lowest validation loss so far, also in a folder.

    What decides is the evaluation on the first characters of the validation text that a run makes
    every `evaluate_every` updates and at the end of each phase; of equals the first.

    Attributes:
        found: `update` and `loss` of the best so far, or None.
    """

    def __init__(
        self, folder: Path, model: GPT, tokenizer: CharTokenizer, about: dict[str, Any]
    ) -> None:
        """Remember what is stored, and where.

        Args:
            folder: of the best model; made when there is one.
            model: that is trained.
            tokenizer: stored beside it.
            about: stored beside it.
        """
        self.found: dict[str, float] | None = None
        self._folder = folder
        self._model = model
        self._tokenizer = tokenizer
        self._about = about
        self._weights: dict[str, Tensor] = {}

    def consider(self, loss: float, update: int) -> None:
        """Keep the model as it stands if its loss is the lowest so far."""
        if not loss < (float("inf") if self.found is None else self.found["loss"]):
            return
        self.found = {"update": update, "loss": loss}
        self._weights = {
            name: p.detach().cpu().clone() for name, p in self._model.named_parameters()
        }
        self._write(self._model)

    def get_state(self) -> dict[str, Any]:
        """Return what a resumed run has to know: a folder may be of a later evaluation."""
        return {"found": self.found, "weights": self._weights}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Go on from there; the folder holds that model again."""
        self.found, self._weights = state["found"], dict(state["weights"])
        if self.found is None:
            return
        model = GPT(self._model.config)
        load_weights(model, self._weights)
        self._write(model)

    def clear(self) -> None:
        """Remove the folder, whole, if there is one."""
        if self._folder.is_dir():
            with self._workplace() as place:
                os.replace(self._folder, place / "old")

    def _write(self, model: GPT) -> None:
        """Replace the folder; a run that is killed meanwhile leaves none, or a whole one."""
        with self._workplace() as place:
            about = {**self._about, **(self.found or {})}
            save_model(place / "new", model, self._tokenizer, about)
            if self._folder.is_dir():
                os.replace(self._folder, place / "old")
            os.replace(place / "new", self._folder)

    @contextmanager
    def _workplace(self) -> Iterator[Path]:
        """Make a new folder beside the model's, and remove it and all that is in it in the end.

        Nobody can guess its name, so no link lies in wait there. A killed run leaves it behind; the
        next call, or the next checkpoint, removes it.
        """
        root = self._folder.parent
        root.mkdir(parents=True, exist_ok=True)
        remove_partial(root)
        place = Path(tempfile.mkdtemp(dir=root, prefix=".", suffix=".partial"))
        try:
            yield place
        finally:
            shutil.rmtree(place, ignore_errors=True)
