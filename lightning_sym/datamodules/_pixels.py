"""One image, whatever it comes as, to bytes of one or three channels.

Shape letters: C channels, H x W pixels.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

UNREADABLE = (  # what Pillow raises on damaged files: broken headers ask for sizes beyond all bounds, too
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
ORIENTATION = 0x0112  # EXIF's number of it
SIXTEEN_BITS = ("PNG", "PPM")  # formats whose mode "I" is Pillow's name for 16 bits


def open_image(path: str | Path) -> Image.Image:
    """Return a file's first picture, decoded, the file closed."""
    with open(path, "rb") as file, Image.open(file) as image:
        image.load()
        return image


def is_image(value: Any) -> bool:
    """Return whether a value of a row can only be a picture: PIL's, an array or tensor of 2 or 3 axes."""
    if isinstance(value, Tensor | np.ndarray):
        return value.ndim in (2, 3)
    if isinstance(value, Image.Image):
        return True
    return isinstance(value, Mapping) and "bytes" in value and "path" in value  # the hub's, not decoded


def as_bytes(image: Any, *, channels: int, max_side: int | None, upright: bool = True) -> Tensor:
    """Return an image as uint8 ``[C, H, W]``.

    Sixteen bits are scaled to eight (65535 is 255). What is transparent is laid on white, whether it says
    so in an alpha channel or in its palette. CMYK, YCbCr and HSV become RGB.

    Args:
        image: PIL image; path of a file; array or tensor ``[H, W]``, ``[C, H, W]`` or ``[H, W, C]`` with
            1 or 3 channels, uint8, uint16, bool or floating in [0, 1].
        channels: 1 or 3; colours are weighed to grey, grey is repeated.
        max_side: larger images are first shrunk, with antialiasing, to this many pixels.
        upright: turn a PIL image as its EXIF orientation asks. (Pillow has turned a TIFF already.)

    Raises:
        ValueError: if it is none of these.
    """
    if isinstance(image, Tensor) and image.dtype == torch.uint8 and image.ndim == 3:
        most = max(image.shape[1:])
        if image.shape[0] == channels and (max_side is None or most <= max_side):
            return image  # as it is: nothing to convert, nothing to import
    from torchvision.transforms.v2 import functional as tv

    if isinstance(image, Mapping):
        content = image.get("bytes")
        image = open_image(image["path"]) if content is None else Image.open(io.BytesIO(content))
    elif isinstance(image, str | Path):
        image = open_image(image)
    if isinstance(image, Image.Image):
        image = _of_pil(image, channels=channels, upright=upright)
    x = image if isinstance(image, Tensor) else _of_array(image)
    x = _bytes(_planes(x))
    if x.shape[0] != channels:
        x = x.expand(3, -1, -1) if channels == 3 else tv.rgb_to_grayscale(x)
    longest = max(x.shape[1:])
    if max_side is not None and longest > max_side:
        shape = [max(1, round(side * max_side / longest)) for side in x.shape[1:]]
        x = tv.resize(x, shape, antialias=True)
    return x


def _of_pil(image: Image.Image, *, channels: int, upright: bool) -> np.ndarray:
    """Return the pixels of a PIL image: bytes of one or three channels, 16 bits or floating point."""
    kind = image.format  # a turned image has none
    if upright:
        image = _turned(image)
    mode = image.mode
    if mode.startswith("I;16") or (mode == "I" and kind in SIXTEEN_BITS):
        return np.asarray(image).astype(np.uint16)
    if mode == "I":
        raise ValueError(
            "a PIL image of mode 'I' (32-bit integers) has no known range; save it with 8 or 16 bits a pixel"
        )
    if mode == "F":
        return np.array(image)
    try:
        if mode in ("La", "RGBa"):  # colours multiplied by alpha
            image = image.convert("LA" if mode == "La" else "RGBA")
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        if image.mode not in ("1", "L"):
            image = image.convert("RGB")
        return np.array(image.convert("RGB" if channels == 3 else "L"))
    except ValueError as error:
        raise ValueError(
            f"a PIL image of mode {mode!r} cannot be read; convert it to RGB ({error})"
        ) from error


def _turned(image: Image.Image) -> Image.Image:
    try:
        wanted = image.getexif().get(ORIENTATION, 1)
    except UNREADABLE:  # damaged notes on a picture that may be whole
        return image
    return image if wanted == 1 else ImageOps.exif_transpose(image)


def _of_array(image: Any) -> Tensor:
    if not isinstance(image, np.ndarray):
        raise ValueError(f"an image must be a PIL image, an array, a tensor or a path, got {type(image)}")
    native = image.dtype.newbyteorder("=")
    return torch.from_numpy(np.array(image, dtype=native, order="C"))  # ours to write to, no negative strides


def _planes(x: Tensor) -> Tensor:
    """Return ``[C, H, W]`` with one or three channels."""
    shape = tuple(x.shape)
    x = x[None] if x.ndim == 2 else x
    if x.ndim == 3 and x.shape[0] not in (1, 3) and x.shape[2] in (1, 3):
        x = x.permute(2, 0, 1)
    if x.ndim != 3 or x.shape[0] not in (1, 3):
        raise ValueError(f"an image must have 1 or 3 channels, got shape {shape}")
    if not x.numel():
        raise ValueError(f"an image must have pixels, got shape {shape}")
    return x


def _bytes(x: Tensor) -> Tensor:
    if x.dtype == torch.uint8:
        return x
    if x.dtype == torch.bool:
        return x.to(torch.uint8) * 255
    if x.dtype == torch.uint16:
        return ((x.to(torch.int32) + 128) // 257).to(torch.uint8)  # 65535 / 257 = 255
    if not x.is_floating_point():
        raise ValueError(f"an image must be uint8, uint16, bool or floating in [0, 1], got {x.dtype}")
    low, high = (float(v) for v in x.aminmax())
    if not (low >= -0.01 and high <= 1.01):  # room for a resampling's overshoot, not for normalised ones
        raise ValueError(f"a floating image must be in [0, 1], got values from {low:.3g} to {high:.3g}")
    return (x.float() * 255).round().clamp(0, 255).to(torch.uint8)
