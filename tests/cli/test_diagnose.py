"""The command that reads checkpoints: what it prints, what it refuses, and that no file runs code."""

import json
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from lightning_sym.cli import diagnose, files, main, sources
from lightning_sym.cli.files import common_prefix, fitted

ROOT = Path(__file__).parents[2]


@pytest.fixture
def spoiled():
    torch.manual_seed(0)
    net = timm.create_model("test_resnet")
    net.layer1[0].conv1.weight.data[:16] = 0
    return net


def run(capsys, *arguments):
    code = main(["diagnose", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_a_sound_network_gives_a_verdict_and_every_line(capsys, tmp_path):
    page, data = tmp_path / "p.html", tmp_path / "d.json"
    code, out, err = run(
        capsys, "timm:test_vit", "--json", data, "--html", page, "--fail-on", "note", "--example", "3,160,160"
    )
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[1] == "Verdict: no alarm, no warning"
    for start in (
        "Units on a mirror: none, of",
        "Certified dead units: none",
        "Rank against a random",
        "What Syre",
    ):
        assert any(line.startswith(start) for line in lines), start
    assert "Findings:" not in lines
    found = json.loads(data.read_text())
    assert found["findings"] == []
    assert {layer["name"] for layer in found["layers"]} >= {"patch_embed.proj", "blocks.0.mlp.fc1", "head"}
    text = page.read_text()
    assert "default-src 'none'" in text
    assert "<script" not in text


def test_a_sick_checkpoint_is_told_by_layer_and_fails_on_request(capsys, tmp_path, spoiled):
    path = tmp_path / "sick.safetensors"
    save_file(spoiled.state_dict(), path)
    code, out, _ = run(
        capsys, path, "--class", "timm:test_resnet", "--symmetries", "never", "--fail-on", "alarm"
    )
    assert code == 1
    assert "Verdict: 1 alarm (dead_units in layer1.0.conv1), no warning" in out
    assert "Certified dead units: 16 in layer1.0.conv1" in out
    code, out, _ = run(capsys, path)  # no network: tensors alone
    assert code == 0
    assert "1 alarm (zero_units in layer1.0.conv1)" in out
    assert "symmetries not looked for" in out
    assert "Certified dead units: not known" in out


def test_units_on_a_mirror_are_told_with_what_syre_pushes_on(capsys, tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    for tensor in (net[0].weight.data, net[0].bias.data, net[2].weight.data.T):
        tensor[8:16] = tensor[:8]
    module = tmp_path / "own_network.py"
    module.write_text(
        "from torch import nn\n"
        "class Net(nn.Sequential):\n"
        "    def __init__(self, width):\n"
        "        super().__init__(nn.Linear(16, width), nn.ReLU(), nn.Linear(width, 4))\n"
    )
    state = {f"model.{name}": tensor for name, tensor in net.state_dict().items()}
    checkpoint = {"pytorch-lightning_version": "2.6", "state_dict": state, "hyper_parameters": {"width": 32}}
    torch.save(checkpoint, tmp_path / "last.ckpt")
    done = subprocess.run(
        [sys.executable, "-m", "lightning_sym", "diagnose", "last.ckpt", "--class", "own_network.Net"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "--class imports own_network: its code is run" in done.stderr
    assert "the prefix 'model.' was taken off" in done.stdout
    assert "  16 of 32 on a permutation mirror in 0" in done.stdout
    assert "  16 units of 0 off their permutation mirror" in done.stdout
    assert "equal_units in 0" in done.stdout


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (Path(self.path),))


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("place", ["alone", "beside", "in hyper_parameters"])
def test_a_pickle_with_a_payload_is_refused_and_nothing_runs(capsys, tmp_path, zipped, place):
    sign = tmp_path / "it_ran"
    value = {
        "alone": Payload(sign),
        "beside": {"state_dict": {"w": torch.ones(4, 4)}, "more": Payload(sign)},
        "in hyper_parameters": {"state_dict": {"w": torch.ones(4, 4)}, "hyper_parameters": Payload(sign)},
    }[place]
    path = tmp_path / "model.ckpt"
    torch.save(value, path, _use_new_zipfile_serialization=zipped)
    code, out, err = run(capsys, path)
    assert code == 2
    assert out == ""
    assert "refused" in err
    assert "Nothing of it was run" in err
    assert not sign.exists()
    torch.load(path, weights_only=False)  # the payload works: it was not run above
    assert sign.exists()


def test_a_bare_pickle_is_refused(capsys, tmp_path):
    sign = tmp_path / "it_ran"
    path = tmp_path / "model.pkl"
    path.write_bytes(pickle.dumps(Payload(sign)))
    code, _, err = run(capsys, path)
    assert (code, sign.exists()) == (2, False)
    assert "refused" in err or "can't be read" in err


def test_sizes_are_bounded(capsys, tmp_path, monkeypatch):
    path = tmp_path / "w.safetensors"
    save_file({"w.weight": torch.randn(64, 64)}, path)
    code, _, err = run(capsys, path, "--max-gb", "0.00001")
    assert (code, "more than --max-gb" in err) == (2, True)
    bomb = tmp_path / "bomb.pt"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("bomb/data.pkl", b"\0" * 4_000_000)
    assert bomb.stat().st_size < 10_000
    code, _, err = run(capsys, bomb, "--max-gb", "0.001")
    assert (code, "holds 0.0 GB, more than" in err) == (2, True)
    monkeypatch.setattr(files, "LARGEST_PICKLE", 1_000_000)
    code, _, err = run(capsys, bomb)
    assert (code, "pickled structure of 4 MB" in err) == (2, True)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("none.ckpt", None, "no file"),
        ("empty.ckpt", b"", "can't be read"),
        ("cut.safetensors", b"\x10\0\0\0\0\0\0\0{", "not a readable safetensors"),
        ("text.pt", b"hello, this is no checkpoint", "can't be read|refused"),
    ],
)
def test_what_is_no_checkpoint_is_one_sentence(capsys, tmp_path, name, content, said):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    code, out, err = run(capsys, tmp_path / name)
    assert (code, out) == (2, "")
    assert any(part in err for part in said.split("|"))
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["timm:resnet_of_nobody"], "timm has no model 'resnet_of_nobody'"),
        (["timm:test_vit", "--example", "3,x"], "--example must be sizes above 0"),
        (["timm:test_vit", "--example", "3,17,17"], "forward fails on --example 3,17,17"),
        (["timm:test_vit", "--init", "[1]"], "--init must be a JSON object"),
        (["FILE", "--class", "Net"], "--class must be a class path such as pkg.Class, got 'Net'"),
        (["FILE", "--class", "no_such_package.Net"], "can't be imported"),
        (["FILE", "--class", "torch.nn.Linear"], "can't be made with no arguments"),
        (["FILE", "--class", "torch.nn.Identity"], "no tensor of the file (fc.weight"),
        (["FILE", "--class", "collections.OrderedDict"], "must name a torch.nn.Module"),
    ],
)
def test_wrong_options_are_one_sentence(capsys, tmp_path, arguments, said):
    path = tmp_path / "w.safetensors"
    save_file({"fc.weight": torch.randn(8, 8)}, path)
    code, _, err = run(capsys, *[path if argument == "FILE" else argument for argument in arguments])
    assert code == 2
    assert said in err.splitlines()[-1]


def test_two_checkpoints_are_compared(capsys, tmp_path):
    torch.manual_seed(0)
    old = {"a.weight": torch.randn(32, 32), "b.weight": torch.randn(32, 32), "c.weight": torch.randn(32, 32)}
    new = {"a.weight": 3 * old["a.weight"], "b.weight": old["b.weight"], "c.weight": old["c.weight"] * 1.01}
    save_file(old, tmp_path / "old.safetensors")
    save_file(new, tmp_path / "new.safetensors")
    data = tmp_path / "d.json"
    arguments = [tmp_path / "new.safetensors", "--against", tmp_path / "old.safetensors", "--json", data]
    code, out, _ = run(capsys, *arguments)
    assert code == 0
    assert "2 of 3 weights differ" in out
    assert "a.weight: moved by 2 of its norm, now 3 of it" in out
    assert "the same to the bit: b.weight" in out
    against = json.loads(data.read_text())["against"]
    assert against["a.weight"]["change"] == pytest.approx(2, rel=1e-6)
    assert against["c.weight"]["change"] == pytest.approx(0.01, rel=1e-4)


def test_tensors_of_a_file_are_read_one_by_one(tmp_path):
    path = tmp_path / "w.safetensors"
    save_file({f"{i}.weight": torch.randn(64, 64) for i in range(5)}, path)
    tensors = files.read_weights(path, max_gb=1).tensors
    assert len(tensors) == 5
    one, two = tensors["3.weight"], tensors["3.weight"]
    assert one.data_ptr() != two.data_ptr()  # nothing is kept
    assert "9.weight" not in tensors


def test_long_work_says_how_far_it_is(capsys, tmp_path, monkeypatch):
    path = tmp_path / "w.safetensors"
    save_file({f"{i}.weight": torch.randn(8, 8) for i in range(3)}, path)
    assert run(capsys, path)[2] == ""  # quick work says nothing
    monkeypatch.setattr(diagnose, "PATIENCE", -1.0)
    monkeypatch.setattr(diagnose, "SLOW_SEARCH", 1)
    told = run(capsys, path)[2].splitlines()
    assert told == [f"lightning-sym diagnose: {i} of 3 tensors" for i in (1, 2, 3)]
    (said,) = run(capsys, "timm:test_resnet", "--symmetries", "always")[2].splitlines()
    assert "parameters are looked for; --symmetries never leaves that out" in said


def test_prefixes_are_found():
    own = {"conv.weight": 0, "conv.bias": 0}
    theirs = {"model.net.conv.weight": 0, "model.net.conv.bias": 0, "model.head.weight": 0}
    names = {"conv.weight": "model.net.conv.weight", "conv.bias": "model.net.conv.bias"}
    assert fitted(theirs, own) == (names, "model.net.")
    assert fitted(own, {f"model.{name}": 0 for name in own})[1] == "+model."
    assert fitted({"x": 0}, own) == ({}, "")
    assert common_prefix(["module.a.w", "module.b.w"]) == "module."
    assert common_prefix(["a.w", "b.w"]) == ""


def test_untrained_models_are_the_same_each_time():
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    a, b = (sources.timm_model("timm:test_resnet", {}) for _ in range(2))
    assert torch.equal(a.fc.weight, b.fc.weight)
    assert torch.equal(state, torch.random.get_rng_state())


def test_names_are_escaped_on_the_page(capsys, tmp_path):
    path = tmp_path / "w.safetensors"
    save_file({"<script>alert(1)</script>.weight": torch.ones(8, 8)}, path)
    run(capsys, path, "--html", tmp_path / "p.html")
    text = (tmp_path / "p.html").read_text()
    assert "<script" not in text
    assert "&lt;script&gt;" in text


def test_help_and_verbs(capsys):
    assert main([]) == main(["--help"]) == 0
    assert "diagnose" in capsys.readouterr().out
    assert main(["--version"]) == 0
    assert main(["train"]) == 2
    assert "the verb must be among fit, diagnose, report, got 'train'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("package", "arguments", "extra"),
    [
        ("jsonargparse", ["diagnose", "x"], "cli"),
        ("timm", ["diagnose", "timm:resnet18"], "ssl"),
        ("timm", ["diagnose", "FILE", "--class", "timm:resnet18"], "ssl"),
        ("tensorboard", ["report", "FOLDER"], "tensorboard"),
    ],
)
def test_a_missing_extra_is_one_sentence(capsys, monkeypatch, tmp_path, package, arguments, extra):
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, package, None)
    save_file({"fc.weight": torch.randn(8, 8)}, tmp_path / "w.safetensors")
    (tmp_path / "events.out.tfevents.1").touch()
    known = {"FILE": str(tmp_path / "w.safetensors"), "FOLDER": str(tmp_path)}
    assert main([known.get(argument, argument) for argument in arguments]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert f"needs {package}, which is not installed: pip install 'lightning-sym[{extra}]'" in said
