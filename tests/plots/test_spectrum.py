import io

import pytest
import torch

from lightning_sym.plots.spectrum import spectrum


def test_spectra_are_sorted_scaled_and_free_of_what_has_no_logarithm():
    values = torch.tensor([1.0, 4.0, 0.0, -1e-9, 2.0, float("nan")])
    figure = spectrum({"a": values, "b": torch.tensor([8.0, 8.0])})
    (axis,) = figure.axes
    assert (axis.get_xscale(), axis.get_yscale()) == ("log", "log")
    a, b = axis.get_lines()
    assert list(a.get_xdata()) == [1, 2, 3]
    assert list(a.get_ydata()) == [1.0, 0.5, 0.25]
    assert list(b.get_ydata()) == [1.0, 1.0]
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["a (3 of 6)", "b"]
    absolute = spectrum(values, relative=False).axes[0].get_lines()[0]
    assert list(absolute.get_ydata()) == [4.0, 2.0, 1.0]


def test_the_floor_cuts_rounding():
    values = torch.tensor([1.0, 1e-3, 1e-14], dtype=torch.float64)
    assert len(spectrum(values).axes[0].get_lines()[0].get_xdata()) == 2
    assert len(spectrum(values, floor=0.0).axes[0].get_lines()[0].get_xdata()) == 3
    assert len(spectrum(values, floor=0.1).axes[0].get_lines()[0].get_xdata()) == 1


def test_a_power_guide_has_its_slope():
    figure = spectrum(torch.ones(10), power=-2.0)
    guide = figure.axes[0].get_lines()[1]
    assert list(guide.get_ydata()) == pytest.approx([r**-2.0 for r in range(1, 11)])
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["rank ** -2"]
    figure.savefig(io.BytesIO(), dpi=40)


def test_one_spectrum_needs_no_legend_and_half_types_are_drawn():
    assert spectrum(torch.ones(3, dtype=torch.bfloat16)).legends == []


def test_nothing_to_draw_is_an_error():
    with pytest.raises(ValueError, match="nothing positive to draw"):
        spectrum(torch.zeros(3))
    with pytest.raises(ValueError, match="nothing positive to draw"):
        spectrum({})
    with pytest.raises(ValueError, match="floor must be at least 0"):
        spectrum(torch.ones(3), floor=-1.0)
