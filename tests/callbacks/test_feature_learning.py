"""FeatureLearningMonitor: against single derivatives, the solved model, ranks, resumption, silence."""

import json
import math
import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_sym.callbacks import FeatureLearningMonitor
from lightning_sym.engine.schedule import EpochEnds
from lightning_sym.papers.feature_learning import SolvableNetwork
from tests.models import Classifier, convnet, data, fit, images, mlp
from tests.uneven import Counting, uneven


def classifier(**settings):
    torch.manual_seed(0)
    return Classifier(mlp(4, 9, 7, 3, act=nn.ReLU), **settings)


def loop_kernel(net, x):
    """Exact kernel, one derivative after the other."""
    rows = []
    for sample in x:
        for output in range(3):
            grads = torch.autograd.grad(net(sample[None])[0, output], list(net.parameters()))
            rows.append(torch.cat([g.flatten() for g in grads]).double())
    kernel = torch.zeros(len(x), len(x)).double()
    for n in range(len(x)):
        for m in range(len(x)):
            for output in range(3):
                kernel[n, m] += rows[3 * n + output] @ rows[3 * m + output] / 3
    return kernel


def test_readings_are_those_of_single_derivatives():
    module = classifier(lr=0.5)
    x = data(6, seed=1)[0]
    weights = [p.detach().clone() for p in module.parameters()]
    before = loop_kernel(module.net, x)
    monitor = FeatureLearningMonitor(every_n_steps=100, data=x, samples=5, strict=True)
    fit(module, monitor, max_steps=1)
    after = loop_kernel(module.net, x)[:5, :5]
    before = before[:5, :5]
    row = monitor.history[-1]
    change = (after - before).norm() / before.norm()
    assert row["feature_learning/kernel_change"] == pytest.approx(float(change), rel=1e-4)
    cosine = (after * before).sum() / after.norm() / before.norm()
    assert row["feature_learning/kernel_cosine"] == pytest.approx(float(cosine), rel=1e-5)
    assert row["feature_learning/kernel_growth"] == pytest.approx(float(after.trace() / before.trace()))
    new = [p.detach() for p in module.parameters()]
    moved = sum(float((a - b).square().sum()) for a, b in zip(new, weights, strict=True)) ** 0.5
    size = sum(float(b.square().sum()) for b in weights) ** 0.5
    assert row["feature_learning/weight_change"] == pytest.approx(moved / size, rel=1e-4)
    layer = float((new[2] - weights[2]).norm() / weights[2].norm())
    assert row["feature_learning/net.2/weight_change"] == pytest.approx(layer, rel=1e-4)
    hidden = module.net[:2](x[:5]).detach()
    aligned = float((hidden @ new[2].T).norm() / hidden.norm() / new[2].norm())
    assert row["feature_learning/net.2/alignment"] == pytest.approx(aligned, rel=1e-4)
    norms = 1.0
    for i in (0, 2, 4):
        norms *= float(new[i].norm() / weights[i].norm())
    assert row["feature_learning/norms"] == pytest.approx(norms ** (2 / 3), rel=1e-4)
    both = [row[f"feature_learning/net.{i}/alignment"] for i in (2, 4)]
    assert row["feature_learning/alignment"] == pytest.approx(sum(both) / 2)


def test_a_sketch_reads_nearly_the_same():
    seen = []
    for options in ({"sketch": None}, {"sketch": 4000}):
        torch.manual_seed(0)
        module = Classifier(mlp(4, 300, 40, 3, act=nn.ReLU), lr=0.3)
        monitor = FeatureLearningMonitor(every_n_steps=100, strict=True, **options)
        fit(module, monitor, max_steps=9)
        seen.append(monitor.history[-1])
    assert seen[0] != seen[1]
    for key in ("weight_change", "kernel_cosine", "kernel_growth", "net.2/weight_change"):
        name = f"feature_learning/{key}"
        assert seen[1][name] == pytest.approx(seen[0][name], rel=0.05), key


CASES = {
    "kernel": ({"output_scale": 400**-0.5}, "kernel", "none"),
    "mixed": ({"output_scale": 1 / 400, "lr_u": 400.0, "lr_w": 100.0}, "mixed", "alignment"),
    "small": ({"output_scale": 1 / 400, "var_u": 0.01, "var_w": 0.01}, "rich", "alignment"),
    "too large": ({"output_scale": 4 / 400, "alignment": 0.9}, "mixed", "disalignment"),
    "aligned": ({"output_scale": 1 / 400, "var_u": 0.1, "var_w": 0.1, "alignment": 1.0}, "rich", "rescaling"),
}


@pytest.mark.parametrize("name", CASES)
def test_the_solved_model_is_read_as_solved(name):
    options, verdict, mechanism = CASES[name]
    module = SolvableNetwork(400, pace=0.05, **options)
    x, y = torch.tensor([[1.0], [-1.0]]).double(), torch.tensor([1.0, -1.0]).double()
    solution = module.solution(x, y=y)
    monitor = FeatureLearningMonitor(every_n_steps=600, by_rate=True, sketch=None, strict=True)
    fit(module, monitor, loader=DataLoader(TensorDataset(x, y), 2), max_steps=600, max_epochs=-1)
    row = monitor.history[-1]
    assert (monitor.verdict, monitor.mechanism) == (verdict, mechanism)
    assert row["feature_learning/kernel_growth"] == pytest.approx(solution.growth, rel=0.02)
    assert row["feature_learning/kernel_change"] == pytest.approx(
        abs(solution.growth - 1), abs=0.02, rel=0.02
    )
    start, end = solution.at(torch.tensor([0.0, torch.inf])).alignment.abs().tolist()
    assert row["feature_learning/alignment"] == pytest.approx(end, rel=0.02, abs=0.01)
    change = row["feature_learning/alignment_change"]
    assert row["feature_learning/alignment"] - change == pytest.approx(start, abs=1e-6)
    norms = solution.at(torch.tensor([0.0, torch.inf])).norms
    assert row["feature_learning/norms"] == pytest.approx(float(norms[1] / norms[0]), rel=0.02)


def test_a_run_with_the_monitor_is_bitwise_the_run_without():
    states = []
    for callbacks in ([], [FeatureLearningMonitor(every_n_steps=1, samples=4, strict=True)]):
        torch.manual_seed(0)
        module = Classifier(convnet(), momentum=0.9)
        fit(module, *callbacks, loader=images(shuffle=True))
        states.append(([*module.state_dict().values(), *module.losses], torch.get_rng_state()))
        hooks = [h for child in module.modules() for h in child._forward_hooks]
        assert hooks == []
    assert torch.equal(states[0][1], states[1][1])
    assert all(torch.equal(a, b) for a, b in zip(states[0][0], states[1][0], strict=True))


def test_accumulation_starts_before_the_first_step():
    monitor = FeatureLearningMonitor(every_n_steps=1, strict=True)
    fit(classifier(), monitor, accumulate_grad_batches=3)
    assert [row["step"] for row in monitor.history] == [1, 2, 3]
    assert monitor.history[0]["feature_learning/weight_change"] > 0


def test_resuming_compares_with_the_first_start(tmp_path):
    whole = FeatureLearningMonitor(every_n_steps=1, strict=True)
    fit(classifier(), whole, max_epochs=4)
    first = FeatureLearningMonitor(every_n_steps=1, strict=True)
    fit(classifier(), first, max_epochs=2).save_checkpoint(tmp_path / "c.ckpt")
    second = FeatureLearningMonitor(every_n_steps=1, strict=True)
    fit(classifier(), second, max_epochs=4, ckpt_path=tmp_path / "c.ckpt")
    assert second.history == whole.history
    fit(classifier(), second, max_epochs=1)  # another run has a start of its own
    again = [{**row, "fit": 1} for row in second.history[-3:]]
    assert again == whole.history[:3]
    assert second.history[-1]["fit"] == 2


@pytest.mark.parametrize("how", ["nothing", "data", "folder"])
def test_a_resumed_run_whose_samples_are_gone_reads_what_needs_none(how, tmp_path, caplog):
    """Checkpoints hold no samples: of a shuffled loader they are the data given, in the folder, or gone."""
    caplog.set_level("INFO")
    more = {"nothing": {}, "data": {"data": data(6)[0]}, "folder": {"keep": tmp_path / "kept"}}[how]

    def run(epochs, path=None):
        monitor = FeatureLearningMonitor(every_n_steps=1, samples=6, strict=True, **more)
        module = classifier()
        torch.manual_seed(epochs)
        loader = DataLoader(TensorDataset(*data()), 8, shuffle=True)
        trainer = fit(module, monitor, loader=loader, max_epochs=epochs, ckpt_path=path)
        return trainer, monitor

    first, before = run(1)
    first.save_checkpoint(tmp_path / "c.ckpt")
    _, resumed = run(2, tmp_path / "c.ckpt")
    assert len(resumed.history) == 6
    keys = set(before.history[-1])
    lost = {key for key in keys if "kernel" in key or "alignment" in key or "verdict" in key}
    lost |= {"feature_learning/mechanism"}
    assert set(resumed.history[-1]) == (keys - lost if how == "nothing" else keys)
    change = "feature_learning/weight_change"  # still from the first start
    assert resumed.history[-1][change] > resumed.history[2][change]
    told = "goes on without the kernel and alignments, which were those of other samples" in caplog.text
    assert told == (how == "nothing")
    if how != "nothing":
        assert torch.equal(before.held.samples["args"][0], resumed.held.samples["args"][0])


def test_two_ranks_read_what_one_reads(tmp_path):
    class Dump(FeatureLearningMonitor):
        def on_train_end(self, trainer, pl_module):
            file = tmp_path / f"{trainer.world_size}-{trainer.global_rank}.json"
            file.write_text(json.dumps(self.history))

    options = {"every_n_steps": 1, "samples": 16, "strict": True}
    fit(classifier(), Dump(**options), loader=DataLoader(TensorDataset(*data()), 24), max_epochs=2)
    loader = DataLoader(TensorDataset(*data()), 12)
    fit(classifier(), Dump(**options), loader=loader, max_epochs=2, devices=2, strategy="ddp_fork")
    one, a, b = (json.loads((tmp_path / name).read_text()) for name in ("1-0.json", "2-0.json", "2-1.json"))
    assert a == b
    for row, expected in zip(a, one, strict=True):
        assert row.keys() == expected.keys()
        assert row["feature_learning/weight_change"] == pytest.approx(
            expected["feature_learning/weight_change"], rel=1e-3
        )


def test_words_reach_loggers_that_take_text(tmp_path):
    from lightning.pytorch.loggers import TensorBoardLogger
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    fit(classifier(), FeatureLearningMonitor(strict=True), logger=TensorBoardLogger(tmp_path))
    events = EventAccumulator(str(next(tmp_path.rglob("events*"))))
    events.Reload()
    assert any("feature_learning/summary" in tag for tag in events.Tags()["tensors"])
    assert "feature_learning/kernel_change" in events.Tags()["scalars"]


def test_bad_input_is_named():
    for options, message in (
        ({"samples": 0}, "samples must be at least 1, got 0"),
        ({"sketch": 0}, "sketch must be at least 1, got 0"),
        ({"kernel_below": 2.0}, "kernel_below must be positive and at most rich_above, got 2.0 and 1.0"),
        ({"tolerance": 0.0}, r"tolerance must be in \(0, 1\), got 0.0"),
        ({"data": torch.ones(0, 3)}, "data must hold a sample"),
    ):
        with pytest.raises(ValueError, match=message):
            FeatureLearningMonitor(**options)
    with pytest.raises(TypeError, match="forward='features' is not a method of Classifier"):
        fit(classifier(), FeatureLearningMonitor(forward="features"))
    uneven = {"inputs": lambda batch: [batch[0], batch[1][:3]]}
    with pytest.raises(TypeError, match=r"must find tensors with a row for each sample.*; pass data"):
        fit(classifier(), FeatureLearningMonitor(strict=True, **uneven))
    with pytest.warns(UserWarning, match="FeatureLearningMonitor failed in start at step 0: TypeError"):
        fit(classifier(), FeatureLearningMonitor(**uneven), max_steps=1)
    with pytest.raises(TypeError, match="data must be made of tensors with a row for each sample"):
        fit(classifier(), FeatureLearningMonitor(data=[torch.ones(2, 4), torch.ones(3)], strict=True))
    at_start = EpochEnds(at_start=True)
    with pytest.raises(ValueError, match=r"every_n_steps=EpochEnds.* before there is a start"):
        fit(classifier(), FeatureLearningMonitor(every_n_steps=at_start))
    with pytest.raises(ValueError, match="layers='nothing' matches no layer"):
        fit(classifier(), FeatureLearningMonitor(layers="nothing"))


def test_it_is_built_from_plain_values():
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(FeatureLearningMonitor, "monitor")
    built = parser.instantiate(parser.parse_args(["--monitor.every_n_steps=7"])).monitor
    assert built.schedule.next(7) == 14
    assert parser.instantiate(parser.parse_args([])).monitor.schedule.next(1) == 2


class Dump(FeatureLearningMonitor):
    """Writes what a rank has read, and said last."""

    def __init__(self, path, **options):
        super().__init__(every_n_steps=1, **options)
        self.path = path

    def on_train_end(self, trainer, pl_module):
        words = [trainer.global_step, self.verdict, self.mechanism, self.history]
        (self.path / f"{trainer.world_size}-{trainer.global_rank}.json").write_text(json.dumps(words))


def test_ranks_whose_batches_differ_give_one_probe(tmp_path):
    """Samples are taken from each rank in turn: the first has five of eight, the second the other three."""
    in_turn = data()[0][[0, 5, 1, 6, 2, 7, 3]]
    for devices, strategy in ((1, "auto"), (2, "ddp_fork")):
        monitor = Dump(tmp_path, samples=7, data=in_turn if devices == 1 else None, strict=True)
        module = classifier(lr=0.0)
        ranks = {"devices": devices, "strategy": strategy, "use_distributed_sampler": False}
        fit(module, monitor, loader=uneven(), max_epochs=1, **ranks)
    one, a, b = (json.loads((tmp_path / name).read_text()) for name in ("1-0.json", "2-0.json", "2-1.json"))
    assert a == b
    assert (a[1], a[2]) == ("kernel", "none")
    for row, expected in zip(a[3], one[3], strict=True):
        assert row == pytest.approx(expected, rel=1e-5, abs=1e-7)


def test_a_fault_on_one_rank_stops_no_other(tmp_path):
    def inputs(batch):
        if torch.distributed.get_rank() == 1:
            raise KeyError("out of luck")
        return batch[0]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the first rank's says that it failed on the other
        loader = DataLoader(TensorDataset(*data()), 12)
        fit(classifier(), Dump(tmp_path, inputs=inputs), loader=loader, devices=2, strategy="ddp_fork")
    for rank in "01":
        step, verdict, _, history = json.loads((tmp_path / f"2-{rank}.json").read_text())
        assert (step, verdict) == (3, "")
        assert not any("feature_learning" in key for row in history for key in row)


class Keywords(Classifier):
    """The usual language-model module: dicts, and a forward that takes their entries by name."""

    def forward(self, *, x, scale):
        return self.net(x) * scale[:, None]

    def training_step(self, batch, batch_idx):
        logits = self(x=batch["x"], scale=batch["scale"])
        return nn.functional.cross_entropy(logits, batch["labels"])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"inputs": lambda batch: {"x": batch["x"], "scale": batch["scale"]}},
        {"inputs": lambda batch: ((), {"x": batch["x"], "scale": batch["scale"]})},
        {"data": {"x": data()[0][:8], "scale": torch.ones(8)}},
    ],
)
def test_a_forward_that_takes_keywords_is_read_as_one_that_takes_a_tensor(options):
    x, y = data()
    batches = [{"x": x[i : i + 8], "scale": torch.ones(8), "labels": y[i : i + 8]} for i in (0, 8, 16)]
    torch.manual_seed(0)
    module = Keywords(mlp(4, 9, 7, 3, act=nn.ReLU))
    named, right = (FeatureLearningMonitor(every_n_steps=1, strict=True, **o) for o in (options, {}))
    fit(module, named, loader=DataLoader(batches, batch_size=None), max_epochs=1)
    fit(classifier(), right, max_epochs=1)
    assert len(named.history) == 3
    for row, expected in zip(named.history, right.history, strict=True):
        assert row == pytest.approx(expected, rel=1e-5, abs=1e-6)


class Counted(Counting, Classifier):
    """Classifies, and counts."""


def test_calls_hooks_and_captured_functions_of_the_module_are_those_of_the_bare_fit():
    found, right = [], FeatureLearningMonitor(every_n_steps=1, strict=True)
    fit(classifier(), right)
    for watched in (False, True):
        torch.manual_seed(0)
        module = Counted(mlp(4, 9, 7, 3, act=nn.ReLU))
        monitor = FeatureLearningMonitor(every_n_steps=1, strict=True)
        fit(module, *[monitor] * watched)
        found.append((module.calls, module.fired, module.losses))
    assert found[0] == found[1]
    assert found[0][:2] == (9, [8] * 8)  # the hook is there from the second call on
    assert monitor.history == right.history


class Adapted(nn.Module):
    """A frozen layer with a low-rank adapter that starts at zero, called by keyword."""

    def __init__(self):
        super().__init__()
        self.base, self.head = nn.Linear(4, 9).requires_grad_(False), nn.Linear(9, 3)
        self.down, self.up = nn.Linear(4, 2, bias=False), nn.Linear(2, 9, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x):
        return self.head((self.base(input=x) + self.up(input=self.down(x))).relu())


def test_what_is_undefined_is_not_logged():
    torch.manual_seed(0)
    module = Classifier(Adapted(), lr=0.5)
    start = module.net.head.weight.detach().clone()
    monitor = FeatureLearningMonitor(every_n_steps=1, samples=8, strict=True)
    fit(module, monitor, max_steps=2)
    row = monitor.history[-1]
    assert all(math.isfinite(value) for row in monitor.history for value in row.values())
    for gone in ("norms", "mechanism", "net.up/weight_change"):
        assert f"feature_learning/{gone}" not in row
    up, head = (row[f"feature_learning/net.{name}/alignment"] for name in ("up", "head"))
    # The frozen base is not watched, and the data feed the adapter's first layer.
    assert row["feature_learning/alignment"] == pytest.approx((up + head) / 2)
    x = data()[0][:8]
    hidden = module.net.base(x).relu().detach()  # the adapter adds nothing at the start
    before = float((hidden @ start.T).norm() / hidden.norm() / start.norm())
    change = head - before  # of the layers that have an alignment both times and are not fed by data
    assert row["feature_learning/alignment_change"] == pytest.approx(change, abs=1e-5)
    assert monitor.mechanism == ""
    assert monitor.verdict in ("kernel", "mixed", "rich")


def test_a_layer_without_a_matrix_is_left_out():
    torch.manual_seed(0)
    net = mlp(4, 9, 7, 3, act=nn.ReLU)
    del net[2].weight
    net[2].register_parameter("weight", nn.Parameter(torch.randn(63) / 3))
    net[2].forward = lambda x: x @ net[2].weight.view(9, 7) + net[2].bias
    monitor = FeatureLearningMonitor(every_n_steps=1, strict=True)
    fit(Classifier(net), monitor, max_steps=1)
    names = {key.split("/")[1] for key in monitor.history[0] if key.count("/") == 2}
    assert names == {"net.0", "net.4"}


def test_parameters_without_values_are_no_start():
    module = Classifier(nn.Sequential(nn.LazyLinear(5), nn.Linear(5, 3)))
    module.configure_optimizers = lambda: torch.optim.SGD(module.net[1].parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"net.0.weight has no values yet.*; run a batch through"):
        fit(module, FeatureLearningMonitor(strict=True))


def test_ends_of_epochs_and_a_name_of_its_own():
    monitor = FeatureLearningMonitor(every_n_steps=EpochEnds(), name="ntk", strict=True)
    fit(classifier(), monitor, max_epochs=2)
    every = FeatureLearningMonitor(every_n_steps=3, strict=True)
    fit(classifier(), every, max_epochs=2)
    assert [row["step"] for row in monitor.history] == [3, 6]
    change = [row["ntk/kernel_change"] for row in monitor.history]
    assert change == [row["feature_learning/kernel_change"] for row in every.history if row["step"] > 1]


@pytest.mark.parametrize("later", [True, False])
def test_the_parameters_are_those_of_the_start_whatever_is_frozen_later(later):
    """Gradual unfreezing, and its reverse: a kernel of other parameters is no move of this one."""

    class Changes(Classifier):
        def on_train_batch_start(self, batch, index):
            self.net[0].requires_grad_(later if index == 2 else not later)

    def start(module):
        module.net[0].requires_grad_(not later)
        return module

    torch.manual_seed(0)
    module = start(Changes(mlp(4, 9, 7, 3, act=nn.ReLU), lr=0.5))
    before = [(name, p.detach().clone()) for name, p in module.named_parameters() if p.requires_grad]
    x = data(6, seed=1)[0]
    monitor = FeatureLearningMonitor(every_n_steps=3, data=x, samples=5, strict=True)
    fit(module, monitor, max_steps=3)
    now = {name: p.detach() for name, p in module.named_parameters()}
    moved = sum(float((now[name] - old).square().sum()) for name, old in before) ** 0.5
    size = sum(float(old.square().sum()) for _, old in before) ** 0.5
    assert monitor.history[-1]["step"] == 3
    assert monitor.history[-1]["feature_learning/weight_change"] == pytest.approx(moved / size, rel=1e-4)
    assert [p.requires_grad for p in module.net[0].parameters()] == [later, later]
