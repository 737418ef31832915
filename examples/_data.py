"""Images for the examples: CIFAR-10 from wherever it lies, or scikit-learn's digits for a smoke run."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np

NPZ_NAMES = {
    True: (("train_x", "train_y"), ("x_train", "y_train"), ("train_images", "train_labels")),
    False: (("test_x", "test_y"), ("x_test", "y_test"), ("test_images", "test_labels")),
}


@dataclass(frozen=True)
class Images:
    """Images as they lie in memory.

    Args:
        x: ``uint8 [N, H, W, 3]``.
        y: labels, ``int64 [N]``.
        name: what they are, for the record.
    """

    x: np.ndarray
    y: np.ndarray
    name: str

    def take(self, count: int, *, seed: int) -> Images:
        """Return ``count`` images drawn without replacement (all of them if there are fewer)."""
        index = np.random.default_rng(seed).permutation(len(self.x))[:count]
        return Images(self.x[index], self.y[index], self.name)


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``--data`` and ``--smoke``."""
    parser.add_argument(
        "--data",
        type=Path,
        default=None,
        help="CIFAR-10: an .npz with train and test arrays, a torchvision root or an image folder with "
        "train/ and test/; by default torchvision downloads it to ./data",
    )
    parser.add_argument("--smoke", action="store_true", help="seconds, on scikit-learn's digits, no download")


def load_images(data: Path | None, *, smoke: bool = False, train: bool = True) -> Images:
    """Return CIFAR-10 (or the digits at 32 x 32) as arrays.

    Args:
        data: where CIFAR-10 lies, see :func:`add_data_arguments`.
        smoke: the digits instead; a tenth of them is the test split.
        train: the training split, else the test split.

    Raises:
        FileNotFoundError: if there is nothing readable at ``data``.
    """
    if smoke:
        return _digits(train)
    if data is None or (data.is_dir() and (data / "cifar-10-batches-py").is_dir()):
        from torchvision.datasets import CIFAR10

        stored = CIFAR10(data or "data", train=train, download=data is None)
        return Images(np.asarray(stored.data), np.asarray(stored.targets, dtype=np.int64), "CIFAR-10")
    if data.is_file() and data.suffix == ".npz":
        with np.load(data, allow_pickle=False) as arrays:
            for x, y in NPZ_NAMES[train]:
                if x in arrays:
                    images = np.asarray(arrays[x], dtype=np.uint8)
                    return Images(images, np.asarray(arrays[y], dtype=np.int64).ravel(), "CIFAR-10")
            raise FileNotFoundError(f"--data {data} holds {arrays.files}, none of {NPZ_NAMES[train]}")
    if data.is_dir():
        return _folder(data, train)
    raise FileNotFoundError(f"--data {data} is neither an .npz file nor a folder")


def _folder(root: Path, train: bool) -> Images:
    from PIL import Image

    names = ("train",) if train else ("test", "val")
    split = next((root / name for name in names if (root / name).is_dir()), root)
    classes = sorted(path for path in split.iterdir() if path.is_dir())
    files = [
        (path, label) for label, folder in enumerate(classes) for path in sorted(folder.glob("*.[pj]*g"))
    ]
    if not files:
        raise FileNotFoundError(f"--data {root} has no images in folders of classes")
    x = np.stack([np.asarray(Image.open(path).convert("RGB")) for path, _ in files])
    return Images(x, np.array([label for _, label in files], dtype=np.int64), root.name)


def _digits(train: bool) -> Images:
    from sklearn.datasets import load_digits

    digits = load_digits()
    test = np.arange(len(digits.target)) % 10 == 0
    kept = ~test if train else test
    x = (digits.images[kept] * (255 / 16)).astype(np.uint8).repeat(4, axis=1).repeat(4, axis=2)
    return Images(x[..., None].repeat(3, axis=3), digits.target[kept].astype(np.int64), "digits")
