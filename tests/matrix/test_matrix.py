"""Each cell of the matrix: what a monitor reads, and what a fit comes to, against a reference."""

import dataclasses
import json
from functools import partial

import pytest
import torch
from lightning.pytorch import Callback

from benchmarks.compatibility import FILE
from lightning_sym.callbacks import CollapseMonitor
from tests.matrix.columns import can_run, columns
from tests.matrix.rows import SYRE, Cell, differences, name_of, names, watching
from tests.matrix.ways import COLUMNS, fit

EVERY = {column.name: (group, column) for group, column in columns()}
RECORDED = json.loads(FILE.read_text())["results"]
#: The suite's share, of each group: the others take longer than they tell, and are run by the script.
SUITE = [
    *("manual optimization", "accumulation of 2 batches", "`bf16-true`", "float16 with a `GradScaler`"),
    *("reentrant activation checkpointing", "compiled submodules", "Fabric", "EMA of weights"),
    *("two optimizers in turn (a GAN)", "DDP, two forked ranks", "DDP, `find_unused_parameters`"),
    *("two fits with one Trainer", "killed in the middle of a write, resumed"),
    *("resumed with other intervals", "several loggers", "MLflow", "W&B, offline"),
    *("GPT-2-like, tied embeddings, `Conv1D`", "lazy layers", "frozen backbone with LoRA, on two ranks"),
    *("LSTM, on two ranks", "transposed convolutions, on two ranks", "mixture of experts, on two ranks"),
    *("`Conv1D` alone, on two ranks", "bilinear, on two ranks"),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SUITE)
def test_cells_are_what_the_page_says(name, tmp_path):
    column = EVERY[name][1]
    assert not column.slow
    if not can_run(column):
        pytest.skip(f"{column.needs} is not installed")
    torch.set_num_threads(1)
    found = {row: dataclasses.asdict(cell) for row, cell in column.cells(tmp_path).items()}
    assert found == RECORDED[name]["cells"]
    assert not [cell for cell in found.values() if cell["verdict"] == "red"]


def test_the_page_has_the_cells_that_tests_define_and_no_others():
    """A column whose package is not installed where the matrix was run has no cells."""
    assert set(RECORDED) <= set(EVERY)
    assert {name for name, (_, column) in EVERY.items() if not column.needs} <= set(RECORDED)
    for name, recorded in RECORDED.items():
        group, column = EVERY[name]
        assert (recorded["group"], recorded["reference"]) == (group, column.told)
        assert recorded["places"] == column.places
        assert bool(column.unread) == bool(column.note)  # what is not compared is said
        assert list(recorded["cells"]) == names()
        for row, cell in recorded["cells"].items():
            assert cell["verdict"] in ("right", "refused", "none")
            assert (cell["verdict"] == "right") or cell["why"]
            assert (row in column.none) <= (cell["verdict"] == "none")
            assert (row in column.refused) <= (cell["verdict"] == "refused")


def test_every_row_is_right_in_most_columns():
    for row in names():
        right = [name for name, recorded in RECORDED.items() if recorded["cells"][row]["verdict"] == "right"]
        assert len(right) > 0.6 * len(RECORDED), row


def test_every_monitor_has_a_row():
    from lightning_sym import callbacks

    kinds = {
        name for name, kind in vars(callbacks).items() if isinstance(kind, type) and hasattr(kind, "needs")
    }
    elsewhere = {"Monitor", "RepresentationProbe", "CompositionMonitor"}
    assert kinds - elsewhere == {name_of(m) for m in watching()} - {"a monitor of one's own"}


# -- that a cell can be red -------------------------------------------------------------------

AUTOMATIC = COLUMNS[0]


class Draws(Callback):
    """Draws a number."""

    def on_train_batch_start(self, *_):
        torch.rand(1)


def with_draw(callbacks, *_):
    return fit([*callbacks, *([Draws()] if len(callbacks) > 2 else [])])


def rounded(callbacks, *_):
    found = fit(callbacks)
    for rows in found.rows.values():
        for row in rows:
            row.update({key: value * (1 + 1e-12) for key, value in row.items() if "collapse" in key})
    return found


def with_other_syre(callbacks, *_):
    for each in callbacks:
        if hasattr(each, "sigma"):
            each.sigma *= 1 + 1e-9
    return fit(callbacks)


@pytest.mark.parametrize(
    ("way", "red"),
    [
        (with_draw, "ends in another state"),
        (rounded, "collapse/"),
        (with_other_syre, "has other weights"),
        (partial(fit, max_epochs=1), "3 readings, 6 in the reference"),
    ],
    ids=["a draw", "rounding", "another offset", "fewer readings"],
)
@pytest.mark.filterwarnings("ignore")
def test_a_cell_can_be_red(way, red, tmp_path):
    few = lambda: [CollapseMonitor(every_n_steps=1, strict=True), *watching()[-2:]]  # noqa: E731
    out = dict.fromkeys(names(), "not asked here")
    out = {name: why for name, why in out.items() if name not in (*map(name_of, few()), SYRE)}
    column = dataclasses.replace(AUTOMATIC, way=way, watch=few, none=out)
    found = column.cells(tmp_path)
    assert any(cell.verdict == "red" and red in cell.why for cell in found.values())
    column = dataclasses.replace(AUTOMATIC, way=fit, watch=few, none=out)
    assert not [cell for cell in column.cells(tmp_path).values() if cell.verdict == "red"]


@pytest.mark.filterwarnings("ignore")
def test_what_should_be_refused_and_is_not_is_red(tmp_path):
    column = dataclasses.replace(AUTOMATIC, refused={"CollapseMonitor": "cannot"})
    assert column._refusal("CollapseMonitor", "cannot", tmp_path).verdict == "red"


def test_what_differs_is_named():
    a, b = [{"step": 1, "x": 1.0, "y": 2.0}], [{"step": 1, "x": 1.0 + 1e-7}]
    assert differences(a, b, 1e-6) == ["y is None at step 1, 2.0 in the reference"]
    assert len(differences(a, b, 1e-9)) == 2
    assert differences(a, b, 1e-6, unread="y") == []
    assert differences(a, [], 0.0) == ["0 readings, 1 in the reference"]
    assert Cell("right") == Cell("right", "")
