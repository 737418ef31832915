"""The picture of a run: loss, shares and events are drawn where they are."""

import pytest

from lightning_sym.plots.hierarchy import course

HISTORY = [
    {"step": step, "hierarchy/a/rescaling": share, "hierarchy/a/rank": 2.0, "hierarchy/loss": loss}
    for step, share, loss in ((1, 0.0, 1.0), (10, 0.5, 0.9), (100, 1.0, 0.1), (1000, 1.0, 0.1))
]
EVENTS = [
    {"event": "broken", "step": 10, "after": 1, "where": "a/rescaling", "units": [0]},
    {"event": "plateau", "step": 10, "after": 1, "where": "loss", "value": 0.9},
    {"event": "restored", "step": 100, "after": 10, "where": "a/rescaling", "units": [1]},
    {"event": "drop", "step": 100, "after": 10, "where": "loss", "value": 0.1},
    {"event": "plateau", "step": 1000, "after": 100, "where": "loss", "value": 0.1},
    {"event": "broken", "step": 5000, "after": 1000, "where": "a/rescaling", "units": [1]},
]


def test_what_happened_is_drawn_where_it_did():
    above, below = course(HISTORY, events=EVENTS, title="run").axes
    assert above.lines[0].get_xydata().tolist() == [[1, 1.0], [10, 0.9], [100, 0.1], [1000, 0.1]]
    marks = [(line.get_xdata()[0], line.get_linestyle()) for line in above.lines[1:]]
    assert marks == [(10, ":"), (100, "--")]
    (span,) = above.patches
    assert (span.get_x(), span.get_x() + span.get_width()) == (10, 100)
    (share,) = [line for line in below.lines if line.get_label() == "a/rescaling"]
    assert share.get_ydata().tolist() == [0.0, 0.5, 1.0, 1.0]
    assert above.get_xscale() == "log"
    assert above.get_title() == "run"


def test_a_monitor_with_a_name_is_drawn_by_it():
    rows = [{key.replace("hierarchy/", "head/"): value for key, value in row.items()} for row in HISTORY]
    rows = [{**row, "other/a/permutation": 0.3} for row in rows]
    above, below = course(rows, events=EVENTS, quantity="head").axes
    assert above.lines[0].get_xdata().tolist() == [1, 10, 100, 1000]
    assert [line.get_label() for line in below.lines if "/" in line.get_label()] == ["a/rescaling"]


def test_a_run_without_a_loss_is_drawn_and_none_is_an_error():
    rows = [{"step": 1, "hierarchy/a/permutation_2": 0.5}]
    above, below = course(rows, events=[]).axes
    assert not above.lines
    assert below.lines[0].get_label() == "a/permutation_2"
    with pytest.raises(ValueError, match="history must hold a row, got none"):
        course([], events=[])
