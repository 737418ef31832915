import io

import numpy as np
import pytest
import torch

from lightning_sym.plots.units import unit_activity, unit_similarity


def gaussian(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def shown(figure):
    return np.asarray(figure.axes[0].get_images()[0].get_array())


def test_copies_lie_side_by_side_largest_group_first():
    base = gaussian(4, 8)
    figure = unit_similarity(base[torch.tensor([0, 1, 2, 1, 3, 1, 2])])
    cosines = shown(figure)
    assert cosines.shape == (7, 7)
    same = cosines > 0.999
    expected = np.zeros((7, 7), dtype=bool)
    expected[:3, :3] = expected[3:5, 3:5] = expected[5, 5] = expected[6, 6] = True
    assert (same == expected).all()
    assert figure.axes[0].get_title() == "4 distinct of 7 units"
    figure.savefig(io.BytesIO(), dpi=40)


def test_biases_count_and_wide_layers_are_cut():
    weight = torch.ones(6, 2)
    assert unit_similarity(weight).axes[0].get_title() == "1 distinct of 6 units"
    bias = torch.tensor([0.0, 0, 0, 0, 0, 9])
    assert unit_similarity(weight, bias).axes[0].get_title() == "2 distinct of 6 units"
    figure = unit_similarity(gaussian(6, 3, 2), most=4)
    assert shown(figure).shape == (4, 4)
    assert figure.axes[0].get_title().endswith("the first 4 shown")


def test_activity_is_sorted_and_zeros_lie_on_the_edge():
    figure = unit_activity({"a": torch.tensor([0.0, 4.0, 2.0]), "b": torch.tensor([1.0, 1.0])})
    (axis,) = figure.axes
    a, b, line = axis.get_lines()
    assert list(a.get_ydata())[:2] == [2.0, 1.0]
    assert a.get_ydata()[2] == axis.get_ylim()[0] > 0
    assert list(b.get_ydata()) == [1.0, 1.0]
    assert list(line.get_ydata()) == [0.025, 0.025]
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["a (1 of 3)", "b (0 of 2)"]
    figure.savefig(io.BytesIO(), dpi=40)


def test_a_dead_layer_is_drawn_too():
    figure = unit_activity(torch.zeros(4))
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["4 of 4 dormant"]
    figure.savefig(io.BytesIO(), dpi=40)
    assert len(unit_activity(torch.ones(4), threshold=0.0).axes[0].get_lines()) == 1


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="mean_abs must hold at least one layer"):
        unit_activity({})
    with pytest.raises(ValueError, match=r"mean_abs of net\.0 must be finite and not negative"):
        unit_activity({"net.0": torch.tensor([-1.0])})
    with pytest.raises(ValueError, match="must be finite"):
        unit_similarity(torch.full((2, 2), torch.nan))
