"""Joint-embedding losses: closed forms, slow twins, half precision, two ranks, bad input."""

import math

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from lightning_sym.losses import (
    BarlowTwinsLoss,
    CrossCovarianceLoss,
    SimCLRLoss,
    VICRegLoss,
    barlow_twins_loss,
    cross_covariance_loss,
    nt_xent_loss,
    vicreg_loss,
)


def slow_barlow_twins(z_a, z_b, off_diagonal=5e-3, eps=1e-5):
    n, d = z_a.shape
    normal = []
    for z in (z_a, z_b):
        columns = []
        for i in range(d):
            mean = sum(z[k, i] for k in range(n)) / n
            variance = sum((z[k, i] - mean) ** 2 for k in range(n)) / n
            columns.append([(z[k, i] - mean) / (variance + eps) ** 0.5 for k in range(n)])
        normal.append(columns)
    loss = 0.0
    for i in range(d):
        for j in range(d):
            c = sum(normal[0][i][k] * normal[1][j][k] for k in range(n)) / n
            loss = loss + ((1 - c) ** 2 if i == j else off_diagonal * c**2)
    return loss


def slow_nt_xent(z_a, z_b, temperature=0.5):
    n = len(z_a)
    views = [*z_a, *z_b]

    def similarity(i, j):
        dot = (views[i] * views[j]).sum()
        return dot / ((views[i] ** 2).sum() * (views[j] ** 2).sum()) ** 0.5

    loss = 0.0
    for i in range(2 * n):
        positive = torch.exp(similarity(i, (i + n) % (2 * n)) / temperature)
        total = sum(torch.exp(similarity(i, k) / temperature) for k in range(2 * n) if k != i)
        loss = loss - torch.log(positive / total)
    return loss / (2 * n)


def slow_vicreg(z_a, z_b, eps=1e-4):
    n, d = z_a.shape
    loss = 25.0 * sum((z_a[k, i] - z_b[k, i]) ** 2 for k in range(n) for i in range(d)) / (n * d)
    for z in (z_a, z_b):
        mean = [sum(z[k, i] for k in range(n)) / n for i in range(d)]
        for i in range(d):
            for j in range(d):
                c = sum((z[k, i] - mean[i]) * (z[k, j] - mean[j]) for k in range(n)) / (n - 1)
                if i == j:
                    hinge = 1 - (c + eps) ** 0.5
                    loss = loss + (25.0 / 2 * hinge / d if hinge > 0 else 0.0)
                else:
                    loss = loss + c**2 / d
    return loss


def slow_cross_covariance(z_a, z_b):
    n, d = z_a.shape
    loss = 0.0
    for i in range(d):
        for j in range(d):
            c = sum(z_a[k, i] * z_b[k, j] + z_b[k, i] * z_a[k, j] for k in range(n)) / (2 * n)
            loss = loss + (c - float(i == j)) ** 2
    return loss


FAST_AND_SLOW = {
    "barlow_twins": (barlow_twins_loss, slow_barlow_twins),
    "simclr": (nt_xent_loss, slow_nt_xent),
    "vicreg": (vicreg_loss, slow_vicreg),
    "cross_covariance": (cross_covariance_loss, slow_cross_covariance),
}
MODULES = {
    "barlow_twins": BarlowTwinsLoss,
    "simclr": SimCLRLoss,
    "vicreg": VICRegLoss,
    "cross_covariance": CrossCovarianceLoss,
}
each = pytest.mark.parametrize("name", FAST_AND_SLOW)


def pair(n=6, d=4, seed=0, dtype=torch.float64, scale=0.8):
    generator = torch.Generator().manual_seed(seed)
    z_a = torch.randn(n, d, generator=generator, dtype=torch.float64) * scale + 0.3
    z_b = z_a + 0.4 * torch.randn(n, d, generator=generator, dtype=torch.float64)
    return z_a.to(dtype).requires_grad_(), z_b.to(dtype).requires_grad_()


@each
def test_value_and_gradient_equal_the_slow_twin(name):
    fast, slow = FAST_AND_SLOW[name]
    z = pair()
    value, expected = fast(*z), slow(*z)
    assert value.item() == pytest.approx(expected.item(), rel=1e-12)
    for mine, theirs in zip(torch.autograd.grad(value, z), torch.autograd.grad(expected, z), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)


@each
def test_gradcheck(name):
    assert torch.autograd.gradcheck(FAST_AND_SLOW[name][0], pair(n=5, d=3, seed=3))


@each
def test_the_module_is_the_function_and_the_views_are_exchangeable(name):
    z_a, z_b = pair(n=12, d=5)
    value = MODULES[name]()(z_a, z_b)
    assert value.item() == FAST_AND_SLOW[name][0](z_a, z_b).item()
    assert value.item() == pytest.approx(MODULES[name]()(z_b, z_a).item(), rel=1e-12)


@each
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_the_loss_of_the_rounded_embeddings(name, dtype):
    z_a, z_b = pair(n=64, d=32, dtype=dtype, scale=300.0)
    exact = [z.detach().double().requires_grad_() for z in (z_a, z_b)]
    with torch.autocast("cpu", dtype=dtype):
        value = MODULES[name]()(z_a, z_b)
    expected = FAST_AND_SLOW[name][0](*exact)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(expected.item(), rel=1e-4)
    gradient = torch.autograd.grad(expected, exact[0])[0]
    scale = 1 / gradient.abs().max().item()  # what a GradScaler is for: into the range of fp16
    (mine,) = torch.autograd.grad(value * scale, z_a)
    torch.testing.assert_close(mine.double(), gradient * scale, rtol=0.02, atol=0.01)


@each
def test_tiny_embeddings_give_finite_gradients(name):
    for scale in (0.0, 1e-30, 1e-8):
        z_a, z_b = (z.detach().float().mul(scale).requires_grad_() for z in pair())
        value = MODULES[name]()(z_a, z_b)
        value.backward()
        assert value.isfinite()
        assert z_a.grad.isfinite().all()


def test_simclr_does_not_see_the_length_of_an_embedding():
    z_a, z_b = pair(dtype=torch.float32)
    value = nt_xent_loss(z_a, z_b)
    assert nt_xent_loss(1e-25 * z_a, 1e25 * z_b).item() == pytest.approx(value.item(), rel=1e-5)


def test_closed_forms():
    constant = torch.ones(8, 5)
    assert barlow_twins_loss(constant, constant).item() == pytest.approx(5.0)
    assert nt_xent_loss(constant, constant).item() == pytest.approx(math.log(15))
    assert vicreg_loss(constant, constant).item() == pytest.approx(25 * 0.99)
    assert cross_covariance_loss(0 * constant, 0 * constant).item() == 5.0
    white = torch.linalg.qr(torch.randn(8, 5, generator=torch.Generator().manual_seed(0)))[0] * 8**0.5
    assert cross_covariance_loss(white, white).item() == pytest.approx(0.0, abs=1e-10)


def _shares(rank):
    return slice(0, 5) if rank == 0 else slice(5, 12)  # of different sizes, on purpose


def _one_rank(rank, file, name, results):
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    try:
        model, x_a, x_b = _problem()
        part = _shares(rank)
        value = MODULES[name]()(model(x_a[part]), model(x_b[part]))
        value.backward()
        gradient = model.weight.grad
        dist.all_reduce(gradient)
        results.put((rank, value.item(), (gradient / 2).tolist()))  # DDP's mean over ranks
    finally:
        dist.destroy_process_group()


def _problem():
    generator = torch.Generator().manual_seed(5)
    model = torch.nn.Linear(6, 4, bias=False, dtype=torch.float64)
    with torch.no_grad():
        model.weight.copy_(torch.randn(4, 6, generator=generator, dtype=torch.float64) / 2)
    x_a = torch.randn(12, 6, generator=generator, dtype=torch.float64)
    return model, x_a, x_a + 0.5 * torch.randn(12, 6, generator=generator, dtype=torch.float64)


@each
def test_two_ranks_give_the_single_process_loss_and_gradient(name, tmp_path):
    context = mp.get_context("fork")
    results = context.SimpleQueue()
    ranks = [
        context.Process(target=_one_rank, args=(rank, tmp_path / "rendezvous", name, results))
        for rank in range(2)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
        assert process.exitcode == 0
    model, x_a, x_b = _problem()
    alone = MODULES[name]()(model(x_a), model(x_b))
    alone.backward()
    for _ in ranks:
        _, value, gradient = results.get()
        assert value == pytest.approx(alone.item(), rel=1e-10)
        torch.testing.assert_close(torch.tensor(gradient).double(), model.weight.grad, rtol=1e-5, atol=1e-8)


@each
def test_bad_input_is_named(name):
    loss = MODULES[name]()
    with pytest.raises(ValueError, match="at least 2 samples, got 1"):
        loss(torch.randn(1, 4), torch.randn(1, 4))
    with pytest.raises(ValueError, match=r"got \(4, 3\) and \(5, 3\)"):
        loss(torch.randn(4, 3), torch.randn(5, 3))
    with pytest.raises(TypeError, match=r"z_b must be a floating-point tensor, got torch.int64"):
        loss(torch.randn(4, 3), torch.ones(4, 3, dtype=torch.int64))


def test_bad_weights_are_named():
    with pytest.raises(ValueError, match="temperature must be positive and finite, got 0"):
        SimCLRLoss(temperature=0)
    with pytest.raises(ValueError, match="off_diagonal must be at least 0 and finite, got -1"):
        BarlowTwinsLoss(off_diagonal=-1)
    with pytest.raises(ValueError, match="variance must be at least 0 and finite, got nan"):
        VICRegLoss(variance=float("nan"))
