"""Colour operations with one factor a sample; each equals torchvision's v2 functional of that factor.

Images are floating point in [0, 1]. Shape letters: N samples, C channels (1 or 3), H x W pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor

LUMA = (0.2989, 0.587, 0.114)


def luma(images: Tensor) -> Tensor:
    """Return the grey values ``[N, 1, H, W]`` of images ``[N, C, H, W]`` (ITU-R 601 weights)."""
    if images.shape[1] == 1:
        return images
    r, g, b = images.unbind(dim=1)
    return r.mul(LUMA[0]).add_(g, alpha=LUMA[1]).add_(b, alpha=LUMA[2]).unsqueeze(1)


def brightness(images: Tensor, factor: Tensor) -> Tensor:
    """Multiply by ``factor [N]`` (at least 0) and clip to [0, 1]."""
    return (images * _each(factor)).clamp_(0, 1)


def contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Blend with the mean grey value of each image: 0 gives that grey, 1 the image; clip to [0, 1]."""
    mean_N111 = luma(images).mean(dim=(1, 2, 3), keepdim=True)
    return torch.addcmul(mean_N111 * (1 - _each(factor)), images, _each(factor)).clamp_(0, 1)


def saturation(images: Tensor, factor: Tensor) -> Tensor:
    """Blend with the grey image: 0 gives it, 1 the image; clip to [0, 1]. Grey images stay as they are."""
    if images.shape[1] == 1:
        return images
    return torch.addcmul(luma(images) * (1 - _each(factor)), images, _each(factor)).clamp_(0, 1)


def hue(images: Tensor, shift: Tensor) -> Tensor:
    r"""Turn the hue by ``shift [N]`` turns in HSV space (in [-0.5, 0.5]).

    With V the largest channel, c the difference of largest and smallest, and h the hue in turns,

    .. math:: x_k = V - c \, \min(1, \max(0, 2 - 6 |h - o_k|_{\mathrm{turn}})), \quad
              o = (1/2, -1/6, 1/6)

    where :math:`|\cdot|_{\mathrm{turn}}` is the distance to the nearest integer: the usual six cases
    in one expression. Images of one channel stay as they are.
    """
    if images.shape[1] == 1:
        return images
    r, g, b = images.unbind(dim=1)
    value = torch.maximum(torch.maximum(r, g), b)
    chroma = value - torch.minimum(torch.minimum(r, g), b)
    from_g = torch.add(b, chroma, alpha=2).sub_(r)
    from_b = torch.add(r, chroma, alpha=4).sub_(g)
    turn = torch.where(r == value, g - b, torch.where(g == value, from_g, from_b))
    turn.div_((chroma * 6).clamp_min_(torch.finfo(images.dtype).tiny))
    turn += shift.to(turn.dtype)[:, None, None]
    result = torch.empty_like(images)
    for channel, offset in enumerate((1 / 2, -1 / 6, 1 / 6)):
        away = turn - offset
        away = away.sub_(away.round()).abs_().mul_(-6).add_(2).clamp_(0, 1)
        torch.addcmul(value, chroma, away, value=-1, out=result[:, channel])
    return result


def grayscale(images: Tensor) -> Tensor:
    """Replace all channels by the grey values."""
    return luma(images).expand_as(images)


def solarize(images: Tensor, threshold: Tensor) -> Tensor:
    """Invert what is at or above ``threshold [N]``; a threshold above 1 leaves an image as it is."""
    return torch.where(images >= _each(threshold), 1 - images, images)


def affine(images: Tensor, mode: Tensor, factor: Tensor) -> Tensor:
    """Apply brightness (mode 0), contrast (1), saturation (2) or nothing (3), each sample its own.

    The three are one formula, ``factor * x + (1 - factor) * g`` with ``g`` nothing, the mean grey or
    the grey image: a batch whose samples have their turns in different orders needs no regrouping.

    Args:
        images: ``[N, C, H, W]``.
        mode: integers ``[N]``.
        factor: ``[N]``.
    """
    grey_N1HW = luma(images)
    other = 1 - factor
    level_N = grey_N1HW.mean(dim=(1, 2, 3)) * other * (mode == 1)
    if images.shape[1] == 1:
        keep = (mode == 2) | (mode == 3)
        return torch.addcmul(_each(level_N), images, _each(factor.masked_fill(keep, 1))).clamp_(0, 1)
    tint_N = other * (mode == 2)
    grey_N1HW.mul_(_each(tint_N)).add_(_each(level_N))  # ours alone: three channels make a new tensor
    return torch.addcmul(grey_N1HW, images, _each(factor.masked_fill(mode == 3, 1))).clamp_(0, 1)


def _each(per_sample: Tensor) -> Tensor:
    return per_sample[:, None, None, None]
