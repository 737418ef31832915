"""Views of a batch: drawn parameters in, augmented images out, where the batch lives.

Shape letters: N rows to make (views times samples), B images, C channels, H x W pixels in, S out.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_sym.datamodules.augment import colour
from lightning_sym.datamodules.augment.blur import gaussian_blur
from lightning_sym.datamodules.augment.parameters import ViewParameters, stack
from lightning_sym.datamodules.augment.resample import crop_resize

HUE = 3
CHUNK = {"cpu": 2**20}  # numbers worked on at a time: enough for each operation to keep all cores busy
CHUNK_ELSEWHERE = 2**28


def make_views(
    images: Tensor,
    parameters: Sequence[ViewParameters],
    *,
    size: int,
    blur_kernels: Sequence[int],
    mean: Tensor | None = None,
    std: Tensor | None = None,
) -> list[Tensor]:
    """Make one view of the batch for each set of parameters.

    Rows whose hue has the same place in the order of colours are made together, in chunks that bound
    the memory; the other three colour operations share one formula.

    Args:
        images: ``[B, C, H, W]``, uint8 or floating in [0, 1]; padding outside a box is never seen.
        parameters: of each view, for all B samples.
        size: pixels a side of a view.
        blur_kernels: taps of the blur, of each view.
        mean: subtracted from each channel at the end, ``[C]``.
        std: divides each channel at the end, ``[C]``.

    Returns:
        As many ``[B, C, size, size]`` as there are parameters, float32.
    """
    batch, channels = len(images), images.shape[1]
    rows = stack(list(parameters))
    kernel_N = torch.tensor(blur_kernels).repeat_interleave(batch)
    hue_slot_N = (rows.order == HUE).to(torch.int64).argmax(dim=1)
    group_N = torch.where(rows.jitter, hue_slot_N, torch.full((), 4))
    result = torch.empty(len(rows), channels, size, size, dtype=torch.float32, device=images.device)
    numbers = CHUNK.get(images.device.type, CHUNK_ELSEWHERE)
    length = max(1, numbers // (channels * size * size))
    for kernel in sorted(set(blur_kernels)):
        for group in range(5):
            members = ((group_N == group) & (kernel_N == kernel)).nonzero().flatten()
            for chunk in members.split(length):
                if not len(chunk):
                    continue
                made = _make(images, rows.take(chunk), chunk % batch, group, size, kernel)
                if mean is not None and std is not None:
                    made = made.sub_(mean.view(-1, 1, 1)).div_(std.view(-1, 1, 1))
                result.index_copy_(0, chunk.to(images.device), made)
    return list(result.split(batch))


def _make(images: Tensor, own: ViewParameters, sample: Tensor, group: int, size: int, kernel: int) -> Tensor:
    device = images.device
    there = own.to(device)
    source = images[sample.to(device)]
    x = crop_resize(source, own.boxes if device.type == "cpu" else there.boxes, size=size, flip=there.flip)
    if group < 4:
        for slot in range(4):
            if slot == group:
                x = colour.hue(x, there.factors[:, HUE])
            else:
                mode = there.order[:, slot]
                x = colour.affine(x, mode, there.factors.gather(1, mode[:, None])[:, 0])
    for chosen, change in (
        (own.grayscale, lambda part, _: colour.grayscale(part).clone()),
        (own.blur_sigma > 0, lambda part, k: gaussian_blur(part, there.blur_sigma[k], kernel_size=kernel)),
        (own.solarize_threshold <= 1, lambda part, k: colour.solarize(part, there.solarize_threshold[k])),
    ):
        k = chosen.nonzero().flatten()
        if len(k) == len(x):
            x = change(x, k.to(device))
        elif len(k):
            k = k.to(device)
            x[k] = change(x[k], k)
    return x
