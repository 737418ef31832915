"""Rows of any shape: image and label are found, or the row is refused with a sentence."""

import collections
import dataclasses

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule
from PIL import Image
from torch.utils.data import IterableDataset, Subset, TensorDataset

from lightning_sym.datamodules import MultiViewDataModule
from lightning_sym.datamodules._rows import UNLABELLED, RowError, class_number, known_labels, unpack
from tests.models import trainer

IMAGE = torch.full((3, 4, 4), 7, dtype=torch.uint8)
Swapped = collections.namedtuple("Swapped", ["label", "image"])
Unknown = collections.namedtuple("Unknown", ["first", "second"])


@dataclasses.dataclass
class Record:
    target: int
    img: object


ROWS = [
    (IMAGE, 3),
    [IMAGE, 3],
    (IMAGE, 3, "a.png"),
    (IMAGE, np.int64(3), {"path": "a"}, 9),
    (IMAGE, torch.tensor(3)),
    (IMAGE, torch.tensor([3])),
    (IMAGE, 3.0),
    {"image": IMAGE, "label": 3},
    {"label": 3, "image": IMAGE, "id": 8},
    {"img": IMAGE, "fine_label": 3, "coarse_label": 1},
    {"photo": IMAGE, "target": np.array(3)},
    {"scan": IMAGE, "label": 3},  # the only image there is
    Swapped(3, IMAGE),
    Unknown(IMAGE, 3),
    Record(3, IMAGE),
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: type(row).__name__)
def test_rows_with_labels(row):
    image, label = unpack(row)
    assert image is IMAGE
    assert label == 3
    assert type(label) is int


@pytest.mark.parametrize(
    "row",
    [IMAGE, (IMAGE,), {"image": IMAGE}, (IMAGE, None), (IMAGE, -1), (IMAGE, -100), (IMAGE, float("nan"))],
    ids=str,
)
def test_rows_without_labels(row):
    assert unpack(row) == (IMAGE, UNLABELLED)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ((IMAGE, "cat"), r"\(image, label\) with a whole number for a label, got 'cat'.*give classes"),
        ((IMAGE, 0.5), "whole number for a label, got 0.5"),
        ((IMAGE, float("inf")), "whole number for a label, got inf"),
        ((IMAGE, torch.tensor([0, 1, 0])), r"whole number for a label, got a Tensor of shape \(3,\)"),
        ((IMAGE, IMAGE, 3), r"whole number for a label, .*\(3, 4, 4\) in the row \(Tensor, Tensor, int\)"),
        ((3, IMAGE), r"\(image, label\), the image first, got \(int, Tensor\)"),
        ((), r"must be \(image, label\)"),
        (None, r"must be \(image, label\).*got None"),
        ({"image": IMAGE, "species": 3}, r"mapping \(dict\) of \['image', 'species'\]: say which"),
        ({"a": IMAGE, "b": IMAGE, "label": 3}, "say which are image and label by columns="),
    ],
    ids=str,
)  # fmt: skip
def test_rows_that_are_refused(row, message):
    with pytest.raises(RowError, match=message):
        unpack(row)


def test_columns_name_the_parts():
    row = {"image": IMAGE, "species": 3, "label": 5}
    assert unpack(row, ("image", "species")) == (IMAGE, 3)
    assert unpack(row, ("image", None)) == (IMAGE, UNLABELLED)
    with pytest.raises(RowError, match=r"columns=\('picture', 'label'\) names no part of a row, which has"):
        unpack(row, ("picture", "label"))
    with pytest.raises(RowError, match="rows that have names"):
        unpack((IMAGE, 3), ("image", "label"))
    with pytest.raises(ValueError, match="columns must be the two names"):
        MultiViewDataModule(columns=("image",))


class Reader:
    """A data set that counts how often it is read."""

    def __init__(self, rows, **attributes):
        self.rows, self.reads = rows, 0
        vars(self).update(attributes)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        self.reads += 1
        return self.rows[index]


def test_labels_are_told_without_reading_where_that_can_be():
    rows = [(IMAGE, k % 3) for k in range(12)]
    expected = [k % 3 for k in range(12)]
    for name in ("targets", "labels"):
        reader = Reader(rows, **{name: np.array(expected)})
        assert known_labels(reader, columns=None, most=0).tolist() == expected
        part = Subset(reader, [5, 4, 0])
        assert known_labels(part, columns=None, most=0).tolist() == [2, 1, 0]
        assert reader.reads == 0
    tensors = TensorDataset(torch.zeros(12, 3, 4, 4), torch.tensor(expected))
    assert known_labels(tensors, columns=None, most=0).tolist() == expected
    assert known_labels(TensorDataset(torch.zeros(2, 3, 4, 4)), columns=None, most=0).tolist() == [-1, -1]
    assert known_labels(Reader(rows), columns=None, most=12).tolist() == expected
    assert known_labels(Reader(rows), columns=None, most=11) is None
    other = Reader(rows, targets=["a"] * 12)  # of that name, of another meaning
    assert known_labels(other, columns=None, most=12).tolist() == expected
    mapped = Reader(rows, targets=[9] * 12, target_transform=abs)  # what is stored is not what rows say
    assert known_labels(mapped, columns=None, most=12).tolist() == expected
    assert class_number(True) == 1


class Net(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3, 3)
        self.seen = []

    def training_step(self, batch):
        self.seen.append(batch)
        return self.layer(batch[0][0].mean((2, 3))).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def fit(data):
    module = Net()
    trainer(limit_val_batches=0).fit(module, datamodule=data)
    return module


@pytest.mark.parametrize("backend", ["batched", "torchvision"])
@pytest.mark.parametrize("kind", range(len(ROWS)), ids=lambda k: type(ROWS[k]).__name__)
def test_fits_on_rows_of_any_shape(kind, backend):
    module = fit(MultiViewDataModule([ROWS[kind]] * 20, image_size=8, batch_size=8, backend=backend))
    assert [labels.tolist() for _, labels in module.seen] == [[3] * 8] * 2


@pytest.mark.parametrize("count", [40, 300])
def test_a_row_that_is_not_understood_is_no_damaged_file(count):
    rows = [(IMAGE, "cat")] * count
    with pytest.raises(ValueError, match=r"source, sample 0: a row must be \(image, label\)"):
        MultiViewDataModule(rows, image_size=8, batch_size=8).setup()
    late = [(IMAGE, 1)] * (count - 1) + [("a", "b", "c")]
    data = MultiViewDataModule(late, image_size=8, batch_size=8, val_source=[(IMAGE, 0)] * 4, val_share=0.1)
    with pytest.raises(ValueError, match=f"sample {count - 1}: a row must be"):
        fit(data)
    assert not data.skipped


@pytest.mark.parametrize("count", [40, 300])
def test_images_none_of_which_can_be_used_are_told_of_before_training(count):
    rows = [(torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(k)), 0) for k in range(count)]
    with pytest.raises(ValueError, match=r"none of .* images tried can be used: sample .* in \[0, 1\]"):
        MultiViewDataModule(rows, image_size=8, batch_size=8).setup()


def test_images_that_all_fail_later_are_told_of_by_their_reasons():
    images = MultiViewDataModule([(IMAGE, 0)] * 40, image_size=8, batch_size=8)
    images.setup()
    loader = images.train_dataloader()
    loader.dataset.data.data[:] = [(IMAGE.float(), 0)] * 40
    with pytest.raises(RuntimeError, match=r"none of the 36 images can be used: sample .* in \[0, 1\]"):
        next(iter(loader))


def test_a_first_image_that_is_damaged_does_not_decide_the_size():
    rows = [(IMAGE.float(), 0), *[(torch.zeros(3, 6, 9, dtype=torch.uint8), 0)] * 20]
    data = MultiViewDataModule(rows, batch_size=4)
    data.setup()
    assert data.drawing.size == 9


def test_images_alone_are_trained_on_and_not_probed():
    data = MultiViewDataModule(torch.rand(30, 3, 8, 8), batch_size=8, image_size=8)
    assert [labels.tolist() for _, labels in fit(data).seen] == [[-1] * 8] * 3
    with pytest.raises(ValueError, match="none of the 27 images is labelled"):
        data.probe_dataloaders()


@pytest.mark.parametrize("known", [True, False])
def test_unlabelled_images_are_not_probed(known, monkeypatch):
    from lightning_sym.datamodules import _classes

    monkeypatch.setattr(_classes, "READ_THROUGH", 10**6 if known else 0)
    rows = [(torch.full((3, 8, 8), k, dtype=torch.uint8), (-100, -1, 0, 1)[k % 4]) for k in range(60)]
    data = MultiViewDataModule(rows, batch_size=8, image_size=8, mean=(0,) * 3, std=(1,) * 3)
    seen = {}
    for loader in data.probe_dataloaders():
        for x, y in loader:
            numbers = (x[:, 0, 0, 0] * 255).round().long().tolist()
            seen |= dict(zip(numbers, y.tolist(), strict=True))
    assert seen == {k: label for k, (_, label) in enumerate(rows) if label >= 0}
    assert {int(label) for _, labels in fit(data).seen for label in labels} == {-1, 0, 1}


def test_a_mapping_of_splits_and_what_is_no_source():
    splits = {"train": [(IMAGE, 0)] * 20, "validation": [(IMAGE, 0)] * 6, "test": [(IMAGE, 0)] * 3}
    data = MultiViewDataModule(splits, batch_size=4)
    assert [sum(len(y) for _, y in loader) for loader in data.probe_dataloaders()] == [20, 6]
    with pytest.raises(ValueError, match=r"must have a split 'train', a data set, got \['fit'\]"):
        MultiViewDataModule({"fit": [(IMAGE, 0)]})

    class Stream(IterableDataset):
        def __len__(self):
            return 3

        def __iter__(self):
            return iter([(IMAGE, 0)])

    with pytest.raises(TypeError, match="map-style data set"):
        MultiViewDataModule(Stream())


def test_pictures_of_pil_in_a_list():
    rows = [
        {"image": Image.new(mode, (8, 8)), "label": k % 2}
        for k, mode in enumerate(["L", "RGB", "P", "CMYK"] * 5)
    ]
    assert len(fit(MultiViewDataModule(rows, image_size=8, batch_size=8)).seen) == 2
