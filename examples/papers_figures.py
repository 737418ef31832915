"""One picture a paper for its page, drawn from the results of this repository.

Nothing is trained.

    python examples/papers_figures.py --out docs/papers/figures
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

from _report import REPOSITORY

Stored = dict[str, Any]


def stripes(stored: Stored, draw: Callable[..., Any]) -> Any:
    """Draw images needed; None in the file is more than were tried."""
    counts = {
        arm: {int(n): [math.inf if c is None else c for c in each] for n, each in by_size.items()}
        for arm, by_size in stored["summary"]["needed"].items()
    }
    return draw(stored["runs"], counts, stored["config"]["threshold"])


def staircases(stored: Stored, draw: Callable[..., Any]) -> Any:
    """Draw modes learned over steps, a panel a loss and a line a seed; the file keeps no curves."""
    from matplotlib.figure import Figure

    losses = list(dict.fromkeys(run["loss"] for run in stored["runs"]))
    figure = Figure(figsize=(2.8 * len(losses), 3), layout="constrained")
    panels = figure.subplots(1, len(losses), sharex=True, sharey=True, squeeze=False)[0]
    last = stored["config"]["steps"]
    for axis, loss in zip(panels, losses, strict=True):
        for run in stored["runs"]:
            if run["loss"] == loss:
                dates = sorted(run["dates"][mode - 1] for mode in run["grown"])
                counts = [*range(len(dates) + 1), len(dates)]
                axis.step([1, *dates, last], counts, where="post", label=f"seed {run['seed']}")
        axis.set(title=loss.replace("_", " "), xlabel="step", xscale="log")
    panels[0].set_ylabel("modes past half of their final size")
    panels[0].legend(fontsize=7)
    return figure


def options(stored: Stored) -> Namespace:
    """Return what the script was called with."""
    return Namespace(**stored["config"])


#: For each picture the script that draws it, its result, and what is handed to its ``draw``.
FIGURES: dict[str, tuple[str, str, Callable[[Stored, Callable[..., Any]], Any]]] = {
    "alignment": ("canonical_representation", "canonical_representation", lambda s, draw: draw(s["results"])),
    "composition": ("stripes_vs_bumps", "stripes_vs_bumps", stripes),
    "feature_learning": (
        "feature_mechanisms",
        "feature_mechanisms",
        lambda s, draw: draw(s["solved"], s["relu"]),
    ),
    "hierarchy": ("loss_staircase", "loss_staircase", lambda s, draw: draw(s["runs"])),
    "law_of_balance": ("law_of_balance", "law_of_balance", lambda s, draw: draw(s["arms"])),
    "learning_circuit": (
        "self_assembly_random",
        "self_assembly_random_digits",
        lambda s, draw: draw(s["cells"], options(s)),
    ),
    "mirror_symmetry": (
        "mirror_symmetry",
        "mirror_symmetry_digits",
        lambda s, draw: draw(s["constraints"], s["noise_alone"], options(s)),
    ),
    "noise_equilibrium": (
        "noise_and_scale",
        "noise_and_scale",
        lambda s, draw: draw(s["norms"], s["sharpness"]),
    ),
    "representation_normalisation": (
        "representation_normalisation",
        "representation_normalisation",
        lambda s, draw: draw(s["results"]),
    ),
    "stepwise_ssl": ("stepwise_resnet", "stepwise_resnet", staircases),
    "syre": (
        "plasticity_random_labels",
        "plasticity_random_labels_mnist",
        lambda s, draw: draw(s["cells"], s["best"]),
    ),
    "weight_matching": (
        "weight_matching",
        "weight_matching",
        lambda s, draw: draw(s["pairs"], points=s["config"]["points"]),
    ),
}


def main() -> None:
    """Draw all, or the named ones."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--results", type=Path, default=REPOSITORY / "docs" / "results")
    parser.add_argument("--out", type=Path, default=Path("runs/papers_figures"))
    parser.add_argument("--only", nargs="+", choices=FIGURES, default=list(FIGURES))
    chosen = parser.parse_args()
    chosen.out.mkdir(parents=True, exist_ok=True)
    for name in chosen.only:
        script, result, drawn = FIGURES[name]
        stored = json.loads((chosen.results / f"{result}.json").read_text())
        figure = drawn(stored, importlib.import_module(script).draw)
        figure.savefig(chosen.out / f"{name}.png", dpi=90)
        print(f"{name}.png: {script}.py, {result}.json")


if __name__ == "__main__":
    main()
