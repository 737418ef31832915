"""Do networks that were trained apart, on differently transformed inputs, come to represent alike?

Ziyin et al. (2025, arXiv 2502.05300) find that they do: inner products between samples,
h(x1) . h(x2), agree from network to network, within a layer and across layers. Their figure 3 shows an
alignment of .585 between the inputs, about .7 between the networks at the start and about .93 after 2,000
iterations; their architecture and data are not known to us. Here: two ReLU networks on handwritten digits,
each behind a random projection of its own and from an initialisation of its own. Alignment is the cosine
of the two centred Gram matrices of samples not trained on (``lightning_sym.functional.gram_alignment``).

Beside it, the ranks over depth that ``HierarchyMonitor`` reads on the first network: where the
representation expands, is reduced, and is passed on.

    python examples/representation_alignment.py --data MNIST

Shape letters: B batch, D inputs, N probe samples, L layers.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import warnings
from pathlib import Path
from typing import Any

import torch
from _report import save, spread, table
from _trainer import quiet_trainer
from feature_mechanisms import digits
from lightning.pytorch import Callback, LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_sym.callbacks import HierarchyMonitor
from lightning_sym.engine.schedule import LogSpaced
from lightning_sym.functional import gram_alignment
from lightning_sym.observe import layer_features


class Network(LightningModule):
    """A ReLU classifier behind a fixed random projection."""

    def __init__(self, inputs: int, width: int, depth: int, *, options: Any, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.register_buffer("view", torch.randn(inputs, options.view) / inputs**0.5)
        widths = [options.view, *[width] * (depth - 1), 10]
        layers: list[nn.Module] = []
        for k in range(depth):
            layers += [nn.Linear(widths[k], widths[k + 1]), nn.ReLU()]
        self.net = nn.Sequential(*layers[:-1])
        self.lr, self.weight_decay = options.lr, options.weight_decay

    def seen(self, x: Tensor) -> Tensor:
        """Return samples ``[B, D]`` as this network sees them."""
        return x @ self.view

    def forward(self, x: Tensor) -> Tensor:
        """Return logits of inputs ``[B, D]``."""
        return self.net(self.seen(x))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the cross-entropy."""
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return SGD with momentum."""
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9, weight_decay=self.weight_decay)


class Features(Callback):
    """Keeps what every layer makes of the probe samples, before due steps."""

    def __init__(self, probe: Tensor, *, schedule: LogSpaced) -> None:
        self.probe, self.schedule, self.due = probe, schedule, 1
        self.kept: dict[int, dict[str, Tensor]] = {}

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Read, if the coming step is due."""
        if trainer.global_step + 1 == self.due:
            self.kept[self.due - 1] = layer_features(pl_module, self.probe)
            self.due = self.schedule.next(self.due)


def train(parts: Any, *, options: Any, seed: int) -> tuple[Network, dict[int, dict[str, Tensor]], Any]:
    """Train one network; return it, its features over time and its monitor."""
    data, test, _ = parts
    module = Network(data[0].shape[1], options.width, options.depth, options=options, seed=seed)
    features = Features(test[0], schedule=LogSpaced(options.per_decade))
    monitor = HierarchyMonitor(every_n_steps=LogSpaced(options.per_decade), strict=True)
    trainer = quiet_trainer(
        max_steps=options.steps,
        max_epochs=-1,
        callbacks=[features, monitor],
    )
    trainer.fit(module, DataLoader(TensorDataset(*data), batch_size=64, shuffle=True))
    features.kept[options.steps] = layer_features(module, test[0])
    return module, features.kept, monitor


def compare(parts: Any, *, options: Any, seed: int) -> dict[str, Any]:
    """Train two networks and align them, layer with layer, over time."""
    test = parts[1]
    (a, kept_a, monitor), (b, kept_b, _) = (
        train(parts, options=options, seed=2 * seed + k) for k in range(2)
    )
    matrices = {}
    for step in kept_a:
        layers_a, layers_b = list(kept_a[step].values())[:-1], list(kept_b[step].values())[:-1]
        matrices[step] = [[float(gram_alignment(x, y)) for y in layers_b] for x in layers_a]
    first, last = matrices[0], matrices[options.steps]
    hidden = range(len(last))
    with torch.no_grad():
        accuracy = [float((module(test[0]).argmax(1) == test[1]).double().mean()) for module in (a, b)]
        inputs = float(gram_alignment(a.seen(test[0]), b.seen(test[0])))

    def same(matrix: list[list[float]]) -> float:
        return statistics.fmean(matrix[i][i] for i in hidden)

    def cross(matrix: list[list[float]]) -> float:
        return statistics.fmean(matrix[i][j] for i in hidden for j in hidden if i != j)

    end, start = monitor.history[-1], monitor.history[0]
    names = [f"net.{2 * i}" for i in range(options.depth)]
    return {
        "inputs": inputs,
        "same_start": same(first),
        "same_end": same(last),
        "cross_start": cross(first),
        "cross_end": cross(last),
        "accuracy": statistics.fmean(accuracy),
        "steps": list(matrices),
        "same": [same(matrix) for matrix in matrices.values()],
        "cross": [cross(matrix) for matrix in matrices.values()],
        "matrix": last,
        "rank_start": [start[f"hierarchy/{name}/rank"] for name in names],
        "rank_end": [end[f"hierarchy/{name}/rank"] for name in names],
        "role_end": [end[f"hierarchy/{name}/role"] for name in names[1:]],
    }


def draw(seeds: list[dict[str, Any]]) -> Any:
    """Draw alignment over time, alignment of all layers at the end, ranks over depth."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.3), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for k, run in enumerate(seeds):
        steps = [step + 1 for step in run["steps"]]
        left.plot(steps, run["same"], color="C0", label="same layer" if k == 0 else None)
        left.plot(steps, run["cross"], color="C1", label="across layers" if k == 0 else None)
        left.axhline(
            run["inputs"], color="0.4", linestyle="--", linewidth=0.8, label="inputs" if k == 0 else None
        )
        depth = range(1, len(run["rank_end"]) + 1)
        right.plot(
            depth, run["rank_start"], "o-", color="0.6", markersize=3, label="start" if k == 0 else None
        )
        right.plot(depth, run["rank_end"], "o-", color="C2", markersize=3, label="end" if k == 0 else None)
    left.set(xscale="log", ylim=(0, 1.02), xlabel="step + 1", ylabel="alignment of hidden layers")
    left.legend(fontsize=7, loc="lower right")
    image = middle.imshow(seeds[0]["matrix"], vmin=0, vmax=1, origin="lower", cmap="viridis")
    ticks = range(len(seeds[0]["matrix"]))
    middle.set_xticks(ticks, [str(i + 1) for i in ticks])
    middle.set_yticks(ticks, [str(i + 1) for i in ticks])
    middle.set(xlabel="layer of the other network", ylabel="layer of the one", title="at the end")
    figure.colorbar(image, ax=middle, shrink=0.9)
    right.set(xlabel="layer", ylabel="effective rank", ylim=(0, None))
    right.legend(fontsize=7)
    return figure


def main() -> None:
    """Train all, print tables, write JSON and picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/representation_alignment"))
    parser.add_argument("--name", default="representation_alignment", help="of the JSON and the picture")
    parser.add_argument(
        "--data", type=Path, default=None, help="a torchvision root with MNIST; default: digits"
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--view", type=int, default=32, help="numbers that each network sees of an image")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--depth", type=int, default=6)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--lr", type=float, default=0.02)
    parser.add_argument("--weight-decay", type=float, default=1e-4)
    parser.add_argument("--per-decade", type=int, default=4, help="readings")
    parser.add_argument("--train", type=int, default=1200)
    parser.add_argument("--test", type=int, default=500)
    parser.add_argument("--smoke", action="store_true", help="seconds: narrower, fewer steps")
    options = parser.parse_args()
    if options.smoke:
        options.seeds, options.width, options.depth, options.steps = 2, 48, 4, 300
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning.*")
    parts = digits(options.data, train=options.train, test=options.test)
    seeds = [compare(parts, options=options, seed=seed) for seed in range(options.seeds)]
    keys = ("inputs", "same_start", "same_end", "cross_start", "cross_end", "accuracy")
    means = {key: spread([run[key] for run in seeds]) for key in keys}
    print(f"two networks on {parts[2]}")
    print(table([(key, cell["mean"], cell["std"]) for key, cell in means.items()], ("", "mean", "std")))
    roles = {-1.0: "reduction", 0.0: "transmission", 1.0: "expansion"}
    rows = [
        (
            layer + 1,
            statistics.fmean(run["rank_start"][layer] for run in seeds),
            statistics.fmean(run["rank_end"][layer] for run in seeds),
            "/".join(roles[run["role_end"][layer - 1]] for run in seeds) if layer else "",
        )
        for layer in range(options.depth)
    ]
    print(table(rows, ("layer", "rank at start", "rank at end", "role at end, by seed")))
    config = {k: v for k, v in vars(options).items() if k not in ("out", "name", "data")} | {
        "images": parts[2]
    }
    result = {"config": config, **means, "runs": seeds}
    save(options.out, options.name, result, draw(seeds))


if __name__ == "__main__":
    main()
