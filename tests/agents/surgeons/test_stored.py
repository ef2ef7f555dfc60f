"""Tests of agents/surgeons/stored.py: a surgeon's files may be damaged, or made to do harm."""

from __future__ import annotations

import base64
import io
import json
import os
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from agents.surgeons.sb3 import SB3Surgeon
from agents.surgeons.stored import fill, filled
from tests.training_runs import QUICK_SAC, ToyOperations

QUICK = {"sac": QUICK_SAC, "ppo": {}, "ars": {}}
"""One of each kind: with variables beside the networks, on-policy, and one that reads its own."""


def surgeon_of(name: str) -> SB3Surgeon:
    env: Any = ToyOperations(0.1, 0.2, 0.3, n_rows=2)
    return SB3Surgeon(name, env, 3, **QUICK[name])


@pytest.fixture(params=sorted(QUICK))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def saved(name: str, folder: Path) -> SB3Surgeon:
    surgeon = surgeon_of(name)
    surgeon.operate(4)
    with torch.no_grad():
        for p in surgeon.model.policy.parameters():  # ARS learns nothing where all is paid alike
            p.add_(0.25)
    surgeon.save(folder)
    return surgeon


def tensors(surgeon: SB3Surgeon) -> list[torch.Tensor]:
    """Return all that a surgeon learned: networks, optimizers and variables."""
    names, variables = surgeon.model._get_torch_save_params()
    found: list[torch.Tensor] = [getattr(surgeon.model, each) for each in variables]
    todo: list[Any] = [surgeon.model.get_parameters()[each] for each in names]
    while todo:
        value = todo.pop()
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, dict):
            todo.extend(value.values())
    return [tensor.detach().clone() for tensor in found]


def equal(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    same_number = len(left) == len(right)
    return same_number and all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def rewrite(folder: Path, change: Callable[[dict[str, bytes]], None], **how: Any) -> None:
    """Write the zip file anew, with other entries."""
    path = folder / "surgeon.zip"
    with zipfile.ZipFile(path) as archive:
        entries = {entry: archive.read(entry) for entry in archive.namelist()}
    change(entries)
    with zipfile.ZipFile(path, "w", **how) as archive:
        for entry, content in entries.items():
            archive.writestr(entry, content)


class Harm:
    """Makes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def test_what_is_pickled_in_the_zip_is_not_opened(name: str, tmp_path: Path) -> None:
    surgeon, mark = saved(name, tmp_path), tmp_path / "mark"
    code = base64.b64encode(pickle.dumps(Harm(mark))).decode()

    def change(entries: dict[str, bytes]) -> None:
        data = json.loads(entries["data"])
        data["lr_schedule"] = {":type:": "<class 'function'>", ":serialized:": code}
        entries["data"] = json.dumps(data).encode()

    rewrite(tmp_path, change)
    loaded = surgeon_of(name)
    assert not equal(tensors(loaded), tensors(surgeon))
    loaded.load(tmp_path)
    assert not mark.exists()
    assert equal(tensors(loaded), tensors(surgeon))
    assert loaded.model.num_timesteps == surgeon.model.num_timesteps > 0
    assert loaded.model._n_updates == surgeon.model._n_updates > 0
    if name == "ars":  # keeps a copy, which it goes on from
        weights = torch.nn.utils.parameters_to_vector(surgeon.model.policy.parameters())
        assert torch.equal(loaded.model.weights, weights)  # type: ignore[attr-defined]
    type(surgeon.model).load(tmp_path / "surgeon.zip", device="cpu")  # type: ignore[attr-defined]
    assert mark.exists()  # the zip is one that does harm


def test_code_in_place_of_a_network_is_refused_and_not_run(name: str, tmp_path: Path) -> None:
    saved(name, tmp_path)
    mark, content = tmp_path / "mark", io.BytesIO()
    torch.save({"action_net.weight": Harm(mark)}, content)
    rewrite(tmp_path, lambda entries: entries.update({"policy.pth": content.getvalue()}))
    with pytest.raises(ValueError, match=r"^surgeon must be stored as one of the same kind"):
        surgeon_of(name).load(tmp_path)
    assert not mark.exists()


def edit(part: str, change: Callable[[Any], None]) -> Callable[[Path], None]:
    """Return what changes the state in one entry of the zip file."""

    def harm(folder: Path) -> None:
        def change_part(entries: dict[str, bytes]) -> None:
            state, content = torch.load(io.BytesIO(entries[part]), weights_only=True), io.BytesIO()
            change(state)
            torch.save(state, content)
            entries[part] = content.getvalue()

        rewrite(folder, change_part)

    return harm


def squeeze(entries: dict[str, bytes]) -> None:
    """Compress what is within the zip file's entries."""
    content = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(entries["policy.pth"])) as old,
        zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for entry in old.namelist():
            new.writestr(entry, old.read(entry))
    entries["policy.pth"] = content.getvalue()


def cut(folder: Path) -> None:
    path = folder / "surgeon.zip"
    path.write_bytes(path.read_bytes()[:2000])


def edit_json(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def harm(folder: Path) -> None:
        path = folder / "surgeon_normalisation.json"
        content = json.loads(path.read_text(encoding="utf-8"))
        change(content)
        path.write_text(json.dumps(content), encoding="utf-8")

    return harm


def earlier_format(content: dict[str, Any]) -> None:
    del content["sizes"], content["counters"]


WEIGHT, MOMENTS = "actor.mu.weight", "actor.optimizer.pth"
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut": (cut, "File is not a zip file"),
    "missing": (lambda f: (f / "surgeon.zip").unlink(), "No such file"),
    "without a part": (
        lambda f: rewrite(f, lambda entries: entries.pop(MOMENTS)),
        "it lacks actor.optimizer.pth",
    ),
    "another shape": (
        edit("policy.pth", lambda s: s.update({WEIGHT: torch.zeros(9, 9)})),
        r"policy/actor.mu.weight must have shape \(2, 8\) and type torch.float32, got \(9, 9\)",
    ),
    "another type": (
        edit("policy.pth", lambda s: s.update({WEIGHT: s[WEIGHT].double()})),
        "and torch.float64",
    ),
    "no tensor": (
        edit("policy.pth", lambda s: s.update({WEIGHT: 1.0})),
        "must be a tensor, got float",
    ),
    "no number": (
        edit("policy.pth", lambda s: s[WEIGHT].fill_(torch.nan)),
        "policy/actor.mu.weight must be finite",
    ),
    "a layer more": (
        edit("policy.pth", lambda s: s.update(more=s[WEIGHT])),
        r"policy must hold \[",
    ),
    "larger than any file": (
        edit("policy.pth", lambda s: s.update({WEIGHT: torch.zeros(1).expand(10**6, 10**6)})),
        r"got \(1000000, 1000000\)",
    ),
    "other moments": (
        edit(MOMENTS, lambda s: s["state"][0].update(exp_avg=torch.zeros(7))),
        "actor.optimizer/0/exp_avg must have shape",
    ),
    "moments of nothing": (
        edit(MOMENTS, lambda s: s["state"].update({99: s["state"][0]})),
        "actor.optimizer must know 6 parameters, got 99",
    ),
    "moments missing": (
        edit(MOMENTS, lambda s: s["state"][0].pop("exp_avg_sq")),
        "actor.optimizer/0 must hold",
    ),
    "another variable": (
        edit("pytorch_variables.pth", lambda s: s.update(log_ent_coef=torch.zeros(3))),
        "pytorch_variables/log_ent_coef must have shape",
    ),
    "compressed": (
        lambda f: rewrite(f, lambda _: None, compression=zipfile.ZIP_DEFLATED),
        "must not be compressed",
    ),
    "compressed within": (lambda f: rewrite(f, squeeze), "must not be compressed"),
    "an earlier format": (edit_json(earlier_format), "got one of an earlier format, which had to"),
    "other sizes": (
        edit_json(lambda c: c["sizes"].update(observation=57, action=8)),
        "observations of 3 numbers and actions of 2, got one for 57 and 8 in ",
    ),
    "statistics cut": (edit_json(lambda c: c["mean"].pop()), r"mean must be finite and of shape"),
    "a spread below 0": (edit_json(lambda c: c.update(return_var=-1.0)), "return_var must be fin"),
    "a counter of text": (
        edit_json(lambda c: c["counters"].update(num_timesteps="9")),
        "num_timesteps must be a number as a surgeon counts, got '9'",
    ),
    "no statistics": (edit_json(lambda c: c.pop("count")), "got .*: 'count'"),
    "no object": (
        lambda f: (f / "surgeon_normalisation.json").write_text("[]"),
        "earlier format",
    ),
    "nested": (
        lambda f: (f / "surgeon_normalisation.json").write_text("[" * 100_000),
        "readable surgeon_normalisation.json",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_damaged_or_does_not_fit_is_refused_and_changes_nothing(
    damage: str, tmp_path: Path
) -> None:
    saved("sac", tmp_path)
    harm, message = DAMAGES[damage]
    harm(tmp_path)
    surgeon = surgeon_of("sac")
    surgeon.operate(2)
    before, n_done = tensors(surgeon), surgeon.model.num_timesteps
    with pytest.raises(ValueError, match=rf"^surgeon must .*{message}") as caught:
        surgeon.load(tmp_path)
    assert "\n" not in str(caught.value)
    assert equal(tensors(surgeon), before)
    assert surgeon.model.num_timesteps == n_done


def grown(name: str) -> Callable[[dict[str, Any]], None]:
    """Return what gives each transition of a stored buffer a number more."""

    def change(buffer: dict[str, Any]) -> None:
        rows = buffer["arrays"][name]
        buffer["arrays"][name] = np.concatenate([rows, rows[..., :1]], axis=-1)

    return change


def forget_rows(buffer: dict[str, Any]) -> None:
    """Leave one row of two, which numpy would copy to both."""
    buffer["arrays"]["rewards"] = buffer["arrays"]["rewards"][:, :1]


def past_the_end(buffer: dict[str, Any]) -> None:
    """Have as many rows as there is room for, the next to be written after the last."""
    size = surgeon_of("sac")._buffer.buffer_size
    rows = {name: np.resize(v, (size, *v.shape[1:])) for name, v in buffer["arrays"].items()}
    buffer.update(full=True, pos=size, arrays=rows)


BUFFERS: dict[str, Callable[[dict[str, Any]], None]] = {
    "longer observations": grown("observations"),
    "longer actions": grown("actions"),
    "fewer rows": forget_rows,
    "more than fits": lambda buffer: buffer.update(pos=10**9),
    "less than nothing": lambda buffer: buffer.update(pos=-1),
    "not full": lambda buffer: buffer.update(full=True),
    "no flag": lambda buffer: buffer.update(full=1),
    "full and past its end": past_the_end,
}


@pytest.mark.parametrize("change", BUFFERS)
def test_a_stored_replay_buffer_of_another_size_is_refused(change: str, tmp_path: Path) -> None:
    full, empty = (each._buffer for each in (saved("sac", tmp_path), surgeon_of("sac")))
    assert full is not None
    assert empty is not None
    stored = filled(full)
    BUFFERS[change](stored)
    with pytest.raises(ValueError, match=r"^replay buffer.* must "):
        fill(empty, stored)
    assert empty.size() == 0


def test_how_many_transitions_are_remembered_is_told(tmp_path: Path) -> None:
    surgeon = surgeon_of("sac")
    sizes = []
    for _ in range(2):
        surgeon.operate(2)  # of three steps on two rows
        sizes.append(surgeon.stats()["surgeon/replay_buffer_size"])
    assert sizes == [12.0, 24.0]
    surgeon.save(tmp_path)
    surgeon.load(tmp_path)
    assert "surgeon/replay_buffer_size" not in surgeon.stats()  # past operations are forgotten
    small = SB3Surgeon("sac", ToyOperations(0.1, n_rows=2), 0, **QUICK_SAC, buffer_size=6)  # type: ignore[arg-type]
    small.operate(9)
    assert small.stats()["surgeon/replay_buffer_size"] == 6.0
    on_policy = surgeon_of("ppo")
    on_policy.operate(1)
    assert not re.search("replay", " ".join(on_policy.stats()))
