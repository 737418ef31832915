"""Views in the ways they are asked for: small crops beside large ones, any precision, any batch size."""

import pytest
import torch
from lightning.pytorch import Trainer
from torchvision.transforms.v2 import functional as tv

from lightning_sym.datamodules.augment import ViewRecipe
from lightning_sym.datamodules.multi_view import MultiViewDataModule
from tests.views import Noise, Recorder, Squares, assert_same_batches, batches, fit


def local_twin(image, own, n, size, kernel):
    """One view of one image by torchvision, in floating point; jitter and all else are off in this recipe."""
    x = tv.resized_crop(image.float() / 255, *own.boxes[n].tolist(), [size, size], antialias=True)
    x = x.flip(-1) if own.flip[n] else x
    return tv.gaussian_blur(x, [kernel, kernel], [float(own.blur_sigma[n])]) if own.blur_sigma[n] > 0 else x


def test_local_views_are_small_crops_and_leave_the_global_ones_alone():
    recipe = ViewRecipe(crop_scale=(0.3, 1.0), blur=0.5, blur_kernel=7, blur_sigma=(0.5, 2.0))
    options = {"recipe": recipe, "batch_size": 8, "image_size": 28, "mean": [0] * 3, "std": [1] * 3}
    data = MultiViewDataModule(
        Noise(side=40), local_views=3, local_size=12, local_scale=(0.05, 0.3), **options
    )
    plain = MultiViewDataModule(Noise(side=40), **options)
    data.setup()
    raw = data.train_dataloader().dataset.__getitems__([(2, n) for n in range(8)])
    parameters = data.drawing(raw.numbers, raw.sizes, raw.epoch)
    views, _ = data.on_after_batch_transfer(raw, 0)
    assert [tuple(view.shape[-2:]) for view in views] == [(28, 28)] * 2 + [(12, 12)] * 3
    for view, own, size, drawn in zip(
        views, parameters, data.drawing.sizes, data.drawing.recipes, strict=True
    ):
        for n in range(8):
            twin = local_twin(raw.images[n], own, n, size, drawn.blur_kernel)
            torch.testing.assert_close(view[n], twin, rtol=0, atol=2e-5)
    areas = [own.boxes[:, 2] * own.boxes[:, 3] / 1600 for own in parameters[2:]]
    assert all(float(area.min()) > 0.03 and float(area.max()) < 0.34 for area in areas)
    assert data.drawing.recipes[2].blur_sigma == pytest.approx((0.5 * 12 / 28, 2.0 * 12 / 28))
    for (both, labels), (alone, other) in zip(batches(data), batches(plain), strict=True):
        assert torch.equal(labels, other)
        assert all(torch.equal(a, b) for a, b in zip(both, alone, strict=False))


def test_local_views_take_a_recipes_views_in_turn():
    data = MultiViewDataModule(recipe="barlow_twins", local_views=3, image_size=32)
    data.setup()
    assert [recipe.solarize for recipe in data.drawing.recipes] == [0.0, 0.2, 0.0, 0.2, 0.0]
    assert data.drawing.sizes == (32, 32, 14, 14, 14)
    with pytest.raises(ValueError, match="local_size must be below image_size=32, got 32"):
        MultiViewDataModule(local_views=2, local_size=32, image_size=32)
    with pytest.raises(ValueError, match="crop_scale"):
        MultiViewDataModule(local_views=2, local_scale=(0.5, 0.2))


@pytest.mark.parametrize("backend", ["batched", "torchvision"])
@pytest.mark.parametrize(
    ("precision", "expected"),
    [("32-true", torch.float32), ("bf16-mixed", torch.float32), ("bf16-true", torch.bfloat16),
     ("64-true", torch.float64)],
)  # fmt: skip
def test_views_and_probes_come_in_the_fits_precision(backend, precision, expected):
    class Probed(Recorder):
        def on_train_start(self):
            self.probed = next(iter(self.trainer.datamodule.probe_dataloaders()[0]))[0]

    data = MultiViewDataModule(Noise(), batch_size=8, backend=backend, local_views=1, local_size=4)
    module, _ = fit(data, Probed(), max_epochs=1, precision=precision)
    seen = [view for views, _ in module.seen + module.validated for view in views]
    assert {view.dtype for view in [*seen, module.probed]} == {expected}
    assert all(labels.dtype == torch.int64 for _, labels in module.seen)
    plain, _ = fit(
        MultiViewDataModule(Noise(), batch_size=8, backend=backend, local_views=1, local_size=4), max_epochs=1
    )
    exact = [view for views, _ in plain.seen + plain.validated for view in views]
    assert all(torch.equal(a, b.to(expected)) for a, b in zip(seen, exact, strict=True))


def test_another_default_type_changes_nothing():
    expected = batches(MultiViewDataModule(Noise(), batch_size=8))
    torch.set_default_dtype(torch.float64)
    try:
        made = batches(MultiViewDataModule(Noise(), batch_size=8))
    finally:
        torch.set_default_dtype(torch.float32)
    assert_same_batches(made, expected)


@pytest.mark.parametrize("size", [256, 37, 1, "8"])
def test_a_batch_size_that_leaves_no_step_is_refused_whenever_it_is_set(size):
    data = MultiViewDataModule(Squares(), batch_size=8)
    data.setup()
    data.batch_size = size
    with pytest.raises(ValueError, match=f"batch_size.*{size}"):
        fit(data)
    data.batch_size = 36
    assert len(fit(data, max_epochs=1)[0].seen) == 1


@pytest.mark.filterwarnings("ignore")  # a tuner's own
@pytest.mark.parametrize("trials", [3, 8])
def test_a_batch_size_finder_goes_as_far_as_the_data_set(trials, tmp_path):
    from lightning.pytorch.tuner import Tuner

    data = MultiViewDataModule(Squares(60), batch_size=4)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": tmp_path}
    tuner = Tuner(Trainer(max_epochs=1, logger=False, accelerator="cpu", **quiet))
    if trials == 3:
        tuner.scale_batch_size(Recorder(), datamodule=data, max_trials=trials)
        assert data.batch_size == 8  # 2, 4, 8
    else:
        with pytest.raises(ValueError, match=r"batch_size=64 on 1 rank.* it can be at most 54"):
            tuner.scale_batch_size(Recorder(), datamodule=data, max_trials=trials)
