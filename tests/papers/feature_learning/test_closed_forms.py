"""The solved model against gradient flow walked in small steps."""

import math

import pytest
import torch

from lightning_sym.papers.feature_learning import SolvableModel, initial_size, kernel_growth, pace, regime


def flow(model, time, steps=20_000):
    """Heun's method on the two weight vectors, from the definition alone."""
    u, w = model.u.double().clone(), model.w.double().clone()
    dt, scale = time / steps, model.output_scale

    def slopes(u, w):
        error = 2 * scale * (model.beta1 * scale * (u @ w) - model.beta2)
        return -model.lr_u * error * w, -model.lr_w * error * u

    for _ in range(steps):
        du, dw = slopes(u, w)
        eu, ew = slopes(u + dt * du, w + dt * dw)
        u, w = u + dt / 2 * (du + eu), w + dt / 2 * (dw + ew)
    return u, w


def weights(seed=0, width=7):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, width, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("time", [0.0, 0.05, 0.4])
def test_solution_is_the_flow(time):
    u, w = weights()
    model = SolvableModel(u, w, beta1=0.7, beta2=1.3, output_scale=0.4, lr_u=0.5, lr_w=2.0)
    u, w = flow(model, time, steps=2000)
    seen = model.at(torch.tensor([time]))
    norms = u.norm() * w.norm()
    torch.testing.assert_close(seen.slope[0], 0.4 * (u @ w), rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(seen.kernel[0], 0.16 * (2.0 * (u @ u) + 0.5 * (w @ w)), rtol=1e-5, atol=0)
    torch.testing.assert_close(seen.alignment[0], u @ w / norms, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(seen.norms[0], norms, rtol=1e-5, atol=0)


def test_end_fits_the_data_and_kernel_grows_as_predicted():
    u = torch.tensor([1.0, 1.0, -1.0, -1.0]).double() * 0.3
    w = torch.tensor([1.0, -1.0, 1.0, -1.0]).double() * 0.3  # f(0) = 0 exactly
    model = SolvableModel(u, w, beta2=0.8)
    start, end = model.at(torch.tensor([0.0])), model.at(torch.tensor([math.inf]))
    assert end.slope.item() == pytest.approx(0.8)
    size = initial_size(4, output_scale=1.0, var_u=0.09, var_w=0.09)
    assert (end.kernel / start.kernel).item() == pytest.approx(kernel_growth(0.8, size=size))


def test_bad_arguments_are_named():
    u, w = weights()
    with pytest.raises(ValueError, match="lr_u must be positive, got -1"):
        SolvableModel(u, w, lr_u=-1)
    with pytest.raises(ValueError, match="must both be"):
        SolvableModel(u, w[:3])
    with pytest.raises(ValueError, match="a number that is not zero"):
        SolvableModel(0 * u, 0 * u)
    with pytest.raises(ValueError, match="must be finite, got NaN"):
        SolvableModel(u, w * math.nan)
    with pytest.raises(ValueError, match=r"must be finite, got NaN or infinity \(beta2=inf\)"):
        SolvableModel(u, w, beta2=math.inf)
    for name in (regime, pace):
        with pytest.raises(ValueError, match="exponents must be finite, got a sum of nan"):
            name(output_scale=math.nan, var_u=0, var_w=0)


@pytest.mark.parametrize("target", [1.0, -1.0, 0.0])
@pytest.mark.parametrize("side", [1.0, -1.0])
def test_aligned_starts_whatever_the_target(target, side):
    u, _ = weights()
    model = SolvableModel(u, side * u, beta2=target, output_scale=0.2)
    u, w = flow(model, 1.5, steps=4000)
    seen = model.at(torch.tensor([1.5]))
    assert seen.slope.item() == pytest.approx(0.2 * float(u @ w), rel=1e-4, abs=1e-7)
    assert seen.kernel.item() == pytest.approx(0.04 * float(u @ u + w @ w), rel=1e-4)
    end = model.at(torch.tensor([math.inf]))
    assert end.slope.item() == pytest.approx(max(side * target, 0.0) * side)  # aligned ones can't cross zero


def test_growth_is_exact_with_a_slope_at_the_start():
    u, w = weights(3)
    model = SolvableModel(u, w, beta2=0.6, output_scale=0.5)
    u, w = flow(model, 20.0)
    start, end = model.u @ model.u + model.w @ model.w, u @ u + w @ w
    assert model.growth == pytest.approx(float(end / start), rel=1e-6)
    assert model.size == pytest.approx(0.5 * float(start))


def test_regime_and_pace_are_those_of_growing_models():
    for scaling, phase, speed in (
        ({"output_scale": -0.5, "var_u": 0, "var_w": 0}, "kernel", "steady"),
        ({"output_scale": 0, "var_u": -1, "var_w": -1}, "mixed", "steady"),
        ({"output_scale": -1, "var_u": 0, "var_w": 0, "lr_u": 1, "lr_w": 1}, "mixed", "steady"),
        ({"output_scale": 0, "var_u": 0, "var_w": 0}, "kernel", "unstable"),
        ({"output_scale": -1, "var_u": -1, "var_w": -1}, "rich", "frozen"),
    ):
        assert regime(**scaling) == phase
        assert pace(**scaling) == speed
        growths, speeds = [], []
        for width in (10, 10_000):
            values = {"lr_u": 1.0, "lr_w": 1.0} | {k: float(width) ** v for k, v in scaling.items()}
            half = torch.ones(width // 2).double()
            signs = torch.cat([half, -half])
            options = {k: values[k] for k in ("output_scale", "lr_u", "lr_w")}
            model = SolvableModel(
                values["var_u"] ** 0.5 * signs, values["var_w"] ** 0.5 * signs.abs(), **options
            )
            growths.append(model.growth)
            speeds.append(model.at(torch.zeros(1)).kernel.item())
        if phase == "mixed":
            assert growths[1] == pytest.approx(growths[0])
        elif phase == "kernel":
            assert growths[1] - 1 < (growths[0] - 1) / 50
        else:
            assert growths[1] > 50 * growths[0]
        change = math.log10(speeds[1] / speeds[0])
        assert {"steady": abs(change) < 0.01, "unstable": change > 1, "frozen": change < -1}[speed]
