"""The decoders have the shapes, counts and penalties they claim, and learn."""

import math

import pytest
import torch
from lightning.pytorch import Trainer

from lightning_sym.datamodules import GaussianBumpsDataModule
from lightning_sym.papers.composition import (
    EmbeddingDecoder,
    MLPDecoder,
    PositionMLPDecoder,
    TransposedConvDecoder,
)
from lightning_sym.papers.composition.decoders import position_encoding

SMALL = {
    "conv": lambda **k: TransposedConvDecoder(24, size=12, channels=6, hidden_layers=2, **k),
    "mlp": lambda **k: MLPDecoder(24, size=12, width=32, hidden_layers=2, **k),
    "position": lambda **k: PositionMLPDecoder(24, size=12, width=16, hidden_layers=2, **k),
    "embedding": lambda **k: EmbeddingDecoder(12, **k),
}


def fit(module, data, *, steps, **settings):
    trainer = Trainer(
        accelerator="cpu",
        max_steps=steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **settings,
    )
    trainer.fit(module, datamodule=data)
    return trainer


@pytest.mark.parametrize("name", SMALL)
def test_shapes_and_seeded_weights(name):
    before = torch.get_rng_state()
    one, same, other = SMALL[name](seed=1), SMALL[name](seed=1), SMALL[name](seed=2)
    assert torch.equal(before, torch.get_rng_state())
    code = torch.rand(3, 24, generator=torch.Generator().manual_seed(0))
    assert one(code).shape == (3, 1, 12, 12)
    assert torch.equal(one(code), same(code))
    assert not torch.equal(one(code), other(code))
    with pytest.raises(ValueError, match=r"\[B, 24\]"):
        one(code[:, :-1])


@pytest.mark.parametrize("name", SMALL)
def test_fits_and_reports_both_errors(name):
    data = GaussianBumpsDataModule(12, encoding="one_hot", sigma=1.5, polarity="bright")
    module = SMALL[name](seed=0, lr=3e-3)
    start = module(data.encode(data.id_centers)) - data.render(data.id_centers)
    first = start.square().mean().item()
    trainer = fit(module, data, steps=150, check_val_every_n_epoch=1)
    metrics = trainer.callback_metrics
    assert {"mse/train", "mse/id", "mse/ood"} <= set(metrics)
    assert metrics["mse/id"] < first
    module.eval()
    for which, centers in (("id", data.id_centers), ("ood", data.ood_centers)):
        with torch.no_grad():
            images = module(data.encode(centers))
        errors = [(a - b).square().mean().item() for a, b in zip(images, data.render(centers), strict=True)]
        trainer.validate(module, datamodule=data, verbose=False)
        assert trainer.callback_metrics[f"mse/{which}"].item() == pytest.approx(
            sum(errors) / len(errors), rel=1e-4
        )


def test_the_papers_sizes():
    embedding = EmbeddingDecoder(32)
    assert sum(p.numel() for p in embedding.parameters()) == 133218  # printed by the released code
    conv = TransposedConvDecoder(hidden_layers=10)
    kernels = [m.kernel_size[0] for m in conv.net if isinstance(m, torch.nn.ConvTranspose2d)]
    assert kernels == [7, 4, 4, *[3] * 8, 3]
    sides, image = [], torch.zeros(1, 56, 1, 1)
    for layer in conv.net:
        image = layer(image)
        sides.append(image.shape[-1])
    assert sides[::2] == [7, 14, *[28] * 10]


DECODERS = [EmbeddingDecoder, MLPDecoder, PositionMLPDecoder, TransposedConvDecoder]


@pytest.mark.parametrize("decoder", DECODERS)
def test_default_decoders_fit_the_default_bumps(decoder):
    """Their code length and size are those of the data module, by default."""
    trainer = fit(decoder(), GaussianBumpsDataModule(), steps=1, limit_train_batches=1, limit_val_batches=1)
    assert trainer.global_step == 1
    assert "mse/ood" in trainer.callback_metrics


@pytest.mark.parametrize("size", [9, 16, 24, 30, 36, 40])
def test_transposed_conv_reaches_any_size(size):
    assert TransposedConvDecoder(4, size=size, channels=2).forward(torch.ones(1, 4)).shape[-2:] == (
        size,
        size,
    )


def test_embedding_twin():
    """Token by token, vector by vector, in float64."""
    module = EmbeddingDecoder(5, seed=3).double()
    code = torch.zeros(1, 10, dtype=torch.float64)
    code[0, 2] = code[0, 5 + 4] = 1
    for matrices, token, channel in ((module.x_matrices, 2, 0), (module.y_matrices, 4, 1)):
        slow = torch.zeros(5, 5, dtype=torch.float64)
        for k in range(5):
            left = matrices.left[token, :, k] / matrices.left[token, :, k].norm()
            right = matrices.right[token, k, :] / matrices.right[token, k, :].norm()
            slow += matrices.values[token, k] * torch.outer(left, right)
        torch.testing.assert_close(module.embed(code)[0, channel], slow)


def test_penalty_twin():
    module = EmbeddingDecoder(4, entropy_weight=0.3, stripe_weight=0.07, seed=3).double()
    slow = 0.0
    for matrices in (module.x_matrices, module.y_matrices):
        for t in range(4):
            energy = [v.item() ** 2 for v in matrices.values[t]]
            slow -= 0.3 * sum(e / sum(energy) * math.log(e / sum(energy)) for e in energy)
            for k in range(4):
                for vector in (matrices.left[t, :, k].tolist(), matrices.right[t, k, :].tolist()):
                    mean = sum(vector) / 4
                    slow += 0.07 * sum((v - mean) ** 2 for v in vector) / 3
    assert module.penalty().item() == pytest.approx(slow)
    assert EmbeddingDecoder(4, entropy_weight=0, stripe_weight=0).penalty() is None


def test_penalty_of_stripes_and_of_rank_one():
    module = EmbeddingDecoder(4)
    with torch.no_grad():
        for matrices in (module.x_matrices, module.y_matrices):
            matrices.values.zero_()[:, 0] = 2.0
            matrices.left.fill_(0.5)
            matrices.right.fill_(0.5)
    assert module.x_matrices.entropy().item() == pytest.approx(0, abs=1e-4)
    assert module.x_matrices.variation().item() == 0
    code = torch.zeros(1, 8)
    code[0, 0] = code[0, 4] = 1
    assert torch.linalg.matrix_rank(module.embed(code)).tolist() == [[1, 1]]


def test_position_encoding_twin():
    got = position_encoding(5, 8)
    for row in range(5):
        for col in range(5):
            slow = []
            for k in range(2):
                w = 10000 ** (-4 * k / 8)
                slow += [math.sin(row * w), math.cos(row * w), math.sin(col * w), math.cos(col * w)]
            assert got[row * 5 + col].tolist() == pytest.approx(slow, abs=1e-6)


def test_the_penalty_is_what_lowers_the_rank():
    data = GaussianBumpsDataModule(10, sigma=1.0, polarity="bright", holdout="corner", batch_size=16)
    spread = {}
    for weight in (0.0, 0.1):
        module = EmbeddingDecoder(10, entropy_weight=weight, stripe_weight=weight / 10, lr=1e-2, seed=0)
        fit(module, data, steps=120, limit_val_batches=0)
        spread[weight] = module.x_matrices.entropy().item()
    assert spread[0.1] < 0.5 * spread[0.0]


def test_annealing_follows_a_cosine_to_zero():
    data, rates = GaussianBumpsDataModule(12, batch_size=32), []
    module = SMALL["mlp"](seed=0, lr=0.01)
    module.anneal = True
    step = module.optimizer_step

    def watched(*args, **kwargs):
        rates.append(module.optimizers().param_groups[0]["lr"])
        return step(*args, **kwargs)

    module.optimizer_step = watched
    fit(module, data, steps=10, limit_val_batches=0)
    assert rates == pytest.approx([0.005 * (1 + math.cos(math.pi * k / 10)) for k in range(10)])


def test_checkpoint_round_trip(tmp_path):
    for name, make in SMALL.items():
        module = make(seed=1)
        path = tmp_path / f"{name}.pt"
        torch.save(module.state_dict(), path)
        other = make(seed=2)
        other.load_state_dict(torch.load(path, weights_only=True))
        code = torch.rand(2, 24, generator=torch.Generator().manual_seed(1))
        assert torch.equal(module(code), other(code))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: TransposedConvDecoder(0), "code_length"),
        (lambda: TransposedConvDecoder(size=0), "size"),
        (lambda: TransposedConvDecoder(hidden_layers=1), "at least 2"),
        (lambda: TransposedConvDecoder(channels=0), "channels"),
        (lambda: MLPDecoder(width=0), "width"),
        (lambda: MLPDecoder(lr=-1.0), "lr"),
        (lambda: PositionMLPDecoder(width=30), "multiple of 4"),
        (lambda: EmbeddingDecoder(hidden_layers=0), "hidden_layers"),
        (lambda: EmbeddingDecoder(entropy_weight=math.nan), "entropy_weight"),
        (lambda: EmbeddingDecoder(stripe_weight=-1.0), "stripe_weight"),
    ],
)
def test_bad_input_is_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()
