"""Pictures of what a generator draws: images, where it errs, where it puts things.

Shape letters: N images, H rows, W columns, Y and X grid of coordinates.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from lightning_sym._extras import need

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def _figure(width: float, height: float) -> Figure:
    need("matplotlib", what="A figure")
    from matplotlib.figure import Figure  # not pyplot: no global state, no window

    return Figure(figsize=(width, height), layout="constrained")


def image_pairs(images: Tensor, targets: Tensor, centers: Tensor) -> Figure:
    """Draw images (upper row) over what they should be (lower row), with a cross where a bump belongs.

    Args:
        images: ``[N, H, W]``.
        targets: ``[N, H, W]``.
        centers: ``[N, 2]``, ``(x, y)``.

    Returns:
        A matplotlib figure of ``2 x N`` panels on one grey scale, that of the targets.
    """
    n = len(images)
    figure = _figure(1.1 * n, 2.4)
    axes: Any = figure.subplots(2, n, squeeze=False)
    low, high = float(targets.min()), float(targets.max())
    for row, pictures in enumerate((images, targets)):
        for axis, picture, (x, y) in zip(axes[row], pictures, centers.tolist(), strict=True):
            axis.imshow(picture.cpu().numpy(), cmap="gray", vmin=low, vmax=high, origin="lower")
            axis.plot(x, y, "+", color="tab:red", markersize=5, markeredgewidth=0.8)
            axis.set_xticks([])
            axis.set_yticks([])
        axes[row, 0].set_ylabel(("drawn", "asked for")[row], fontsize=8)
    return figure


def error_map(error: Tensor, held_out: Tensor, x: Tensor, y: Tensor) -> Figure:
    """Draw the error relative to a blank image over the plane of coordinates.

    Args:
        error: ``[Y, X]``.
        held_out: ``[Y, X]`` booleans; these points get a dot.
        x: ``[X]`` coordinates.
        y: ``[Y]`` coordinates.

    Returns:
        A matplotlib figure; colours are logarithmic from 1e-4 to 1.
    """
    need("matplotlib", what="A figure")
    from matplotlib.colors import LogNorm

    figure = _figure(4.2, 3.4)
    axis = figure.subplots()
    mesh = axis.pcolormesh(
        x.cpu().numpy(),
        y.cpu().numpy(),
        error.clamp_min(1e-12).cpu().numpy(),
        norm=LogNorm(1e-4, 1.0),
        cmap="viridis",
        shading="nearest",
    )
    rows, columns = held_out.cpu().nonzero(as_tuple=True)
    axis.plot(x.cpu()[columns], y.cpu()[rows], ".", color="white", markersize=2, label="held out")
    figure.colorbar(mesh, ax=axis, label="squared error / that of a blank image")
    axis.set(xlabel="x asked for", ylabel="y asked for", aspect="equal")
    return figure


def coordinate_grid(places: Tensor, found: Tensor, held_out: Tensor) -> Figure:
    """Draw the grid of coordinates where the generator puts it: straight lines if it composes.

    Args:
        places: ``[Y, X, 2]`` where the bump asked for at each grid point is.
        found: ``[Y, X]`` booleans; lines break where there is none.
        held_out: ``[Y, X]`` booleans; drawn in another colour.

    Returns:
        A matplotlib figure.
    """
    figure = _figure(3.6, 3.6)
    axis = figure.subplots()
    shown = places.where(found[..., None], float("nan")).cpu()
    for lines in (shown, shown.transpose(0, 1)):
        for line in lines:
            axis.plot(line[:, 0], line[:, 1], color="0.6", linewidth=0.7)
    for mask, colour, name in ((~held_out, "tab:blue", "trained on"), (held_out, "tab:red", "held out")):
        points = shown[mask.cpu()]
        axis.plot(points[:, 0], points[:, 1], ".", color=colour, markersize=4, label=name)
    axis.legend(fontsize=7, loc="upper right")
    axis.set(xlabel="x found", ylabel="y found", aspect="equal")
    return figure
