"""What do the monitors cost? Observed against other steps of the same fit, and what peers cost beside them.

    OMP_NUM_THREADS=1 python benchmarks/overhead.py

Every step is timed inside the process, by the processor's time of the thread that trains: that of other
processes, and of readings that are computed in a thread, is not in it (the latter is told apart). Where there
is an accelerator, seconds are taken. Kinds of fits are run in turn.

DeviceStatsMonitor needs ``psutil``; peers that are not installed are left out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from common import commit, spread, write_json
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import DeviceStatsMonitor
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_sym.callbacks import (
    AlignmentMonitor,
    CollapseMonitor,
    Monitor,
    PlasticityMonitor,
    SignalMonitor,
    monitors,
)
from lightning_sym.engine.engine import SECTIONS
from lightning_sym.engine.lightning import driver_of
from lightning_sym.engine.reader import LAG

#: Steps between probes in the benchmark.
EVERY = 6
KINDS: dict[str, type[Monitor]] = {
    "collapse": CollapseMonitor,
    "alignment": AlignmentMonitor,
    "plasticity": PlasticityMonitor,
    "signal": SignalMonitor,
}
PRESETS = ("standard", "full", "standard, deferred", "full, deferred")
PEERS = ("norms in hooks", "DeviceStatsMonitor", "curvlinops trace")
#: Steps between readings by default; peers as often as Lightning logs.
DEFAULT = {**dict.fromkeys(KINDS, 100), **dict.fromkeys(PRESETS, 200), **dict.fromkeys(PEERS, 50)}


class HookNorms(Callback):
    """What one would write oneself: norms of outputs, of their gradients and of weights, every n-th step."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Put hooks on all layers."""
        self.found: list[Tensor] = []
        self.handles: list[Any] = []
        if (trainer.global_step + 1) % EVERY == 0:
            for module in _layers(pl_module):
                self.handles.append(module.register_forward_hook(self._see))

    def _see(self, module: nn.Module, args: Any, output: Any) -> None:
        y = output[0] if isinstance(output, tuple) else output
        self.found += [y.detach().norm(), module.weight.detach().norm()] if hasattr(module, "weight") else []
        if y.requires_grad:
            y.register_hook(lambda gradient: self.found.append(gradient.norm()))

    def on_train_batch_end(self, *_: Any) -> None:
        """Read them, and take the hooks off."""
        while self.handles:
            self.handles.pop().remove()
        self.norms = [float(value) for value in self.found]


def _layers(module: nn.Module) -> Iterator[nn.Module]:
    return (m for m in module.modules() if isinstance(m, nn.Linear | nn.Conv2d | nn.Embedding))


class Trace(Callback):
    """The Hessian's trace by curvlinops, from one random vector, after every n-th step."""

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Estimate it in evaluation mode: curvlinops runs the module itself."""
        if trainer.global_step % EVERY:
            return
        from curvlinops import HessianLinearOperator, hutchinson_trace

        net = pl_module.net.eval()
        parameters = [p for p in net.parameters() if p.requires_grad]
        operator = HessianLinearOperator(
            net, nn.CrossEntropyLoss(), parameters, [tuple(batch)], check_deterministic=False
        )
        self.trace = float(hutchinson_trace(operator, num_matvecs=1))
        net.train()


def watch(arm: str) -> list[Callback]:
    """Return the callbacks of an arm."""
    if arm == "none":
        return []
    if arm in KINDS:
        return [KINDS[arm](every_n_steps=EVERY)]
    if arm == "norms in hooks":
        return [HookNorms()]
    if arm == "DeviceStatsMonitor":
        return [DeviceStatsMonitor(cpu_stats=True)]
    if arm == "curvlinops trace":
        return [Trace()]
    preset, _, later = arm.partition(", ")
    chosen = list(monitors(preset, every_n_steps=EVERY, deferred=bool(later)))  # type: ignore[call-overload]
    for monitor in chosen:
        if isinstance(monitor, PlasticityMonitor):
            monitor.reads_epochs = False  # a cost of the epoch's end, not of a probe
    return chosen


def arms_of(network: str, chosen: list[str] | None = None) -> list[str]:
    """Return what is measured on a network, the peers that are installed among them."""
    if chosen is not None:
        return ["none", *(arm for arm in chosen if arm != "none")]
    if network != "resnet18":
        return ["none", "standard", "full"]
    needs = {"DeviceStatsMonitor": "psutil", "curvlinops trace": "curvlinops"}
    peers = [peer for peer in PEERS if peer not in needs or find_spec(needs[peer])]
    return ["none", *KINDS, *PRESETS, *peers]


class Fit(LightningModule):
    """Cross-entropy and SGD with momentum."""

    def __init__(self, net: nn.Module, *, channels_last: bool = False) -> None:
        super().__init__()
        self.format = torch.channels_last if channels_last else torch.contiguous_format
        self.net = net.to(memory_format=self.format) if channels_last else net

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss."""
        return nn.functional.cross_entropy(self.net(batch[0].contiguous(memory_format=self.format)), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer."""
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


class First(Callback):
    """Notes when a batch begins, before any monitor."""

    began = 0.0

    def on_train_batch_start(self, *_: Any) -> None:
        """Start the clock."""
        self.began = now()


class Last(Callback):
    """Notes when a batch ends, after every monitor."""

    def __init__(self, first: First) -> None:
        self.first, self.seconds = first, []

    def on_train_batch_end(self, *_: Any) -> None:
        """Stop the clock."""
        self.seconds.append(now() - self.first.began)


def now() -> float:
    """Return seconds: of this thread's work, or of the clock where an accelerator works."""
    if not torch.cuda.is_available():
        return time.thread_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def resnet(batch: int) -> tuple[nn.Module, TensorDataset]:
    """Return a timm ResNet-18 and data of CIFAR-10's shape."""
    import timm

    x, y = torch.randn(batch, 3, 32, 32), torch.randint(0, 10, (batch,))
    return timm.create_model("resnet18", num_classes=10), TensorDataset(x, y)


class Transformer(nn.Module):
    """Two encoder layers over token embeddings."""

    def __init__(self, width: int = 256, vocabulary: int = 1000) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, 10)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits."""
        return self.head(self.encoder(self.embedding(tokens)).mean(dim=1))


def transformer(batch: int) -> tuple[nn.Module, TensorDataset]:
    """Return a two-layer transformer and sequences of 64 tokens."""
    return Transformer(), TensorDataset(torch.randint(0, 1000, (batch, 64)), torch.randint(0, 10, (batch,)))


def once(arm: str, build: Callable[[int], tuple[nn.Module, TensorDataset]], options: Any) -> dict[str, Any]:
    """Fit once, and return the medians of its steps' seconds and of our own, by section.

    ``probed`` is an observed step; ``published`` what comes on top of another one where its readings are
    published later.
    """
    torch.manual_seed(0)
    net, data = build(options.batch)
    first = First()
    last = Last(first)
    with tempfile.TemporaryDirectory() as folder:
        logs = arm == "DeviceStatsMonitor"  # it wants a logger
        trainer = Trainer(
            max_steps=options.steps,
            max_epochs=-1,
            accelerator=options.accelerator,
            precision=options.precision,
            devices=1,
            logger=CSVLogger(folder) if logs else False,
            log_every_n_steps=EVERY,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[first, *watch(arm), last],
        )
        data = torch.utils.data.ConcatDataset([data] * options.steps)  # one epoch: its end would publish
        module = Fit(net, channels_last=options.channels_last)
        trainer.fit(module, DataLoader(data, batch_size=options.batch))
    seconds = dict(enumerate(last.seconds, start=1))
    due = [step for step in seconds if step % EVERY == 0]
    later = [step + LAG for step in due if step + LAG in seconds]
    plain = [s for step, s in seconds.items() if step > 2 and step not in due and step not in later]
    quiet = statistics.median(plain)
    driver = driver_of(trainer) if any(isinstance(each, Monitor) for each in watch(arm)) else None
    return {
        "unprobed": quiet,
        "probed": statistics.median(seconds[step] for step in due),
        "published": statistics.median(seconds[step] for step in later) - quiet if "deferred" in arm else 0.0,
        "sections": {k: 0.0 if driver is None else driver.seconds[k] / driver.probes for k in SECTIONS},
        "held_mb": 0.0 if driver is None else driver.held_bytes / 1e6,
    }


def compare(network: str, build: Callable[..., Any], options: Any) -> dict[str, Any]:
    """Run every arm in turn, several rounds long."""
    arms = arms_of(network, options.arms)
    rounds: dict[str, list[dict[str, Any]]] = {arm: [] for arm in arms}
    for turn in range(options.pairs):
        for arm in arms[:: 1 - 2 * (turn % 2)]:
            found = once(arm, build, options)
            rounds[arm].append(found)
            cost = (found["probed"] + found["published"]) / found["unprobed"] - 1
            print(f"  round {turn + 1}/{options.pairs} {arm}: {cost:.2f} steps a probe", flush=True)
    report: dict[str, Any] = {}
    for arm, found in rounds.items():
        steps = [(f["probed"] + f["published"]) / f["unprobed"] - 1 for f in found]
        bare = [f["unprobed"] / b["unprobed"] for f, b in zip(found, rounds["none"], strict=True)]
        unit = [f["unprobed"] for f in found]
        report[arm] = {
            "unprobed_step_over_bare": spread(bare),
            "probe_in_steps": spread(steps),
            "sections_in_steps": {
                section: statistics.median(
                    f["sections"][section] / u for f, u in zip(found, unit, strict=True)
                )
                for section in found[0]["sections"]
            },
            "held_mb": found[0]["held_mb"],
            "step_seconds": spread(unit),
        }
        if arm in DEFAULT:
            share = [max(s, 0.0) / DEFAULT[arm] for s in steps]
            report[arm] |= {"share_of_fit_at_default": spread(share), "default_interval": DEFAULT[arm]}
    return report


def settings(parser: argparse.ArgumentParser) -> None:
    """Add what is measured, and how often."""
    parser.add_argument("--pairs", type=int, default=3, help="rounds")
    parser.add_argument("--steps", type=int, default=18, help="of a fit")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--networks", nargs="+", default=["resnet18", "transformer"])
    parser.add_argument("--arms", nargs="+", help="kinds of fits beside the bare one; all that are known")
    parser.add_argument("--accelerator", default="cpu")
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--channels-last", action="store_true")


def measure(options: Any) -> dict[str, Any]:
    """Return the reports of the chosen networks, and print them."""
    results: dict[str, Any] = {}
    for name, build in (("resnet18", resnet), ("transformer", transformer)):
        if name not in options.networks:
            continue
        print(name)
        results[name] = compare(name, build, options)
        print(f"{'arm':22}{'unprobed/bare':>15}{'probe, steps':>14}{'waiting':>9}")
        for arm, row in results[name].items():
            print(
                f"{arm:22}{row['unprobed_step_over_bare']['median']:15.3f}"
                f"{row['probe_in_steps']['median']:14.2f}{row['sections_in_steps']['waiting']:9.2f}"
            )
    return results


def main() -> None:
    """Measure both networks and write the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("docs/results/overhead.json"))
    settings(parser)
    options = parser.parse_args()
    results = measure(options)
    if options.out.exists():  # other networks were measured apart
        before = json.loads(options.out.read_text())
        results = {**(before["results"] if before.get("commit") == commit() else {}), **results}
    config = {"pairs": options.pairs, "steps": options.steps, "batch": options.batch, "every": EVERY}
    write_json(options.out, config={**config, "lag": LAG}, results=results)


if __name__ == "__main__":
    main()
