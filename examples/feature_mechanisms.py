"""When does a network learn features, and by which mechanism? A solved model first, then real images.

Part one: a linear network of one hidden layer, in four scalings that start at f = 0 and from two starts
that are aligned. The monitor's growth of the tangent kernel is held against the exact value. Part two: the
same monitor on a ReLU network trained on handwritten digits, over initial scales. Source: Xu and Ziyin,
2024, arXiv 2401.07085.

Steps of the ReLU network are as long as its tangent kernel of the moment allows, as the solved model's are:
no constant learning rate serves scales that differ by a factor of a hundred.

Shape letters: B batch, D inputs, H hidden units, C classes.
"""

from __future__ import annotations

import argparse
import logging
import math
import warnings
from pathlib import Path
from typing import Any

import torch
from _report import save, spread, table
from _trainer import quiet_trainer
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_sym.callbacks import FeatureLearningMonitor
from lightning_sym.papers.feature_learning import SolvableNetwork, kernel_growth

SCALES = (0.03, 0.1, 0.3, 1.0, 3.0)


def solved_cases(width: int) -> dict[str, dict[str, Any]]:
    """Return the four scalings, which start at f = 0, and two that start aligned."""
    d = float(width)
    return {
        "NTK": {"output_scale": d**-0.5},
        "standard": {"var_u": 1 / d, "var_w": 1 / d},
        "mean-field": {"output_scale": 1 / d, "lr_u": d, "lr_w": d},
        "small": {"output_scale": 1 / d, "var_u": 0.01, "var_w": 0.01},
        "aligned, too large": {"output_scale": 4 / d, "alignment": 0.9},
        "aligned, small": {"output_scale": 1 / d, "var_u": 0.085, "var_w": 0.085, "alignment": 1.0},
    }


def fit(
    module: LightningModule, data: tuple[Tensor, Tensor], *, batch: int, steps: int, monitor: Any
) -> None:
    """Train silently for some steps."""
    loader = DataLoader(
        TensorDataset(*data), batch_size=min(batch, len(data[0])), shuffle=batch < len(data[0])
    )
    trainer = quiet_trainer(
        max_steps=steps,
        max_epochs=-1,
        callbacks=[monitor],
    )
    trainer.fit(module, loader)


def solve(options: dict[str, Any], *, width: int, seed: int, steps: int, pace: float) -> dict[str, Any]:
    """Train one scaling and hold it against its solution."""
    module = SolvableNetwork(width, **options, pace=pace, seed=seed)
    x, y = torch.tensor([[1.0], [-1.0]]).double(), torch.tensor([1.0, -1.0]).double()
    solution = module.solution(x, y=y)
    monitor = FeatureLearningMonitor(every_n_steps=steps, by_rate=True, strict=True)
    fit(module, (x, y), batch=2, steps=steps, monitor=monitor)
    last = monitor.history[-1]
    growth = last["feature_learning/kernel_growth"]
    both = solution.at(torch.tensor([0.0, math.inf]))
    return {
        "growth": growth,
        "exact": solution.growth,
        "error": growth / solution.growth - 1,
        "formula": kernel_growth(1.0, size=solution.size),
        "zeta_before": float(both.alignment[0].abs()),
        "zeta": last["feature_learning/alignment"],
        "zeta_exact": float(both.alignment[1].abs()),
        "norms": last["feature_learning/norms"],
        "verdict": monitor.verdict,
        "mechanism": monitor.mechanism,
    }


class ReLUNetwork(LightningModule):
    """Two layers, classes as targets of the squared error, steps as long as the kernel allows.

    The second half of the units repeats the first with the sign of the outgoing weights changed: the
    network starts at zero. A random start's own output would have to be unlearned before anything
    else counts, the more of it the larger the scale.
    """

    def __init__(
        self, inputs: int, hidden: int, classes: int, *, scale: float, pace: float, seed: int
    ) -> None:
        super().__init__()
        self.first = nn.utils.skip_init(nn.Linear, inputs, hidden, bias=False)
        self.second = nn.utils.skip_init(nn.Linear, hidden, classes, bias=False)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            w_HD = torch.randn(hidden // 2, inputs, generator=generator) * (2 / inputs) ** 0.5
            v_CH = torch.randn(classes, hidden // 2, generator=generator) / hidden**0.5
            self.first.weight.copy_(scale * torch.cat([w_HD, w_HD]))
            self.second.weight.copy_(scale * torch.cat([v_CH, -v_CH], dim=1))
        self.pace, self.classes = pace, classes

    def forward(self, x: Tensor) -> Tensor:
        """Return outputs ``[B, C]`` of inputs ``[B, D]``."""
        return self.second(torch.relu(self.first(x)))

    @torch.no_grad()
    def stiffness(self, x_BD: Tensor) -> float:
        """Return the mean over samples of K(x, x) for one output: no curvature is larger."""
        h_BH = torch.relu(self.first(x_BD))
        v_H = self.second.weight.square().sum(0)
        gated_B = (h_BH > 0).to(x_BD) @ v_H
        return float((h_BH.square().sum(1) + x_BD.square().sum(1) * gated_B).mean())

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Set the step's length and return the squared error."""
        x_BD, y_B = batch
        target_BC = nn.functional.one_hot(y_B, self.classes).to(x_BD) - 1 / self.classes
        pull = (target_BC.mT @ x_BD / len(x_BD)).norm().item()  # what small weights grow by
        optimizer: Any = self.optimizers()
        optimizer.param_groups[0]["lr"] = self.pace / (self.stiffness(x_BD) + pull)
        return (self(x_BD) - target_BC).square().sum(1).mean() / 2

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return plain gradient descent; :meth:`training_step` sets its rate."""
        return torch.optim.SGD(self.parameters(), lr=0.0)


def digits(
    data: Path | None, *, train: int, test: int
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], str]:
    """Return MNIST from a torchvision root, or scikit-learn's digits, with unit mean square a pixel."""
    if data is None:
        from sklearn.datasets import load_digits

        stored = load_digits()
        x, y = torch.tensor(stored.data).float(), torch.tensor(stored.target)
        name = "scikit-learn digits, 8x8"
    else:
        from torchvision.datasets import MNIST

        stored = MNIST(data, train=True)
        x, y, name = stored.data.flatten(1).float(), stored.targets.long(), "MNIST"
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[: train + test]
    x, y = x[order], y[order]
    x = x / x[:train].square().mean().sqrt()
    return (x[:train], y[:train]), (x[train:], y[train:]), name


def learn(scale: float, parts: Any, *, options: Any, seed: int) -> dict[str, Any]:
    """Train one ReLU network and read the monitor and the accuracy."""
    train, test, _ = parts
    torch.manual_seed(seed)  # of the loader's shuffling
    module = ReLUNetwork(train[0].shape[1], options.hidden, 10, scale=scale, pace=1.0, seed=seed)
    monitor = FeatureLearningMonitor(
        every_n_steps=options.relu_steps, data=test[0], samples=options.probe, sketch=8192, strict=True
    )
    fit(module, train, batch=64, steps=options.relu_steps, monitor=monitor)
    with torch.no_grad():
        right = {
            name: float((module(x).argmax(1) == y).double().mean())
            for name, (x, y) in zip(("train", "test"), (train, test), strict=True)
        }
    last = monitor.history[-1]
    names = ("kernel_change", "kernel_cosine", "weight_change", "alignment", "norms")
    start = last["feature_learning/alignment"] - last["feature_learning/alignment_change"]
    return {
        **{name: last[f"feature_learning/{name}"] for name in names},
        "alignment_before": start,
        "train": right["train"],
        "test": right["test"],
        "verdict": monitor.verdict,
        "mechanism": monitor.mechanism,
    }


def summary(seeds: list[dict[str, Any]]) -> dict[str, Any]:
    """Return mean and spread of the numbers, and the words that were said."""
    numbers = {k: spread([s[k] for s in seeds]) for k in seeds[0] if isinstance(seeds[0][k], float)}
    words = {k: sorted({s[k] for s in seeds}) for k in ("verdict", "mechanism")}
    return {**numbers, **words, "seeds": seeds}


def draw(solved: dict[str, Any], relu: dict[str, Any]) -> Any:
    """Draw growth against the exact value, and the ReLU network's readings over scales."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for k, (name, row) in enumerate(solved.items()):
        left.plot(
            [s["exact"] for s in row["seeds"]],
            [s["growth"] for s in row["seeds"]],
            "o",
            color=f"C{k}",
            label=name,
        )
    ends = (0.3, 200)
    left.plot(ends, ends, color="black", linewidth=0.7)
    left.set(
        xscale="log", yscale="log", xlabel="exact $K_\\infty/K_0$", ylabel="monitor", title="solved model"
    )
    left.legend(fontsize=7)
    scales = [float(scale) for scale in relu]
    for axes, keys in (
        (middle, ("kernel_change", "weight_change")),
        (right, ("alignment", "alignment_before", "test")),
    ):
        for key in keys:
            mean = [row[key]["mean"] for row in relu.values()]
            error = [row[key]["std"] for row in relu.values()]
            axes.errorbar(scales, mean, yerr=error, marker="o", markersize=3, label=key.replace("_", " "))
        axes.set(xscale="log", xlabel="initial scale")
        axes.legend(fontsize=7)
    middle.axhspan(0.1, 1.0, color="0.9", zorder=0, label="mixed")
    middle.set(yscale="log", title="ReLU network, relative change")
    right.set(ylim=(0, 1), title="alignment and accuracy")
    return figure


def main() -> None:
    """Train all, print tables, write JSON and picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/feature_mechanisms"))
    parser.add_argument(
        "--data", type=Path, default=None, help="a torchvision root with MNIST; default: digits"
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--width", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--pace", type=float, default=0.01)
    parser.add_argument("--hidden", type=int, default=500)
    parser.add_argument("--relu-steps", type=int, default=2000)
    parser.add_argument("--train", type=int, default=1000)
    parser.add_argument("--test", type=int, default=700)
    parser.add_argument("--probe", type=int, default=64)
    parser.add_argument("--smoke", action="store_true", help="seconds: narrower, fewer steps, two scales")
    options = parser.parse_args()
    scales: tuple[float, ...] = SCALES
    if options.smoke:
        options.seeds, options.width, options.steps, options.pace = 2, 200, 300, 0.1
        options.hidden, options.relu_steps, options.train, options.probe = 200, 200, 300, 12
        scales = (0.03, 3.0)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning.*")
    solved, relu = {}, {}
    for name, case in solved_cases(options.width).items():
        settings = {"width": options.width, "steps": options.steps, "pace": options.pace}
        solved[name] = summary([solve(case, seed=seed, **settings) for seed in range(options.seeds)])
    rows = [
        (
            name,
            *(row[k]["mean"] for k in ("growth", "exact", "formula", "zeta_before", "zeta", "norms")),
            max(abs(s["error"]) for s in row["seeds"]),
            "/".join(row["verdict"]),
            "/".join(row["mechanism"]),
        )
        for name, row in solved.items()
    ]
    print(
        table(
            rows,
            ("", "K/K0", "exact", "from r", "zeta0", "zeta", "norms", "worst err", "regime", "mechanism"),
        )
    )
    parts = digits(options.data, train=options.train, test=options.test)
    for scale in scales:
        relu[str(scale)] = summary(
            [learn(scale, parts, options=options, seed=s) for s in range(options.seeds)]
        )
    keys = (
        "kernel_change",
        "kernel_cosine",
        "weight_change",
        "alignment_before",
        "alignment",
        "norms",
        "train",
        "test",
    )
    rows = [
        (scale, *(row[k]["mean"] for k in keys), "/".join(row["verdict"]), "/".join(row["mechanism"]))
        for scale, row in relu.items()
    ]
    print(f"\nReLU network on {parts[2]}")
    print(
        table(
            rows,
            (
                "scale",
                "dK/K",
                "cos",
                "dW/W",
                "zeta0",
                "zeta",
                "norms",
                "train",
                "test",
                "regime",
                "mechanism",
            ),
        )
    )
    config = {k: v for k, v in vars(options).items() if k not in ("out", "data")} | {"images": parts[2]}
    save(
        options.out,
        "feature_mechanisms",
        {"config": config, "solved": solved, "relu": relu},
        draw(solved, relu),
    )


if __name__ == "__main__":
    main()
