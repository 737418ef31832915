"""Fits of many architectures: bitwise what they are without monitors, and all of their layers are read."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"


def load():
    """Import the script, which is not part of the package, with the files beside it."""
    spec = importlib.util.spec_from_file_location("benchmarks_coverage", BENCHMARKS / "coverage.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


coverage = load()
NAMES = list(coverage.networks())
#: What a network is told of, and why; all others are told of nothing.
EXPLAINED = {"timm nf_regnet_b0": "its forward makes the weight"}
#: Free parameters and normalisations: a score vector and biases beside the layers.
BELOW = {"graph attention": 0.85}


def test_there_are_at_least_forty():
    assert len(NAMES) == len(set(NAMES)) >= 40


@pytest.mark.parametrize("name", NAMES)
def test_a_network_is_read_and_left_as_it_is(name):
    torch.set_num_threads(1)
    row = coverage.measure(name)
    assert row["bitwise"]
    assert row["share"] > BELOW.get(name, 0.9)
    assert row["layers read"] == row["layers"]
    assert all(EXPLAINED.get(name, "?") in text for text in row["warnings"])
    for kind in row["unread"]:
        assert kind in row["missing"]
