"""Faults that were once put in on purpose and that no test noticed."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_sym.callbacks import BalanceMonitor, CollapseMonitor, EigenmodeMonitor, PlasticityMonitor
from lightning_sym.functional.hierarchy import loss_phases
from lightning_sym.functional.rank import effective_rank_from_eigenvalues, numerical_rank_from_eigenvalues
from lightning_sym.optim import attach_syre
from tests.models import Classifier, mlp, trainer
from tests.promises.every import Module, fit


def test_syre_pulls_the_same_way_whether_the_loss_is_minimised_or_maximised():
    """On a loss of slope zero all that moves the weight is the decay towards theta_0."""
    found = []
    for maximize in (False, True):
        torch.manual_seed(0)
        layer = nn.Linear(6, 6)
        settings = {"lr": 0.1, "weight_decay": 0.5, "maximize": maximize}
        optimizer = torch.optim.SGD(layer.parameters(), **settings)
        attach_syre(optimizer, sigma=0.3)
        for _ in range(200):
            optimizer.zero_grad()
            (layer(torch.ones(2, 6)).sum() * 0).backward()
            optimizer.step()
        found.append(layer.weight.detach().clone())
    assert found[0].std() > 0.05  # it has come to theta_0, not to zero
    assert torch.equal(*found)


class Laws(BalanceMonitor):
    """Takes down the predicted rate at each reading, which is that of one moment."""

    def read(self, seen):
        """Read."""
        yield from super().read(seen)
        self.laws = {**getattr(self, "laws", {}), seen.step: dict(seen.state["marks"])}


def test_a_flow_is_predicted_from_the_laws_of_both_ends():
    """The prediction between two readings is the mean of the rates at both, and no rate of one end."""
    module = Module("mlp", momentum=0.0, weight_decay=0.05)
    monitor = Laws(every_n_steps=3, strict=True)
    fit(module, monitor)
    rows = {row["step"]: row for row in monitor.history}
    assert list(rows) == list(monitor.laws) == [1, 3, 6]
    for key in monitor.laws[1]:
        laws = [monitor.laws[step][key][1] for step in rows]
        predicted = [rows[step][f"balance/{key}/predicted_flow"] for step in rows]
        assert laws[0] != laws[1] != laws[2]
        assert predicted == [laws[0], (laws[0] + laws[1]) / 2, (laws[1] + laws[2]) / 2]


def independent(n: int, width: int) -> torch.Tensor:
    """Return n inputs that are as independent as n centred samples can be."""
    return nn.functional.pad(torch.eye(n), (0, width - n)) * 3


def test_as_many_directions_as_centred_samples_have_are_no_collapse():
    """Of n samples, centred, there are n - 1 directions: a layer that uses all of them has lost nothing."""
    torch.manual_seed(0)
    n, width = 5, 8
    net = mlp(width, width, 3)
    with torch.no_grad():
        for layer in (net[0], net[2]):
            nn.init.orthogonal_(layer.weight)
    monitor = CollapseMonitor(every_n_steps=1, layers="net.0", strict=True)
    data = TensorDataset(independent(n, width), torch.arange(n) % 3)
    trainer(max_steps=1, callbacks=[monitor]).fit(Classifier(net), DataLoader(data, n))
    row = monitor.history[0]
    assert row["collapse/net.0/numerical_rank"] == n - 1
    assert row["collapse/score"] == 0


def test_an_embedding_of_all_directions_that_samples_show_is_judged_by_their_number():
    """Rank r of n samples in a wide embedding is dimensional collapse where r <= share * (n - 1)."""
    torch.manual_seed(0)

    class Embedder(Module):
        def embed(self, x):
            return x, x

    n = 5
    x = independent(n, 6)  # effective rank 4 of at most 4
    for below, collapse in ((0.99, 0.0), (1.0, 1.0)):
        monitor = EigenmodeMonitor(
            every_n_steps=1,
            inputs=lambda batch: [batch[0], batch[0]],
            dimensional_below=below,
            picture=False,
            strict=True,
        )
        loader = DataLoader(TensorDataset(x, torch.arange(n) % 3), n)
        fit(Embedder("mlp"), monitor, loader=loader, max_steps=1)
        row = monitor.history[0]
        assert row["eigenmodes/embedding/rank"] == pytest.approx(n - 1)
        assert row["eigenmodes/embedding/collapse"] == (
            collapse if row["eigenmodes/embedding/rank"] <= 4 * below else 0
        )


def test_trainability_is_logged_under_the_step_of_the_epochs_last_batch(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    class Logs(Module):
        def on_train_epoch_end(self):
            self.log("ended", 1.0)

    logger = TensorBoardLogger(tmp_path)
    monitor = PlasticityMonitor(trainability_steps=1, every_n_steps=2, strict=True)
    fit(Logs("mlp"), monitor, logger=logger, log_every_n_steps=1)
    events = EventAccumulator(logger.log_dir).Reload()
    assert [event.step for event in events.Scalars("plasticity/trainability")] == [2, 5]
    assert [event.step for event in events.Scalars("ended")] == [2, 5]  # as Lightning logs epochs
    assert [row["step"] for row in monitor.history if "plasticity/trainability" in row] == [3, 6]


def test_each_monitor_has_its_own_labels():
    def nc(*monitors: CollapseMonitor) -> list[float]:
        torch.manual_seed(0)
        fit(Module("mlp"), *monitors, max_steps=1)
        return [next(v for k, v in m.history[0].items() if k.endswith("/nc1")) for m in monitors]

    def by(targets: int, name: str) -> CollapseMonitor:
        return CollapseMonitor(every_n_steps=1, targets=targets, name=name, strict=True)

    (first,), (second,) = nc(by(1, "a")), nc(by(2, "b"))
    assert first != second
    assert nc(by(1, "a"), by(2, "b")) == [first, second]
    assert nc(by(2, "b"), by(1, "a")) == [second, first]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_counts_as_rounding_grows_with_the_number_of_eigenvalues(dtype):
    """Below D * eps of the largest is rounding, from eps up to that, too."""
    width = 256
    eps = torch.finfo(dtype).eps
    for share, counts in ((0.5, False), (2.0, True)):
        values = torch.full((width,), share * width * eps, dtype=dtype)
        values[0] = 1.0
        spread = float(effective_rank_from_eigenvalues(values)) > 1
        assert spread == counts
        assert int(numerical_rank_from_eigenvalues(values, rtol=0.0)) == (width if counts else 1)


def test_phases_of_a_loss_begin_beyond_their_bounds_not_at_them():
    assert loss_phases([1, 2], [1.0, 1.0], flat=0.0) == []  # a slope of 0 is not less than 0
    assert [p.what for p in loss_phases([1, 2], [1.0, 1.0], flat=1e-9)] == ["plateau"]
    assert loss_phases([1, 2], [1.0, 0.5], steep=1.0) == []  # a slope of 1 is not above 1
    assert [p.what for p in loss_phases([1, 2], [1.0, 0.5], steep=1 - 1e-9)] == ["drop"]
    assert [p.what for p in loss_phases([1, 2], [1.0, 1.0], window=2.0)] == ["plateau"]  # just far enough
    assert loss_phases([1, 2], [1.0, 1.0], window=2.1) == []
    assert loss_phases([1, 2, 4], [0.0, 1.0, 1.0], window=1.5)[0].after == 1
