"""Codes and images of Gaussian bumps in closed form: nothing but tensors in and out.

A coordinate that is NaN is absent: its code is zero, and the image does not depend on it (a stripe).

Shape letters: N samples, K bumps in an image, C = 2 coordinates (x, y), H rows, W columns, E code length.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_sym.datamodules.augment.parameters import GOLDEN, mix

ENCODINGS = ("scalar", "ramp", "bump", "one_hot")


def profile(centers: Tensor, size: int, sigma: float) -> Tensor:
    """Return Gaussians over the pixels 0 ... size - 1, ``[..., size]``; all ones where absent."""
    pixels = torch.arange(size, device=centers.device, dtype=centers.dtype)
    rate = torch.full_like(centers, -0.5 / sigma**2).masked_fill_(centers.isnan(), 0.0)  # exp(0 * ...) = 1
    return (pixels - centers.nan_to_num()[..., None]).square_().mul_(rate[..., None]).exp_()


def draw(
    centers_NKC: Tensor,
    *,
    size: int,
    sigma: float,
    background: float = 0.0,
    amplitude: float = 1.0,
    out: Tensor | None = None,
) -> Tensor:
    """Draw each image as background plus amplitude times a sum of outer products.

    Args:
        centers_NKC: ``[N, K, 2]`` places ``(x, y)`` in pixels, NaN for an absent coordinate.
        size: pixels a side.
        sigma: standard deviation in pixels.
        background: value of a blank image.
        amplitude: value of the top of a bump less the background.
        out: buffer ``[N, 1, size, size]`` to draw into.

    Returns:
        ``[N, 1, size, size]``; rows are y, columns are x.
    """
    profiles_NKCL = profile(centers_NKC, size, sigma)
    x_NKW, y_NHK = profiles_NKCL[:, :, 0], profiles_NKCL[:, :, 1].mT
    if out is None:
        out = x_NKW.new_empty(len(centers_NKC), 1, size, size)
    image_NHW = out[:, 0]
    if centers_NKC.shape[1] == 1:
        torch.mul(y_NHK if amplitude == 1 else amplitude * y_NHK, x_NKW, out=image_NHW)
        if background:
            image_NHW.add_(background)
    else:
        torch.baddbmm(x_NKW.new_full((), background), y_NHK, x_NKW, alpha=amplitude, out=image_NHW)
    return out


def encode(centers_NKC: Tensor, *, size: int, encoding: str, sigma: float) -> Tensor:
    """Return the codes ``[N, E]``, bump after bump, x before y within each.

    ``scalar`` is the coordinate itself, in pixels; ``ramp`` has one unit a pixel, which rises from 0
    to 1 as the coordinate passes it; ``bump`` one unit a pixel with a Gaussian tuning curve of width
    ``sigma``; ``one_hot`` one unit a pixel, on where the coordinate is.
    """
    absent = centers_NKC.isnan()
    if encoding == "scalar":
        code = centers_NKC[..., None]
    elif encoding == "bump":
        code = profile(centers_NKC, size, sigma)
    else:
        units = torch.arange(size, device=centers_NKC.device, dtype=centers_NKC.dtype)
        offset = centers_NKC[..., None] - units
        code = (offset + 1).clamp(0, 1) if encoding == "ramp" else (offset == 0).to(centers_NKC.dtype)
    return code.where(~absent[..., None], 0.0).flatten(1)


def hashed_normal(index_N: Tensor, count: int, *, seed: int) -> Tensor:
    """Return ``[N, count]`` standard normal numbers that depend on ``seed`` and each index alone.

    A mixed counter, then Box and Muller's
    transform: the same sample has the same noise in every worker, rank, batch and epoch.
    """
    half = (count + 1) // 2
    counter = (index_N.to(torch.int64)[:, None] * (2 * half)) + torch.arange(2 * half, device=index_N.device)
    z = mix((counter + seed * 0x2545F491 + 1) * GOLDEN)
    uniform = (((z >> 11) & 0x1FFFFFFFFFFFFF).double() + 0.5) / 2**53
    radius, angle = (-2 * uniform[:, :half].log()).sqrt(), 2 * torch.pi * uniform[:, half:]
    return torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)[:, :count].float()
