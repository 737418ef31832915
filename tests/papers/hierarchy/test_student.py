"""The teacher's data and the student against loops and autograd in float64."""

import pytest
import torch

from lightning_sym.papers.hierarchy import Student, problem


def test_the_teacher_has_orthogonal_units_of_known_weights():
    train, test = problem(5, 30, seed=1)
    again, _ = problem(5, 30, seed=1)
    assert [tuple(part.shape) for part in (*train, *test)] == [(30, 5), (30,), (2000, 5), (2000,)]
    assert torch.equal(train[1], again[1])
    assert not torch.equal(train[1], problem(5, 30, seed=2)[0][1])
    # For Gaussian x and unit vectors w_k, E[y (x x^T - 1)] is sum_k v_k w_k w_k^T / sqrt(2 pi).
    x, y = (torch.cat(parts).double() for parts in zip(*(problem(5, 200_000, seed=1)), strict=True))
    moment = (y[:, None, None] * (x[:, :, None] * x[:, None, :] - torch.eye(5))).mean(0)
    values = torch.linalg.eigvalsh(moment) * (2 * torch.pi) ** 0.5
    torch.testing.assert_close(values, torch.tensor([-0.3, 0, 0, 0.8, 3.0]).double(), atol=0.05, rtol=0)


@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0])
def test_the_student_starts_at_zero_with_a_stable_rate(scale):
    state = torch.get_rng_state()
    train, _ = problem(6, 20, seed=0)
    student = Student(8, train, scale=scale, seed=3)
    assert torch.equal(state, torch.get_rng_state())
    assert student(train[0]).abs().max() < 1e-5 * scale**2
    x, y = train
    rows = []
    for sample in x:  # the tangent kernel, one gradient after the other
        grads = torch.autograd.grad(student(sample[None])[0], list(student.parameters()))
        rows.append(torch.cat([g.flatten() for g in grads]).double())
    features = torch.stack(rows)
    top = torch.linalg.eigvalsh(features @ features.mT / len(x))[-1].item()
    pull = sum((label * sample for label, sample in zip(y, x, strict=True)), torch.zeros(6)) / len(x)
    assert student.lr == pytest.approx(0.2 / (top + 2 * pull.norm().item()), rel=1e-4)
    slow = sum((student(s[None])[0] - t).square().item() for s, t in zip(x, y, strict=True)) / len(x) / 2
    assert student.loss(train).item() == pytest.approx(slow, rel=1e-5)
    group = student.configure_optimizers().param_groups[0]
    assert (group["lr"], group["weight_decay"]) == (student.lr, 0.0)


def test_bad_arguments_are_named():
    train, _ = problem(4, 5, seed=0)
    for call, message in (
        (lambda: problem(2, 5, seed=0), "inputs must be at least 3, one for each unit, got 2"),
        (lambda: problem(4, 0, seed=0), "samples must be at least 1, got 0"),
        (lambda: Student(5, train, seed=0), "hidden must be positive and even, to start at zero, got 5"),
        (lambda: Student(4, train, scale=0.0, seed=0), "scale must be positive, got 0.0"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
