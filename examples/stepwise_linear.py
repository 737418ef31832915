"""A linear model on pairs of CIFAR-10 crops learns one dimension at a time, when theory says so.

Simon et al. (2023), figure 1: n = 500 images, two random 20 x 20 crops each, a linear embedding
trained on the cross-covariance loss by full-batch gradient descent from a small start. Measured
here: the step at which each of the first 8 modes is half learned, and the final weight, against
their closed forms.

    python examples/stepwise_linear.py --data CIFAR10
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _data import Images, add_data_arguments, load_images
from _report import save, spread, table
from matplotlib.figure import Figure

from lightning_sym.losses import CrossCovarianceLoss
from lightning_sym.papers.stepwise_ssl import (
    Staircase,
    final_weight,
    modes,
    pair_correlation,
    staircase_loss,
)


def crop_pairs(images: Images, *, crop: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return two random crops of every image, flat, less the mean of all crops, in float64."""
    rng = np.random.default_rng(seed)
    height, width = images.x.shape[1:3]
    views = []
    for _ in range(2):
        top = rng.integers(0, height - crop + 1, len(images.x))
        left = rng.integers(0, width - crop + 1, len(images.x))
        cut = [x[a : a + crop, b : b + crop] for x, a, b in zip(images.x, top, left, strict=True)]
        views.append(torch.from_numpy(np.stack(cut)).flatten(1).double() / 255)
    mean = (views[0].mean(0) + views[1].mean(0)) / 2
    return views[0] - mean, views[1] - mean


def run(images: Images, args: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Train one linear model and compare it with theory."""
    x, x_other = crop_pairs(images.take(args.samples, seed=seed), crop=args.crop, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    weight = args.init_scale * torch.randn(args.modes, x.shape[1], generator=generator, dtype=torch.float64)
    gamma, vectors = modes(pair_correlation(x, x_other=x_other), count=args.modes + 1)
    lr = args.rate / gamma[0].item()
    theory = Staircase.from_pairs(x, x_other=x_other, weight=weight, lr=lr)
    predicted = theory.dates()
    steps = int(args.beyond * predicted.max())

    began = time.perf_counter()
    weight.requires_grad_()
    loss_of, optimizer = CrossCovarianceLoss(), torch.optim.SGD([weight], lr=lr)
    record: list[tuple[int, float, torch.Tensor]] = []
    every = max(1, steps // 2000)
    for step in range(steps + 1):
        z, z_other = x @ weight.mT, x_other @ weight.mT
        loss = loss_of(z, z_other)
        if step % every == 0:
            c = (z.mT @ z_other).detach() / len(z)
            record.append((step, loss.item(), torch.linalg.eigvalsh((c + c.mT) / 2).flip(0)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    at = torch.tensor([step for step, _, _ in record], dtype=torch.float64)
    spectrum = torch.stack([eigenvalues for _, _, eigenvalues in record])
    measured = crossings(at, spectrum)
    expected = final_weight(gamma[:-1], vectors=vectors[:, :-1])
    gram, expected_gram = (w.mT @ w for w in (weight.detach(), expected))
    t = at * lr
    return {
        "seed": seed,
        "lr": lr,
        "steps": steps,
        "seconds": time.perf_counter() - began,
        "gamma": gamma.tolist(),
        "tau_measured": (measured * lr).tolist(),
        "tau_predicted": (predicted * lr).tolist(),
        "tau_error": ((measured - predicted).abs() / predicted).tolist(),
        "gram_error": ((gram - expected_gram).norm() / expected_gram.norm()).item(),
        "final_loss": record[-1][1],
        "curves": {
            "t": t.tolist(),
            "loss": [value for _, value, _ in record],
            "loss_predicted": staircase_loss(t, gamma=theory.gamma, s0=theory.s0).tolist(),
            "eigenvalues": spectrum.tolist(),
            "eigenvalues_predicted": theory.eigenvalues(at).tolist(),
        },
    }


def crossings(at: torch.Tensor, spectrum: torch.Tensor) -> torch.Tensor:
    """Return where each column first passes one half, linear between records; inf for never."""
    dates = []
    for column in spectrum.T:
        past = (column >= 0.5).nonzero()
        if not len(past):
            dates.append(torch.inf)
            continue
        k = int(past[0])
        if k == 0:
            dates.append(at[0].item())
            continue
        share = (0.5 - column[k - 1]) / (column[k] - column[k - 1])
        dates.append((at[k - 1] + share * (at[k] - at[k - 1])).item())
    return torch.tensor(dates, dtype=torch.float64)


def draw(result: dict[str, Any]) -> Figure:
    """Return eigenvalues and loss over time: measured as lines, predicted as dots."""
    curves = result["curves"]
    figure = Figure(figsize=(8, 5.6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    t = np.array(curves["t"])
    dots = np.linspace(0, len(t) - 1, 60).astype(int)
    for mode in range(len(result["tau_measured"])):
        colour = f"C{mode % 10}"
        above.plot(t, np.array(curves["eigenvalues"])[:, mode], color=colour, linewidth=1.5)
        predicted = np.array(curves["eigenvalues_predicted"])[:, mode]
        above.plot(t[dots], predicted[dots], "o", color=colour, markersize=3, markerfacecolor="none")
        above.axvline(result["tau_predicted"][mode], color=colour, linewidth=0.7, linestyle=":")
    above.set_ylabel("eigenvalues of C")
    above.set_title("lines: measured, circles: closed form, dotted: predicted learning times", fontsize=9)
    below.plot(t, curves["loss"], color="black", linewidth=1.5)
    below.plot(t[dots], np.array(curves["loss_predicted"])[dots], "o", color="grey", markersize=3)
    below.set_ylabel("loss")
    below.set_xlabel("time = learning rate x steps")
    return figure


def main() -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add_data_arguments(parser)
    parser.add_argument("--out", type=Path, default=Path("runs/stepwise_linear"))
    parser.add_argument("--samples", type=int, default=500)
    parser.add_argument("--crop", type=int, default=20)
    parser.add_argument("--modes", type=int, default=8, help="embedding dimensions")
    parser.add_argument("--init-scale", type=float, default=1e-11)
    parser.add_argument("--rate", type=float, default=0.01, help="learning rate times the largest eigenvalue")
    parser.add_argument(
        "--beyond", type=float, default=1.3, help="train so many times the last learning time"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    args = parser.parse_args()
    if args.smoke:
        args.samples, args.crop, args.modes, args.seeds = 200, 12, 3, args.seeds[:1]
        args.init_scale, args.rate = 1e-4, 0.02

    images = load_images(args.data, smoke=args.smoke)
    runs = [run(images, args, seed) for seed in args.seeds]
    figure = draw(runs[0])
    rows = []
    for mode in range(args.modes):
        column = [
            spread([r[key][mode] for r in runs]) for key in ("tau_predicted", "tau_measured", "tau_error")
        ]
        rows.append([mode + 1, column[0]["mean"], column[1]["mean"], max(r["tau_error"][mode] for r in runs)])
    print(table(rows, ["mode", "tau predicted", "tau measured", "largest error"]))
    gram = spread([r["gram_error"] for r in runs])
    print(f"W^T W against its closed form: relative error {gram['mean']:.4f} +- {gram['std']:.4f}")
    for each in runs:
        del each["curves"]
    config = {
        k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if k not in ("data", "out")
    }
    summary = {
        "largest_tau_error": max(max(r["tau_error"]) for r in runs),
        "tau_error": spread([error for r in runs for error in r["tau_error"]]),
        "gram_error": gram,
    }
    result = {"config": config, "images": images.name, "summary": summary, "runs": runs}
    save(args.out, "stepwise_linear", result, figure)


if __name__ == "__main__":
    main()
