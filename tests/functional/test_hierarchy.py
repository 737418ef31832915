"""Breaking distances, clusters, phases of a loss, roles, likeness of representations."""

import math

import pytest
import torch

from lightning_sym.functional.hierarchy import (
    breaking_distance,
    depth_roles,
    gram_alignment,
    loss_phases,
    unit_clusters,
)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def test_breaking_distance_is_the_least():
    d, norm = torch.tensor([0.9, 0.2, 1.0]), torch.tensor([10.0, 10.0, 0.5])
    torch.testing.assert_close(breaking_distance(d, norm, scale=5.0), torch.tensor([0.9, 0.2, 0.1]))
    assert torch.equal(breaking_distance(d, norm, scale=None), d)
    assert breaking_distance(torch.tensor(torch.nan), torch.tensor(1.0)).isnan()


def test_clusters_are_those_of_a_search():
    for seed in range(20):
        points = normal(12, 2, seed=seed)
        distances = torch.cdist(points, points)
        left, groups = set(range(12)), 0
        while left:
            groups, reached = groups + 1, [left.pop()]
            while reached:
                at = reached.pop()
                near = {k for k in left if distances[at, k] <= 0.6}
                left -= near
                reached += near
        assert unit_clusters(distances[None], threshold=0.6).tolist() == [groups]
    both = torch.stack([torch.zeros(3, 3), torch.full((3, 3), torch.nan)])
    assert unit_clusters(both, threshold=0.5).isnan().tolist() == [False, True]
    apart = torch.stack([torch.zeros(3, 3), torch.full((3, 3), torch.inf)])
    apart[0].fill_diagonal_(torch.nan)  # the diagonal is not read
    assert unit_clusters(apart, threshold=0.5).tolist() == [1, 3]


def test_a_staircase_is_read_step_by_step():
    steps = sorted({round(10 ** (k / 12)) for k in range(60)})

    def fall(t, at, width):
        return 0.5 - 0.5 * math.tanh((t - at) / width)

    losses = [fall(t, 40, 8) + 0.1 * fall(t, 2000, 300) + 1e-3 for t in steps]
    phases = loss_phases(steps, losses)
    assert [phase.what for phase in phases] == ["plateau", "drop", "plateau", "drop", "plateau"]
    first, second = phases[1], phases[3]
    assert steps[first.after] < 42 < steps[phases[2].seen]
    assert steps[second.after] < 2200 < steps[phases[4].seen]
    for known in range(len(steps)):  # nothing is taken back
        assert loss_phases(steps[:known], losses[:known]) == [p for p in phases if p.seen < known]
    scaled = loss_phases(steps, [7 * loss for loss in losses])
    assert scaled == phases
    assert loss_phases([1, 2, 3], [1.0, math.nan, -1.0]) == []


def test_roles():
    assert depth_roles([10, 10.5, 20, 5, 0, 3]) == [
        "transmission",
        "expansion",
        "reduction",
        "reduction",
        "transmission",
    ]


def test_gram_alignment_is_a_sum_over_pairs_of_samples():
    a, b = normal(9, 4) + 1, normal(9, 6, seed=1)

    def loop(a, b):
        a, b = a - a.mean(0), b - b.mean(0)
        pairs = [(float(a[n] @ a[m]), float(b[n] @ b[m])) for n in range(9) for m in range(9)]
        cross = sum(p * q for p, q in pairs)
        return cross / math.sqrt(sum(p * p for p, _ in pairs) * sum(q * q for _, q in pairs))

    assert gram_alignment(a, b).item() == pytest.approx(loop(a, b))
    turn = torch.linalg.qr(normal(4, 4, seed=2)).Q
    assert gram_alignment(a, 5 * a @ turn - 2).item() == pytest.approx(1.0)
    assert gram_alignment(a, a + 3, center=False) < 1
    assert gram_alignment(a, torch.ones(9, 2).double()).isnan()


def test_bad_input_is_named():
    x = torch.ones(3, 2)
    for call, message in (
        (lambda: breaking_distance(x, x[:2]), "must be of one shape"),
        (lambda: breaking_distance(x, x, scale=0.0), "scale must be positive, got 0.0"),
        (lambda: unit_clusters(x, threshold=0.1), r"must be \[B, U, U\], got \(3, 2\)"),
        (lambda: loss_phases([1], []), "must be of one length, got 1 and 0"),
        (lambda: loss_phases([1], [1], flat=2.0), "flat must be less than steep"),
        (lambda: depth_roles([1, 2], tolerance=0.0), r"tolerance must be in \(0, 1\), got 0.0"),
        (lambda: gram_alignment(x, x[:2]), "of the same samples, got 3 and 2"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
