"""Alignment rises with weight decay and with depth: a tanh network on a tanh teacher.

The relation between representation and gradient (RGA) at the input of every hidden and output layer, averaged
over the readings of the last fifth of the run. Source: Ziyin et al., 2024, arXiv 2410.03006, whose synthetic
regression this follows in kind; sizes and rates are ours.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from _report import save, spread, table
from _trainer import quiet_trainer
from lightning.pytorch import LightningModule, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_sym.callbacks import AlignmentMonitor

INPUTS, WIDTH, OUTPUTS, DEPTH = 40, 64, 20, 5


def network() -> nn.Sequential:
    """Return five hidden tanh layers and a linear output."""
    widths = [INPUTS, *[WIDTH] * DEPTH]
    layers: list[nn.Module] = []
    for i in range(DEPTH):
        layers += [nn.Linear(widths[i], widths[i + 1]), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(WIDTH, OUTPUTS))


class Online(IterableDataset[tuple[Tensor, Tensor]]):
    """Fresh Gaussian inputs in every batch, and what a random tanh teacher says to them."""

    def __init__(self, seed: int, *, batch: int, steps: int) -> None:
        self.seed, self.batch, self.steps = seed, batch, steps

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(self.seed)
        first = torch.randn(INPUTS, WIDTH, generator=generator) / INPUTS**0.5
        second = torch.randn(WIDTH, OUTPUTS, generator=generator) / WIDTH**0.5
        for _ in range(self.steps):
            x = torch.randn(self.batch, INPUTS, generator=generator)
            yield x, torch.tanh(x @ first) @ second


class Regression(LightningModule):
    """Least squares by SGD with weight decay."""

    def __init__(self, *, lr: float, weight_decay: float) -> None:
        super().__init__()
        self.net, self.lr, self.weight_decay = network(), lr, weight_decay

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the squared error, summed over outputs."""
        return 0.5 * (self.net(batch[0]) - batch[1]).square().sum(dim=1).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return SGD."""
        return torch.optim.SGD(self.parameters(), lr=self.lr, weight_decay=self.weight_decay)


def fit(seed: int, weight_decay: float, options: Any) -> dict[str, list[float]]:
    """Train once; return RGA on the input side and its chance level, layer by layer from the second."""
    seed_everything(seed, verbose=False)
    monitor = AlignmentMonitor(every_n_steps=max(1, options.steps // 50), layers="net.*")
    trainer = quiet_trainer(
        max_steps=options.steps,
        max_epochs=-1,
        callbacks=[monitor],
    )
    data = Online(seed, batch=options.batch, steps=options.steps)
    trainer.fit(Regression(lr=options.lr, weight_decay=weight_decay), DataLoader(data, batch_size=None))
    late = [row for row in monitor.history if row["step"] > 0.8 * options.steps]
    layers = [f"net.{2 * i}" for i in range(1, DEPTH + 1)]
    return {
        what: [statistics.fmean(row[f"alignment/{layer}/in/{what}"] for row in late) for layer in layers]
        for what in ("rga", "null")
    }


def draw(results: dict[str, Any]) -> Any:
    """Draw RGA over depth, a line a weight decay."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.4, 3.6), layout="constrained")
    axis = figure.subplots()
    for i, (decay, result) in enumerate(results.items()):
        color = colormaps["viridis"](i / max(len(results) - 1, 1) * 0.9)
        mean = [cell["mean"] for cell in result["rga"]]
        deviation = [cell["std"] for cell in result["rga"]]
        depth = range(2, DEPTH + 2)
        axis.errorbar(depth, mean, deviation, marker="o", color=color, label=f"decay {decay}", capsize=2)
        axis.plot(depth, [cell["mean"] for cell in result["null"]], ":", color=color)
    axis.set_xticks(range(2, DEPTH + 2))
    axis.set_xlabel("layer (dotted: by chance)")
    axis.set_ylabel("representation-gradient alignment, input side")
    axis.set_ylim(0, 1)
    axis.legend(frameon=False, fontsize=8)
    return figure


def main() -> None:
    """Scan the weight decay over seeds and write table, JSON and picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/alignment_vs_decay"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--decays", type=float, nargs="+", default=[1e-4, 1e-3, 1e-2])
    parser.add_argument("--smoke", action="store_true", help="seconds: one seed, two decays, few steps")
    options = parser.parse_args()
    if options.smoke:
        options.seeds, options.steps, options.decays = 1, 1500, [1e-4, 1e-2]
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*does not have many workers.*|.*LeafSpec.*")
    results: dict[str, Any] = {}
    for decay in options.decays:
        found = [fit(seed, decay, options) for seed in range(options.seeds)]
        results[f"{decay:g}"] = {
            what: [spread([run[what][layer] for run in found]) for layer in range(DEPTH)]
            for what in ("rga", "null")
        }
        print(f"decay {decay:g} done", flush=True)
    rows = [[decay, *[cell["mean"] for cell in result["rga"]]] for decay, result in results.items()]
    print(table(rows, ["decay", *[f"layer {i}" for i in range(2, DEPTH + 2)]]))
    config = {k: v for k, v in vars(options).items() if k != "out"}
    save(options.out, "alignment_vs_decay", {"config": config, "results": results}, draw(results))


if __name__ == "__main__":
    main()
