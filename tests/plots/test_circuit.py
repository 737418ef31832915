"""Angles over time: which lines are drawn, from which keys."""

import pytest

from lightning_sym.plots.circuit import alignment_over_time

ROWS = [
    {"step": 1, "circuit/update_cosine": 0.2, "circuit/a.0/update_cosine": -0.4, "circuit/a.0/W_rank": 3.0},
    {"step": 5, "circuit/update_cosine": 0.6, "circuit/a.0/update_cosine": float("nan"), "other": 1.0},
]


def test_each_layer_is_a_line_and_each_cosine_a_panel():
    (panel,) = alignment_over_time(ROWS).axes
    drawn = {line.get_label(): list(line.get_ydata()) for line in panel.lines}
    assert drawn["all"] == [0.2, 0.6]
    assert drawn["a.0"][0] == -0.4
    assert panel.get_ylim()[0] < -0.4
    assert list(panel.lines[0].get_xdata()) == [1, 5]
    both = [*ROWS, {"step": 6, "circuit/a.0/feedback_cosine": 0.9}]
    feedback, update = alignment_over_time(both).axes
    assert [line.get_label() for line in feedback.get_legend().get_lines()] == ["a.0"]
    assert [line.get_label() for line in update.get_legend().get_lines()] == ["a.0", "all"]


def test_nothing_to_draw_is_an_error():
    with pytest.raises(ValueError, match="history must have"):
        alignment_over_time([{"step": 1, "circuit/a/W_rank": 2.0}])
