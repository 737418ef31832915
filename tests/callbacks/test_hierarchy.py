"""HierarchyMonitor: distances and events against loops, silence, ranks, resumption, references."""

import json
import math

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_sym.callbacks import CollapseMonitor, HierarchyMonitor
from lightning_sym.engine.schedule import LogSpaced
from lightning_sym.functional import effective_rank, gram_alignment
from tests.models import Classifier, convnet, data, fit, images, mlp, trainer


def classifier(*, scale=1.0, act=nn.ReLU, seed=0, **settings):
    torch.manual_seed(seed)
    module = Classifier(mlp(4, 6, 3, act=act), **settings)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter *= scale
    return module


def by_hand(net):
    """Distance of every hidden unit of two layers to zero and to its nearest other, one by one."""
    into, bias, out = (p.detach().double() for p in (net[0].weight, net[0].bias, net[2].weight))
    rows = [torch.cat([into[u], bias[u : u + 1], out[:, u]]) for u in range(len(into))]
    rms = math.sqrt(sum(float(row @ row) for row in rows) / len(rows))
    zero = [min(float(row.norm()) / rms, float(row.norm()), 1.0) for row in rows]
    twin = []
    for row in rows:
        others = [other for other in rows if other is not row]
        gaps = [(float((row - o).norm()), math.sqrt(float(row @ row + o @ o))) for o in others]
        twin.append(min(min(gap / size, gap / math.sqrt(2), 1.0) for gap, size in gaps))
    return {"net.0/permutation": twin, "net.0/rescaling": zero}


class Twin(HierarchyMonitor):
    """Keeps what a loop reads beside what the monitor does."""

    def __init__(self, **options):
        super().__init__(**options)
        self.expected = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if not self.expected:
            self.expected.append({"step": 0, **by_hand(pl_module.net)})
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if self.history and self.history[-1]["step"] == trainer.global_step:
            self.expected.append({"step": trainer.global_step, **by_hand(pl_module.net)})


def test_distances_and_events_are_those_of_a_loop():
    monitor = Twin(every_n_steps=2, strict=True, broken_above=0.3, restored_below=0.2)
    loader = DataLoader(TensorDataset(*data(64)), 64)
    fit(classifier(scale=0.1, lr=1.0), monitor, loader=loader, max_epochs=60)
    assert [row["step"] for row in monitor.distances] == [row["step"] for row in monitor.expected]
    state, events = {}, []
    for k, expected in enumerate(monitor.expected):
        shares = {}
        for where in ("net.0/permutation", "net.0/rescaling"):
            torch.testing.assert_close(
                monitor.distances[k][where], torch.tensor(expected[where]), rtol=1e-4, atol=1e-6
            )
            changed = {"broken": [], "restored": []}
            for unit, distance in enumerate(expected[where]):
                was = state.get((where, unit), distance > 0.3)
                now = True if distance > 0.3 else False if distance < 0.2 else was
                state[where, unit] = now
                if now != was:
                    changed["broken" if now else "restored"].append(unit)
            place = {"step": expected["step"], "after": monitor.expected[k - 1]["step"], "where": where}
            events += [{"event": e, **place, "units": units} for e, units in changed.items() if units]
            shares[where] = sum(state[where, unit] for unit in range(6)) / 6
        if k:
            row = monitor.history[k - 1]
            assert {where: row[f"hierarchy/{where}"] for where in shares} == pytest.approx(shares)
            for event in ("broken", "restored"):
                count = sum(
                    len(e["units"]) for e in events if e["event"] == event and e["step"] == row["step"]
                )
                assert row[f"hierarchy/{event}"] == count

    def ordered(found):
        return sorted(found, key=lambda e: (e["step"], e["where"], e["event"]))

    assert ordered(e for e in monitor.events if e["where"] != "loss") == ordered(events)
    assert {e["where"] for e in events} == {"net.0/permutation", "net.0/rescaling"}


def test_between_the_thresholds_a_unit_stays_what_it_was():
    monitor = HierarchyMonitor(broken_above=0.3, restored_below=0.1)
    monitor._numbers = {"a/rescaling": [0, 4]}
    course = ((0.2, 0.4), (0.4, 0.2), (0.2, math.nan), (0.05, 0.05), (0.2, 0.2), (math.nan, 0.4))
    for step, distances in enumerate(course):
        monitor._judge({"a/rescaling": torch.tensor(distances)}, step=step)
    assert [(e["step"], e["event"], e["units"]) for e in monitor.events] == [
        (1, "broken", [0]),
        (3, "restored", [0, 4]),
        (5, "broken", [4]),
    ]


def test_units_that_decay_are_restored_once():
    monitor = HierarchyMonitor(every_n_steps=1, strict=True)
    fit(classifier(lr=0.5, weight_decay=0.5), monitor, max_epochs=8)
    restored = [e for e in monitor.events if e["event"] == "restored" and e["where"] == "net.0/rescaling"]
    assert sorted(unit for e in restored for unit in e["units"]) == list(range(6))
    assert not any(e["event"] == "broken" for e in monitor.events)
    assert monitor.history[-1]["hierarchy/net.0/effective_units"] == 0
    assert monitor.history[0]["hierarchy/net.0/effective_units"] == 6


def test_ranks_loss_and_phases_are_those_of_the_step():
    x = data(64)[0]
    y = x[:, :3].argmax(1)
    module = classifier(scale=0.1, lr=2.0)
    monitor = HierarchyMonitor(every_n_steps=LogSpaced(8), strict=True)
    seen = {}

    class Before(CollapseMonitor):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
            hidden = pl_module.net[0](x).detach()
            out = pl_module.net(x).detach()
            seen[trainer.global_step + 1] = (float(effective_rank(hidden)), float(effective_rank(out)))

    # The other monitor comes first, and hands the observation over before this one's turn.
    other = Before(every_n_steps=3, strict=True)
    fit(module, other, monitor, loader=DataLoader(TensorDataset(x, y), 64), max_epochs=150)
    steps = [int(row["step"]) for row in monitor.history]
    assert steps[:6] == [1, 2, 3, 4, 6, 7]
    for row in monitor.history:
        step = int(row["step"])
        assert row["hierarchy/loss"] == pytest.approx(float(module.losses[step - 1]))
        first, second = seen[step]
        assert row["hierarchy/net.0/rank"] == pytest.approx(first, rel=1e-3)
        assert row["hierarchy/net.2/rank"] == pytest.approx(second, rel=1e-3)
        role = -1 if second / first < 0.9 else 1 if second / first > 1.1 else 0
        assert row["hierarchy/net.2/role"] == role
    phases = [e for e in monitor.events if e["where"] == "loss"]
    assert [e["event"] for e in phases][:2] == ["plateau", "drop"]
    drop = phases[1]
    assert drop["value"] == pytest.approx(float(module.losses[drop["step"] - 1]))
    slope = math.log(float(module.losses[drop["after"] - 1]) / drop["value"])
    assert slope / math.log(drop["step"] / drop["after"]) > 1
    at = steps.index(drop["step"])
    assert monitor.history[at]["hierarchy/phase"] == 1
    assert monitor.history[at - 1]["hierarchy/phase"] == 0


def test_accumulated_batches_have_one_loss():
    module = classifier()
    monitor = HierarchyMonitor(every_n_steps=2, strict=True)
    fit(module, monitor, accumulate_grad_batches=3, max_epochs=4)
    assert [row["step"] for row in monitor.history] == [1, 2, 4]
    for row in monitor.history:
        step = int(row["step"])
        mean = torch.stack(module.losses[3 * step - 3 : 3 * step]).mean()
        assert row["hierarchy/loss"] == pytest.approx(float(mean))


@pytest.mark.parametrize("returns", [True, False])
def test_manual_optimization_has_the_loss_that_it_returns(returns):
    class Manual(Classifier):
        def __init__(self, net):
            super().__init__(net)
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.optimizers().zero_grad()
            self.manual_backward(loss)
            self.optimizers().step()
            return loss if returns else None

    module = Manual(mlp(4, 6, 3, act=nn.ReLU))
    monitor = HierarchyMonitor(every_n_steps=4, strict=True)
    fit(module, monitor)
    assert [row["step"] for row in monitor.history] == [1, 4, 8]
    for row in monitor.history:
        found = [row["hierarchy/loss"]] if returns else []
        assert found == pytest.approx([float(module.losses[int(row["step"]) - 1])] if returns else [])
        assert ("hierarchy/loss" in row) == returns


def test_the_loss_may_be_a_metric():
    module = classifier()
    monitor = HierarchyMonitor(every_n_steps=3, loss="val_loss", strict=True)
    run = trainer(callbacks=[monitor], max_epochs=3)
    run.fit(module, DataLoader(TensorDataset(*data()), 8), DataLoader(TensorDataset(*data(6)), 6))
    # Known once validation has run: in the sanity check it is not.
    assert ["hierarchy/loss" in row for row in monitor.history] == [False, False, True, True]
    assert not any("loss" in key for key in HierarchyMonitor(loss="none").history)


def test_a_linear_network_breaks_one_direction_at_a_time():
    torch.manual_seed(0)
    x = torch.eye(4)
    y = x * torch.tensor([4.0, 1.0, 0.25, 0.0])
    net = nn.Sequential(nn.Linear(4, 5, bias=False), nn.Linear(5, 4, bias=False))
    for p in net.parameters():
        p.data *= 0.005

    class Regression(Classifier):
        def training_step(self, batch, batch_idx):
            return (self(batch[0]) - batch[1]).square().sum() / 2

    monitor = HierarchyMonitor(every_n_steps=LogSpaced(20), strict=True)
    loader = DataLoader(TensorDataset(x, y), 4)
    fit(Regression(net, lr=0.02), monitor, loader=loader, max_epochs=1200)
    broken = [e for e in monitor.events if e["event"] == "broken"]
    assert list(monitor.history[-1])[2] == "hierarchy/net.0/rotation"
    assert [e["units"] for e in broken] == [[0], [1], [2]]
    assert monitor.history[-1]["hierarchy/net.0/effective_units"] == 3
    drops = [e for e in monitor.events if e["event"] == "drop"]
    assert len(drops) == 3
    for e, drop in zip(broken, drops, strict=True):
        assert 0.5 < e["step"] / drop["step"] < 1.5
    # At this scale of the weights the directions are told apart by size alone.
    relative = HierarchyMonitor(every_n_steps=1, scale=None, kinds=["permutation"], strict=True)
    fit(Regression(net, lr=0.0), relative, loader=loader, max_epochs=1)
    assert relative.history[0].keys() >= {"hierarchy/net.0/permutation"}
    assert "hierarchy/net.0/rotation" not in relative.history[0]


def test_wide_layers_are_read_on_some_of_their_units():
    torch.manual_seed(0)
    module = Classifier(mlp(4, 40, 3, act=nn.ReLU), lr=0.5, weight_decay=0.5)
    monitor = HierarchyMonitor(every_n_steps=1, max_units=8, strict=True)
    fit(module, monitor, max_epochs=8)
    assert len(monitor.distances[0]["net.0/permutation"]) == 8
    restored = {u for e in monitor.events if e["where"] == "net.0/rescaling" for u in e["units"]}
    assert restored == set(range(0, 40, 5))


def test_a_run_with_the_monitor_is_bitwise_the_run_without(tmp_path):
    torch.manual_seed(1)
    torch.save(Classifier(convnet()).state_dict(), tmp_path / "other.pt")
    states = []
    watch = HierarchyMonitor(every_n_steps=1, reference=tmp_path / "other.pt", samples=4, strict=True)
    for callbacks in ([], [watch]):
        torch.manual_seed(0)
        module = Classifier(convnet(), momentum=0.9)
        run = fit(module, *callbacks, loader=images(shuffle=True))
        kept = [*module.state_dict().values(), *module.losses, *(p.grad for p in module.parameters())]
        kept += [state["momentum_buffer"] for state in run.optimizers[0].state.values()]
        states.append((kept, torch.get_rng_state()))
        assert not any(child._forward_hooks for child in module.modules())
        assert all(child.training for child in module.modules())
    assert torch.equal(states[0][1], states[1][1])
    assert all(torch.equal(a, b) for a, b in zip(states[0][0], states[1][0], strict=True))
    assert len(watch.history) == 12
    assert watch.symmetries == {}


@pytest.mark.parametrize("suffix", ["ckpt", "pt", "safetensors"])
def test_alignment_with_a_reference_is_that_of_its_features(tmp_path, suffix):
    other, x = classifier(seed=1), data(40, seed=2)[0]
    path = tmp_path / f"other.{suffix}"
    if suffix == "ckpt":
        fit(other, max_epochs=1).save_checkpoint(path)
    elif suffix == "pt":
        torch.save(other.state_dict(), path)
    else:
        save_file(other.state_dict(), path)
    module = classifier(lr=0.3)
    monitor = HierarchyMonitor(every_n_steps=4, reference=str(path), data=x, samples=30, strict=True)
    fit(module, monitor, max_steps=4)
    row, x = monitor.history[-1], x[:30]
    with torch.no_grad():
        first = float(gram_alignment(module.net[0](x), other.net[0](x)))
        second = float(gram_alignment(module.net(x), other.net(x)))
    assert row["hierarchy/net.0/alignment"] == pytest.approx(first, rel=1e-5)
    assert row["hierarchy/net.2/alignment"] == pytest.approx(second, rel=1e-5)
    assert row["hierarchy/alignment"] == pytest.approx((first + second) / 2, rel=1e-5)


def test_wide_features_keep_their_inner_products():
    from lightning_sym.callbacks.hierarchy import _compact

    x = torch.randn(7, 30, generator=torch.Generator().manual_seed(0)).double()
    small = _compact(x)
    assert small.shape == (7, 7)
    torch.testing.assert_close(small @ small.T, x @ x.T)


def test_a_resumed_run_reads_what_an_unbroken_one_does(tmp_path):
    torch.save(classifier(seed=1).state_dict(), tmp_path / "other.pt")

    def watch():
        return HierarchyMonitor(
            every_n_steps=LogSpaced(12), reference=str(tmp_path / "other.pt"), strict=True
        )

    def module():
        return classifier(scale=0.1, lr=1.0)

    loader = DataLoader(TensorDataset(*data(64)), 32)
    whole, first, second = watch(), watch(), watch()
    fit(module(), whole, loader=loader, max_epochs=60)
    fit(module(), first, loader=loader, max_epochs=13).save_checkpoint(tmp_path / "c.ckpt")
    fit(module(), second, loader=loader, max_epochs=60, ckpt_path=tmp_path / "c.ckpt")
    assert 0 < len(first.events) < len(whole.events)
    assert second.events == whole.events
    assert second.history == whole.history
    assert len(second.distances) == len(whole.distances)
    fit(module(), second, loader=loader, max_epochs=60)  # another run has a start of its own
    assert second.events == whole.events


def test_two_ranks_read_what_one_reads(tmp_path):
    class Dump(HierarchyMonitor):
        def on_train_end(self, trainer, pl_module):
            file = tmp_path / f"{trainer.world_size}-{trainer.global_rank}.json"
            file.write_text(json.dumps([self.history, self.events]))

    torch.save(classifier(seed=1).state_dict(), tmp_path / "other.pt")
    options = {"every_n_steps": 2, "reference": str(tmp_path / "other.pt"), "strict": True}
    loader = DataLoader(TensorDataset(*data()), 24)
    fit(classifier(scale=0.1, lr=1.0), Dump(**options), loader=loader, max_epochs=40)
    loader = DataLoader(TensorDataset(*data()), 12)
    fit(
        classifier(scale=0.1, lr=1.0),
        Dump(**options),
        loader=loader,
        max_epochs=40,
        devices=2,
        strategy="ddp_fork",
    )
    one, a, b = (json.loads((tmp_path / name).read_text()) for name in ("1-0.json", "2-0.json", "2-1.json"))
    assert a == b
    assert a[1]
    for row, expected in zip(a[0], one[0], strict=True):
        assert row == pytest.approx(expected, rel=1e-2, abs=1e-4)


def test_events_reach_loggers_as_text_markers_and_picture(tmp_path):
    from lightning.pytorch.loggers import TensorBoardLogger
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monitor = HierarchyMonitor(histograms=True, strict=True)
    module = classifier(lr=0.5, weight_decay=0.5)
    fit(module, monitor, logger=TensorBoardLogger(tmp_path), max_epochs=8)
    events = EventAccumulator(str(next(tmp_path.rglob("events*"))))
    events.Reload()
    tags = events.Tags()
    (text,) = [tag for tag in tags["tensors"] if "hierarchy/events" in tag]
    said = b"".join(e.tensor_proto.string_val[0] for e in events.Tensors(text)).decode()
    assert "net.0/rescaling: " in said
    assert " of 6 restored between steps " in said
    markers = sum(e.value for e in events.Scalars("hierarchy/restored"))
    assert markers == sum(len(e["units"]) for e in monitor.events if e["event"] == "restored") > 0
    assert "hierarchy/course" in tags["images"]
    assert "hierarchy/net.0/rescaling/distances" in tags["histograms"]


def test_a_fault_is_one_warning_and_the_rest_is_read():
    monitor = HierarchyMonitor(every_n_steps=1, inputs=lambda batch: batch[7])
    with pytest.warns(UserWarning, match="HierarchyMonitor failed in start at step 0.*IndexError"):
        fit(classifier(), monitor)
    assert "hierarchy/net.0/rank" in monitor.history[-1]
    assert not any("permutation" in key for key in monitor.history[-1])
    with pytest.raises(IndexError):
        fit(classifier(), HierarchyMonitor(inputs=lambda batch: batch[7], strict=True))


def test_bad_input_is_named(tmp_path):
    for options, message in (
        ({"kinds": ["mirror"]}, r"kinds must be among .* got \['mirror'\]"),
        ({"scale": 0.0}, "scale must be positive or None, got 0.0"),
        ({"restored_below": 0.2}, r"in order and in \[0, 1\), got 0.2 and 0.1"),
        ({"max_units": 1}, "max_units must be at least 2, got 1"),
        ({"samples": 1}, "samples must be at least 2, got 1"),
        ({"window": 1.0}, "flat must be less than steep and window above 1, got 0.25, 1.0 and 1.0"),
        ({"data": torch.ones(1, 3)}, "data must hold at least 2 samples, got 1"),
    ):
        with pytest.raises(ValueError, match=message):
            HierarchyMonitor(**options)
    for name, stored, message in (
        ("short.pt", mlp(4, 6).state_dict(), "holds no tensor 'net.0.weight'"),
        ("wide.pt", Classifier(mlp(4, 9, 3)).state_dict(), r"of shape \(6, 4\), got \(9, 4\)"),
        ("object.pt", {"state_dict": classifier()}, "is not a file of tensors"),
    ):
        torch.save(stored, tmp_path / name)
        with pytest.raises(ValueError, match=message):
            fit(classifier(), HierarchyMonitor(reference=str(tmp_path / name)))
    with pytest.raises(FileNotFoundError, match=r"reference='.*none.pt' is no file"):
        fit(classifier(), HierarchyMonitor(reference=str(tmp_path / "none.pt")))
    with pytest.raises(TypeError, match="forward='features' is not a method of Classifier"):
        fit(classifier(), HierarchyMonitor(forward="features"))
    with pytest.raises(ValueError, match="matches no layer"):
        fit(classifier(), HierarchyMonitor(layers="head"))


def test_it_is_built_from_plain_values():
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(HierarchyMonitor, "monitor")
    config = parser.parse_args(["--monitor.every_n_steps=7", "--monitor.kinds=[rotation]"])
    built = parser.instantiate(config).monitor
    assert (built.kinds, built.schedule.next(7)) == (["rotation"], 14)
    assert parser.instantiate(parser.parse_args([])).monitor.schedule == LogSpaced(12)
