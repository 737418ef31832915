"""Joint-embedding modules: what they are built of, how they train, what they refuse."""

import math

import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn
from torch.utils.data import DataLoader, Dataset

from lightning_sym.losses import CrossCovarianceLoss, barlow_twins_loss, nt_xent_loss, vicreg_loss
from lightning_sym.modules import BarlowTwins, JointEmbedding, SimCLR, VICReg, _parts

SMALL = {"backbone": "test_resnet", "projector": (16, 8), "small_images": True}
CLASSES = {"barlow_twins": BarlowTwins, "simclr": SimCLR, "vicreg": VICReg}
LOSSES = {"barlow_twins": barlow_twins_loss, "simclr": nt_xent_loss, "vicreg": vicreg_loss}
each = pytest.mark.parametrize("name", CLASSES)


class Views(Dataset):
    def __init__(self, n=24, views=2, size=16):
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(n, views, 3, size, size, generator=generator)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return list(self.x[index]), index % 3


def fit(module, *, batch_size=12, views=2, n=24, drop_last=True, **options):
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"max_epochs": 1, **options},
    )
    trainer.fit(module, DataLoader(Views(n, views), batch_size=batch_size, drop_last=drop_last))
    return trainer


def tiny(cls, **options):
    torch.manual_seed(0)
    return cls(**{**SMALL, **options})


@each
def test_training_moves_the_weights_and_logs_a_finite_loss(name):
    module = tiny(CLASSES[name])
    before = [p.detach().clone() for p in module.parameters()]
    trainer = fit(module, max_epochs=2)
    assert trainer.global_step == 4
    assert trainer.callback_metrics["train_loss"].isfinite()
    assert all(not torch.equal(p, q) for p, q in zip(module.parameters(), before, strict=True))


@each
def test_the_loss_is_the_papers_on_the_projectors_output(name):
    module = tiny(CLASSES[name])
    views = [torch.stack([sample[0][k] for sample in map(Views().__getitem__, range(12))]) for k in range(2)]
    value = module.views_loss((views, None))
    if name == "simclr":
        z = module.projector(module.backbone(torch.cat(views))).chunk(2)
    else:
        z = [module.projector(module.backbone(view)) for view in views]
    assert value.item() == pytest.approx(LOSSES[name](*z).item(), rel=1e-5)


def test_more_views_are_averaged_over_pairs():
    module = tiny(BarlowTwins).eval()
    a, b, c = (torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(k)) for k in range(3))
    pairs = [module.views_loss((pair, None)).item() for pair in ([a, b], [a, c], [b, c])]
    assert module.views_loss(([a, b, c], None)).item() == pytest.approx(sum(pairs) / 3, rel=1e-5)


def test_the_small_stem_keeps_the_resolution():
    plain, features = _parts.backbone("resnet18")
    plain.eval()
    small, _ = _parts.backbone("resnet18", small_images=True)
    x = torch.zeros(1, 3, 32, 32)
    assert features == 512
    assert plain.forward_features(x).shape[-1] == 1
    assert small.forward_features(x).shape[-1] == 4
    assert small.eval()(x).shape == (1, 512)


def test_init_scale_multiplies_every_parameter():
    plain, small = tiny(VICReg), tiny(VICReg, init_scale=0.25)
    for p, q in zip(plain.parameters(), small.parameters(), strict=True):
        torch.testing.assert_close(q, 0.25 * p)


def test_a_backbone_of_ones_own_and_the_seeds_loss():
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 8, bias=False))
    module = JointEmbedding(
        CrossCovarianceLoss(),
        backbone,
        features=8,
        projector=(),
        optimizer="sgd",
        lr=1e-3,
        schedule="constant",
    )
    trainer = fit(module, batch_size=24)
    assert trainer.optimizers[0].param_groups[0]["lr"] == 1e-3
    x = torch.ones(2, 3, 16, 16)
    representation, embedding = module.embed(x)
    assert embedding is representation
    assert module(x).shape == (2, 8)


@pytest.mark.parametrize("kind", ["lars", "AdamW", "sgd", torch.optim.RMSprop])
def test_decay_spares_biases_and_norms(kind):
    module = tiny(SimCLR, optimizer=kind, lr=0.1, weight_decay=0.01)
    trainer = fit(module)
    decayed, spared = trainer.optimizers[0].param_groups
    assert decayed["weight_decay"] == 0.01
    assert spared["weight_decay"] == 0.0
    assert all(p.ndim > 1 for p in decayed["params"])
    assert all(p.ndim == 1 for p in spared["params"])
    assert sum(len(g["params"]) for g in (decayed, spared)) == len(list(module.parameters()))


def test_the_learning_rate_warms_up_and_follows_a_cosine():
    module = tiny(SimCLR, lr=2.0, warmup_epochs=1, final_lr_share=0.1, optimizer="sgd")
    seen = []
    module.on_train_batch_start = lambda *_: seen.append(module.optimizers().param_groups[0]["lr"])
    fit(module, max_epochs=20, batch_size=12)  # 2 steps an epoch, 40 in all, 2 of them warm-up
    cosine = [0.1 + 0.9 * (1 + math.cos(math.pi * k / 38)) / 2 for k in range(38)]
    assert seen == pytest.approx([1.0, 2.0, *(2.0 * share for share in cosine)])


def test_the_papers_learning_rate_grows_with_the_batch():
    trainer = fit(tiny(BarlowTwins, schedule="constant"), batch_size=12)
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.2 * 12 / 256)
    trainer = fit(tiny(SimCLR, schedule="constant"), batch_size=12, accumulate_grad_batches=2)
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.3 * 24 / 256)


def test_a_checkpoint_loads_into_a_twin(tmp_path):
    module = tiny(SimCLR)
    trainer = fit(module)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    twin = tiny(SimCLR, init_scale=0.5)
    twin.load_state_dict(torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"])
    assert all(torch.equal(p, q) for p, q in zip(module.parameters(), twin.parameters(), strict=True))


def test_a_compiled_backbone_keeps_its_names():
    module = tiny(SimCLR, compile=True)
    names = list(module.state_dict())
    module.setup("fit")
    assert module.backbone._compiled_call_impl is not None
    assert list(module.state_dict()) == names


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backbone": "resnet19"}, "got 'resnet19'; nearest: .*resnet1"),
        ({"backbone": "test_vit"}, "small_images gives a ResNet another stem, got the backbone 'test_vit'"),
        ({"optimizer": "adamx"}, "got 'adamx'; nearest: .*adam"),
        ({"projector": (16, 0)}, r"projector must be a sequence of positive widths, got \(16, 0\)"),
        ({"init_scale": 0}, "init_scale must be positive and finite, got 0"),
        ({"lr": -1.0}, "lr must be positive and finite, got -1.0"),
        ({"lr": float("nan")}, "lr must be positive and finite, got nan"),
        ({"init_scale": float("inf")}, "init_scale must be positive and finite, got inf"),
        ({"weight_decay": float("inf")}, "weight_decay must be at least 0 and finite, got inf"),
        ({"warmup_epochs": float("nan")}, "warmup_epochs must be at least 0 and finite, got nan"),
        ({"final_lr_share": float("nan")}, r"final_lr_share must be in \[0, 1\], got nan"),
        ({"schedule": "step"}, "schedule must be 'cosine' or 'constant', got 'step'"),
        ({"rank_check": "no"}, "rank_check must be 'warn', 'error' or 'off', got 'no'"),
    ],
)
def test_wrong_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        tiny(BarlowTwins, **options)


def test_a_wrong_type_of_optimizer_is_named():
    with pytest.raises(TypeError, match=r"optimizer must be a name or a torch.*class, got 3"):
        tiny(SimCLR, optimizer=3)
    with pytest.raises(ValueError, match="features must be given"):
        SimCLR(nn.Flatten())


def never_trains(module, message, **options):
    module.training_step = lambda *_: pytest.fail("training has started")
    with pytest.raises(ValueError, match=message):
        fit(module, **options)


def test_bad_batches_are_refused_before_training_starts():
    never_trains(tiny(SimCLR), "batch_size must be at least 2 over all ranks, got 1", batch_size=1)
    never_trains(tiny(SimCLR), "leaves a last batch of one sample", batch_size=23, drop_last=False)
    never_trains(tiny(VICReg, rank_check="error"), "8 dimensions is above the rank 5", batch_size=6)


def test_an_embedding_above_the_batchs_rank_is_warned_of():
    with pytest.warns(UserWarning, match="8 dimensions is above the rank 5 of a centred batch of 6"):
        fit(tiny(BarlowTwins), batch_size=6)
    fit(tiny(SimCLR), batch_size=6)  # warnings are errors in these tests: a contrastive loss gives none


def test_one_view_is_refused():
    with pytest.raises(ValueError, match="at least 2 views in a list, got 1 view"):
        fit(tiny(SimCLR), views=1)
    with pytest.raises(ValueError, match="at least 2 views in a list, got a Tensor"):
        tiny(SimCLR).views_loss((torch.zeros(2, 3, 16, 16), None))
