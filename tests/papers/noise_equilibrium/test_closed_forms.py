"""Noise equilibria against simulated SGD, one step's mean, and the Hessian by autograd."""

import itertools
import math

import pytest
import torch

from lightning_sym.papers.noise_equilibrium import (
    charge_change,
    equilibrium_spectra,
    equilibrium_weights,
    layer_spectra,
    linear_hessian_top,
    linear_hessian_trace,
    noise_balance,
)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def covariance(size, seed):
    a = draw(size, size + 3, seed=seed)
    return a @ a.mT / size


def simulate_linear(weights, target, *, lr, batch, steps, cov_x=None, cov_noise=None, seed=0):
    """Train a linear network by SGD on fresh Gaussian data, several runs at once.

    ``batch=None`` is gradient descent on the expected loss; leading dimensions of the weights are runs.
    """
    layers = [weight.clone() for weight in weights]
    outputs, inputs = target.shape
    cov_x = torch.eye(inputs, dtype=torch.float64) if cov_x is None else cov_x
    cov_noise = torch.eye(outputs, dtype=torch.float64) if cov_noise is None else cov_noise
    mix_x, mix_noise = torch.linalg.cholesky(cov_x), torch.linalg.cholesky(cov_noise)
    rng = torch.Generator().manual_seed(seed)
    runs = layers[0].shape[:-2]
    for _ in range(steps):
        before = [None, *itertools.accumulate(layers, lambda a, b: b @ a)]
        if batch is None:
            slope = 2 * (before[-1] - target) @ cov_x
        else:
            x = torch.randn(*runs, batch, inputs, generator=rng, dtype=torch.float64) @ mix_x.mT
            noise = torch.randn(*runs, batch, outputs, generator=rng, dtype=torch.float64) @ mix_noise.mT
            slope = 2 / batch * (x @ (before[-1] - target).mT - noise).mT @ x
        for i in reversed(range(len(layers))):
            step = slope if i == 0 else slope @ before[i].mT
            slope = layers[i].mT @ slope
            layers[i] = layers[i] - lr * step
    return layers


PROBLEMS = {
    "factorisation": {"target": draw(4, 5), "hidden": [6]},
    "narrow": {"target": draw(4, 2) @ draw(2, 5, seed=1), "hidden": [2]},
    "deep": {"target": draw(4, 5), "hidden": [4, 6, 5]},
    "deep, low rank": {"target": draw(5, 2) @ draw(2, 3, seed=1), "hidden": [3, 4]},
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_equilibrium_is_balanced_and_has_the_spectra(name):
    target, hidden = PROBLEMS[name]["target"], PROBLEMS[name]["hidden"]
    noise = {"cov_x": covariance(target.shape[1], 7), "cov_noise": covariance(target.shape[0], 8)}
    weights = equilibrium_weights(target, hidden=hidden, **noise)
    assert [w.shape[0] for w in weights] == [*hidden, target.shape[0]]
    product = torch.eye(target.shape[1], dtype=torch.float64)
    for weight in weights:
        product = weight @ product
    torch.testing.assert_close(product, target)
    for balance in noise_balance(weights, **noise):
        assert float(balance.incoming.norm()) > 0.1
        torch.testing.assert_close(balance.incoming, balance.outgoing)
        assert balance.residual == pytest.approx(0, abs=1e-6)
        assert (balance.cosine, balance.norms) == pytest.approx((1, 1))
    wanted = equilibrium_spectra(target, layers=len(weights), **noise)
    first, *middle, last = layer_spectra(weights, **noise)
    rank = len(wanted.ends)
    for ends in (first, last):
        torch.testing.assert_close(ends[:rank], wanted.ends)
        assert float(ends[rank:].sum()) == pytest.approx(0, abs=1e-12)
    for spectrum in middle:
        torch.testing.assert_close(spectrum[:rank], torch.full_like(wanted.ends, wanted.middle))
    if len(weights) == 2:  # the identity as it is written for two layers
        w, u = weights
        left = w @ noise["cov_x"] @ w.mT / noise["cov_x"].trace()
        torch.testing.assert_close(left, u.mT @ noise["cov_noise"] @ u / noise["cov_noise"].trace())


def expected_loss(parts, target, cov_x):
    off = torch.linalg.multi_dot(list(reversed(parts))) - target
    return (off @ cov_x @ off.mT).trace()


def exact_hessian(weights, target, cov_x):
    def loss(flat):
        parts = flat.split([w.numel() for w in weights])
        return expected_loss([v.view_as(w) for v, w in zip(parts, weights, strict=True)], target, cov_x)

    return torch.autograd.functional.hessian(loss, torch.cat([w.flatten() for w in weights]))


@pytest.mark.parametrize("widths", [(4, 5, 3), (3, 4, 2, 5)])
def test_hessian_is_that_of_autograd(widths):
    weights = [draw(b, a, seed=k) for k, (a, b) in enumerate(itertools.pairwise(widths))]
    cov_x, target = covariance(widths[0], 3), draw(widths[-1], widths[0], seed=9)
    trace = linear_hessian_trace(weights, cov_x=cov_x)
    assert trace == pytest.approx(float(exact_hessian(weights, target, cov_x).trace()))  # at any weights
    minimum = torch.linalg.multi_dot(list(reversed(weights)))
    full = exact_hessian(weights, minimum, cov_x)
    assert trace == pytest.approx(float(full.trace()))
    top = linear_hessian_top(weights, cov_x=cov_x)
    assert top == pytest.approx(float(torch.linalg.eigvalsh(full)[-1]))
    if len(weights) == 2:
        w, u = weights
        by_hand = 2 * 3 * (w @ cov_x @ w.mT).trace() + 2 * u.square().sum() * cov_x.trace()
        assert trace == pytest.approx(float(by_hand))


@pytest.mark.parametrize("batch", [None, 5])
def test_simulated_steps_are_those_of_autograd(batch):
    weights = [draw(4, 3), draw(5, 4, seed=1), draw(2, 5, seed=2)]
    target, cov_x, cov_noise = draw(2, 3, seed=3), covariance(3, 4), covariance(2, 5)
    options = {"lr": 0.01, "batch": batch, "cov_x": cov_x, "cov_noise": cov_noise}
    seen = simulate_linear(weights, target, steps=3, seed=6, **options)
    rng = torch.Generator().manual_seed(6)
    for _ in range(3):
        weights = [w.detach().requires_grad_() for w in weights]
        if batch is None:
            loss = expected_loss(weights, target, cov_x)
        else:
            x = torch.randn(batch, 3, generator=rng, dtype=torch.float64) @ torch.linalg.cholesky(cov_x).mT
            e = (
                torch.randn(batch, 2, generator=rng, dtype=torch.float64)
                @ torch.linalg.cholesky(cov_noise).mT
            )
            out = x
            for w in weights:
                out = out @ w.mT
            loss = (out - x @ target.mT - e).square().sum(1).mean()
        grads = torch.autograd.grad(loss, weights)
        weights = [w - 0.01 * g for w, g in zip(weights, grads, strict=True)]
    for a, b in zip(seen, weights, strict=True):
        torch.testing.assert_close(a, b.detach())


def test_one_step_changes_the_charge_by_its_mean():
    runs, lr, batch = 40_000, 0.05, 3
    w, u = draw(3, 2), draw(2, 3, seed=1)
    target, noise = draw(2, 2, seed=2), {"cov_x": covariance(2, 3), "cov_noise": covariance(2, 4)}
    many = [w.expand(runs, -1, -1), u.expand(runs, -1, -1)]
    after_w, after_u = simulate_linear(many, target, lr=lr, batch=batch, steps=1, **noise)
    changes = after_u.mT @ after_u - after_w @ after_w.mT - (u.mT @ u - w @ w.mT)
    mean, error = changes.mean(0), changes.std(0) / runs**0.5
    wanted = charge_change([w, u], target, lr=lr, batch=batch, **noise)
    assert float(wanted.norm()) > 20 * float(error.norm())
    assert float(((mean - wanted) / error).abs().max()) < 4.5
    # At the equilibrium it is zero: a minimum, where all that is left is the noise of y.
    at_rest = equilibrium_weights(target, hidden=[3], **noise)
    rest = charge_change(at_rest, target, lr=lr, batch=batch, **noise)
    assert float(rest.norm()) < 1e-12 * float(wanted.norm())


def starts(size, hidden, scale=0.6):
    """Three runs, U : W = 1 : 3, 1 : 1 and 3 : 1."""
    ratios = torch.tensor([1 / 3, 1.0, 3.0], dtype=torch.float64).sqrt()[:, None, None]
    w, u = draw(3, hidden, size), draw(3, size, hidden, seed=1)
    return [scale * w / ratios / hidden**0.5, scale * u * ratios / hidden**0.5]


def test_sgd_ends_at_one_point_whatever_the_start_and_gradient_descent_does_not():
    target = torch.eye(6, dtype=torch.float64)
    cov_noise = torch.diag(torch.tensor([0.4, 0.6, 0.8, 1.0, 1.2, 2.0], dtype=torch.float64))
    wanted = linear_hessian_trace(equilibrium_weights(target, hidden=[8], cov_noise=cov_noise))
    options = {"lr": 0.02, "cov_noise": cov_noise}
    descended = simulate_linear(starts(6, 8), target, batch=None, steps=3000, **options)
    for run in range(3):
        weights = [w[run] for w in descended]
        torch.testing.assert_close(weights[1] @ weights[0], target)
        assert noise_balance(weights, cov_noise=cov_noise)[0].residual > 0.5
    weights = simulate_linear(starts(6, 8), target, batch=10, steps=6000, **options)
    sides, traces = torch.zeros(2, 3, 8, 8, dtype=torch.float64), []
    for part in range(80):
        weights = simulate_linear(weights, target, batch=10, steps=100, seed=1 + part, **options)
        for run in range(3):
            sides[:, run] += torch.stack(noise_balance([w[run] for w in weights], cov_noise=cov_noise)[0])
        traces.append([linear_hessian_trace([w[run] for w in weights]) for run in range(3)])
    for run in range(3):
        incoming, outgoing = sides[:, run]
        assert float(2 * (incoming - outgoing).norm() / (incoming + outgoing).norm()) < 0.06
    averages = torch.tensor(traces).mean(0)
    torch.testing.assert_close(averages, torch.full((3,), wanted), rtol=0.04, atol=0)


def test_middle_layers_become_isotropic():
    target = torch.diag(torch.linspace(1.6, 0.4, 4, dtype=torch.float64))
    wanted = equilibrium_spectra(target, layers=3)
    weights = [w * 0.7 for w in (draw(4, 4), draw(4, 4, seed=1), draw(4, 4, seed=2))]
    options = {"lr": 0.03, "batch": 10}
    descended = simulate_linear(weights, target, lr=0.01, batch=None, steps=4000)
    assert float(layer_spectra(descended)[1].max() / layer_spectra(descended)[1].min()) > 2
    weights = simulate_linear(weights, target, steps=12_000, **options)
    sums = [torch.zeros(4, dtype=torch.float64) for _ in range(3)]
    for part in range(60):
        weights = simulate_linear(weights, target, steps=100, seed=1 + part, **options)
        sums = [s + spectrum / 60 for s, spectrum in zip(sums, layer_spectra(weights), strict=True)]
    torch.testing.assert_close(sums[1], torch.full_like(sums[1], wanted.middle), rtol=0.1, atol=0)
    for ends in (sums[0], sums[2]):
        torch.testing.assert_close(ends, wanted.ends, rtol=0.06, atol=0)


def test_bad_input_is_named():
    eye = torch.eye(3)
    for call, message in (
        (lambda: equilibrium_weights(eye, hidden=[2]), r"at least the rank of target, 3, got \[2\]"),
        (lambda: equilibrium_weights(eye, hidden=[]), r"at least the rank of target, 3, got \[\]"),
        (lambda: equilibrium_weights(0 * eye, hidden=[3]), "target must not be zero"),
        (lambda: equilibrium_weights(eye[0], hidden=[3]), r"target must be \[O >= 1, I >= 1\], got \(3,\)"),
        (lambda: equilibrium_weights(eye[:0], hidden=[3]), r"\[O >= 1, I >= 1\], got \(0, 3\)"),
        (lambda: equilibrium_weights(math.nan * eye, hidden=[3]), "target must be finite"),
        (lambda: equilibrium_spectra(eye, layers=2, cov_x=math.nan * eye), "cov_x must be symmetric"),
        (lambda: equilibrium_spectra(eye, layers=1), "layers must be at least 2, got 1"),
        (lambda: equilibrium_spectra(eye, layers=2, cov_x=-eye), "cov_x must be symmetric and positive"),
        (lambda: equilibrium_spectra(eye, layers=2, cov_noise=eye[:2]), r"cov_noise must be \[3, 3\]"),
        (lambda: linear_hessian_trace([eye, torch.eye(2)]), "weights must be matrices .* that follow"),
        (lambda: linear_hessian_trace([]), "weights must be matrices"),
        (lambda: charge_change([eye], eye, lr=0.1, batch=1), "weights must be of two layers, got 1"),
        (lambda: charge_change([eye, eye], eye, lr=0.0, batch=1), "lr must be positive"),
        (lambda: charge_change([eye, eye], eye[:2], lr=0.1, batch=1), r"target must be \[3, 3\]"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_weights_that_diverged_read_as_nan():
    bad = [torch.tensor([[1.0, math.nan]]), torch.ones(2, 1)]
    first, last = layer_spectra(bad)
    assert first.isnan().all()
    torch.testing.assert_close(last, torch.tensor([1.0], dtype=torch.float64))  # sqrt(2) over sqrt(tr 1)
    assert math.isnan(linear_hessian_top(bad))
    assert math.isnan(linear_hessian_trace(bad))
    (balance,) = noise_balance(bad)
    assert all(math.isnan(x) for x in (balance.residual, balance.cosine, balance.norms))
    assert math.isnan(linear_hessian_top([torch.tensor([[math.inf]])] * 2))
