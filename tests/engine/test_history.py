"""What is kept of readings: rows packed for a checkpoint, rows in a file, and what grows with them."""

import gc
import io
import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_sym import watch
from lightning_sym.callbacks import (
    CollapseMonitor,
    FeatureLearningMonitor,
    HierarchyMonitor,
    Monitor,
    SharpnessMonitor,
    monitors,
)
from lightning_sym.diagnosis import diagnose_run
from lightning_sym.engine.history import LAST_ROWS, FileHistory, packed, unpacked
from lightning_sym.observe import Reading
from tests.models import Classifier, mlp, trainer
from tests.promises.every import Module, dataset, fit, same
from tests.promises.ranked import on_ranks, shares
from tests.promises.test_leaks import tensors_alive


def rows_of(count, keys=90):
    """Rows of so many readings; every tenth has one more."""
    names = [f"collapse/net.{k}/effective_rank" for k in range(keys)]
    return [
        {"step": i + 1, "fit": 1, **{name: i / 7 + k for k, name in enumerate(names)}}
        | ({"collapse/score": math.nan} if i % 10 == 0 else {})
        for i in range(count)
    ]


def stored(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    loaded = torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
    assert same(loaded, state)
    return len(buffer.getvalue())


def test_packing_loses_nothing():
    rows = [*rows_of(25, 3), {"step": 26, "fit": 2}, {"step": 27, "fit": 2, "b": math.inf, "a": -0.0}]
    again = unpacked(packed(rows, None))
    assert same(again, rows)
    assert [list(row) for row in again] == [list(row) for row in rows]  # in their order
    assert all(type(row[key]) is int for row in again for key in ("step", "fit"))
    assert same(unpacked(packed(rows, 4)), rows[-4:])
    assert packed(rows, 4)["rows"] == len(rows)
    assert unpacked(packed(rows, 0)) == unpacked(packed([], 5)) == []


class Keeps(Monitor):
    quantity = "keeps"

    def read(self, seen):
        yield Reading("", "one", float(seen.step))


def test_a_checkpoint_grows_with_what_was_asked_for_alone(tmp_path):
    """Rows of 90 readings: 100,000 of them, as dicts, take above 100 MB."""
    sizes = {}
    rows = rows_of(3 * LAST_ROWS)
    for keep in (LAST_ROWS, None, tmp_path):
        for count in (LAST_ROWS, 2 * LAST_ROWS, 3 * LAST_ROWS):
            monitor = Keeps(keep=keep)
            if isinstance(monitor.history, list):
                monitor.history = rows[:count]
            else:
                monitor.history.append(rows[0])
                monitor.history._ends.extend([monitor.history._ends[0]] * (count - 1))
            sizes[keep, count] = stored(monitor.state_dict())
    numbers = 93 * 8 * LAST_ROWS
    assert sizes[LAST_ROWS, 3 * LAST_ROWS] <= sizes[LAST_ROWS, LAST_ROWS] + 128
    assert sizes[LAST_ROWS, 3 * LAST_ROWS] < 1.05 * numbers
    grown = sizes[None, 3 * LAST_ROWS] - sizes[None, 2 * LAST_ROWS]
    assert 0.95 * numbers < grown < 1.05 * numbers
    assert sizes[tmp_path, 3 * LAST_ROWS] < 3000


def test_rows_in_a_file_are_as_in_a_list(tmp_path):
    rows, history = rows_of(12, 3), FileHistory(tmp_path / "deep" / "er", "collapse")
    assert not history
    assert history == []
    assert not history.folder.exists()
    for row in rows:
        history.append(row)
    other = FileHistory(tmp_path / "deep" / "er", "collapse")  # another process's
    for each in (history, other):
        assert same(list(each), rows)
        assert len(each) == 12
        assert same([each[0], each[-1], each[5]], [rows[0], rows[-1], rows[5]])
        for part in (slice(3, 7), slice(-2, None), slice(None, None, 3), slice(5, 2), slice(9, 99)):
            assert same(each[part], rows[part])
        assert same(each + rows[:1], [*rows, rows[0]])
        for index in (12, -13):
            with pytest.raises(IndexError, match=f"got {index}"):
                each[index]
    other.append(rows[0])
    assert len(history) == 13
    history.cut(4)
    assert same(list(history), rows[:4])
    assert same(list(other), rows[:4])
    history.cut(9)
    assert len(history) == 4
    assert json.loads((tmp_path / "deep/er/collapse.jsonl").read_text().splitlines()[3])["step"] == 4


def test_a_line_that_was_broken_off_is_no_row(tmp_path):
    """As when the process was killed in the middle of it, at any place."""
    rows = rows_of(3, 2)
    whole = FileHistory(tmp_path, "a")
    for row in rows:
        whole.append(row)
    text = whole.path.read_bytes()
    second = text.index(b"\n", text.index(b"\n") + 1) + 1
    for end in range(second, len(text)):
        whole.path.write_bytes(text[:end])
        history = FileHistory(tmp_path, "a")
        assert same(list(history), rows[:2])
        history.append(rows[2])
        assert history.path.read_bytes() == text


def run(epochs, watching, *, path=None, save=None):
    torch.manual_seed(0)
    module = Module("mlp")
    module.net[4].p = 0.0
    fitting = trainer(callbacks=list(watching), max_epochs=epochs)
    fitting.fit(module, DataLoader(dataset("mlp"), 8), ckpt_path=path)
    if save is not None:
        fitting.save_checkpoint(save / "c.ckpt")
    return None if save is None else save / "c.ckpt"


@pytest.mark.parametrize("steps_beyond", [0, 3])
def test_a_resumed_run_with_a_folder_is_as_one_never_stopped(steps_beyond, tmp_path):
    """Rows that were read after the checkpoint was written are read again, and stand there once."""
    whole = monitors("standard", every_n_steps=1, strict=True)
    run(4, whole)
    path = run(2, monitors("standard", every_n_steps=1, strict=True, keep=tmp_path / "h"), save=tmp_path)
    if steps_beyond:  # went on, and was lost
        run(3, monitors("standard", every_n_steps=1, strict=True, keep=tmp_path / "h"), path=path)
    resumed = monitors("standard", every_n_steps=1, strict=True, keep=tmp_path / "h")
    run(4, resumed, path=path)
    for a, b in zip(whole, resumed, strict=True):
        assert same(a.history, list(b.history))
        assert not any("keys" in part for part in b.state_dict()["history"])
    assert [f.message for f in diagnose_run(whole)] == [f.message for f in diagnose_run(resumed)]
    assert resumed[-1].history == whole[-1].history
    again = CollapseMonitor(every_n_steps=2, keep=tmp_path / "h")  # a new run is the file's second
    run(1, [again])
    assert [row["fit"] for row in again.history] == [1] * 12 + [2] * 2
    assert again.fit == 2


def test_a_number_of_rows_is_what_a_resumed_run_goes_on_with(tmp_path, caplog):
    caplog.set_level("INFO")
    path = run(2, [CollapseMonitor(every_n_steps=1, keep=2)], save=tmp_path)
    resumed = CollapseMonitor(every_n_steps=1, keep=2)
    run(3, [resumed], path=path)
    assert [row["step"] for row in resumed.history] == [5, 6, 7, 8, 9]
    assert "CollapseMonitor: 2 of the 6 rows of its history were kept." in caplog.text
    moved = CollapseMonitor(every_n_steps=1, keep=tmp_path / "h")  # from a checkpoint into a folder
    run(3, [moved], path=path)
    assert [row["step"] for row in moved.history] == [5, 6, 7, 8, 9]


@pytest.mark.parametrize("keep", [LAST_ROWS, None])
def test_no_samples_are_in_a_checkpoint(keep, tmp_path):
    """Monitors that look at samples again and again: 3,000 numbers a sample would show."""
    torch.manual_seed(0)
    wide, net = 3000, mlp(3000, 4, 3)
    torch.save(Classifier(mlp(wide, 4, 3)).state_dict(), tmp_path / "other.pt")
    watching = [
        SharpnessMonitor(every_n_steps=1, vectors=1, lanczos_steps=0, keep=keep, strict=True),
        FeatureLearningMonitor(every_n_steps=1, sketch=16, keep=keep, strict=True),
        HierarchyMonitor(every_n_steps=1, reference=tmp_path / "other.pt", keep=keep, strict=True),
    ]
    data = TensorDataset(torch.randn(16, wide), torch.arange(16) % 3)
    trainer(callbacks=watching).fit(Classifier(net), DataLoader(data, 8))
    for monitor in watching:
        assert len(monitor.history) == 2
        assert stored(monitor.state_dict()) < 8 * wide, type(monitor).__name__
        assert monitor.held.samples is not None


def test_ranks_have_files_of_their_own(tmp_path):
    def watching(keep):
        return list(monitors("standard", every_n_steps=1, strict=True, keep=keep))

    loader = shares(dataset("mlp"), 8)
    make = lambda: Module("mlp")  # noqa: E731
    expected = on_ranks(2, tmp_path, make, watching(LAST_ROWS), loader=loader)
    chosen = watching(tmp_path / "h")
    on_ranks(2, tmp_path, make, chosen, loader=loader)
    files = sorted(path.name for path in (tmp_path / "h").iterdir())
    assert len(files) == 2 * len(chosen)
    for k, monitor in enumerate(chosen):
        assert same(list(monitor.history), expected[0]["rows"][k])  # this process has rank 0's
        name = f"{monitor.prefix}.rank1.jsonl"
        other = [json.loads(line) for line in (tmp_path / "h" / name).read_text().splitlines()]
        assert same(other, expected[1]["rows"][k])


def test_a_file_that_cannot_be_written_costs_the_history_alone(tmp_path):
    (tmp_path / "file").write_text("no folder")
    monitor = CollapseMonitor(every_n_steps=1, keep=tmp_path / "file")
    with pytest.warns(UserWarning, match="CollapseMonitor could not log: "):
        fitting = fit(Module("mlp"), monitor)
    assert fitting.global_step == 6
    assert "collapse/score" in fitting.callback_metrics


def test_what_is_refused(tmp_path):
    for keep, kind, message in (
        (-1, ValueError, "keep must be at least 0, got -1"),
        (True, TypeError, "keep must be a number of rows, a folder or None, got True"),
        (1.5, TypeError, "keep must be"),
    ):
        with pytest.raises(kind, match=message):
            CollapseMonitor(keep=keep)
    two = [CollapseMonitor(every_n_steps=n, keep=tmp_path) for n in (1, 2)]
    with pytest.raises(ValueError, match=r"two monitors would keep their history in .*collapse\.jsonl"):
        fit(Module("mlp"), *two)
    fit(Module("mlp"), CollapseMonitor(keep=tmp_path, name="a"), CollapseMonitor(keep=tmp_path, name="b"))


def test_two_thousand_probes_leave_memory_flat_but_for_the_history(tmp_path):
    """No object more, no tensor more, and no memory more than a history takes; this one is in a file."""
    found = {}

    class Sizes(Monitor):
        quantity = "sizes"

        def read(self, seen):
            if seen.step in (200, 2000):
                tensors = tensors_alive()
                every = gc.get_objects()
                ours = sum(str(type(each).__module__).startswith("lightning_sym") for each in every)
                found[seen.step] = ours, len(every), tensors, resident()
            return ()

    watched = CollapseMonitor(every_n_steps=1, max_layers=1, keep=tmp_path, strict=True)
    sizes = Sizes(every_n_steps=100, keep=tmp_path, strict=True)
    net, x = nn.Linear(6, 3), torch.randn(8, 6)
    optimizer = torch.optim.SGD(net.parameters(), 1e-3)
    with watch(net, optimizer, [watched, sizes]):
        for _ in range(2000):
            optimizer.zero_grad()
            net(x).square().mean().backward()
            optimizer.step()
    assert len(watched.history) == 2000
    objects, every, tensors, memory = found[200]
    objects_late, every_late, tensors_late, memory_late = found[2000]
    assert objects_late <= objects + 5  # of ours
    assert every_late <= every + 450  # of all, to which other tests' leavings belong: not one in four probes
    assert tensors_late <= tensors + 1024
    assert memory_late <= memory + 2e6  # a probe that kept 1 kB would show


def resident():
    """Bytes of memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
