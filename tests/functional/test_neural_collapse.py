import math

import pytest
import torch
from hypothesis import given, settings, strategies as st

from lightning_sym.functional import neural_collapse, neural_collapse_from_sums


def gaussian(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def batch(n, d, k, seed=0):
    labels = torch.randint(k, (n,), generator=torch.Generator().manual_seed(seed))
    labels[:2] = torch.tensor([0, k - 1])  # two classes at least
    return gaussian(n, d, seed=seed) + 2 * gaussian(k, d, seed=seed + 1)[labels], labels


def sums_of(x, y, k):
    counts = torch.tensor([float((y == c).sum()) for c in range(k)], dtype=torch.float64)
    sums = torch.stack([x[y == c].double().sum(0) for c in range(k)])
    return counts, sums, x.double().mT @ x.double()


def slow_collapse(x, y, weight, bias):
    """The paper's definitions with D x D matrices, a general pseudo-inverse and loops."""
    x, classes = x.double(), sorted(set(y.tolist()))
    n, d = x.shape
    c = len(classes)
    mean = {k: sum(x[i] for i in range(n) if y[i] == k) / int((y == k).sum()) for k in classes}
    middle = sum(mean.values()) / c
    centred = [mean[k] - middle for k in classes]
    within = sum(torch.outer(x[i] - mean[int(y[i])], x[i] - mean[int(y[i])]) for i in range(n)) / n
    between = sum(torch.outer(m, m) for m in centred) / c
    nc1 = float((within @ torch.linalg.pinv(between, rtol=1e-9, hermitian=True)).trace()) / c
    cosines = [
        float(centred[i] @ centred[j] / centred[i].norm() / centred[j].norm())
        for i in range(c)
        for j in range(i)
    ]
    nc2 = sum(abs(v + 1 / (c - 1)) for v in cosines) / len(cosines)
    average = sum(cosines) / len(cosines)
    angles = math.sqrt(sum((v - average) ** 2 for v in cosines) / len(cosines))
    norms = [float(m.norm()) for m in centred]
    size = sum(norms) / c
    spread = math.sqrt(sum((v - size) ** 2 for v in norms) / c) / size
    w = torch.stack([weight[k].double() for k in classes])
    total_w = math.sqrt(sum(float(v) ** 2 for row in w for v in row))
    total_m = math.sqrt(sum(float(v) ** 2 for row in centred for v in row))
    nc3 = sum(
        (float(w[i][j]) / total_w - float(centred[i][j]) / total_m) ** 2 for i in range(c) for j in range(d)
    )
    wrong = 0
    for i in range(n):
        choice = max(range(len(weight)), key=lambda k: float(weight[k].double() @ x[i] + bias[k]))
        nearest = min(classes, key=lambda k: float((x[i] - mean[k]).norm()))
        wrong += choice != nearest
    return nc1, nc2, angles, spread, nc3, wrong / n


@settings(max_examples=30, deadline=None)
@given(n=st.integers(7, 30), d=st.integers(2, 7), k=st.integers(2, 5), seed=st.integers(0, 9999))
def test_measures_equal_their_slow_twin_on_features_and_on_sums(n, d, k, seed):
    x, y = batch(n, d, k, seed)
    weight, bias = gaussian(k, d, seed=seed + 2), gaussian(k, seed=seed + 3)
    expected = slow_collapse(x, y, weight, bias)
    found = neural_collapse(x, y, weight, bias)
    assert [float(v) for v in found] == pytest.approx(expected, rel=1e-6, abs=1e-9)
    summed = neural_collapse_from_sums(*sums_of(x, y, k), weight, bias)
    assert [float(v) for v in summed[:5]] == pytest.approx(expected[:5], rel=1e-6, abs=1e-9)
    assert summed.nc4 is None


def test_sums_add_up_over_batches():
    x, y = batch(24, 5, 3)
    weight = gaussian(3, 5, seed=2)
    parts = [sums_of(x[i::2], y[i::2], 3) for i in range(2)]
    added = neural_collapse_from_sums(*(a + b for a, b in zip(*parts, strict=True)), weight)
    whole = neural_collapse(x, y, weight)
    assert [float(v) for v in added[:5]] == pytest.approx([float(v) for v in whole[:5]])


def test_measures_do_not_depend_on_scale_rotation_shift_or_names():
    x, y = batch(40, 6, 4)
    weight = gaussian(4, 6, seed=2)
    first = neural_collapse(x, y, weight)
    q = torch.linalg.qr(gaussian(6, 6, seed=9)).Q
    turned = neural_collapse(3 * x @ q + 10, y, 0.1 * weight @ q)
    assert [float(v) for v in turned[:5]] == pytest.approx([float(v) for v in first[:5]])
    names = torch.tensor([2, 0, 3, 1])
    renamed = neural_collapse(x, names[y], weight[names.argsort()])
    assert [float(v) for v in renamed] == pytest.approx([float(v) for v in first])


@pytest.mark.parametrize("k", [2, 3, 10])
def test_a_collapsed_classifier_reads_zero_everywhere(k):
    simplex = torch.eye(k, dtype=torch.float64) - 1 / k
    y = torch.arange(k).repeat(5)
    x = 3 * simplex[y] + 7.0
    found = neural_collapse(x, y, 0.2 * simplex)
    assert [float(v) for v in found] == pytest.approx([0.0] * 6, abs=1e-9)


def test_each_measure_sees_its_own_departure():
    k = 4
    simplex = torch.eye(k, dtype=torch.float64) - 1 / k
    y = torch.arange(k).repeat(50)
    spread = neural_collapse(simplex[y] + 0.1 * gaussian(200, k), y, simplex)
    assert spread.nc1 > 0.01
    assert spread.nc2 < 0.1
    corner = torch.tensor([[1.0, 0], [-1, 0], [0, 2], [0, -2]], dtype=torch.float64)  # unequal, not regular
    found = neural_collapse(corner[y], y, -corner)
    assert float(found.nc1) == pytest.approx(0, abs=1e-12)
    assert float(found.nc2) == pytest.approx((2 * 2 / 3 + 4 * 1 / 3) / 6)
    assert float(found.nc2_norms) == pytest.approx(1 / 3)
    assert found.nc2_angles > 0.4
    assert float(found.nc3) == pytest.approx(4)  # opposite
    assert found.nc4 == 1


def test_nc1_has_a_value_one_can_check_by_hand():
    # means -2 and 2, spread 1 within: Sigma_W = 1, Sigma_B = 4, C = 2
    x = torch.tensor([[-3.0], [-1.0], [1.0], [3.0]])
    assert float(neural_collapse(x, torch.tensor([0, 0, 1, 1])).nc1) == pytest.approx(1 / 8)


def test_tight_clusters_far_from_the_origin_keep_their_digits():
    y = torch.arange(3).repeat(20)
    clusters = gaussian(3, 8, seed=1, dtype=torch.float32) * 0.1 + 100
    noise = gaussian(60, 8, dtype=torch.float32) * 1e-3
    x = clusters[y] + noise
    expected = neural_collapse(x.double(), y).nc1
    assert float(neural_collapse(x, y).nc1) == pytest.approx(float(expected), rel=0.02)


def test_classes_without_samples_are_left_out():
    x, y = batch(30, 6, 3)
    weight, bias = gaussian(3, 6, seed=2), gaussian(3, seed=3)
    wide_weight = torch.cat([weight[:1], gaussian(1, 6), weight[1:]])
    wide_bias = torch.cat([bias[:1], torch.tensor([-1e9]).double(), bias[1:]])
    wide_y = torch.tensor([0, 2, 3])[y]
    found = neural_collapse(x, wide_y, wide_weight, wide_bias)
    assert [float(v) for v in found] == pytest.approx([float(v) for v in neural_collapse(x, y, weight, bias)])
    # A classifier that always chooses the class without samples disagrees everywhere.
    wide_bias[1] = 1e9
    assert neural_collapse(x, wide_y, wide_weight, wide_bias).nc4 == 1


def test_the_mean_of_no_sample_is_nowhere_and_not_at_the_origin():
    x = torch.tensor([[-3.0], [-3.0], [0.5], [3.0], [3.0]])  # the third is nearer to 0 than to 13 / 6
    found = neural_collapse(x, torch.tensor([0, 0, 2, 2, 2]), torch.tensor([[-1.0], [0.0], [1.0]]))
    assert found.nc4 == 0


def test_single_samples_a_class_tell_nothing_of_the_variability_within():
    x, y = gaussian(4, 6), torch.arange(4)
    weight = gaussian(4, 6, seed=1)
    found = neural_collapse(x, y, weight)
    assert found.nc1.isnan()
    assert all(value.isfinite() for value in found[1:])
    assert neural_collapse_from_sums(*sums_of(x, y, 4)).nc1.isnan()
    assert neural_collapse(torch.cat([x, x[:1]]), torch.cat([y, y[:1]])).nc1 < 1e-12


def test_degenerate_batches():
    x, y = batch(10, 4, 3)
    one = neural_collapse(x, torch.zeros(10, dtype=torch.long), gaussian(1, 4))
    assert all(v.isnan() for v in one)
    equal = neural_collapse(torch.ones(4, 2), torch.tensor([0, 0, 1, 1]), torch.ones(2, 2))
    assert equal.nc1 == math.inf
    assert equal.nc2.isnan()
    assert equal.nc3.isnan()
    for bad in (math.nan, math.inf):
        x[0, 0] = bad
        assert neural_collapse(x, y).nc1.isnan()
        assert neural_collapse_from_sums(*sums_of(x, y, 3)).nc1.isnan()
    assert neural_collapse(*batch(10, 4, 3)).nc3 is None
    assert neural_collapse(*batch(10, 4, 3), torch.zeros(3, 4)).nc3.isnan()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_types_are_computed_in_float32(dtype):
    x, y = batch(60, 5, 3)
    x, weight = x.to(dtype), gaussian(3, 5, seed=2).to(dtype)
    found = neural_collapse(x, y, weight)
    assert {v.dtype for v in found} == {torch.float32}
    expected = neural_collapse(x.double(), y, weight.double())
    assert expected.nc1.dtype == torch.float64
    assert [float(v) for v in found] == pytest.approx([float(v) for v in expected], rel=1e-3, abs=1e-4)


def test_gradients_agree_with_finite_differences():
    x, y = batch(8, 3, 3)
    weight = gaussian(3, 3, seed=2).requires_grad_()
    x.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w: neural_collapse(x, y, w)[:5], (x, weight))


def test_wrong_arguments_are_named():
    x, y = batch(10, 4, 3)
    with pytest.raises(TypeError, match=r"labels must be integers, got torch\.float32"):
        neural_collapse(x, y.float())
    with pytest.raises(ValueError, match=r"labels must be \[N=10\]"):
        neural_collapse(x, y[:5])
    with pytest.raises(ValueError, match=r"labels must be in \[0, 2\), got 0 to 2"):
        neural_collapse(x, y, num_classes=2)
    with pytest.raises(ValueError, match="labels must be in"):
        neural_collapse(x, y - 1)
    with pytest.raises(ValueError, match=r"weight must be \[K=3, D=4\], got \(4, 3\)"):
        neural_collapse(x, y, torch.zeros(4, 3), num_classes=3)
    with pytest.raises(ValueError, match=r"bias must be \[K=3\]"):
        neural_collapse(x, y, torch.zeros(3, 4), torch.zeros(4))
    with pytest.raises(ValueError, match="features must be"):
        neural_collapse(x[0], y)
    counts, sums, second = sums_of(x, y, 3)
    with pytest.raises(ValueError, match="class_counts must be"):
        neural_collapse_from_sums(counts[:2], sums, second)
    with pytest.raises(ValueError, match="second_sum must be"):
        neural_collapse_from_sums(counts, sums, second[:3, :3])


def test_a_class_whose_sum_is_not_known_is_not_left_out_as_empty():
    counts, sums = torch.tensor([2.0, 2.0, 0.0]), torch.tensor([[2.0, 0.0], [-2.0, 0.0], [0.0, 0.0]])
    assert neural_collapse_from_sums(counts, sums, torch.eye(2)).nc2.isfinite()
    sums[2, 0] = torch.nan
    assert neural_collapse_from_sums(counts, sums, torch.eye(2)).nc2.isnan()
