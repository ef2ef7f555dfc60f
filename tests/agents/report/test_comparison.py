from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from agents.report import write_comparison, write_report
from agents.report.sections import layers
from tests.agents.fake_runs import VERDICT, MadeUpRun, make_run
from tests.agents.report.pages import NO_ICON, Page

HOSTILE = "<script>alert(1)</script><b>&\"'"


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**config, **changes}), encoding="utf-8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of every kind: two whole ones, a control, and one that was broken off."""
    root = tmp_path_factory.mktemp("several")
    make_run(root / "first")
    make_run(root / "second")
    change_config(root / "second", seed=7, out="elsewhere")
    write_report(root / "second")
    control = MadeUpRun(root / "taught")
    grpo = {"estimator": "ce", "exploration": "all_actions", "learning_rate": 2e-3}
    change_config(root / "taught", grpo=grpo, surgeon="none")
    control.train("bootstrap", 400)
    control.finish(surgeon="none", surgeon_effect=None, commits=None)
    broken = MadeUpRun(root / "broken")
    broken.train("bootstrap", 60)
    broken.save()
    with (root / "broken" / "metrics.jsonl").open("ab") as file:
        file.write(b'{"kind": "eva\n{"kind": "\xc3')
    return root


@pytest.fixture(scope="module")
def page(folder: Path) -> Page:
    folders = [folder / name for name in ("first", "second", "taught", "broken")]
    return Page(write_comparison(folders, folder / "comparison.html"))


def section(page: Page, name: str) -> str:
    return page.html.partition(f'<section id="{name}">')[2].partition("</section>")[0]


def cells(page: Page, label: str) -> list[str]:
    row = next(
        row for row in section(page, "numbers").split("<tr>") if re.search(rf">{label}( <|<)", row)
    )
    return [" ".join(re.sub("<[^>]+>", " ", cell).split()) for cell in re.split("</t[hd]>", row)][
        :-1
    ]


def test_the_page_stands_alone(page: Page) -> None:
    links = set(page.links) - {NO_ICON}
    inner = {link.removeprefix("#") for link in links if link.startswith("#")}
    assert inner <= set(page.ids)
    # The only other link is that to a run's report, which is there.
    assert {link for link in links if not link.startswith("#")} == {"second/report.html"}
    assert "default-src 'none'" in page.html
    assert len(page.scripts) == 3


def test_every_run_has_its_numbers(page: Page) -> None:
    gains = ["+0.0210 [0.0130, 0.0290]", "+0.0042 [0.0026, 0.0058]"]
    whole = ["tinyshakespeare", "brier", "sac", "1.842", "43.9 %", "1.731", *gains]
    assert cells(page, "first")[:-1] == ["first", *whole]
    assert cells(page, "first")[-1].endswith(" s")
    taught = cells(page, "taught")
    assert taught[:4] == ["taught supervised control", "tinyshakespeare", "ce, all_actions", "none"]
    assert taught[-3:-1] == ["\u2013", "\u2013"]
    broken = cells(page, "broken")
    assert broken[0] == "broken unfinished"
    # Its last evaluation, after 60 updates: 4.2 - 2.35 (1 - exp(-0.4)).
    assert broken[4] == "3.425"
    assert cells(page, "5-gram")[4:7] == ["1.669", "52.7 %", "\u2013"]


def test_every_run_has_its_verdict(page: Page) -> None:
    verdicts = section(page, "verdicts")
    assert verdicts.count("operations raised the score by 0.021") == 2
    assert VERDICT in page.text
    assert "No surgeon took part." in verdicts
    assert "Not finished, so that nothing has been judged." in verdicts


def test_what_is_special_about_the_runs_is_said_first(page: Page) -> None:
    assert "Not finished: broken. Their numbers are of their last evaluation" in page.text
    assert "torn, and are left out: broken (1)." in page.text
    assert "different texts" not in page.text


def test_the_runs_are_lines_over_one_another_with_a_box_each(page: Page) -> None:
    boxes = re.findall(r'data-layer="([^"]+)">', page.html)
    assert boxes == ["run-0", "run-1", "run-2", "run-3", "references"]
    assert "taught (supervised control)" in page.text
    loss = page.figures["loss"]
    assert [trace["meta"] for trace in loss["data"]] == boxes[:4]
    assert [trace["line"]["dash"] for trace in loss["data"]] == ["solid", "solid", "dash", "solid"]
    assert len({trace["line"]["color"] for trace in loss["data"]}) == 4
    assert layers(loss) == set(boxes)
    assert {trace["meta"] for trace in page.figures["return"]["data"]} == {"run-0", "run-1"}
    frames = {name.removeprefix("plot-") for name in page.ids if name.startswith("plot-")}
    assert frames == set(page.figures)


def test_lines_take_their_colours_from_the_page(page: Page) -> None:
    declared = set(re.findall(r"(--[\w-]+):", page.html.partition("</style>")[0]))
    assert {f"--run-{n}" for n in range(8)} <= declared


def test_the_effects_stand_under_one_another(page: Page) -> None:
    layout = page.figures["effect-kl_ref_gain"]["layout"]
    assert layout["yaxis"]["ticktext"] == ["first", "second"]
    assert page.figures["effect-kl_ref_gain"]["data"][0]["x"] == [0.021, 0.021]


def test_only_settings_that_differ_are_listed(page: Page) -> None:
    rows = re.findall(r'<th scope="row">([^<]+)</th>', section(page, "differences"))
    # What the broken run has not written down yet is no difference; a folder's name is none at all.
    assert rows == ["seed", "surgeon", "grpo.estimator", "grpo.group_size", "grpo.exploration"]


def test_runs_of_the_same_settings_say_so(folder: Path, tmp_path: Path) -> None:
    page = Page(write_comparison([folder / "first"], tmp_path / "one.html"))
    assert "They have the same settings." in page.text
    assert "Comparison of 1 run" in page.text


def test_runs_on_different_texts_are_not_measured_by_one_table(tmp_path: Path) -> None:
    make_run(tmp_path / "a")
    make_run(tmp_path / "b").finish(corpus="playwright", corpus_sha256="0" * 64)
    page = Page(write_comparison([tmp_path / "a", tmp_path / "b"], tmp_path / "page.html"))
    assert "These runs read different texts (tinyshakespeare, playwright)." in page.text
    assert "5-gram" not in page.text
    assert "references" not in layers(page.figures["loss"])


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    folders = [tmp_path / "x" / "run", tmp_path / "y" / "run", tmp_path / "other"]
    for folder in folders:
        make_run(folder)
    again = tmp_path / "x" / ".." / "other"
    page = Page(write_comparison([*folders, again], tmp_path / "page.html"))
    assert "x/run \u00b7 y/run \u00b7 other" in page.text
    assert "Comparison of 3 runs" in page.text


def test_runs_that_have_only_begun_can_be_compared(tmp_path: Path) -> None:
    folders = [MadeUpRun(tmp_path / name).folder for name in "ab"]
    page = Page(write_comparison(folders, tmp_path / "page.html"))
    assert page.figures == {}
    assert "Nothing has been measured yet." in page.text
    assert "No surgeon has been judged." in page.text


def test_many_runs_repeat_colours_but_not_looks(tmp_path: Path) -> None:
    folders = []
    for index in range(9):
        run = MadeUpRun(tmp_path / f"run{index}")
        run.train("bootstrap", 20)
        run.save()
        folders.append(run.folder)
    page = Page(write_comparison(folders, tmp_path / "page.html"))
    looks = [(line["line"]["color"], line["line"]["dash"]) for line in page.figures["loss"]["data"]]
    assert looks[0] == ("var(--run-0)", "solid")
    assert looks[8] == ("var(--run-0)", "dot")
    assert len(set(looks)) == 9


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    folder = tmp_path / "<b>run"
    run = make_run(folder)
    change_config(folder, grpo={"estimator": HOSTILE, HOSTILE: 1}, surgeon=HOSTILE)
    effect = {"verdict": HOSTILE, "measurements": []}
    run.finish(corpus=HOSTILE, surgeon=HOSTILE, surgeon_effect=effect)
    make_run(tmp_path / "other")
    page = Page(write_comparison([folder, tmp_path / "other"], tmp_path / "page.html"))
    assert page.tags.count("script") == 3
    assert "b" not in page.tags
    assert page.text.count("alert(1)") > 3
    hovers = [trace["hovertemplate"] for trace in page.figures["loss"]["data"]]
    assert hovers[0].startswith("&lt;b&gt;run: ")


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    with pytest.raises(ValueError, match="run_folders must name at least one folder, got none"):
        write_comparison([], out)
    with pytest.raises(ValueError, match=r"run_folder must hold config\.json and metrics\.jsonl"):
        write_comparison([make_run(tmp_path / "a").folder, tmp_path / "nothing"], out)
    assert not out.exists()
