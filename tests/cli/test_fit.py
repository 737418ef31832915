"""The verb that trains: its own options, its presets and its help."""

import pytest
import yaml

from lightning_sym.cli import Refused, fit, main


def test_our_options_are_taken_and_all_others_left():
    ours, theirs = fit.split(
        ["--preset=bumps", "--trainer.max_epochs", "3", "--monitors", "light", "--every_n_steps=5"]
    )
    assert ours == {
        "preset": "bumps",
        "print-preset": None,
        "monitors": "light",
        "every-n-steps": "5",
        "targets": None,
    }
    assert theirs == ["--trainer.max_epochs", "3"]
    with pytest.raises(Refused, match="--preset needs a value"):
        fit.split(["--preset", "--monitors", "light"])


def test_every_preset_is_told_in_the_help(capsys):
    assert main(["fit", "--help"]) == 0
    out = capsys.readouterr().out
    names = ["barlow_cifar10", "bumps", "monitor_any", "simclr_folder", "vicreg_folder"]
    assert list(fit.names()) == names
    for name in names:
        assert f" {name} " in out
        assert main(["fit", "--print-preset", name]) == 0
        assert "trainer" in yaml.safe_load(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--preset", "nope"], "--preset must be among barlow_cifar10,"),
        (["--monitors", "some"], "--monitors must be among light, standard, full and none, got 'some'"),
        (["--every-n-steps", "0"], "--every-n-steps must be a whole number above 0, got '0'"),
    ],
)
def test_wrong_options_are_one_sentence(capsys, arguments, said):
    assert main(["fit", *arguments]) == 2
    assert said in capsys.readouterr().err
