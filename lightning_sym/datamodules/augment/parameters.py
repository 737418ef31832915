"""Random parameters of views, drawn for a whole batch, each from its own sample's counter.

No generator is involved: every number is a hash of (seed, epoch, sample, view, which number). The same
sample is seen the same way in the same epoch whatever the batch, the worker, the rank or the point at
which a run was resumed; and nobody's random state moves.

Shape letters: N samples, T tries, K numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from lightning_sym.datamodules.augment.recipes import ViewRecipe

TRIES = 10  # torchvision's: then the crop falls back on the image's centre
NUMBERS = 4 * TRIES + 14
NEVER = 2.0  # a solarize threshold above every pixel


@dataclass(frozen=True)
class ViewParameters:
    """What is done to each sample, one row a sample.

    Args:
        boxes: top, left, height and width of the crop, int64 ``[N, 4]``.
        flip: bool ``[N]``.
        jitter: bool ``[N]``: whether colours change; the next two do nothing otherwise.
        order: int64 ``[N, 4]``: which of brightness 0, contrast 1, saturation 2, hue 3 comes when.
        factors: ``[N, 4]``: of brightness, contrast, saturation, and the hue's shift in turns.
        grayscale: bool ``[N]``.
        blur_sigma: ``[N]``, in pixels; 0: no blur.
        solarize_threshold: ``[N]``; above 1: nothing happens.
    """

    boxes: Tensor
    flip: Tensor
    jitter: Tensor
    order: Tensor
    factors: Tensor
    grayscale: Tensor
    blur_sigma: Tensor
    solarize_threshold: Tensor

    def __len__(self) -> int:
        return len(self.flip)

    def take(self, rows: Tensor) -> ViewParameters:
        """Return the parameters of some samples."""
        return ViewParameters(*(getattr(self, field.name)[rows] for field in fields(self)))

    def to(self, device: torch.device) -> ViewParameters:
        """Return the parameters on a device."""
        return ViewParameters(*(getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)))


def stack(several: list[ViewParameters]) -> ViewParameters:
    """Return the parameters of several views as one long batch."""
    return ViewParameters(
        *(torch.cat([getattr(one, f.name) for one in several]) for f in fields(ViewParameters))
    )


def hashed_uniform(index: Tensor, *, count: int, key: tuple[int, ...]) -> Tensor:
    """Return ``float64 [N, count]`` numbers, uniform in (0, 1), that depend on ``key`` and index alone.

    A 64-bit finaliser (Stafford's mix 13, as in SplitMix64), fed with one part of the key after the
    other and then with a counter.

    Args:
        index: integers ``[N]``.
        count: numbers for each.
        key: any integers: seed, epoch, view.
    """
    state = torch.zeros((), dtype=torch.int64)
    for part in key:
        state = mix(state + _wrapped(part))
    row_N1 = mix(index.to(torch.int64) + state)[:, None]
    counter_K = torch.arange(1, count + 1, dtype=torch.int64) * GOLDEN
    bits = (mix(row_N1 + counter_K) >> 11) & 0x1FFFFFFFFFFFFF
    return (bits.to(torch.float64) + 0.5) / 2**53


def draw(
    recipe: ViewRecipe, *, index: Tensor, heights: Tensor, widths: Tensor, key: tuple[int, ...]
) -> ViewParameters:
    """Draw one view's parameters for a batch, on CPU.

    Args:
        recipe: the distributions.
        index: the samples' numbers in the data set, ``[N]``.
        heights: of the images in pixels, ``[N]``.
        widths: likewise.
        key: what else the draw depends on: seed, epoch, view.
    """
    u = hashed_uniform(index, count=NUMBERS, key=key)
    crop, rest = u[:, : 4 * TRIES].view(-1, 4, TRIES), u[:, 4 * TRIES :].unbind(dim=1)
    n = len(index)
    factors = torch.zeros(n, 4, dtype=torch.float64)
    for column, strength in enumerate((recipe.brightness, recipe.contrast, recipe.saturation)):
        factors[:, column] = _between(rest[column], max(0.0, 1 - strength), 1 + strength)
    factors[:, 3] = _between(rest[3], -recipe.hue, recipe.hue)
    sigma = _between(rest[8], *recipe.blur_sigma)
    threshold = torch.full((n,), recipe.solarize_threshold, dtype=torch.float64)
    return ViewParameters(
        boxes=_boxes(recipe, crop, heights, widths),
        flip=rest[9] < recipe.flip,
        jitter=rest[10] < recipe.jitter,
        order=torch.stack(rest[4:8], dim=1).argsort(dim=1),
        factors=factors.float(),
        grayscale=rest[11] < recipe.grayscale,
        blur_sigma=torch.where(rest[12] < recipe.blur, sigma, torch.zeros(())).float(),
        solarize_threshold=threshold.where(rest[13] < recipe.solarize, threshold.new_tensor(NEVER)).float(),
    )


def _boxes(recipe: ViewRecipe, u: Tensor, heights: Tensor, widths: Tensor) -> Tensor:
    """Return the first crop of ten that fits, as ``RandomResizedCrop`` has it, else one in the middle."""
    tall_N1, wide_N1 = heights.to(torch.int64)[:, None], widths.to(torch.int64)[:, None]
    area = (tall_N1 * wide_N1) * _between(u[:, 0], *recipe.crop_scale)
    ratio = _between(u[:, 1], math.log(recipe.crop_ratio[0]), math.log(recipe.crop_ratio[1])).exp()
    w = (area * ratio).sqrt().round().long()
    h = (area / ratio).sqrt().round().long()
    fits = (w > 0) & (w <= wide_N1) & (h > 0) & (h <= tall_N1)
    top = (u[:, 2] * (tall_N1 - h + 1)).long()
    left = (u[:, 3] * (wide_N1 - w + 1)).long()
    first_N1 = fits.to(torch.int64).argmax(dim=1, keepdim=True)
    boxes = torch.cat([part.gather(1, first_N1) for part in (top, left, h, w)], dim=1)
    for row in (~fits.any(dim=1)).nonzero().flatten().tolist():
        boxes[row] = _middle(recipe, int(tall_N1[row]), int(wide_N1[row]))
    return boxes


def _middle(recipe: ViewRecipe, height: int, width: int) -> Tensor:
    w, h = width, height
    if width / height < min(recipe.crop_ratio):
        h = max(1, round(width / min(recipe.crop_ratio)))
    elif width / height > max(recipe.crop_ratio):
        w = max(1, round(height * max(recipe.crop_ratio)))
    return torch.tensor([(height - h) // 2, (width - w) // 2, h, w])


def _between(u: Tensor, low: float, high: float) -> Tensor:
    return low + (high - low) * u


GOLDEN = -0x61C8864680B583EB  # 2^64 over the golden ratio, as a signed number


def _wrapped(value: int) -> int:
    """Return ``value + golden`` modulo 2^64 as a signed number."""
    return (value + GOLDEN + 2**63) % 2**64 - 2**63


def mix(z: Tensor) -> Tensor:
    """Return 64 well mixed bits of each counter: Stafford's mix 13, as in SplitMix64."""
    z = (z ^ ((z >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    z = (z ^ ((z >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return z ^ ((z >> 31) & 0x1FFFFFFFF)
