"""What CompositionMonitor records is what the pure functions say of the same module."""

import gc
import math
import warnings
import weakref

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from lightning_sym.callbacks import CompositionMonitor
from lightning_sym.callbacks.composition import plane_of
from lightning_sym.datamodules import GaussianBumpsDataModule
from lightning_sym.engine.schedule import EpochEnds
from lightning_sym.functional import composition as comp
from lightning_sym.papers.composition import MLPDecoder


def bumps(**settings):
    return GaussianBumpsDataModule(
        **{"size": 12, "sigma": 1.2, "encoding": "bump", "batch_size": 16, "holdout_size": 5, **settings}
    )


def make(seed=0):
    return MLPDecoder(24, size=12, width=16, hidden_layers=2, seed=seed)


def fit(module, data, monitor=None, *, steps=4, ckpt_path=None, **settings):
    trainer = Trainer(
        **{
            "accelerator": "cpu",
            "max_steps": steps,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "limit_val_batches": 0,
            "callbacks": [monitor] if monitor else [],
            **settings,
        }
    )
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    return trainer


class Composer(LightningModule):
    """Draws the product of a profile of x and one of y, or their sum; nothing is trained."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.still = torch.nn.Parameter(torch.zeros(()))
        self.identity = torch.nn.Identity()

    def forward(self, code):
        code = self.identity(code)
        x, y = code[:, None, None, :12], code[:, None, 12:, None]
        return 1 - x * y if self.how == "product" else 1 - (x + y) / 2 + 0 * x * y

    def training_step(self, batch, batch_idx):
        return (self(batch[0]) - batch[1]).square().mean() + self.still * 0

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_a_composer_is_told_from_an_overlayer():
    rows = {}
    for how in ("product", "sum"):
        monitor = CompositionMonitor(every_n_steps=1, strict=True)
        fit(Composer(how), bumps(sigma=0.8, holdout_size=8), monitor, steps=1)
        rows[how] = monitor.history[0]
    good, bad = rows["product"], rows["sum"]
    assert good["composition/ood_relative_error"] < 1e-10
    assert good["composition/ood_found"] == good["composition/id_found"] == 1
    assert good["composition/ood_distance"] == 0
    assert good["composition/ood_height"] == pytest.approx(1, abs=1e-5)
    assert good["composition/ood_width"] == pytest.approx(0.8, rel=1e-3)
    assert good["composition/ood_rank"] == pytest.approx(1, abs=1e-4)
    assert good["composition/ood_product"] == pytest.approx(1, abs=1e-4)
    assert good["composition/ood_memorised"] < 0.5
    assert bad["composition/ood_relative_error"] > 1
    assert bad["composition/ood_rank"] > 1.05
    assert bad["composition/ood_superposition"] > 0.8
    assert good["composition/ood_superposition"] < 0.6
    # The code itself keeps x and y in units of their own.
    assert good["composition/identity/factorisation"] == pytest.approx(1, abs=1e-5)


def test_readings_twin():
    """Each scalar from single images in a loop, by other routes than the monitor's."""
    data, module = bumps(), make()
    monitor = CompositionMonitor(every_n_steps=3, layers=["net.1", "net.4"], grid=20, strict=True)
    fit(module, data, monitor, steps=3)
    assert [row["step"] for row in monitor.history] == [1, 3]
    row = monitor.history[-1]
    module.eval()

    def image_of(code):
        with torch.no_grad():
            return module(code[None])[0, 0].double()

    for name, centers in (("id", data.id_centers[:, 0]), ("ood", data.ood_centers[:, 0])):
        errors, blanks, found = [], [], []
        for center in centers:
            image = image_of(data.encode(center[None])[0])
            target = data.render(center[None])[0, 0].double()
            errors.append((image - target).square().mean())
            blanks.append((1 - target).square().mean())
            at = (1 - image).argmax().item()
            near = math.hypot(at % 12 - center[0], at // 12 - center[1]) <= 1.5
            found.append(float(near and 1 - image.min() >= 0.5))
        assert row[f"composition/{name}_error"] == pytest.approx((sum(errors) / len(errors)).item(), rel=1e-4)
        assert row[f"composition/{name}_relative_error"] == pytest.approx(
            (sum(errors) / sum(blanks)).item(), rel=1e-4
        )
        assert row[f"composition/{name}_found"] == pytest.approx(sum(found) / len(found))

    codes = data.encode(torch.cartesian_prod(torch.arange(12.0), torch.arange(12.0)).flip(1))
    hidden = [None, None]
    with torch.no_grad():
        hidden[0] = module.net[:2](codes)
        hidden[1] = module.net(codes)
    for layer, features in zip(("net.1", "net.4"), hidden, strict=True):
        metric = comp.metric_tensor(features.double().view(12, 12, -1))
        assert row[f"composition/{layer}/factorisation"] == pytest.approx(
            comp.factorisation(metric).item(), rel=1e-4
        )
        for axis in "xy":
            assert row[f"composition/{layer}/readout_{axis}"] <= 1


def test_mean_codes_are_means_over_the_other_coordinate():
    """For a code of two halves, the mean over pairs is the mean of one half."""
    data = bumps()
    data.setup("fit")
    given = {name: getattr(data, name) for name in ("encode", "render", "background", "amplitude")}
    centers = {"id_centers": data.id_centers, "ood_centers": data.ood_centers}
    plane = plane_of(**given, **centers, grid=14, max_samples=1024, seed=0)
    x_code, y_code = plane.mean_codes(torch.device("cpu"))
    own = data.encode(plane.ood_centers)
    torch.testing.assert_close(x_code[:, :12], own[:, :12])
    torch.testing.assert_close(y_code[:, 12:], own[:, 12:])
    assert x_code[:, 12:].std(dim=0).max() < 1e-6
    picked = plane.id_centers[torch.linspace(0, len(plane.id_centers) - 1, 64).long()]
    torch.testing.assert_close(x_code[0, 12:], data.encode(picked)[:, 12:].mean(0))


def test_a_run_with_it_is_the_run_without_it():
    with_it, without = make(), make()
    states = []
    for module, monitor in ((with_it, CompositionMonitor(every_n_steps=2, strict=True)), (without, None)):
        torch.manual_seed(0)
        fit(module, bumps(label_noise=0.1), monitor, steps=12)
        states.append((torch.get_rng_state(), module.training))
    assert torch.equal(states[0][0], states[1][0])
    assert states[0][1] == states[1][1]
    for a, b in zip(with_it.parameters(), without.parameters(), strict=True):
        assert torch.equal(a, b)


def test_any_generator_with_a_callable_for_its_inputs():
    data = bumps()
    id_xy, ood_xy = data.id_centers[:, 0], data.ood_centers
    monitor = CompositionMonitor(
        encode=data.encode,
        render=data.render,
        id_centers=id_xy,
        ood_centers=ood_xy,
        background=1.0,
        amplitude=-1.0,
        max_layers=0,
        pictures=False,
        strict=True,
    )
    module = make()
    trainer = Trainer(
        accelerator="cpu",
        max_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[monitor],
    )
    trainer.fit(module, train_dataloaders=data.train_dataloader())
    assert "composition/ood_error" in monitor.history[0]
    assert not any("factorisation" in key for key in monitor.history[0])
    assert (
        trainer.callback_metrics["composition/ood_error"].item()
        == monitor.history[0]["composition/ood_error"]
    )


def test_pictures_reach_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path, name="")
    fit(make(), bumps(), CompositionMonitor(strict=True), steps=1, logger=logger)
    logger.finalize("success")
    tags = EventAccumulator(logger.log_dir, size_guidance={"images": 0}).Reload().Tags()
    assert {f"composition/{name}" for name in ("images", "error_map", "coordinates")} <= set(tags["images"])
    assert "composition/ood_error" in tags["scalars"]


def test_large_layers_are_sampled_and_it_says_nearly_the_same():
    rows = []
    for most in (4096, 60):
        monitor = CompositionMonitor(layers="net.4", max_features=most, strict=True)
        fit(make(), bumps(), monitor, steps=1)
        rows.append(monitor.history[0]["composition/net.4/factorisation"])
    assert rows[0] != rows[1]
    assert rows[0] == pytest.approx(rows[1], abs=0.1)


@pytest.mark.parametrize("encoding", ["scalar", "ramp", "bump", "one_hot"])
def test_every_encoding(encoding):
    data = bumps(encoding=encoding)
    monitor = CompositionMonitor(strict=True)
    fit(MLPDecoder(data.code_length, size=12, width=8, seed=0), data, monitor, steps=1)
    assert math.isfinite(monitor.history[0]["composition/ood_superposition"])


def test_continuous_centres():
    data = bumps(centers="continuous", samples=60, ood_samples=30)
    monitor = CompositionMonitor(strict=True)
    fit(make(), data, monitor, steps=1)
    assert math.isfinite(monitor.history[0]["composition/net.0/factorisation"])


class OnTwo(CompositionMonitor):
    def on_train_end(self, trainer, pl_module):
        mine = torch.tensor(list(self.history[-1].values()))
        every = pl_module.all_gather(mine)
        if not torch.equal(every[0].nan_to_num(), every[1].nan_to_num()):
            raise RuntimeError(f"ranks disagree: {every}")


def test_two_ranks_agree():
    fit(make(), bumps(), OnTwo(every_n_steps=2, strict=True), steps=2, devices=2, strategy="ddp_fork")


def test_a_failure_is_one_warning_and_the_fit_goes_on():
    data = bumps()

    def broken(centers):
        raise RuntimeError("no code today")

    module = make()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(module, data, CompositionMonitor(encode=broken, every_n_steps=1), steps=3)
    assert sum("no code today" in str(w.message) for w in caught) == 1
    assert module.trainer.global_step == 3


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"grid": 2}, "grid"),
        ({"max_layers": -1}, "max_layers must be at least 0, got -1"),
        ({"max_samples": 1}, "max_samples"),
        ({"batch_size": 0}, "batch_size"),
        ({"every_n_steps": 0}, "every_n_steps"),
    ],
)
def test_bad_arguments(settings, words):
    with pytest.raises(ValueError, match=words):
        CompositionMonitor(**settings)


def test_what_cannot_be_measured_is_said_before_the_first_step():
    with pytest.raises(ValueError, match=r"matches no layer; the nearest names are .*net"):
        fit(make(), bumps(), CompositionMonitor(layers="encoder.*"))
    with pytest.raises(TypeError, match="forward='paint' is not a method of MLPDecoder"):
        fit(make(), bumps(), CompositionMonitor(forward="paint"))
    two = bumps(bumps=2)
    with pytest.raises(ValueError, match="one bump in an image"):
        fit(MLPDecoder(48, size=12, seed=0), two, CompositionMonitor())
    trainer = Trainer(
        accelerator="cpu",
        max_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[CompositionMonitor()],
    )
    with pytest.raises(ValueError, match="encode, render, id_centers"):
        trainer.fit(make(), train_dataloaders=bumps().train_dataloader())


@pytest.mark.parametrize("size", [12, 28])
@pytest.mark.parametrize("precision", ["64-true", "bf16-true", "bf16-mixed"])
def test_codes_come_in_the_precision_of_the_fit(precision, size):
    rows = {}
    for each in ("32-true", precision):
        monitor = CompositionMonitor(every_n_steps=1, pictures=False, grid=6, max_samples=64, strict=True)
        data = bumps(size=size, batch_size=64)
        module = MLPDecoder(data.code_length, size=size, width=16, seed=0)
        fit(module, data, monitor, steps=1, precision=each)
        rows[each] = monitor.history[0]
    expected, got = rows["32-true"], rows[precision]
    assert got.keys() == expected.keys()
    near = {"rel": 1e-3, "abs": 1e-4} if precision == "64-true" else {"rel": 0.05, "abs": 0.05}
    for key in ("id_error", "id_relative_error", "ood_relative_error", "net.0/factorisation"):
        assert got[f"composition/{key}"] == pytest.approx(expected[f"composition/{key}"], **near)


def test_a_layer_is_measured_before_what_changes_its_output_in_place():
    rows = []
    for in_place in (False, True):
        module = make()
        for child in module.net:
            if isinstance(child, torch.nn.ReLU):
                child.inplace = in_place
        monitor = CompositionMonitor(every_n_steps=1, pictures=False, strict=True)
        fit(module, bumps(), monitor, steps=1)
        rows.append(monitor.history[0])
    assert rows[0] == pytest.approx(rows[1], nan_ok=True)
    assert rows[0]["composition/net.0/factorisation"] != rows[0]["composition/net.1/factorisation"]


def test_what_draws_is_a_method_or_a_function():
    rows = []
    for forward in ("forward", "draw", lambda module, codes: module.net(codes).view(-1, 12, 12)):
        monitor = CompositionMonitor(every_n_steps=1, forward=forward, pictures=False, strict=True)
        fit(make(), bumps(), monitor, steps=1)
        rows.append(monitor.history)
    assert rows[0] == rows[1]
    assert rows[0][0] == pytest.approx(rows[2][0], nan_ok=True)


def test_it_reads_at_epoch_ends():
    monitor = CompositionMonitor(every_n_steps=EpochEnds(at_start=True), pictures=False, strict=True)
    trainer = fit(make(), bumps(), monitor, steps=-1, max_epochs=1)
    assert [row["step"] for row in monitor.history] == [0, trainer.global_step]


class Counting(MLPDecoder):
    """Counts its calls and fires a hook."""

    def __init__(self):
        super().__init__(24, size=12, width=16, seed=0)
        self.calls, self.fired = 0, 0
        self.again = lambda code: self.net(code)
        self.net.register_forward_hook(self.count)

    def count(self, *_):
        self.fired += 1

    def draw(self, code):
        self.calls += 1
        return self.again(code).view(-1, 1, 12, 12)


def test_nothing_of_the_module_notices_it_and_nothing_is_kept():
    runs = []
    for monitor in (None, CompositionMonitor(every_n_steps=1, strict=True)):
        module, data = Counting(), bumps()
        fit(module, data, monitor, steps=3)
        runs.append((module.calls, module.fired, [t.clone() for t in module.state_dict().values()]))
    assert runs[0][:2] == runs[1][:2] == (3, 3)
    assert all(torch.equal(a, b) for a, b in zip(runs[0][2], runs[1][2], strict=True))
    kept = weakref.ref(data)
    del data, module
    gc.collect()
    assert kept() is None


def test_a_second_run_and_a_resumed_one(tmp_path):
    used, fresh, second = (CompositionMonitor(every_n_steps=2, pictures=False, strict=True) for _ in range(3))
    fit(make(1), bumps(), used, steps=2)
    fit(make(), bumps(), used, steps=6)
    fit(make(), bumps(), fresh, steps=6)
    again = [{**row, "fit": 1} for row in used.history if row["fit"] == 2]
    assert len(again) == len(fresh.history) == 4
    for row, expected in zip(again, fresh.history, strict=True):
        assert row == pytest.approx(expected, nan_ok=True)
    first = CompositionMonitor(every_n_steps=2, pictures=False, strict=True)
    trainer = fit(make(), bumps(batch_size=64), first, steps=-1, max_epochs=1)
    trainer.save_checkpoint(tmp_path / "c.ckpt")
    ckpt = {"ckpt_path": tmp_path / "c.ckpt"}
    whole = fit(make(), bumps(batch_size=64), second, steps=-1, max_epochs=2, **ckpt)
    assert second.history[: len(first.history)] == first.history
    assert [row["step"] for row in second.history] == [1, *range(2, whole.global_step + 1, 2)]
    assert {row["fit"] for row in second.history} == {1}
