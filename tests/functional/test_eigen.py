"""Many symmetric eigenproblems: equal to one by one, NaN for NaN, and what float32 is enough for."""

import math

import pytest
import torch

from lightning_sym.functional import (
    batched_eigh,
    batched_eigvalsh,
    effective_rank_from_eigenvalues,
    eigen,
    numerical_rank_from_eigenvalues,
    participation_ratio_from_covariance,
)


def symmetric(d, seed=0, dtype=torch.float64):
    x = torch.randn(d, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return ((x + x.mT) / 2).to(dtype)


def covariance(d, *, decades, seed=0):
    q = torch.linalg.qr(symmetric(d, seed)).Q
    return (q * torch.logspace(0, -decades, d, dtype=torch.float64)) @ q.mT


@pytest.mark.parametrize("up_to", [0, 1000])
def test_values_and_vectors_equal_those_of_one_matrix_at_a_time(monkeypatch, up_to):
    monkeypatch.setattr(eigen, "_BATCHED_UP_TO", up_to)
    matrices = [symmetric(d, seed) for seed, d in enumerate((3, 7, 3, 1, 7, 3, 40))]
    matrices[4] = matrices[4].float()
    for matrix, values, (again, vectors) in zip(
        matrices, batched_eigvalsh(matrices), batched_eigh(matrices), strict=True
    ):
        assert values.dtype == vectors.dtype == matrix.dtype
        torch.testing.assert_close(values, torch.linalg.eigvalsh(matrix))
        torch.testing.assert_close(again, values)
        torch.testing.assert_close((vectors * again) @ vectors.mT, matrix)
    assert batched_eigvalsh([]) == batched_eigh([]) == []


@pytest.mark.parametrize("up_to", [0, 1000])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_matrix_that_is_not_finite_reads_nan_and_spoils_no_other(monkeypatch, up_to, bad):
    monkeypatch.setattr(eigen, "_BATCHED_UP_TO", up_to)
    fine, spoilt = symmetric(4), symmetric(4, 1)
    spoilt[2, 1] = bad
    for dtype in (None, torch.float32):
        first, second, third = batched_eigvalsh([fine, spoilt, fine], dtype=dtype)
        torch.testing.assert_close(first.double(), torch.linalg.eigvalsh(fine), rtol=1e-5, atol=1e-5)
        assert torch.equal(first, third)
        assert second.isnan().all()
        assert all(part.isnan().all() for part in batched_eigh([spoilt], dtype=dtype)[0])


@pytest.mark.parametrize("scale", [1e-25, 1.0, 1e25])
def test_float32_keeps_what_it_is_said_to_keep(scale):
    c = scale * covariance(64, decades=4)
    (wide,), (narrow,) = batched_eigvalsh([c]), batched_eigvalsh([c], dtype=torch.float32)
    assert narrow.dtype == torch.float32
    assert (narrow.double() - wide).abs().max() < 3e-6 * wide.max()
    rank = effective_rank_from_eigenvalues
    assert float(rank(narrow)) == pytest.approx(float(rank(wide)), abs=0.01)
    share = narrow / narrow.sum()
    assert float(1 / share.square().sum()) == pytest.approx(
        float(participation_ratio_from_covariance(c)), rel=1e-5
    )


@pytest.mark.parametrize("scale", [1e-60, 1e-40, 1e60])
def test_what_float32_cannot_hold_reads_nan_in_it(scale):
    c = scale * covariance(5, decades=1)
    assert batched_eigvalsh([c], dtype=torch.float32)[0].isnan().all()
    assert batched_eigvalsh([c])[0].isfinite().all()
    assert batched_eigvalsh([0 * c], dtype=torch.float32)[0].tolist() == [0.0] * 5


def test_float32_loses_small_eigenvalues_so_that_ranks_need_float64():
    c = covariance(256, decades=6)
    (wide,), (narrow,) = batched_eigvalsh([c]), batched_eigvalsh([c], dtype=torch.float32)
    assert numerical_rank_from_eigenvalues(wide) >= 255
    assert numerical_rank_from_eigenvalues(narrow) < 220
    coarse = {"rtol": 1e-2}
    assert (
        abs(
            numerical_rank_from_eigenvalues(narrow, **coarse)
            - numerical_rank_from_eigenvalues(wide, **coarse)
        )
        <= 1
    )


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match=r"matrices\[1\] must be a square matrix"):
        batched_eigvalsh([torch.eye(2), torch.ones(2, 3)])
    with pytest.raises(
        TypeError, match=r"dtype must be torch.float32, torch.float64 or None, got torch.int64"
    ):
        batched_eigh([torch.eye(2)], dtype=torch.int64)


def of_samples(n, d, *, decades=0.0, dtype=torch.float64):
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    x = x * torch.logspace(0, -decades, d, dtype=torch.float64)
    x = x - x.mean(0)
    return (x.mT @ x / n).to(dtype)


@pytest.mark.parametrize(("n", "d"), [(40, 400), (99, 400), (300, 400), (20, 30), (1, 400)])
@pytest.mark.parametrize("decades", [0.0, 5.0])
def test_few_samples_make_a_smaller_problem_with_the_same_values(n, d, decades):
    c = of_samples(n, d, decades=decades)
    values = eigen.low_rank_eigvalsh(c, rank=max(n - 1, 1))
    exact = torch.linalg.eigvalsh(c)
    assert values.shape == (d,)
    torch.testing.assert_close(values, exact, rtol=0, atol=1e-14 * float(exact[-1].clamp_min(1e-30)))
    some, vectors = eigen.low_rank_eigh(c, rank=max(n - 1, 1))
    assert len(some) == (n - 1 if n > 1 and d == 400 and n < 100 else 1 if n == 1 else d)
    torch.testing.assert_close((vectors * some) @ vectors.mT, c, rtol=0, atol=1e-14 * float(exact[-1]))


def test_a_rank_that_is_too_small_is_seen_in_the_trace():  # the caller's promise is not checked
    c = of_samples(40, 400)
    assert float(eigen.low_rank_eigvalsh(c, rank=10).sum()) < 0.9 * float(c.trace())
