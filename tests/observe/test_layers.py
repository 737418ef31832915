"""Choosing layers, their linear maps, and how much of a wide one is read."""

import pytest
import torch
from torch import nn

from lightning_sym.functional import effective_rank_from_eigenvalues
from lightning_sym.observe.call import Rows
from lightning_sym.observe.layers import choose_layers, readers, watchable_layers
from lightning_sym.observe.samples import Samples
from lightning_sym.observe.statistics.second_moments import MomentTally, SecondMoments
from lightning_sym.observe.weights import kept_features


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2),
        nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)),
        nn.Conv2d(4, 4, 3, padding="same", padding_mode="reflect", groups=4),
        nn.Conv3d(2, 4, 2, stride=2, groups=2),
    ],
    ids=str,
)
def test_a_convolution_is_its_weight_times_patches(conv):
    conv = conv.double()
    dims = {nn.Conv1d: (9,), nn.Conv2d: (7, 6), nn.Conv3d: (4, 5, 6)}[type(conv)]
    x = torch.randn(3, conv.in_channels, *dims, dtype=torch.float64)
    (layer,) = watchable_layers(nn.Sequential(conv))
    y = conv(x)
    dense = torch.block_diag(*layer.blocks())
    for positions in (None, 5):
        rows = layer.input_rows(x, positions) @ dense.T
        if conv.bias is not None:
            rows = rows + layer.bias()
        assert torch.allclose(rows, layer.output_rows(y, positions), atol=1e-12)


def test_layers_are_spread_over_depth_and_capped():
    net = nn.Sequential(*[nn.Linear(2, 2) for _ in range(20)])
    chosen, total = choose_layers(net, None, max_layers=5)
    assert total == 20
    assert [layer.name for layer in chosen] == ["0", "5", "10", "14", "19"]
    by_glob, _ = choose_layers(net, ["1?", "3"], max_layers=2)
    assert len(by_glob) == 11


def test_the_nearest_names_are_told():
    with pytest.raises(ValueError, match=r"layers='enocder\.\*'.*encoder"):
        choose_layers(nn.ModuleDict({"encoder": nn.Linear(2, 2)}), "enocder.*", max_layers=3)


def test_who_reads_whom_is_said_only_where_it_is_plain():
    block = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.BatchNorm1d(4), nn.Linear(4, 5))
    other = nn.Sequential(nn.Linear(3, 4), nn.Flatten(), nn.Linear(4, 5))
    found = readers(nn.ModuleList([block, other]))
    assert found == {block[0]: block[3]}


def test_dimensions_between_the_first_and_the_last_are_samples():
    x = torch.arange(24.0).reshape(2, 3, 2, 2)
    (layer,) = watchable_layers(nn.Sequential(nn.Linear(2, 2)))
    assert torch.equal(layer.input_rows(x, None), x.reshape(12, 2))
    assert layer.input_rows(x, 3).shape == (6, 2)


def stream(x, width=None, *, normalized=False):
    keep = kept_features(x.shape[1], width, x.device)
    tally = MomentTally(
        SecondMoments("inputs", normalized=normalized), x.shape[1], keep=keep, device=x.device
    )
    for k, part in enumerate(x.split(100)):
        rows = Rows(Samples(part[:, None], None), scale=1.0, count=len(part), first=100 * k, stride=1)
        tally._add(rows)
    tally.tensors()
    return tally.result()


def test_wide_layers_are_read_on_a_principal_submatrix_that_is_exact():
    x = torch.randn(300, 700, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for form in (False, True):
        whole, part = stream(x, normalized=form), stream(x, 512, normalized=form)
        assert torch.allclose(whole.covariance[part.keep][:, part.keep], part.covariance)


@pytest.mark.parametrize("rank", [3, 20, 80])
def test_the_error_of_sub_sampling_is_bounded(rank):
    """Features of low rank lose under 5 % of their effective rank on 512 of 2048; Cauchy bounds the rest.

    Eigenvalues of a principal submatrix never exceed the whole's (interlacing): no rank is invented.
    """
    generator = torch.Generator().manual_seed(rank)
    factors = torch.randn(rank, 2048, dtype=torch.float64, generator=generator)
    x = torch.randn(600, rank, dtype=torch.float64, generator=generator) @ factors
    whole, part = stream(x), stream(x, 512)
    exact = float(effective_rank_from_eigenvalues(whole.eigenvalues))
    found = float(effective_rank_from_eigenvalues(part.eigenvalues))
    assert found == pytest.approx(exact, rel=0.05)
    top = whole.eigenvalues[0]
    assert (part.eigenvalues <= whole.eigenvalues[:512] + 1e-9 * top).all()


def test_sums_keep_small_directions():
    """Accumulated in float64: a direction 1e-5 of the largest survives float32 features."""
    generator = torch.Generator().manual_seed(0)
    q, _ = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64, generator=generator))
    scale = torch.tensor([1.0, 1.0, 1.0, 1e-2, 1e-3, 1e-5], dtype=torch.float64)
    x = torch.randn(4000, 6, dtype=torch.float64, generator=generator) * scale @ q.T
    sigma = stream(x.float()).eigenvalues.sqrt()
    assert float(sigma[-1] / scale[-1]) == pytest.approx(1.0, rel=0.05)
