"""Data that need no download: scikit-learn's digits, teachers, sequences, rings of Gaussians.

Shape letters: N samples, T positions, V symbols.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from sklearn.datasets import load_digits
from torch import Tensor


class Split(NamedTuple):
    """Inputs and targets to train on and held out."""

    x: Tensor
    y: Tensor
    x_held: Tensor
    y_held: Tensor


@functools.cache
def _digits() -> tuple[Tensor, Tensor]:
    digits = load_digits()
    return torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)


def digits(*, images: bool = False, classes: int = 10, samples: int | None = None) -> Split:
    """Return the digits in [0, 1], every fifth held out.

    Args:
        images: ``[N, 1, 8, 8]`` instead of ``[N, 64]``.
        classes: digits below this number alone.
        samples: train on the first so many.
    """
    x, y = _digits()
    x = x.reshape(-1, 1, 8, 8) if images else x
    x, y = x[y < classes], y[y < classes]
    held = torch.arange(len(y)) % 5 == 0
    return Split(x[~held][:samples], y[~held][:samples], x[held], y[held])


def noisy_labels(y: Tensor, share: float, *, classes: int = 10, seed: int = 0) -> Tensor:
    """Return labels of which a share is drawn anew."""
    generator = torch.Generator().manual_seed(seed)
    other = torch.randint(classes, y.shape, generator=generator)
    return torch.where(torch.rand(y.shape, generator=generator) < share, other, y)


def projected(split: Split, rank: int, *, seed: int = 0) -> Split:
    """Return the data with inputs projected onto their leading ``rank`` directions, in all coordinates."""
    mean = split.x.mean(0)
    _, _, directions = torch.linalg.svd(split.x - mean, full_matrices=False)
    basis = directions[:rank]
    keep = [(x - mean) @ basis.T @ basis + mean for x in (split.x, split.x_held)]
    return Split(keep[0], split.y, keep[1], split.y_held)


def single_index(*, samples: int = 512, width: int = 32, noise: float = 0.0, seed: int = 0) -> Split:
    """Return targets that depend on a few directions of Gaussian inputs: features must be learned."""
    generator = torch.Generator().manual_seed(1234 + seed)
    x = torch.randn(samples + 512, width, generator=generator)
    y = x[:, :1] * x[:, 1:2]
    y = y + noise * torch.randn(y.shape, generator=generator)
    return Split(x[:samples], y[:samples], x[samples:], (x[:, :1] * x[:, 1:2])[samples:])


def linear_teacher(*, samples: int = 512, width: int = 16, outputs: int = 8, seed: int = 0) -> Split:
    """Return targets of a linear teacher with three strong directions of different strength."""
    generator = torch.Generator().manual_seed(77 + seed)
    x = torch.randn(samples + 256, width, generator=generator)
    left = torch.linalg.qr(torch.randn(width, 3, generator=generator)).Q
    right = torch.linalg.qr(torch.randn(outputs, 3, generator=generator)).Q
    y = x @ (left * torch.tensor([3.0, 2.0, 1.0])) @ right.T
    return Split(x[:samples], y[:samples], x[samples:], y[samples:])


def markov_text(*, samples: int = 512, length: int = 24, symbols: int = 16, seed: int = 0) -> Split:
    """Return sequences in which the next symbol is fixed by the last two, nine times out of ten.

    Returns:
        ``x`` ``[N, T]`` and the next symbols ``y`` ``[N, T]``; 256 sequences are held out.
    """
    generator = torch.Generator().manual_seed(99)  # the language is the same for all seeds
    table = torch.randint(symbols, (symbols, symbols), generator=generator)
    generator.manual_seed(500 + seed)
    total = samples + 256
    text = torch.randint(symbols, (total, length + 1), generator=generator)
    for t in range(2, length + 1):
        follows = table[text[:, t - 2], text[:, t - 1]]
        kept = torch.rand(total, generator=generator) < 0.9
        text[:, t] = torch.where(kept, follows, text[:, t])
    return Split(text[:samples, :-1], text[:samples, 1:], text[samples:, :-1], text[samples:, 1:])


def copied_text(*, samples: int = 1024, half: int = 8, symbols: int = 16, seed: int = 0) -> Split:
    """Return sequences whose second half repeats the first: attention must look back.

    Returns:
        ``x`` ``[N, 2 half - 1]`` and the next symbols, -100 where they cannot be known.
    """
    generator = torch.Generator().manual_seed(300 + seed)
    first = torch.randint(symbols, (samples + 256, half), generator=generator)
    text = torch.cat([first, first], dim=1)
    y = text[:, 1:].clone()
    y[:, : half - 1] = -100
    return Split(text[:samples, :-1], y[:samples], text[samples:, :-1], y[samples:])


def recall(*, samples: int = 1024, length: int = 12, symbols: int = 4, seed: int = 0) -> Split:
    """Return noise sequences of one-hot symbols whose label is the first symbol: memory is needed.

    Returns:
        ``x`` ``[N, T, 2 symbols]``, ``y`` ``[N]``.
    """
    generator = torch.Generator().manual_seed(700 + seed)
    total = samples + 256
    y = torch.randint(symbols, (total,), generator=generator)
    x = torch.zeros(total, length, 2 * symbols)
    x[torch.arange(total), 0, y] = 1
    fill = torch.randint(symbols, (total, length - 1), generator=generator)
    x[:, 1:, symbols:] = torch.nn.functional.one_hot(fill, symbols).float()
    return Split(x[:samples], y[:samples], x[samples:], y[samples:])


def ring(count: int, *, modes: int = 8, radius: float = 2.0, spread: float = 0.05, seed: int = 0) -> Tensor:
    """Return points of Gaussians on a ring, ``[N, 2]``."""
    generator = torch.Generator().manual_seed(seed)
    mode = torch.randint(modes, (count,), generator=generator)
    return ring_centres(modes, radius)[mode] + spread * torch.randn(count, 2, generator=generator)


def ring_centres(modes: int = 8, radius: float = 2.0) -> Tensor:
    """Return the centres of a ring's Gaussians, ``[modes, 2]``."""
    angle = torch.arange(modes) * (2 * math.pi / modes)
    return radius * torch.stack([angle.cos(), angle.sin()], dim=1)


def grid(count: int, *, side: int = 3, spread: float = 0.05, seed: int = 0) -> Tensor:
    """Return points of Gaussians on a square grid, ``[N, 2]``."""
    generator = torch.Generator().manual_seed(seed)
    centres = grid_centres(side)
    mode = torch.randint(len(centres), (count,), generator=generator)
    return centres[mode] + spread * torch.randn(count, 2, generator=generator)


def grid_centres(side: int = 3) -> Tensor:
    """Return the centres of a grid's Gaussians, two apart, ``[side ** 2, 2]``."""
    axis = 2.0 * (torch.arange(side) - (side - 1) / 2)
    return torch.cartesian_prod(axis, axis)
