"""A stopped run goes on from anywhere, and by the very command that it prints."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from agents.cli.main import main
from agents.errors import BadInput, DivergedError
from agents.tracking.run_folder import RunFolder
from agents.training.best_model import BestModel
from agents.training.checkpoint import number_of
from agents.training.config import TrainConfig
from agents.training.curriculum import CurriculumConfig
from agents.training.logger import RunLogger
from agents.training.summary import RunSummary, _new_folder_name, train
from avatarl_env.lm.gpt import GPT, GPTConfig
from avatarl_env.lm.storage import load_model, save_model
from avatarl_env.lm.tokenizer import CharTokenizer
from tests.agents.training.broken_runs import HOME, Kill, config, killed, rows
from tests.agents.training.test_faults import poisoned
from tests.agents.training.test_resume import BrokenOff, break_off, resume
from tests.training_runs import flags

ENDLESS = {
    "curriculum": CurriculumConfig(bootstrap_updates=9999, surgery_rounds=0, joint_rounds=0),
    "checkpoint_seconds": 0.0,
    "surgeon": "none",
    "surgeon_options": {},
}


@pytest.fixture
def workplace(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in a folder with the text in it, in a folder of its own."""
    place = tmp_path / "place"
    (place / "below").mkdir(parents=True)
    shutil.copy(text, place / "text.txt")
    monkeypatch.chdir(place)
    return place


def broken(corpus: str, out: str | None = "run", **changes: Any) -> Path:
    """Begin a run and break it off after seven checkpoints; return its folder."""
    with pytest.MonkeyPatch.context() as patch:
        break_off(patch, 7)
        with pytest.raises(BrokenOff):
            train(replace(config(Path(corpus), Path("run")), out=out, **changes), quiet=True)
    return Path(out) if out else next(Path("runs").iterdir())


def went_the_same_way(folder: Path, whole: RunSummary) -> None:
    """Check that a run of another text file of equal content is the same, bit for bit."""
    weights, others = (
        load_file(path / "checkpoints" / "final" / "model.safetensors")
        for path in (folder, whole.folder)
    )
    assert weights.keys() == others.keys()
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    assert rows(folder) == rows(whole.folder)


def stay(place: Path, folder: Path) -> Path:
    return folder


def move(place: Path, folder: Path) -> Path:
    return folder.rename(place / "below" / "moved run")


def leave(place: Path, folder: Path) -> Path:
    os.chdir(place / "below")
    return Path("..") / folder


def lose_the_place(place: Path, folder: Path) -> Path:
    """Remove the folder in which the run was begun."""
    kept = folder.rename(place.parent / "kept")
    os.chdir(place.parent)
    shutil.rmtree(place / "below")
    return kept


@pytest.mark.parametrize(
    ("corpus", "begin_in", "then"),
    [
        ("text.txt", ".", stay),
        ("text.txt", ".", move),
        ("text.txt", ".", leave),
        ("../text.txt", "below", stay),
        ("../text.txt", "below", lose_the_place),
    ],
)
def test_a_run_goes_on_wherever_it_and_one_are(
    corpus: str,
    begin_in: str,
    then: Callable[[Path, Path], Path],
    workplace: Path,
    whole: RunSummary,
) -> None:
    os.chdir(begin_in)
    folder = then(workplace, broken(corpus))
    again = train(TrainConfig(resume=str(folder)), quiet=True)
    went_the_same_way(again.folder, whole)
    stored = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert stored["corpus"] == str(workplace / "text.txt")
    assert stored["out"] == str(folder)


def test_the_text_may_lie_elsewhere_now(
    workplace: Path, whole: RunSummary, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = broken("text.txt")
    Path("text.txt").rename("below/novel.txt")
    Path("other.txt").write_text(Path("below/novel.txt").read_text() + "x")
    before = sorted(workplace.rglob("*"))
    for words, line in (
        ([], r"corpus file '.*text\.txt' must exist, .*; .* lies elsewhere now, say .* --corpus"),
        (["--corpus", "none.txt"], r"corpus file 'none\.txt' must exist, .* say where .*"),
        (["--corpus", "other.txt"], r"corpus must be the text that the run began with, of sha.*"),
    ):
        assert main(["--resume", "run", *words]) == 2
        assert re.fullmatch(f"train.py: error: {line}\n", capsys.readouterr().err)
    assert [path for path in sorted(workplace.rglob("*")) if path.name != ".lock"] == [
        path for path in before if path.name != ".lock"
    ]
    train(TrainConfig(resume="run", corpus="below/novel.txt"), quiet=True)
    went_the_same_way(folder, whole)
    about = load_model("run").about
    assert about["corpus"] == str(workplace / "below" / "novel.txt")


def test_what_changes_no_result_may_change_and_nothing_else(
    workplace: Path, whole: RunSummary, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = broken("text.txt", checkpoint_seconds=0.0)
    for words, line in (
        (["--threads", "2"], "threads must be the run's own where it is resumed, 1, got 2"),
        (["--seed", "7"], "seed must be the run's own where it is resumed, 0, got 7"),
        (["--preset", "laptop"], "preset must be the run's own .*, 'smoke', got 'laptop'"),
        (["--lm.width", "96"], "lm.width must be the run's own .*, 16, got 96"),
        (["--out", "other"], "out must be the run's own .*, 'run', got 'other'"),
        (["--surgeon-options", "gradient_steps", "9"], "surgeon_options must be the run's own .*"),
    ):
        assert main(["--resume", "run", *words]) == 2
        assert re.fullmatch(f"train.py: error: {line}\n", capsys.readouterr().err)
    stored = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    harmless = ["--checkpoint-seconds", "inf", "--track", "off", "--tensorboard", "False"]
    assert main(["--resume", "run", "--seed", "0", *harmless]) == 0
    went_the_same_way(folder, whole)
    again = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert again == {**stored, "checkpoint_seconds": "inf"}


def test_endless_intervals_come_back(workplace: Path) -> None:
    folder = broken("text.txt")
    stored = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**stored, "checkpoint_seconds": "inf"}))
    again = train(TrainConfig(resume="run"), quiet=True)
    assert again.summary["checkpoints"]["written"] == 0
    # The usual value is asked for where all others are the run's own, as on a command line.
    (folder / "summary.json").unlink()
    shutil.rmtree(folder / "checkpoints" / "final")
    assert main(["--resume", "run", "--checkpoint-seconds", "30"]) == 0
    assert json.loads((folder / "config.json").read_text())["checkpoint_seconds"] == 30.0


def test_a_diverged_run_goes_back_whatever_its_text_was_called(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agents.training.curriculum.MOST_BAD_UPDATES", 3)
    seen: list[int] = []
    poisoned(monkeypatch, lambda n: seen.append(n) or n >= 3)  # type: ignore[func-returns-value]
    with pytest.raises(DivergedError, match=r"^3 updates in a row"):
        train(replace(config(Path("text.txt"), Path("run")), out=None), quiet=True)
    assert seen.count(3) == 2


def test_runs_of_one_second_get_folders_of_their_own(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.strftime", lambda form: form.replace("%", ""))
    names = [str(RunFolder(_new_folder_name("smoke")).path) for _ in range(3)]
    assert names == ["runs/Ymd-HMS-smoke", "runs/Ymd-HMS-smoke-2", "runs/Ymd-HMS-smoke-3"]
    shutil.rmtree("runs")
    Path("runs").touch()
    with pytest.raises(BadInput, match="out must be a folder that can be written to, got 'runs/"):
        train(replace(config(Path("text.txt"), Path("run")), out=None), quiet=True)


def test_a_folder_whose_run_was_killed_as_it_began_can_be_used(
    workplace: Path, whole: RunSummary
) -> None:
    assert killed(Path("run").absolute(), workplace / "text.txt", Kill("as a file is replaced", 1))
    names = sorted(path.name for path in Path("run").iterdir())
    assert [bool(re.fullmatch(r"\.\w{16}\.partial", name)) for name in names].count(True) == 1
    assert len(names) == 2
    with pytest.raises(BadInput, match="resume must be a run folder, with its config"):
        train(resume(Path("run")), quiet=True)
    went_the_same_way(train(config(Path("text.txt"), Path("run")), quiet=True).folder, whole)


def test_a_lock_that_is_a_link_is_not_followed(workplace: Path) -> None:
    Path("run").mkdir()
    Path("run/.lock").symlink_to(workplace / "elsewhere")
    with pytest.raises(
        BadInput, match=r"^out must be .*, got 'run': its \.lock is a symbolic link$"
    ):
        train(config(Path("text.txt"), Path("run")), quiet=True)
    assert not Path("elsewhere").exists()


# --- the best model so far -----------------------------------------------------------------------


def test_what_a_killed_run_left_of_the_best_model_goes_and_no_link_is_followed(
    tmp_path: Path,
) -> None:
    tokenizer = CharTokenizer.from_text("ab")
    model = GPT(
        GPTConfig(vocab_size=tokenizer.vocab_size, context=8, n_layers=1, n_heads=1, width=8)
    )
    root, mine = tmp_path / "checkpoints", tmp_path / "mine"
    (root / ".abc.partial" / "new").mkdir(parents=True)
    save_model(mine, model, tokenizer, {"whose": "mine"})
    before = {path.name: path.read_bytes() for path in mine.iterdir()}
    for name in (".best.partial", ".best-old.partial", ".abc.partial/new/model.json"):
        (root / name).symlink_to(mine)
    best = BestModel(root / "best", model, tokenizer, {"whose": "the run's"})
    for n, loss in enumerate((2.0, 1.0)):
        best.consider(loss, n)
        assert load_model(str(root / "best")).about["update"] == n
        assert [path.name for path in root.iterdir()] == ["best"]
    assert {path.name: path.read_bytes() for path in mine.iterdir()} == before
    best.clear()
    assert list(root.iterdir()) == []


def bests(patch: pytest.MonkeyPatch, losses: Mapping[int, float]) -> dict[int, dict[str, Any]]:
    """Let evaluations find these losses by update; keep the weights that they were made of."""
    kept: dict[int, dict[str, Any]] = {}
    evaluate = RunLogger._evaluate

    def noted(self: RunLogger) -> None:
        model = self._env.patient.model
        n = self._learner.n_done
        kept[n] = {name: p.detach().clone() for name, p in model.named_parameters()}
        evaluate(self)

    consider = BestModel.consider

    def told(self: BestModel, loss: float, update: int) -> None:
        consider(self, losses[update], update)

    patch.setattr(RunLogger, "_evaluate", noted)
    patch.setattr(BestModel, "consider", told)
    return kept


def assert_best(folder: Path, weights: Mapping[str, torch.Tensor], update: int) -> None:
    stored = load_model(str(folder / "checkpoints" / "best"))
    assert stored.about["update"] == update
    for name, p in stored.model.named_parameters():
        assert torch.equal(p, weights[name]), name


@pytest.mark.parametrize("after", [3, 5, 7])
def test_the_best_model_is_kept_beside_the_last_and_survives(
    after: int, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Evaluations come at updates 0, 4, 6 (the end of the bootstrap), 8 and 10.
    losses = {0: 3.0, 4: 1.0, 6: 1.0, 8: float("nan"), 10: 2.0}
    kept = bests(monkeypatch, losses)
    with monkeypatch.context() as patch:
        break_off(patch, after)
        with pytest.raises(BrokenOff):
            train(config(text, tmp_path / "run"), quiet=True)
    # What lies there may be of a later evaluation than the checkpoint, or be gone.
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "best")
    again = train(resume(tmp_path / "run"), quiet=True)
    assert again.summary["best"] == {"update": 4, "loss": 1.0}
    assert_best(again.folder, kept[4], 4)
    assert not list((again.folder / "checkpoints").glob(".*"))


def test_a_later_best_than_the_checkpoints_is_not_believed(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = {0: 1.0, 4: 0.5, 6: 2.0, 8: 2.0, 10: 2.0}
    kept = bests(monkeypatch, losses)
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        break_off(patch, 3)
        with pytest.raises(BrokenOff):
            train(config(text, folder), quiet=True)
    first = dict(kept)
    (folder / "checkpoints" / "best" / "model.json").write_text("{}")
    losses[4] = 2.0  # as a GPU might find on another day
    train(resume(folder), quiet=True)
    assert_best(folder, first[0], 0)


# --- as programs ---------------------------------------------------------------------------------


def environment(tmp_path: Path, data: Path | None = None) -> dict[str, str]:
    """Return an environment without a network, cache or data folder but `data`."""
    known = {name: x for name, x in os.environ.items() if name != "AVATARL_DATA_DIR"}
    nowhere = "http://127.0.0.1:9"
    known |= {"HTTPS_PROXY": nowhere, "https_proxy": nowhere, "no_proxy": "", "NO_PROXY": ""}
    known |= {"XDG_CACHE_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    known |= {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    return known if data is None else {**known, "AVATARL_DATA_DIR": str(data)}


def until(condition: Callable[[], object], child: subprocess.Popen[str]) -> None:
    start = time.monotonic()
    while not condition():
        assert child.poll() is None, child.communicate()
        assert time.monotonic() - start < 240
        time.sleep(0.05)


def stopped(child: subprocess.Popen[str], ready: Callable[[], object], number: int) -> str:
    """Send a signal once it is time; return the command that the child says goes on."""
    until(ready, child)
    child.send_signal(number)
    _, err = child.communicate(timeout=120)
    assert child.returncode == 128 + number, err
    found = re.search(r"stopped; go on with: (.*)\n", err)
    assert found, err
    return found[1]


@pytest.fixture
def shakespeare(tmp_path: Path) -> Path:
    """A data folder that has tinyshakespeare, if this machine has."""
    data = os.environ.get("AVATARL_DATA_DIR")
    if not data or not Path(data, "tinyshakespeare", "input.txt").is_file():
        pytest.skip("AVATARL_DATA_DIR does not name a folder with tinyshakespeare")
    return Path(data)


@pytest.mark.slow
@pytest.mark.parametrize("program", ["train.py", "avatarl"])
@pytest.mark.parametrize("has_data", [False, True])
def test_the_first_command_goes_on_by_the_very_command_that_it_prints(
    program: str, has_data: bool, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    data = request.getfixturevalue("shakespeare") if has_data else None
    place = tmp_path / "a new place"
    place.mkdir()
    start = (
        [sys.executable, str(HOME / "train.py")] if program == "train.py" else ["avatarl", "train"]
    )
    piped: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    piped |= {"cwd": place, "env": environment(tmp_path, data)}

    def written() -> list[Path]:
        return sorted(place.glob("runs/*/checkpoints/step-*"))

    def rows_of(kind: str) -> int:
        found = [path.read_text(encoding="utf-8") for path in place.glob("runs/*/metrics.jsonl")]
        return "".join(found).count(f'"kind": "{kind}"')

    command = stopped(subprocess.Popen(start, **piped), lambda: rows_of("grpo"), signal.SIGINT)
    (folder,) = (place / "runs").iterdir()
    assert len(written()) == 1
    stored = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert stored["corpus"] == ("tinyshakespeare" if has_data else "playwright")
    before = stored, (folder / "metrics.jsonl").read_bytes()
    for number in (signal.SIGTERM, signal.SIGHUP):
        n_rows, n_written = rows_of("grpo"), written()
        child = subprocess.Popen(f"exec {command}", shell=True, **piped)
        assert stopped(child, lambda n=n_rows: rows_of("grpo") > n, number) == command  # type: ignore[misc]
        assert written() != n_written
    assert (folder / "metrics.jsonl").read_bytes().startswith(before[1])
    assert json.loads((folder / "config.json").read_text(encoding="utf-8")) == before[0]


def endless(text: Path, folder: Path) -> list[str]:
    """Spell a small run out that goes on until it is stopped."""
    return [sys.executable, str(HOME / "train.py"), *flags(config(text, folder, **ENDLESS))]


@pytest.mark.slow
def test_signals_that_were_ignored_from_the_start_stay_ignored(text: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    words = ["sh", "-c", "trap '' INT HUP; exec \"$@\"", "sh", *endless(text, folder)]
    child = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def newest() -> int:
        return max((number_of(p) for p in folder.glob("checkpoints/step-*")), default=0)

    until(newest, child)
    for number in (signal.SIGINT, signal.SIGHUP):
        child.send_signal(number)
        then = newest()
        until(lambda then=then: newest() > then + 1, child)  # type: ignore[misc]
    stopped(child, newest, signal.SIGTERM)


@pytest.mark.slow
def test_a_run_whose_terminal_is_closed_ends_with_a_checkpoint(text: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    pid, terminal = pty.fork()
    if pid == 0:
        words = endless(text, folder)
        os.execv(words[0], words)
    deadline = time.monotonic() + 240
    while not list(folder.glob("checkpoints/step-*")):
        assert time.monotonic() < deadline
        if select.select([terminal], [], [], 0.1)[0]:
            os.read(terminal, 4096)
    os.close(terminal)
    newest = sorted(folder.glob("checkpoints/step-*"))[-1]
    deadline = time.monotonic() + 120
    while (ended := os.waitpid(pid, os.WNOHANG))[0] == 0:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert os.waitstatus_to_exitcode(ended[1]) == 128 + signal.SIGHUP
    assert sorted(folder.glob("checkpoints/step-*"))[-1] >= newest
    assert "has not finished" in (folder / "report.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_ctrl_c_while_a_command_begins_is_one_line(tmp_path: Path) -> None:
    for delay in (0.3, 0.6, 1.0, 2.0):
        for start in ([sys.executable, str(HOME / "train.py")], ["avatarl", "train"]):
            child = subprocess.Popen(
                [*start, "--corpus", "playwright"],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                cwd=tmp_path,
                env=environment(tmp_path),
            )
            time.sleep(delay)
            child.send_signal(signal.SIGINT)
            _, err = child.communicate(timeout=120)
            assert child.returncode == 130, err
            assert re.search(r"(^|\n)(train.py|avatarl train): (interrupted|stopped; .*)\n$", err)
            assert "Traceback" not in err


def test_the_command_that_goes_on_is_quoted(tmp_path: Path) -> None:
    from agents.errors import Stopped

    folder = tmp_path / "my 'run'"
    command = str(Stopped(signal.SIGINT, folder)).removeprefix("stopped; go on with: ")
    assert shlex.split(command)[-2:] == ["--resume", str(folder)]
