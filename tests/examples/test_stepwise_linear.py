"""The stepwise linear example runs, and its readers read what they say they read."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name, *arguments):
    command = [sys.executable, str(EXAMPLES / name), *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout


def test_theory_holds_on_the_digits(tmp_path):
    printed = run("stepwise_linear.py", "--smoke", "--out", tmp_path)
    result = json.loads((tmp_path / "stepwise_linear.json").read_text())
    assert result["summary"]["largest_tau_error"] < 0.05
    assert result["summary"]["gram_error"]["mean"] < 0.02
    assert (tmp_path / "stepwise_linear.png").stat().st_size > 10_000
    assert "tau measured" in printed
    assert str(tmp_path) not in json.dumps(result)


@pytest.fixture
def data(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import _data

    return _data


def test_arrays_are_read(tmp_path, data):
    x = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)
    np.savez(tmp_path / "c.npz", train_x=x, train_y=[3, 1], x_test=x[:1], y_test=[2])
    images = data.load_images(tmp_path / "c.npz")
    assert (images.x == x).all()
    assert images.y.tolist() == [3, 1]
    assert data.load_images(tmp_path / "c.npz", train=False).y.tolist() == [2]


def test_folders_are_read(tmp_path, data):
    from PIL import Image

    for label, name in enumerate(("cat", "dog")):
        (tmp_path / "train" / name).mkdir(parents=True)
        Image.new("RGB", (4, 4), (label * 100, 0, 0)).save(tmp_path / "train" / name / "one.png")
    images = data.load_images(tmp_path)
    assert images.x[:, 0, 0, 0].tolist() == [0, 100]
    assert images.y.tolist() == [0, 1]


def test_nothing_to_read_is_said(tmp_path, data):
    with pytest.raises(FileNotFoundError, match="has no images in folders of classes"):
        data.load_images(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"neither an \.npz file nor a folder"):
        data.load_images(tmp_path / "missing")


def test_splits_of_the_digits_do_not_overlap(data):
    train, test = (data.load_images(None, smoke=True, train=split) for split in (True, False))
    assert len(train.x) + len(test.x) == 1797
    assert train.x.shape[1:] == (32, 32, 3)
