"""Split halves: slow twins, the bias they take away, and what they read of convolution positions."""

import math

import pytest
import torch

from lightning_sym.functional import (
    expected_alignment,
    matrix_alignment,
    participation_ratio_from_covariance,
    side_alignments,
    split_alignment,
    split_expected_alignment,
    split_participation_ratio,
    split_side_alignments,
)
from lightning_sym.functional.alignment import random_rotation

D = 64


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotation(d, seed=0):
    return random_rotation(d, generator=torch.Generator().manual_seed(seed))


def covariance(x):
    x = x - x.mean(0)
    return x.mT @ x / len(x)


def halves(x):
    return covariance(x[: len(x) // 2]), covariance(x[len(x) // 2 :])


def slow_product(a, b):
    """Sum over entries, each less its matrix' mean."""
    xs, ys = ([v for row in m.double().tolist() for v in row] for m in (a, b))
    mx, my = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((x - mx) * (y - my) for x, y in zip(xs, ys, strict=True))


def slow_split(a1, a2, b1, b2):
    across = (slow_product(a1, b2) + slow_product(a2, b1)) / 2
    return across / math.sqrt(slow_product(a1, a2) * slow_product(b1, b2))


def population(seed=0):
    """A root of a covariance whose participation ratio is 3/4 of D."""
    q = rotation(D, seed)
    return (q * (torch.arange(1, D + 1, dtype=torch.float64) / D).sqrt()) @ q.mT


@pytest.mark.parametrize("seed", range(5))
def test_levels_equal_their_slow_twins(seed):
    x, y, w = (
        gaussian(30, 6, seed=seed) + 0.5,
        gaussian(40, 6, seed=seed + 50),
        gaussian(6, 6, seed=seed + 99),
    )
    (h1, h2), (g1, g2), z = halves(x @ w), halves(y @ w), w.mT @ w
    levels, chance = split_side_alignments({"h": (h1, h2), "g": (g1, g2), "z": z})
    assert {name: float(level) for name, level in levels.items()} == pytest.approx(
        {
            "rga": slow_split(h1, h2, g1, g2),
            "rwa": slow_split(h1, h2, z, z),
            "gwa": slow_split(g1, g2, z, z),
        }
    )
    torch.testing.assert_close(split_alignment((h1, h2), (g1, g2)), levels["rga"])
    torch.testing.assert_close(split_alignment(z, (h1, h2)), levels["rwa"])
    torch.testing.assert_close(split_expected_alignment((g1, g2), z), chance["gwa"])
    assert float(split_participation_ratio(h1, h2)) == pytest.approx(
        sum(float(h1[i, i]) for i in range(6))
        * sum(float(h2[i, i]) for i in range(6))
        / sum(float(h1[i, j] * h2[i, j]) for i in range(6) for j in range(6))
    )


def test_exact_matrices_read_what_they_read_without_halves():
    h, g, z = (covariance(gaussian(20, 7, seed=seed)) for seed in range(3))
    twice = {name: (m, m) for name, m in (("h", h), ("g", g), ("z", z))}
    for given in (twice, {"h": h, "g": (g, g), "z": z}):
        levels, chance = split_side_alignments(given)
        exact, null = side_alignments({"h": h, "g": g, "z": z})
        for name in exact:
            torch.testing.assert_close(levels[name], exact[name])
            torch.testing.assert_close(chance[name], null[name])
    torch.testing.assert_close(split_expected_alignment((h, h), g), expected_alignment(h, g))
    torch.testing.assert_close(split_participation_ratio(h, h), participation_ratio_from_covariance(h))
    assert split_side_alignments({"h": (h, h)}) == ({}, {})


# Naive readings of a population alignment of 1 at D = 64.
NAIVE = {32: 0.39, 64: 0.56, 100: 0.67, 128: 0.72, 1000: 0.95}


@pytest.mark.parametrize("n", NAIVE)
def test_an_alignment_of_one_reads_one_at_any_number_of_samples(n):
    root = population()
    naive, split, against_z, ratio = [], [], [], []
    for seed in range(60 if n < 1000 else 5):
        x, y = gaussian(n, D, seed=seed) @ root, gaussian(n, D, seed=7000 + seed) @ root
        naive.append(matrix_alignment(covariance(x), covariance(y)))
        split.append(split_alignment(halves(x), halves(y)))
        against_z.append(split_alignment(halves(x), root @ root))
        ratio.append(split_participation_ratio(*halves(x)))
    naive, split, against_z, ratio = (torch.stack(v) for v in (naive, split, against_z, ratio))
    assert float(naive.mean()) == pytest.approx(NAIVE[n], abs=0.02)
    near = 0.05 if n == 32 else 0.03
    assert float(split.mean()) == pytest.approx(1, abs=near)
    assert float(against_z.mean()) == pytest.approx(1, abs=near)
    truth = float(participation_ratio_from_covariance(root @ root))
    assert float(ratio.mean()) == pytest.approx(truth, rel=0.05)
    if n == 128:
        assert float(split.std()) == pytest.approx(0.023, abs=0.01)
    if n == 64:
        assert float(participation_ratio_from_covariance(covariance(x))) < 0.65 * truth


def test_a_partial_alignment_reads_what_the_populations_have():
    root = population()
    a, b = root @ root, 0.5 * root @ root + 0.5 * torch.diag(torch.arange(D, dtype=torch.float64) / D)
    root_b = torch.linalg.cholesky(b).mT
    truth = float(matrix_alignment(a, b))
    assert 0.4 < truth < 0.95
    split, naive = [], []
    for seed in range(60):
        x, y = gaussian(128, D, seed=seed) @ root, gaussian(128, D, seed=5000 + seed) @ root_b
        split.append(split_alignment(halves(x), halves(y)))
        naive.append(matrix_alignment(covariance(x), covariance(y)))
    assert float(torch.stack(split).mean()) == pytest.approx(truth, abs=0.02)
    assert float(torch.stack(naive).mean()) < truth - 0.1


def test_halves_are_of_samples_not_of_positions():
    root, positions, n = population(), 16, 64
    by_sample, by_position = [], []
    for seed in range(30):

        def stream(seed):  # the positions of an image share most of what they are
            shared = gaussian(n, 1, D, seed=seed)
            return ((shared + 0.5 * gaussian(n, positions, D, seed=seed + 1)) / 1.25**0.5) @ root

        x, y = stream(10 * seed), stream(10 * seed + 5)
        half, even = n // 2, positions // 2
        of_samples = [
            (covariance(v[:half].flatten(0, 1)), covariance(v[half:].flatten(0, 1))) for v in (x, y)
        ]
        of_places = [
            (covariance(v[:, :even].flatten(0, 1)), covariance(v[:, even:].flatten(0, 1))) for v in (x, y)
        ]
        by_sample.append(split_alignment(*of_samples))
        by_position.append(split_alignment(*of_places))
    assert float(torch.stack(by_sample).mean()) == pytest.approx(1, abs=0.05)
    assert float(torch.stack(by_position).mean()) < 0.8


@pytest.mark.parametrize(("size", "tolerance"), [(4, 0.12), (12, 0.04), (40, 0.015)])
def test_the_null_level_is_the_mean_over_rotations(size, tolerance):
    spectrum = torch.arange(1, size + 1, dtype=torch.float64) ** -1.0
    a = halves(gaussian(8 * size, size, seed=size) * spectrum + 0.3)
    b = halves(gaussian(8 * size, size, seed=size + 1) * spectrum.flip(0))
    a, b = (a[0], 2 * a[1]), (b[0], 3 * b[1])  # halves of unequal size
    z = gaussian(size, size, seed=9)
    z = z.mT @ z
    for left, right in ((a, b), (a, z), (z, b)):
        drawn = []
        for seed in range(400):
            q = rotation(size, seed)
            turned = (
                q @ right @ q.mT if isinstance(right, torch.Tensor) else tuple(q @ m @ q.mT for m in right)
            )
            drawn.append(split_alignment(left, turned))
        expected = float(split_expected_alignment(left, right))
        assert expected == pytest.approx(float(torch.stack(drawn).mean()), abs=tolerance)


def test_unrelated_streams_read_the_null_level():
    levels, chance = [], []
    for seed in range(40):
        x = gaussian(96, D, seed=seed) @ population(seed)
        y = gaussian(96, D, seed=4000 + seed) @ population(1000 + seed)
        levels.append(split_alignment(halves(x), halves(y)))
        chance.append(split_expected_alignment(halves(x), halves(y)))
    assert float(torch.stack(levels).mean()) == pytest.approx(float(torch.stack(chance).mean()), abs=0.02)


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1.0, 1e30])
def test_scale_does_not_matter_in_float32(scale):
    h, g = halves(gaussian(40, 6)), halves(gaussian(40, 6, seed=1))
    z = covariance(gaussian(9, 6, seed=2))
    levels, chance = split_side_alignments({"h": h, "g": g, "z": z})
    small = {"h": tuple(scale * m.float() for m in h), "g": tuple(m.float() for m in g), "z": z.float()}
    again, null = split_side_alignments(small)
    for name in levels:
        assert again[name].dtype == torch.float32
        assert float(again[name]) == pytest.approx(float(levels[name]), rel=1e-3)
        assert float(null[name]) == pytest.approx(float(chance[name]), rel=1e-3)
    ratio = split_participation_ratio(*small["h"])
    assert float(ratio) == pytest.approx(float(split_participation_ratio(*h)), rel=1e-4)


def test_what_is_undefined_reads_nan():
    a = covariance(gaussian(20, 4))
    eye = torch.eye(4, dtype=torch.float64)
    for side in ((a, -a), (a, 0 * a), (a, torch.full_like(a, 0.1)), (a, a * math.nan), (a, a * math.inf)):
        assert split_alignment(side, (a, a)).isnan()
        assert split_alignment(eye, side).isnan()
        assert split_expected_alignment(side, eye).isnan()
        assert split_expected_alignment(eye, side).isnan()
    assert split_alignment(torch.full((3, 3), 0.1), torch.eye(3)).isnan()
    assert split_participation_ratio(a, -a).isnan()
    assert split_participation_ratio(a, 0 * a).isnan()
    assert split_participation_ratio(a, a * math.nan).isnan()
    assert split_participation_ratio(0 * a, 0 * a) == 0


def test_wrong_arguments_are_named():
    eye = torch.eye(3)
    with pytest.raises(TypeError, match="b_halves must be one matrix or a tuple of two, got tuple"):
        split_alignment(eye, (eye, eye, eye))
    with pytest.raises(ValueError, match="a_halves and b_halves must be of one shape"):
        split_alignment(eye, (eye, torch.eye(2)))
    with pytest.raises(ValueError, match="a_halves must be a square matrix"):
        split_alignment((eye, torch.ones(2, 3)), eye)
    with pytest.raises(ValueError, match=r"matrices must be called h, g and z, got \['x'\]"):
        split_side_alignments({"h": eye, "x": eye})
    with pytest.raises(ValueError, match="first and second must be of one shape"):
        split_participation_ratio(eye, torch.eye(2))


def test_what_is_nearly_constant_loses_no_digits():
    """Where the mean is all but a millionth, it is taken off first, as everywhere else."""
    h1, h2, g1, g2, z = (covariance(gaussian(40, 12, seed=seed)) for seed in range(5))
    plain, _ = split_side_alignments({"h": (h1, h2), "g": (g1, g2), "z": z})
    for offset in (1e2, 1e4, 1e6):
        lifted, _ = split_side_alignments({"h": (h1 + offset, h2 + offset), "g": (g1, g2), "z": z})
        torch.testing.assert_close(lifted, plain, rtol=1e-7, atol=1e-7)
    constant, _ = split_side_alignments({"h": (torch.full_like(h1, 3.0),) * 2, "g": (g1, g2), "z": z})
    assert constant["rga"].isnan()
    assert constant["rwa"].isnan()
    assert constant["gwa"].isfinite()


@pytest.mark.parametrize("scale", [1e-170, 1e-70, 1e70, 1e150])
def test_scales_at_which_squares_leave_the_range_change_nothing(scale):
    h1, h2, g1, g2, z = (covariance(gaussian(40, 6, seed=seed)) for seed in range(5))
    plain = split_side_alignments({"h": (h1, h2), "g": (g1, g2), "z": z})
    scaled = split_side_alignments({"h": (scale * h1, scale * h2), "g": (g1, g2), "z": z})
    torch.testing.assert_close(scaled, plain, rtol=1e-9, atol=1e-9)
    ratio = split_participation_ratio(scale * h1, scale * h2)
    torch.testing.assert_close(ratio, split_participation_ratio(h1, h2), rtol=1e-9, atol=0)
