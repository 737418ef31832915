"""What a trained module leaves behind: a checkpoint, a backbone for timm, features to learn on."""

import json
import subprocess
import sys

import pytest
import safetensors
import torch
from torch import nn

from lightning_sym.datamodules import MultiViewDataModule
from lightning_sym.losses import CrossCovarianceLoss
from lightning_sym.modules import BarlowTwins, JointEmbedding, SimCLR, VICReg, extract_features
from tests.models import trainer

CLASSES = {"barlow_twins": BarlowTwins, "simclr": SimCLR, "vicreg": VICReg}
each = pytest.mark.parametrize("name", CLASSES)
TINY = {"projector": (16, 8), "optimizer": "sgd", "lr": 0.05, "schedule": "constant"}

TIMM_ALONE = """
import json, sys, timm, torch
from safetensors import safe_open
from safetensors.torch import load_file
path, images, out = sys.argv[1:]
with safe_open(path, "pt") as file:
    told = file.metadata()
model = timm.create_model(told["timm_name"], **json.loads(told["timm_args"]))
for name, (kind, options) in json.loads(told.get("timm_parts", "{}")).items():
    model.set_submodule(name, getattr(torch.nn, kind)(**options))
model.load_state_dict(load_file(path))
with torch.no_grad():
    torch.save(model.eval()(torch.load(images, weights_only=True)), out)
assert not any(name.split(".")[0] in ("lightning_sym", "lightning") for name in sys.modules)
"""


def digits(**options):
    return MultiViewDataModule("digits", **{"image_size": 16, "batch_size": 64, **options})


def trained(module, epochs=1, **options):
    fit = trainer(max_epochs=epochs, limit_train_batches=3, limit_val_batches=0, **options)
    fit.fit(module, datamodule=digits())
    return fit


def saved(fit, tmp_path):
    fit.save_checkpoint(tmp_path / "run.ckpt")
    return tmp_path / "run.ckpt"


def saved_alone(module, tmp_path):
    fit = trainer(max_steps=0, limit_val_batches=0)
    fit.fit(module, datamodule=digits(image_size=32))
    return saved(fit, tmp_path)


def assert_same(module, again):
    x = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1)).to(next(module.parameters()))
    with torch.no_grad():
        for ours, theirs in zip(module.eval().embed(x), again.eval().embed(x), strict=True):
            assert ours.dtype == theirs.dtype
            assert torch.equal(ours, theirs)
    for name in ("lr", "weight_decay", "optimizer_options", "schedule", "joint_forward", "warmup_epochs"):
        assert getattr(module, name) == getattr(again, name), name
    assert again.loss.__dict__.keys() == module.loss.__dict__.keys()


@each
@pytest.mark.parametrize("weights_only", [True, None])
def test_a_path_alone_gives_the_module_as_it_was_trained(name, weights_only, tmp_path):
    special = {
        "barlow_twins": {"off_diagonal": 0.1},
        "simclr": {"temperature": 0.2},
        "vicreg": {"variance": 9.0},
    }
    module = CLASSES[name](
        "test_resnet",
        small_images=True,
        optimizer_options={"momentum": 0.9},
        weight_decay=1e-3,
        init_scale=0.5,
        backbone_options={"drop_rate": 0.1},
        **TINY,
        **special[name],
    )
    path = saved(trained(module), tmp_path)
    again = CLASSES[name].load_from_checkpoint(path, weights_only=weights_only)
    assert_same(module, again)
    (argument, value), = special[name].items()  # fmt: skip
    assert getattr(again.loss, argument) == value
    assert CLASSES[name].load_from_checkpoint(path, lr=7.0).lr == 7.0
    assert trained(again.train()).global_step == 3  # it goes on training


class Sub(BarlowTwins):
    """A user's class, whose arguments are not ours."""

    def __init__(self, width, **options):
        super().__init__("test_resnet", projector=(width, width), **options)
        self.width = width


class Strict(SimCLR):
    def __init__(self, width):
        super().__init__("test_resnet", projector=(width,), optimizer="sgd", lr=0.1, schedule="constant")


def test_subclasses_are_reloaded_by_their_own_arguments(tmp_path):
    module = Sub(12, optimizer="sgd", lr=0.05, schedule="constant")
    assert dict(module.hparams) == {"width": 12, "optimizer": "sgd", "lr": 0.05, "schedule": "constant"}
    again = Sub.load_from_checkpoint(saved(trained(module), tmp_path))
    assert_same(module, again)
    assert again.width == 12
    strict = Strict(8)
    assert_same(strict, Strict.load_from_checkpoint(saved(trained(strict), tmp_path)))


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 12))


def test_objects_are_asked_for_by_name(tmp_path):
    class Own(torch.optim.SGD):
        pass

    module = BarlowTwins(net(), features=12, **{**TINY, "optimizer": Own})
    path = saved(trained(module), tmp_path)
    with pytest.raises(
        ValueError, match=r"backbone was an object, torch\.nn\..*Sequential.*\(path, backbone="
    ):
        BarlowTwins.load_from_checkpoint(path)
    with pytest.raises(ValueError, match=r"optimizer was an object, .*Own, which a checkpoint does not hold"):
        BarlowTwins.load_from_checkpoint(path, backbone=net())
    assert_same(module, BarlowTwins.load_from_checkpoint(path, backbone=net(), optimizer=Own))
    base = JointEmbedding(CrossCovarianceLoss(), "test_resnet", **{**TINY, "optimizer": torch.optim.SGD})
    path = saved(trained(base), tmp_path)
    with pytest.raises(ValueError, match=r"loss was an object, .*CrossCovarianceLoss.*, loss=\.\.\.\)"):
        JointEmbedding.load_from_checkpoint(path)
    assert_same(base, JointEmbedding.load_from_checkpoint(path, loss=CrossCovarianceLoss()))
    act = SimCLR("test_resnet", backbone_options={"act_layer": nn.SiLU}, **TINY)
    with pytest.raises(ValueError, match=r"backbone_options was an object, torch.*SiLU"):
        SimCLR.load_from_checkpoint(saved(trained(act), tmp_path))


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_weights_come_back_in_their_type(precision, tmp_path):
    module = BarlowTwins(net(), features=12, **TINY)
    path = saved(trained(module, precision=precision), tmp_path)
    again = BarlowTwins.load_from_checkpoint(path, backbone=net())
    assert_same(module, again)
    assert next(again.parameters()).dtype == {"6": torch.float64, "b": torch.bfloat16}[precision[0]]
    resumed = BarlowTwins(net(), features=12, **TINY)  # a trainer chooses for itself
    fit = trainer(max_epochs=2, limit_train_batches=3, limit_val_batches=0)
    fit.fit(resumed, datamodule=digits(), ckpt_path=path)
    assert next(resumed.parameters()).dtype == torch.float32


def test_a_reloaded_module_fetches_no_pretrained_weights(tmp_path, monkeypatch):
    import timm

    real, asked = timm.create_model, []

    def create(name, *, pretrained=False, **options):
        asked.append(pretrained)
        return real(name, **options)

    monkeypatch.setattr(timm, "create_model", create)
    module = SimCLR("test_resnet", backbone_options={"pretrained": True}, **TINY)
    assert module.hparams["backbone_options"] == {"pretrained": True}
    again = SimCLR.load_from_checkpoint(saved(trained(module), tmp_path))
    assert asked == [True, False]
    assert_same(module, again)


def rebuilt_by_timm(path, x, tmp_path):
    torch.save(x, tmp_path / "images.pt")
    command = [sys.executable, "-c", TIMM_ALONE, path, tmp_path / "images.pt", tmp_path / "features.pt"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    return torch.load(tmp_path / "features.pt", weights_only=True)


def test_round_trip_from_digits_to_timm_and_a_linear_classifier(tmp_path):
    torch.manual_seed(0)
    module = BarlowTwins("test_resnet", projector=(64, 32), optimizer="adamw", lr=1e-3, warmup_epochs=0)
    data = digits(batch_size=128, image_size=32)
    fit = trainer(max_epochs=2, limit_val_batches=0)
    fit.fit(module, datamodule=data)
    again = BarlowTwins.load_from_checkpoint(saved(fit, tmp_path))
    again.export_backbone(tmp_path / "backbone.safetensors")
    train, val = data.probe_dataloaders()
    x = next(iter(val))[0]
    features = rebuilt_by_timm(tmp_path / "backbone.safetensors", x, tmp_path)
    with torch.no_grad():
        assert torch.equal(features, module.eval().backbone(x))
        assert torch.equal(features, module(x))
    (h, y), (h_val, y_val) = (extract_features(again.backbone, loader) for loader in (train, val))
    assert (h.shape, h_val.shape) == ((1617, 96), (180, 96))
    from sklearn.linear_model import LogisticRegression

    scaled = [(part - h.mean(0)) / h.std(0).clamp_min(1e-6) for part in (h, h_val)]
    linear = LogisticRegression(max_iter=200).fit(scaled[0].numpy(), y.numpy())
    assert linear.score(scaled[1].numpy(), y_val.numpy()) > 0.8


@pytest.mark.parametrize(
    ("backbone", "options"),
    [
        ("test_resnet", {"channels": (8, 8, 16, 16), "in_chans": 1}),
        ("test_vit", {"img_size": 32, "patch_size": (8, 8), "drop_path_rate": 0.1}),
        ("resnet18", {"channels": [16, 32, 64, 128], "stem_width": 8, "stem_type": "deep"}),
    ],
)
def test_options_of_timm_are_in_the_file(backbone, options, tmp_path):
    module = SimCLR(backbone, backbone_options=options, **TINY)
    module.export_backbone(tmp_path / "backbone.safetensors")
    with safetensors.safe_open(tmp_path / "backbone.safetensors", "pt") as file:
        told = file.metadata()
    assert told["timm_name"] == backbone
    assert json.loads(told["timm_args"]) == json.loads(json.dumps({"num_classes": 0, **options}))
    x = torch.randn(2, options.get("in_chans", 3), 32, 32)
    with torch.no_grad():
        expected = module.eval().backbone(x)
    assert torch.equal(rebuilt_by_timm(tmp_path / "backbone.safetensors", x, tmp_path), expected)


@pytest.mark.parametrize(
    ("backbone", "options"),
    [
        ("test_resnet", {}),
        ("resnet18", {"channels": [16, 32, 64, 128], "stem_width": 8, "stem_type": "deep"}),
        ("resnet18", {"channels": [16, 32, 64, 128], "aa_layer": "avg", "replace_stem_pool": True}),
    ],
)
def test_a_stem_for_small_images_comes_back(backbone, options, tmp_path):
    module = SimCLR(backbone, backbone_options=options, small_images=True, **TINY)
    with torch.no_grad():
        module.train()(torch.randn(8, 3, 32, 32))  # statistics of their own
    path = tmp_path / "backbone.safetensors"
    again = SimCLR.load_from_checkpoint(saved_alone(module, tmp_path))
    again.export_backbone(path)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = module.eval().backbone(x)
        assert module.backbone.layer1(module.backbone.maxpool(module.backbone.conv1(x))).shape[2:] == (32, 32)
    assert torch.equal(rebuilt_by_timm(path, x, tmp_path), expected)
    again.backbone.maxpool = nn.Conv2d(1, 1, 1)
    with pytest.raises(ValueError, match="backbone was changed after timm made it"):
        again.export_backbone(path)


def test_what_timm_cannot_rebuild_is_refused(tmp_path):
    path = tmp_path / "backbone.safetensors"
    with pytest.raises(
        ValueError, match="backbone must be the name of a timm model to be exported, got a Sequen"
    ):
        SimCLR(net(), features=12, **TINY).export_backbone(path)
    with pytest.raises(ValueError, match=r"backbone_options must be plain values .*\{'act_layer': 'gelu'\}"):
        SimCLR("test_resnet", backbone_options={"act_layer": nn.SiLU}, **TINY).export_backbone(path)
    changed = SimCLR("test_resnet", **TINY)
    changed.backbone.conv1 = nn.Conv2d(3, 32, 3)
    with pytest.raises(ValueError, match="backbone was changed after timm made it as 'test_resnet'"):
        changed.export_backbone(path)
    assert not path.exists()
    before = torch.get_rng_state()
    SimCLR("test_resnet", **TINY)
    torch.set_rng_state(before)
    module = SimCLR("test_resnet", **TINY)
    before = torch.get_rng_state()
    module.export_backbone(path)
    assert torch.equal(torch.get_rng_state(), before)


def test_features_of_a_frozen_backbone_leave_it_as_it_was():
    backbone = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    backbone[1].eval()
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    modes = [part.training for part in backbone.modules()]
    batches = [(torch.randn(n, 3, 8, 8), torch.arange(n)) for n in (5, 2)]
    h, y = extract_features(backbone, batches)
    assert [part.training for part in backbone.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())
    assert y.tolist() == [0, 1, 2, 3, 4, 0, 1]
    with torch.no_grad():
        backbone.eval()
        torch.testing.assert_close(h, torch.cat([backbone(x) for x, _ in batches]))
    assert not h.requires_grad
    assert extract_features(backbone.double(), batches)[0].dtype == torch.float64
    with pytest.raises(ValueError, match="one batch at least, got none"):
        extract_features(backbone, [])
    with pytest.raises(ValueError, match=r"must give \[B, F\] = \[5, F\], got \[5, 4, 6, 6\]"):
        extract_features(backbone[:1], batches)
