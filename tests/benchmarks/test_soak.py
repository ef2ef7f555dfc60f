from __future__ import annotations

import pytest

from benchmarks import soak
from tests.benchmarks.conftest import Run


def test_it_soaks_and_reports(run: Run) -> None:
    words = ["--kind", "vector", "--minutes", "0.01", "--every", "0.1", "--bound-scale", "1e6"]
    result = run(soak, *words)
    assert sum(result["moves"].values()) > 0
    assert result["growth"]["rss_mib"]["first"] > 0


@pytest.mark.parametrize("kind", ["single", "vector"])
def test_only_a_commit_changes_weights(kind: str) -> None:
    player = soak.Soak(kind, seed=1)
    player.counts["commit"] = 1  # after every tenth, the first weights come back
    for _, move in player.moves:
        before = soak.fingerprint(player.patient)
        move()
        assert (soak.fingerprint(player.patient) != before) == (move == player.commit)


def test_a_move_that_changes_weights_is_detected() -> None:
    player = soak.Soak("single", seed=0)

    def nudge() -> None:
        next(player.patient.model.parameters()).data[0] += 1

    player.moves = ((1, nudge),)
    with pytest.raises(AssertionError, match="nudge changed weights"):
        player.play()


def test_growth_after_the_warm_up_is_detected() -> None:
    def readings(leak: float) -> list[soak.Reading]:
        warm = [100.0 + 10 * min(i, 10) for i in range(41)]
        rss = [value + leak * i for i, value in enumerate(warm)]
        return [soak.Reading(30.0 * i, r, r, 11.0, 1.0) for i, r in enumerate(rss)]

    assert soak.growth(readings(0.0))["rss_mib"]["growth"] == 0
    leaking = soak.growth(readings(1.0))["rss_mib"]
    assert leaking["growth"] > leaking["bound"]
    assert leaking["median_slope_per_hour"] == pytest.approx(120)
