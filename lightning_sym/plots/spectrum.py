"""Spectra: how the eigenvalues of each layer fall off.

Shape letters: D eigenvalues.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_sym._extras import need
from lightning_sym.plots.readings import layer_colours, layer_legend, layer_styles

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def spectrum(
    eigenvalues: Tensor | Mapping[str, Tensor],
    *,
    relative: bool = True,
    floor: float = 1e-12,
    power: float | None = None,
) -> Figure:
    """Draw eigenvalue spectra on logarithmic axes, largest first.

    A power law is a straight line here, a collapse a cliff.

    Args:
        eigenvalues: ``[D]``, any order, or one such vector a layer. What is not finite and positive is
            not drawn; each label tells how many are of how many, where some are not.
        relative: divide each spectrum by its largest eigenvalue.
        floor: eigenvalues below this share of the largest are not drawn: rounding.
        power: exponent of a grey guide line ``rank ** power`` to compare slopes with.

    Returns:
        A matplotlib figure.

    Raises:
        ValueError: if there is no positive eigenvalue to draw or ``floor`` is negative.
    """
    need("matplotlib", what="A figure")
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    if not floor >= 0:
        raise ValueError(f"floor must be at least 0, got {floor}")
    spectra = eigenvalues if isinstance(eigenvalues, Mapping) else {"": eigenvalues}
    drawn: dict[str, Tensor] = {}
    labels: dict[str, str] = {}
    for name, values_D in spectra.items():
        kept_D = values_D.detach().flatten().double().cpu()
        kept_D = kept_D[kept_D.isfinite() & (kept_D > 0)].sort(descending=True).values
        kept_D = kept_D[kept_D >= floor * kept_D[:1]]
        if len(kept_D):
            drawn[name] = kept_D / kept_D[0] if relative else kept_D
            labels[name] = (
                name if len(kept_D) == values_D.numel() else f"{name} ({len(kept_D)} of {values_D.numel()})"
            )
    if not drawn:
        raise ValueError(f"eigenvalues hold nothing positive to draw, in {len(spectra)} spectra")
    figure = Figure(figsize=(5.2, 3.2), layout="constrained")
    axis = figure.subplots()
    colours, styles = layer_colours(drawn), layer_styles(drawn)
    for name, kept_D in drawn.items():
        ranks = range(1, len(kept_D) + 1)
        axis.plot(
            ranks,
            kept_D.tolist(),
            color=colours[name],
            linestyle=styles[name],
            linewidth=1.2,
            marker="." if len(kept_D) <= 12 else None,
        )
    more: list[Any] = []
    if power is not None:
        longest, top = max(len(d) for d in drawn.values()), max(float(d[0]) for d in drawn.values())
        ranks_D = torch.arange(1, longest + 1, dtype=torch.float64)
        guide: dict[str, Any] = {"color": "0.5", "linestyle": ":", "linewidth": 1.0}
        axis.plot(ranks_D.tolist(), (top * ranks_D**power).tolist(), **guide)
        more.append(Line2D([], [], label=f"rank ** {power:g}", **guide))
    axis.set(xscale="log", yscale="log", xlabel="rank")
    axis.set_ylabel("eigenvalue / largest" if relative else "eigenvalue")
    axis.grid(visible=True, color="0.92", linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    named = {labels[name].strip(): colours[name] for name in drawn if labels[name]}
    if named or more:
        layer_legend(figure, named, more=more)
    return figure
