"""How a reading grows, and what the rest takes: the parts of the scripts that can go wrong."""

import importlib

import pytest

from tests.benchmarks.test_common import ROOT


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module


def test_each_axis_has_networks_that_take_their_batch(script):
    growth = script("growth")
    for axis, values in growth.AXES.items():
        point = {**growth.USUAL, axis: values[0]}
        net, data = growth.network(point)
        assert len(data) == point["batch"]
        assert net(data[:2][0]).shape == (2, 10)
    deep, _ = growth.network({**growth.USUAL, "depth": 5})
    assert sum(hasattr(layer, "weight") for layer in deep) == 5


def test_a_point_of_two_ranks_counts_what_they_send(script):
    growth = script("growth")
    point = {**growth.USUAL, "width": 16, "batch": 8, "ranks": 2}
    quiet, read = growth.apart("none", point), growth.apart("standard", point)
    assert quiet["held_mb"] == 0 < read["held_mb"]
    # Of float64: at least the second moments of 16 inputs, outputs and gradients.
    assert read["sent_mb"] - quiet["sent_mb"] > 3 * 16 * 16 * 8 / 1e6
    assert read["peak_mb"] > 50


def test_the_page_of_a_long_run_is_small(script):
    tools = script("tools")
    told = tools.page(500)
    assert (told["steps"], told["readings"], told["curves"]) == (500, 5, 241)
    assert 20 < told["kb"] < 300
