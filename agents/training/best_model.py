"""The model with the lowest validation loss of a run."""

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
    """Keeps the weights with the lowest validation loss so far, in memory and in a folder.

    The loss is measured on the first characters of the validation text, every `evaluate_every`
    updates and at the end of each phase. The earliest of equal losses counts.

    Attributes:
        found: `update` and `loss` of the best model so far, or None.
    """

    def __init__(
        self, folder: Path, model: GPT, tokenizer: CharTokenizer, about: dict[str, Any]
    ) -> None:
        """Set the model and the folder.

        Args:
            folder: of the best model; created by `consider`.
            model: the model under training.
            tokenizer: stored with the model.
            about: the model's origin, stored with it.
        """
        self.found: dict[str, float] | None = None
        self._folder = folder
        self._model = model
        self._tokenizer = tokenizer
        self._about = about
        self._weights: dict[str, Tensor] = {}

    def consider(self, loss: float, update: int) -> None:
        """Keep the model's current weights if their loss is the lowest so far."""
        if not loss < (float("inf") if self.found is None else self.found["loss"]):
            return
        self.found = {"update": update, "loss": loss}
        self._weights = {
            name: p.detach().cpu().clone() for name, p in self._model.named_parameters()
        }
        self._write(self._model)

    def get_state(self) -> dict[str, Any]:
        """Return the best model, weights included: the folder may be newer than the checkpoint."""
        return {"found": self.found, "weights": self._weights}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Restore the state, and write its model to the folder."""
        self.found, self._weights = state["found"], dict(state["weights"])
        if self.found is None:
            return
        model = GPT(self._model.config)
        load_weights(model, self._weights)
        self._write(model)

    def clear(self) -> None:
        """Remove the folder, if there is one."""
        if self._folder.is_dir():
            with self._workplace() as place:
                os.replace(self._folder, place / "old")

    def _write(self, model: GPT) -> None:
        """Replace the folder; a run killed meanwhile leaves a complete folder or none."""
        with self._workplace() as place:
            about = {**self._about, **(self.found or {})}
            save_model(place / "new", model, self._tokenizer, about)
            if self._folder.is_dir():
                os.replace(self._folder, place / "old")
            os.replace(place / "new", self._folder)

    @contextmanager
    def _workplace(self) -> Iterator[Path]:
        """Create a temporary folder beside the model's, and remove it after the body.

        Its name is random, so that nobody can place a link there. If a killed run leaves it behind,
        the next call or the next checkpoint removes it.
        """
        root = self._folder.parent
        root.mkdir(parents=True, exist_ok=True)
        remove_partial(root)
        place = Path(tempfile.mkdtemp(dir=root, prefix=".", suffix=".partial"))
        try:
            yield place
        finally:
            shutil.rmtree(place, ignore_errors=True)
