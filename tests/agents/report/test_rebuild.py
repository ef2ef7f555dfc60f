from __future__ import annotations

import json
from pathlib import Path

import pytest

from agents.report import rebuild
from tests.agents.fake_runs import make_run


def teach(folder: Path) -> Path:
    """Make a run a supervised one."""
    make_run(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["grpo"]["estimator"] = "ce"
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def test_one_folder_gets_its_report(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run").folder
    assert rebuild([folder]) == [folder / "report.html"]


def test_several_folders_get_theirs_and_a_comparison(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = [make_run(tmp_path / name).folder for name in "ab"]
    monkeypatch.chdir(tmp_path)
    pages = rebuild([*folders, tmp_path / "b" / ".." / "a"])
    assert pages == [*(folder / "report.html" for folder in folders), Path("comparison.html")]
    page = (tmp_path / "comparison.html").read_text(encoding="utf-8")
    assert 'href="a/report.html"' in page
    assert 'href="b/report.html"' in page


def test_the_control_among_the_runs_is_shown_beside_the_others(tmp_path: Path) -> None:
    mine, taught = make_run(tmp_path / "mine").folder, teach(tmp_path / "taught")
    other = make_run(tmp_path / "other")
    other.finish(corpus_sha256="0" * 64)
    pages = rebuild([mine, taught, other.folder], tmp_path / "page.html")
    shown = ["The supervised control is" in page.read_text(encoding="utf-8") for page in pages]
    # Beside the run on the same text; not beside itself, and not beside another text.
    assert shown == [True, False, False, False]


def test_nothing_is_written_if_a_folder_is_none_of_a_run(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run").folder
    with pytest.raises(ValueError, match="run_folder must hold"):
        rebuild([folder, tmp_path / "nothing"])
    assert not (folder / "report.html").exists()
    with pytest.raises(ValueError, match="at least one folder"):
        rebuild([])


def test_a_control_of_another_size_is_not_shown_beside_a_run(tmp_path: Path) -> None:
    mine, taught = make_run(tmp_path / "mine").folder, teach(tmp_path / "taught")
    config = json.loads((taught / "config.json").read_text(encoding="utf-8"))
    config["lm"] = {**config.get("lm", {}), "width": 999}
    (taught / "config.json").write_text(json.dumps(config), encoding="utf-8")
    rebuild([mine, taught], tmp_path / "comparison.html")
    page = (mine / "report.html").read_text(encoding="utf-8")
    assert "The supervised control is the run" not in page


RUN_FILES = ("config.json", "metrics.jsonl", "summary.json", "samples.txt", "report.html")


@pytest.mark.parametrize("name", [*RUN_FILES, "references.json", "checkpoints/final/model.json"])
@pytest.mark.parametrize("is_there", [True, False])
def test_a_comparison_is_not_written_over_what_is_a_runs_own(
    name: str, is_there: bool, tmp_path: Path
) -> None:
    """Nor under its name: a run with a summary has finished."""
    folder = make_run(tmp_path / "run").folder
    out = folder / name
    out.parent.mkdir(parents=True, exist_ok=True)
    if is_there and not out.exists():
        out.write_text("mine", encoding="utf-8")
    if not is_there and name not in ("config.json", "metrics.jsonl"):
        out.unlink(missing_ok=True)
    before = out.read_bytes() if out.exists() else None
    with pytest.raises(ValueError, match=r"^out must be a "):
        rebuild([folder], out)
    assert (out.read_bytes() if out.exists() else None) == before
    assert name == "report.html" or not (folder / "report.html").exists()


def test_a_comparison_is_written_over_nothing_but_a_page(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run").folder
    page = tmp_path / "page"
    for _ in range(2):  # its own page it may replace
        assert rebuild([folder], page)[-1] == page
    (tmp_path / "empty").touch()
    rebuild([folder], tmp_path / "empty")
    rebuild([folder], folder / "against-others.html")
    (tmp_path / "thesis.html").write_text("<html>mine", encoding="utf-8")
    (tmp_path / "link").symlink_to(page)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name in ("thesis.html", "link", "dangling", "run"):
        with pytest.raises(ValueError, match=r"^out must be a new file or a page written before"):
            rebuild([folder], tmp_path / name)
    assert (tmp_path / "thesis.html").read_text(encoding="utf-8") == "<html>mine"
