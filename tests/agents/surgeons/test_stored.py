"""A stored surgeon may be damaged, or made to do harm."""

from __future__ import annotations

import base64
import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from agents.surgeons.base import reading
from agents.surgeons.sb3 import SB3Surgeon
from agents.surgeons.stored import fill, filled
from tests.training_runs import QUICK_SAC, ToyOperations, same

OPTIONS: dict[str, dict[str, Any]] = {"sac": QUICK_SAC, "ppo": {}, "ars": {}}
"""One of each kind: with variables beside the networks, on-policy, and one with its own copy."""


def make(name: str = "sac", **options: Any) -> SB3Surgeon:
    env: Any = ToyOperations(0.1, 0.2, 0.3, n_rows=2)
    return SB3Surgeon(name, env, 3, **OPTIONS[name], **options)


def saved(name: str, folder: Path) -> SB3Surgeon:
    surgeon = make(name)
    surgeon.operate(2)
    with torch.no_grad():
        for p in surgeon.model.policy.parameters():  # ARS learns nothing where all is paid alike
            p.add_(0.25)
    surgeon.save(folder)
    return surgeon


def load(surgeon: SB3Surgeon, folder: Path) -> None:
    with reading(folder):
        surgeon.load(folder)


def learned(surgeon: SB3Surgeon) -> list[torch.Tensor]:
    """Return copies of networks, optimizer states and variables."""

    def leaves(value: Any) -> Iterator[torch.Tensor]:
        if isinstance(value, torch.Tensor):
            yield value.detach().clone()
        elif isinstance(value, dict):
            for item in value.values():
                yield from leaves(item)

    variables = [getattr(surgeon.model, each) for each in surgeon.model._get_torch_save_params()[1]]
    return [*leaves(surgeon.model.get_parameters()), *leaves(dict(enumerate(variables)))]


def rewrite(folder: Path, change: Callable[[dict[str, bytes]], object], **how: Any) -> None:
    """Write the zip file anew, with other entries."""
    path = folder / "surgeon.zip"
    with zipfile.ZipFile(path) as archive:
        entries = {entry: archive.read(entry) for entry in archive.namelist()}
    change(entries)
    with zipfile.ZipFile(path, "w", **how) as archive:
        for entry, content in entries.items():
            archive.writestr(entry, content)


class Harm:
    """Makes a folder when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("name", OPTIONS)
def test_all_that_was_learned_is_loaded_and_nothing_is_unpickled(name: str, tmp_path: Path) -> None:
    surgeon, mark = saved(name, tmp_path), tmp_path / "mark"
    code = base64.b64encode(pickle.dumps(Harm(mark))).decode()

    def change(entries: dict[str, bytes]) -> None:
        data = json.loads(entries["data"])
        data["lr_schedule"] = {":type:": "<class 'function'>", ":serialized:": code}
        entries["data"] = json.dumps(data).encode()

    rewrite(tmp_path, change)
    loaded = make(name)
    assert not same(learned(loaded), learned(surgeon))
    load(loaded, tmp_path)
    assert not mark.exists()
    assert same(learned(loaded), learned(surgeon))
    assert loaded.model.num_timesteps == surgeon.model.num_timesteps > 0
    assert loaded.model._n_updates == surgeon.model._n_updates > 0
    if name == "ars":
        weights = torch.nn.utils.parameters_to_vector(surgeon.model.policy.parameters())
        assert torch.equal(loaded.model.weights, weights)  # type: ignore[attr-defined]
    type(surgeon.model).load(tmp_path / "surgeon.zip", device="cpu")  # type: ignore[attr-defined]
    assert mark.exists()  # the zip does do harm


def edit(part: str, change: Callable[[Any], object]) -> Callable[[Path], None]:
    """Return what changes the tensors in one entry of the zip file."""

    def change_part(entries: dict[str, bytes]) -> None:
        state, content = torch.load(io.BytesIO(entries[part]), weights_only=True), io.BytesIO()
        change(state)
        torch.save(state, content)
        entries[part] = content.getvalue()

    return lambda folder: rewrite(folder, change_part)


def edit_json(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def harm(folder: Path) -> None:
        path = folder / "surgeon_normalisation.json"
        content = json.loads(path.read_text(encoding="utf-8"))
        change(content)
        path.write_text(json.dumps(content), encoding="utf-8")

    return harm


def harm_policy(folder: Path) -> None:
    content = io.BytesIO()
    torch.save({"action_net.weight": Harm(folder / "mark")}, content)
    rewrite(folder, lambda entries: entries.update({"policy.pth": content.getvalue()}))


WEIGHT, MOMENTS = "actor.mu.weight", "actor.optimizer.pth"
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "code": (harm_policy, "Weights only load failed"),
    "cut": (
        lambda f: (f / "surgeon.zip").write_bytes((f / "surgeon.zip").read_bytes()[:2000]),
        "not a zip file",
    ),
    "missing": (lambda f: (f / "surgeon.zip").unlink(), "No such file"),
    "without a part": (lambda f: rewrite(f, lambda entries: entries.pop(MOMENTS)), MOMENTS),
    "another shape": (
        edit("policy.pth", lambda s: s.update({WEIGHT: torch.zeros(9, 9)})),
        rf"policy/{WEIGHT} must be .*\(2, 8\).*\(9, 9\)",
    ),
    "another type": (
        edit("policy.pth", lambda s: s.update({WEIGHT: s[WEIGHT].double()})),
        "float32.*float64",
    ),
    "no tensor": (edit("policy.pth", lambda s: s.update({WEIGHT: 1.0})), "got float"),
    "nan": (edit("policy.pth", lambda s: s[WEIGHT].fill_(torch.nan)), f"{WEIGHT} must be finite"),
    "a layer more": (edit("policy.pth", lambda s: s.update(more=s[WEIGHT])), "policy must hold"),
    "larger than any file": (
        edit("policy.pth", lambda s: s.update({WEIGHT: torch.zeros(1).expand(10**6, 10**6)})),
        r"\(1000000, 1000000\)",
    ),
    "other moments": (
        edit(MOMENTS, lambda s: s["state"][0].update(exp_avg=torch.zeros(7))),
        r"actor.optimizer/0/exp_avg must be .*\(7,\)",
    ),
    "another variable": (
        edit("pytorch_variables.pth", lambda s: s.update(log_ent_coef=torch.zeros(3))),
        "log_ent_coef must be",
    ),
    "compressed": (
        lambda f: rewrite(f, lambda _: None, compression=zipfile.ZIP_DEFLATED),
        "must not be compressed",
    ),
    "other sizes": (
        edit_json(lambda c: c["sizes"].update(observation=57, action=8)),
        r"sizes .*3.*2.*57.*8",
    ),
    "statistics cut": (edit_json(lambda c: c["mean"].pop()), r"mean must be .*\(3,\).*\(2,\)"),
    "a text for a counter": (
        edit_json(lambda c: c["counters"].update(num_timesteps="9")),
        "num_timesteps must be int.*str",
    ),
    "no statistics": (edit_json(lambda c: c.pop("count")), "must hold .*count"),
    "no object": (lambda f: (f / "surgeon_normalisation.json").write_text("[]"), "list"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_damaged_or_does_not_fit_is_refused_and_changes_nothing(
    damage: str, tmp_path: Path
) -> None:
    saved("sac", tmp_path)
    harm, message = DAMAGES[damage]
    harm(tmp_path)
    surgeon = make()
    before = learned(surgeon)
    with pytest.raises(ValueError, match=rf"^surgeon must .*{message}") as caught:
        load(surgeon, tmp_path)
    assert "\n" not in str(caught.value)
    assert same(learned(surgeon), before)
    assert surgeon.model.num_timesteps == 0
    assert not (tmp_path / "mark").exists()


BUFFERS: dict[str, Callable[[dict[str, Any]], object]] = {
    "longer observations": lambda b: b["arrays"].update(
        observations=np.repeat(b["arrays"]["observations"], 2, axis=-1)
    ),
    "fewer rows": lambda b: b["arrays"].update(rewards=b["arrays"]["rewards"][:, :1]),
    "more than fits": lambda b: b.update(pos=10**9),
    "not full": lambda b: b.update(full=True),
    "no flag": lambda b: b.update(full=1),
}


@pytest.mark.parametrize("change", BUFFERS)
def test_a_stored_replay_buffer_of_another_size_is_refused(change: str) -> None:
    surgeon = make(buffer_size=20)
    surgeon.operate(2)
    full: Any = surgeon.model.replay_buffer  # type: ignore[attr-defined]
    empty: Any = make(buffer_size=20).model.replay_buffer  # type: ignore[attr-defined]
    stored = filled(full)
    BUFFERS[change](stored)
    with pytest.raises(ValueError, match=r"replay buffer.* must "):
        fill(empty, stored)
    assert empty.size() == 0
    surgeon.operate(3)  # now it is full
    fill(empty, filled(full))
    assert empty.size() == full.size() == 10
    assert np.array_equal(empty.rewards, full.rewards)
