"""Does a generator compose? Pure measures on its images and on its representation of coordinates.

A generator gets two coordinates, ``x`` (column) and ``y`` (row), and draws an image. It composes when it
draws the right image at pairs it was never trained on. The measures follow "Compositional Generalization
Requires More Than Disentangled Representations" (Liang et al., arXiv:2501.18797).

Shape letters: N images, H rows, W columns, S training images, D features, Y and X grid of coordinates.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_sym.functional._checks import (
    as_counts,
    as_real,
    check_number,
    check_same_shape,
    nan_like,
    promoted,
)


class Bump(NamedTuple):
    """What was found in each image where a bump was asked for; see :func:`find_bump`.

    Args:
        center: ``[N, 2]`` place of the bump, ``(x, y)`` in pixels, sub-pixel where the fit allows.
        distance: ``[N]`` from the brightest pixel (after the background) to the place asked for, pixels.
        height: ``[N]`` value at the peak, less the background, in units of the amplitude.
        width: ``[N]`` standard deviation in pixels; NaN where the peak is not Gaussian-like.
        found: ``[N]`` booleans.
    """

    center: Tensor
    distance: Tensor
    height: Tensor
    width: Tensor
    found: Tensor


class Memorisation(NamedTuple):
    """How images are made up; see :func:`memorisation`.

    Args:
        superposition: ``[N]`` share of the energy that lies in the span of the training images.
        product: ``[N]`` share of the energy in the best product of one row and one column profile.
    """

    superposition: Tensor
    product: Tensor


def _as_images(images: Tensor, *, name: str) -> Tensor:
    """Return ``images`` as ``[N, H, W]`` in the precision of computation.

    Raises:
        ValueError: naming the argument, if they are no images.
    """
    real = as_real(images, name=name)
    if images.ndim == 4 and images.shape[1] == 1:
        real = real[:, 0]
    if real.ndim != 3 or 0 in real.shape:
        raise ValueError(
            f"{name} must be images [N, H, W] or [N, 1, H, W], none empty, got {tuple(images.shape)}"
        )
    return real


def _finite(images_NHW: Tensor) -> Tensor:
    """Return ``[N]`` booleans: which images are finite everywhere."""
    return images_NHW.isfinite().flatten(1).all(dim=1)


def relative_error(images: Tensor, targets: Tensor, *, background: float = 0.0) -> Tensor:
    r"""Mean squared error of each image in units of the error of a blank image.

    .. math:: e_n = \frac{\sum_{p} (f_{np} - t_{np})^2}{\sum_{p} (b - t_{np})^2}

    A bump covers few pixels, so a small squared error may well mean that no bump was drawn. At
    ``1`` an image is as wrong as the blank one.

    Args:
        images: what was drawn, ``[N, H, W]`` or ``[N, 1, H, W]``.
        targets: what should have been drawn, same shape.
        background: value of the blank image.

    Returns:
        ``[N]`` in ``[0, inf)``; for a blank target ``0`` if the image is blank too, else ``inf``; NaN
        where image or target is not finite.

    Raises:
        TypeError: if a tensor is not of real floating-point numbers.
        ValueError: if the shapes differ or are not images.

    Example:
        >>> target = torch.tensor([[[0.0, 1.0], [0.0, 0.0]]])
        >>> relative_error(torch.zeros(1, 2, 2), target), relative_error(target, target)
        (tensor([1.]), tensor([0.]))
    """
    f_NHW, t_NHW = promoted(_as_images(images, name="images"), _as_images(targets, name="targets"))
    check_same_shape(f_NHW, t_NHW, names="images and targets")
    check_number("background", background)
    error_N = (f_NHW - t_NHW).square().sum(dim=(1, 2))
    blank_N = (t_NHW - background).square().sum(dim=(1, 2))
    ratio_N = torch.where((error_N == 0) & (blank_N == 0), torch.zeros_like(error_N), error_N / blank_N)
    return torch.where(_finite(f_NHW) & _finite(t_NHW), ratio_N, torch.nan)


def find_bump(
    images: Tensor,
    centers: Tensor,
    *,
    background: float = 0.0,
    amplitude: float = 1.0,
    tolerance: float = 1.5,
    min_height: float = 0.5,
) -> Bump:
    r"""Look for a bump in each image where one was asked for.

    The peak is the pixel with the largest :math:`v = (f - b)/a`. Along each axis the three pixels
    around it, :math:`v_-, v_0, v_+`, give width and place exactly if they are samples of a
    Gaussian, on the pixel or off it:

    .. math:: \sigma^2 = \frac{1}{2\ln v_0 - \ln v_- - \ln v_+}, \qquad
              \delta = \tfrac{\sigma^2}{2} (\ln v_+ - \ln v_-).

    At the border the three pixels nearest to it are taken. The width is the geometric mean of both
    axes' :math:`\sigma`; where a logarithm is of a number that is not positive, or the curvature has
    the wrong sign, it is NaN and the place is that of the pixel.

    Args:
        images: ``[N, H, W]`` or ``[N, 1, H, W]`` with ``H, W >= 3``.
        centers: ``[N, 2]`` places asked for, ``(x, y)`` in pixels (column, row; the first pixel's is 0).
        background: value of the blank image.
        amplitude: value of the bump's top less the background; negative for a dark bump.
        tolerance: a bump further away than this many pixels is not the one asked for.
        min_height: a bump less high than this share of the amplitude is none.

    Returns:
        :class:`Bump`. A blank image has height 0, width NaN, and is not found. Where the image or the
        place asked for is not finite, all numbers are NaN, and nothing is found.

    Raises:
        TypeError: if a tensor is not of real floating-point numbers.
        ValueError: if a shape is off, the amplitude is 0, or a threshold is negative.
    """
    f_NHW = _as_images(images, name="images")
    n, h, w = f_NHW.shape
    if h < 3 or w < 3:
        raise ValueError(f"images must be at least 3 x 3 pixels, got {h} x {w}")
    asked_N2 = as_counts(centers, name="centers").to(f_NHW)
    if centers.shape != (n, 2):
        raise ValueError(f"centers must be [N, 2] with N = {n} as in images, got {tuple(centers.shape)}")
    for name, value in (("background", background), ("amplitude", amplitude)):
        check_number(name, value)
    for name, value in (("tolerance", tolerance), ("min_height", min_height)):
        check_number(name, value, least=0)
    if amplitude == 0:
        raise ValueError("amplitude must not be 0: a bump without height can't be found")
    v_NHW = (f_NHW - background) / amplitude
    height_N, flat_N = v_NHW.flatten(1).max(dim=1)
    row_N, col_N = flat_N // w, flat_N % w
    index_N = torch.arange(n, device=f_NHW.device)
    x_N, sx_N = _log_parabola(v_NHW[index_N, row_N, :], col_N)
    y_N, sy_N = _log_parabola(v_NHW[index_N, :, col_N], row_N)
    peak_N2 = torch.stack([col_N, row_N], dim=1).to(f_NHW)
    distance_N = (peak_N2 - asked_N2).norm(dim=1)
    known_N = _finite(f_NHW) & asked_N2.isfinite().all(dim=1)
    return Bump(
        center=torch.where(known_N[:, None], torch.stack([x_N, y_N], dim=1), torch.nan),
        distance=torch.where(known_N, distance_N, torch.nan),
        height=torch.where(known_N, height_N, torch.nan),
        width=torch.where(known_N, (sx_N * sy_N).sqrt(), torch.nan),
        found=known_N & (distance_N <= tolerance) & (height_N >= min_height),
    )


def _log_parabola(profile_NL: Tensor, peak_N: Tensor) -> tuple[Tensor, Tensor]:
    """Return place and sigma of the Gaussian through the three samples around each peak."""
    length = profile_NL.shape[1]
    mid_N = peak_N.clamp(1, length - 2)
    log_N3 = profile_NL.gather(1, mid_N[:, None] + torch.arange(-1, 2, device=mid_N.device)).log()
    variance_N = 1 / (2 * log_N3[:, 1] - log_N3[:, 0] - log_N3[:, 2])
    place_N = mid_N + variance_N * (log_N3[:, 2] - log_N3[:, 0]) / 2
    good_N = variance_N.isfinite() & (variance_N > 0) & ((place_N - peak_N).abs() <= 1)
    sigma_N = torch.where(good_N, variance_N, torch.full_like(variance_N, math.nan)).sqrt()
    return torch.where(good_N, place_N, peak_N.to(profile_NL)), sigma_N


def metric_tensor(features: Tensor, *, spacing: float | tuple[float, float] = 1.0) -> Tensor:
    r"""Metric that a representation :math:`\phi(x, y)` induces on the plane of coordinates.

    .. math:: g_{ij} = \langle \partial_i \phi, \partial_j \phi \rangle, \qquad i, j \in \{x, y\},

    with central differences inside the grid and one-sided ones at its edge.

    Args:
        features: ``[Y, X, D]`` representation on a regular grid of coordinates, ``Y, X >= 2``. More
            trailing dimensions are flattened.
        spacing: distance of neighbouring grid points, one number or ``(along x, along y)``.

    Returns:
        ``[Y, X, 2, 2]``, symmetric, positive semi-definite; ``[..., 0, 0]`` is ``g_xx``.

    Raises:
        TypeError: if a tensor is not of real floating-point numbers.
        ValueError: if the grid has fewer than two points a side or the spacing is not positive.

    Example:
        >>> y, x = torch.meshgrid(torch.arange(3.0), torch.arange(4.0), indexing="ij")
        >>> metric_tensor(torch.stack([2 * x, 3 * y], dim=-1))[1, 1]
        tensor([[4., 0.],
                [0., 9.]])
    """
    phi_YXD = as_real(features, name="features")
    if features.ndim < 3 or features.shape[0] < 2 or features.shape[1] < 2 or not features.numel():
        raise ValueError(f"features must be [Y >= 2, X >= 2, D], got {tuple(features.shape)}")
    step_x, step_y = spacing if isinstance(spacing, tuple) else (spacing, spacing)
    for step in (step_x, step_y):
        check_number("spacing", step, above=0)
    phi_YXD = torch.where(phi_YXD.isfinite(), phi_YXD, torch.nan).flatten(2)
    (by_x_YXD,) = torch.gradient(phi_YXD, spacing=step_x, dim=1)
    (by_y_YXD,) = torch.gradient(phi_YXD, spacing=step_y, dim=0)
    jacobian_YX2D = torch.stack([by_x_YXD, by_y_YXD], dim=2)
    return jacobian_YX2D @ jacobian_YX2D.mT


def _as_metric(metric: Tensor) -> Tensor:
    real = as_real(metric, name="metric")
    if metric.shape[-2:] != (2, 2) or not metric.numel():
        raise ValueError(f"metric must be [..., 2, 2], see metric_tensor, got {tuple(metric.shape)}")
    return torch.where(real.isfinite(), real, torch.nan)  # an infinite entry has no ratio to others


def volume_element(metric: Tensor) -> Tensor:
    r"""Area that a unit square of coordinates takes up in the representation.

    .. math:: \sqrt{|\det g|}

    Args:
        metric: ``[..., 2, 2]``, see :func:`metric_tensor`.

    Returns:
        ``[...]`` in ``[0, inf)``; 0 where the representation is squashed to a line or a point.

    Raises:
        TypeError: if a tensor is not of real floating-point numbers.
        ValueError: if the last two dimensions are not ``2, 2``.
    """
    g = _as_metric(metric)
    return (g[..., 0, 0] * g[..., 1, 1] - g[..., 0, 1] * g[..., 1, 0]).abs().sqrt()


def factorisation(metric: Tensor) -> Tensor:
    r"""How separately a representation keeps its two coordinates.

    .. math:: 1 - \frac{\operatorname{mean} |g_{xy}|}{\operatorname{mean} (g_{xx} + g_{yy})}

    Args:
        metric: ``[..., 2, 2]``, see :func:`metric_tensor`.

    Returns:
        Scalar in ``[1/2, 1]``: 1 if moving along x and along y are everywhere orthogonal in the
        representation, 1/2 if they are the same move. NaN for a representation that ignores both, and
        where an entry is not finite.

    Raises:
        TypeError: if a tensor is not of real floating-point numbers.
        ValueError: if the last two dimensions are not ``2, 2``.
    """
    g = _as_metric(metric)
    if not g.isfinite().all():
        return nan_like(g)
    return 1 - g[..., 0, 1].abs().mean() / (g[..., 0, 0] + g[..., 1, 1]).mean()


def explained(images: Tensor, candidates: Tensor) -> Tensor:
    r"""Share of each image's energy that its candidate explains, at the best non-negative scale.

    .. math:: 1 - \min_{c \ge 0} \frac{\|f - c s\|^2}{\|f\|^2}
              = \frac{\max(0, \langle s, f\rangle)^2}{\|s\|^2 \|f\|^2}

    Args:
        images: ``[N, H, W]`` or ``[N, 1, H, W]``, background subtracted.
        candidates: same shape, background subtracted.

    Returns:
        ``[N]`` in ``[0, 1]``; 0 for a blank candidate, NaN for a blank image and where one is not
        finite.

    Raises:
        TypeError: if a tensor is not of real floating-point numbers.
        ValueError: if the shapes differ or are not images.
    """
    f_NHW, s_NHW = promoted(_as_images(images, name="images"), _as_images(candidates, name="candidates"))
    check_same_shape(f_NHW, s_NHW, names="images and candidates")
    known_N = _finite(f_NHW) & _finite(s_NHW)
    f_NP, s_NP = f_NHW.flatten(1), s_NHW.flatten(1)
    f_N, s_N = f_NP.square().sum(1), s_NP.square().sum(1)
    overlap_N = (f_NP * s_NP).sum(1).clamp_min(0).square()
    share_N = torch.where(s_N > 0, overlap_N / (s_N * f_N).clamp_min(torch.finfo(f_N.dtype).tiny), 0.0)
    return torch.where((f_N > 0) & known_N, share_N.clamp_max(1), torch.nan)


def superposition(images: Tensor, x_parts: Tensor, y_parts: Tensor, *, background: float = 0.0) -> Tensor:
    r"""Is ``f(x, y)`` the sum of ``f(x, mean y)`` and ``f(mean x, y)``?

    Args:
        images: ``f(x, y)``, ``[N, H, W]`` or ``[N, 1, H, W]``.
        x_parts: ``f(x, mean y)``, the images at the mean code of y, same shape.
        y_parts: ``f(mean x, y)``, same shape.
        background: value of the blank image, subtracted from each.

    Returns:
        ``[N]`` in ``[0, 1]``, the share of the image's energy that the sum explains at the best scale
        (:func:`explained`); a generator that composes by a product scores low. NaN for a blank image.

    Raises:
        TypeError: if a tensor is not of real floating-point numbers.
        ValueError: if the shapes differ or are not images.
    """
    f_NHW, x_NHW, y_NHW = promoted(
        _as_images(images, name="images"),
        _as_images(x_parts, name="x_parts"),
        _as_images(y_parts, name="y_parts"),
    )
    check_same_shape(x_NHW, y_NHW, names="x_parts and y_parts")
    check_same_shape(f_NHW, x_NHW, names="images and x_parts")
    check_number("background", background)
    return explained(f_NHW - background, (x_NHW - background) + (y_NHW - background))


def outer_product_rank(images: Tensor, *, background: float = 0.0) -> Tensor:
    r"""Stable rank of each image: of how many row-times-column products is it made?

    .. math:: \sum_k \sigma_k^2 / \sigma_1^2

    with the singular values of the image less its background.

    Args:
        images: ``[N, H, W]`` or ``[N, 1, H, W]``.
        background: value of the blank image.

    Returns:
        ``[N]`` in ``[1, min(H, W)]``; a Gaussian bump has 1, a blank image 0, one that is not finite
        NaN.

    Raises:
        TypeError: if a tensor is not of real floating-point numbers.
        ValueError: if the shape is not that of images.
    """
    f_NHW = _as_images(images, name="images") - background
    check_number("background", background)
    known_N = _finite(f_NHW)
    sigma_NK = torch.linalg.svdvals(f_NHW.where(known_N[:, None, None], 0.0))  # which raises on NaN
    top_N = sigma_NK[:, 0]
    ratio_N = (sigma_NK / top_N.clamp_min(torch.finfo(top_N.dtype).tiny)[:, None]).square().sum(1)
    return torch.where(known_N, torch.where(top_N > 0, ratio_N, torch.zeros_like(top_N)), torch.nan)


def memorisation(
    images: Tensor, training: Tensor, *, background: float = 0.0, rcond: float = 1e-3
) -> Memorisation:
    r"""Are images put together from training images, or multiplied from factors?

    *superposition* is the energy share :math:`\|P f\|^2 / \|f\|^2` of the projection on the span of
    the training images; *product* is :math:`\sigma_1^2 / \sum_k \sigma_k^2`, that of the best
    product of a row and a column profile. Out of distribution, a model that overlays what it has
    memorised scores high on the first and low on the second; one that composes the other way round.

    The first says something only where the training images do not span the hold-out: a square left
    out of the middle, not single centres left out at random.

    Args:
        images: what was drawn, ``[N, H, W]`` or ``[N, 1, H, W]``.
        training: training images, ``[S, H, W]`` or ``[S, 1, H, W]``.
        background: value of the blank image, subtracted from each.
        rcond: directions of the training images' span with a singular value below this share of the
            largest are left out.

    Returns:
        :class:`Memorisation`, both ``[N]`` in ``[0, 1]``; NaN for a blank image and one that is not
        finite; the superposition is NaN for all if a training image is not finite.

    Raises:
        TypeError: if a tensor is not of real floating-point numbers.
        ValueError: if the shapes don't fit each other or ``rcond`` is not in ``(0, 1)``.
    """
    f_NHW, t_SHW = promoted(_as_images(images, name="images"), _as_images(training, name="training"))
    check_number("background", background)
    f_NHW, t_SHW = f_NHW - background, t_SHW.to(f_NHW) - background
    if f_NHW.shape[1:] != t_SHW.shape[1:]:
        raise ValueError(
            f"images and training must have one size, got {tuple(f_NHW.shape[1:])} and "
            f"{tuple(t_SHW.shape[1:])}"
        )
    if not 0 < rcond < 1:
        raise ValueError(f"rcond must be in (0, 1), got {rcond}")
    known_N, known_S = _finite(f_NHW), _finite(t_SHW).all()
    f_NHW = f_NHW.where(known_N[:, None, None], 0.0)  # a decomposition raises on what is not finite
    t_SHW = t_SHW if known_S else torch.zeros_like(t_SHW)
    energy_N = f_NHW.square().sum(dim=(1, 2))
    _, sigma_K, basis_KP = torch.linalg.svd(t_SHW.flatten(1), full_matrices=False)
    basis_KP = basis_KP[sigma_K > rcond * sigma_K[0]]
    inside_N = (f_NHW.flatten(1) @ basis_KP.T).square().sum(1)
    product_N = torch.linalg.svdvals(f_NHW)[:, 0].square()
    there_N = known_N & (energy_N > 0)
    return Memorisation(
        superposition=torch.where(there_N & known_S, (inside_N / energy_N).clamp_max(1), torch.nan),
        product=torch.where(there_N, (product_N / energy_N).clamp_max(1), torch.nan),
    )


def linear_readout(
    features: Tensor,
    coordinates: Tensor,
    *,
    test_features: Tensor | None = None,
    test_coordinates: Tensor | None = None,
    ridge: float = 1e-6,
) -> Tensor:
    r"""Coefficient of determination of x and of y read linearly from a representation.

    An affine map fitted by ridge regression; then :math:`R^2 = 1 - \sum (c - \hat c)^2 / \sum (c -
    \bar c)^2` on the test set. Without one it is that of the fit itself, as the paper reports it,
    which is 1 whenever there are more features than samples.

    Args:
        features: ``[N, D]`` to fit on; more trailing dimensions are flattened.
        coordinates: ``[N, 2]``.
        test_features: ``[M, D]`` to score on.
        test_coordinates: ``[M, 2]``.
        ridge: penalty, as a share of the mean squared (centred) feature norm.

    Returns:
        ``[2]`` (x, y) in ``(-inf, 1]``; NaN for a coordinate that doesn't vary in the test set, and 0 or
        less for features that don't vary. NaN for input that is not finite.

    Raises:
        TypeError: if a tensor is not of real floating-point numbers.
        ValueError: if shapes don't fit each other, one of the test tensors is missing, or ``ridge`` is not
            positive.
    """
    if (test_features is None) != (test_coordinates is None):
        raise ValueError("test_features and test_coordinates must be given together")
    check_number("ridge", ridge, above=0)
    x_ND, c_N2 = _as_pairs(features, coordinates, name="features")
    if test_features is None or test_coordinates is None:
        x_MD, c_M2 = x_ND, c_N2
    else:
        x_MD, c_M2 = _as_pairs(test_features, test_coordinates, name="test_features")
    if x_MD.shape[1] != x_ND.shape[1]:
        raise ValueError(
            f"test_features must have as many features as features, got {x_MD.shape[1]} and {x_ND.shape[1]}"
        )
    if not all(bool(known.isfinite().all()) for known in (x_ND, c_N2, x_MD, c_M2)):
        return as_real(features, name="features").new_full((2,), torch.nan)
    mean_D, mean_2 = x_ND.mean(0), c_N2.mean(0)
    a_ND, b_N2 = x_ND - mean_D, c_N2 - mean_2
    n, d = a_ND.shape
    penalty = ridge * a_ND.square().sum() / n + torch.finfo(a_ND.dtype).tiny
    if d <= n:  # the smaller of the two Gram matrices, in float64 where squaring costs no accuracy
        gram_DD = a_ND.T @ a_ND + penalty * torch.eye(d, dtype=a_ND.dtype, device=a_ND.device)
        weight_D2 = torch.linalg.solve(gram_DD, a_ND.T @ b_N2)
    else:
        gram_NN = a_ND @ a_ND.T + penalty * torch.eye(n, dtype=a_ND.dtype, device=a_ND.device)
        weight_D2 = a_ND.T @ torch.linalg.solve(gram_NN, b_N2)
    residual_2 = ((x_MD - mean_D) @ weight_D2 + mean_2 - c_M2).square().sum(0)
    total_2 = (c_M2 - c_M2.mean(0)).square().sum(0)
    return torch.where(total_2 > 0, 1 - residual_2 / total_2, torch.full_like(total_2, math.nan)).to(
        as_real(features, name="features").dtype
    )


def _as_pairs(features: Tensor, coordinates: Tensor, *, name: str) -> tuple[Tensor, Tensor]:
    x_ND = as_real(features, name=name).double()
    c_N2 = as_counts(coordinates, name=name.replace("features", "coordinates")).to(features.device)
    if (
        features.ndim < 2
        or features.shape[0] < 2
        or not features.numel()
        or coordinates.shape != (features.shape[0], 2)
    ):
        raise ValueError(
            f"{name} must be [N >= 2, D] and its coordinates [N, 2], got {tuple(features.shape)} and "
            f"{tuple(coordinates.shape)}"
        )
    return x_ND.flatten(1), c_N2
