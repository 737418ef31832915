"""The self-supervised examples run on the digits, and leave what they say they leave."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name, tmp_path):
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), "--smoke", "--out", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=240)
    assert (tmp_path / f"{name}.png").stat().st_size > 5_000
    text = (tmp_path / f"{name}.json").read_text()
    assert str(tmp_path) not in text
    return json.loads(text)


def test_pretraining_is_judged_before_and_after(tmp_path):
    result = run("ssl_pretrain", tmp_path)
    (only,) = result["runs"]
    assert only["steps"] == 16
    assert only["at_step"] == [0, 8, 16]
    assert all(0.3 < accuracy <= 1 for accuracy in only["knn"] + only["linear"])
    assert result["summary"]["knn"]["untrained"]["mean"] == only["knn"][0]


def test_the_staircase_of_three_losses_is_dated(tmp_path):
    result = run("stepwise_resnet", tmp_path)
    assert [each["loss"] for each in result["runs"]] == ["barlow_twins", "vicreg", "simclr"]
    for each in result["runs"]:
        assert 0 < each["step_likeness"] <= 1
        assert len(each["dates"]) == len(each["last"]) == 8
        assert max(each["last"]) > max(each["first"])


@pytest.fixture
def data(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    from _data import load_images
    from _views import TwoViews

    images = load_images(None, smoke=True).take(64, seed=0)
    return lambda **options: TwoViews(images, images, batch_size=16, **options)


def test_views_differ_and_repeat_with_their_seed(data):
    once, twice = data(), data()
    (a, b), labels = once.on_after_batch_transfer(next(iter(once.train_dataloader())), 0)
    (c, d), _ = twice.on_after_batch_transfer(next(iter(twice.train_dataloader())), 0)
    assert a.shape == (16, 3, 32, 32)
    assert labels.shape == (16,)
    assert not a.equal(b)
    assert a.equal(c)
    assert b.equal(d)
    before = once.random.get_state()
    once.pair(8, seed=3)
    assert once.random.get_state().equal(before)


def test_colours_without_strength_keep_the_greys_of_the_image(data):
    plain = data(strength=0.0)
    plain._crop = lambda x: x
    images, _ = next(iter(plain.probe_dataloaders()[0]))
    view = plain.view(plain.train_set.tensors[0].float() / 255)
    # the digits are grey: with equal channels neither greyscale nor factors of one change a thing
    assert (view - images).abs().max() < 1e-5
    assert (data(strength=0.4).view(plain.train_set.tensors[0].float() / 255) - images).abs().max() > 0.1
