"""Rules on made histories: each sick one is named, each of its healthy look-alikes is not."""

import math
import re

import pytest

from lightning_sym.diagnosis import Finding, diagnose_run
from lightning_sym.diagnosis.course import Series
from lightning_sym.diagnosis.rules import RULES

STEPS = (1, 20, 40, 60, 80, 100, 120, 140, 160, 180, 200)


def rows(steps=STEPS, **readings):
    """Return rows; a reading is a constant, or a value a step. ``a__b`` is the key ``q/a/b``."""
    made = []
    for i, step in enumerate(steps):
        row = {"step": step, "fit": 1}
        for key, values in readings.items():
            value = values[i] if isinstance(values, list | tuple) else values
            if value is not None:
                row["/".join(["q", *key.split("__")])] = value
        made.append(row)
    return made


def kinds(history, level="alarm"):
    return [finding.kind for finding in diagnose_run(history) if finding.level == level]


def falling(last, first=1.0):
    return [first * (last / first) ** (i / (len(STEPS) - 1)) for i in range(len(STEPS))]


WIDE = {"a__input_directions": 9.0, "a__directions": 9.0}
MOVES = {"a__trained": 1.0, "a__moved": 1.0, "z__trained": 1.0, "z__moved": 1.0}
SICK = {
    "dead_units": {"a__dead_units": [0.1] * 4 + [0.9] * 7},
    "equal_units": {**WIDE, "a__distinct_units": 0.1, "a__zero_units": 0.0},
    "weights_vanish": {"a__weight_norm": falling(1e-3)},
    "rank_collapse": {"a__input_directions": 9.0, "a__directions": 1.02, "z__directions": 3.0, "loss": 2.0},
    "divergence": {"loss": [1.0, 1.0, 9.0, 9.0, *[9.0] * 7]},
    "exploding_gradients": {"a__gradient": 1e3, "z__gradient": 1.0},
    "vanishing_gradients": {"a__gradient": 1e-6, "z__gradient": 1.0, "loss": 2.0},
    "saturation": {"a__saturated": 0.9},
    "frozen": {**MOVES, "b__trained": 1.0, "b__moved": 0.0},
    "dead_block": {"a__trained": 1.0, "a__added": 1e-8, "z__trained": 1.0},
    "embedding_collapse_complete": {"embedding__variance": falling(1e-4)},
    "embedding_collapse_dimensional": {"embedding__rank": falling(1.01, 6.0)},
    "posterior_collapse": {"a__code": 1e-5},
    "mode_collapse": {"a__spread": 0.05},
    "attention_collapse": {"a__attention_least": 1.0, "a__attention_most": 1.0, "a__attention_varies": 0.0},
    "plasticity_loss": {"loss": [1.0, 0.1, 0.1, 0.3, 0.3, 0.5, 0.6, 0.7, 0.9, 0.9, 0.9]},
    "lazy_training": {**MOVES, "a__distance": 0.003, "z__distance": 0.001, "loss": falling(0.3)},
    "edge_of_stability": {"turn": -0.97, "sharpness": 1.95},
}
HEALTHY = {
    "sparse units": {"a__dead_units": 0.67},
    "dead early, alive later": {"a__dead_units": [0.95] * 8 + [0.4] * 3},
    "narrow layer (an adapter)": {"a__distinct_units": 0.1, "a__zero_units": 0.0},
    "zero units": {**WIDE, "a__distinct_units": 0.1, "a__zero_units": 0.9},
    "shrunk under normalisation": {"a__weight_norm": falling(0.3)},
    "zero weight that grows": {"a__weight_norm": [0.0, *[1.0] * 10]},
    "binary head that has learned": {
        "a__input_directions": 9.0,
        "a__directions": 1.02,
        "z__directions": 1.0,
        "loss": falling(0.05),
    },
    "low-rank input": {"a__input_directions": 1.4, "a__directions": 1.02, "z__directions": 3.0, "loss": 2.0},
    "head of one direction": {
        "a__input_directions": 9.0,
        "a__directions": 8.0,
        "z__directions": 1.0,
        "loss": 2.0,
    },
    "loss of a stream": {"loss": [1.0, 1.3, 0.9, 1.2, 1.0, 1.3, 0.8, 1.2, 0.9, 1.1, 1.0]},
    "fine-tuning: features were there": {
        **MOVES,
        "a__distance": 0.003,
        "z__distance": 0.001,
        "loss": falling(0.3),
        "a__trained": 1.0,
        "a/in__rwa": 0.5,
        "a/in__null": 0.4,
        "z/in__rwa": 0.8,
        "z/in__null": 0.1,
    },
    "one easy batch at last": {
        **MOVES,
        "a__distance": 0.003,
        "z__distance": 0.001,
        "loss": [*[1.0] * 9, 0.3, 1.0],
    },
    "a head of many outputs has a small gradient": {
        "a__gradient": 0.2,
        "b__gradient": 0.01,
        "z__gradient": 0.001,
    },
    "gradients that rise towards a pooled head": {
        **{f"{name}__gradient": 4.0**-i for i, name in enumerate("abcde")},
        "z__gradient": 1.0,
    },
    "ten directions become two, and the task is learned": {
        **{f"{name}__input_directions": 9.0 for name in "abcz"},
        **{f"{name}__directions": [10.0, 8.0, 5.0, 3.0, *[1.9] * 7] for name in "abc"},
        "z__directions": 3.0,
        **{f"{name}__weight_norm": falling(0.5) for name in "abcz"},
        "loss": falling(0.25),
    },
    "ten directions become two without decay": {
        **{f"{name}__input_directions": 9.0 for name in "abcz"},
        **{f"{name}__directions": [10.0, 8.0, 5.0, 3.0, *[1.9] * 7] for name in "abc"},
        "z__directions": 3.0,
        **{f"{name}__weight_norm": 1.0 for name in "abcz"},
        "loss": falling(0.4),
    },
    "a projector that keeps a third of the directions": {
        "embedding__rank": 6.0,
        "embedding__learned": 3.0,
        "representation__rank": 20.0,
        "loss": falling(0.1),
    },
    "a projector that keeps few directions, and all are shared": {
        "embedding__rank": 4.0,
        "embedding__learned": 4.0,
        "representation__rank": 30.0,
        "loss": falling(0.1),
    },
    "a code that begins late": {"a__code": [5e-4, 4e-4, 6e-4, 4e-4, 9e-4, 9e-4, *[0.5] * 5]},
    "one spike": {"loss": [1.0, 1.0, 9.0, *[0.8] * 8]},
    "adversarial loss": {"loss": [1.0, *[9.0] * 10], "a__spread": 0.9},
    "branch that begins at zero": {"a__gradient": [0.0, *[0.5] * 10], "z__gradient": 1.0, "loss": 2.0},
    "gates that open": {"a__saturated": [0.1, 0.3, *[0.95] * 9]},
    "warm-up from rate 0": {**MOVES, "b__trained": 1.0, "b__moved": [0.0, *[1.0] * 10]},
    "frozen backbone": {
        "a__trained": 0.0,
        "a__moved": 0.0,
        "b__trained": 0.0,
        "b__moved": 0.0,
        "z__trained": 1.0,
        "z__moved": 1.0,
    },
    "bases beside adapters": {
        "a__trained": 1.0,
        "a__moved": 1.0,
        "b__trained": 0.0,
        "b__moved": 0.0,
        "c__trained": 0.0,
        "c__moved": 0.0,
        "z__trained": 1.0,
        "z__moved": 1.0,
    },
    "an unwatched layer that paused": {
        **MOVES,
        "b__trained": [None, 1.0, *[None] * 9],
        "b__moved": [None, 0.0, *[None] * 9],
    },
    "zero residual": {"a__trained": 1.0, "a__added": [0.0, *[0.2] * 10], "z__trained": 1.0},
    "a sum after the last layer": {"z__trained": 1.0, "z__added": 1e-9},
    "embedding that shrinks to scale": {
        "embedding__variance": falling(0.2),
        "embedding__variance_share": 0.9,
    },
    "embedding of few directions early": {"embedding__rank": [1.2, 1.3, *[3.0] * 9]},
    "code that wakes up": {"a__code": [1e-5] * 6 + [0.5] * 5},
    "narrow generator": {"a__spread": 0.41},
    "one sharp head": {"a__attention_least": 0.001, "a__attention_most": 0.7, "a__attention_varies": 0.5},
    "flat but varying attention": {
        "a__attention_least": 0.9995,
        "a__attention_most": 0.9999,
        "a__attention_varies": 1e-2,
    },
    "features move": {**MOVES, "a__distance": 0.003, "z__distance": 0.2, "loss": falling(0.3)},
    "not learning yet": {**MOVES, "a__distance": 0.003, "z__distance": 0.001, "loss": 2.0},
    "minibatch noise": {"turn": 0.05, "sharpness": 1.95},
    "noisy labels of two classes": {
        "a__input_directions": 9.0,
        "a__directions": [5.0, 1.6, *[1.06] * 9],
        "z__trained": 1.0,
        "loss": [0.69, 0.61, *[0.58] * 9],
    },
    "bases beside adapters of a deep network": {
        **{
            f"{n}{i}__{key}": value
            for i in range(4)
            for n, of in {"base": 0.0, "one": 1.0, "two": 1.0}.items()
            for key, value in {"trained": of, "moved": of}.items()
        },
        "off": 1 / 3,
        "off_runs": 4.0,
    },
    "positions with losses of their own": {"a__reach": 1e-9, "a__early": 1.0, "loss": 2.0},
    "a recurrence that does most of its task": {"a__reach": 1e-9, "loss": falling(0.3)},
    "a generator that still learns": {"a__spread": 0.9, "a__cover": [0.05] * 6 + [0.17] * 5},
    "a confident last sigmoid": {
        "a__trained": 1.0,
        "z__trained": 1.0,
        "z__saturated": [0.1, *[0.9] * 10],
        "loss": 2.0,
    },
    "an embedding that keeps a quarter of its directions": {
        "embedding__rank": falling(6.0, 26.0),
        "embedding__variance_share": 0.6,
    },
    "a head that moves little after hidden layers that move": {
        **MOVES,
        "a__distance": 0.2,
        "z__distance": 0.01,
        "loss": falling(0.3),
    },
    "weights that grow and learn": {"a__weight_norm": falling(9.0), "loss": falling(0.3)},
    "norms whose fall slows down": {"a__weight_norm": [1.0, 0.7, 0.52, 0.42, *[0.4] * 7], "loss": 2.0},
}
#: Further ways to be sick of a kind.
ALSO_SICK = {
    "dead units of a layer that is not watched": ("dead_units", {"a__dead": 1.0, "b__dead": 0.4}),
    "a layer that dies at once": ("dead_units", {"a__dead_units": [0.2] * 9 + [1.0] * 2}),
    "a loss that doubles": ("divergence", {"loss": [1.0, 1.0, *[2.2] * 9]}),
    "a loss ten times as high, twice": ("divergence", {"loss": [1.0] * 9 + [11.0] * 2}),
    "a loss that comes back at once": ("divergence", {"loss": [1.0, 0.5, *[0.2] * 6, 0.95, 1.0, 1.0]}),
    "weights that blew up": ("divergence", {"a__weight_norm": [1.0, *[30.0] * 10], "loss": 2.0}),
    "a recurrence as a loop": ("vanishing_gradients", {"a__reach": 1e-9, "loss": 2.0}),
    "a recurrence that comes late": (
        "vanishing_gradients",
        {"a__reach": [1e-9] * 7 + [1e-2] * 4, "loss": 2.0},
    ),
    "a recurrence that explodes": ("exploding_gradients", {"a__reach": 1e4, "loss": 2.0}),
    "saturated in the course": (
        "saturation",
        {"a__trained": 1.0, "z__trained": 1.0, "a__saturated": [0.1, *[0.9] * 10], "loss": 2.0},
    ),
    "a frozen block of three layers": (
        "frozen",
        {
            **{f"l{i}__{key}": float(i not in (4, 5, 6)) for i in range(10) for key in ("trained", "moved")},
            "off": 0.3,
            "off_runs": 1.0,
        },
    ),
    "a frozen layer of zeros": (
        "frozen",
        {**MOVES, "c__trained": 0.0, "c__moved": 0.0, "c__directions": 0.0, "off": 0.9, "off_runs": 5.0},
    ),
    "no layer moves": ("frozen", {"a__trained": 1.0, "a__moved": 0.0}),
    "depth that leaves two directions": (
        "rank_collapse",
        {
            "a__input_directions": 9.0,
            **{f"{x}__directions": 1.6 for x in "abcd"},
            "z__directions": 3.0,
            "loss": 2.0,
        },
    ),
    "depth that leaves nothing": (
        "rank_collapse",
        {"a__input_directions": 9.0, **{f"{x}__output_share": 1e-9 for x in "abcd"}, "loss": 2.0},
    ),
    "weights on their way to nothing": (
        "weights_vanish",
        {"a__weight_norm": [None] * 7 + [1.0, 0.6, 0.36, 0.21], "loss": 2.0},
    ),
    "two modes of eight": ("mode_collapse", {"a__spread": 0.9, "a__cover": 0.1}),
    "a crowded embedding": (
        "embedding_collapse_complete",
        {"embedding__rank": falling(2.0, 26.0), "embedding__variance_share": 0.13},
    ),
    "four directions of twenty-six": (
        "embedding_collapse_dimensional",
        {"embedding__rank": [26.0, 8.0, *[4.0] * 9]},
    ),
    "views that share little": (
        "embedding_collapse_dimensional",
        {"embedding__rank": falling(12.0, 26.0), "embedding__learned": 2.0, "loss": 2.0},
    ),
    "a loss that came back before": (
        "plasticity_loss",
        {"loss": [1.0, 0.1, 1.0, 0.1, 1.0, 0.1, 1.0, 0.1, 1.0, 1.0, 1.0]},
    ),
    "tasks that are learned by half": (
        "plasticity_loss",
        {"loss": [2.3, 1.6, 2.2, 1.5, 2.3, 1.7, 2.3, 2.1, 2.3, 2.1, 2.3]},
    ),
    "gradients that explode over three layers": (
        "exploding_gradients",
        {"a__gradient": 0.2, "b__gradient": 0.001, "z__gradient": 0.001},
    ),
    "gradients that grow from layer to layer below a pooled head": (
        "exploding_gradients",
        {**{f"{name}__gradient": 4.0**-i for i, name in enumerate("abcdef")}, "z__gradient": 1.0},
    ),
    "decay that leaves two directions of ten": (
        "rank_collapse",
        {
            **{f"{name}__input_directions": 9.0 for name in "abcz"},
            **{f"{name}__directions": [10.0, 8.0, 5.0, 3.0, *[1.9] * 7] for name in "abc"},
            "z__directions": 2.0,
            **{f"{name}__weight_norm": falling(0.5) for name in "abcz"},
            "loss": falling(0.45),
        },
    ),
    "a projector that loses most directions": (
        "embedding_collapse_dimensional",
        {
            "embedding__rank": 5.9,
            "embedding__learned": 3.0,
            "representation__rank": 29.0,
            "loss": falling(0.01),
        },
    ),
    "features that chance could give": (
        "lazy_training",
        {
            **MOVES,
            "a__distance": 0.003,
            "z__distance": 0.001,
            "loss": falling(0.3),
            "a/in__rwa": 0.9,
            "a/in__null": 0.1,
            "z/in__rwa": 0.7,
            "z/in__null": 0.6,
        },
    ),
    "a head that moves a little more": (
        "lazy_training",
        {**MOVES, "a__distance": 0.003, "z__distance": 0.03, "loss": falling(0.3)},
    ),
}


@pytest.mark.parametrize("name", ALSO_SICK)
def test_other_ways_to_be_sick_are_named_and_nothing_else(name):
    kind, readings = ALSO_SICK[name]
    assert kinds(rows(**readings)) == [kind]


@pytest.mark.parametrize("history", [*SICK.values(), *(made for _, made in ALSO_SICK.values())])
def test_sentences_are_whole_and_said_once(history):
    for finding in diagnose_run(rows(**history)):
        for words in (finding.message, finding.remedy):
            sentences = [each for each in re.split(r"[.:] ", words.removesuffix(".")) if each]
            assert words.endswith(".")
            assert not words.endswith("..")
            assert len(sentences) == len(set(sentences))
        assert finding.cause
        assert not finding.cause.endswith(".")


def test_zero_weights_for_good_are_equal_and_frozen():
    zero = {**WIDE, "a__distinct_units": 0.02, "a__zero_units": 1.0, "a__moved": 0.0, "b__moved": 1.0}
    assert set(kinds(rows(**zero, a__weight_gradient=0.0))) == {"equal_units", "frozen"}
    assert kinds(rows(**{**zero, "a__moved": [0.0, *[1.0] * 10]})) == []  # a branch that began at zero


def test_units_that_became_equal_while_their_weight_shrank_did_so_by_decay():
    course = {**WIDE, "a__distinct_units": [1.0, *[0.02] * 10]}
    (found,) = diagnose_run(rows(**course, a__weight_norm=[4.0, *[2.0] * 10]))
    assert (found.kind, found.cause.partition(";")[0]) == (
        "equal_units",
        "weight decay: the weight has come to 50% of its start",
    )
    assert found.remedy.startswith("Lower the weight decay")
    (found,) = diagnose_run(rows(**course, a__weight_norm=[4.0, *[3.9] * 10]))
    assert found.cause.startswith("the learning rate")
    always = {**WIDE, "a__distinct_units": 0.02, "a__weight_norm": [4.0, *[2.0] * 10]}
    (found,) = diagnose_run(rows(**always))
    assert found.cause.startswith("the initialisation")


def test_a_reverse_recurrence_of_which_one_step_is_read_is_a_warning():
    back, forth = "rnn.hh_l0_reverse", "rnn.hh_l0"
    seen = {f"{back}__moved": 0.0, f"{back}__weight_gradient": 0.0, f"{forth}__moved": 1.0, "a__moved": 1.0}
    (found,) = diagnose_run(rows(**seen))
    assert (found.kind, found.level, found.layer) == ("frozen", "warning", back)
    assert "only the last position is read" in found.cause
    both = {**seen, f"{forth}__moved": 0.0, f"{forth}__weight_gradient": 0.0}
    assert [f.level for f in diagnose_run(rows(**both)) if f.kind == "frozen"] == ["alarm"]
    flows = {**seen, f"{back}__weight_gradient": 1e-3}  # it has a gradient: no optimizer moves it
    assert [f.level for f in diagnose_run(rows(**flows)) if f.kind == "frozen"] == ["alarm"]
    other = {**seen, f"{back}__moved": 1.0, "a__moved": 0.0}
    assert [f.layer for f in diagnose_run(rows(**other)) if f.kind == "frozen"] == ["a"]


def test_lost_rank_explains_flat_attention_behind_it():
    flat = {"attention_least": 1.0, "attention_most": 1.0, "attention_varies": 0.0}
    deep = {"a__input_directions": 9.0, "a__directions": 9.0, "b__directions": 1.02, "z__directions": 3.0}
    ran = {f"{layer}__trained": 1.0 for layer in "abcz"}
    behind = {**ran, **deep, "loss": 2.0, **{f"c__{key}": value for key, value in flat.items()}}
    before = {**ran, **deep, "loss": 2.0, **{f"a__{key}": value for key, value in flat.items()}}
    assert kinds(rows(**behind)) == ["rank_collapse"]
    assert kinds(rows(**before)) == ["attention_collapse"]


def test_a_series_keeps_what_rules_ask():
    series = Series()
    for step, value in ((20, 2.0), (1, 3.0), (40, math.nan), (60, 0.5), (20, 9.0)):
        series.insert(step, value)
    assert (series.steps, series.low, series.high) == ([1, 20, 40, 60], 0.5, 3.0)
    assert (series.finite.steps, series.finite.values) == ([1, 20, 60], [3.0, 2.0, 0.5])
    assert (series.at(20), series.at(21)) == (2.0, None)
    assert (series.from_step(20).steps, series.zero) == ([20, 40, 60], False)
    assert Series([1, 2], [0.0, 0.0]).zero
    assert not Series().zero


def test_every_rule_has_a_sick_history():
    assert set(SICK) == {rule.__name__ for rule in RULES}


@pytest.mark.parametrize("kind", SICK)
def test_sick_histories_are_named_and_nothing_else(kind):
    found = diagnose_run(rows(**SICK[kind]))
    assert [f.kind for f in found if f.level == "alarm"] == [kind]
    alarm = found[0]
    assert isinstance(alarm, Finding)
    assert alarm.message
    assert alarm.cause
    assert alarm.remedy
    assert alarm.limit > 0
    assert alarm.step in STEPS
    assert math.isfinite(alarm.value)


@pytest.mark.parametrize("name", HEALTHY)
def test_healthy_look_alikes_are_excused(name):
    assert kinds(rows(**HEALTHY[name])) == []


@pytest.mark.parametrize("kind", sorted(set(SICK) - {"exploding_gradients", "frozen"}))
def test_two_readings_are_not_enough(kind):
    first = rows(**SICK[kind])[:2]
    assert kind not in kinds(first)


def test_a_finding_has_the_step_it_began():
    (found,) = diagnose_run(rows(**SICK["dead_units"]))
    assert (found.step, found.layer, found.value, found.limit) == (80, "a", 0.9, 0.85)
    assert "learning rate" in found.cause
    (early,) = diagnose_run(rows(a__dead_units=1.0))
    assert early.step == 1
    assert "initialisation" in early.cause


def test_one_sick_layer_among_many_is_named():
    many = {f"l{i}__dead_units": 0.1 for i in range(11)}
    found = diagnose_run(rows(**many, sick__dead_units=1.0))
    assert [f.layer for f in found] == ["sick"]


def test_consequences_are_notes():
    history = rows(**{**SICK["dead_units"], **SICK["vanishing_gradients"], "a__dead_units": 1.0})
    assert kinds(history) == ["dead_units"]
    (note,) = [f for f in diagnose_run(history) if f.level == "note"]
    assert (note.kind, note.cause) == ("vanishing_gradients", "it follows from dead_units")


def test_after_divergence_only_what_was_there_before_counts():
    sick = {**SICK["divergence"], "a__dead_units": [0.0, 0.0, *[1.0] * 9]}
    assert kinds(rows(**sick)) == ["divergence"]
    assert set(kinds(rows(**{**sick, "a__dead_units": 1.0}))) == {"divergence", "dead_units"}


def test_wiring_goes_before_what_it_entails():
    sick = {**SICK["frozen"], **SICK["rank_collapse"]}
    assert kinds(rows(**sick)) == ["frozen"]
    alone = {**sick, "b__weight_gradient": 0.0}
    assert kinds(rows(**alone)) == ["rank_collapse"]  # a gradient of 0 may follow from it


def test_at_most_three_kinds_of_alarm():
    together = {**SICK["mode_collapse"], **SICK["saturation"], **SICK["edge_of_stability"]}
    together |= {"b__code": 1e-5, **SICK["embedding_collapse_dimensional"]}
    found = diagnose_run(rows(**together))
    assert len({f.kind for f in found if f.level == "alarm"}) == 3
    assert any(f.level == "warning" for f in found)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("key", ["loss", "a__weight_norm", "score"])
def test_what_is_not_finite_is_divergence(bad, key):
    (found,) = [f for f in diagnose_run(rows(**{key: [1.0] * 5 + [bad] * 6})) if f.level == "alarm"]
    assert (found.kind, found.step) == ("divergence", 100)


def test_nan_in_any_reading_breaks_no_rule():
    every = {key: math.nan for sick in SICK.values() for key in sick}
    assert kinds(rows(**every)) == ["divergence"]


def test_fits_are_told_apart_by_number_and_by_restarts():
    well, sick = rows(a__dead_units=0.1), rows(a__dead_units=1.0)
    second = [{**row, "fit": 2} for row in sick]
    (numbered,) = diagnose_run(well + second)
    (restarted,) = diagnose_run(well + sick)
    assert numbered == restarted
    assert numbered.message.startswith("Fit 2 of 2:")
    assert diagnose_run(well + [{**row, "fit": 2} for row in well]) == []


def test_a_stream_of_fits_that_learns_worse_and_worse():
    fits = []
    for number in range(1, 6):
        loss = 0.1 if number < 3 else 0.9
        fits += [{**row, "fit": number} for row in rows(steps=(1, 20, 40, 60), loss=[1.0, loss, loss, loss])]
    assert kinds(fits) == ["plasticity_loss"]


def test_histories_come_in_any_shape():
    class Monitor:
        def __init__(self, history):
            self.history = history

    one, other = rows(**SICK["dead_units"]), rows(b__saturated=0.1)
    expected = diagnose_run(one)
    assert diagnose_run(one + other) == diagnose_run([one, other]) == expected
    assert diagnose_run(Monitor(one)) == diagnose_run([Monitor(one), Monitor(other)]) == expected
    assert diagnose_run([]) == []


def test_layers_that_vanish_and_appear():
    gone = rows(a__dead_units=[0.1] * 5 + [None] * 6, b__dead_units=[None] * 8 + [1.0] * 3)
    assert [(f.kind, f.layer, f.step) for f in diagnose_run(gone)] == [("dead_units", "b", 160)]


def test_wrong_histories_are_refused():
    with pytest.raises(ValueError, match="must have a step"):
        diagnose_run([{"a": 1.0}])
    with pytest.raises(TypeError, match="got int"):
        diagnose_run([3])


def test_a_code_that_loses_what_little_it_had_is_told_before_step_100():
    collapsing = rows(STEPS[:4], a__code=[5e-4, 1e-4, 5e-5, 3e-5])
    assert kinds(collapsing) == ["posterior_collapse"]
    assert kinds(rows(STEPS[:4], a__code=[5e-4, 1e-4, 5e-5, 3e-4])) == []
    assert kinds(rows(STEPS[:4], a__code=[5e-4, 4e-4, 4e-4, 4e-4])) == []


def test_units_that_die_of_inputs_far_from_zero_are_not_put_down_to_the_learning_rate():
    dying = {"a__output_share": 0.5, **SICK["dead_units"]}
    (near,) = diagnose_run(rows(**dying, a__input_share=0.5))
    (far,) = diagnose_run(rows(**dying, a__input_share=1e-6))
    assert "learning rate" in near.cause
    assert far.cause.startswith("inputs far from zero")
    assert far.remedy.startswith("Normalise")


def test_what_a_second_fit_begins_with_may_come_from_the_first():
    healthy, dead = rows(a__dead_units=0.1), rows(a__dead_units=0.95)
    first, second = ([{**row, "fit": fit} for row in made] for fit, made in ((1, healthy), (2, dead)))
    (found,) = diagnose_run([*first, *second])
    assert found.message.startswith("Fit 2 of 2")
    assert "the initialisation or what the fit before left" in found.cause
    (alone,) = diagnose_run(dead)
    assert alone.cause.startswith("the initialisation: ")


def test_what_was_there_at_first_does_not_follow_from_what_came_later():
    gradients = {"a__gradient": 1e-9, "z__gradient": 1.0, "loss": 1.0}
    history = rows(**gradients, a__weight_norm=falling(1e-3), z__weight_norm=1.0)
    assert set(kinds(history)) == {"weights_vanish", "vanishing_gradients"}
    fading = {**gradients, "a__gradient": [None, *[1e-9] * 10]}
    later = rows(**fading, a__weight_norm=falling(1e-3), z__weight_norm=1.0)
    assert set(kinds(later)) == {"weights_vanish"}


@pytest.mark.parametrize(
    ("loss", "norm", "known"),
    [([1.0, 0.8], [3.0, 3.1], False), ([1.0, 2.0], [3.0, 3.1], True), ([1.0, 1.0], [3.0, 6.0], True)],
)
def test_what_is_not_finite_at_once_is_not_put_down_to_the_learning_rate(loss, norm, known):
    nan = [math.nan] * 9
    history = rows(loss=[*loss, *nan], a__weight_norm=[*norm, *nan])
    (found,) = (finding for finding in diagnose_run(history) if finding.level == "alarm")
    assert found.kind == "divergence"
    assert found.cause.startswith("not known") != known
