"""Words and the overview picture are made from the findings."""

import math

import pytest

from lightning_sym.plots import in_words, overview

ROWS = [
    {
        "step": step,
        "signal/loss": 1.0 / step,
        "plasticity/a/dead_units": 0.1,
        "plasticity/b/dead_units": 1.0,
        "collapse/a/effective_rank": 3.0,
        "signal/a/gradient": 0.0,
    }
    for step in (1, 2, 3, 4)
]


def test_alarms_come_first_and_name_the_layer():
    words = in_words(ROWS)
    assert words[0] == "Read 4 times, from step 1 to step 4."
    assert words[1] == "Alarm: 100% of the units that feed b are dead: 0 on every sample."
    assert not any("No alarm" in word for word in words)


def test_nothing_wrong_is_said():
    words = in_words([{"step": s, "plasticity/a/dead_units": 0.1} for s in (1, 2, 3)])
    assert words[1].startswith("No alarm")
    assert in_words([]) == []


def test_no_number_is_made_of_what_is_not_finite():
    words = " ".join(in_words([{"step": s, "collapse/nc1": math.nan} for s in (1, 2)]))
    assert "not finite" in words
    assert "Neural collapse" not in words
    assert "No alarm" not in words


def test_overview_draws_loss_strips_and_findings():
    figure = overview(ROWS)
    assert [axis.get_title() for axis in figure.axes[:4]] == [
        "loss",
        "dead input units (share)",
        "effective rank of the output (log10)",
        "size of the output gradient (log10)",
    ]
    assert list(figure.axes[0].lines[0].get_ydata()) == [1.0, 0.5, 1 / 3, 0.25]
    (mesh,) = figure.axes[1].collections
    assert mesh.get_array().tolist() == [[0.1] * 4, [1.0] * 4]
    texts = " ".join(text.get_text() for axis in figure.axes for text in axis.texts)
    assert "100% of the units that feed b are dead" in texts


def test_a_zero_is_dark_and_what_was_not_read_is_grey():
    rows = [{"step": s, "signal/a/gradient": 10.0**-s, "signal/b/gradient": 0.0} for s in (1, 2)]
    rows.append({"step": 3, "signal/a/gradient": 0.1})
    figure = overview(rows, findings=[])
    (mesh,) = figure.axes[1].collections
    table = mesh.get_array()
    assert table[0].tolist() == [-1.0, -2.0, -1.0]
    assert table[1].tolist()[:2] == [-2.0, -2.0]  # a 0 is as dark as the least
    assert math.isnan(table[1][2]) or table.mask[1][2]
    assert figure.axes[1].get_xlabel() == "optimizer step (grey: not read)"


def test_overview_of_no_row_is_refused():
    with pytest.raises(ValueError, match="must hold a row"):
        overview([])


def test_overview_of_one_row_without_a_loss():
    figure = overview([{"step": 1, "plasticity/a/dead_units": 0.1}])
    assert any("not known" in text.get_text() for text in figure.axes[0].texts)
