"""Views of a batch: drawn parameters in, augmented images out, where the batch lives.

Shape letters: N rows to make (views times samples), B images, C channels, H x W pixels in, S out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_sym.datamodules.augment import colour
from lightning_sym.datamodules.augment.blur import gaussian_blur
from lightning_sym.datamodules.augment.parameters import ViewParameters, stack
from lightning_sym.datamodules.augment.resample import crop_resize
from lightning_sym.datamodules.augment.threads import side_by_side

HUE = 3
CHUNK = {"cpu": 2**18}  # numbers worked on at a time: they and what is made of them fit a core's own cache
CHUNK_ELSEWHERE = 2**28


@dataclass(frozen=True)
class _Task:
    """What a chunk of rows is made from."""

    images: Tensor
    rows: ViewParameters
    there: ViewParameters  # the same on the images' device
    result: Tensor
    scale: Tensor  # of what is in the result
    shift: Tensor  # of it, afterwards
    white: float

    def make(self, chunk: Tensor, group: int, kernel: int) -> None:
        """Make some rows, of one place of the hue in their order of colours and one blur's taps."""
        with torch.no_grad(), torch.autocast(self.images.device.type, enabled=False):  # a thread's own
            made = _make(self, chunk, group, kernel)
            if len(chunk) == 1:
                torch.addcmul(self.shift, made[0], self.scale, out=self.result[int(chunk)])
            else:
                made.mul_(self.scale).add_(self.shift)
                self.result.index_copy_(0, chunk.to(made.device), made)


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

    Rows whose hue has the same place in the order of colours are made together, in chunks; the other
    three colour operations share one formula. On CPU each thread makes chunks of its own, which stay in
    its core's cache from the first operation to the last.

    Args:
        images: ``[B, C, H, W]``, uint8 or floating in [0, 1]; padding outside a box is never seen. Grey
            values of bytes are whole ones, as torchvision's are.
        parameters: of each view, for all B samples.
        size: pixels a side of a view.
        blur_kernels: taps of the blur, of each view.
        mean: subtracted from each channel at the end, ``[C]``.
        std: divides each channel at the end, ``[C]``.

    Returns:
        As many ``[B, C, size, size]`` as there are parameters, float32.
    """
    batch, channels = len(images), images.shape[1]
    device = images.device
    rows = stack(list(parameters))
    kernel_N = torch.tensor(blur_kernels).repeat_interleave(batch)
    hue_slot_N = (rows.order == HUE).to(torch.int64).argmax(dim=1)
    group_N = torch.where(rows.jitter, hue_slot_N, torch.full((), 4))
    result = torch.empty(len(rows), channels, size, size, dtype=torch.float32, device=device)
    white = colour.BYTE if images.dtype == torch.uint8 else 1.0
    mean = torch.zeros(channels, device=device) if mean is None else mean
    std = torch.ones(channels, device=device) if std is None else std
    scale, shift = ((v / std).float().view(-1, 1, 1) for v in (1 / white, -mean))
    task = _Task(images, rows, rows.to(device), result, scale, shift, white)
    length = max(1, CHUNK.get(device.type, CHUNK_ELSEWHERE) // (channels * size * size))
    jobs = [
        (chunk, group, kernel)
        for kernel in sorted(set(blur_kernels))
        for group in range(5)
        for chunk in _parts(((group_N == group) & (kernel_N == kernel)).nonzero().flatten(), length)
    ]
    threads = torch.get_num_threads() if device.type == "cpu" and len(jobs) > 1 else 1
    side_by_side(lambda job: task.make(*job), jobs, threads=threads)
    return list(result.split(batch))


def _parts(members: Tensor, length: int) -> list[Tensor]:
    """Return members in as few parts as there can be of so many, all of nearly one length."""
    return list(members.tensor_split(-(-len(members) // length))) if len(members) else []


def _make(task: _Task, chunk: Tensor, group: int, kernel: int) -> Tensor:
    device, white = task.images.device, task.white
    own = task.rows.take(chunk)
    there = own if device.type == "cpu" else task.there.take(chunk.to(device))
    sample = chunk % len(task.images)
    boxes = own.boxes if device.type == "cpu" else there.boxes
    x = crop_resize(
        task.images, boxes, size=task.result.shape[-1], flip=there.flip, sample=sample.to(device), white=white
    )
    if group < 4:
        for slot in range(4):
            if slot == group:
                if not own.factors[:, HUE].any():
                    continue  # whole bytes stay whole
                x = colour.hue(x, there.factors[:, HUE], white=white)
            else:
                mode = there.order[:, slot]
                factor = there.factors.gather(1, mode[:, None])[:, 0]
                x = colour.affine(x, mode, factor, white=white)
    for chosen, change in (
        (own.grayscale, lambda part, _: colour.grayscale(part, white=white).clone()),
        (own.blur_sigma > 0, lambda part, k: gaussian_blur(part, there.blur_sigma[k], kernel_size=kernel)),
        (
            own.solarize_threshold <= 1,
            lambda part, k: colour.solarize(part, there.solarize_threshold[k], white=white),
        ),
    ):
        k = chosen.nonzero().flatten()
        if len(k) == len(x):
            x = change(x, k.to(device))
        elif len(k):
            k = k.to(device)
            planes = x.transpose(0, 1)  # which lie together, so that this copies long stretches
            part = change(planes.index_select(1, k).transpose(0, 1), k)
            planes.index_copy_(1, k, part.transpose(0, 1))
    return x
