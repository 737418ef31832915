import math

import pytest
import torch
from hypothesis import given, settings, strategies as st

from lightning_sym.functional import (
    _grouping,
    dead_fraction,
    distinct_units,
    dormant_fraction,
    dormant_fraction_from_scores,
    dormant_scores,
    unit_groups,
    zero_units,
)


def gaussian(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def slow_dormant(activations, threshold):
    rows = activations.double().tolist()
    means = [sum(abs(row[u]) for row in rows) / len(rows) for u in range(len(rows[0]))]
    layer = sum(means) / len(means)
    return sum((m / layer if layer else 0.0) <= threshold for m in means) / len(means)


def slow_distinct(vectors, tolerance, rtol=1e-3):
    """Union-find over pairs; ``vectors`` is a list (one a side) of lists of unit vectors."""

    def agree(side, i, j):
        norms = [math.sqrt(sum(v * v for v in vector)) for vector in side]
        small = [norm <= rtol * max(norms) for norm in norms]
        if small[i] or small[j]:
            return small[i] and small[j]
        cosine = sum(a * b for a, b in zip(side[i], side[j], strict=True)) / norms[i] / norms[j]
        return cosine >= 1 - tolerance - 1e-12

    parent = list(range(len(vectors[0])))

    def root(i):
        return i if parent[i] == i else root(parent[i])

    for i in range(len(parent)):
        for j in range(i):
            if all(agree(side, i, j) for side in vectors):
                parent[root(i)] = root(j)
    return len({root(i) for i in range(len(parent))}) / len(parent)


def test_dormant_scores_have_mean_one_and_follow_the_definition():
    scores = dormant_scores(torch.tensor([2.0, 4.0, 0.0]))
    torch.testing.assert_close(scores, torch.tensor([1.0, 2.0, 0.0]))
    assert (dormant_scores(torch.zeros(3)) == 0).all()


@pytest.mark.parametrize("threshold", [0.0, 0.025, 0.5, 1.0])
def test_dormant_fraction_equals_its_slow_twin(threshold):
    h = (gaussian(30, 12) * torch.logspace(0, -4, 12, dtype=torch.float64)).relu()
    h[:, 3] = 0
    expected = slow_dormant(h, threshold)
    assert float(dormant_fraction(h, threshold=threshold)) == pytest.approx(expected)
    sums = h.abs().sum(0)
    assert float(dormant_fraction_from_scores(sums, threshold=threshold)) == pytest.approx(expected)
    assert expected > 0


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 8), u=st.integers(1, 8), seed=st.integers(0, 999), scale=st.floats(1e-6, 1e6))
def test_dormancy_does_not_depend_on_scale_or_order(n, u, seed, scale):
    h = gaussian(n, u, seed=seed).relu()
    order = torch.randperm(u, generator=torch.Generator().manual_seed(seed))
    value = dormant_fraction(h, threshold=0.3)
    assert value == dormant_fraction((h * scale)[:, order], threshold=0.3) == slow_dormant(h, 0.3)
    assert 0 <= value <= 1


def test_dead_units_are_those_that_never_fire():
    h = torch.tensor([[1.0, 0.0, 0.0, 1e-4], [0.0, 0.0, 2.0, 0.0]])
    assert dead_fraction(h) == 0.25
    assert dead_fraction(h, tolerance=1e-3) == 0.5
    assert dead_fraction(torch.zeros(3, 2)) == 1
    assert dormant_fraction(torch.zeros(3, 2)) == 1


def test_zero_units_look_at_weights_and_bias():
    weight = torch.tensor([[[3.0], [4.0]], [[0.0], [0.0]], [[1e-4], [0.0]]])
    assert zero_units(weight) == pytest.approx(2 / 3)
    assert zero_units(weight, torch.tensor([0.0, 1.0, 0.0])) == pytest.approx(1 / 3)
    assert zero_units(weight, rtol=0.0) == pytest.approx(1 / 3)
    assert zero_units(torch.zeros(4, 2)) == 1


def test_distinct_units_counts_copies_once():
    base = gaussian(5, 7)
    weight = torch.cat([base, 3 * base[:2], -base[:1], torch.zeros(2, 7, dtype=torch.float64)])
    # five directions, one opposite of the first, and one class of zero units
    assert float(distinct_units(weight)) == pytest.approx(7 / 10)
    bias = torch.zeros(10, dtype=torch.float64)
    bias[5] = 100.0
    assert float(distinct_units(weight, bias)) == pytest.approx(8 / 10)


def test_scaled_copies_are_the_same_unit_at_no_tolerance_at_all():
    base = gaussian(1, 50, dtype=torch.float32)
    weight = base * torch.linspace(0.1, 9, 64)[:, None]
    assert float(distinct_units(weight, tolerance=0.0)) == pytest.approx(1 / 64)


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_what_counts_as_zero_is_relative_to_the_layer(scale):
    weight = torch.cat([gaussian(3, 5), torch.full((1, 5), 1e-9, dtype=torch.float64)]) * scale
    assert zero_units(weight) == 0.25
    assert distinct_units(weight) == 1


def test_outgoing_weights_tell_units_apart():
    weight = torch.ones(3, 4)
    outgoing = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    assert float(distinct_units(weight)) == pytest.approx(1 / 3)
    assert float(distinct_units(weight, None, outgoing)) == pytest.approx(2 / 3)


def test_a_chain_of_agreeing_units_is_one_unit_in_any_order():
    angles = torch.arange(10, dtype=torch.float64) * 0.1  # neighbours agree, the ends do not
    weight = torch.stack([angles.cos(), angles.sin()], dim=1)
    order = torch.tensor([9, 0, 5, 2, 7, 4, 1, 8, 3, 6])
    assert float(distinct_units(weight[order])) == pytest.approx(1 / 10)
    assert float(distinct_units(weight[order], tolerance=1e-3)) == 1


@settings(max_examples=60, deadline=None)
@given(
    u=st.integers(1, 14),
    seed=st.integers(0, 10_000),
    tolerance=st.sampled_from([0.0, 0.01, 0.1, 0.3]),
    block=st.sampled_from([1, 30, 2**21]),
    with_outgoing=st.booleans(),
)
def test_distinct_units_equals_union_find_whatever_the_block(u, seed, tolerance, block, with_outgoing):
    weight = gaussian(u, 2, seed=seed)
    weight[torch.rand(u, generator=torch.Generator().manual_seed(seed)) < 0.15] = 0
    outgoing = gaussian(2, u, seed=seed + 1)
    sides = [weight.tolist()] + ([outgoing.T.tolist()] if with_outgoing else [])
    before = _grouping.BLOCK_ELEMENTS
    try:
        _grouping.BLOCK_ELEMENTS = block
        value = distinct_units(weight, None, outgoing if with_outgoing else None, tolerance=tolerance)
        shuffled = torch.randperm(u, generator=torch.Generator().manual_seed(seed))
        again = distinct_units(
            weight[shuffled] * 7, None, outgoing[:, shuffled] if with_outgoing else None, tolerance=tolerance
        )
    finally:
        _grouping.BLOCK_ELEMENTS = before
    assert float(value) == pytest.approx(slow_distinct(sides, tolerance)) == float(again)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_types_are_computed_in_float32(dtype):
    weight = gaussian(6, 4).to(dtype)
    weight[1] = weight[0]
    assert distinct_units(weight).dtype == torch.float32
    assert float(distinct_units(weight)) == pytest.approx(5 / 6)
    assert zero_units(weight).dtype == dead_fraction(weight).dtype == torch.float32
    assert dormant_fraction(weight).dtype == torch.float32
    assert distinct_units(weight.double()).dtype == torch.float64
    assert float(dormant_fraction(weight, threshold=0.9)) == pytest.approx(slow_dormant(weight, 0.9))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_input_reads_nan(bad):
    x = gaussian(4, 3)
    x[2, 1] = bad
    assert dormant_fraction(x).isnan()
    assert dead_fraction(x).isnan()
    assert zero_units(x).isnan()
    assert distinct_units(x).isnan()
    assert distinct_units(gaussian(4, 3), None, x.T).isnan()


def test_wrong_arguments_are_named():
    x = torch.eye(3)
    with pytest.raises(ValueError, match="mean_abs must be"):
        dormant_scores(x)
    with pytest.raises(ValueError, match="activations must be"):
        dormant_fraction(x[0])
    with pytest.raises(ValueError, match="threshold must be at least 0, got -1"):
        dormant_fraction(x, threshold=-1)
    with pytest.raises(ValueError, match="tolerance must be at least 0"):
        dead_fraction(x, tolerance=-1)
    with pytest.raises(ValueError, match="weight must be"):
        zero_units(x[0])
    with pytest.raises(ValueError, match="bias must be"):
        zero_units(x, torch.zeros(2))
    with pytest.raises(ValueError, match="rtol must be"):
        zero_units(x, rtol=1)
    with pytest.raises(ValueError, match="outgoing must be"):
        distinct_units(x, None, torch.zeros(3, 2))
    with pytest.raises(ValueError, match="tolerance must be"):
        distinct_units(x, tolerance=1)
    with pytest.raises(ValueError, match="rtol must be"):
        distinct_units(x, rtol=-1)


@pytest.mark.parametrize("block", [1, 2**21])
def test_groups_are_named_by_their_first_unit(monkeypatch, block):
    monkeypatch.setattr(_grouping, "BLOCK_ELEMENTS", block)
    base = gaussian(3, 6)
    weight = base[torch.tensor([2, 0, 1, 0, 2, 2])]
    assert unit_groups(weight).tolist() == [0, 1, 2, 1, 0, 0]
    weight[1] = 0
    assert unit_groups(weight).tolist() == [0, 1, 2, 3, 0, 0]
    outgoing = torch.tensor([[1.0, 1, 1, 1, 1, 0], [0, 0, 0, 0, 0, 1]], dtype=torch.float64)
    assert unit_groups(weight, None, outgoing).tolist() == [0, 1, 2, 3, 0, 5]
    weight[1] = math.nan
    with pytest.raises(ValueError, match="must be finite"):
        unit_groups(weight)


def planted(units, width, seed, tolerance=1e-2):
    """Random rows, a quarter of them near others: copies, just within the tolerance, and zero ones."""
    weight = gaussian(units, width, seed=seed, dtype=torch.float32)
    unit = torch.nn.functional.normalize(weight, dim=1)
    some = units // 16
    across = torch.nn.functional.normalize(gaussian(some, width, seed=seed + 1, dtype=torch.float32), dim=1)
    across = torch.nn.functional.normalize(across - (across * unit[:some]).sum(1, True) * unit[:some], dim=1)
    angle = math.acos(1 - tolerance) * torch.linspace(0, 0.999, some)[:, None]
    weight[some : 2 * some] = unit[:some] * angle.cos() + across * angle.sin()
    weight[2 * some : 3 * some] = 3 * weight[some : 2 * some]
    weight[3 * some : 3 * some + 5] = 0
    return weight[torch.randperm(units, generator=torch.Generator().manual_seed(seed))]


def slow_groups(*sides, tolerance=1e-2):
    """All cosines at once, in float64, and a search."""
    agree = True
    for side in sides:
        unit = torch.nn.functional.normalize(side.double(), dim=1)
        zero = side.norm(dim=1) <= 1e-3 * side.norm(dim=1).max()
        near = (unit @ unit.T >= 1 - tolerance) & ~zero[:, None] & ~zero
        agree = agree & (near | (zero[:, None] & zero))
    near = [row.nonzero().flatten().tolist() for row in agree]
    label = [-1] * len(near)
    for first in range(len(near)):
        reached = [first] if label[first] < 0 else []
        while reached:
            unit_at = reached.pop()
            if label[unit_at] < 0:
                label[unit_at] = first
                reached += [k for k in near[unit_at] if label[k] < 0]
    return label


@pytest.mark.parametrize("shape", [(100, 700), (300, 700), (700, 300), (1500, 40), (1500, 200)])
@pytest.mark.parametrize("hashed", [False, True])
def test_many_units_are_grouped_as_by_all_pairs_at_once(monkeypatch, shape, hashed):
    if hashed:
        monkeypatch.setattr(_grouping, "HASHED_ABOVE", 0)
    monkeypatch.setattr(_grouping, "BLOCK_ELEMENTS", 200_000)
    for seed in range(3):
        weight = planted(*shape, seed=seed)
        assert unit_groups(weight).tolist() == slow_groups(weight)
        outgoing = planted(*shape, seed=seed)
        outgoing[: len(outgoing) // 2] = gaussian(len(outgoing) // 2, shape[1], seed=7, dtype=torch.float32)
        assert unit_groups(weight, None, outgoing.T).tolist() == slow_groups(weight, outgoing)


def test_hashing_joins_no_units_that_do_not_agree_and_misses_few_that_do(monkeypatch):
    monkeypatch.setattr(_grouping, "HASHED_ABOVE", 0)
    missed = 0
    for seed in range(4):
        # The hardest: every pair exactly within the tolerance, and all else far away.
        weight = planted(1600, 64, seed=seed)
        fast, slow = unit_groups(weight).tolist(), slow_groups(weight)
        missed += sum(a != b for a, b in zip(fast, slow, strict=True))
        joined = {(a, b) for a, b in zip(fast, slow, strict=True)}
        assert len(joined) == len(set(fast))  # each group found lies within one that is there
    assert missed <= 2
    bits, tables = _grouping._tables(50_000, 0.01)
    alike = (1 - math.acos(0.99) / math.pi) ** bits
    assert (1 - alike) ** tables <= 1e-4 < (1 - alike) ** (tables - 1)


@pytest.mark.parametrize("hashed", [False, True])
def test_layers_of_copies_and_narrow_cones(monkeypatch, hashed):
    if hashed:
        monkeypatch.setattr(_grouping, "HASHED_ABOVE", 0)
    scale = torch.linspace(0.1, 9, 3000)[:, None]
    assert unit_groups(gaussian(1, 40, dtype=torch.float32) * scale).tolist() == [0] * 3000
    cone = 1 + 0.5 * gaussian(3000, 40, dtype=torch.float32)
    cone[1500:1800] = 2 * cone[:300]
    assert float(distinct_units(cone)) == pytest.approx(0.9)


def test_fifty_thousand_units_take_neither_all_pairs_nor_their_memory(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("all pairs are compared")

    monkeypatch.setattr(_grouping, "_few_entries", refuse)
    weight = gaussian(50_000, 64, dtype=torch.float32)
    weight[25_000:30_000] = 2 * weight[:5_000]
    assert float(distinct_units(weight)) == pytest.approx(0.9, abs=1e-4)
    with pytest.raises(AssertionError, match="all pairs"):
        distinct_units(weight, tolerance=0.3)  # too large for hashing
