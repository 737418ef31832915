import math

import pytest
import scipy.stats
import torch
from hypothesis import given, settings, strategies as st

from lightning_sym.functional import power_law
from lightning_sym.functional.power_law import student_t


def points(n, seed=0, noise=0.3, exponent=-1.4, prefactor=2.5):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(n, generator=generator, dtype=torch.float64) * 5 + 0.1
    error = torch.randn(n, generator=generator, dtype=torch.float64) * noise
    return x, prefactor * x**exponent * error.exp()


def slow_power_law(x, y, confidence):
    """Sums in loops; the quantile is scipy's."""
    pairs = [(math.log(a), math.log(b)) for a, b in zip(x.tolist(), y.tolist(), strict=True)]
    n = len(pairs)
    mx, my = sum(a for a, _ in pairs) / n, sum(b for _, b in pairs) / n
    sxx = sum((a - mx) ** 2 for a, _ in pairs)
    slope = sum((a - mx) * (b - my) for a, b in pairs) / sxx
    rest = sum((b - my - slope * (a - mx)) ** 2 for a, b in pairs)
    total = sum((b - my) ** 2 for _, b in pairs)
    half = scipy.stats.t.ppf((1 + confidence) / 2, n - 2) * math.sqrt(rest / (n - 2) / sxx)
    return (
        slope,
        slope - half,
        slope + half,
        1 - rest / total,
        math.sqrt(rest / n),
        math.exp(my - slope * mx),
        n,
    )


@settings(max_examples=40, deadline=None)
@given(n=st.integers(3, 40), seed=st.integers(0, 9999), confidence=st.sampled_from([0.5, 0.95, 0.999]))
def test_fit_equals_its_slow_twin_and_does_not_depend_on_order(n, seed, confidence):
    x, y = points(n, seed)
    fit = power_law(x, y, confidence=confidence)
    for found, expected in zip(fit, slow_power_law(x, y, confidence), strict=True):
        assert float(found) == pytest.approx(expected, rel=1e-8, abs=1e-8)
    assert fit.low <= fit.exponent <= fit.high
    assert 0 <= fit.r2 <= 1
    again = power_law(
        x.flip(0) * 7, y.flip(0) * 1e-3, confidence=confidence
    )  # units change the prefactor only
    assert float(again.exponent) == pytest.approx(float(fit.exponent), rel=1e-8, abs=1e-8)
    assert float(again.high) == pytest.approx(float(fit.high), rel=1e-7, abs=1e-7)


def test_the_interval_covers_the_truth_as_often_as_it_says():
    inside = 0
    for seed in range(400):
        fit = power_law(*points(6, seed), confidence=0.8)
        inside += bool(fit.low <= -1.4 <= fit.high)
    assert 0.74 < inside / 400 < 0.86  # three standard deviations


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 5, 10, 31, 200, 1001])
@pytest.mark.parametrize("confidence", [0.1, 0.8, 0.95, 0.999])
def test_student_t_equals_scipy(degrees, confidence):
    assert student_t(confidence, degrees) == pytest.approx(
        scipy.stats.t.ppf((1 + confidence) / 2, degrees), rel=1e-9
    )


def test_an_exact_law_has_no_error():
    x = torch.tensor([0.5, 1.0, 3.0, 9.0], dtype=torch.float64)
    fit = power_law(x, 4 * x**1.5)
    assert [float(v) for v in fit[:4]] == pytest.approx([1.5, 1.5, 1.5, 1.0])
    assert float(fit.prefactor) == pytest.approx(4)
    assert float(fit.residual) < 1e-12


def test_points_without_a_logarithm_are_left_out():
    x = torch.tensor([1.0, 2.0, 4.0, 0.0, -1.0, math.nan, math.inf, 8.0, 8.0])
    y = torch.tensor([1.0, 2.0, 4.0, 1.0, 1.0, 1.0, 1.0, 0.0, math.nan])
    fit = power_law(x, y)
    assert fit.count == 3
    assert float(fit.exponent) == pytest.approx(1)


def test_degenerate_fits():
    one = power_law(torch.tensor([2.0]), torch.tensor([3.0]))
    assert one.exponent.isnan()
    assert one.count == 1
    assert power_law(torch.empty(0), torch.empty(0)).count == 0
    equal = power_law(torch.tensor([2.0, 2.0]), torch.tensor([3.0, 4.0]))
    assert equal.exponent.isnan()
    two = power_law(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0]))
    assert float(two.exponent) == pytest.approx(2)
    assert (float(two.low), float(two.high)) == (-math.inf, math.inf)
    flat = power_law(torch.tensor([1.0, 2.0, 3.0]), torch.ones(3))
    assert flat.exponent == 0
    assert flat.r2.isnan()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_types_are_computed_in_float32(dtype):
    x, y = points(20)
    x, y = x.to(dtype), y.to(dtype)
    fit = power_law(x, y)
    assert fit.exponent.dtype == torch.float32
    assert float(fit.exponent) == pytest.approx(float(power_law(x.double(), y.double()).exponent), rel=1e-4)
    assert power_law(x.double(), y.double()).exponent.dtype == torch.float64


def test_the_exponent_is_differentiable():
    x, y = points(6)
    assert torch.autograd.gradcheck(lambda y: power_law(x, y).exponent, (y.requires_grad_(),))


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="x and y must be vectors"):
        power_law(torch.ones(3), torch.ones(2))
    with pytest.raises(ValueError, match="x and y must be vectors"):
        power_law(torch.ones(3, 1), torch.ones(3, 1))
    for confidence in (0.0, 1.0, math.nan):
        with pytest.raises(ValueError, match="confidence must be in"):
            power_law(torch.ones(3), torch.ones(3), confidence=confidence)
