import math

import pytest
import torch
from hypothesis import given, settings, strategies as st

from lightning_sym.functional import (
    effective_rank,
    effective_rank_from_eigenvalues,
    numerical_rank,
    numerical_rank_from_eigenvalues,
    participation_ratio,
    participation_ratio_from_covariance,
    stable_rank,
)


def gaussian(n, d, seed=0, dtype=torch.float64):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def orthogonal(d, seed=1):
    return torch.linalg.qr(gaussian(d, d, seed)).Q


# Slow twins: float64 singular values out of the eigenvalues of the Gram matrix, then loops.


def slow_singular_values(x, center):
    rows = [[float(v) for v in row] for row in x.double()]
    n, d = len(rows), len(rows[0])
    if center:
        means = [sum(row[j] for row in rows) / n for j in range(d)]
        rows = [[row[j] - means[j] for j in range(d)] for row in rows]
    gram = torch.zeros(d, d, dtype=torch.float64)
    for row in rows:
        for i in range(d):
            for j in range(d):
                gram[i, j] += row[i] * row[j]
    return [math.sqrt(max(float(v), 0.0)) for v in torch.linalg.eigvalsh(gram)]


def slow_effective_rank(sigma):
    total = sum(sigma)
    return math.exp(-sum(s / total * math.log(s / total) for s in sigma if s > 0))


def slow_participation(sigma):
    return sum(s**2 for s in sigma) ** 2 / sum(s**4 for s in sigma)


SHAPES = [(40, 6), (6, 40), (9, 9), (2, 5), (5, 1)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("center", [True, False])
def test_measures_of_features_equal_their_slow_twins(shape, center):
    x = gaussian(*shape) * torch.logspace(0, -1.5, shape[1], dtype=torch.float64) + 0.3
    sigma = sorted(slow_singular_values(x, center), reverse=True)[: min(shape)]
    if center:  # at most N - 1 directions are left; the rest of the twin's values are rounding
        sigma = sigma[: shape[0] - 1]
    assert float(effective_rank(x, center=center)) == pytest.approx(slow_effective_rank(sigma), rel=1e-6)
    assert float(participation_ratio(x, center=center)) == pytest.approx(slow_participation(sigma), rel=1e-9)


def test_measures_of_a_matrix_equal_their_slow_twins():
    a = gaussian(7, 5)
    sigma = slow_singular_values(a, center=False)
    assert float(stable_rank(a)) == pytest.approx(sum(s**2 for s in sigma) / max(sigma) ** 2, rel=1e-9)
    for rtol in (0.0, 0.3, 0.6, 0.99):
        assert numerical_rank(a, rtol=rtol) == sum(s > rtol * max(sigma) for s in sigma)


@pytest.mark.parametrize("k", [1, 3, 6])
def test_k_orthonormal_directions_count_k(k):
    x = torch.zeros(8, 6, dtype=torch.float64)
    x[:k, :k] = torch.eye(k, dtype=torch.float64)
    x = x @ orthogonal(6)
    for value in (
        effective_rank(x, center=False),
        participation_ratio(x, center=False),
        stable_rank(x),
        numerical_rank(x),
        effective_rank_from_eigenvalues(torch.linalg.eigvalsh(x.mT @ x)),
        participation_ratio_from_covariance(x.mT @ x),
        numerical_rank_from_eigenvalues(torch.linalg.eigvalsh(x.mT @ x)),
    ):
        assert float(value) == pytest.approx(k, abs=1e-6)


def test_twins_from_the_covariance_agree_with_the_features():
    x = gaussian(50, 12) @ torch.diag(torch.logspace(0, -3.7, 12, dtype=torch.float64)) + 5.0
    covariance = torch.cov(x.mT, correction=0)
    eigenvalues = torch.linalg.eigvalsh(covariance)
    torch.testing.assert_close(effective_rank_from_eigenvalues(eigenvalues), effective_rank(x))
    torch.testing.assert_close(participation_ratio_from_covariance(covariance), participation_ratio(x))
    centred = x - x.mean(0)
    assert numerical_rank_from_eigenvalues(eigenvalues) == numerical_rank(centred)
    assert 1 < numerical_rank(centred) < 12


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(2, 12),
    d=st.integers(1, 12),
    seed=st.integers(0, 10_000),
    log_scale=st.floats(-15, 15),
    center=st.booleans(),
)
def test_bounds_and_invariances_under_scale_rotation_and_permutation(n, d, seed, log_scale, center):
    x = gaussian(n, d, seed)
    perm = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    for measure in (effective_rank, participation_ratio):
        value = measure(x, center=center)
        assert 1 - 1e-9 <= float(value) <= min(n - center, d) + 1e-9
        for other in (x * 10**log_scale, x @ orthogonal(d, seed + 1), x[perm], -x):
            torch.testing.assert_close(measure(other, center=center), value, rtol=1e-6, atol=0)
    value = stable_rank(x)
    assert 1 - 1e-9 <= float(value) <= float(numerical_rank(x, rtol=0)) + 1e-9 <= min(n, d) + 1e-9
    torch.testing.assert_close(stable_rank(orthogonal(n, seed) @ x * 10**log_scale), value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_lower_precisions_are_computed_in_float32_and_float64_is_kept(dtype):
    x = gaussian(20, 5).to(dtype)
    for measure in (effective_rank, participation_ratio, stable_rank, numerical_rank):
        assert measure(x).dtype == torch.float32
        torch.testing.assert_close(measure(x).double(), measure(x.double()), rtol=1e-5, atol=1e-5)
        assert measure(x.double()).dtype == torch.float64


def test_centring_decides_whether_an_offset_counts():
    x = gaussian(100, 8) * 1e-6 + 1.0
    assert float(effective_rank(x)) > 7
    assert float(effective_rank(x, center=False)) < 1.01


def test_a_constant_batch_has_no_rank_and_zeros_have_none_either():
    constant = torch.full((10, 4), 0.1)  # 0.1 is not a float: its mean is off by rounding
    zeros = torch.zeros(10, 4)
    assert effective_rank(constant) == participation_ratio(constant) == 0
    assert effective_rank(constant, center=False) == pytest.approx(1, abs=1e-5)
    for measure in (effective_rank, participation_ratio, stable_rank, numerical_rank):
        assert measure(zeros) == 0
    assert effective_rank_from_eigenvalues(torch.zeros(3)) == 0
    assert numerical_rank_from_eigenvalues(torch.tensor([-1e-9, 0.0])) == 0
    assert participation_ratio_from_covariance(torch.zeros(3, 3)) == 0


def test_a_rank_one_batch_reads_one():
    x = torch.outer(torch.linspace(-1, 1, 64), torch.linspace(1, 2, 32))
    assert effective_rank(x) == pytest.approx(1, abs=1e-3)
    assert effective_rank_from_eigenvalues(
        torch.linalg.eigvalsh(x.mT.double() @ x.double())
    ) == pytest.approx(1)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_input_reads_nan(bad):
    x = gaussian(4, 4).clone()
    x[1, 2] = bad
    for measure in (effective_rank, participation_ratio, stable_rank, numerical_rank):
        assert measure(x).isnan()
    assert participation_ratio_from_covariance(x).isnan()
    assert effective_rank_from_eigenvalues(x[1]).isnan()
    assert numerical_rank_from_eigenvalues(x[1]).isnan()


def test_gradients_agree_with_finite_differences():
    x = gaussian(6, 4).requires_grad_()
    for measure in (effective_rank, participation_ratio, stable_rank):
        assert torch.autograd.gradcheck(measure, (x,))
    values = torch.tensor([1.0, 0.5, 0.2], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(effective_rank_from_eigenvalues, (values,))


def test_gradients_stay_finite_where_a_direction_vanishes():
    values = torch.tensor([1.0, 0.5, 0.0], requires_grad=True)
    effective_rank_from_eigenvalues(values).backward()
    assert values.grad.isfinite().all()
    zero = torch.zeros(3, 3, requires_grad=True)
    participation_ratio_from_covariance(zero).backward()
    assert zero.grad.isfinite().all()


@pytest.mark.parametrize("bad", [torch.zeros(3), torch.zeros(1, 3), torch.zeros(2, 0), torch.zeros(2, 2, 2)])
def test_wrong_shapes_are_named(bad):
    with pytest.raises(ValueError, match="features must be"):
        effective_rank(bad)
    with pytest.raises(ValueError, match="features must be"):
        participation_ratio(bad)


def test_other_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="matrix must be"):
        stable_rank(torch.zeros(3))
    with pytest.raises(ValueError, match="covariance must be a square matrix"):
        participation_ratio_from_covariance(torch.zeros(3, 2))
    with pytest.raises(ValueError, match="eigenvalues must be"):
        effective_rank_from_eigenvalues(torch.zeros(3, 2))
    for rtol in (-0.1, 1.0, math.nan):
        with pytest.raises(ValueError, match="rtol must be"):
            numerical_rank(torch.eye(2), rtol=rtol)
        with pytest.raises(ValueError, match="rtol must be"):
            numerical_rank_from_eigenvalues(torch.ones(2), rtol=rtol)
