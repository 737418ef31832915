"""Folders of images: splits and classes are told apart, and numbered alike in both splits."""

import warnings

import pytest
import torch
from PIL import Image
from torch.utils.data import Subset
from torchvision.datasets import ImageFolder

from lightning_sym.datamodules import MultiViewDataModule
from lightning_sym.datamodules._classes import Rows, draw_by_class, with_numbers_of
from lightning_sym.datamodules._folders import open_folders

COLOURS = {"ant": (255, 0, 0), "bee": (0, 255, 0), "cat": (0, 0, 255)}


def fill(root, tree, n=6):
    """Write n images into each folder; its last part tells the colour."""
    for name in tree:
        folder = root / name
        folder.mkdir(parents=True, exist_ok=True)
        colour = COLOURS.get(folder.name.lower(), (9, 9, 9))
        for k in range(n):
            Image.new("RGB", (8, 8), tuple(max(0, c - k) for c in colour)).save(folder / f"{k}.png")


def labels_by_colour(data):
    """For train and val: each class's labels, found by its colour."""
    found = []
    for loader in data.probe_dataloaders():
        batches = [(x.mean((2, 3)).argmax(1), y) for x, y in loader]
        bright, labels = (torch.cat(part) for part in zip(*batches, strict=True))
        found.append([sorted(set(labels[bright == k].tolist())) for k in range(3)])
    return found


def module(root, **options):
    plain = {"image_size": 8, "batch_size": 4, "mean": (0,) * 3, "std": (1,) * 3}
    return MultiViewDataModule(root, **{**plain, **options})


def both(*classes, splits=("train", "val")):
    return [f"{split}/{name}" for split in splits for name in classes]


NAMES = [
    ("train", "val"),
    ("train", "valid"),
    ("train", "validation"),
    ("train", "test"),
    ("training", "testing"),
    ("Train", "Val"),
    ("TRAINING", "Test"),
]


@pytest.mark.parametrize("splits", NAMES, ids="-".join)
def test_split_folders_by_any_usual_name(splits, tmp_path):
    fill(tmp_path, both(*COLOURS, splits=splits))
    train, val = open_folders(tmp_path)
    assert (len(train), len(val)) == (18, 18)
    assert train.classes == val.classes == ["ant", "bee", "cat"]


def test_the_validation_split_goes_before_the_test_split(tmp_path):
    fill(tmp_path, both(*COLOURS, splits=("train", "test")))
    fill(tmp_path, both(*COLOURS, splits=("val",)), n=2)
    assert len(open_folders(tmp_path)[1]) == 6


def test_a_split_of_an_unknown_name_is_told_of():
    rows = [(torch.zeros(3, 8, 8, dtype=torch.uint8), k % 2) for k in range(20)]
    with pytest.warns(UserWarning, match=r"of the splits \['dev', 'train'\] only 'train' is used"):
        module({"train": rows, "dev": rows}).setup()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module({"train": rows, "dev": rows}, val_source=rows).setup()
        module({"train": rows, "test": rows}).setup()


@pytest.mark.parametrize(
    "hidden",
    ["train/.ipynb_checkpoints", "val/.ipynb_checkpoints", ".cache", "val/__MACOSX/x", "train/@eaDir"],
)
def test_hidden_files_and_folders_are_not_seen(hidden, tmp_path):
    fill(tmp_path, both(*COLOURS))
    fill(tmp_path, [hidden])
    for name in ("train/._0.png", "train/ant/._0.png", "val/bee/.DS_Store", ".0.png", "train/ant/notes.txt"):
        (tmp_path / name).write_bytes(b"nothing")
    (tmp_path / "train" / "empty").mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = module(tmp_path)
        assert labels_by_colour(data) == [[[0], [1], [2]]] * 2
    assert [len(rows) for rows in open_folders(tmp_path)] == [18, 18]
    assert not data.skipped


def test_images_of_any_suffix_and_depth_and_links_in_a_circle(tmp_path):
    fill(tmp_path, ["ant/deep/er", "bee"])
    Image.new("RGB", (8, 8)).save(tmp_path / "bee" / "A.JPG")
    Image.new("P", (8, 8)).save(tmp_path / "bee" / "b.gif")
    (tmp_path / "bee" / "circle").symlink_to(tmp_path, target_is_directory=True)
    linked = tmp_path / "cat"
    linked.symlink_to(tmp_path / "ant", target_is_directory=True)
    train, val = open_folders(tmp_path)
    assert val is None
    counts = [train.targets.count(k) for k in range(3)]
    assert (counts[0], counts[2]) == (6, 6)
    assert sum(path.endswith((".JPG", ".gif")) for path, _ in train.samples) == 2


@pytest.mark.parametrize("missing", ["ant", "bee"])
def test_a_class_the_held_out_images_lack_moves_no_number(missing, tmp_path):
    fill(tmp_path, [name for name in both(*COLOURS) if name != f"val/{missing}"])
    with pytest.warns(UserWarning, match=f"no held-out image is of the class '{missing}'"):
        found = labels_by_colour(module(tmp_path))
    expected = [[0], [1], [2]]
    assert found[0] == expected
    assert found[1] == [
        [] if name == missing else number for name, number in zip(COLOURS, expected, strict=True)
    ]


@pytest.mark.parametrize("source", ["folder", "val_source", "image folders", "subsets", "splits"])
def test_a_class_the_training_images_lack_is_an_error_that_names_it(source, tmp_path):
    fill(tmp_path, ["train/ant", "train/bee", "train/Cat", "val/ant", "val/bee", "val/cat"])
    train, val = (ImageFolder(str(tmp_path / split)) for split in ("train", "val"))
    options = {
        "folder": {"root": tmp_path},
        "val_source": {"root": tmp_path / "train", "val_source": tmp_path / "val"},
        "image folders": {"root": train, "val_source": val},
        "subsets": {"root": Subset(train, range(len(train))), "val_source": Subset(val, range(len(val)))},
        "splits": {"root": {"train": train, "val": val}},
    }[source]
    with pytest.raises(ValueError, match=r"classes that training images lack: 'cat'; they lack 'Cat'"):
        module(**options).setup()


def test_data_sets_with_names_in_another_order_are_matched_by_name(tmp_path):
    fill(tmp_path, both(*COLOURS))
    train, val = (ImageFolder(str(tmp_path / split)) for split in ("train", "val"))
    val.classes = ["cat", "ant", "bee"]
    val.samples = [(path, {0: 1, 1: 2, 2: 0}[label]) for path, label in val.samples]
    val.targets = [label for _, label in val.samples]
    assert labels_by_colour(module(train, val_source=val)) == [[[0], [1], [2]]] * 2
    other = Subset(val, [7, 13, 0])
    rows = with_numbers_of(Rows(train), Rows(other))
    assert rows.labels().tolist() == [rows[k][1] for k in range(3)] == [1, 2, 0]
    assert rows.take([2]).labels().tolist() == [0]


def test_the_hubs_class_names_are_matched(tmp_path):
    class Names:
        def __init__(self, names):
            self.names = names

    class Hub:
        column_names = ("image", "label")

        def __init__(self, names):
            self.names, self.features = names, {"image": None, "label": Names(names)}

        def __len__(self):
            return 12

        def __getitem__(self, index):
            if index == "label":
                return [k % 3 for k in range(12)]
            return {"image": Image.new("RGB", (8, 8), COLOURS[self.names[index % 3]]), "label": index % 3}

    splits = {"train": Hub(["bee", "cat", "ant"]), "test": Hub(["ant", "bee", "cat"])}
    assert labels_by_colour(module(splits)) == [[[2], [0], [1]]] * 2
    with pytest.raises(ValueError, match="classes that training images lack: 'cat'"):
        module({"train": Hub(["ant", "bee", "bee"]), "test": splits["test"]}).setup()


def test_a_flat_folder_is_a_set_without_labels(tmp_path):
    fill(tmp_path, ["."])
    data = module(tmp_path)
    data.setup()
    assert data.drawing.size == 8
    with pytest.raises(ValueError, match="none of the 5 images is labelled"):
        data.probe_dataloaders()


def test_flat_splits(tmp_path):
    fill(tmp_path, ["train", "test"])
    train, val = open_folders(tmp_path)
    assert set(train.targets) == set(val.targets) == {-1}


def test_a_test_folder_without_classes_is_left_out_with_a_word(tmp_path):
    fill(tmp_path, ["train/ant", "train/bee", "test"])
    with pytest.warns(UserWarning, match="has no class folders, as .*train has, and is left out"):
        train, val = open_folders(tmp_path)
    assert (len(train), val) == (12, None)


def test_images_beside_class_folders_are_counted(tmp_path):
    fill(tmp_path, [".", "ant", "bee"])
    with pytest.warns(
        UserWarning, match="6 images lie in .* itself, beside folders of classes: they are left out"
    ):
        assert open_folders(tmp_path)[0].classes == ["ant", "bee"]


def test_a_class_named_train(tmp_path):
    fill(tmp_path, ["car", "plane", "train"])
    with pytest.warns(
        UserWarning, match="'train' in .* beside the classes 'car', 'plane': it is taken for a class"
    ):
        train, val = open_folders(tmp_path)
    assert (train.classes, val) == (["car", "plane", "train"], None)
    (tmp_path / "all").mkdir()
    fill(tmp_path / "all", both("car", "plane", "train"))
    assert [rows.classes for rows in open_folders(tmp_path / "all")] == [["car", "plane", "train"]] * 2


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (["train/steam", "train/diesel", "car/red"], "'train' in .* may be splits .* or classes"),
        (["train/a", "training/a", "val/a"], "'train', 'training', 'val', two folders of training"),
        (["val/a", "val/b"], "'val', no folders of training images; name one of them 'train' or"),
        (["trainset/a", "trainset/b", "testset/a"], "'testset' in .* looks like a split of class folders"),
        (["cifar-train/a", "cifar-train/b", "x/a"], "'cifar-train' in .* looks like a split"),
        (["pets/train/a", "pets/val/a"], "holds no splits itself, but .*pets does; give that folder"),
        ([], "no images in .* or in folders of classes below it"),
    ],
    ids=str,
)  # fmt: skip
def test_folders_that_could_be_either_are_refused(tree, message, tmp_path):
    fill(tmp_path, tree)
    with pytest.raises(ValueError, match=message):
        open_folders(tmp_path)


def test_draws_give_every_class_its_share():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 5, (203,), generator=generator).square()
    labels[:9] = -1
    for count in (1, 7, 20, 101, 203):
        drawn = draw_by_class(labels, size=203, count=count, seed=1)
        assert len(drawn.unique()) == count
        assert torch.equal(drawn, drawn.sort().values)
        for label in labels.unique():
            share = count / 203 * int((labels == label).sum())
            assert abs(int((labels[drawn] == label).sum()) - share) <= 1, (count, label)
    again, other = (draw_by_class(labels, size=203, count=20, seed=seed) for seed in (1, 2))
    assert torch.equal(again, draw_by_class(labels, size=203, count=20, seed=1))
    assert not torch.equal(again, other)
    assert len(draw_by_class(None, size=10, count=4, seed=0)) == 4


@pytest.mark.parametrize("subset", [40, 0.2])
def test_subsets_and_held_out_shares_are_drawn_by_class(subset):
    counts = torch.tensor([100, 60, 40, 20])
    labels = torch.arange(4).repeat_interleave(counts).tolist()
    rows = [(torch.full((3, 8, 8), k % 256, dtype=torch.uint8), label) for k, label in enumerate(labels)]
    data = module(rows, val_share=1 / 11, subset=subset)
    train, val = (torch.cat([y for _, y in loader]).bincount() for loader in data.probe_dataloaders())
    assert [int(n) for n in val] == [9, 5, 4, 2]
    share = (40 / 200 if subset == 40 else 0.2) * (counts - val)
    assert bool(((train - share).abs() <= 1).all())
    assert int(train.sum()) == 40
    assert len(data._splits.train) == 40
    with pytest.raises(ValueError, match=r"subset must be a positive number .* below 1, got 1\.5"):
        module(rows, subset=1.5)
