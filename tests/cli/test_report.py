"""The page of runs: what is read from logs, what it shows, that it needs nothing but itself."""

import base64
import io
import json
import math
import re
import shutil
import subprocess

import matplotlib.pyplot as plt
import pytest
from torch.utils.tensorboard import SummaryWriter

from lightning_sym import diagnosis
from lightning_sym.cli import charts, logs, main, report
from lightning_sym.diagnosis import Finding


def write_csv(folder, *, layers=("0", "2", "10"), steps=20, diverges=False):
    folder.mkdir(parents=True)
    keys = [f"collapse/net.{layer}/effective_rank" for layer in layers]
    lines = [",".join(["epoch", "step", "train_loss", *keys])]
    for step in range(steps):
        loss = math.nan if diverges and step > 10 else 2.0 / (step + 1)
        lines.append(f"0,{step},{loss},,,")
        lines.append(f"0,{step},," + ",".join(str(float(layer) + step) for layer in layers))
    (folder / "metrics.csv").write_text("\n".join(lines) + "\n")


def test_each_kind_of_log_gives_the_same_curves(tmp_path):
    curve = {3: 0.5, 7: 0.25}
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "metrics.csv").write_text("epoch,loss,step\n0,0.5,2\n0,,3\n0,0.25,6\n")
    (tmp_path / "b").mkdir()
    rows = [{"step": 3, "loss": 0.5, "kind": "text"}, {"step": 7, "loss": 0.25}]
    (tmp_path / "b" / "history.json").write_text(json.dumps(rows))
    writer = SummaryWriter(tmp_path / "c")
    for step, value in curve.items():
        writer.add_scalar("loss", value, step)
    writer.close()
    runs = logs.read_runs([tmp_path])
    assert [run.name.rpartition("/")[2] for run in runs] == ["a", "b", "c"]
    assert all(run.curves == {"loss": curve} for run in runs)
    assert runs[0].rows() == [{"step": 3, "loss": 0.5}, {"step": 7, "loss": 0.25}]


def test_steps_are_counted_one_way(tmp_path):
    (tmp_path / "history.json").write_text('[{"step": 0, "a": 1.0}, {"step": 5, "a": 2.0}]')
    (tmp_path / "metrics.csv").write_text("loss,step\n3.0,0\n2.0,4\n")  # a Trainer's first step is 0
    (run,) = logs.read_runs([tmp_path])
    assert run.curves == {"a": {0: 1.0, 5: 2.0}, "loss": {1: 3.0, 5: 2.0}}
    (tmp_path / "metrics.csv").write_text("loss,step\n3.0,1\n2.0,5\n")
    (run,) = logs.read_runs([tmp_path])
    assert run.curves["loss"] == {1: 3.0, 5: 2.0}


def test_layers_by_time_are_found_in_depth():
    run = logs.Run("r")
    for layer in ("net.0", "net.10", "net.2"):
        run.add(f"collapse/{layer}/rank", 0, 1.0)
        run.add(f"collapse/{layer}/rank", 1, 2.0)
        run.add(f"constant/{layer}/rank", 0, 1.0)
        run.add(f"gap/{layer}", 0, float(len(layer)))
        run.add(f"broken/{layer}/rank", 0, math.nan)
    for summary in ("nc1", "nc2", "score"):
        run.add(f"collapse/{summary}", 0, 1.0)
    strips = logs.strips_of(run)
    assert {name: list(layers) for name, layers in strips.items()} == {
        "collapse/rank": ["net.0", "net.2", "net.10"],
        "gap": ["net.0", "net.2", "net.10"],
    }
    assert logs.loss_of(run) is None
    for key in ("val_loss", "train_loss_epoch", "train_loss"):
        run.add(key, 0, 1.0)
    assert logs.loss_of(run) == "train_loss"


def test_the_readings_that_tell_most_are_shown_first():
    run = logs.Run("r")
    for what in ("a/x", "b/x", "c/x", "plasticity/dead_units", "signal/gradient"):
        quantity, _, last = what.partition("/")
        for i in range(3):
            run.add(f"{quantity}/net.{i}/{last}", 1, float(i))
    assert list(logs.strips_of(run)) == ["plasticity/dead_units", "signal/gradient", "a/x", "b/x"]


def test_runs_share_the_scale_of_a_strip():
    runs = [logs.Run("a"), logs.Run("b")]
    for k, run in enumerate(runs):
        for i in range(3):
            run.add(f"collapse/net.{i}/effective_rank", 1, 1.0 + i + 10 * k)
            run.add(f"signal/net.{i}/gradient", 1, 10.0 ** -(i + 3 * k))
            run.add(f"plasticity/net.{i}/dead_units", 1, 0.1 * i)
    text = report.page(runs)
    assert re.findall(r">plasticity/dead_units<.*?>0<.*?>1<", text) != []
    assert text.count(">13<") == 2  # the upper end of the rank
    assert text.count(">1.0e-05<") == 2  # the lower end of the gradient
    assert text.count("signal/gradient, on a logarithmic scale") == 2


def test_charts_show_what_is_there():
    curve = {step: float(step) for step in range(1000)}
    assert len(charts.thinned(curve, 10)) == 10
    assert charts.thinned(curve, 10)[0] == (0, 0.0)
    assert charts.thinned(curve, 10)[-1] == (999, 999.0)
    svg = charts.line_chart(
        {"a": {0: 1.0, 1: math.nan, 2: 3.0, 3: 2.0}}, [(2, "alarm", "<event>")], label="loss"
    )
    assert svg.count("<polyline") == 2  # a gap
    assert "&lt;event&gt; at step 2" in svg
    assert charts.ticks(0.15, 2.4) == [0.5, 1.0, 1.5, 2.0]
    assert charts.ticks(0, 239) == [0, 50, 100, 150, 200]
    assert charts.ticks(0.0011, 0.0019) == [0.0012, 0.0014, 0.0016, 0.0018]
    assert charts.line_chart({"a": {0: math.nan}}, [], label="loss") == ""
    strips = charts.heat_strips({"a": {0: 0.0, 1: 1.0}, "b<i>": {1: math.inf}}, title="t")
    assert "b&lt;i&gt;" in strips
    pictures = re.findall('base64,([^"]*)', strips)
    cells = plt.imread(io.BytesIO(base64.b64decode(pictures[0])))
    low, high, red, none = (68, 1, 84, 255), (253, 231, 37, 255), (224, 0, 0, 255), (0, 0, 0, 0)
    assert (255 * cells).round().astype(int).tolist() == [[list(low), list(high)], [list(none), list(red)]]
    later = charts.heat_strips({"a": {0: 1.0}}, title="t", steps=[0, 50])
    assert "step 50" in later
    wide = charts.heat_strips({str(i): {0: 1.0} for i in range(500)}, title="t")
    assert "48 of 500 layers" in wide


@pytest.fixture
def two_runs(tmp_path):
    write_csv(tmp_path / "logs" / "<img src=x onerror=alert(1)>")
    write_csv(tmp_path / "logs" / "diverges", diverges=True)
    return tmp_path


def test_the_page_needs_nothing_but_itself(two_runs, capsys):
    out = two_runs / "page.html"
    assert main(["report", str(two_runs / "logs"), "--out", str(out)]) == 0
    assert "2 runs" in capsys.readouterr().out
    text = out.read_text()
    assert len(text) < 300_000
    assert "default-src 'none'" in text
    assert "The MIT License" in text
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:)?//""", text)
    assert "<img" not in text
    data = json.loads(re.search(r'application/json">(.*?)</script>', text, re.DOTALL)[1])
    assert len(data["curves"]) == 4
    assert data["curves"]["train_loss"]["diverges"][1][-1] is None
    assert "the loss is not finite at step 12" in text  # the first is written as 0


def test_at_most_five_findings_the_worst_first(two_runs, monkeypatch):
    def rules(rows):
        assert rows[0]["step"] == 1
        return [
            Finding("k<b>", level, "net.2", step, 0.5, 0.1, "What.", "Why", "Do.")
            for level in ("note", "alarm", "warning")
            for step in (3, 1)
        ]

    monkeypatch.setattr(diagnosis, "diagnose_run", rules, raising=False)
    text = report.page(logs.read_runs([two_runs / "logs" / "diverges"]))
    blocks = re.findall(r'class="finding (\w+)"', text)
    assert blocks == ["alarm", "alarm", "warning", "warning", "note"]
    assert "and 1 more<" in text
    assert "value 0.5, limit 0.1, since step 1" in text
    assert "k&lt;b&gt;" in text
    assert "2 alarms (k&lt;b&gt; in net.2), 2 warnings" in text


def test_many_curves_stay_within_bounds():
    run = logs.Run("r")
    for key in range(1500):
        for step in range(200):
            run.add(f"q/layer.{key}/w", step, 1.2345678)
    text = report.page([run])
    assert len(text) < 300_000
    data = json.loads(re.search(r'application/json">(.*?)</script>', text, re.DOTALL)[1])
    assert f"{1500 - len(data['curves'])} more did not fit" in text


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("nothing", None, "is none"),
        ("metrics.csv", "epoch,step,loss\n0,1,abc\n", "can't be read"),
        ("history.json", "{}", "holds no list of rows"),
        ("history.json", "{", "can't be read"),
        ("other.csv", "step\n1\n", "no scalars in"),
    ],
)
def test_what_is_no_log_is_one_sentence(tmp_path, capsys, name, content, said):
    if content is not None:
        (tmp_path / name).write_text(content)
    assert main(["report", str(tmp_path / name), "--out", str(tmp_path / "p.html")]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert len(err.splitlines()) == 1


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs a headless Chromium")
def test_the_curves_are_drawn_in_a_browser(two_runs):
    page = two_runs / "page.html"
    text = report.page(logs.read_runs([two_runs / "logs"]))
    page.write_text(text.replace("<details>", "<details open>"))
    done = subprocess.run(
        [
            "chromium",
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--virtual-time-budget=3000",
            "--dump-dom",
            page,
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.stdout.count('class="u-title"') == 4
    assert done.stdout.count("<canvas") == 4
