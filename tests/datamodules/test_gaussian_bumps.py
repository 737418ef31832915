"""The bumps are what the formula says, the hold-out is held out, and bad input is refused."""

import math

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer

from lightning_sym.datamodules import GaussianBumpsDataModule, gaussian_bumps
from lightning_sym.datamodules._bumps import hashed_normal


def slow_image(places, size, sigma, background, amplitude):
    """Per pixel, in python floats."""
    image = torch.empty(size, size, dtype=torch.float64)
    for row in range(size):
        for col in range(size):
            value = background
            for x, y in places:
                along_x = 0.0 if math.isnan(x) else (col - x) ** 2
                along_y = 0.0 if math.isnan(y) else (row - y) ** 2
                value += amplitude * math.exp(-(along_x + along_y) / (2 * sigma**2))
            image[row, col] = value
    return image


@pytest.mark.parametrize("bumps", [1, 3])
@pytest.mark.parametrize(("background", "amplitude"), [(0.0, 1.0), (1.0, -1.0), (0.5, 2.0)])
def test_images_twin(bumps, background, amplitude):
    centers = torch.rand(5, bumps, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 8
    centers[3, 0, 0] = math.nan
    centers[4, 0, 1] = math.nan
    out = torch.full((5, 1, 9, 9), math.nan, dtype=torch.float64)
    settings = {"size": 9, "sigma": 1.7, "background": background, "amplitude": amplitude}
    got = gaussian_bumps(centers, **settings, out=out)
    assert got is out
    for n in range(5):
        torch.testing.assert_close(got[n, 0], slow_image(centers[n].tolist(), 9, 1.7, background, amplitude))
    torch.testing.assert_close(gaussian_bumps(centers, **settings), got)


def test_the_papers_numbers():
    """Counts and the blank image's error, which are facts of the released settings."""
    square = GaussianBumpsDataModule(samples=2000, ood_samples=500, encoding="bump")
    assert (len(square.train_centers), len(square.ood_centers)) == (2000, 500)
    assert square.ood_centers.min() == 6
    assert square.ood_centers.max() == 22
    assert square.blank_error == pytest.approx(math.pi / 28**2, rel=3e-4)  # 0.0040
    corner = GaussianBumpsDataModule(32, sigma=1.5, holdout="corner", polarity="bright")
    assert (len(corner.train_centers), len(corner.ood_centers)) == (624, 400)
    assert corner.ood_centers.min() == 12
    assert corner.blank_error == pytest.approx(math.pi * 1.5**2 / 32**2, rel=0.08)  # 0.0069, less at the edge


def test_batch_shapes_and_loaders_by_name():
    data = GaussianBumpsDataModule(8, batch_size=5)
    code, image = next(iter(data.train_dataloader()))
    assert (code.shape, image.shape) == ((5, 16), (5, 1, 8, 8))
    assert code.dtype == image.dtype == torch.float32
    assert data.code_length == 16
    by_name = dict(zip(data.val_names, data.val_dataloader(), strict=True))
    for name, centers in (("id", data.id_centers), ("ood", data.ood_centers)):
        drawn = torch.cat([image for _, image in by_name[name]])
        torch.testing.assert_close(drawn, data.render(centers))
    with pytest.raises(ValueError, match="name"):
        data.loader("valid")


@pytest.mark.parametrize("centers", ["grid", "continuous"])
@pytest.mark.parametrize(
    ("holdout", "extent"),
    [
        ("center", None),
        ("center", 3),
        ("corner", 5),
        ("random", 0.3),
        (lambda x, y: (x - y).abs() < 2, None),
    ],
)
@pytest.mark.parametrize("bumps", [1, 2])
def test_nothing_held_out_is_trained_on(centers, holdout, extent, bumps):
    data = GaussianBumpsDataModule(
        10,
        holdout=holdout,
        holdout_size=extent,
        centers=centers,
        encoding="bump",
        bumps=bumps,
        ood_samples=200,
    )
    for chosen, out in ((data.train_centers, False), (data.id_centers, False), (data.ood_centers, True)):
        x, y = chosen.unbind(-1)
        assert (data.held_out(x, y) == out).all()
        assert chosen.min() >= 0
        assert chosen.max() <= 9


def test_squares_are_where_they_are_said_to_be():
    for holdout, side, low in (("center", 4, 3), ("corner", 4, 6)):
        data = GaussianBumpsDataModule(10, holdout=holdout, holdout_size=side)
        slow = {
            (x, y) for x in range(10) for y in range(10) if low <= x < low + side and low <= y < low + side
        }
        assert {tuple(map(int, c)) for c in data.ood_centers[:, 0].tolist()} == slow
        assert len(data.train_centers) == 100 - len(slow)


def test_random_holdout_takes_the_share_asked_for_and_depends_on_the_seed():
    sets = [
        {
            tuple(c)
            for c in GaussianBumpsDataModule(10, holdout="random", holdout_size=0.3, seed=s)
            .ood_centers[:, 0]
            .tolist()
        }
        for s in (0, 0, 1)
    ]
    assert len(sets[0]) == 30
    assert sets[0] == sets[1] != sets[2]


def test_codes():
    places = torch.tensor([[2.0, 0.0], [1.0, 3.0]])
    codes = {
        e: GaussianBumpsDataModule(4, encoding=e).encode(places)
        for e in ("scalar", "ramp", "bump", "one_hot")
    }
    assert codes["scalar"].tolist() == [[2, 0], [1, 3]]
    assert codes["ramp"].tolist() == [[1, 1, 1, 0, 1, 0, 0, 0], [1, 1, 0, 0, 1, 1, 1, 1]]
    assert codes["one_hot"].tolist() == [[0, 0, 1, 0, 1, 0, 0, 0], [0, 1, 0, 0, 0, 0, 0, 1]]
    for n, (x, y) in enumerate(places.tolist()):
        slow = [math.exp(-((i - c) ** 2) / 2) for c in (x, y) for i in range(4)]
        assert codes["bump"][n].tolist() == pytest.approx(slow)
    between = GaussianBumpsDataModule(4, encoding="ramp", centers="continuous")
    assert between.encode(torch.tensor([[1.25, 0.0]]))[0, :4].tolist() == [1, 1, 0.25, 0]
    absent = torch.tensor([[math.nan, 1.0]])
    for encoding in ("ramp", "bump", "one_hot"):
        code = GaussianBumpsDataModule(4, encoding=encoding).encode(absent)
        assert code[0, :4].abs().max() == 0
        assert code[0, 4:].abs().max() > 0


def test_distinct_centres_have_distinct_codes():
    for encoding in ("scalar", "ramp", "bump", "one_hot"):
        data = GaussianBumpsDataModule(7, encoding=encoding)
        codes = data.encode(torch.cat([data.id_centers, data.ood_centers]))
        assert len(codes.unique(dim=0)) == 49


@pytest.mark.parametrize("centers", ["grid", "continuous"])
def test_stripes_depend_on_one_coordinate_and_cover_all(centers):
    data = GaussianBumpsDataModule(8, stripes=16, samples=3, centers=centers, encoding="bump")
    assert len(data.train_centers) == 19
    stripes = data.train_centers[3:, 0]
    assert stripes.isnan().sum(0).tolist() == [8, 8]
    images = data.render(stripes[:, None])[:, 0]
    for stripe, image in zip(stripes, images, strict=True):
        along = 0 if stripe[0].isnan() else 1  # the image must not change along the absent coordinate
        assert image.std(dim=1 - along).max() < 1e-6
        assert image.std(dim=along).max() > 0.1
    for column in range(2):
        seen = stripes[:, column][~stripes[:, column].isnan()].sort().values
        if centers == "grid":
            assert seen.tolist() == list(range(8))
        else:  # one in each eighth
            assert (seen * 8 / 7).floor().tolist() == list(range(8))


def test_several_bumps_concatenate_codes_and_add_images():
    data = GaussianBumpsDataModule(8, bumps=2, encoding="bump", ood_samples=4, samples=6)
    code, image = next(iter(data.loader("ood")))
    assert code.shape == (4, 32)
    one = GaussianBumpsDataModule(8, encoding="bump")
    parts = [one.render(data.ood_centers[:, k]) - 1 for k in range(2)]
    torch.testing.assert_close(image, 1 + parts[0] + parts[1])
    torch.testing.assert_close(code[:, :16], one.encode(data.ood_centers[:, 0]))


def test_label_noise_is_the_samples_own():
    data = GaussianBumpsDataModule(8, label_noise=0.1, batch_size=64, seed=3)
    clean = data.render(data.train_centers)

    def by_sample(loader):
        batches = list(loader)
        codes, images = (torch.cat(parts) for parts in zip(*batches, strict=True))
        order = codes @ (2.0 ** torch.arange(16))
        return images[order.argsort()]

    loader = data.train_dataloader()
    first, second = by_sample(loader), by_sample(loader)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    noise = torch.cat([image for _, image in data.loader("train")]).var() - clean.var()
    assert noise.item() == pytest.approx(0.01, rel=0.2)
    assert torch.equal(next(iter(data.loader("id")))[1], data.render(data.id_centers)[:64])


def test_hashed_normal_is_normal_and_uncorrelated():
    draws = hashed_normal(torch.arange(4000), 51, seed=7).double()
    assert draws.shape == (4000, 51)
    assert abs(draws.mean().item()) < 0.01
    assert draws.var().item() == pytest.approx(1, abs=0.02)
    assert draws.pow(4).mean().item() == pytest.approx(3, abs=0.1)
    correlation = torch.corrcoef(draws.T) - torch.eye(51)
    assert correlation.abs().max() < 0.08
    neighbours = torch.corrcoef(torch.stack([draws[:-1, 0], draws[1:, 0]]))[0, 1]
    assert neighbours.abs() < 0.06
    torch.testing.assert_close(hashed_normal(torch.tensor([5]), 51, seed=7)[0].double(), draws[5])
    assert not torch.equal(hashed_normal(torch.tensor([5]), 51, seed=8)[0].double(), draws[5])


def test_same_seed_same_data_and_workers_agree():
    def images(workers, seed=0):
        data = GaussianBumpsDataModule(8, label_noise=0.2, seed=seed, num_workers=workers, samples=40)
        return torch.cat([image for _, image in data.train_dataloader()])

    alone = images(0)
    assert torch.equal(alone, images(0))
    assert torch.equal(alone, images(2))
    assert not torch.equal(alone, images(0, seed=1))


def test_the_global_generator_is_left_alone():
    before = torch.get_rng_state()
    data = GaussianBumpsDataModule(8, holdout="random", label_noise=0.1, samples=20)
    for name in ("train", "id", "ood"):
        list(data.loader(name))
    assert torch.equal(before, torch.get_rng_state())


class Recorder(LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.places = []

    def training_step(self, batch, batch_idx):
        self.places += batch[0].argmax(1).tolist()
        return (batch[1] * self.weight).sum()

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def on_train_epoch_end(self):
        mine = torch.tensor(self.places)
        both = self.all_gather(mine).flatten().tolist() if self.trainer.world_size > 1 else mine.tolist()
        if sorted(both) != sorted(self.expected):
            raise RuntimeError(f"ranks saw {sorted(both)}, not {sorted(self.expected)}")


@pytest.mark.parametrize("devices", [1, 2])
def test_ranks_share_an_epoch(devices, tmp_path):
    data = GaussianBumpsDataModule(6, batch_size=4, holdout_size=4)
    module = Recorder()
    module.expected = data.encode(data.train_centers).argmax(1).tolist()
    assert len(module.expected) % 2 == 0
    Trainer(
        accelerator="cpu",
        devices=devices,
        strategy="ddp_fork" if devices > 1 else "auto",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    ).fit(module, datamodule=data)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"sigma": 0.0}, "sigma must be a positive"),
        ({"sigma": math.nan}, "sigma must be a positive"),
        ({"size": 0}, "size must be"),
        ({"encoding": "binary"}, "encoding must be one of"),
        ({"polarity": "grey"}, "polarity must be one of"),
        ({"encoding": "one_hot", "centers": "continuous"}, "can't represent continuous"),
        ({"encoding": "bump", "centers": "continuous", "code_sigma": 0.1}, "too narrow"),
        ({"encoding": "scalar", "stripes": 8}, "can't leave a coordinate out"),
        ({"holdout": "middle"}, "holdout must be one of"),
        ({"holdout_size": 10}, "nothing is left to train"),
        ({"holdout_size": 0}, "nothing is left to test"),
        ({"holdout": "random", "holdout_size": 1.0}, "fraction"),
        ({"holdout": "random", "holdout_size": 0.001}, "nothing to test"),
        ({"holdout": lambda x, y: x < 99}, "nothing to train on"),
        ({"holdout": lambda x, y: x > 99}, "nothing to test"),
        ({"holdout": lambda x, y: x}, "predicate that returns a bool"),
        ({"holdout": lambda x, y: x > 5, "holdout_size": 3}, "not for a predicate"),
        ({"samples": 0}, "nothing to train on"),
        ({"stripes": 4, "bumps": 2}, "one bump"),
        ({"label_noise": -1.0}, "label_noise"),
        ({"batch_size": 0}, "batch_size"),
        ({"device": "meta", "num_workers": 1}, "num_workers must be 0"),
    ],
)
def test_bad_input_is_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        GaussianBumpsDataModule(**{"size": 10, **settings})


def test_wrong_types_are_refused():
    with pytest.raises(TypeError, match="holdout must be"):
        GaussianBumpsDataModule(10, holdout=3)
    with pytest.raises(TypeError, match="number of pixels"):
        GaussianBumpsDataModule(10, holdout_size=0.5)


def test_off_grid_and_misshaped_centres_are_refused():
    data = GaussianBumpsDataModule(10)
    with pytest.raises(ValueError, match="represents the pixels"):
        data.encode(torch.tensor([[0.5, 2.0]]))
    with pytest.raises(ValueError, match=r"\[N, 2\]"):
        data.encode(torch.zeros(3))
    with pytest.raises(ValueError, match="floating point"):
        gaussian_bumps(torch.zeros(3, 2, dtype=torch.int64), size=4)
    with pytest.raises(ValueError, match="out must be"):
        gaussian_bumps(torch.zeros(3, 2), size=4, out=torch.zeros(3, 4, 4))
    with pytest.raises(ValueError, match="sigma"):
        gaussian_bumps(torch.zeros(3, 2), size=4, sigma=0)
