"""The self-supervised examples run on the digits, and leave what they say they leave."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import torch

from lightning_sym.datamodules.augment import ViewRecipe

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
    losses = [each["loss"] for each in result["runs"]]
    assert losses == ["barlow_twins", "vicreg", "vicreg_variance", "simclr"]
    for each in result["runs"]:
        grew = each["learned"] > 0  # 20 steps are few for the one whose early growth is exponential
        assert grew or each["loss"] == "vicreg_variance"
        assert 0 < each["step_likeness"] <= 1 if grew else each["step_likeness"] == 0
        assert len(each["dates"]) == len(each["last"]) == 8
        assert max(each["last"]) > max(each["first"])


def test_vicregs_hinge_is_what_moves_a_small_start_at_once(tmp_path):
    """The hinge on the deviation has its first mode learned before the one on the variance has."""
    result = run("stepwise_vicreg", tmp_path)
    by_name = {each["loss"]: each for each in result["runs"]}
    assert len(by_name) == 4
    for each in by_name.values():
        assert len(each["last"]) == 3
        assert len(each["dates"]) == each["learned"]
    first = {name: min(each["dates"]) for name, each in by_name.items()}
    assert first["vicreg"] < first["vicreg_even, variance"]
    assert by_name["vicreg"]["last"][0] > 2 * by_name["vicreg_even"]["last"][0]


def test_the_fixed_pair_is_of_the_first_images_and_repeats(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    from _data import load_images
    from _views import fixed_pair, two_views

    images = load_images(None, smoke=True).take(64, seed=0)
    data = two_views(images, images, seed=0, batch_size=16)
    a, b = fixed_pair(data, 8)
    assert a.shape == b.shape == (8, 3, 32, 32)
    assert not a.equal(b)
    again = fixed_pair(two_views(images, images, seed=0, batch_size=32), 8)
    assert a.equal(again[0])
    assert b.equal(again[1])
    plain = two_views(images, images, seed=0, batch_size=16, recipe="weak")
    plain.drawing = dataclasses.replace(
        plain.drawing, recipes=(ViewRecipe(crop_scale=(1, 1), crop_ratio=(1, 1), flip=0),) * 2
    )
    shares = torch.from_numpy(images.x[:8]).permute(0, 3, 1, 2) / 255
    whole = (shares - plain.mean.view(3, 1, 1)) / plain.std.view(3, 1, 1)
    torch.testing.assert_close(fixed_pair(plain, 8)[0], whole, rtol=1e-5, atol=1e-5)
