"""The staircase: eigenvalues of an embedding rising one after the other.

Shape letters: T readings, J modes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from lightning_sym._extras import need

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def staircase(
    steps: Tensor,
    *,
    eigenvalues: Tensor,
    dates: Tensor | None = None,
    predicted: Tensor | None = None,
    title: str = "",
) -> Figure:
    """Return a figure of eigenvalues over optimizer steps, which run logarithmically.

    Args:
        steps: optimizer steps of the readings, positive, ``[T]``.
        eigenvalues: ``[T, J]``, a line a mode; values that are not positive are left out of the
            logarithmic panel.
        dates: step at which each mode is learned ``[J]``, drawn as ticks; infinite ones are not drawn.
        predicted: eigenvalues theory predicts at the same steps, ``[T, any]``, drawn as circles.
        title: of the figure.

    Returns:
        A matplotlib figure: eigenvalues above, their logarithms below.
    """
    need("matplotlib", what="A figure")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 6), layout="constrained")
    panels = figure.subplots(2, 1, sharex=True)
    t = steps.double().numpy()
    for k, axes in enumerate(panels):
        values = eigenvalues.double().clone()
        if k == 1:
            values[values <= 0] = float("nan")
            axes.set_yscale("log")
        for j in range(values.shape[1]):
            axes.plot(t, values[:, j].numpy(), color=f"C{j % 10}", linewidth=1.3)
            if predicted is not None and j < predicted.shape[1]:
                expected = predicted[:, j].double().numpy()
                axes.plot(t, expected, "o", color=f"C{j % 10}", markersize=3, markerfacecolor="none")
            if dates is not None and dates[j].isfinite():
                axes.axvline(float(dates[j]), color=f"C{j % 10}", linewidth=0.6, linestyle=":")
        axes.set_xscale("log")
    panels[0].set_ylabel("eigenvalues")
    panels[1].set_ylabel("eigenvalues (log)")
    panels[1].set_xlabel("optimizer steps")
    if predicted is not None:
        title = f"{title} (circles: theory)".strip()
    if title:
        panels[0].set_title(title, fontsize=9)
    return figure
