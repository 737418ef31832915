"""Does gradient noise balance the two layers of a ReLU network, at the rate that the law of balance says?

A network 20-200-20 learns y = x + noise. Under SGD the difference of the squared norms of the incoming and
outgoing weights decays; under gradient descent on a fixed data set it stays. The monitor's predicted flow,
added up over steps, is held against the measured course: what of the difference remains at the end beside
what the law says remains, and what decayed likewise (a law that is a little slow shows in the former).
Source: Ziyin et al., 2023, arXiv 2308.06671.

Shape letters: N samples, D inputs and outputs, H hidden units.
"""

from __future__ import annotations

import argparse
import itertools
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

from lightning_sym.callbacks import BalanceMonitor

AT = "balance/first/rescaling"
ARMS = ("SGD", "GD", "SGD with decay")


class Autoencoder(LightningModule):
    """Two layers without biases, out of balance at the start, on the squared error."""

    def __init__(self, width: int, hidden: int, *, ratio: float, lr: float, decay: float, seed: int) -> None:
        super().__init__()
        self.first = nn.Linear(width, hidden, bias=False, dtype=torch.float64)
        self.second = nn.Linear(hidden, width, bias=False, dtype=torch.float64)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            # Twins of opposite sign make relu(a) - relu(-a) = a: the network starts as the identity.
            q, _ = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))
            rows = torch.cat([q, -q]).repeat(hidden // (2 * width), 1)
            size = (2 * width / hidden) ** 0.5
            jitter = torch.randn(hidden, width, generator=generator, dtype=torch.float64)
            self.first.weight.copy_(ratio**0.5 * (size * rows + 0.1 * size * jitter / width**0.5))
            self.second.weight.copy_(size * rows.T / ratio**0.5)
        self.lr, self.decay = lr, decay

    def forward(self, x: Tensor) -> Tensor:
        """Return the reconstruction ``[N, D]``."""
        return self.second(torch.relu(self.first(x)))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the squared error, summed over outputs."""
        return (self(batch[0]) - batch[1]).square().sum(1).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return plain SGD."""
        return torch.optim.SGD(self.parameters(), lr=self.lr, weight_decay=self.decay)


def run(kind: str, options: argparse.Namespace, *, seed: int) -> dict[str, Any]:
    """Train one network and return the monitor's course and what it adds up to."""
    full = kind == "GD"
    module = Autoencoder(
        options.width,
        options.hidden,
        ratio=options.ratio,
        lr=options.lr,
        decay=options.decay if kind == "SGD with decay" else 0.0,
        seed=seed,
    )
    generator = torch.Generator().manual_seed(1000 + seed)
    count = options.samples if full else options.steps * options.batch
    x_ND, noise_ND = torch.randn(2, count, options.width, generator=generator, dtype=torch.float64)
    batch = count if full else options.batch
    monitor = BalanceMonitor(
        every_n_steps=options.every, population=count if full else None, details=True, strict=True
    )
    trainer = quiet_trainer(
        max_steps=options.steps,
        max_epochs=-1,
        callbacks=[monitor],
    )
    trainer.fit(module, DataLoader(TensorDataset(x_ND, x_ND + noise_ND), batch_size=batch))
    rows = monitor.history
    course = {
        name: [row[f"{AT}/{key}"] for row in rows]
        for name, key in (("charge", "charge"), ("in", "norm_in"), ("out", "norm_out"))
    }
    predicted = [course["charge"][0]]
    for before, row in itertools.pairwise(rows):
        predicted.append(predicted[-1] + (row["step"] - before["step"]) * row[f"{AT}/predicted_flow"])
    moved = course["charge"][-1] - course["charge"][0]
    later = rows[len(rows) // 2 :]
    return {
        "start": course["charge"][0],
        "end": course["charge"][-1],
        "predicted_end": predicted[-1],
        "kept": course["charge"][-1] / course["charge"][0],
        "predicted_kept": predicted[-1] / predicted[0],
        "law_over_measured": (predicted[-1] - predicted[0]) / moved,
        "discretisation_share": sum(row[f"{AT}/step_discretisation"] for row in rows)
        / sum(row[f"{AT}/step_flow"] for row in rows),
        "noise_ratio_start": rows[0][f"{AT}/noise_ratio"],
        "noise_ratio_end": sum(row[f"{AT}/noise_ratio"] for row in later[-20:]) / len(later[-20:]),
        "worst_step_error": max(row[f"{AT}/step_error"] for row in rows),
        "step": [row["step"] for row in rows],
        "predicted": predicted,
        **course,
    }


def draw(arms: dict[str, Any]) -> Any:
    """Draw the charge and what was predicted, and the two norms, of the first seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for k, (name, arm) in enumerate(arms.items()):
        seed = arm["seeds"][0]
        left.plot(seed["step"], seed["charge"], color=f"C{k}", label=name)
        label = "law of balance" if k == 0 else None
        left.plot(seed["step"], seed["predicted"], color="black", linestyle=":", linewidth=1.8, label=label)
        right.plot(seed["step"], seed["in"], color=f"C{k}", label=name)
        right.plot(seed["step"], seed["out"], color=f"C{k}", linestyle="--")
    left.axhline(0, color="0.7", linewidth=0.7)
    left.set(xlabel="step", title="incoming less outgoing squared norm")
    for style, side in (("-", "incoming"), ("--", "outgoing")):
        right.plot([], [], style, color="0.4", label=side)
    right.set(xlabel="step", title="squared norms", ylim=(0, None))
    left.legend(fontsize=8)
    right.legend(fontsize=7, ncols=2, loc="upper left")
    return figure


def main() -> None:
    """Train all, print the table, write JSON and picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/law_of_balance"))
    parser.add_argument("--name", default="law_of_balance", help="of the JSON and the picture")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--width", type=int, default=20)
    parser.add_argument("--hidden", type=int, default=200)
    parser.add_argument("--ratio", type=float, default=2.0, help="of incoming to outgoing norm at the start")
    parser.add_argument("--lr", type=float, default=0.005)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--decay", type=float, default=0.03, help="weight_decay of the third arm")
    parser.add_argument("--samples", type=int, default=500, help="of gradient descent")
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--every", type=int, default=10)
    parser.add_argument("--smoke", action="store_true", help="seconds: narrower and shorter")
    options = parser.parse_args()
    if options.smoke:
        options.seeds, options.width, options.hidden, options.steps = 2, 8, 32, 200
        options.samples, options.every, options.batch, options.lr = 300, 4, 4, 0.01
    if options.hidden % (2 * options.width):
        parser.error(f"--hidden must be a multiple of twice --width, got {options.hidden}")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning.*")
    arms: dict[str, Any] = {}
    for kind in options.arms:
        seeds = [run(kind, options, seed=seed) for seed in range(options.seeds)]
        numbers = {
            key: spread([seed[key] for seed in seeds])
            for key, value in seeds[0].items()
            if isinstance(value, float) and all(math.isfinite(seed[key]) for seed in seeds)
        }
        arms[kind] = {**numbers, "seeds": seeds}
    keys = ("kept", "predicted_kept", "law_over_measured", "discretisation_share")
    keys += ("noise_ratio_start", "noise_ratio_end")
    rows = [(kind, *(arm[key]["mean"] for key in keys)) for kind, arm in arms.items()]
    header = (
        "",
        "remains",
        "by the law",
        "decayed, law / measured",
        "discretisation",
        "noise ratio",
        "at end",
    )
    print(table(rows, header))
    config = {key: value for key, value in vars(options).items() if key not in ("out", "name")}
    figure = draw(arms)
    for arm in arms.values():  # the courses are for the picture; the first seed's stays on record
        for seed in arm["seeds"][1:]:
            for key in [key for key, value in seed.items() if isinstance(value, list)]:
                del seed[key]
    save(options.out, options.name, {"config": config, "arms": arms}, figure)


if __name__ == "__main__":
    main()
