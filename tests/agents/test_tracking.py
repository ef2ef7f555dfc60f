from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from agents.tracking import Clock, MetricWriter, RunFolder, to_json

CLOCK = Clock(phase="joint", update=7, operation=3, forward_tokens=4096, seconds=1.5)


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "runs" / "first")


def rows(folder: RunFolder) -> list[dict[str, object]]:
    return [json.loads(line) for line in folder.metrics.read_text(encoding="utf-8").splitlines()]


def test_a_new_folder_is_made_with_its_parents(folder: RunFolder) -> None:
    assert folder.path.is_dir()
    assert rows(folder) == []


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
    with pytest.raises(ValueError, match=r"which holds metrics\.jsonl$"):
        RunFolder(folder.path)


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
