"""Eigenmodes: slow twins, closed forms, degenerate input."""

import math

import pytest
import torch

from lightning_sym.functional import eigenmodes as e


def views(n=10, d=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(n, d, generator=generator, dtype=torch.float64) + 1.0
    return z, z + 0.3 * torch.randn(n, d, generator=generator, dtype=torch.float64)


def slow_spectrum(z_a, z_b, center):
    n, d = z_a.shape
    c = torch.zeros(d, d, dtype=torch.float64)
    mean = [z.sum(0) / n if center else torch.zeros(d) for z in (z_a, z_b)]
    for k in range(n):
        a, b = z_a[k] - mean[0], z_b[k] - mean[1]
        for i in range(d):
            for j in range(d):
                c[i, j] += (a[i] * b[j] + b[i] * a[j]) / (2 * n)
    return torch.linalg.eigvals(c).real.sort(descending=True).values


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("d", [3, 8, 9])
def test_the_spectrum_equals_the_slow_twin_for_narrow_and_wide_embeddings(d, center):
    z_a, z_b = views(n=4, d=d)
    mine = e.cross_covariance_eigenvalues(z_a, z_b=z_b, center=center)
    expected = slow_spectrum(z_a, z_b, center)
    assert len(mine) == min(d, 8)
    kept = torch.cat([expected[: (len(mine) + 1) // 2], expected[d - len(mine) // 2 :]])
    torch.testing.assert_close(mine, kept, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("shape", [(10, 4), (4, 10)])
def test_the_covariance_of_equal_views_is_the_cross_covariance(shape):
    z, _ = views(*shape)
    cross = e.cross_covariance_eigenvalues(z, z_b=z)
    own = e.covariance_eigenvalues(z)
    torch.testing.assert_close(cross[: len(own)], own, rtol=1e-8, atol=1e-10)


def test_variance_share():
    z, _ = views()
    variance = sum(((z[:, i] - z[:, i].mean()) ** 2).mean() for i in range(4))
    assert e.variance_share(z).item() == pytest.approx((variance / (z**2).sum(1).mean()).item())
    assert e.variance_share(z * 1e-200).item() == pytest.approx(e.variance_share(z).item())
    assert e.variance_share(torch.ones(5, 3)) == 0
    assert e.variance_share(torch.zeros(5, 3)) == 0
    assert e.variance_share(torch.full((5, 3), math.nan)).isnan()


def test_dates_of_a_logistic():
    t = torch.arange(0, 200, dtype=torch.float64)
    y = torch.sigmoid((t[:, None] - torch.tensor([20.3, 77.7, 500.0])) / 3)
    dates = e.mode_dates(t, eigenvalues=y)
    assert dates[:2].tolist() == pytest.approx([20.3, 77.7], abs=0.05)
    assert dates[2] == math.inf
    relative = e.mode_dates(t, eigenvalues=7 * y, level=3.5)
    torch.testing.assert_close(relative, dates)
    assert e.mode_dates(t, eigenvalues=y + 0.6).tolist()[0] == 0.0


def test_step_likeness_counts_the_modes_that_grow_together():
    t = torch.arange(0, 4000, dtype=torch.float64)

    def curves(*dates):
        return torch.sigmoid((t[:, None] - torch.tensor(dates)) / 10)

    assert e.step_likeness(curves(500.0, 1500.0, 2500.0)).item() == pytest.approx(1.0, abs=1e-6)
    assert e.step_likeness(curves(500.0, 500.0, 500.0)).item() == pytest.approx(1 / 3)
    # two together, then one: growth-weighted mean of 1/2, 1/2 and 1
    assert e.step_likeness(curves(500.0, 500.0, 2500.0)).item() == pytest.approx(2 / 3, abs=1e-6)
    sizes = torch.tensor([5.0, 0.2])
    scaled = curves(500.0, 1500.0) * sizes
    assert e.step_likeness(scaled, final=sizes).item() == pytest.approx(1.0, abs=1e-6)
    assert e.step_likeness(torch.zeros(4, 2)) == 0
    assert e.step_likeness(torch.full((4, 2), math.nan)).isnan()


def test_non_finite_embeddings_give_nan():
    z = torch.full((4, 3), math.inf)
    assert e.cross_covariance_eigenvalues(z, z_b=z).isnan().all()
    assert e.covariance_eigenvalues(z).isnan().all()
    diverged = 1e200 * views(4, 3)[0]
    assert e.cross_covariance_eigenvalues(diverged, z_b=diverged).isnan().all()


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"one shape, got \(4, 3\) and \(4, 2\)"):
        e.cross_covariance_eigenvalues(torch.ones(4, 3), z_b=torch.ones(4, 2))
    with pytest.raises(ValueError, match=r"z must be \[N >= 2"):
        e.covariance_eigenvalues(torch.ones(1, 3))
    with pytest.raises(ValueError, match=r"eigenvalues must be \[T >= 2, J >= 1\], got \(1, 3\)"):
        e.step_likeness(torch.ones(1, 3))
    with pytest.raises(ValueError, match="final must be positive and finite sizes"):
        e.step_likeness(torch.ones(2, 3), final=torch.zeros(3))
    with pytest.raises(ValueError, match=r"got \(3,\) and \(2, 2\)"):
        e.mode_dates(torch.ones(3), eigenvalues=torch.ones(2, 2))
