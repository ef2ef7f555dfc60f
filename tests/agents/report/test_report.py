from __future__ import annotations

import html
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agents.report import write_report
from agents.report.figures import WHO
from agents.report.sections import layers
from tests.agents.fake_runs import PLAY, REFERENCES, VERDICT, MadeUpRun, make_run
from tests.agents.report.pages import NO_ICON, Page

HOSTILE = "</script><script>alert(1)</script><b>bold</b> & \"quoted\" 'too' <!-- "


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Page:
    folder = tmp_path_factory.mktemp("runs") / "whole"
    make_run(folder)
    return Page(write_report(folder))


def strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from strings(item)


def test_the_report_is_one_file_in_the_run_folder(tmp_path: Path) -> None:
    make_run(tmp_path)
    before = set(tmp_path.iterdir())
    path = write_report(tmp_path)
    assert path == tmp_path / "report.html"
    assert set(tmp_path.iterdir()) - before == {path}


def test_the_report_loads_nothing_and_may_not(whole: Page) -> None:
    assert all(link.startswith("#") for link in whole.links if link != NO_ICON)
    assert "default-src 'none'" in whole.html
    assert "@import" not in whole.html.partition("</style>")[0]


def test_the_page_says_what_it_is_to_a_browser(whole: Page) -> None:
    assert whole.html.startswith('<!DOCTYPE html>\n<html lang="en">')
    assert "<title>What the surgeon was worth \u00b7 whole</title>" in whole.html
    assert "prefers-color-scheme: dark" in whole.html


def test_the_verdict_comes_first(whole: Page) -> None:
    verdict = html.escape(VERDICT)
    assert f'<h1>What the surgeon was worth</h1>\n<p class="verdict">{verdict}</p>' in whole.html


def test_a_long_verdict_is_set_smaller(tmp_path: Path) -> None:
    make_run(tmp_path).finish(surgeon_effect={"verdict": "w" * 301, "measurements": []})
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert f'<p class="verdict long">{"w" * 301}</p>' in page


def test_every_link_within_the_page_leads_somewhere(whole: Page) -> None:
    assert len(whole.ids) == len(set(whole.ids))
    assert {link.removeprefix("#") for link in whole.links} - {NO_ICON} <= set(whole.ids)


def test_every_figure_has_a_frame_and_every_frame_a_figure(whole: Page) -> None:
    frames = {name.removeprefix("plot-") for name in whole.ids if name.startswith("plot-")}
    assert frames == set(whole.figures)
    assert {"accuracy", "loss", "entropy", "reward", "return", "action"} <= frames
    assert {"effect-kl_ref_gain", "effect-heldout_loss_fall"} <= frames
    assert "surgeon-surgeon/critic_loss" in frames


def test_figures_take_their_colours_from_the_page(whole: Page) -> None:
    colours = {text for text in strings(whole.figures) if text.startswith("var(")}
    declared = set(re.findall(r"(--[\w-]+):", whole.html.partition("</style>")[0]))
    assert colours
    assert {colour[4:-1] for colour in colours} <= declared


def test_the_scripts_are_the_data_plotly_once_and_our_own(whole: Page) -> None:
    assert len(whole.scripts) == 3
    assert whole.html.count("Copyright 2012-") == 1
    assert "Plotly.react" in whole.scripts[2]


def test_headline_numbers_stand_beside_the_tables(whole: Page) -> None:
    for shown in ("43.9\u202f%", "1.842", "2.657", "1.731"):
        assert shown in whole.html
    sentence = (
        "By accuracy and by loss the model is better than the trigram table (38.1 %, 2.049). "
        "By accuracy and by loss the model is worse than the 4-gram table (47.2 %, 1.774)."
    )
    assert sentence in whole.text
    for reference in REFERENCES:
        assert f'<th scope="row">{reference["name"]}</th>' in whole.html


BETTER, WORSE = "loss the model is better than the ", "loss the model is worse than the "


@pytest.mark.parametrize(
    ("accuracy", "loss", "said", "unsaid"),
    [
        (0.1, 3.0, [f"{WORSE}bigram table (27.0 %"], [BETTER, "Beside"]),
        (0.9, 1.0, [f"{BETTER}5-gram table (52.7 %"], [WORSE, "Beside"]),
        # Right more often than the 5-gram, and more surprised than the trigram.
        (
            0.53,
            2.1,
            [f"{BETTER}bigram", "Beside the trigram", "accuracy is better and its loss is worse"],
            [WORSE, f"{BETTER}trigram", f"{BETTER}5-gram"],
        ),
        (0.2, 1.0, ["Beside the bigram", "accuracy is worse and its loss is better"], [BETTER]),
        # What is shown as the same number is equal.
        (0.52702, 1.0, ["Beside the 5-gram", "accuracy is equal and its loss is better"], [WORSE]),
        (None, 1.0, [], [BETTER, WORSE, "Beside"]),
        (0.5, None, [], [BETTER, WORSE, "Beside"]),
    ],
)
def test_a_model_is_placed_among_the_tables_by_accuracy_and_by_loss(
    tmp_path: Path,
    accuracy: float | None,
    loss: float | None,
    said: list[str],
    unsaid: list[str],
) -> None:
    validation = {"loss": loss, "bits_per_char": 1.4, "accuracy": accuracy, "entropy": 1.0}
    make_run(tmp_path).finish(validation=validation)
    text = Page(write_report(tmp_path)).text
    assert all(words in text for words in said)
    assert not any(words in text for words in unsaid)


def test_a_table_without_numbers_is_left_out_of_the_comparison(tmp_path: Path) -> None:
    references = [*REFERENCES[:-1], {**REFERENCES[-1], "loss": None}]
    make_run(tmp_path).finish(
        validation={"loss": 1.0, "bits_per_char": 1.4, "accuracy": 0.9, "entropy": 1.0},
        references=references,
    )
    text = Page(write_report(tmp_path)).text
    assert f"{BETTER}{REFERENCES[-2]['name']} table" in text


def test_operations_and_commits_are_listed(whole: Page) -> None:
    assert (
        "Put to the test on fresh draws from the text reserved for the surgeon: 6; kept: 2."
        in whole.text
    )
    assert "Luck alone would keep at most 0.30 of them on average." in whole.text
    assert whole.html.count('<span class="yes">kept</span>') == 2
    assert whole.html.count("<td>undone</td>") == 4
    assert "+0.0210 [0.0130, 0.0290]" in whole.html
    assert "9 entropy" in whole.html


def test_a_run_of_hundreds_of_operations_stays_small_and_readable(tmp_path: Path) -> None:
    run = MadeUpRun(tmp_path)
    run.evaluate("surgery")
    for _ in range(16):
        run.operate("surgery", 64)
    flatlines = [row["surgeon/flatline"] for row in run.rows if row.get("surgeon/flatline")]
    assert len(set(flatlines)) == len(flatlines) > 30  # each with figures of its own
    run.finish()
    page = Page(write_report(tmp_path))
    assert f"<td>{len(flatlines)} entropy</td>" in page.html
    operations = page.html.partition('<section id="operations">')[2].partition("</section>")[0]
    assert len(operations) < 5_000
    assert len(json.dumps(page.figures)) < 200_000


def test_the_coefficients_of_the_operations_are_a_heat_map(whole: Page) -> None:
    operations = whole.html.partition('<section id="operations">')[2].partition("</section>")[0]
    assert operations.count('<span class="cells" role="img" aria-label="') == 6
    assert (
        len(re.findall(r'<i class="(?:plus|minus)" style="--share:\d+%" title="', operations)) == 48
    )
    assert whole.figures["coefficients"]["data"][0]["type"] == "heatmap"


def test_texts_before_and_after_show_what_changed(whole: Page) -> None:
    samples = whole.html.partition('<section id="samples">')[2].partition("</section>")[0]
    assert samples.count("the <del>matter</del> of the world") == 2
    assert samples.count("the <ins>manner</ins> of the world") == 2
    # 2 of 19 + 19 words.
    assert samples.count("; 5 % of the words differ</p>") == 2


def test_whatever_can_be_hidden_in_the_figures_has_a_box(whole: Page) -> None:
    boxes = re.findall(r'<input type="checkbox" checked data-layer="([^"]+)">', whole.html)
    used = {layer for drawn in whole.figures.values() for layer in layers(drawn)}
    assert boxes == ["phases", "references", "points", "kept"]
    assert set(boxes) == used


def test_a_supervised_control_stands_beside_the_run(tmp_path: Path) -> None:
    make_run(tmp_path / "mine")
    control = make_run(tmp_path / "taught")
    validation = {"loss": 1.5, "bits_per_char": 2.2, "accuracy": 0.55, "entropy": 1.4}
    control.finish(validation=validation)
    page = Page(write_report(tmp_path / "mine", control=tmp_path / "taught"))
    assert '<th scope="row">supervised control</th>' in page.html
    assert "55.0\u202f%" in page.html
    assert "The supervised control is the run taught" in page.text
    assert "another text" not in page.text
    for key in ("accuracy", "loss", "entropy"):
        (line,) = [t for t in page.figures[key]["data"] if t.get("meta") == "control"]
        assert line["line"]["dash"] == "dash"
    assert 'data-layer="control"' in page.html


def test_a_control_of_another_text_is_said_to_be_none(tmp_path: Path) -> None:
    make_run(tmp_path / "mine")
    make_run(tmp_path / "taught").finish(corpus_sha256="0" * 64)
    page = Page(write_report(tmp_path / "mine", control=tmp_path / "taught"))
    assert "It read another text, so that the numbers must not be compared." in page.text


def test_the_effect_is_also_a_table(whole: Page) -> None:
    rows = re.findall(r'<th scope="row">after (\w+)</th><td>(\w+)</td><td>([^<]+)', whole.html)
    assert [row[:2] for row in rows] == [
        (after, who) for after in ("surgery", "joint") for who in ("surgeon", "random", "zero")
    ]
    assert rows[3][2] == "+0.0210 [0.0130, 0.0290]"


def test_samples_of_every_phase_have_their_prompt_in_bold(whole: Page) -> None:
    samples = whole.html.partition('<section id="samples">')[2].partition("</section>")[0]
    assert re.findall(r"<h3>(\w+)</h3>", samples) == ["bootstrap", "surgery", "joint"]
    assert samples.count("<strong>the gods themselves,\n</strong>ROMEO:") == 7
    assert "after 0 updates and 0 operations" in samples
    assert samples.count("with the surgeon") == samples.count("without an operation") == 2


def test_of_many_samples_the_first_and_the_last_ones_are_shown(tmp_path: Path) -> None:
    run = MadeUpRun(tmp_path)
    for _ in range(3):
        run.train("bootstrap", 20)
        run.train("joint", 20)
    run.finish()
    shown = re.findall(r"after (\d+) updates", write_report(tmp_path).read_text(encoding="utf-8"))
    # Those of the bootstrap phase with the very first one, then those of the joint phase.
    assert shown == ["20", "60", "100", "80", "120"]


def test_phases_show_first_and_last_values(whole: Page) -> None:
    table = whole.html.partition('<section id="phases">')[2].partition("</section>")[0]
    assert re.findall('<th scope="col">([^<]+)', table) == [
        "Phase",
        "Steps",
        "Time",
        "Next-character accuracy",
        "Loss",
        "Entropy of the predictions",
    ]
    first = '<th scope="row">bootstrap</th><td>400</td><td>1 min 12 s</td>'
    assert f"{first}<td>3.0 % \u2192 41.2 %</td><td>4.2 \u2192 2.013</td>" in table


def test_a_phase_without_a_metric_has_a_dash_for_it(tmp_path: Path) -> None:
    phase = {"name": "surgery", "steps": 3, "seconds": 2.0}
    values = {"first": {"surgeon/return": 0.25, "score/kl_ref": 1.0}, "last": {}}
    run = make_run(tmp_path)
    run.finish(phases=[{**phase, **values}, {**phase, "first": {}, "last": {}}])
    table = write_report(tmp_path).read_text(encoding="utf-8").partition('id="phases"')[2]
    assert "<td>2.0 s</td><td>0.25 \u2192 \u2013</td>" in table
    assert "<td>2.0 s</td><td>\u2013</td>" in table
    assert "kl_ref" not in table.partition("</section>")[0]


def test_the_run_can_be_repeated_from_the_page(whole: Page) -> None:
    assert "python train.py --corpus tinyshakespeare --out runs/first" in whole.text
    assert "86c4e6aa" * 8 in whole.text
    assert '<th scope="row">grpo.learning_rate</th><td>0.002</td>' in whole.html
    assert '<th scope="row">versions.torch</th><td>2.13.0</td>' in whole.html


def test_every_metric_is_explained(whole: Page) -> None:
    terms = re.findall(r"<dt>(\w+)", whole.html.partition('<dl class="words">')[2])
    assert {"Accuracy", "Loss", "Bits", "Entropy", "Forward", "Return", "Flatline"} <= set(terms)
    assert whole.html.count("<dt>") == whole.html.count("<dd>")


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    run = MadeUpRun(tmp_path / "<b>run")
    run.train(HOSTILE, 40)
    run.operate(HOSTILE, 40)
    run.commit(HOSTILE, kept=True)
    for row in run.rows:
        if row["kind"] == "sample":
            row.update(prompt=HOSTILE, text=HOSTILE, operated_text=HOSTILE)
        if row["kind"] == "operation":
            row["surgeon/flatline"] = HOSTILE
            row[f"score/{HOSTILE}"] = 1.0
    (run.folder / "config.json").write_text(json.dumps({HOSTILE: {"a": HOSTILE}}), encoding="utf-8")
    effect = {
        "verdict": HOSTILE,
        "measurements": [
            {
                "after": HOSTILE,
                "n_prompts": HOSTILE,
                "n_operations": HOSTILE,
                **{
                    name: {who: {"mean": 0.1, "low": 0.0, "high": 0.2} for who in WHO}
                    for name in ("kl_ref_gain", "heldout_loss_fall")
                },
            }
        ],
    }
    run.finish(
        corpus=HOSTILE,
        corpus_sha256=HOSTILE,
        command=HOSTILE,
        surgeon=HOSTILE,
        preset=HOSTILE,
        references=[{"name": HOSTILE, "loss": 1.0, "accuracy": 0.5}],
        commits={"policy": HOSTILE, "tried": HOSTILE, "kept": HOSTILE},
        environment={HOSTILE: HOSTILE},
        surgeon_effect=effect,
    )
    page = Page(write_report(run.folder))
    # Not one tag more than in the report of a harmless run.
    assert page.tags.count("script") == len(page.scripts) == 3
    assert "b" not in page.tags
    assert "alert(1)</script>" not in page.html
    # The reader still sees it, letter for letter.
    assert page.text.count(" ".join(HOSTILE.split())) > 15
    assert f"score/{HOSTILE}" in {key.partition("-")[2] for key in page.figures}
    # Plotly renders some tags in its labels, so there they are escaped as well.
    labels = [
        note["text"]
        for figure in page.figures.values()
        for note in figure["layout"].get("annotations", [])
    ]
    assert labels
    assert not any("<" in label for label in labels)


def test_a_run_that_goes_on_says_so_and_shows_what_there_is(tmp_path: Path) -> None:
    make_run(tmp_path)
    (tmp_path / "summary.json").unlink()
    page = Page(write_report(tmp_path))
    assert "This run has not finished" in page.text
    assert "Measured on a fixed slice of the held-out text, the tables on all of it." in page.text
    assert '<th scope="row">5-gram</th>' in page.html
    assert {"accuracy", "return"} <= set(page.figures)
    assert not any(key.startswith("effect") for key in page.figures)
    assert "Phases so far" in page.text
    assert "The dashed lines are tables that count" in page.text
    assert '<span class="yes">kept</span>' in page.html
    assert "corpus tinyshakespeare" in page.text


def test_a_run_of_which_no_references_are_known_is_shown_without(tmp_path: Path) -> None:
    make_run(tmp_path)
    for name in ("summary.json", "references.json"):
        (tmp_path / name).unlink()
    page = Page(write_report(tmp_path))
    assert "Measured on a fixed slice of the held-out text." in page.text
    assert "dashed lines" not in page.text
    assert '<th scope="row">5-gram</th>' not in page.html


def test_only_the_page_of_a_run_that_goes_on_loads_itself_anew(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    refresh = '<meta http-equiv="refresh"'
    assert refresh not in write_report(tmp_path, reload_seconds=30).read_text(encoding="utf-8")
    (tmp_path / "summary.json").unlink()
    assert refresh not in write_report(tmp_path).read_text(encoding="utf-8")
    page = Page(write_report(tmp_path, reload_seconds=30))
    assert f'{refresh} content="30">' in page.html
    last = f"update {run.update}, operation {run.operation}"
    assert f"This page is of phase joint, {last}, " in page.text
    assert "it loads itself anew every 30 seconds" in page.text


def test_torn_lines_are_told(tmp_path: Path, whole: Page) -> None:
    make_run(tmp_path)
    with (tmp_path / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"kind": "gr\n')
    told = "Lines of metrics.jsonl that were torn, and are left out here: 1."
    assert told in Page(write_report(tmp_path)).text
    assert "torn" not in whole.text


def test_a_page_is_replaced_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(tmp_path)
    write_report(tmp_path).write_text("old", encoding="utf-8")
    seen = []

    def replace(source: Path, target: Path) -> None:
        seen.append((source.stat().st_size > 1_000_000, target.read_text(encoding="utf-8")))
        raise OSError("no")

    monkeypatch.setattr("avatarl_env.files.os.replace", replace)
    with pytest.raises(OSError, match="no"):
        write_report(tmp_path)
    # The new page was whole before the old one went, and leaves nothing behind.
    assert seen == [(True, "old")]
    assert [path.name for path in tmp_path.glob("*report*")] == ["report.html"]
    assert not list(tmp_path.glob("*.partial")) + list(tmp_path.glob(".*"))


def test_a_run_that_has_only_begun_has_a_report(tmp_path: Path) -> None:
    page = Page(write_report(MadeUpRun(tmp_path).folder))
    assert page.figures == {}
    assert page.text.count("Nothing has been measured yet.") == 2
    assert "No text has been sampled yet." in page.text
    assert "Nobody operated on it so far." in page.text


@pytest.mark.parametrize(
    ("effect", "verdict"),
    [
        (None, "No surgeon took part in this run, so there is nothing to be judged."),
        ({"verdict": "Nobody operated.", "measurements": []}, "Nobody operated."),
    ],
)
def test_a_run_without_a_surgeon_and_of_one_phase(
    tmp_path: Path, effect: dict[str, Any] | None, verdict: str
) -> None:
    run = MadeUpRun(tmp_path)
    run.train("bootstrap", 60)
    changes = {"surgeon": "none", "surgeon_effect": effect, "commits": None}
    run.finish(**changes, corpus="playwright", corpus_nats_per_char=1.21)
    page = Page(write_report(tmp_path))
    assert verdict in page.text
    assert "There were no operations." in page.text
    assert not {"return", "action"} & set(page.figures)
    assert not any(key.startswith("effect") for key in page.figures)
    assert page.html.count('<i style="background:var(--phase-') == 1


def test_without_other_metrics_there_is_no_fold_for_them(tmp_path: Path, whole: Page) -> None:
    run = MadeUpRun(tmp_path)
    run.evaluate("bootstrap")
    run.finish()
    assert "All other metrics" in whole.text
    assert "All other metrics" not in Page(write_report(tmp_path)).text


def test_the_true_entropy_of_the_text_is_a_line_and_a_bar(tmp_path: Path) -> None:
    run = MadeUpRun(tmp_path)
    run.train("bootstrap", 60)
    run.finish(corpus_nats_per_char=1.21)
    page = Page(write_report(tmp_path))
    lines = [shape["y0"] for shape in page.figures["loss"]["layout"]["shapes"]]
    assert 1.21 in lines
    assert (
        "The line called limit is the true entropy of the grammar that wrote the text" in page.text
    )
    assert '<th scope="row">true entropy of the text</th>' in page.html


def test_supervised_training_is_not_called_reinforcement_learning(tmp_path: Path) -> None:
    run = MadeUpRun(tmp_path)
    (tmp_path / "config.json").write_text('{"grpo": {"estimator": "ce"}}', encoding="utf-8")
    run.train("bootstrap", 20)
    run.finish()
    text = Page(write_report(tmp_path)).text
    assert "so this is not reinforcement learning" in text
    assert "from rewards alone" not in text


def test_text_comes_through_letter_for_letter(whole: Page) -> None:
    assert PLAY in "".join(whole.texts)


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="run_folder must hold config"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()
