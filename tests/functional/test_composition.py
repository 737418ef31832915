"""Composition measures against closed forms and slow float64 twins."""

import math

import numpy as np
import pytest
import torch

from lightning_sym.functional import composition as comp


def bump(size, x, y, sigma=1.3, height=1.0):
    image = torch.zeros(size, size, dtype=torch.float64)
    for row in range(size):
        for col in range(size):
            image[row, col] = height * math.exp(-((col - x) ** 2 + (row - y) ** 2) / (2 * sigma**2))
    return image


def random_images(n, h, w, seed=0, dtype=torch.float64):
    return torch.randn(n, h, w, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_relative_error_twin():
    f, t = random_images(4, 5, 3), random_images(4, 5, 3, seed=1)
    slow = []
    for n in range(4):
        error = sum((f[n, r, c] - t[n, r, c]).item() ** 2 for r in range(5) for c in range(3))
        blank = sum((0.3 - t[n, r, c]).item() ** 2 for r in range(5) for c in range(3))
        slow.append(error / blank)
    torch.testing.assert_close(
        comp.relative_error(f, t, background=0.3), torch.tensor(slow, dtype=torch.float64)
    )


def test_relative_error_of_blank_is_one_whatever_the_polarity():
    dark = 1 - bump(12, 5, 6)[None]
    torch.testing.assert_close(
        comp.relative_error(torch.ones_like(dark), dark, background=1.0),
        torch.ones(1, dtype=torch.float64),
    )


def test_relative_error_of_a_blank_target():
    blank, drawn = torch.zeros(1, 3, 3), torch.ones(1, 3, 3)
    assert comp.relative_error(blank, blank) == 0
    assert comp.relative_error(drawn, blank) == math.inf


@pytest.mark.parametrize(("x", "y"), [(7.0, 3.0), (6.3, 9.6), (0.0, 13.0), (0.2, 0.0)])
@pytest.mark.parametrize(("background", "amplitude"), [(0.0, 1.0), (1.0, -1.0), (-2.0, 3.0)])
def test_find_bump_recovers_an_exact_gaussian(x, y, background, amplitude):
    image = background + amplitude * bump(14, x, y)
    seen = comp.find_bump(
        image[None, None], torch.tensor([[x, y]]), background=background, amplitude=amplitude
    )
    assert seen.found.item()
    assert seen.width.item() == pytest.approx(1.3, rel=1e-6)
    assert seen.center[0].tolist() == pytest.approx([x, y], abs=1e-6)
    assert seen.distance.item() == pytest.approx(math.hypot(round(x) - x, round(y) - y), abs=1e-6)


def test_find_bump_says_no():
    at = torch.tensor([[4.0, 4.0]])
    blank = comp.find_bump(torch.zeros(1, 9, 9), at)
    assert not blank.found.item()
    assert blank.height.item() == 0
    assert blank.width.isnan().item()
    far = comp.find_bump(bump(9, 7, 4)[None], at)
    assert far.distance.item() == 3
    assert not far.found.item()
    low = comp.find_bump(bump(9, 4, 4, height=0.4)[None], at)
    assert low.height.item() == pytest.approx(0.4)
    assert not low.found.item()


def test_metric_tensor_twin_is_numpys_gradient():
    phi = random_images(5, 6, 4)
    got = comp.metric_tensor(phi, spacing=(0.5, 2.0))
    by_y, by_x = np.gradient(phi.numpy(), 2.0, 0.5, axis=(0, 1))
    for r in range(5):
        for c in range(6):
            jac = np.stack([by_x[r, c], by_y[r, c]])
            np.testing.assert_allclose(got[r, c].numpy(), jac @ jac.T, rtol=1e-10)


def test_factorisation_closed_forms():
    y, x = torch.meshgrid(torch.arange(5.0), torch.arange(6.0), indexing="ij")
    apart = torch.stack([x.sin(), y**2], dim=-1)
    assert comp.factorisation(comp.metric_tensor(apart)).item() == pytest.approx(1)
    same = (x + y)[..., None]
    metric = comp.metric_tensor(same)
    assert comp.factorisation(metric).item() == pytest.approx(0.5)
    assert comp.volume_element(metric).abs().max() == 0
    assert comp.factorisation(comp.metric_tensor(torch.ones(3, 3, 2))).isnan()


def test_factorisation_and_volume_twins():
    metric = comp.metric_tensor(random_images(5, 6, 4))
    off, diag = 0.0, 0.0
    for r in range(5):
        for c in range(6):
            g = metric[r, c]
            off += abs(g[0, 1].item()) / 30
            diag += (g[0, 0] + g[1, 1]).item() / 30
            assert comp.volume_element(metric)[r, c].item() == pytest.approx(
                math.sqrt(torch.linalg.det(g).abs())
            )
    assert comp.factorisation(metric).item() == pytest.approx(1 - off / diag)


def test_metric_is_invariant_to_rotation_of_the_representation():
    phi = random_images(4, 4, 5)
    q, _ = torch.linalg.qr(random_images(1, 5, 5, seed=3)[0])
    torch.testing.assert_close(comp.metric_tensor(phi @ q), comp.metric_tensor(phi))


def test_explained_twin_is_a_scan_over_scales():
    f, s = random_images(6, 4, 4), random_images(6, 4, 4, seed=5)
    got = comp.explained(f, s)
    scales = torch.linspace(0, 3, 30001, dtype=torch.float64)
    for n in range(6):
        left = (f[n].flatten() - scales[:, None] * s[n].flatten()).square().sum(1).min()
        assert got[n].item() == pytest.approx(1 - (left / f[n].square().sum()).item(), abs=1e-6)
    assert (comp.explained(f, -f) == 0).all()
    assert (comp.explained(f, torch.zeros_like(f)) == 0).all()
    assert comp.explained(torch.zeros_like(f), f).isnan().all()


def test_superposition_tells_a_sum_from_a_product():
    size = 16
    column = bump(size, 8, 8).sum(0).expand(size, size) / 3.0  # depends on x alone
    row = column.T
    total = (1 + column + row)[None]
    got = comp.superposition(total, (1 + column)[None], (1 + row)[None], background=1.0)
    assert got.item() == pytest.approx(1)
    product = 1 + (column * row)[None]
    assert comp.superposition(product, (1 + column)[None], (1 + row)[None], background=1.0) < 0.6


def test_outer_product_rank():
    one = 1 - bump(10, 4.4, 5.5)
    two = bump(10, 2, 2, sigma=0.4) + bump(10, 7, 7, sigma=0.4)
    got = comp.outer_product_rank(torch.stack([one, 1 + two, torch.ones(10, 10)]), background=1.0)
    assert got.tolist() == pytest.approx([1, 2, 0], abs=1e-4)
    image = random_images(1, 5, 7)
    energies = torch.linalg.eigvalsh(image[0] @ image[0].T)
    assert comp.outer_product_rank(image).item() == pytest.approx((energies.sum() / energies[-1]).item())


def test_memorisation_tells_overlays_from_products():
    training = torch.stack([bump(14, x, y) for x in range(14) for y in range(14) if x < 6 or y < 6])
    overlay = (training[2] + training[-1])[None]
    composed = bump(14, 11, 11)[None]
    overlaid, multiplied = (comp.memorisation(f, training) for f in (overlay, composed))
    assert overlaid.superposition.item() == pytest.approx(1, abs=1e-3)
    assert overlaid.product < 0.9
    assert multiplied.superposition < 0.1
    assert multiplied.product.item() == pytest.approx(1)


def test_memorisation_twin_is_least_squares():
    f, training = random_images(3, 4, 5), random_images(6, 4, 5, seed=8)
    got = comp.memorisation(f, training, background=0.2)
    a = (training - 0.2).flatten(1).T.numpy()
    for n in range(3):
        b = (f[n] - 0.2).flatten().numpy()
        x = np.linalg.solve(a.T @ a, a.T @ b)
        assert got.superposition[n].item() == pytest.approx(1 - np.sum((a @ x - b) ** 2) / np.sum(b**2))
        best = np.linalg.eigvalsh((f[n] - 0.2).numpy() @ (f[n] - 0.2).numpy().T)
        assert got.product[n].item() == pytest.approx(best[-1] / best.sum())
    blank = comp.memorisation(torch.full((1, 4, 5), 0.25), training, background=0.25)
    assert blank.superposition.isnan().all()
    assert blank.product.isnan().all()


@pytest.mark.parametrize("features", [3, 40])
def test_linear_readout_twin_is_sklearn(features):
    from sklearn.linear_model import Ridge
    from sklearn.metrics import r2_score

    x, t = random_images(1, 20, features)[0], random_images(1, 15, features, seed=2)[0]
    map_2 = random_images(1, features, 2, seed=3)[0]
    c = x @ map_2 + 0.5 * random_images(1, 20, 2, seed=4)[0] + 3
    d = t @ map_2 + 3
    got = comp.linear_readout(x, c, test_features=t, test_coordinates=d, ridge=0.01)
    alpha = 0.01 * (x - x.mean(0)).square().sum().item() / 20
    fit = Ridge(alpha=alpha).fit(x.numpy(), c.numpy())
    slow = r2_score(d.numpy(), fit.predict(t.numpy()), multioutput="raw_values")
    np.testing.assert_allclose(got.numpy(), slow, rtol=1e-6)


def test_linear_readout_degenerate():
    x, c = random_images(1, 20, 3)[0], random_images(1, 20, 2, seed=2)[0]
    exact = torch.stack([2 * x[:, 0] - 1, torch.ones(20, dtype=torch.float64)], dim=1)
    r2 = comp.linear_readout(x, exact)
    assert r2[0].item() == pytest.approx(1, abs=1e-6)
    assert r2[1].isnan()
    assert comp.linear_readout(torch.ones(20, 4), c).abs().max() < 1e-12


def test_float32_agrees_with_float64():
    f, t = random_images(5, 8, 8), random_images(5, 8, 8, seed=1)
    for measure in (
        comp.relative_error,
        comp.explained,
        lambda a, b: comp.memorisation(a, b).superposition,
        lambda a, b: comp.outer_product_rank(a),
        lambda a, b: comp.metric_tensor(a),
    ):
        single, double = measure(f.float(), t.float()), measure(f, t)
        assert single.dtype == torch.float32
        torch.testing.assert_close(single.double(), double, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: comp.relative_error(torch.ones(2, 3, 3), torch.ones(1, 3, 3)), "one shape"),
        (lambda: comp.relative_error(torch.ones(3, 3), torch.ones(3, 3)), r"\[N, H, W\]"),
        (lambda: comp.find_bump(torch.ones(1, 2, 9), torch.ones(1, 2)), "3 x 3"),
        (lambda: comp.find_bump(torch.ones(1, 9, 9), torch.ones(2, 2)), "centers"),
        (lambda: comp.find_bump(torch.ones(1, 9, 9), torch.ones(1, 2), amplitude=0), "amplitude"),
        (lambda: comp.find_bump(torch.ones(1, 9, 9), torch.ones(1, 2), tolerance=-1), "tolerance"),
        (lambda: comp.metric_tensor(torch.ones(1, 9, 9)), "features"),
        (lambda: comp.metric_tensor(torch.ones(3, 9, 9), spacing=0.0), "spacing"),
        (lambda: comp.factorisation(torch.ones(3, 3)), "metric"),
        (lambda: comp.memorisation(torch.ones(1, 3, 3), torch.ones(1, 3, 4)), "one size"),
        (lambda: comp.memorisation(torch.ones(1, 3, 3), torch.ones(1, 3, 3), rcond=1.0), "rcond"),
        (lambda: comp.linear_readout(torch.ones(4, 3), torch.ones(3, 2)), "coordinates"),
        (lambda: comp.linear_readout(torch.ones(4, 3), torch.ones(4, 2), ridge=0.0), "ridge"),
        (
            lambda: comp.linear_readout(torch.ones(4, 3), torch.ones(4, 2), test_features=torch.ones(4, 3)),
            "together",
        ),
    ],
)
def test_bad_input_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()
