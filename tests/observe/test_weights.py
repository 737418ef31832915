"""What is computed of a weight, each thing once: against the slow way."""

import pytest
import torch

from lightning_sym.observe import weights
from lightning_sym.observe.weights import LayerWeight


def weight(groups, rows, columns, *, decades=0.0):
    x = torch.randn(groups, rows, columns, generator=torch.Generator().manual_seed(rows), dtype=torch.float64)
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    return (u * (s[..., :1] * torch.logspace(0, -decades, s.shape[-1], dtype=torch.float64)).unsqueeze(1)) @ v


SHAPES = [(1, 40, 90), (1, 90, 40), (1, 200, 150), (3, 8, 20), (3, 20, 8)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("most", "error"), [(2**27, 2e-6), (0, 3.2e-3)])
def test_singular_values_of_all_blocks(monkeypatch, shape, most, error):
    """Products in float64, and in float32 where they would be large: the smallest values are 0 then."""
    monkeypatch.setattr(weights, "EXACT_PRODUCTS", most)
    for decades in (0.0, 4.0):
        w = weight(*shape, decades=decades)
        exact = torch.cat([torch.linalg.svdvals(block) for block in w.float().double()])
        exact = exact.sort(descending=True).values
        found = LayerWeight(w.float()).singular_values
        assert found.dtype == torch.float64
        assert float((found - exact).abs().max() / exact[0]) <= error
        large = exact > 0.05 * exact[0]
        torch.testing.assert_close(found[large], exact[large], rtol=1e-4, atol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_products_and_norms(shape):
    w = weight(*shape)
    found = LayerWeight(w)
    groups, rows, columns = shape
    whole = torch.block_diag(*w)
    torch.testing.assert_close(found.row_grams, w @ w.mT)
    torch.testing.assert_close(found.gram("out", None), whole @ whole.mT)
    torch.testing.assert_close(found.gram("in", None), whole.mT @ whole)
    torch.testing.assert_close(found.row_norms, whole.norm(dim=1))
    assert found.norm == pytest.approx(float(whole.norm()))
    for side, width in (("out", groups * rows), ("in", groups * columns)):
        keep = torch.arange(0, width, 3)
        part = found.gram(side, None)[keep][:, keep]
        torch.testing.assert_close(LayerWeight(w).gram(side, keep), part)


@pytest.mark.parametrize("scale", [1e25, 1e-15])
def test_norms_do_not_overflow(scale):
    w = weight(1, 5, 7)
    assert LayerWeight((scale * w).float()).norm == pytest.approx(scale * float(w.norm()), rel=1e-5)


def test_a_weight_that_is_not_finite_has_no_spectrum():
    w = weight(1, 6, 9).float()
    w[0, 2, 3] = torch.inf
    assert LayerWeight(w).singular_values.isnan().all()
