import sys
import types
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as tv

from lightning_sym.datamodules._pixels import as_bytes
from lightning_sym.datamodules._view_batches import EpochSampler
from lightning_sym.datamodules.augment import ViewRecipe
from lightning_sym.datamodules.multi_view import MultiViewDataModule
from tests.views import Noise, Recorder, Squares, assert_same_batches, batches, fit


@pytest.mark.parametrize("backend", ["batched", "torchvision"])
@pytest.mark.parametrize("recipe", ["simclr", "barlow_twins", "vicreg", "weak"])
def test_a_fit_sees_views_and_labels(recipe, backend):
    data = MultiViewDataModule(recipe=recipe, views=3, batch_size=128, image_size=16, backend=backend)
    before = torch.get_rng_state()
    module, _ = fit(data, max_epochs=1, limit_train_batches=2, num_sanity_val_steps=0)
    assert torch.equal(torch.get_rng_state(), before)
    assert len(module.seen) == 2
    for views, labels in module.seen + module.validated:
        assert len(views) == 3
        assert all(v.shape == (len(labels), 3, 16, 16) and v.dtype == torch.float32 for v in views)
        assert all(bool(v.isfinite().all()) for v in views)
        assert not torch.equal(views[0], views[1])
    assert sum(len(labels) for _, labels in module.validated) == 180


def test_labels_stay_with_their_images():
    data = MultiViewDataModule(
        Squares(), batch_size=8, recipe="weak", mean=[0.0] * 3, std=[1.0] * 3, image_size=5, val_share=0.2
    )
    for views, labels in batches(data):
        for view in views:
            numbers = (view * 255).round().flatten(1).long()
            assert bool((numbers == numbers[:, :1]).all())
            assert torch.equal(numbers[:, 0] % 10, labels)
    for loader in data.probe_dataloaders():
        for x, labels in loader:
            assert torch.equal((x * 255).round()[:, 0, 0, 0].long() % 10, labels)
    train, val = (
        {int(k) for x, _ in ld for k in (x * 255).round()[:, 0, 0, 0]} for ld in data.probe_dataloaders()
    )
    assert len(val) == 8
    assert train | val == set(range(40))


def test_both_backends_make_the_same_views():
    strong = ViewRecipe(
        jitter=1.0, brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, grayscale=0.2, blur=0.5
    )
    made = [
        batches(
            MultiViewDataModule(
                Noise(), recipe=strong, batch_size=8, backend=backend, mean=[0] * 3, std=[1] * 3
            )
        )
        for backend in ("batched", "torchvision")
    ]
    for (ours, labels), (theirs, other) in zip(*made, strict=True):
        assert torch.equal(labels, other)
        for a, b in zip(ours, theirs, strict=True):
            assert (a - b).abs().mean() < 2 / 255  # torchvision cuts to whole bytes after each operation
            assert (a - b).abs().max() < 12 / 255


@pytest.mark.parametrize("backend", ["batched", "torchvision"])
def test_workers_change_nothing_and_epochs_and_seeds_do(backend):
    def made(epoch=0, **options):
        data = MultiViewDataModule(Noise(), batch_size=8, backend=backend, **options)
        return [view for views, _ in batches(data, epoch) for view in views]

    first = made()
    for same in (made(), made(num_workers=2)):
        assert all(torch.equal(a, b) for a, b in zip(first, same, strict=True))
    for other in (made(epoch=1), made(seed=1)):
        assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_ranks_share_an_epoch_and_see_samples_as_one_rank_does():
    whole = list(EpochSampler(21, seed=3, ranks=1, rank=0, shuffle=True, keep=21))
    parts = [list(EpochSampler(21, seed=3, ranks=2, rank=r, shuffle=True, keep=10)) for r in range(2)]
    assert [pair for both in zip(*parts, strict=True) for pair in both] == whole[:20]
    data = MultiViewDataModule(Noise(), batch_size=8)
    data.setup()
    images = data.train_dataloader().dataset
    full = data.on_after_batch_transfer(images.__getitems__([(0, 3), (0, 5)]), 0)[0]
    alone = data.on_after_batch_transfer(images.__getitems__([(0, 5)]), 0)[0]
    assert all(torch.allclose(a[1:], b, atol=1e-6) for a, b in zip(full, alone, strict=True))


class Dump(Recorder):
    def __init__(self, folder):
        super().__init__()
        self.folder = folder

    def on_train_end(self):
        kept = [(views, labels) for views, labels in self.seen]
        torch.save(kept, self.folder / f"{self.trainer.world_size}-{self.trainer.global_rank}.pt")


@pytest.mark.parametrize("backend", ["batched", "torchvision"])
def test_two_gloo_ranks_see_what_one_rank_sees(backend, tmp_path):
    """Step by step the two batches of 4, one by one in turn, are the one batch of 8."""

    def data(batch_size):
        return MultiViewDataModule(Noise(), batch_size=batch_size, backend=backend, num_workers=1)

    options = {"max_epochs": 2, "limit_val_batches": 0}
    fit(data(8), Dump(tmp_path), **options)
    fit(data(4), Dump(tmp_path), strategy="ddp_fork", devices=2, **options)
    one, *ranks = (torch.load(tmp_path / f"{k}.pt", weights_only=True) for k in ("1-0", "2-0", "2-1"))
    assert len(one) == len(ranks[0]) == len(ranks[1]) == 8
    for (views, labels), *shares in zip(one, *ranks, strict=True):
        joined = torch.stack([share[1] for share in shares], dim=1).flatten()
        assert torch.equal(joined, labels)
        for k, view in enumerate(views):
            joined = torch.stack([share[0][k] for share in shares], dim=1).flatten(0, 1)
            torch.testing.assert_close(joined, view, rtol=0, atol=1e-5)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    "stop", [1, 3, 4, 6, 8]
)  # 4 batches an epoch: within one, at an end, within the next
def test_a_resumed_run_sees_what_it_would_have_seen(stop, workers, tmp_path):
    def make():
        return MultiViewDataModule(Noise(), batch_size=8, num_workers=workers)

    class Saver(Recorder):
        def on_train_batch_end(self, *_):
            if self.trainer.global_step == stop:
                self.trainer.save_checkpoint(tmp_path / "last.ckpt")

    through, _ = fit(make(), Saver(), max_epochs=3)
    assert len(through.seen) == 12
    torch.manual_seed(99)
    resumed, _ = fit(make(), max_epochs=3, ckpt=tmp_path / "last.ckpt")
    assert_same_batches(resumed.seen, through.seen[stop:])


def test_a_run_of_partial_epochs_resumes_at_the_start_of_the_next(tmp_path):
    def make():
        return MultiViewDataModule(Noise(), batch_size=8)

    through, _ = fit(make(), limit_train_batches=3)
    _, trainer = fit(make(), limit_train_batches=3, max_epochs=1)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    resumed, _ = fit(make(), limit_train_batches=3, ckpt=tmp_path / "last.ckpt")
    assert_same_batches(resumed.seen, through.seen[3:])


class Counting(Recorder):
    """Has the loaders made before they are restored."""

    def configure_optimizers(self):
        assert self.trainer.estimated_stepping_batches == 8
        return super().configure_optimizers()


@pytest.mark.parametrize("kind", [Recorder, Counting])
def test_one_data_module_serves_a_run_its_resumption_and_another_run(kind, tmp_path):
    class Saver(kind):
        def on_train_batch_end(self, *_):
            if self.trainer.global_step == 2:
                self.trainer.save_checkpoint(tmp_path / "last.ckpt")

    data = MultiViewDataModule(Noise(), batch_size=8)
    through, _ = fit(data, Saver())
    resumed, _ = fit(data, kind(), ckpt=tmp_path / "last.ckpt")
    assert_same_batches(resumed.seen, through.seen[2:])
    again, _ = fit(data, kind())
    assert_same_batches(again.seen, through.seen)


@pytest.mark.filterwarnings("ignore:You requested to overfit")
def test_overfitting_a_batch_shows_the_same_views_each_time():
    module, _ = fit(MultiViewDataModule(Noise(), batch_size=8), overfit_batches=1, limit_val_batches=0)
    assert len(module.seen) == 2
    assert_same_batches(module.seen[:1], module.seen[1:])


def write(folder, n, seed=0):
    generator = np.random.default_rng(seed)
    for k in range(n):
        at = folder / "ab"[k % 2]
        at.mkdir(parents=True, exist_ok=True)
        shape = (20 + k, 30 - k, 3)
        Image.fromarray(generator.integers(0, 256, shape, dtype=np.uint8)).save(at / f"{k}.png")


def test_a_folder_of_images_of_many_sizes(tmp_path):
    write(tmp_path / "train", 9)
    write(tmp_path / "val", 5, seed=1)
    data = MultiViewDataModule(str(tmp_path), batch_size=4, image_size=16, max_side=25)
    module, _ = fit(data, max_epochs=1)
    assert len(module.seen) == 2
    assert [len(labels) for _, labels in module.validated[-1:]] == [4]  # the fifth alone is left out
    assert [len(y) for _, y in data.probe_dataloaders()[1]] == [4, 1]
    raw = data.probe_dataloaders()[1]._raw.dataset
    x = next(iter(data.probe_dataloaders()[1]))[0] * data.std.view(3, 1, 1) + data.mean.view(3, 1, 1)
    for n in range(4):
        image = as_bytes(raw.data[n][0], channels=3, max_side=25).float() / 255
        middle = tv.center_crop(image, [min(image.shape[1:])] * 2)
        # the middle is half a pixel off where an odd number is left over
        if (image.shape[1] - image.shape[2]) % 2 == 0:
            assert torch.allclose(x[n], tv.resize(middle, [16, 16], antialias=True), atol=1e-5)


def test_corrupt_files_are_named_counted_and_limited(tmp_path):
    write(tmp_path / "train", 8)
    write(tmp_path / "val", 4)
    (tmp_path / "train" / "a" / "0.png").write_bytes(b"no image")
    (tmp_path / "val" / "b" / "1.png").write_bytes(b"")
    data = MultiViewDataModule(str(tmp_path), batch_size=8, image_size=8)
    with pytest.warns(UserWarning, match=r"skipped .*0\.png.*1 so far"):
        ((_views, labels),) = batches(data)
    assert len(labels) == 8  # the next image took its place
    with pytest.warns(UserWarning, match=r"skipped .*1\.png"):
        assert sum(len(y) for _, y in data.probe_dataloaders()[1]) == 3
    assert sorted(name[-5:] for name in data.skipped) == ["0.png", "1.png"]
    strict = MultiViewDataModule(str(tmp_path), batch_size=8, image_size=8, max_corrupt=0)
    with pytest.raises(RuntimeError, match=r"above max_corrupt=0.*0\.png"):
        batches(strict)


@pytest.mark.filterwarnings("ignore:Image size:PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("kind", ["bmp", "jpeg", "png", "tiff", "webp"])
def test_files_damaged_anywhere_are_read_or_skipped(kind, tmp_path):
    """A wrong byte in a header may ask for a picture of terabytes; that is a file to skip as well."""
    write(tmp_path / "clean", 1)
    image = Image.open(tmp_path / "clean" / "a" / "0.png")
    image.save(tmp_path / f"whole.{kind}")
    whole = (tmp_path / f"whole.{kind}").read_bytes()
    generator = np.random.default_rng(0)
    folder = tmp_path / "damaged" / "a"
    folder.mkdir(parents=True)
    for k in range(60):
        damaged = bytearray(whole)
        damaged[int(generator.integers(2, 60))] = int(generator.integers(0, 256))
        if k % 3 == 0:
            damaged = damaged[: int(generator.integers(0, len(whole)))]
        (folder / f"{k}.{kind}").write_bytes(damaged)
    data = MultiViewDataModule(tmp_path / "damaged", batch_size=4, image_size=8, val_share=0.02)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data.setup()
        images = data.train_dataloader().dataset
        images.max_corrupt = 60
        read = images.__getitems__([(0, n) for n in range(len(images))])
    assert len(read.failed) > 10
    assert len(read.labels) == len(images)


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "stl10"])
def test_named_sets_are_downloaded_in_prepare_data_only(name, monkeypatch, tmp_path):
    import torchvision

    calls = []

    class Reader(Squares):
        def __init__(self, root, *, download, train=None, split=None):
            super().__init__(20 if train in (True, None) and split != "test" else 10)
            self.split = train if split is None else split
            calls.append((self.split, download))

    monkeypatch.setattr(torchvision.datasets, name.upper(), Reader)
    data = MultiViewDataModule(name, batch_size=4, root=tmp_path)
    assert not calls
    data.prepare_data()
    assert all(fetched for _, fetched in calls)
    calls.clear()
    data.setup()
    assert not any(fetched for _, fetched in calls)
    views_of = data.train_dataloader().dataset.data.data.split
    probes_of = data.probe_dataloaders()[0]._raw.dataset.data.data.split
    assert (views_of, probes_of) == (("unlabeled", "train") if name == "stl10" else (True, True))
    assert data.drawing.size == (96 if name == "stl10" else 32)


def test_the_hub(monkeypatch):
    class Rows(Squares):
        column_names = ("img", "label")

        def __getitem__(self, index):
            image, label = super().__getitem__(index)
            return {"img": Image.fromarray(image.permute(1, 2, 0).numpy()), "label": label}

    monkeypatch.setitem(sys.modules, "datasets", None)
    data = MultiViewDataModule("someone/pictures", batch_size=4, image_size=8)
    with pytest.raises(ModuleNotFoundError, match=r"lightning-sym\[hub\]"):
        data.setup()
    fake = types.SimpleNamespace(load_dataset=lambda name: {"train": Rows(), "test": Rows(6)})
    monkeypatch.setitem(sys.modules, "datasets", fake)
    data = MultiViewDataModule("hub:pictures", batch_size=4, image_size=8)
    assert len(batches(data)) == 10
    assert sum(len(y) for _, y in data.probe_dataloaders()[1]) == 6


def test_grey_images_of_one_channel():
    data = MultiViewDataModule(batch_size=64, channels=1, recipe="vicreg")
    views, _ = batches(data)[0]
    assert views[0].shape == (64, 1, 32, 32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"views": 1}, "views must be an integer of at least 2"),
        ({"batch_size": 1}, "batch_size must be an integer of at least 2"),
        ({"source": "cifar11"}, "did you mean 'cifar10'"),
        ({"recipe": "barlowtwins"}, "did you mean 'barlow_twins'"),
        ({"recipe_options": {"huge": 0.1}}, "did you mean 'hue'"),
        ({"backend": "torch"}, "did you mean 'torchvision'"),
        ({"channels": 2}, "channels must be 1 or 3"),
        ({"val_share": 0.0}, "val_share must be"),
        ({"std": [0.0, 1.0, 1.0]}, "std must be positive"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        MultiViewDataModule(**options)


def test_bad_data(tmp_path):
    with pytest.raises(TypeError, match="map-style data set"):
        MultiViewDataModule(iter([]))
    with pytest.raises(ValueError, match=r"no images in .* or in folders of classes"):
        MultiViewDataModule(tmp_path).setup()
    (tmp_path / "a").mkdir()
    with pytest.raises(ValueError, match=r"no images in .* or in folders of classes"):
        MultiViewDataModule(tmp_path).setup()
    with pytest.raises(ValueError, match="no folder"):
        MultiViewDataModule(tmp_path / "none")
    with pytest.raises(ValueError, match="batch_size=256 on 1 rank"):
        MultiViewDataModule(Squares()).setup()


@pytest.mark.parametrize("spoil", [lambda x: x * 255, lambda x: (x - 0.5) / 0.25, lambda x: x * float("nan")])
def test_floating_images_out_of_range_are_not_clipped_in_silence(spoil):
    x = torch.rand(3, 5, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(as_bytes(x, channels=3, max_side=None), (x * 255).round().byte())
    with pytest.raises(ValueError, match=r"a floating image must be in \[0, 1\], got values from"):
        as_bytes(spoil(x), channels=3, max_side=None)


def test_no_warning_without_cause():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not MultiViewDataModule(Squares(), batch_size=4).skipped
