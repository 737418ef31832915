import json

import pytest

from benchmarks.clinic.common import KINDS as ALL
from benchmarks.clinic.run import plain
from benchmarks.clinic.strangers import run, score
from benchmarks.clinic.strangers.base import CASES, KINDS


def test_every_kind_is_expected_somewhere_and_about_half_are_healthy():
    assert {kind for kinds in KINDS.values() for kind in kinds} == set(ALL)
    healthy = sum(not kinds for kinds in KINDS.values())
    assert 0.4 <= healthy / len(CASES) <= 0.6
    assert CASES.keys() == KINDS.keys()


def test_a_run_is_stored_and_judged(tmp_path):
    record = run.fit("mlp_stopped_early", 0)
    (tmp_path / "a.json").write_text(json.dumps(plain(record)))
    (back,) = run.stored(tmp_path)
    assert back["truth"]["accuracy"] == pytest.approx(record["truth"]["accuracy"], rel=1e-5)
    assert {row["step"] for row in back["histories"]["SignalMonitor"]} == {1, 20, 40, 60}
    judged = score.judged(back)
    assert (judged["name"], judged["holds"], judged["alarms"]) == ("mlp_stopped_early.0", True, [])


def judged(expected, alarms, holds=True):
    return {"name": "a.0", "seed": 0, "expected": expected, "alarms": alarms, "holds": holds}


def test_figures_count_runs_whose_truth_holds():
    runs = [
        judged(["frozen", "dead_units"], ["dead_units"]),
        judged(["frozen"], ["divergence"]),
        judged(["frozen"], []),
        judged(["frozen"], ["frozen", *ALL[:3]]),
        judged(["frozen"], ["frozen"], holds=False),
        judged([], ["frozen"]),
        judged([], []),
        judged([], ["frozen"], holds=False),
    ]
    found = score.summary(runs)
    assert (found["sick"], found["healthy"], found["most_kinds"]) == (4, 2, 4)
    assert (found["sensitivity"], found["kind_right"], found["false_alarms"]) == (0.75, 0.25, 0.5)
    assert score.report(runs)["kinds"]["frozen"]["sick"] == 4
