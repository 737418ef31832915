"""Whether parameters moved: one bit of one entry tells, in whatever order of memory."""

import pytest
import torch
from torch import nn

from lightning_sym.observe.parameters import fingerprint

SHAPES = [(1,), (7,), (8,), (3, 5), (4, 6, 3, 3), (0,)]


def parameter(shape, dtype):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    return nn.Parameter(x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_entry_counts(shape, dtype):
    p = parameter(shape, dtype)
    before = fingerprint([p])
    assert fingerprint([p]) == before
    for at in range(p.numel()):
        moved = nn.Parameter(p.detach().clone())
        with torch.no_grad():
            moved.view(-1)[at] = torch.nextafter(moved.view(-1)[at].double(), torch.tensor(9.0)).to(dtype) * 2
        assert fingerprint([moved]) != before


def test_the_order_of_memory_and_where_a_tensor_begins_do_not_matter_to_what_is_seen():
    whole = parameter((4, 6, 3, 3), torch.float32)
    last = nn.Parameter(whole.detach().contiguous(memory_format=torch.channels_last))
    cut = nn.Parameter(
        torch.cat([torch.ones(1), whole.detach().flatten()])[1:]
    )  # at an odd place of its memory
    turned = nn.Parameter(whole.detach().transpose(0, 1))
    for p in (whole, last, cut, turned):
        before = fingerprint([p])
        with torch.no_grad():
            p.view_as(p)[(0,) * p.ndim] += 1
        assert fingerprint([p]) != before
    assert fingerprint([whole, last]) != fingerprint([whole])
