"""The pages as they are written: agents/report/pages.py, sections.py, operations.py, figures.py."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from agents.report import SECTIONS, LiveReport, Section, write_report, write_reports
from agents.report.data import Run, load_run
from agents.report.figures import CURVES, coefficient_figure
from agents.report.html import Html, escape, figure
from agents.report.sections import contrasts_section
from tests.agents.fake_runs import REFERENCES, VERDICT, MadeUpRun, make_run
from tests.agents.report.pages import Page

HOSTILE = "</script><script>alert(1)</script><b>bold</b> & \"quoted\" 'too' <!-- "
NO_ICON = "data:,"  # keeps a browser from asking for one
REFRESH = '<meta http-equiv="refresh"'


def change_config(folder: Path, **changes: Any) -> Path:
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**config, **changes}), encoding="utf-8")
    return folder


def page_of(run: MadeUpRun, **options: Any) -> Page:
    return Page(write_report(run.folder, **options))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of every kind: two whole ones, a control, one broken off, and one that only began."""
    root = tmp_path_factory.mktemp("runs")
    make_run(root / "first")
    make_run(root / "second")
    change_config(root / "second", seed=7, out="elsewhere")
    control = MadeUpRun(root / "taught")
    grpo = {"estimator": "ce", "exploration": "all_actions", "learning_rate": 2e-3}
    change_config(root / "taught", grpo=grpo, surgeon="none")
    control.train("bootstrap", 100)
    control.finish(surgeon="none", surgeon_effect=None, commits=None)
    broken = MadeUpRun(root / "broken")
    broken.train("bootstrap", 60)
    broken.save()
    with (root / "broken" / "metrics.jsonl").open("ab") as file:
        file.write(b'{"kind": "eva\n{"kind": "\xc3')
    MadeUpRun(root / "begun")
    return root


@pytest.fixture(scope="module")
def whole(folder: Path) -> Page:
    return Page(write_report(folder / "first"))


@pytest.fixture(scope="module")
def several(folder: Path) -> Page:
    names = ("first", "second", "taught", "broken", "begun")
    return Page(write_reports([folder / name for name in names], folder / "comparison.html")[-1])


@pytest.fixture(params=["first", "taught", "broken", "begun", "comparison"])
def page(request: pytest.FixtureRequest, folder: Path, several: Page) -> Page:
    name = request.param
    return several if name == "comparison" else Page(folder / name / "report.html")


def test_every_page_is_complete_and_consistent(page: Page) -> None:
    assert page.html.startswith('<!DOCTYPE html>\n<html lang="en">')
    assert "default-src 'none'" in page.html
    assert len(page.scripts) == 3  # data, plotly, draw.js
    assert "Plotly.react" in page.scripts[2]
    assert len(page.ids) == len(set(page.ids))
    inner = {link for link in page.links if link.startswith("#")}
    assert inner == {f"#{s.key}" for s in SECTIONS if page.section(s.key)}
    assert all(re.fullmatch(r"\w+/report\.html", x) for x in {*page.links} - inner - {NO_ICON})
    frames = {name.removeprefix("plot-") for name in page.ids if name.startswith("plot-")}
    assert frames == set(page.figures)


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.key)
@pytest.mark.parametrize("names", [["first"], ["begun"], ["first", "second", "taught", "broken"]])
def test_every_section_takes_one_run_or_several(
    folder: Path, section: Section, names: list[str]
) -> None:
    runs = [load_run(folder / name, index=index) for index, name in enumerate(names)]
    figures: dict[str, Any] = {}
    made = section.build(runs, figures)
    assert isinstance(made, Html)
    assert all(f'id="plot-{escape(key)}"' in made for key in figures)
    only_of_several = section.key in ("contrasts", "differences")
    assert bool(made) == (len(runs) > 1 or not only_of_several)


@pytest.fixture
def own_section() -> Iterator[None]:
    def build(runs: Any, figures: dict[str, Any]) -> Html:
        figures["mine"] = {"type": "plotly", "data": [], "layout": {}}
        return figure("mine", "My figure", f"of {len(runs)} run", "nothing")

    SECTIONS.append(Section("mine", "My section", build))
    yield
    SECTIONS.pop()


@pytest.mark.usefixtures("own_section")
def test_a_section_of_ones_own_is_appended(tmp_path: Path) -> None:
    page = page_of(MadeUpRun(tmp_path / "run"))
    assert "My figure" in page.section("mine")
    assert "#mine" in page.links
    assert page.figures["mine"]["type"] == "plotly"


def test_the_page_of_one_run_opens_with_the_verdict(whole: Page) -> None:
    opening = f'<h1>Effect of the surgeon</h1>\n<p class="verdict">{escape(VERDICT)}</p>'
    assert opening in whole.html
    assert "surgeon sac \u00b7 seed 0" in whole.text


def test_the_page_of_several_runs_opens_with_their_verdicts(several: Page) -> None:
    opening = several.html.partition("<main>")[0]
    assert "<h1>Comparison of 5 runs</h1>" in opening
    assert opening.count(str(escape(VERDICT))) == 2
    assert "No surgeon took part in this run." in opening
    assert opening.count("This run has not finished") == 2
    assert re.findall('class="tag">([^<]+)', opening) == [
        "supervised control",
        "unfinished",
        "unfinished",
    ]
    assert "broken: 1 damaged lines of metrics.jsonl were skipped." in several.text


def test_the_page_explains_how_the_model_learned(tmp_path: Path) -> None:
    run = MadeUpRun(tmp_path)
    for estimator, exploration, words in (
        ("brier", "sampled", "rewarded for what it sampled"),
        ("brier", "all_actions", "Nothing was sampled"),
        ("ce", "all_actions", "not reinforcement learning"),
    ):
        change_config(tmp_path, grpo={"estimator": estimator, "exploration": exploration})
        assert words in page_of(run).text


def test_scores_stand_beside_the_references(whole: Page) -> None:
    result = whole.section("result")
    for shown in ("43.9\u202f%", "1.842", "2.657", "1.731"):
        assert f'<span class="value">{shown}</span>' in result
    for reference in REFERENCES:
        assert f'<th scope="row">{reference["name"]}</th>' in result
        assert f"<td>{reference['loss']:.3f}</td>" in result


def test_scores_of_several_runs_are_a_table(several: Page) -> None:
    rows = several.section("result").partition("<tbody>")[2].partition("</tbody>")[0].split("<tr>")
    cells = [[" ".join(re.sub("<[^>]+>", " ", c).split()) for c in r.split("<td>")] for r in rows]
    gains = ["+0.0210 [0.0130, 0.0290]", "+0.0042 [0.0026, 0.0058]"]
    row = ["first", "brier", "sac", "0", "43.9 %", "1.842", *gains, "2.657", "1.731"]
    assert cells[1][:-1] == [*row, "tinyshakespeare"]
    assert cells[3][1:3] == ["ce, all_actions", "none"]
    assert cells[3][6:8] == ["\u2013", "\u2013"]
    assert cells[4][5] == "3.425"  # its last evaluation: 4.2 - 2.35 (1 - exp(-0.4))


def test_runs_of_equal_seed_are_compared_in_pairs(tmp_path: Path) -> None:
    runs = []
    for surgeon, seed in itertools.product(("none", "sac"), (0, 1, 2)):
        loss = 2.0 + 0.1 * seed - (0.02 + 0.01 * seed if surgeon == "sac" else 0.0)
        run = MadeUpRun(tmp_path / f"{surgeon}{seed}")
        run.finish(phases=[], seed=seed, validation={"loss": loss, "accuracy": None})
        runs.append(load_run(change_config(run.folder, surgeon=surgeon, seed=seed)))
    made = contrasts_section(runs, {})
    # Differences -0.02, -0.03, -0.04: mean -0.03, deviation 0.01, t(97.5 %, 2) = 4.3027.
    assert "surgeon sac</th><td>3</td><td>\u22120.0300 [\u22120.0548, \u22120.0052]</td>" in made
    assert "Compared with surgeon none." in made
    pair = contrasts_section([runs[0], runs[3]], {})
    assert "\u22120.0200 (one pair: no interval)" in pair
    assert not contrasts_section([runs[0], runs[4]], {})  # of different seeds


def test_a_figure_of_one_run_holds_all_that_is_drawn(whole: Page) -> None:
    loss = whole.figures["validation/loss"]
    assert loss["levels"] == {row["name"]: row["loss"] for row in REFERENCES}
    assert [span["name"] for span in loss["phases"]] == ["bootstrap", "surgery", "joint"]
    assert len(loss["commits"]) == 2
    (line,) = loss["series"][0]["lines"]
    assert line["y"][0] == 4.2
    returns = whole.figures["surgeon/return"]
    assert len(returns["series"][0]["lines"]) == 2  # surgery and joint
    assert min(returns["points"]["y"]) > -0.5
    assert len(returns["points"]["y"]) == 256 - 17
    assert returns["flatlines"][0]["text"] == "1 entropy"
    assert {curve.metric for curve in CURVES} - set(whole.figures) == {"grpo/text_reward"}
    assert "surgeon/critic_loss" in whole.figures  # among all other metrics
    boxes = re.findall('data-layer="([^"]+)">', whole.html)
    assert boxes == ["phases", "levels", "points", "commits"]


def test_a_figure_of_several_runs_holds_a_series_of_each(several: Page) -> None:
    loss = several.figures["validation/loss"]
    assert [series["run"] for series in loss["series"]] == [0, 1, 2, 3]
    assert "phases" not in loss
    assert [series["run"] for series in several.figures["surgeon/return"]["series"]] == [0, 1]
    runs = json.loads(several.scripts[0])["runs"]
    assert [run["control"] for run in runs] == [False, False, True, False, False]
    boxes = re.findall('data-layer="([^"]+)">', several.html)
    assert boxes == ["run-0", "run-1", "run-2", "run-3", "run-4", "levels"]
    assert [row["label"] for row in several.figures["effect-kl_ref_gain"]["rows"]] == [
        "first",
        "second",
    ]


def test_operations_commits_and_effects_are_listed_with_intervals(whole: Page) -> None:
    operations = whole.section("operations")
    assert "Operations tested on fresh prompts: 6; kept: 2." in operations
    assert "Chance alone would keep at most 0.30 on average." in operations
    assert operations.count('<span class="yes">kept</span>') == 2
    assert operations.count("<td>undone</td>") == 4
    assert "<td>9 entropy</td>" in operations
    rows = re.findall(r'<th scope="row">after (\w+)</th><td>(\w+)</td><td>([^<]+)', operations)
    places = itertools.product(("surgery", "joint"), ("surgeon", "random", "zero"))
    assert [row[:2] for row in rows] == [*places]
    assert rows[3][2] == "+0.0210 [0.0130, 0.0290]"
    assert "after joint: +0.0210 [0.0130, 0.0290]" in operations  # read out


def operations_of(*rounds: Sequence[Sequence[float | None]]) -> Run:
    rows: list[dict[str, Any]] = []
    for tokens, operations in enumerate(rounds, start=1):
        for values in operations:
            clock = {
                "phase": "joint",
                "forward_tokens": tokens,
                "seconds": 1,
                "operation": len(rows) + 1,
            }
            rows.append({"kind": "operation", **clock, "surgeon/coefficients": values})
    return Run(name="run", config={}, rows=rows, summary={})


def test_coefficients_are_averaged_over_rounds_and_thinned() -> None:
    drawn = coefficient_figure(operations_of([[1.0, 0.0], [0.5, -0.5]], [[0.25, None]]))
    assert drawn == {"type": "heat", "x": [2, 3], "z": [[0.75, 0.25], [-0.25, None]]}
    drawn = coefficient_figure(operations_of(*([[n / 500] * 100] for n in range(500))))
    assert drawn is not None
    assert (len(drawn["z"]), len(drawn["x"]), drawn["x"][-1]) == (100, 167, 500)
    for unlike in (operations_of(), operations_of([[]]), operations_of([[1.0], [1.0, 2.0]])):
        assert coefficient_figure(unlike) is None


def test_samples_show_the_first_and_last_texts_and_what_an_operation_changed(whole: Page) -> None:
    samples = whole.section("samples")
    shown = re.findall(r"after (\d+) updates", samples)
    assert shown == ["0", "400", "400", "640", "640"]
    assert re.findall(r"<h3>(\w+)</h3>", samples) == ["bootstrap", "surgery", "joint"]
    assert samples.count("<strong>the gods themselves,\n</strong>ROMEO:") == 7
    assert samples.count("the <del>matter </del>of the world") == 2
    assert samples.count("the <ins>manner </ins>of the world") == 2
    assert samples.count("% of the words differ") == 2


def test_phases_show_first_and_last_evaluations(whole: Page, folder: Path) -> None:
    values = "<td>3.0\u202f% \u2192 41.2\u202f%</td><td>4.2 \u2192 2.013</td>"
    cells = r"bootstrap</th><td>[\d,]+</td><td>400</td><td>1 min 12 s</td>"
    assert re.search(cells + values, whole.section("phases"))
    unfinished = Page(write_report(folder / "broken")).section("phases")
    assert re.search(r"<td>\u2013</td><td>\u2013</td><td>3.0\u202f% \u2192 ", unfinished)


def test_settings_that_differ_are_listed(several: Page, tmp_path: Path) -> None:
    rows = re.findall(r'<th scope="row">([^<]+)</th>', several.section("differences"))
    # Neither the folder nor what an unfinished run has not recorded yet is a difference.
    assert rows == ["seed", "surgeon", "grpo.estimator", "grpo.group_size", "grpo.exploration"]
    folders = [MadeUpRun(tmp_path / name).folder for name in "ab"]
    page = Page(write_reports(folders, tmp_path / "page.html")[-1])
    assert "All runs have the same settings." in page.text


def test_a_run_can_be_repeated_from_its_page(whole: Page) -> None:
    settings = whole.section("settings")
    assert "python train.py --corpus tinyshakespeare --out runs/first" in settings
    assert "86c4e6aa" * 8 in settings
    assert '<th scope="row">grpo.learning_rate</th><td>0.002</td>' in settings
    assert '<th scope="row">versions.torch</th><td>2.13.0</td>' in settings


def test_runs_on_different_texts_are_not_compared(tmp_path: Path) -> None:
    folders = []
    for corpus in ("tinyshakespeare", "playwright"):
        run = MadeUpRun(tmp_path / corpus)
        run.train("bootstrap", 20)
        run.finish(corpus=corpus, corpus_sha256=corpus)
        folders.append(change_config(run.folder, corpus=corpus))
    page = Page(write_reports(folders, tmp_path / "page.html")[-1])
    assert "These runs use different texts (tinyshakespeare, playwright)." in page.text
    assert page.figures["validation/loss"]["levels"] == {}
    assert "5-gram</th>" not in page.html
    assert not page.section("contrasts")


def test_an_unfinished_run_shows_its_progress_and_may_reload(tmp_path: Path) -> None:
    run = MadeUpRun(tmp_path)
    run.train("bootstrap", 20)
    run.evaluate("surgery")
    run.operate("surgery", 8)
    run.finish()
    assert REFRESH not in page_of(run, reload_seconds=30).html
    (tmp_path / "summary.json").unlink()
    assert REFRESH not in page_of(run).html
    page = page_of(run, reload_seconds=30)
    assert f'{REFRESH} content="30">' in page.html
    assert "This run has not finished" in page.text
    assert "Progress so far: phase surgery, update 20, operation 8, " in page.text
    assert "reloads every 30 seconds" in page.text
    assert "measured on a fixed slice of the held-out text" in page.text
    assert '<th scope="row">5-gram</th>' in page.html


def test_a_run_of_an_older_version_has_a_page_of_what_it_recorded(tmp_path: Path) -> None:
    run = MadeUpRun(tmp_path)
    (tmp_path / "references.json").unlink()
    run.finish(
        phases=[{"name": "joint"}],
        validation={"loss": 1.5},
        references=[{"name": "bigram"}],
        surgeon_effect={"verdict": "It helped.", "measurements": [{"after": "joint"}]},
        commits={"tried": 1},
        environment=None,
    )
    run.rows += [
        {"kind": kind, "phase": "joint", "forward_tokens": 9, "seconds": 1}
        for kind in ("grpo", "operation", "commit")
    ]
    run.save()
    page = page_of(run)
    assert '<p class="verdict">It helped.</p>' in page.html
    assert '<span class="value">1.500</span>' in page.html
    assert page.figures == {}


def test_a_run_that_has_only_begun_has_a_page(folder: Path) -> None:
    text = page_of(MadeUpRun(folder / "begun")).text
    for words in ("has been measured yet", "text has been sampled yet", "There were no operations"):
        assert words in text


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    run = MadeUpRun(tmp_path / "<b>run")
    run.train(HOSTILE, 20)
    run.operate(HOSTILE, 16)
    run.commit(HOSTILE, kept=True)
    for row in run.rows:
        if row["kind"] == "sample":
            row.update(prompt=HOSTILE, text=HOSTILE, operated_text=HOSTILE + "x")
        if row["kind"] == "operation":
            row.update({"surgeon/flatline": HOSTILE, f"score/{HOSTILE}": 1.0})
    change_config(run.folder, **{HOSTILE: {"a": HOSTILE}, "grpo": {"estimator": HOSTILE}})
    gain = {"mean": 0.1, "low": 0.0, "high": 0.2}
    gains = {policy: gain for policy in ("surgeon", "random", "zero")}
    measured = dict.fromkeys(("after", "n_prompts", "n_operations"), HOSTILE)
    facts = dict.fromkeys(("corpus", "corpus_sha256", "command", "surgeon", "preset"), HOSTILE)
    run.finish(
        **facts,
        references=[{"name": HOSTILE, "loss": 1.0, "accuracy": 0.5}],
        commits=dict.fromkeys(("policy", "tried", "kept"), HOSTILE),
        environment={HOSTILE: HOSTILE},
        surgeon_effect={
            "verdict": HOSTILE,
            "measurements": [{**measured, "kl_ref_gain": gains, "heldout_loss_fall": gains}],
        },
    )
    MadeUpRun(tmp_path / "other")
    for path in write_reports([run.folder, tmp_path / "other"], tmp_path / "page.html"):
        page = Page(path)
        assert page.tags.count("script") == len(page.scripts) == 3
        assert "b" not in page.tags
        assert "alert(1)</script>" not in page.html
    page = Page(run.folder / "report.html")
    assert page.text.count(" ".join(HOSTILE.split())) > 15
    assert f"score/{HOSTILE}" in page.figures


def test_a_page_is_replaced_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = MadeUpRun(tmp_path)
    write_report(tmp_path).write_text("old", encoding="utf-8")

    def fail(source: Path, target: Path) -> None:
        assert source.stat().st_size > 1_000_000
        raise OSError("no space")

    live = LiveReport(tmp_path, every_seconds=0.0)
    with monkeypatch.context() as patch:
        patch.setattr("avatarl_env.files.os.replace", fail)
        assert not live.refresh()  # a full disk does not end the run
        with pytest.raises(OSError, match="no space"):
            write_report(tmp_path)
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == "old"
    assert not [*tmp_path.glob("*.partial"), *tmp_path.glob(".*")]
    assert page_of(run).html != "old"


def test_a_live_report_is_written_when_due_and_within_its_share(tmp_path: Path) -> None:
    run = MadeUpRun(tmp_path)
    run.save()
    # Made at 100; the first report takes from 100 to 102, which is 2 % of the time until 200.
    times = iter([100.0, 100.0, 102.0, 199.9, 200.0, 200.1, 215.0, 215.2, 215.2])
    live = LiveReport(tmp_path, clock=lambda: next(times))
    assert [live.refresh() for _ in range(4)] == [True, False, True, False]
    assert REFRESH in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert live.refresh()  # 15 s after 200.1


RUN_FILES = ("config.json", "metrics.jsonl", "summary.json", "samples.txt", "report.html")


@pytest.mark.parametrize("name", [*RUN_FILES, "checkpoints/final/model.json"])
@pytest.mark.parametrize("is_there", [True, False])
def test_a_page_is_not_written_in_place_of_a_file_of_a_run(
    name: str, is_there: bool, tmp_path: Path
) -> None:
    folder = MadeUpRun(tmp_path / "run").folder
    out = folder / name
    out.parent.mkdir(parents=True, exist_ok=True)
    if is_there and not out.exists():
        out.write_text("mine", encoding="utf-8")
    before = out.read_bytes() if out.exists() else None
    with pytest.raises(ValueError, match=r"^out must .* got '"):
        write_reports([folder], out)
    assert (out.read_bytes() if out.exists() else None) == before
    assert name == "report.html" or not (folder / "report.html").exists()


def test_a_page_replaces_nothing_but_a_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = [MadeUpRun(tmp_path / name).folder for name in "ab"]
    monkeypatch.chdir(tmp_path)
    own = [folder / "report.html" for folder in folders]
    assert write_reports(folders[:1]) == own[:1]
    (tmp_path / "comparison.html").touch()
    for _ in range(2):
        assert write_reports(folders) == [*own, Path("comparison.html")]
    assert write_reports(folders[:1], folders[0] / "against-others.html")
    (tmp_path / "thesis.html").write_text("<html>mine", encoding="utf-8")
    (tmp_path / "link").symlink_to(tmp_path / "comparison.html")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name in ("thesis.html", "link", "dangling", "a"):
        with pytest.raises(ValueError, match=f"out must be a new file.*{name}"):
            write_reports(folders, tmp_path / name)
    assert (tmp_path / "thesis.html").read_text(encoding="utf-8") == "<html>mine"


def test_nothing_is_written_if_a_folder_is_not_that_of_a_run(tmp_path: Path) -> None:
    folder = MadeUpRun(tmp_path / "run").folder
    with pytest.raises(ValueError, match=r"run_folder.*config\.json.*nothing"):
        write_reports([folder, tmp_path / "nothing"], tmp_path / "page.html")
    assert not [*tmp_path.glob("**/*.html")]
