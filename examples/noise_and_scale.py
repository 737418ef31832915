"""The other half of noise equilibria: where a symmetry is of scale, noise makes the norm grow for ever.

Ziyin, Wang, Li and Wu, 2024, arXiv 2402.07193. Two parts.

* *Scale symmetry*: weights that a network divides by their norm have gradients orthogonal to them. Every
  step of SGD lengthens them, by exactly lr^2 |g|^2, and as gradients shrink as 1 / |w|, their squared norm
  grows as the root of time; only decay stops it. Gradient descent stops with the error. Net A divides by the
  norm of all weights (one symmetry: the total grows), net B each layer by its own (each layer grows).
* *Sharpness over initialisation and warm-up*: two linear layers from Kaiming's or Xavier's start, with the
  learning rate at once or warmed up, SGD beside gradient descent: the trace of the Hessian over time, and the
  one value that theory has for SGD's end. Hidden units as many as the task needs, and twice as many.

    python examples/noise_and_scale.py

Shape letters: K networks, B samples, I inputs, O outputs.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Any

import torch
from _report import save, spread, table
from _stacked import Stack
from torch import Tensor

from lightning_sym.engine.schedule import LogSpaced
from lightning_sym.papers.noise_equilibrium import equilibrium_weights, linear_hessian_trace

PARTS = ("norms", "sharpness")


def outputs(x: Tensor, weights: list[Tensor], *, net: str) -> Tensor:
    """Return outputs of a linear network that divides weights by their norm."""
    size = x.shape[2]
    squares = [weight.square().sum(dim=(1, 2), keepdim=True) for weight in weights]
    if net == "A":  # of degree 2 in the weights, as is the product
        return x @ weights[0] @ weights[1] * (2 * size / (squares[0] + squares[1]))
    first, second = (w * (size / s).sqrt() for w, s in zip(weights, squares, strict=True))
    return x @ first @ second


def grow(net: str, how: str, *, options: Any) -> list[dict[str, Any]]:
    """Train scale-symmetric networks; return norms over time and how exact the law of growth is."""
    size, count = options.size, options.seeds
    stack = Stack([size, size, size], seeds=list(range(count)), dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    target = torch.stack(
        [
            torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q
            for _ in range(count)
        ]
    )
    decay = options.decay if how == "SGD with decay" else 0.0
    white = torch.eye(size, dtype=torch.float64).expand(count, -1, -1) * size**0.5
    start = [w.detach().square().sum(dim=(1, 2)) for w in stack.weights]
    predicted = sum(start)
    schedule, due = LogSpaced(8), 1
    course: list[list[float]] = []
    for step in range(1, options.steps + 1):
        if how == "GD":
            x, noise = white, torch.zeros_like(white)
        else:
            both = torch.randn(count, options.batch, 2 * size, generator=generator, dtype=torch.float64)
            x, noise = both.split(size, dim=2)
        loss = (outputs(x, stack.weights, net=net) - x @ target - options.noise * noise).square().sum()
        gradients = torch.autograd.grad(loss / x.shape[1], stack.weights)
        with torch.no_grad():
            # g is orthogonal to w: |(1 - lr decay) w - lr g|^2 has no cross term.
            predicted = (1 - options.lr * decay) ** 2 * predicted + options.lr**2 * sum(
                g.square().sum(dim=(1, 2)) for g in gradients
            )
            for weight, gradient in zip(stack.weights, gradients, strict=True):
                weight -= options.lr * (gradient + decay * weight)
        if step == due:
            norms = sum(w.detach().square().sum(dim=(1, 2)) for w in stack.weights)
            course.append([step, *norms.tolist()])
            due = schedule.next(due)
    layers = [w.detach().square().sum(dim=(1, 2)) for w in stack.weights]
    total, begun = sum(layers), sum(start)
    late = [row for row in course if row[0] >= options.steps / 10]
    rows = []
    for k in range(count):
        slope = math.log(late[-1][1 + k] / late[0][1 + k]) / math.log(late[-1][0] / late[0][0])
        rows.append(
            {
                "growth": float(total[k] / begun[k]),
                "first": float(layers[0][k] / start[0][k]),
                "second": float(layers[1][k] / start[1][k]),
                "exponent": slope,
                "law_error": float((predicted[k] / total[k] - 1).abs()),
                "course": [[row[0], row[1 + k]] for row in course],
            }
        )
    return rows


def sharpen(start: str, warm: bool, how: str, *, hidden: int, options: Any) -> list[dict[str, Any]]:
    """Train two linear layers; return the trace of the Hessian over time, over its value at equilibrium."""
    size, count = options.size, options.seeds
    widths = [size, hidden, size]
    stack = Stack(widths, seeds=list(range(count)), activation=lambda x: x, dtype=torch.float64)
    if start == "kaiming":
        gains = [2**0.5, 2**0.5]
    else:
        gains = [(2 * fan / (fan + other)) ** 0.5 for fan, other in ((size, hidden), (hidden, size))]
    stack.weights = [(w.detach() * g).requires_grad_() for w, g in zip(stack.weights, gains, strict=True)]
    noise_of = torch.logspace(-0.5, 0.5, size, dtype=torch.float64)
    noise_of = noise_of / noise_of.mean()
    target = torch.eye(size, dtype=torch.float64)
    ideal = equilibrium_weights(
        target, hidden=[hidden], cov_x=torch.eye(size), cov_noise=torch.diag(noise_of)
    )
    wanted = linear_hessian_trace(ideal, cov_x=torch.eye(size))
    generator = torch.Generator().manual_seed(1)
    white = torch.eye(size, dtype=torch.float64).expand(count, -1, -1) * size**0.5
    schedule, due = LogSpaced(6), 1
    courses: list[list[list[float]]] = [[] for _ in range(count)]
    for step in range(1, options.steps + 1):
        if how == "GD":
            x, noise = white, torch.zeros_like(white)
        else:
            both = torch.randn(count, options.batch, 2 * size, generator=generator, dtype=torch.float64)
            x, noise = both.split(size, dim=2)
            noise = noise * noise_of.sqrt()
        if step == due:
            for k, course in enumerate(courses):
                weights = [w.detach()[k].mT for w in stack.weights]
                course.append([step, linear_hessian_trace(weights, cov_x=torch.eye(size)) / wanted])
            due = schedule.next(due)
        lr = options.lr * (min(1.0, step / options.warmup) if warm else 1.0)
        stack.step((stack.outputs(x) - x @ target - noise).square().sum() / x.shape[1], lr=lr)
    return [{"start": course[0][1], "end": course[-1][1], "course": course} for course in courses]


def told(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the spread of each number, and the first seed's course."""
    keys = [key for key in rows[0] if key != "course"]
    return {key: spread([row[key] for row in rows]) for key in keys} | {"course": rows[0]["course"]}


def draw(norms: dict[str, Any], sharpness: dict[str, Any]) -> Any:
    """Draw norms and traces over time, first seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, cell in norms.items():  # net B's lie on net A's
        steps, values = zip(*cell["course"], strict=True)
        style = "--" if name.startswith("net B") else "-"
        left.plot(steps, [value / values[0] for value in values], style, label=name)
    for name, cell in sharpness.items():
        steps, values = zip(*cell["course"], strict=True)
        right.plot(steps, values, "--" if "GD" in name.split(", ") else "-", label=name)
    left.set(xscale="log", yscale="log", xlabel="step", title="squared norm over that of step 1")
    right.set(xscale="log", xlabel="step", title="trace of the Hessian over SGD's equilibrium")
    right.axhline(1, color="0.6", linewidth=0.8)
    if norms:
        left.legend(fontsize=6)
    right.legend(fontsize=6, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def main() -> None:
    """Train all, print tables, write JSON and picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/noise_and_scale"))
    parser.add_argument("--name", default="noise_and_scale", help="of the JSON and the picture")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--size", type=int, default=6, help="inputs, and outputs")
    parser.add_argument("--lr", type=float, default=0.03)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--noise", type=float, default=1.0, help="deviation of the labels' noise")
    parser.add_argument("--decay", type=float, default=0.05, help="of the arm with decay")
    parser.add_argument("--warmup", type=int, default=500, help="steps")
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--smoke", action="store_true", help="seconds: fewer steps and seeds")
    options = parser.parse_args()
    if options.smoke:
        options.seeds, options.steps, options.size, options.warmup = 2, 1500, 4, 100
    began = time.process_time()
    norms = {
        f"net {net}, {how}": told(grow(net, how, options=options))
        for net in ("A", "B")
        for how in ("SGD", "GD", "SGD with decay")
        if "norms" in options.parts
    }
    keys = ("growth", "first", "second", "exponent", "law_error")
    print(table([(n, *(c[k]["median"] for k in keys)) for n, c in norms.items()], ("network", *keys)))
    starts = ("kaiming", "xavier") if "sharpness" in options.parts else ()
    sharpness = {
        f"{start}{', warm-up' if warm else ''}, {how}": told(
            sharpen(start, warm, how, hidden=options.size, options=options)
        )
        for how in ("SGD", "GD")
        for start in starts
        for warm in (False, True)
    }
    for start in starts:
        wide = sharpen(start, False, "SGD", hidden=2 * options.size, options=options)
        sharpness[f"{start}, twice as wide, SGD"] = told(wide)
    ends = [(n, c["start"]["median"], c["end"]["median"]) for n, c in sharpness.items()]
    print(table(ends, ("trace over equilibrium", "start", "end")))
    config = {k: v for k, v in vars(options).items() if k not in ("out", "name")}
    result = {
        "config": config,
        "cpu_seconds": time.process_time() - began,
        "norms": norms,
        "sharpness": sharpness,
    }
    save(options.out, options.name, result, draw(norms, sharpness))


if __name__ == "__main__":
    main()
