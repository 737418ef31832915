"""Gaussian blur with one width a sample.

Shape letters: N samples, C channels, H x W pixels, K taps.
"""

from __future__ import annotations

import torch
from torch import Tensor


def gaussian_kernels(sigma: Tensor, *, kernel_size: int) -> Tensor:
    """Return normalised Gaussians ``[N, K]`` for ``sigma [N]`` in pixels, cut to ``kernel_size`` taps.

    Taps far below the rounding of the sum are zero: as subnormal numbers they would make every product
    with them many times slower.
    """
    offset_K = torch.arange(kernel_size, device=sigma.device, dtype=sigma.dtype) - (kernel_size - 1) / 2
    kernels_NK = torch.softmax(-0.5 * (offset_K / sigma[:, None]).square(), dim=1)
    return kernels_NK.masked_fill_(kernels_NK < 1e-3 * torch.finfo(sigma.dtype).eps, 0)


def blur_matrices(kernels: Tensor, *, pixels: int) -> Tensor:
    """Return the filters as matrices ``[N, pixels, pixels]`` that reflect at the border.

    Args:
        kernels: ``[N, K]``, K odd.
        pixels: length of the axis, above ``K // 2``.
    """
    n, taps = kernels.shape
    at = torch.arange(pixels, device=kernels.device)[:, None] + torch.arange(
        -(taps // 2), taps // 2 + 1, device=kernels.device
    )
    at = at.abs()
    at = torch.where(at >= pixels, 2 * (pixels - 1) - at, at)  # [pixels, K], reflected
    matrices = kernels.new_zeros(n, pixels, pixels)
    spread = kernels[:, None].expand(n, pixels, taps)
    return matrices.scatter_add_(2, at.expand(n, pixels, taps), spread)


def gaussian_blur(images: Tensor, sigma: Tensor, *, kernel_size: int) -> Tensor:
    """Blur every image with its own width, equal to torchvision's v2 ``gaussian_blur``.

    Args:
        images: floating point ``[N, C, H, W]``.
        sigma: standard deviations ``[N]`` in pixels, positive.
        kernel_size: taps, odd; at most ``2 min(H, W) - 1`` as the border is reflected once.

    Returns:
        ``[N, C, H, W]``.

    Raises:
        ValueError: if ``kernel_size`` is even or too large for the images.
    """
    n, channels, height, width = images.shape
    if kernel_size % 2 == 0 or not 0 < kernel_size < 2 * min(height, width):
        raise ValueError(
            f"kernel_size must be odd and below {2 * min(height, width)} for {height} x {width} pixels, "
            f"got {kernel_size}"
        )
    kernels_NK = gaussian_kernels(sigma.to(images.dtype), kernel_size=kernel_size)
    rows = blur_matrices(kernels_NK, pixels=height)
    columns = rows if width == height else blur_matrices(kernels_NK, pixels=width)
    result_CNHW = images.new_empty(channels, n, height, width)
    for c in range(channels):
        torch.bmm(torch.bmm(rows, images[:, c]), columns.transpose(1, 2), out=result_CNHW[c])
    return result_CNHW.transpose(0, 1)
