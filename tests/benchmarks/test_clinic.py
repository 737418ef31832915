import math

import pytest

from benchmarks.clinic import score
from benchmarks.clinic.cases import all_cases, chosen
from benchmarks.clinic.common import HALVES, KINDS, Case, Check, leaving_step, over, under
from benchmarks.clinic.fitting import fit, judge
from benchmarks.clinic.run import from_table, run_one, to_table

CASES = all_cases()


def test_each_half_has_every_kind_and_the_healthy_are_about_half():
    for half in ("tuning", "reported"):
        own = [case for case in CASES.values() if case.half == half]
        assert {case.sick for case in own} == {None, *KINDS}, half
        healthy = sum(case.sick is None for case in own)
        assert 0.4 <= healthy / len(own) <= 0.6
    assert len(CASES) >= 60
    assert {case.architecture for case in CASES.values()} == set(HALVES)


def test_controls_come_first_and_are_healthy():
    names = list(CASES)
    for case in CASES.values():
        if case.control is not None:
            assert CASES[case.control].sick is None
            assert names.index(case.control) < names.index(case.name)


def test_a_glob_without_a_case_is_refused():
    with pytest.raises(ValueError, match="--only must match a case"):
        chosen(["no/such"])


def test_a_check_holds_against_a_limit_or_the_control_and_never_of_nan():
    assert under("a", 0.5).holds({"a": 0.4})
    assert not over("a", 0.5).holds({"a": 0.4})
    assert under("a", 0.5, of_control=True).holds({"a": 0.4}, {"a": 1.0})
    assert not under("a", 0.5, of_control=True).holds({"a": 0.4}, {"a": 0.7})
    assert not under("a", 0.5).holds({"a": math.nan})
    assert not over("a", 0.5).holds({"a": math.nan})
    with pytest.raises(ValueError, match="needs a control"):
        under("a", 0.5, of_control=True).holds({"a": 0.4})


@pytest.mark.parametrize(
    "wrong", [{"sick": "flu", "cause": "decay"}, {"sick": "frozen"}, {"cause": "decay"}, {"checks": ()}]
)
def test_a_case_that_contradicts_itself_is_refused(wrong):
    with pytest.raises(ValueError, match="mlp/x"):
        Case(
            **{
                "name": "mlp/x",
                "architecture": "mlp",
                "about": "",
                "build": fit,
                "checks": (under("a", 1),),
                **wrong,
            }
        )


def test_leaving_is_for_good():
    check = Check("a", "<", 0.8, of_control=True)
    control = [{"step": step, "a": 1.0} for step in (10, 20, 30, 40)]

    def curve(*values):
        return [{"step": 10 * i, "a": value} for i, value in enumerate(values, start=1)]

    assert leaving_step(check, curve(0.9, 0.7, 0.6, 0.5), control) == 20
    assert leaving_step(check, curve(0.7, 0.9, 0.7, 0.7), control) == 30
    assert leaving_step(check, curve(0.7, 0.7, 0.7, 0.9), control) is None
    assert leaving_step(check, curve(0.9, 0.9, math.nan, math.nan), control) == 30


def test_a_history_survives_as_a_table():
    rows = [{"step": 1.0, "a": 0.5}, {"step": 2.0, "b": math.nan}, {"step": 3.0, "a": math.inf}]
    back = from_table(to_table(rows))
    assert [back[0], back[2]] == [rows[0], rows[2]]
    assert list(back[1]) == ["step", "b"]
    assert math.isnan(back[1]["b"])


def test_a_healthy_and_a_sick_run_are_what_they_say(tmp_path):
    record = run_one("mlp/dead_by_bias", 0, out=tmp_path, bare=True)
    assert record["truth"]["holds"]
    early = CASES["mlp/early"]
    assert judge(early, fit(early, 0, bare=True), None)["holds"]
    assert not judge(CASES["mlp/dead_by_bias"], fit(early, 0, bare=True), {"outcome": {"accuracy": 1.0}})[
        "holds"
    ]


def test_watching_changes_nothing():
    case = CASES["mlp/early"]
    assert fit(case, 0)["outcome"] == fit(case, 0, bare=True)["outcome"]


def run(sick, **more):
    about = {
        "name": "mlp/x",
        "seed": 0,
        "half": "tuning",
        "sick": sick,
        "also": [],
        "layers": [],
        "cause": "decay",
    }
    return {**about, "truth": {"leaves": None}, **more}


def finding(kind, level="alarm", **more):
    return {
        "kind": kind,
        "level": level,
        "layer": "a",
        "step": 20,
        "value": 0.1,
        "limit": 0.2,
        "cause": "",
        **more,
    }


def test_a_run_is_judged_by_its_alarms():
    found = [
        finding("frozen", step=40),
        finding("dead_units", cause="Decay."),
        finding("saturation", "warning"),
    ]
    judged = score.judge(
        run("dead_units", also=["frozen"], layers=["a*"], truth={"leaves": 100.0}),
        [*found, finding("divergence", step=60)],
    )
    assert judged.kinds == ("dead_units", "frozen", "divergence")
    assert (judged.right, judged.cause, judged.layer) == (True, True, True)
    assert judged.wrong == ("divergence",)
    assert judged.lead == 80
    many = [finding(kind) for kind in KINDS[:4]]
    assert not score.judge(run("dead_units"), many).right
    assert not score.judge(run("dead_units"), [finding("dead_units", "warning")]).right


def test_the_summary_counts_runs():
    runs = [
        score.judge(run("frozen"), [finding("frozen")]),
        score.judge(run("frozen"), [finding("divergence")]),
        score.judge(run("frozen"), []),
        score.judge(run(None), []),
        score.judge(run(None), [finding("frozen", "warning")]),
        score.judge(run(None), [finding("frozen")]),
    ]
    found = score.summary(runs)
    assert found["sensitivity"] == pytest.approx(2 / 3)
    assert found["kind_right"] == pytest.approx(1 / 3)
    assert found["false_alarms"] == pytest.approx(1 / 3)
    assert found["median_lead"] is None
    # of 9 pairs of a sick and a healthy run: strengths 3+, 0, 0 against 0, 2+, 3+
    assert score.roc(runs, "frozen")["area"] == pytest.approx((1 + 1 + 0.5 + 0.5 + 0.5) / 9)
    assert score.roc(runs, "saturation") is None
    assert "missed mlp/x.0: frozen; alarms: divergence" in score.table(runs)
