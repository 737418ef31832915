"""The deep linear network: its data, its resumption, and its theory beside the Hessian of its own loss."""

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_sym.callbacks import SharpnessMonitor
from lightning_sym.papers.noise_equilibrium import DeepLinearNetwork
from tests.models import trainer

COV_X = torch.tensor([[2.0, 0.5, 0.0], [0.5, 1.0, 0.2], [0.0, 0.2, 0.5]]).double()
COV_NOISE = torch.tensor([[0.3, 0.1], [0.1, 0.6]]).double()
TARGET = torch.tensor([[1.0, -0.5, 0.2], [0.3, 0.8, -1.0]]).double()


def network(**options):
    settings = {"target": TARGET, "cov_x": COV_X, "cov_noise": COV_NOISE, "steps_per_epoch": 12}
    return DeepLinearNetwork([3, 4, 5, 2], **{**settings, **options})


def moments(x, y):
    noise = y - x @ TARGET.mT
    return [a.mT @ b / len(x) for a, b in ((x, x), (noise, noise), (x, noise))]


def test_an_exact_batch_has_the_moments_and_fresh_ones_have_them_on_average():
    model = network()
    wanted = [COV_X, COV_NOISE, torch.zeros(3, 2).double()]
    for samples in (None, 40):
        for seen, value in zip(moments(*model.exact_batch(samples)), wanted, strict=True):
            torch.testing.assert_close(seen, value)
    x, y = model.draw(60_000, generator=torch.Generator().manual_seed(0))
    for seen, value in zip(moments(x, y), wanted, strict=True):
        torch.testing.assert_close(seen, value, rtol=0, atol=0.05)


class Record(DeepLinearNetwork):
    """Keeps what it was trained on."""

    def training_step(self, batch, batch_idx):
        self.seen = [*getattr(self, "seen", []), batch[0].clone()]
        return super().training_step(batch, batch_idx)


def record(**options):
    settings = {"target": TARGET, "cov_x": COV_X, "cov_noise": COV_NOISE, "steps_per_epoch": 12}
    return Record([3, 4, 5, 2], **{**settings, **options})


def test_batches_are_fresh_follow_the_seed_and_go_on_when_resumed(tmp_path):
    state = torch.get_rng_state()
    whole = record()
    assert torch.equal(state, torch.get_rng_state())
    trainer(max_steps=24, max_epochs=-1).fit(whole)
    assert len({x.sum().item() for x in whole.seen}) == 24
    again, other = record(), record(seed=1)
    trainer(max_epochs=2).fit(again)
    trainer(max_epochs=1).fit(other)
    assert all(torch.equal(a, b) for a, b in zip(whole.seen, again.seen, strict=True))
    assert not any(torch.equal(x, z) for x in whole.seen for z in other.seen)
    for at in (5, 12):
        first, second = record(), record()
        run = trainer(max_steps=at, max_epochs=-1)
        run.fit(first)
        run.save_checkpoint(tmp_path / "c.ckpt")
        trainer(max_steps=24, max_epochs=-1).fit(second, ckpt_path=tmp_path / "c.ckpt")
        assert len(second.seen) == 24 - at
        assert all(torch.equal(a, b) for a, b in zip(second.seen, whole.seen[at:], strict=True))
        assert all(torch.equal(a, b) for a, b in zip(second.weights, whole.weights, strict=True))


def test_ranks_see_batches_of_their_own(tmp_path):
    class Dump(Record):
        def on_train_end(self):
            torch.save(torch.stack(self.seen), tmp_path / f"{self.global_rank}.pt")

    trainer(max_steps=3, devices=2, strategy="ddp_fork").fit(Dump([3, 4, 2]))
    a, b = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert a.shape == b.shape == (3, 10, 3)
    assert not torch.isclose(a, b).any()


def test_weights_start_at_their_scales():
    model = DeepLinearNetwork([200, 300, 400], scales=[0.5, 2.0])
    for weight, wanted in zip(model.weights, (0.5 / 200**0.5, 2 / 300**0.5), strict=True):
        assert float(weight.std()) == pytest.approx(wanted, rel=0.02)
    assert torch.equal(model.target, torch.eye(400, 200).double())


def test_sharpness_of_its_loss_is_the_closed_form():
    model = network(lr=1e-9)
    x, y = model.exact_batch()
    with torch.no_grad():
        for layer, weight in zip(model.layers, model.equilibrium(), strict=True):
            layer.weight.copy_(weight)
    for balance in model.balance():
        assert balance.residual == pytest.approx(0, abs=1e-6)
    for spectrum in model.spectra()[1:-1]:
        assert spectrum[:2].tolist() == pytest.approx([model.predicted_spectra().middle] * 2)
    monitor = SharpnessMonitor(data=(x, y), vectors=1000, lanczos_steps=1000, every_n_steps=1, strict=True)
    trainer(max_steps=1, callbacks=[monitor]).fit(model)
    trace, top = model.predicted_sharpness()
    row = monitor.history[0]
    assert row["sharpness/trace"] == pytest.approx(trace, rel=1e-6)
    assert row["sharpness/trace"] == pytest.approx(model.hessian_trace(), rel=1e-6)
    assert row["sharpness/top"] == pytest.approx(top, rel=1e-6)
    assert row["sharpness/loss"] == pytest.approx(float(COV_NOISE.trace()), rel=1e-6)


def test_a_loader_of_the_exact_batch_is_gradient_descent():
    model = network(scales=1.2, lr=0.03)
    charge = model.weights[1].mT @ model.weights[1] - model.weights[0] @ model.weights[0].mT
    loader = DataLoader(TensorDataset(*model.exact_batch()), batch_size=5)  # all of it
    trainer(max_epochs=500).fit(model, loader)
    product = torch.linalg.multi_dot(list(reversed(model.weights)))
    torch.testing.assert_close(product, TARGET, rtol=0, atol=1e-3)
    now = model.weights[1].mT @ model.weights[1] - model.weights[0] @ model.weights[0].mT
    assert float((now - charge).norm() / charge.norm()) < 0.1  # conserved by the flow, nearly by its steps
    assert max(balance.residual for balance in model.balance()) > 0.3


def test_bad_input_is_named():
    for options, message in (
        ({"widths": [3, 2]}, r"widths must be three or more positive integers, got \[3, 2\]"),
        ({"scales": [1.0, 2.0, 3.0]}, r"scales must be one or 2 positive numbers, got \[1.0, 2.0, 3.0\]"),
        ({"scales": 0.0}, "scales must be one or 2 positive numbers"),
        ({"lr": 0.0}, "lr must be positive"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"target": torch.eye(3)}, r"target must be \[2, 3\], got \(3, 3\)"),
        ({"widths": [3, 1, 2]}, r"hidden must hold widths of at least the rank of target, 2, got \[1\]"),
        ({"cov_noise": torch.zeros(2, 2)}, "cov_noise must be symmetric and positive definite"),
    ):
        with pytest.raises(ValueError, match=message):
            DeepLinearNetwork(**{"widths": [3, 4, 2], **options})
    with pytest.raises(ValueError, match="samples must be at least 5, got 4"):
        network().exact_batch(4)
