"""Does VICReg learn one dimension at a time, and what is in the way? A linear model on CIFAR-10 crops.

The pairs of ``stepwise_linear.py`` and a small start, under four losses: the theory's cross-covariance
loss; VICReg with its paper's weights (25, 25, 1); with a covariance that weighs as much as the rest
(25, 25, 25), as the paper's 1 belongs to 8192 dimensions; and that with the hinge on the variance instead
of the standard deviation. Near zero the push of a hinge on the deviation does not shrink with the
embedding, that of one on the variance does: only then is early growth exponential, at a rate of its own
for each mode, which is what makes a staircase.

    python examples/stepwise_vicreg.py --data CIFAR10
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _data import Images, add_data_arguments, load_images
from _report import save, spread, table
from matplotlib.figure import Figure
from stepwise_linear import crop_pairs
from torch import Tensor

from lightning_sym.engine.schedule import LogSpaced
from lightning_sym.functional.eigenmodes import cross_covariance_eigenvalues, mode_dates, step_likeness
from lightning_sym.losses import cross_covariance_loss, vicreg_loss
from lightning_sym.papers.stepwise_ssl import variance_hinge_loss

LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cross_covariance": cross_covariance_loss,
    "vicreg": vicreg_loss,
    "vicreg_even": lambda z_a, z_b: vicreg_loss(z_a, z_b, covariance=25.0),
    "vicreg_even, variance": variance_hinge_loss,
}


def principal(x: Tensor, x_other: Tensor, *, count: int) -> tuple[Tensor, Tensor, float]:
    """Return both views' leading principal components and the share of the variance they hold."""
    singular, vectors = torch.linalg.svd(torch.cat([x, x_other]), full_matrices=False)[1:]
    basis = vectors[:count].mT
    return x @ basis, x_other @ basis, float(singular[:count].square().sum() / singular.square().sum())


def run(images: Images, args: argparse.Namespace, name: str, seed: int) -> dict[str, Any]:
    """Train one linear model by gradient descent on all pairs; return its staircase."""
    pairs = crop_pairs(images.take(args.samples, seed=seed), crop=args.crop, seed=seed)
    x, x_other, share = principal(*pairs, count=args.components)
    generator = torch.Generator().manual_seed(seed)
    weight = args.init_scale * torch.randn(args.modes, x.shape[1], generator=generator, dtype=torch.float64)
    weight.requires_grad_()
    lr = args.lr[list(LOSSES).index(name)]
    optimizer, schedule = torch.optim.SGD([weight], lr=lr), LogSpaced(48)
    began = time.perf_counter()
    steps, spectra, due = [], [], 0
    for step in range(args.steps + 1):
        z, z_other = x @ weight.mT, x_other @ weight.mT
        loss = LOSSES[name](z, z_other)
        if step == due:
            steps.append(max(step, 0.5))  # a place for the start on a logarithmic axis
            spectra.append(cross_covariance_eigenvalues(z.detach(), z_b=z_other.detach(), center=False))
            due = schedule.next(step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    t_T, y_TJ = torch.tensor(steps, dtype=torch.float64), torch.stack(spectra)
    final, first = y_TJ[-1], y_TJ[0].clamp_min(0)
    # As in stepwise_resnet.py: grown tenfold since the start, and not negligible at the end.
    grown = ((final >= 10 * first) & (final >= 0.05 * final[0])).nonzero().flatten()
    dates = mode_dates(t_T, eigenvalues=y_TJ, level=final / 2)
    return {
        "loss": name,
        "seed": seed,
        "lr": lr,
        "variance_kept": share,
        "seconds": time.perf_counter() - began,
        "final_loss": loss.item(),
        "learned": len(grown),
        "step_likeness": float(step_likeness(y_TJ[:, grown], final=final[grown])) if len(grown) else 0.0,
        "step_likeness_if_together": 1 / max(1, len(grown)),
        "dates": [float(dates[j]) for j in grown],
        "last": final.tolist(),
        "curves": {"steps": steps, "eigenvalues": y_TJ.tolist()},
    }


def draw(runs: list[dict[str, Any]]) -> Figure:
    """Return the first seed's eigenvalues, a panel a loss."""
    first = [each for each in runs if each["seed"] == runs[0]["seed"]]
    figure = Figure(figsize=(8, 5.6), layout="constrained")
    panels = figure.subplots(2, 2, sharex=True)
    for axes, each in zip(panels.flat, first, strict=True):
        steps, values = (np.array(each["curves"][key]) for key in ("steps", "eigenvalues"))
        for j, curve in enumerate(values.T):
            axes.plot(steps, np.maximum(curve, 0), color=f"C{j % 10}", linewidth=1.3)
        for j, date in enumerate(each["dates"]):
            axes.axvline(date, color=f"C{j % 10}", linewidth=0.7, linestyle=":")
        axes.set_xscale("log")
        axes.set_title(f"{each['loss']}: step-likeness {each['step_likeness']:.2f}", fontsize=9)
    for axes in panels[1]:
        axes.set_xlabel("steps of gradient descent (0.5: the start)")
    for axes in panels[:, 0]:
        axes.set_ylabel("eigenvalues of C")
    return figure


def main() -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add_data_arguments(parser)
    parser.add_argument("--out", type=Path, default=Path("runs/stepwise_vicreg"))
    parser.add_argument("--samples", type=int, default=500)
    parser.add_argument("--crop", type=int, default=20)
    parser.add_argument("--components", type=int, default=100, help="principal components the model sees")
    parser.add_argument("--modes", type=int, default=8, help="embedding dimensions")
    parser.add_argument("--init-scale", type=float, default=1e-5)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument(
        "--lr", type=float, nargs=4, default=[6e-4, 1e-3, 1e-3, 1e-3], help=f"of {', '.join(LOSSES)}"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    args = parser.parse_args()
    if args.smoke:
        args.samples, args.crop, args.components, args.modes, args.steps = 100, 12, 20, 3, 300
        args.init_scale, args.lr, args.seeds = 1e-2, [6e-3, 4e-3, 2e-3, 4e-3], args.seeds[:1]

    images = load_images(args.data, smoke=args.smoke)
    runs = [run(images, args, name, seed) for seed in args.seeds for name in LOSSES]
    figure = draw(runs)
    rows, summary = [], {}
    for name in LOSSES:
        own = [each for each in runs if each["loss"] == name]
        keys = ("learned", "step_likeness", "step_likeness_if_together")
        summary[name] = {key: spread([each[key] for each in own]) for key in keys}
        dated = [min(each["dates"]) for each in own if each["dates"]]
        if dated:
            summary[name]["first_date"] = spread(dated)
        summary[name]["largest_eigenvalue"] = spread([each["last"][0] for each in own])
        read = (summary[name][key] for key in (*keys, "largest_eigenvalue"))
        dates = ", ".join(f"{date:.0f}" for date in own[0]["dates"]) or "none"
        rows.append([name, *(f"{each['mean']:.3g} +- {each['std']:.2g}" for each in read), dates])
    header = ["loss", "modes learned", "step-likeness", "if together", "largest", "dates (first seed)"]
    print(table(rows, header))
    for each in runs:
        del each["curves"]
    config = {k: v for k, v in vars(args).items() if k not in ("data", "out")}
    result = {"config": config, "images": images.name, "summary": summary, "runs": runs}
    save(args.out, "stepwise_vicreg", result, figure)


if __name__ == "__main__":
    main()
