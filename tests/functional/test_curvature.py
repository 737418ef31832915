"""Products, traces and eigenvalues against the whole Hessian, scipy and curvlinops."""

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import nn

from lightning_sym.functional import hessian_product, hutchinson_trace, lanczos_top
from tests.models import mlp


def network(dtype=torch.float64):
    torch.manual_seed(0)
    net = mlp(3, 6, 4, act=nn.Tanh).to(dtype)
    x, y = torch.randn(10, 3, dtype=dtype), torch.randint(4, (10,))
    return net, x, y


def whole_hessian(net, x, y):
    parameters = dict(net.named_parameters())

    def loss(flat):
        parts = flat.split([p.numel() for p in parameters.values()])
        named = {k: v.view_as(p) for (k, p), v in zip(parameters.items(), parts, strict=True)}
        return nn.functional.cross_entropy(torch.func.functional_call(net, named, (x,)), y)

    flat = torch.cat([p.detach().flatten() for p in parameters.values()])
    return torch.autograd.functional.hessian(loss, flat)


def product_of(net, x, y):
    return hessian_product(nn.functional.cross_entropy(net(x), y), list(net.parameters()))


def test_product_is_that_of_the_whole_matrix_and_of_curvlinops():
    from curvlinops import HessianLinearOperator

    net, x, y = network()
    full = whole_hessian(net, x, y)
    vector = torch.randn(len(full), dtype=torch.float64)
    seen = product_of(net, x, y)(vector)
    torch.testing.assert_close(seen, full @ vector)
    theirs = HessianLinearOperator(net, nn.CrossEntropyLoss(), list(net.parameters()), [(x, y)]) @ vector
    torch.testing.assert_close(seen, theirs)
    assert all(p.grad is None for p in net.parameters())


def test_what_is_flat_or_plays_no_part_has_zeros():
    a, b, c = (torch.ones(2, requires_grad=True) for _ in range(3))
    product = hessian_product(a.square().sum() + 3 * b.sum(), [a, b, c])
    assert product(torch.ones(6)).tolist() == [2, 2, 0, 0, 0, 0]
    assert hessian_product(b.sum(), [b])(torch.ones(2)).tolist() == [0, 0]


def test_trace_is_exact_with_enough_vectors_and_right_on_average():
    net, x, y = network()
    full, product = whole_hessian(net, x, y), product_of(net, x, y)
    sizes = [p.numel() for p in net.parameters()]
    exact = hutchinson_trace(product, sizes, vectors=len(full), dtype=torch.float64)
    blocks = torch.stack([part.sum() for part in full.diagonal().split(sizes)])
    torch.testing.assert_close(exact.blocks, blocks)
    torch.testing.assert_close(exact.value, full.trace())
    assert exact.error == 0
    off_diagonal = full - torch.diag(full.diagonal())
    deviation = (2 * off_diagonal.square().sum()).sqrt()
    scores = []
    for seed in range(60):
        found = hutchinson_trace(product, sizes, vectors=16, seed=seed, dtype=torch.float64)
        scores.append((found.value - full.trace()) / (deviation / 4))
        assert 0.4 < float(found.error / (deviation / 4)) < 2
        torch.testing.assert_close(found.blocks.sum(), found.value)
    scores = torch.stack(scores)
    assert abs(float(scores.mean())) < 3 / 60**0.5
    assert 0.7 < float(scores.std()) < 1.3
    one = hutchinson_trace(product, sizes, vectors=1, dtype=torch.float64)
    assert one.error.isnan()


def test_top_is_that_of_the_whole_matrix_and_of_scipy():
    net, x, y = network()
    full, product = whole_hessian(net, x, y), product_of(net, x, y)
    size = len(full)
    values = torch.linalg.eigvalsh(full)

    def matvec(v):
        return product(torch.from_numpy(np.ascontiguousarray(v).reshape(-1))).numpy()

    operator = LinearOperator((size, size), matvec=matvec, dtype=np.float64)
    theirs = eigsh(operator, k=1, which="LA", return_eigenvectors=False)[0]
    seen = lanczos_top(product, size, steps=size, dtype=torch.float64)
    assert float(seen.value) == pytest.approx(float(values[-1]), rel=1e-10)
    assert float(seen.value) == pytest.approx(theirs, rel=1e-8)
    for steps in (1, 3, 6, 12):
        some = lanczos_top(product, size, steps=steps, seed=1, dtype=torch.float64)
        assert float(some.value) <= float(values[-1]) + 1e-12
        assert float((values - some.value).abs().min()) <= float(some.error) + 1e-12


@pytest.mark.parametrize("values", [[0.0] * 5, [2.0] * 5, [-1.0, -2.0, -2.0], [0.0, 0.0, 0.0, 7.0]])
def test_few_distinct_eigenvalues_are_found_by_going_on(values):
    diagonal = torch.tensor(values)
    asked = []

    def product(v):
        asked.append(v)
        return diagonal * v

    seen = lanczos_top(product, len(values), steps=20)
    assert float(seen.value) == pytest.approx(max(values), abs=1e-6)
    assert float(seen.error) == pytest.approx(0, abs=1e-6)
    assert len(asked) == len(values)


def test_single_precision_is_good_to_its_digits():
    net, x, y = network(torch.float32)
    reference = torch.linalg.eigvalsh(
        whole_hessian(*((n.double() if i < 2 else n) for i, n in enumerate((net, x, y))))
    )
    net, x, y = network(torch.float32)
    seen = lanczos_top(product_of(net, x, y), len(reference), steps=25)
    assert float(seen.value) == pytest.approx(float(reference[-1]), rel=1e-5)


def test_what_is_not_finite_is_nan():
    def product(v):
        return v * torch.nan

    assert lanczos_top(product, 4, steps=3).value.isnan()
    assert hutchinson_trace(product, [4], vectors=3).value.isnan()


def test_random_state_is_left_alone():
    state = torch.get_rng_state()
    hutchinson_trace(lambda v: v, [50], vectors=2)
    lanczos_top(lambda v: v, 50, steps=2)
    assert torch.equal(state, torch.get_rng_state())


def test_bad_input_is_named():
    x = torch.ones(2, requires_grad=True)
    with pytest.raises(ValueError, match=r"must be a scalar .* got shape \(2,\)"):
        hessian_product(x * 2, [x])
    with pytest.raises(ValueError, match="loss must depend on the parameters"):
        hessian_product(torch.tensor(1.0), [x])
    with pytest.raises(ValueError, match="vectors must be at least 1, got 0"):
        hutchinson_trace(lambda v: v, [2], vectors=0)
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        lanczos_top(lambda v: v, 2, steps=0)
    with pytest.raises(ValueError, match=r"sizes must be of at least one parameter, got \[0\]"):
        lanczos_top(lambda v: v, 0, steps=1)
