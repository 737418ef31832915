"""Products of rows with themselves: in blocks as at once, added and begun anew."""

import pytest
import torch

from lightning_sym.observe.grams import BLOCK, add_gram, gram, mirror, upper


def rows(n, d, dtype=torch.float64):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(d), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("d", [1, BLOCK, BLOCK + 1, 2 * BLOCK, 2 * BLOCK + 37])
@pytest.mark.parametrize("n", [3, 200, 500])
def test_blocks_add_up_to_the_whole(n, d):
    x, y = rows(n, d), rows(2 * n, d)[::2]  # the second with gaps between its rows
    torch.testing.assert_close(gram(x), x.mT @ x)
    sums = torch.full((d, d), torch.nan, dtype=torch.float64)
    add_gram(sums, x, scale=0.5, anew=True)
    add_gram(sums, y)
    mirror(sums)
    torch.testing.assert_close(sums, 0.5 * x.mT @ x + y.mT @ y)
    assert torch.equal(sums[BLOCK:, :BLOCK], sums[:BLOCK, BLOCK:].mT)


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_float32_products_are_added_in_float64(scale):
    x = rows(500, BLOCK + 5, torch.float32)
    sums = torch.full((BLOCK + 5, BLOCK + 5), torch.nan, dtype=torch.float64)
    add_gram(sums, x, scale=scale, anew=True)
    for _ in range(3):
        add_gram(sums, x, scale=scale)
    mirror(sums)
    torch.testing.assert_close(sums, 4 * scale * x.double().mT @ x.double(), rtol=1e-4, atol=1e-3)


def test_several_matrices_are_mirrored_at_once():
    x = rows(400, BLOCK + 9)
    sums = torch.zeros(2, BLOCK + 9, BLOCK + 9, dtype=torch.float64)
    for part in sums:
        add_gram(part, x)
    mirror(sums)
    torch.testing.assert_close(sums[0], x.mT @ x)
    torch.testing.assert_close(sums[1], sums[0])


@pytest.mark.parametrize("d", [5, BLOCK, 2 * BLOCK + 37])
def test_what_is_formed_is_all_that_ranks_must_sum(d):
    x, y = rows(300, d), rows(500, d)
    mine, other = (torch.full((2, d, d), torch.nan, dtype=torch.float64) for _ in range(2))
    for sums, part in ((mine, x), (other, y)):
        for each in sums:
            add_gram(each, part, anew=True)
    parts = upper(mine)
    for part, theirs in zip(parts, upper(other), strict=True):
        part += theirs
    mirror(mine)
    torch.testing.assert_close(mine, (x.mT @ x + y.mT @ y).expand(2, d, d))
    assert sum(part.numel() for part in parts) <= d * d + d * BLOCK  # of two matrices
