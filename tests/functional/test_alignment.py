import math

import pytest
import torch
from hypothesis import given, settings, strategies as st

from lightning_sym.functional import (
    alignment_null,
    crh_relations,
    expected_alignment,
    matrix_alignment,
    pah_exponent,
    pah_exponents,
    pah_phase,
    second_moment,
)
from lightning_sym.functional.alignment import random_rotation
from lightning_sym.functional.pah import PAH_PHASES, side_exponents


def gaussian(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def psd(d, seed=0, n=None):
    x = gaussian(n or 2 * d, d, seed=seed)
    return x.mT @ x / len(x)


def rotation(d, seed=0):
    return random_rotation(d, generator=torch.Generator().manual_seed(seed))


def slow_alignment(a, b):
    xs = [v for row in a.double().tolist() for v in row]
    ys = [v for row in b.double().tolist() for v in row]
    mx, my = sum(xs) / len(xs), sum(ys) / len(ys)
    top = sum((x - mx) * (y - my) for x, y in zip(xs, ys, strict=True))
    return top / math.sqrt(sum((x - mx) ** 2 for x in xs) * sum((y - my) ** 2 for y in ys))


def slow_moment(x, normalized):
    rows = x.double().tolist()
    n, d = len(rows), len(rows[0])
    if normalized:
        norms = [math.sqrt(sum(v * v for v in row)) or 1.0 for row in rows]
        rows = [[v / norm for v in row] for row, norm in zip(rows, norms, strict=True)]
        mean = [sum(row[j] for row in rows) / n for j in range(d)]
        rows = [[row[j] - mean[j] for j in range(d)] for row in rows]
    return torch.tensor(
        [[sum(row[i] * row[j] for row in rows) / n for j in range(d)] for i in range(d)], dtype=torch.float64
    )


@settings(max_examples=40, deadline=None)
@given(d=st.integers(2, 7), seed=st.integers(0, 9999), log_scale=st.floats(-12, 12), shift=st.floats(-3, 3))
def test_alignment_equals_its_slow_twin_and_ignores_scale_and_shift(d, seed, log_scale, shift):
    a, b = psd(d, seed), psd(d, seed + 1)
    value = matrix_alignment(a, b)
    assert float(value) == pytest.approx(slow_alignment(a, b), abs=1e-12)
    assert -1 <= value <= 1
    torch.testing.assert_close(matrix_alignment(b, a), value)
    torch.testing.assert_close(matrix_alignment(10**log_scale * a, b + shift), value, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(matrix_alignment(a, -3 * b), -value)
    order = torch.randperm(d, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(matrix_alignment(a[order][:, order], b[order][:, order]), value)
    assert float(matrix_alignment(a, a)) == pytest.approx(1)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_squares_neither_over_nor_underflow_in_float32(scale):
    a, b = psd(5).float(), psd(5, 1).float()
    assert float(matrix_alignment(scale * a, b)) == pytest.approx(slow_alignment(a, b), abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_types_are_computed_in_float32(dtype):
    a, b, x = psd(6).to(dtype), psd(6, 1).to(dtype), gaussian(9, 4).to(dtype)
    assert matrix_alignment(a, b).dtype == torch.float32
    assert float(matrix_alignment(a, b)) == pytest.approx(slow_alignment(a, b), abs=1e-5)
    assert second_moment(x).dtype == torch.float32
    torch.testing.assert_close(second_moment(x).double(), slow_moment(x, True), rtol=1e-5, atol=1e-6)
    assert matrix_alignment(a.double(), b).dtype == torch.float64
    assert second_moment(x.double()).dtype == torch.float64


def test_constant_and_non_finite_matrices_have_no_alignment():
    a = psd(3)
    assert matrix_alignment(a, torch.zeros(3, 3)).isnan()
    assert matrix_alignment(torch.full((3, 3), 0.1), a).isnan()
    assert matrix_alignment(torch.ones(1, 1), torch.ones(1, 1)).isnan()
    for bad in (math.nan, math.inf):
        b = a.clone()
        b[1, 1] = bad
        assert matrix_alignment(a, b).isnan()
        assert alignment_null(a, b, draws=2).mean.isnan()
        fit = pah_exponent(a, b)
        assert fit.exponent.isnan()
        assert fit.count == 0


def test_alignment_is_differentiable():
    a, b = psd(3).requires_grad_(), psd(3, 1).requires_grad_()
    assert torch.autograd.gradcheck(matrix_alignment, (a, b))


@pytest.mark.parametrize("form", ["normalized", "raw"])
def test_second_moment_equals_its_slow_twin(form):
    x = gaussian(11, 4) + 1
    x[3] = 0
    torch.testing.assert_close(second_moment(x, moments=form), slow_moment(x, form == "normalized"))


def test_normalized_moments_ignore_the_size_of_each_sample():
    x = gaussian(11, 4) + 1
    size = torch.arange(1.0, 12.0, dtype=torch.float64)[:, None]
    torch.testing.assert_close(second_moment(x * size), second_moment(x))
    assert not torch.allclose(second_moment(x * size, moments="raw"), second_moment(x, moments="raw"))


def test_the_three_relations_are_the_three_alignments():
    h, g, z = psd(4), psd(4, 1), psd(4, 2)
    found = crh_relations(h, g, z)
    assert [float(v) for v in found] == pytest.approx(
        [slow_alignment(h, g), slow_alignment(h, z), slow_alignment(g, z)]
    )
    assert found._fields == ("rga", "rwa", "gwa")


def test_relations_are_one_in_the_canonical_state():
    # H_a = Z_a = G_a and H_b = Z_b = G_b hold together where W has equal singular values.
    w = rotation(6)[:4] * 0.7
    h_a, g_b = w.mT @ w, w @ w.mT
    for h, g, z in ((h_a, w.mT @ g_b @ w, w.mT @ w), (w @ h_a @ w.mT, g_b, w @ w.mT)):
        assert min(float(v) for v in crh_relations(h, g, z)) == pytest.approx(1)


def test_null_is_the_mean_over_rotations_and_leaves_random_state_alone():
    a, b = psd(5, n=6), psd(5, 1, n=6)
    state = torch.random.get_rng_state()
    found = alignment_null(a, b, seed=3, draws=5)
    assert torch.equal(torch.random.get_rng_state(), state)
    generator = torch.Generator().manual_seed(3)
    twin = []
    for _ in range(5):
        q = random_rotation(5, generator=generator)
        turned = [[float(q[i] @ b @ q[j]) for j in range(5)] for i in range(5)]
        twin.append(slow_alignment(a, torch.tensor(turned, dtype=torch.float64)))
    assert float(found.mean) == pytest.approx(sum(twin) / 5)
    assert float(found.std) == pytest.approx(float(torch.tensor(twin, dtype=torch.float64).std()))
    assert alignment_null(a, b, seed=3, draws=5) == found
    assert alignment_null(a, b, seed=4, draws=5) != found
    assert alignment_null(a, b, draws=1).std.isnan()


def test_null_is_what_unrelated_matrices_read():
    spectrum = torch.logspace(0, -2, 30, dtype=torch.float64)

    def draw(seed):
        q = rotation(30, seed)
        return (q * spectrum) @ q.mT

    unrelated = torch.stack([matrix_alignment(draw(seed), draw(1000 + seed)) for seed in range(60)])
    null = alignment_null(draw(0), draw(1), draws=60)
    assert float(null.mean) == pytest.approx(float(unrelated.mean()), abs=4 * float(null.std) / math.sqrt(30))
    assert float(null.mean) > 0.02  # the diagonals alone
    assert float(matrix_alignment(draw(0), draw(0))) > float(null.mean + 4 * null.std)


def test_rotations_are_uniform():
    q = torch.stack([rotation(3, seed) for seed in range(3000)])
    torch.testing.assert_close(q @ q.mT, torch.eye(3, dtype=torch.float64).expand(3000, 3, 3))
    assert q.mean(0).abs().max() < 0.05  # E Q = 0; without the sign fix the diagonal has one sign
    torch.testing.assert_close(q.square().mean(0), torch.full((3, 3), 1 / 3).double(), atol=0.03, rtol=0)


def slow_exponent(a, z, rtol=1e-3):
    """Directions one by one."""
    values, vectors = torch.linalg.eigh(z)
    xs, ys, off, whole = [], [], 0.0, 0.0
    for i in range(len(values)):
        if values[i] <= rtol * values[-1]:
            continue
        for j in range(len(values)):
            entry = float(vectors[:, i] @ a @ vectors[:, j]) ** 2
            whole += entry
            off += 0.0 if i == j else entry
        xs.append(math.log(float(values[i])))
        ys.append(math.log(float(vectors[:, i] @ a @ vectors[:, i])))
    mx, my = sum(xs) / len(xs), sum(ys) / len(ys)
    slope = sum((x - mx) * (y - my) for x, y in zip(xs, ys, strict=True)) / sum((x - mx) ** 2 for x in xs)
    return slope, len(xs), math.sqrt(off / whole), (max(xs) - min(xs)) / math.log(10)


@pytest.mark.parametrize("seed", range(4))
def test_exponent_equals_its_slow_twin(seed):
    q = rotation(8, seed)
    z = (q * torch.logspace(0, -4.5, 8, dtype=torch.float64)) @ q.mT
    a = psd(8, seed + 10)
    fit = pah_exponent(a, z)
    slope, count, off, decades = slow_exponent(a, z)
    assert count < 8
    assert fit.count == count
    assert float(fit.exponent) == pytest.approx(slope)
    assert float(fit.off_diagonal) == pytest.approx(off)
    assert float(fit.decades) == pytest.approx(decades)
    turn = rotation(8, seed + 20)
    again = pah_exponent(5 * turn @ a @ turn.mT, 0.1 * turn @ z @ turn.mT)
    assert float(again.exponent) == pytest.approx(slope)
    assert float(again.off_diagonal) == pytest.approx(off)


@pytest.mark.parametrize("power", [-1.0, 0.0, 0.5, 3.0])
def test_a_power_reads_its_exponent(power):
    z = torch.logspace(0, -2, 12, dtype=torch.float64)
    q = rotation(12)
    fit = pah_exponent((q * z**power) @ q.mT, (q * z) @ q.mT)
    assert float(fit.exponent) == pytest.approx(power, abs=1e-8)
    assert float(fit.off_diagonal) < 1e-7
    assert float(fit.decades) == pytest.approx(2)
    assert fit.count == 12


def test_unrelated_eigenvectors_show_in_the_off_diagonal_fraction():
    z = torch.logspace(0, -2, 12, dtype=torch.float64)
    q, r = rotation(12), rotation(12, 1)
    assert float(pah_exponent((r * z**2) @ r.mT, (q * z) @ q.mT).off_diagonal) > 0.7


def test_rounding_and_null_directions_are_no_points():
    z = torch.tensor([1.0, 0.5, 0.25, 0.0], dtype=torch.float64)
    a = torch.tensor([1.0, 0.25, 0.0, 5.0], dtype=torch.float64)
    fit = pah_exponent(torch.diag(a), torch.diag(z))
    assert fit.count == 2
    assert float(fit.exponent) == pytest.approx(2)
    for seed in range(8):  # what was an exact zero is now rounding, of either sign
        q = rotation(4, seed)
        assert pah_exponent((q * a) @ q.mT, (q * z) @ q.mT).count == 2
    zero = pah_exponent(torch.diag(a), torch.zeros(4, 4))
    assert zero.exponent.isnan()
    assert zero.count == 0
    nothing = pah_exponent(torch.zeros(4, 4, dtype=torch.float64), torch.diag(z))
    assert nothing.exponent.isnan()
    assert nothing.off_diagonal.isnan()


@pytest.mark.parametrize("name", list(PAH_PHASES))
def test_every_phase_of_the_table_is_found_from_matrices_that_obey_its_two_relations(name):
    on_b, on_a = name.split("+")
    p_ha, p_hb, p_gb, p_ga = PAH_PHASES[name]
    s = torch.logspace(0, -0.6, 7, dtype=torch.float64)
    u, v = rotation(7), rotation(7, 1)
    w = (u * s) @ v.mT
    z_a, z_b = w.mT @ w, w @ w.mT
    h_a, g_b = (v * s ** (2 * p_ha)) @ v.mT, (u * s ** (2 * p_gb)) @ u.mT
    h_b, g_a = w @ h_a @ w.mT, w.mT @ g_b @ w  # the exact identities, not the table
    side_a, side_b = pah_exponents(h_a, g_a, z_a), pah_exponents(h_b, g_b, z_b)
    found = {
        "h_a": float(side_a["rwa"].exponent),
        "g_a": float(side_a["gwa"].exponent),
        "h_b": float(side_b["rwa"].exponent),
        "g_b": float(side_b["gwa"].exponent),
    }
    assert found == pytest.approx({"h_a": p_ha, "h_b": p_hb, "g_b": p_gb, "g_a": p_ga}, abs=1e-7)
    phase = pah_phase(**found, decades=float(side_a["rwa"].decades))
    assert (phase.name, round(phase.distance, 6)) == (name, 0.0)
    # and the named relations do hold: proportional matrices
    relations = {"a": crh_relations(h_a, g_a, z_a), "b": crh_relations(h_b, g_b, z_b)}
    assert float(getattr(relations["b"], on_b)) == pytest.approx(1)
    assert float(getattr(relations["a"], on_a)) == pytest.approx(1)


def test_phases_with_a_flat_spectrum_or_without_numbers():
    assert pah_phase(h_a=9, h_b=9, g_b=9, g_a=9, decades=0.1).name == "canonical"
    nothing = pah_phase(h_a=math.nan, h_b=1, g_b=0, g_a=1)
    assert nothing.name == "none"
    assert math.isnan(nothing.distance)
    near = pah_phase(h_a=0.2, h_b=1.2, g_b=-1, g_a=0)
    assert near.name == "rwa+rga"
    assert near.distance == pytest.approx(math.sqrt(2 * 0.2**2 / 4))


def test_wrong_arguments_are_named():
    eye = torch.eye(3)
    with pytest.raises(ValueError, match="a and b must be of one shape"):
        matrix_alignment(eye, torch.eye(2))
    with pytest.raises(ValueError, match="a must be a square matrix"):
        alignment_null(torch.ones(2, 3), eye)
    with pytest.raises(ValueError, match="a and b must be of one shape"):
        alignment_null(torch.eye(2), eye)
    with pytest.raises(ValueError, match="draws must be at least 1"):
        alignment_null(eye, eye, draws=0)
    with pytest.raises(ValueError, match="moments must be 'normalized' or 'raw', got 'cooked'"):
        second_moment(eye, moments="cooked")
    with pytest.raises(ValueError, match="samples must be"):
        second_moment(eye[0])
    with pytest.raises(ValueError, match="matrix and reference must be of one shape"):
        pah_exponent(eye, torch.eye(2))
    with pytest.raises(ValueError, match="rtol must be in"):
        pah_exponent(eye, eye, rtol=1.0)
    for matrix in (eye, eye * math.nan):
        with pytest.raises(ValueError, match="confidence must be in"):
            pah_exponent(matrix, eye, confidence=1.0)


@pytest.mark.parametrize(("size", "tolerance"), [(4, 0.12), (12, 0.04), (40, 0.015)])
def test_expected_alignment_is_the_mean_over_rotations(size, tolerance):
    generator = torch.Generator().manual_seed(size)
    for decay in (0.0, 1.0, 3.0):
        spectrum = torch.arange(1, size + 1, dtype=torch.float64) ** -decay
        x = torch.randn(3 * size, size, generator=generator, dtype=torch.float64) * spectrum
        y = torch.randn(3 * size, size, generator=generator, dtype=torch.float64) * spectrum.flip(0)
        a, b = x.mT @ x, y.mT @ y
        drawn = alignment_null(a, b, draws=400, seed=1)
        assert float(expected_alignment(a, b)) == pytest.approx(float(drawn.mean), abs=tolerance)


def test_expected_alignment_of_a_constant_matrix_is_undefined():
    assert expected_alignment(torch.ones(3, 3), torch.eye(3)).isnan()
    assert expected_alignment(torch.eye(3), torch.zeros(3, 3)).isnan()


@pytest.mark.parametrize(("d", "n"), [(16, 64), (130, 500), (400, 50), (400, 900)])
def test_exponents_of_a_side_equal_those_of_each_pair(d, n):
    """Shared, reduced to few samples and solved in float32: one fit, to four decimals."""
    generator = torch.Generator().manual_seed(d)
    q = random_rotation(d, generator=generator).double()
    scale = torch.logspace(0, -2, d, dtype=torch.float64)
    h, g, w = (
        torch.randn(n, d, generator=generator, dtype=torch.float64) * scale**power @ q.mT
        for power in (0.5, 1.0, 0.8)
    )
    z = w.mT @ w / n
    matrices = {"h": h.mT @ h / n, "g": g.mT @ g / n, "z": z}
    found = side_exponents(matrices, ranks={"h": n, "g": n})
    for relation, (a, b) in {"rga": "hg", "rwa": "hz", "gwa": "gz"}.items():
        alone = pah_exponent(matrices[a], matrices[b])
        assert found[relation].count == alone.count
        for value, other in zip(found[relation], alone, strict=True):
            assert abs(float(value) - float(other)) <= (1e-9 if d < 128 else 5e-5)
    assert set(side_exponents({"g": matrices["g"], "z": z})) == {"gwa"}
    with pytest.raises(ValueError, match="must be called h, g and z"):
        side_exponents({"a": z})
