"""Equal neurons are a trap: which kinds of training get out of it?

A two-layer ReLU student starts with groups of identical neurons. By the permutation symmetry their gradients
are identical too, so that plain training never tells them apart. An offset without decay only moves the
mirror: its neurons stay equal wherever theta + theta_0 is exact. Two arms show it: one trains on a grid of
2^-40, where sums are; in the other floating point rounds them, and the trap, being a saddle, magnifies the
rounding until it parts some neurons (after some ten thousand steps in float64, a few thousand in float32).
All arms start from the same effective weights, but for the last one, which has to change them. Source: Ziyin
et al., 2024, arXiv 2408.15495.

All seeds are trained at once, as one batch of networks; arms differ in the decay alone.

Shape letters: S seeds, H hidden units, D inputs, B batch.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from _report import save, spread
from torch import Tensor, nn

from lightning_sym.functional import distinct_units, numerical_rank
from lightning_sym.optim import attach_syre

ARMS = {
    "plain": "no decay",
    "decay": "weight decay",
    "offset": "theta_0 without decay",
    "offset_rounded": "theta_0 without decay, sums rounded",
    "syre": "decay towards theta_0",
    "syre_d": "decay towards theta_0, D random",
    "l2_init": "decay towards the initial weights",
    "frozen": "a tenth of the weights frozen at random values",
}
INPUTS, HIDDEN, TEACHER, GROUPS = 10, 20, 10, 5
GRID = 2.0**40  # steps to 1: theta and theta_0 on such a grid have sums without rounding in float64


class Student(nn.Module):
    """S two-layer ReLU networks side by side."""

    def __init__(self, first_SHD: Tensor, second_SH: Tensor) -> None:
        super().__init__()
        self.first = nn.Parameter(first_SHD.clone())
        self.second = nn.Parameter(second_SH.clone())

    def forward(self, x_SBD: Tensor) -> Tensor:
        """Return outputs, ``[S, B]``."""
        return respond(self.first, self.second, x_SBD)


def respond(first_SHD: Tensor, second_SH: Tensor, x_SBD: Tensor) -> Tensor:
    """Return a two-layer ReLU network's outputs, ``[S, B]``.

    Written out, samples innermost: a matrix product may add up one unit's terms in another order than the
    next one's, and equal units then part by rounding.
    """
    x_SDB = x_SBD.mT.contiguous()
    hidden_SHB = torch.relu((x_SDB[:, None] * first_SHD[:, :, :, None]).sum(2))
    return (hidden_SHB * second_SH[:, :, None]).sum(1)


def on_grid(x: Tensor) -> Tensor:
    """Round to multiples of 2^-40."""
    return (x * GRID).round() / GRID


def start(seeds: list[int]) -> dict[str, Tensor]:
    """Draw teachers, trapped students, held-out inputs and what arms need, one seed after another."""
    drawn: dict[str, list[Tensor]] = {}
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int, g: torch.Generator = generator) -> Tensor:
            return torch.randn(*shape, generator=g)

        group = torch.arange(HIDDEN) % GROUPS
        pieces = {
            "teacher_first": normal(TEACHER, INPUTS) / INPUTS**0.5,
            "teacher_second": normal(TEACHER) / TEACHER**0.5,
            "first": (normal(GROUPS, INPUTS) / INPUTS**0.5)[group],
            "second": (normal(GROUPS) / HIDDEN**0.5)[group],
            "test": normal(1000, INPUTS),
            "random_first": normal(HIDDEN, INPUTS) / INPUTS**0.5,
            "frozen_first": (torch.rand(HIDDEN, INPUTS, generator=generator) < 0.1).float(),
        }
        for name, value in pieces.items():
            drawn.setdefault(name, []).append(value)
    # float64: in float32 the rounding of theta + theta_0 alone parts equal neurons in the end.
    return {name: torch.stack(values).double() for name, values in drawn.items()}


def train(arm: str, drawn: dict[str, Tensor], options: Any) -> list[dict[str, float]]:
    """Train one arm on all seeds, and measure each network."""
    student = Student(drawn["first"], drawn["second"])
    mask, fixed = drawn["frozen_first"], drawn["random_first"]
    if arm == "frozen":
        with torch.no_grad():
            student.first.copy_(torch.where(mask > 0, fixed, student.first))
    offset = arm in ("offset", "offset_rounded")
    decays = 0.0 if offset or arm in ("plain", "l2_init") else options.decay
    optimizer = torch.optim.SGD(student.parameters(), lr=options.lr, weight_decay=decays)
    sigma = options.sigma / INPUTS**0.5
    if arm in ("syre", "syre_d"):
        attach_syre(
            optimizer,
            sigma=sigma,
            relative=False,
            anisotropy=0.1 if arm == "syre_d" else 0.0,
            named_parameters=student.named_parameters(),
        )
    offsets = {}
    if offset:  # the paper's form: theta is trained, the forward pass is at theta + theta_0
        generator = torch.Generator().manual_seed(1)
        for name, parameter in student.named_parameters():
            offsets[name] = sigma * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if arm == "offset":
                offsets[name] = on_grid(offsets[name])
            with torch.no_grad():
                parameter.copy_((on_grid(parameter) if arm == "offset" else parameter) - offsets[name])
    generator = torch.Generator().manual_seed(2)
    for _ in range(options.steps):
        x = torch.randn(len(drawn["first"]), options.batch, INPUTS, generator=generator).double()
        target = respond(drawn["teacher_first"], drawn["teacher_second"], x)
        weights = {n: p + offsets.get(n, 0) for n, p in student.named_parameters()}
        loss = (respond(weights["first"], weights["second"], x) - target).square().mean(dim=1).sum()
        optimizer.zero_grad()
        loss.backward()
        with torch.no_grad():
            if arm == "l2_init":
                student.first.grad += options.decay * (student.first - drawn["first"])
                student.second.grad += options.decay * (student.second - drawn["second"])
            if arm == "frozen":
                student.first.grad *= 1 - mask
        if arm == "offset":
            with torch.no_grad():
                for parameter in student.parameters():
                    parameter -= on_grid(options.lr * parameter.grad)
        else:
            optimizer.step()
        if arm == "frozen":
            with torch.no_grad():
                student.first.copy_(torch.where(mask > 0, fixed, student.first))
    with torch.no_grad():
        first = student.first + offsets.get("first", 0)
        second = student.second + offsets.get("second", 0)
        target = respond(drawn["teacher_first"], drawn["teacher_second"], drawn["test"])
        error = (respond(first, second, drawn["test"]) - target).square().mean(dim=1)
        error = error / target.var(dim=1)
    return [
        {
            "error": float(error[s]),
            "distinct": HIDDEN * float(distinct_units(first[s], None, second[s][None], tolerance=1e-4)),
            "rank": float(numerical_rank(first[s], rtol=1e-2)),
        }
        for s in range(len(first))
    ]


def draw(results: dict[str, Any]) -> Any:
    """Draw error and distinct neurons of every seed and arm."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for row, result in enumerate(results.values()):
        for axis, key in ((left, "error"), (right, "distinct")):
            values = [seed[key] for seed in result["seeds"]]
            axis.plot(values, [row] * len(values), "o", alpha=0.4, color="tab:blue", markeredgewidth=0)
            axis.plot([result[key]["mean"]], [row], "|", color="black", markersize=14)
    left.set_yticks(range(len(results)), [ARMS[arm] for arm in results])
    left.invert_yaxis()
    left.set_xscale("log")
    left.set_xlabel("error on new data / variance of the target")
    right.set_xlabel(f"distinct neurons of {HIDDEN}")
    right.set_xlim(0, HIDDEN + 1)
    return figure


def main() -> None:
    """Train every arm and write table, JSON and picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/escape_the_trap"))
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--decay", type=float, default=1e-3)
    parser.add_argument("--sigma", type=float, default=0.01, help="relative to the initialisation scale")
    parser.add_argument("--smoke", action="store_true", help="seconds: fewer steps, stronger decay")
    options = parser.parse_args()
    if options.smoke:
        options.seeds, options.steps, options.decay = min(options.seeds, 3), 3000, 1e-2
    drawn = start(list(range(options.seeds)))
    results: dict[str, Any] = {}
    print(f"{'':46}{'error':>18}{'distinct':>16}{'rank':>14}")
    for arm, words in ARMS.items():
        seeds = train(arm, drawn, options)
        results[arm] = {key: spread([s[key] for s in seeds]) for key in seeds[0]} | {"seeds": seeds}
        cells = [f"{results[arm][k]['mean']:.3g} +- {results[arm][k]['std']:.1g}" for k in seeds[0]]
        print(f"{words:46}{cells[0]:>18}{cells[1]:>16}{cells[2]:>14}")
    config = {k: v for k, v in vars(options).items() if k != "out"}
    config |= {"inputs": INPUTS, "hidden": HIDDEN, "teacher": TEACHER, "groups": GROUPS}
    save(options.out, "escape_the_trap", {"config": config, "results": results}, draw(results))


if __name__ == "__main__":
    main()
