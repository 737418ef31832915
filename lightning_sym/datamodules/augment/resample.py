"""Crops resized with antialiasing, a batch at a time: a crop, a flip and a resize are two matrices.

Shape letters: N samples, C channels, H x W pixels in, S pixels a side out.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

LOOP_PIXELS = 96 * 96  # above this, on CPU, slices of single images beat dense matrices


def resize_weights(
    start: Tensor, length: Tensor, *, size: int, pixels: int, flip: Tensor | None = None
) -> Tensor:
    r"""Return the matrices that crop and resize one axis as torch's antialiased bilinear mode does.

    Output pixel i of a crop of length :math:`\ell` looks at :math:`c_i = (i + 1/2)\,\ell / S`, through a
    triangle of half-width :math:`\max(1, \ell / S)` that is cut at the crop's ends and sums to one.

    Args:
        start: first pixel of each crop, ``[N]``.
        length: pixels in each crop, ``[N]``, at least 1.
        size: pixels out.
        pixels: pixels of the whole axis.
        flip: ``bool [N]``; True: the axis is reversed after the crop.

    Returns:
        ``float32 [N, size, pixels]``, zero outside the crop; rows sum to one.
    """
    out_S = torch.arange(size, device=start.device, dtype=torch.float32)
    at_NS = out_S.expand(len(start), size)
    if flip is not None:
        at_NS = torch.where(flip[:, None], size - 1 - at_NS, at_NS)
    length_N1 = length.to(torch.float32)[:, None]
    scale_N1 = length_N1 / size
    width_N1 = scale_N1.clamp_min(1)
    in_P = torch.arange(pixels, device=start.device, dtype=torch.float32)
    inside_NP = in_P - start.to(torch.float32)[:, None]  # pixel counted from the crop's start
    outside_NP = (inside_NP < 0) | (inside_NP >= length_N1)
    pixel_NP = ((inside_NP + 0.5) / width_N1).masked_fill_(outside_NP, torch.inf)  # in half-widths
    centre_NS = (at_NS + 0.5) * (scale_N1 / width_N1)
    weight_NSP = (pixel_NP[:, None] - centre_NS[..., None]).abs_()
    torch.sub(weight_NSP.new_ones(()), weight_NSP, out=weight_NSP).clamp_min_(0)
    return weight_NSP.div_(weight_NSP.sum(dim=2, keepdim=True))


def crop_resize(
    images: Tensor,
    boxes: Tensor,
    *,
    size: int,
    flip: Tensor | None = None,
    sample: Tensor | None = None,
    white: float = 1.0,
) -> Tensor:
    """Crop a box out of every image, resize it with antialiasing, and mirror some.

    Equal to ``torchvision.transforms.v2.functional.resized_crop(..., antialias=True)``, bilinear, of
    the image in floating point. On large images on CPU the samples are gone through one by one (on
    slices, by torch's own resampling); otherwise all are multiplied with :func:`resize_weights`.

    Args:
        images: ``[N, C, H, W]``, uint8 (counted from 0 to 255) or floating point.
        boxes: integers ``[N, 4]``: top, left, height, width, within the image.
        size: pixels a side of the result.
        flip: ``bool [N]``: mirror left and right.
        sample: which image each of N boxes is of, integers ``[N]``; None: the image of its number.
        white: what 255 becomes in the result, for uint8.

    Returns:
        ``float32 [N, C, size, size]`` (float64 for float64), in [0, white] for uint8; channel planes of
        all samples lie together in memory.

    Raises:
        ValueError: if shapes do not fit or a box is not within its image.
    """
    n, channels, height, width = _checked(images, boxes, sample)
    if n and images.device.type == "cpu" and max(height * width, size * size) > LOOP_PIXELS:
        return _one_by_one(images, boxes, size=size, flip=flip, sample=sample, white=white)
    dtype = images.dtype if images.dtype == torch.float64 else torch.float32
    x_NCHW = (images if sample is None else images[sample]).to(dtype)
    boxes = boxes.to(images.device)
    flip = None if flip is None else flip.to(images.device)
    rows_NSH, columns_NSW = (w.to(dtype) for w in _both_axes(boxes, size, height, width, flip))
    if images.dtype == torch.uint8 and white != 255:
        columns_NSW *= white / 255
    narrow = torch.bmm(x_NCHW.reshape(n, channels * height, width), columns_NSW.transpose(1, 2))
    narrow_NCHS = narrow.view(n, channels, height, size)
    planes_CNSS = narrow.new_empty(channels, n, size, size)
    for c in range(channels):
        torch.bmm(rows_NSH, narrow_NCHS[:, c], out=planes_CNSS[c])
    return planes_CNSS.transpose(0, 1)


def _both_axes(
    boxes: Tensor, size: int, height: int, width: int, flip: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the matrices of rows and columns, of square images by one pass for both."""
    top, left, tall, wide = boxes.unbind(dim=1)
    if height != width:
        rows = resize_weights(top, tall, size=size, pixels=height)
        return rows, resize_weights(left, wide, size=size, pixels=width, flip=flip)
    flips = None if flip is None else torch.cat([torch.zeros_like(flip), flip])
    weights = resize_weights(
        torch.cat([top, left]), torch.cat([tall, wide]), size=size, pixels=height, flip=flips
    )
    return weights[: len(boxes)], weights[len(boxes) :]


def _one_by_one(
    images: Tensor, boxes: Tensor, *, size: int, flip: Tensor | None, sample: Tensor | None, white: float
) -> Tensor:
    dtype = images.dtype if images.dtype == torch.float64 else torch.float32
    planes_CNSS = torch.empty(images.shape[1], len(boxes), size, size, dtype=dtype)
    flips = [False] * len(boxes) if flip is None else flip.tolist()
    which = list(range(len(boxes))) if sample is None else sample.tolist()
    for n, ((top, left, tall, wide), mirrored) in enumerate(zip(boxes.tolist(), flips, strict=True)):
        crop = images[which[n], :, top : top + tall, left : left + wide].to(dtype)[None]
        if (tall, wide) != (size, size):
            crop = F.interpolate(crop, size=(size, size), mode="bilinear", antialias=True)
        planes_CNSS[:, n] = crop[0].flip(-1) if mirrored else crop[0]
    if images.dtype == torch.uint8 and white != 255:
        planes_CNSS.mul_(white / 255)
    return planes_CNSS.transpose(0, 1)


def _checked(images: Tensor, boxes: Tensor, sample: Tensor | None) -> tuple[int, int, int, int]:
    if images.ndim != 4 or not (images.dtype == torch.uint8 or images.is_floating_point()):
        raise ValueError(
            f"images must be uint8 or floating [N, C, H, W], got {images.dtype} {tuple(images.shape)}"
        )
    n, channels, height, width = images.shape
    n = n if sample is None else len(sample)
    if boxes.shape != (n, 4):
        raise ValueError(f"boxes must be [{n}, 4] (top, left, height, width), got {tuple(boxes.shape)}")
    if boxes.device.type == "cpu" and n:  # elsewhere looking would wait for the device
        top, left, tall, wide = boxes.unbind(dim=1)
        if bool(
            (boxes[:, :2] < 0).any() or (boxes[:, 2:] < 1).any()
            or (top + tall > height).any() or (left + wide > width).any()
        ):  # fmt: skip
            raise ValueError(f"boxes must lie within {height} x {width} pixels and not be empty")
    return n, channels, height, width
