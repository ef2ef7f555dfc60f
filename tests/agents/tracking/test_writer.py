from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from agents.tracking.writer import Clock, MetricWriter, RunFolder, to_json

CLOCK = Clock(phase="joint", update=7, operation=3, forward_tokens=4096, seconds=1.5)


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "runs" / "first")


def rows(folder: RunFolder) -> list[dict[str, object]]:
    return [json.loads(line) for line in folder.metrics.read_text(encoding="utf-8").splitlines()]


def test_a_new_folder_is_made_with_its_parents(folder: RunFolder) -> None:
    assert folder.path.is_dir()
    assert list(folder.path.iterdir()) == []


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    assert RunFolder(tmp_path).path == tmp_path


def test_a_folder_that_holds_anything_is_refused_and_left_alone(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt", "c.txt", "d.txt"):
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match="out must be an empty or new folder") as caught:
        RunFolder(tmp_path)
    assert repr(str(tmp_path)) in str(caught.value)
    assert "a.txt, b.txt, c.txt, ..." in str(caught.value)
    assert len(list(tmp_path.iterdir())) == 4


def test_the_folder_of_an_earlier_run_is_refused(folder: RunFolder) -> None:
    MetricWriter(folder, config={}).close()
    with pytest.raises(ValueError, match=r"which holds config\.json, metrics\.jsonl"):
        RunFolder(folder.path)


def test_what_a_run_leaves_that_was_killed_as_it_began_counts_as_nothing(
    folder: RunFolder,
) -> None:
    (folder.path / ".lock").touch()
    code = """if True:
        import os, signal, sys
        from agents.tracking.writer import MetricWriter, RunFolder
        os.replace = lambda *names: os.kill(os.getpid(), signal.SIGKILL)
        MetricWriter(RunFolder(sys.argv[1]), config={"seed": 2})
    """
    child = subprocess.run([sys.executable, "-c", code, folder.path], check=False)
    assert child.returncode == -signal.SIGKILL
    assert sorted(path.suffix for path in folder.path.iterdir()) == ["", ".partial"]
    MetricWriter(RunFolder(folder.path), config={"seed": 3}).close()
    assert json.loads(folder.config.read_text()) == {"seed": 3}


def test_a_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run"
    path.touch()
    with pytest.raises(ValueError, match="out must be an empty or new folder, got the file"):
        RunFolder(path)


def test_a_place_that_cannot_be_written_to_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="out must be a folder that can be written to, got"):
        RunFolder(tmp_path / "file" / "run")


def test_config_is_written_with_its_nested_parts(folder: RunFolder) -> None:
    @dataclasses.dataclass(frozen=True)
    class Inner:
        betas: tuple[float, float]
        device: torch.device

    @dataclasses.dataclass(frozen=True)
    class Outer:
        inner: Inner
        out: Path

    config = Outer(Inner((0.9, 0.95), torch.device("cpu")), Path("runs/first"))
    with MetricWriter(folder, config=config):
        pass
    assert json.loads(folder.config.read_text()) == {
        "inner": {"betas": [0.9, 0.95], "device": "cpu"},
        "out": str(Path("runs/first")),
    }


def test_a_row_holds_kind_clock_and_metrics(folder: RunFolder) -> None:
    with MetricWriter(folder, config={}) as writer:
        writer.write("grpo", CLOCK, {"grpo/loss": 0.25})
    assert rows(folder) == [
        {
            "kind": "grpo",
            "phase": "joint",
            "update": 7,
            "operation": 3,
            "forward_tokens": 4096,
            "seconds": 1.5,
            "grpo/loss": 0.25,
        }
    ]


def test_each_row_can_be_read_while_the_run_goes_on(folder: RunFolder) -> None:
    with MetricWriter(folder, config={}) as writer:
        for count in (1, 2, 3):
            writer.write("evaluation", CLOCK, {"validation/loss": float(count)})
            assert len(rows(folder)) == count


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        pytest.param(np.float32(0.5), 0.5, id="numpy-scalar"),
        pytest.param(np.bool_(True), True, id="numpy-bool"),
        pytest.param(np.array([[1, 2], [3, 4]]), [[1, 2], [3, 4]], id="numpy-array"),
        pytest.param(torch.tensor(3, dtype=torch.int64), 3, id="torch-scalar"),
        pytest.param(torch.ones(2, requires_grad=True), [1.0, 1.0], id="torch-with-gradient"),
        pytest.param(torch.tensor([0.5], dtype=torch.bfloat16), [0.5], id="torch-bfloat16"),
        pytest.param(torch.float32, "torch.float32", id="torch-dtype"),
        pytest.param(float("nan"), None, id="nan"),
        pytest.param(np.array([1.0, -np.inf]), [1.0, None], id="infinity-in-an-array"),
        pytest.param({"low": float("inf"), "n": (1,)}, {"low": None, "n": [1]}, id="nested"),
        pytest.param(True, True, id="bool"),
        pytest.param(None, None, id="none"),
        pytest.param("\u2028é", "\u2028é", id="text"),
    ],
)
def test_values_become_strict_json(value: object, expected: object) -> None:
    converted = to_json(value, "value")
    assert converted == expected
    assert type(converted) is type(expected)
    assert json.loads(json.dumps(converted, allow_nan=False)) == expected


def test_a_value_without_a_form_in_json_is_refused_by_name(folder: RunFolder) -> None:
    with MetricWriter(folder, config={}) as writer:
        with pytest.raises(TypeError, match=r"^score/kl_ref\[1\] must be a value .*, got object$"):
            writer.write("operation", CLOCK, {"score/kl_ref": [1.0, object()]})
        with pytest.raises(TypeError, match="must have strings as keys, got 3"):
            writer.write("operation", CLOCK, {"score/kl_ref": {3: 1.0}})
    assert rows(folder) == []


def test_an_unknown_kind_is_refused(folder: RunFolder) -> None:
    with (
        MetricWriter(folder, config={}) as writer,
        pytest.raises(ValueError, match=r"kind must be one of grpo, evaluation, .*, got 'eval'"),
    ):
        writer.write("eval", CLOCK, {})


def test_a_metric_cannot_overwrite_the_clock(folder: RunFolder) -> None:
    with (
        MetricWriter(folder, config={}) as writer,
        pytest.raises(ValueError, match=r"named like a field of the clock, got \['update'\]"),
    ):
        writer.write("grpo", CLOCK, {"update": 1})


def test_samples_are_written_to_be_read(folder: RunFolder) -> None:
    with MetricWriter(folder, config={}) as writer:
        writer.write("sample", CLOCK, {"prompt": "To", "text": " be", "operated_text": None})
        writer.write("sample", CLOCK, {"prompt": "To", "text": " be", "operated_text": " bee"})
    plain = "=== joint, update 7, operation 3\n--- prompt\nTo\n--- text\n be\n"
    operated = "--- text of the operated model\n bee\n"
    assert folder.samples.read_text(encoding="utf-8") == plain + "\n" + plain + operated + "\n"
    assert [row["operated_text"] for row in rows(folder)] == [None, " bee"]


def test_summary_is_replaced_in_one_piece(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    with MetricWriter(folder, config={}) as writer:
        writer.write_summary({"seconds": 1.0})
        with monkeypatch.context() as patch:
            patch.setattr("os.replace", _fail)
            with pytest.raises(OSError, match="disk"):
                writer.write_summary({"seconds": 2.0})
        assert json.loads(folder.summary.read_text()) == {"seconds": 1.0}
        writer.write_summary({"seconds": np.float64("nan")})
    assert json.loads(folder.summary.read_text()) == {"seconds": None}


def _fail(*_: object) -> None:
    raise OSError("disk full")


def test_rows_survive_an_exception_in_the_run(folder: RunFolder) -> None:
    writer = MetricWriter(folder, config={})
    writer.write("grpo", CLOCK, {"grpo/loss": 1.0})
    with pytest.raises(KeyboardInterrupt), writer:
        raise KeyboardInterrupt
    assert len(rows(folder)) == 1
    assert not folder.summary.exists()


def test_closing_twice_is_closing_once(folder: RunFolder) -> None:
    writer = MetricWriter(folder, config={})
    writer.close()
    writer.close()
    with pytest.raises(ValueError, match="closed file"):
        writer.write("grpo", CLOCK, {})


def sample(text: str) -> dict[str, str | None]:
    return {"prompt": "To", "text": text, "operated_text": None}


def test_positions_are_the_lengths_of_the_files(folder: RunFolder) -> None:
    with MetricWriter(folder, config={}) as writer:
        assert writer.positions() == (0, 0)
        writer.write("grpo", CLOCK, {"grpo/loss": 0.25})
        writer.write("sample", CLOCK, sample("é\u2028"))  # characters of two and three bytes
        assert writer.positions() == (
            len(folder.metrics.read_bytes()),
            len(folder.samples.read_bytes()),
        )
    assert len(folder.samples.read_bytes()) == len(folder.samples.read_text(encoding="utf-8")) + 3


def test_positions_are_on_the_disk(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    with MetricWriter(folder, config={}) as writer:
        names = {writer._metrics.fileno(): "metrics", writer._samples.fileno(): "samples"}
        monkeypatch.setattr("os.fsync", lambda number: synced.append(names[number]))
        writer.positions()
    assert synced == ["metrics", "samples"]


def test_a_run_that_goes_on_is_the_run_that_was_never_broken_off(tmp_path: Path) -> None:
    def write(writer: MetricWriter, numbers: range) -> None:
        for number in numbers:
            writer.write("grpo", CLOCK, {"grpo/loss": float(number)})
            writer.write("sample", CLOCK, sample(f"é{number}"))

    whole, broken = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "broken")
    with MetricWriter(whole, config={"seed": 3}) as writer:
        write(writer, range(4))
    with MetricWriter(broken, config={"seed": 3}) as writer:
        write(writer, range(2))
        place = writer.positions()
        write(writer, range(2, 3))
        writer.write_summary({"seconds": 1.0})
    with broken.metrics.open("a", encoding="utf-8") as file:
        file.write('{"kind": "gr')  # killed while it wrote
    again = RunFolder.reopen(broken.path)
    with MetricWriter(again, config={"seed": 3}, resume_from=place) as writer:
        assert not again.summary.exists()
        assert writer.positions() == place
        write(writer, range(2, 4))
    for name in ("config.json", "metrics.jsonl", "samples.txt"):
        assert (broken.path / name).read_bytes() == (whole.path / name).read_bytes()


def test_the_configuration_is_the_one_that_a_run_goes_on_with(folder: RunFolder) -> None:
    MetricWriter(folder, config={"track": "off"}).close()
    again = RunFolder.reopen(folder.path)
    MetricWriter(again, config={"track": "offline"}, resume_from=(0, 0)).close()
    assert json.loads(folder.config.read_text()) == {"track": "offline"}


@pytest.mark.parametrize(
    ("metrics", "samples", "message"),
    [
        (-1, 0, r"metrics\.jsonl must have a line that ends at byte -1, got none$"),
        (5, 0, r"metrics\.jsonl must have a line that ends at byte 5, got none$"),
        (9999, 0, r"metrics\.jsonl must have the 9999 bytes that were recorded, got \d+$"),
        (0, 5, r"samples\.txt must have a line that ends at byte 5, got none$"),
    ],
)
def test_a_place_where_no_line_ends_is_refused_and_nothing_is_cut(
    folder: RunFolder, metrics: int, samples: int, message: str
) -> None:
    with MetricWriter(folder, config={}) as writer:
        writer.write("sample", CLOCK, sample(" be"))
        writer.write_summary({})
    before = {path: path.read_bytes() for path in folder.path.iterdir()}
    with pytest.raises(ValueError, match=message):
        MetricWriter(folder, config={}, resume_from=(metrics, samples))
    assert {path: path.read_bytes() for path in folder.path.iterdir()} == before


def test_a_run_without_samples_yet_can_go_on(folder: RunFolder) -> None:
    MetricWriter(folder, config={}).close()
    folder.samples.unlink()
    with MetricWriter(RunFolder.reopen(folder.path), config={}, resume_from=(0, 0)) as writer:
        assert writer.positions() == (0, 0)
    folder.samples.unlink()
    with pytest.raises(
        ValueError, match=r"samples\.txt must have the 3 bytes that were recorded, got 0$"
    ):
        MetricWriter(folder, config={}, resume_from=(0, 3))


def test_a_folder_without_a_run_cannot_be_reopened(folder: RunFolder) -> None:
    with pytest.raises(ValueError, match=r"folder must hold a run's config\.json to go on"):
        RunFolder.reopen(folder.path)


def test_reopening_changes_nothing(folder: RunFolder) -> None:
    with MetricWriter(folder, config={"seed": 3}) as writer:
        writer.write("grpo", CLOCK, {"grpo/loss": 0.25})
    before = {path: path.read_bytes() for path in folder.path.iterdir()}
    again = RunFolder.reopen(folder.path)
    assert list(again.rows()) == rows(folder)
    assert {path: path.read_bytes() for path in folder.path.iterdir()} == before


def test_importing_the_writer_imports_none_of_the_others_libraries() -> None:
    libraries = "{'wandb', 'tensorboard'} & set(sys.modules)"
    code = f"import sys, agents.tracking.writer; sys.exit(len({libraries}))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
