r"""Does a larger initial scale generalise worse, at equal training loss?

Xu and Ziyin (2024, arXiv 2401.07085), and Chizat et al. (2019) before: weights that begin large train as
their tangent kernel does, learn no features, and generalise worse on images. ReLU networks of one hidden
layer from an ordinary start (Kaiming's, times a scale), squared error on CIFAR-10's classes; inputs are the
images' whitened principal components, since gradient descent takes long over small ones. Each network stops
where its training loss first comes to a share of that of a constant (--share): scales are compared where
they fit equally well. Steps are as long as each network's kernel of the moment allows, since no constant
learning rate serves scales that differ by a factor of a hundred. Also said: how far the tangent kernel has
moved by then.

    python examples/feature_scales.py --data CIFAR10

Shape letters: K networks, B samples, N images, I inputs, H hidden units, C classes.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from _data import Images, add_data_arguments, load_images
from _report import save, spread, table
from _stacked import Stack
from torch import Tensor
from torch.nn import functional as F

KEYS = ("test_accuracy", "test_loss", "kernel_change", "steps")


Part = tuple[Tensor, Tensor, Tensor]


def numbers(train: Images, test: Images, *, components: int) -> tuple[Part, Part]:
    """Return inputs ``[N, I]``, whitened on training images, centred classes ``[N, C]`` and labels."""
    x, x_test = (torch.from_numpy(images.x).flatten(1).float() / 255 for images in (train, test))
    mean = x.mean(0)
    _, singular, basis = torch.linalg.svd(x - mean, full_matrices=False)
    whiten = basis[:components].mT / singular[:components] * len(x) ** 0.5
    found = []
    for part, images in ((x, train), (x_test, test)):
        y = torch.from_numpy(images.y)
        found.append(((part - mean) @ whiten, F.one_hot(y, 10).float() - 0.1, y))
    return found[0], found[1]


def stiffness(stack: Stack, x_KBI: Tensor) -> Tensor:
    """Return the mean over samples of K(x, x) for one output, ``[K]``: no curvature is larger."""
    h_KBH = torch.relu(torch.bmm(x_KBI, stack.weights[0]))
    v_KH = stack.weights[1].square().sum(2)
    gated_KB = torch.einsum("kbh,kh->kb", (h_KBH > 0).to(x_KBI), v_KH)
    return (h_KBH.square().sum(2) + x_KBI.square().sum(2) * gated_KB).mean(1)


@torch.no_grad()
def kernels(stack: Stack, x_NI: Tensor) -> Tensor:
    """Return tangent kernels, summed over outputs, ``[K, N, N]``."""
    h_KNH = torch.relu(x_NI @ stack.weights[0])
    on_KNH = (h_KNH > 0).to(x_NI)
    v_KH = stack.weights[1].square().sum(2)
    outputs = stack.weights[1].shape[2]
    return outputs * h_KNH @ h_KNH.mT + (x_NI @ x_NI.mT) * ((on_KNH * v_KH[:, None]) @ on_KNH.mT)


def losses(stack: Stack, x_NI: Tensor, target_NC: Tensor) -> Tensor:
    """Return the mean loss of each network, ``[K]``."""
    out = stack.outputs(x_NI.expand(len(stack.weights[0]), -1, -1))
    return (out - target_NC).square().sum(2).mean(1) / 2


def train(train_part: Any, test_part: Any, options: Any) -> list[dict[str, Any]]:
    """Train all scales and seeds side by side, each until it fits; return what each is there."""
    (x, target, _), (x_test, target_test, y_test) = train_part, test_part
    chosen = [{"scale": scale, "seed": seed} for scale in options.scales for seed in range(options.seeds)]
    widths = [x.shape[1], options.hidden, 10]
    stack = Stack(widths, seeds=[int(each["seed"]) for each in chosen], gain=2**0.5)
    scale = torch.tensor([each["scale"] for each in chosen]).view(-1, 1, 1)
    stack.weights = [(w.detach() * scale).requires_grad_() for w in stack.weights]
    probe = x_test[: options.probe]
    before = kernels(stack, probe)
    wanted = options.share * float(target.square().sum(1).mean() / 2)
    rows: list[dict[str, Any]] = [{**each, "reached": False} for each in chosen]
    alive = torch.arange(len(chosen))
    generator = torch.Generator().manual_seed(0)
    for step in range(options.steps + 1):
        if step % options.every == 0 or step == options.steps:
            with torch.no_grad():
                fitted = losses(stack, x, target) <= wanted
                due = torch.nonzero(fitted | (step == options.steps)).flatten().tolist()
                if due:
                    out = stack.outputs(x_test.expand(len(alive), -1, -1))
                    change = (kernels(stack, probe) - before[alive]).flatten(1).norm(dim=1)
                    change = change / before[alive].flatten(1).norm(dim=1)
                for k in due:
                    rows[int(alive[k])] |= {
                        "reached": bool(fitted[k]),
                        "steps": step,
                        "test_accuracy": float((out[k].argmax(1) == y_test).double().mean()),
                        "test_loss": float((out[k] - target_test).square().sum(1).mean() / 2),
                        "kernel_change": float(change[k]),
                    }
            if bool(fitted.any()):  # go on with the others alone
                alive = alive[~fitted]
                stack.weights = [w.detach()[~fitted].requires_grad_() for w in stack.weights]
            if not len(alive):
                break
        index = torch.randint(len(x), (options.batch,), generator=generator)
        batch = x[index].expand(len(alive), -1, -1)
        with torch.no_grad():
            pull = (target[index].mT @ x[index] / len(index)).norm()  # what small weights grow by
            lr = options.pace / (stiffness(stack, batch) + pull)
        loss = (stack.outputs(batch) - target[index]).square().sum() / (2 * len(index))
        stack.step(loss, lr=lr.view(-1, 1, 1))
    return rows


def summary(rows: list[dict[str, Any]], scales: list[float]) -> dict[str, Any]:
    """Return the spread over seeds at each scale, of those that came to the loss, and how many did not."""
    found: dict[str, Any] = {}
    for scale in scales:
        mine = [row for row in rows if row["scale"] == scale]
        fitted = [row for row in mine if row["reached"]]
        found[f"{scale:g}"] = {"fitted": len(fitted), "of": len(mine)}
        if fitted:
            found[f"{scale:g}"] |= {key: spread([row[key] for row in fitted]) for key in KEYS}
    return found


def draw(results: dict[str, Any]) -> Any:
    """Draw test accuracy and the kernel's change over scales."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.2), layout="constrained")
    cells = {float(scale): cell for scale, cell in results.items() if cell["fitted"]}
    for axis, key in zip(figure.subplots(1, 2), ("test_accuracy", "kernel_change"), strict=True):
        middle = [cell[key]["median"] for cell in cells.values()]
        bars = [
            [cell[key]["median"] - cell[key]["low"] for cell in cells.values()],
            [cell[key]["high"] - cell[key]["median"] for cell in cells.values()],
        ]
        axis.errorbar(list(cells), middle, bars, marker="o", capsize=2)
        axis.set(
            xscale="log", xlabel="initial scale", title=key.replace("_", " ") + " at equal training loss"
        )
        if key == "kernel_change":
            axis.set_yscale("log")
    return figure


def main() -> None:
    """Train, print the table, write JSON and picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add_data_arguments(parser)
    parser.add_argument("--out", type=Path, default=Path("runs/feature_scales"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--scales", type=float, nargs="+", default=[0.1, 0.3, 1.0, 2.0, 3.0])
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--components", type=int, default=128, help="of the images that the networks see")
    parser.add_argument("--images", type=int, default=500, help="to train on")
    parser.add_argument("--test-images", type=int, default=1000)
    parser.add_argument("--share", type=float, default=0.5, help="of a constant's loss, at which each stops")
    parser.add_argument("--steps", type=int, default=12_000, help="at most")
    parser.add_argument("--every", type=int, default=100, help="steps between looks at the training loss")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--pace", type=float, default=2.5, help="learning rate times the kernel's bound")
    parser.add_argument("--probe", type=int, default=100, help="images the kernel is taken on")
    options = parser.parse_args()
    if options.smoke:
        options.seeds, options.scales, options.hidden, options.images = 2, [0.1, 1.0], 64, 200
        options.steps, options.every, options.components = 4000, 50, 40
    began = time.process_time()
    train_images = load_images(options.data, smoke=options.smoke).take(options.images, seed=0)
    test_images = load_images(options.data, smoke=options.smoke, train=False)
    parts = numbers(
        train_images, test_images.take(options.test_images, seed=0), components=options.components
    )
    rows = train(*parts, options)
    results = summary(rows, options.scales)
    shown = [
        (scale, f"{cell['fitted']} of {cell['of']}", *(cell[k]["median"] for k in KEYS if cell["fitted"]))
        for scale, cell in results.items()
        if cell["fitted"]
    ]
    print(table(shown, ("scale", "fitted", *KEYS)))
    config = {k: v for k, v in vars(options).items() if k not in ("out", "data")}
    config["images_of"] = train_images.name
    result = {"config": config, "cpu_seconds": time.process_time() - began, "results": results, "runs": rows}
    save(options.out, "feature_scales", result, draw(results))


if __name__ == "__main__":
    main()
