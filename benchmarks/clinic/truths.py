"""Measures of a module's health that share no code with the monitors.

They look at held-out data with plain hooks on activation modules, at weights before and after, and at
gradients by autograd. Shape letters: N samples, U units.
"""

from __future__ import annotations

import copy
import fnmatch
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from .common import Measures

ACTIVATIONS = (nn.ReLU, nn.Tanh, nn.Sigmoid, nn.GELU)


@contextmanager
def calm(module: nn.Module) -> Iterator[None]:
    """Evaluate without gradients, in eval mode; modes and the random state are put back."""
    modes = [(child, child.training) for child in module.modules()]
    module.eval()
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        try:
            yield
        finally:
            for child, mode in modes:
                child.training = mode


def classifier(
    x: Tensor,
    y: Tensor,
    *,
    classify: Callable[[LightningModule, Tensor], Tensor] | None = None,
    prefix: str = "",
) -> Callable[[LightningModule], Measures]:
    """Return a measure of the accuracy and the cross-entropy on given data; labels of -100 don't count."""

    def measure(module: LightningModule) -> Measures:
        with calm(module):
            logits = (classify(module, x) if classify else module(x)).flatten(0, -2)
            labels = y.flatten()
            known = labels >= 0
            right = (logits.argmax(-1) == labels)[known].double().mean()
            finite = logits.isfinite().all(-1).double().mean()
            loss = nn.functional.cross_entropy(logits, labels)
        found = {"accuracy": float(right), "loss": float(loss), "finite": float(finite)}
        # far above the loss of guessing, or no number
        found["diverged"] = float(not float(loss) <= 4 * math.log(logits.shape[-1]))
        return {f"{prefix}{key}": value for key, value in found.items()}

    return measure


def regressor(x: Tensor, y: Tensor) -> Callable[[LightningModule], Measures]:
    """Return a measure of the error on given data, as a share of the targets' variance."""
    total = float((y - y.mean(0)).square().mean())

    def measure(module: LightningModule) -> Measures:
        with calm(module):
            error = float((module(x) - y).square().mean()) / total
        return {"error": error, "diverged": float(not error <= 10.0)}

    return measure


def both(*measures: Callable[[LightningModule], Measures]) -> Callable[[LightningModule], Measures]:
    """Return a measure that takes several."""

    def measure(module: LightningModule) -> Measures:
        found: Measures = {}
        for each in measures:
            found |= each(module)
        return found

    return measure


def units(net: Callable[[LightningModule], Any]) -> Callable[[LightningModule], Measures]:
    """Return a measure of the activation modules' outputs while ``net(module)`` runs on held-out data.

    Of the worst of them: ``never_fire``, share of ReLU units that are 0 throughout; ``saturated``, share of
    values of a tanh or sigmoid within 0.01 of an end; ``twins``, share of units that equal an earlier one on
    every sample; ``cosine``, mean cosine of two samples' outputs.
    """

    def measure(module: LightningModule) -> Measures:
        seen: list[tuple[nn.Module, Tensor]] = []
        hooks = [
            child.register_forward_hook(lambda child, _, out: seen.append((child, out.detach())))
            for child in module.modules()
            if isinstance(child, ACTIVATIONS)
        ]
        try:
            with calm(module):
                net(module)
        finally:
            for hook in hooks:
                hook.remove()
        found = {"never_fire": 0.0, "saturated": 0.0, "twins": 0.0, "cosine": -1.0}
        for child, out in seen:
            # [N, U] or [N, T, U], or [N, U, H, W] of a convolution: units second there
            rows_NU = out.transpose(1, -1).flatten(0, -2) if out.ndim == 4 else out.flatten(0, -2)
            if isinstance(child, nn.ReLU):
                never = float((rows_NU == 0).all(0).double().mean())
                found["never_fire"] = max(found["never_fire"], never)
            if isinstance(child, nn.Tanh | nn.Sigmoid):
                ends = (
                    1 - rows_NU.abs() if isinstance(child, nn.Tanh) else torch.minimum(rows_NU, 1 - rows_NU)
                ) < 0.01
                found["saturated"] = max(found["saturated"], float(ends.double().mean()))
            found["twins"] = max(found["twins"], twins(rows_NU))
            found["cosine"] = max(found["cosine"], likeness(out.flatten(1)))
        return found

    return measure


def twins(rows_NU: Tensor) -> float:
    """Return the share of units that equal an earlier unit on every sample; constant units are left out."""
    alive = rows_NU[:, rows_NU.std(0) > 1e-6]
    if alive.shape[1] < 2:
        return 0.0
    scaled = alive.T / alive.norm(dim=0).unsqueeze(1)
    close = torch.cdist(scaled, scaled) < 1e-3
    return float(close.tril(-1).any(1).double().sum()) / rows_NU.shape[1]


def likeness(rows_ND: Tensor) -> float:
    """Return the mean cosine of two different rows; rows of zeros count as equal."""
    length = rows_ND.norm(dim=1, keepdim=True)
    unit = torch.where(length > 0, rows_ND / length.clamp_min(1e-30), 0.0)
    unit = unit[length.squeeze(1) > 0]
    n = len(unit)
    if n < 2:
        return 1.0
    return float((unit.sum(0).square().sum() - n) / (n * (n - 1)))


def gradients(batch: Callable[[], Any]) -> Callable[[LightningModule], Measures]:
    """Return a measure of the weights' gradients on a batch, by autograd on a copy.

    ``gradient``: their norm together. ``gradient_ratio``: root mean square of the weakest weight matrix's
    entries over the strongest's, biases and normalisations left out.
    """

    def measure(module: LightningModule) -> Measures:
        twin = copy.deepcopy(module)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            weights = [p for p in twin.parameters() if p.requires_grad and p.ndim > 1]
            found = torch.autograd.grad(twin.loss(batch()), weights, allow_unused=True)  # type: ignore[operator]
        sizes = [0.0 if g is None else float(g.square().mean().sqrt()) for g in found]
        total = math.sqrt(sum(float(g.square().sum()) for g in found if g is not None))
        largest = max(sizes)
        return {"gradient": total, "gradient_ratio": min(sizes) / largest if largest > 0 else 0.0}

    return measure


def movement(module: nn.Module) -> Callable[[LightningModule], Measures]:
    """Return a measure of how weights moved since now.

    ``still``: weight matrices that are bitwise what they were; ``moved``: the whole's relative change;
    ``shrunk``: the smallest ratio of a weight matrix's norm to its norm now, 1 where
    all are zero; ``still/<glob>`` is left to
    :func:`still`.
    """
    before = {name: p.detach().clone() for name, p in module.named_parameters() if p.ndim > 1}

    def measure(module: LightningModule) -> Measures:
        now = {name: p.detach() for name, p in module.named_parameters() if name in before}
        change = sum(float((now[name] - before[name]).square().sum()) for name in before)
        size = sum(float(old.square().sum()) for old in before.values())
        ratios = [float(now[n].norm() / old.norm()) for n, old in before.items() if float(old.norm()) > 0]
        return {
            "still": float(sum(torch.equal(now[name], before[name]) for name in before)),
            "moved": math.sqrt(change / size) if size else 0.0,
            "shrunk": min(ratios, default=1.0),
        }

    return measure


def still(module: nn.Module, glob: str) -> Callable[[LightningModule], Measures]:
    """Return a measure, ``still_there``: the share of a glob's parameters bitwise as they are now.

    Raises:
        ValueError: if the glob matches none.
    """
    before = {n: p.detach().clone() for n, p in module.named_parameters() if fnmatch.fnmatchcase(n, glob)}
    if not before:
        raise ValueError(f"glob must match a parameter, got {glob!r}")

    def measure(module: LightningModule) -> Measures:
        now = dict(module.named_parameters())
        return {"still_there": sum(torch.equal(now[n], old) for n, old in before.items()) / len(before)}

    return measure


def spectrum(rows_ND: Tensor) -> Tensor:
    """Return the eigenvalues of the covariance of rows, largest first, in double precision."""
    rows = rows_ND.double()
    rows = rows - rows.mean(0)
    return torch.linalg.svdvals(rows).square() / max(len(rows) - 1, 1)


def directions(rows_ND: Tensor) -> float:
    """Return the participation ratio of the rows' covariance: about how many directions they use."""
    values = spectrum(rows_ND)
    squares = float(values.square().sum())
    return float(values.sum()) ** 2 / squares if squares > 0 else 0.0


def neighbour_accuracy(
    bank_ND: Tensor, labels_N: Tensor, query_MD: Tensor, truth_M: Tensor, *, k: int = 5
) -> float:
    """Return the accuracy of a vote among the k nearest by cosine."""
    bank, query = (nn.functional.normalize(x, dim=1) for x in (bank_ND, query_MD))
    nearest = (query @ bank.T).topk(k, dim=1).indices
    return float((labels_N[nearest].mode(dim=1).values == truth_M).double().mean())


def coverage(samples_N2: Tensor, centres_M2: Tensor, *, within: float = 0.3) -> Measures:
    """Return which share of modes gets a fair number of samples, and which share of samples is near one.

    ``modes``: share of the centres with at least a fifth of an even share of the samples within ``within``.
    """
    distance = torch.cdist(samples_N2, centres_M2)
    near = distance.argmin(1)[distance.amin(1) < within]
    counts = torch.bincount(near, minlength=len(centres_M2)).double()
    least = len(samples_N2) / len(centres_M2) / 5
    return {
        "modes": float((counts >= least).double().mean()),
        "on_modes": len(near) / len(samples_N2),
        "spread": float(samples_N2.std(0).mean()),
    }


def sharpness(batch: Callable[[], Any], lr: float) -> Callable[[LightningModule], Measures]:
    """Return a measure, ``lr_sharpness``: the rate times the loss's largest curvature, by power iteration."""

    def measure(module: LightningModule) -> Measures:
        twin = copy.deepcopy(module)
        weights = [p for p in twin.parameters() if p.requires_grad]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            loss = twin.loss(batch())  # type: ignore[operator]
            slopes = torch.autograd.grad(loss, weights, create_graph=True)
            vectors = [torch.randn_like(p) for p in weights]
        top = 0.0
        for _ in range(30):
            size = math.sqrt(sum(float(v.square().sum()) for v in vectors))
            vectors = [v / size for v in vectors]
            product = sum((g * v).sum() for g, v in zip(slopes, vectors, strict=True))
            turned = torch.autograd.grad(product, weights, retain_graph=True)
            top = sum(float((a * v).sum()) for a, v in zip(turned, vectors, strict=True))
            vectors = [each.detach() for each in turned]
        return {"lr_sharpness": lr * top}

    return measure
