"""Units of a layer: which are copies of one another, and which do nothing.

Shape letters: U units.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_sym.functional.units import dormant_scores, unit_groups
from lightning_sym.plots.readings import layer_colours, layer_legend

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def unit_similarity(
    weight: Tensor, bias: Tensor | None = None, *, tolerance: float = 1e-2, most: int = 512
) -> Figure:
    """Draw the cosines between the incoming weights of all units, copies side by side.

    Groups of equal units (:func:`~lightning_sym.functional.unit_groups`) come first, the largest
    first, so that copies are blocks on the diagonal and a layer without copies is a thin line.

    Args:
        weight: ``[U, ...]``, a unit's incoming weights along the rest.
        bias: ``[U]``, or ``None``.
        tolerance: ``1 - cosine`` up to which units are the same.
        most: units drawn; of wider layers the first ones after sorting.

    Returns:
        A matplotlib figure.

    Raises:
        ValueError: if shapes do not fit, ``tolerance`` is out of range or weights are not finite.
    """
    from matplotlib.figure import Figure

    groups_U = unit_groups(weight, bias, tolerance=tolerance).cpu()
    w_UI = weight.detach().double().flatten(1).cpu()
    if bias is not None:
        w_UI = torch.cat([w_UI, bias.detach().double().cpu()[:, None]], dim=1)
    sizes_U = groups_U.bincount()[groups_U]
    # By size, then by group: two stable sorts, the last one is the first key.
    order_U = groups_U.argsort(stable=True)
    order_U = order_U[sizes_U[order_U].argsort(descending=True, stable=True)]
    unit_UI = torch.nn.functional.normalize(w_UI[order_U[:most]], dim=1)
    figure = Figure(figsize=(4.2, 3.5), layout="constrained")
    axis = figure.subplots()
    image = axis.imshow(
        (unit_UI @ unit_UI.mT).numpy(), vmin=-1, vmax=1, cmap="RdBu_r", interpolation="nearest"
    )
    figure.colorbar(image, ax=axis, label="cosine of incoming weights")
    distinct = len(groups_U.unique())
    shown = "" if len(order_U) <= most else f", the first {most} shown"
    axis.set_title(f"{distinct} distinct of {len(groups_U)} units{shown}", fontsize=9)
    axis.set(xlabel="unit, copies side by side", ylabel="unit")
    return figure


def unit_activity(mean_abs: Tensor | Mapping[str, Tensor], *, threshold: float = 0.025) -> Figure:
    """Draw the activity scores of each layer's units, the most active first.

    Args:
        mean_abs: mean absolute activation of each unit ``[U]``, or one such vector a layer.
        threshold: score up to which a unit is dormant
            (:func:`~lightning_sym.functional.dormant_scores`); drawn as a line.

    Returns:
        A matplotlib figure. Units that are exactly zero lie on its lower edge.

    Raises:
        ValueError: if a vector is empty, negative or not finite, or there is none.
    """
    from matplotlib.figure import Figure

    layers = mean_abs if isinstance(mean_abs, Mapping) else {"": mean_abs}
    if not layers:
        raise ValueError("mean_abs must hold at least one layer")
    scores = {}
    for name, values_U in layers.items():
        if not (values_U.isfinite().all() and (values_U >= 0).all()):
            raise ValueError(f"mean_abs of {name or 'the layer'} must be finite and not negative")
        scores[name] = dormant_scores(values_U.detach().double().cpu()).sort(descending=True).values
    positive = [float(score_U[score_U > 0].min()) for score_U in scores.values() if (score_U > 0).any()]
    edge = min([*positive, threshold or 1.0]) / 2
    figure = Figure(figsize=(5.2, 3.2), layout="constrained")
    axis = figure.subplots()
    colours = layer_colours(scores)
    labels = {}
    for name, score_U in scores.items():
        dormant = int((score_U <= threshold).sum())
        labels[name] = (
            f"{name} ({dormant} of {len(score_U)})" if name else f"{dormant} of {len(score_U)} dormant"
        )
        share = [i / max(len(score_U) - 1, 1) for i in range(len(score_U))]
        axis.plot(share, score_U.clamp_min(edge).tolist(), color=colours[name], linewidth=1.3)
    if threshold > 0:
        axis.axhline(threshold, color="0.4", linestyle=":", linewidth=1)
    axis.set(yscale="log", xlabel="share of units, most active first", ylabel="activity / layer's mean")
    axis.set_ylim(bottom=edge)
    axis.grid(visible=True, color="0.92", linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    layer_legend(figure, {labels[name]: colours[name] for name in scores}, title="dormant units")
    return figure
