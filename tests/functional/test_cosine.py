"""Cosine and relative distance against loops, their ranges and their degenerate values."""

import math

import pytest
import torch
from hypothesis import given, settings, strategies as st

from lightning_sym.functional import cosine, relative_distance

VECTORS = st.lists(st.tuples(*[st.floats(-100, 100)] * 2), min_size=1, max_size=7)


@settings(deadline=None, max_examples=50)
@given(VECTORS)
def test_they_equal_a_loop(pairs):
    a, b = (torch.tensor([pair[k] for pair in pairs], dtype=torch.float64) for k in (0, 1))
    dot = sum(x * y for x, y in pairs)
    norm_a, norm_b = (math.sqrt(sum(pair[k] ** 2 for pair in pairs)) for k in (0, 1))
    apart = math.sqrt(sum((x - y) ** 2 for x, y in pairs))
    if norm_a * norm_b > 1e-9:
        assert float(cosine(a, b)) == pytest.approx(dot / (norm_a * norm_b), abs=1e-9)
    if norm_a + norm_b > 1e-9:
        assert float(relative_distance(a, b)) == pytest.approx(apart / (norm_a + norm_b), abs=1e-9)
    assert not abs(cosine(a, b)) > 1
    assert 0 <= relative_distance(a, b) <= 1


def test_several_tensors_are_one_vector():
    generator = torch.Generator().manual_seed(0)
    a = [torch.randn(3, 4, generator=generator), torch.randn(5, generator=generator)]
    b = [torch.randn(3, 4, generator=generator), torch.randn(5, generator=generator)]
    whole = [torch.cat([t.flatten() for t in side]) for side in (a, b)]
    for function in (cosine, relative_distance):
        assert torch.equal(function(a, b), function(tuple(a), tuple(b)))
        torch.testing.assert_close(function(a, b), function(*whole), rtol=1e-12, atol=0)
        assert function(a, b).dtype == torch.float64


def test_degenerate_values():
    one, zero, bad = torch.ones(2), torch.zeros(2), torch.tensor([1.0, torch.nan])
    assert cosine(one, zero).isnan()
    assert cosine(one, bad).isnan()
    assert cosine([], []).isnan()
    assert float(cosine(one, -2 * one)) == pytest.approx(-1)
    assert relative_distance(zero, zero) == 0
    assert relative_distance(one, zero) == 1
    assert relative_distance(one, -one) == 1
    assert relative_distance([], []) == 0
    assert relative_distance(one, bad).isnan()
    assert relative_distance(one, one * torch.inf).isnan()
    assert float(cosine(one.bfloat16(), one.bfloat16())) == pytest.approx(1)
    with pytest.raises(ValueError, match=r"same shapes, got \[\(2,\)\] and \[\(1, 2\)\]"):
        cosine(one, one[None])
