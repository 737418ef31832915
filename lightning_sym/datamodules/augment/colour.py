"""Colour operations with one factor a sample; each equals torchvision's v2 functional of that factor.

Images are uint8, or floating point with black 0 and white ``white``: 1, or 255 for bytes in floating point.
Of bytes torchvision cuts grey values down to whole ones, and so do these; a result in floating point is not
cut, and lies within 1/255 above torchvision's bytes. For uint8 it is torchvision's, but for rounding where a
value is whole.

Shape letters: N samples, C channels (1 or 3), H x W pixels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

LUMA = (0.2989, 0.587, 0.114)
BYTE = 255.0


def luma(images: Tensor, *, white: float = 1.0) -> Tensor:
    """Return the grey values ``[N, 1, H, W]`` of images ``[N, C, H, W]`` (ITU-R 601 weights).

    Images of one channel are returned themselves.
    """
    if images.shape[1] == 1:
        return images
    r, g, b = images.unbind(dim=1)
    grey = r.mul(LUMA[0]).add_(g, alpha=LUMA[1]).add_(b, alpha=LUMA[2])
    if white == BYTE:
        grey.floor_()
    return grey.unsqueeze(1)


def brightness(images: Tensor, factor: Tensor, *, white: float = 1.0) -> Tensor:
    """Multiply by ``factor [N]`` (at least 0) and clip to [0, white]."""
    if images.dtype == torch.uint8:
        return _on_bytes(brightness, images, factor)
    return (images * _each(factor)).clamp_(0, white)


def contrast(images: Tensor, factor: Tensor, *, white: float = 1.0) -> Tensor:
    """Blend with the mean grey value of each image: 0 gives that grey, 1 the image; clip to [0, white]."""
    if images.dtype == torch.uint8:
        return _on_bytes(contrast, images, factor)
    mean_N111 = luma(images, white=white).mean(dim=(1, 2, 3), keepdim=True)
    return torch.addcmul(mean_N111 * (1 - _each(factor)), images, _each(factor)).clamp_(0, white)


def saturation(images: Tensor, factor: Tensor, *, white: float = 1.0) -> Tensor:
    """Blend with the grey image: 0 gives it, 1 the image; clip to [0, white]. Images of one channel stay."""
    if images.dtype == torch.uint8:
        return _on_bytes(saturation, images, factor)
    if images.shape[1] == 1:
        return images
    grey = luma(images, white=white) * (1 - _each(factor))
    return torch.addcmul(grey, images, _each(factor)).clamp_(0, white)


def hue(images: Tensor, shift: Tensor, *, white: float = 1.0) -> Tensor:
    r"""Turn the hue by ``shift [N]`` turns in HSV space (in [-0.5, 0.5]); any scale of floating point.

    With m the smallest channel, c the difference of largest and smallest, h in [0, 6) the new hue in sixths
    of a turn, and :math:`\overline{a}` short for a clipped to [1, 2],

    .. math:: r = m + c \, (\overline{|h - 3|} - 1), \quad g = m + c \, (2 - \overline{|h - 2|}), \quad
              b = m + c \, (2 - \overline{|h - 4|}):

    the usual six cases without a case. Images of one channel stay as they are.
    """
    if images.dtype == torch.uint8:
        return _on_bytes(hue, images, shift)
    if images.shape[1] == 1:
        return images
    r, g, b = images.unbind(dim=1)
    value = torch.maximum(torch.maximum(r, g), b)
    least = torch.minimum(torch.minimum(r, g), b)
    chroma = value - least
    from_g = torch.sub(b, r).add_(chroma, alpha=2)
    from_b = torch.sub(r, g).add_(chroma, alpha=4)
    h = torch.where(r == value, g - b, torch.where(g == value, from_g, from_b))
    h.div_(chroma.clamp_min(torch.finfo(images.dtype).tiny)).add_(6 * shift.to(h.dtype)[:, None, None])
    h.sub_((h / 6).floor_(), alpha=6)
    result = torch.empty_like(images)
    low, high = least - chroma, value + chroma  # of which c times a clipped distance is added or taken away
    for channel, (base, centre, sign) in enumerate(((low, 3, 1), (high, 2, -1), (high, 4, -1))):
        away = torch.sub(h, centre).abs_().clamp_(1, 2)
        torch.addcmul(base, chroma, away, value=sign, out=result[:, channel])
    return result


def grayscale(images: Tensor, *, white: float = 1.0) -> Tensor:
    """Replace all channels by the grey values."""
    if images.dtype == torch.uint8:
        return luma(images, white=BYTE).to(torch.uint8).expand_as(images)
    return luma(images, white=white).expand_as(images)


def solarize(images: Tensor, threshold: Tensor, *, white: float = 1.0) -> Tensor:
    """Invert what is at or above ``threshold [N]`` times white; one above 1 leaves an image as it is."""
    if images.dtype == torch.uint8:
        return _on_bytes(solarize, images, threshold)
    return torch.where(images >= _each(threshold) * white, white - images, images)


def affine(images: Tensor, mode: Tensor, factor: Tensor, *, white: float = 1.0) -> Tensor:
    """Apply brightness (mode 0), contrast (1), saturation (2) or nothing (3), each sample its own.

    The three are one formula, ``factor * x + (1 - factor) * g`` with ``g`` nothing, the mean grey or
    the grey image: a batch whose samples have their turns in different orders needs no regrouping.

    Args:
        images: floating point ``[N, C, H, W]``.
        mode: integers ``[N]``.
        factor: ``[N]``.
        white: the value of white.
    """
    grey_N1HW = luma(images, white=white)
    other = 1 - factor
    level_N = grey_N1HW.mean(dim=(1, 2, 3)) * other * (mode == 1)
    if images.shape[1] == 1:
        keep = (mode == 2) | (mode == 3)
        return torch.addcmul(_each(level_N), images, _each(factor.masked_fill(keep, 1))).clamp_(0, white)
    tint_N = other * (mode == 2)
    grey_N1HW.mul_(_each(tint_N)).add_(_each(level_N))  # ours alone: three channels make a new tensor
    return torch.addcmul(grey_N1HW, images, _each(factor.masked_fill(mode == 3, 1))).clamp_(0, white)


def _on_bytes(change: Callable[..., Tensor], images: Tensor, factor: Tensor) -> Tensor:
    return change(images.float(), factor, white=BYTE).to(torch.uint8)


def _each(per_sample: Tensor) -> Tensor:
    return per_sample[:, None, None, None]
