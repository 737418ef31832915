"""Syre, 2408.15495, and mirror symmetry, 2309.16932."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from _report import spread

from _claims.claim import Claim, Numbers, grades, middle


def vae(arm: str) -> Callable[[dict[str, Any]], Numbers]:
    """Read active latents at decay .1, and plain decay's beside."""
    return lambda s: {
        f"{what}, {name}": s["results"][f"beta 1 {key} 0.1"][what]
        for what in ("active", "error")
        for name, key in ((arm, arm), ("decay", "decay"), ("towards the start", "init"))
    }


def tuned(stored: dict[str, Any]) -> Numbers:
    """Read accuracy, rank and dormant units of every kind of decay at its best."""
    found: Numbers = {}
    for kind, row in stored["best"].items():
        for key in ("accuracy", "rank", "dormant"):
            found[f"{key}, {kind}"] = stored["cells"][row["cell"]][key]
        found[f"points over decay, {kind}"] = spread(row["points_over_decay"])
    return found


def wins(ours: Numbers) -> str:
    """Judge whether decay towards a random point beats plain decay in every seed, and by five points."""
    gained = [cell for key, cell in ours.items() if key.startswith("points over decay, syre")]
    ahead = max(c["low"] for c in gained) > 0
    return grades(ahead and max(middle(c) for c in gained) > 5, ahead)


SYRE = [
    Claim(
        "2408.15495",
        "a network that begins with identical neurons escapes by syre alone",
        "teacher and student, 10 seeds: error",
        "escapes",
        "escape_the_trap",
        lambda s: {arm: s["results"][arm]["error"] for arm in ("decay", "offset", "syre")},
        lambda o: grades(
            middle(o["syre"]) < 0.2 * min(middle(o["decay"]), middle(o["offset"])),
            middle(o["syre"]) < middle(o["decay"]),
        ),
    ),
    Claim(
        "2408.15495",
        "syre prevents posterior collapse (sigma .1 of the initial scale)",
        "VAE on digits, beta 1, decay .1: latents in use of 16",
        "27 to 190 (rank)",
        "collapse_vae",
        vae("syre"),
        lambda o: grades(
            middle(o["active, syre"]) >= 5, middle(o["active, syre"]) > middle(o["active, decay"])
        ),
        cause="too small a sigma: .5 keeps seven (next row). The rank alone deceives: theta_0 has full rank",
    ),
    Claim(
        "2408.15495",
        "the same, sigma .5",
        "VAE on digits, beta 1, decay .1: latents in use of 16",
        "27 to 190 (rank)",
        "collapse_vae",
        vae("large"),
        lambda o: grades(
            middle(o["active, large"]) >= 5 and middle(o["error, large"]) < 0.8 * middle(o["error, decay"]),
            middle(o["active, large"]) > middle(o["active, decay"]),
        ),
        note="decay towards the start does as well: what helps is not to decay to zero",
    ),
    Claim(
        "2408.15495",
        "syre keeps plasticity where tuned decay does not: random labels",
        "800 MNIST images, 64 components, 12 tasks of 400 Adam steps, every decay at its best",
        "near full rank; vanilla collapses",
        "plasticity_random_labels_mnist",
        tuned,
        wins,
        cause="at its own best strength plain decay keeps plasticity too; syre is a point ahead, and decay "
        "towards the start nearly as much",
        note="decay .01 was added to the grid when .003 had come out best for all; it is syre's best and the "
        "grid's edge, and plain decay has lost rank and units there",
    ),
    Claim(
        "2408.15495",
        "the same, on a convolutional network",
        "300 MNIST images at half their side, two convolutions, 8 tasks of 300 Adam steps, each decay at its "
        "best",
        "near full rank; vanilla collapses",
        "plasticity_convolutional_mnist",
        tuned,
        wins,
        cause="not established",
    ),
]


def ranks(name: str) -> Callable[[dict[str, Any]], Numbers]:
    """Read the rank at the smallest learning rate and at the largest that did not diverge."""

    def read(stored: dict[str, Any]) -> Numbers:
        cells = {
            f"lr {rate:g}": stored["noise_alone"][f"{name}, lr {rate:g}"]
            for rate in stored["config"]["rates"]
        }
        kept = {key: cell["rank"] for key, cell in cells.items() if "rank" in cell}
        return {key: kept[key] for key in (next(iter(kept)), list(kept)[-1])}

    return read


MIRROR = [
    Claim(
        "2309.16932",
        f"a mirror symmetry and decay make the constraint: {name}",
        "first layer of an MLP on digits, decay 1e-2: share that is gone, accuracy, pruned alike",
        "exact zeros, low rank, equal units",
        "mirror_symmetry_digits",
        lambda s, kind=kind: (
            {key: s["constraints"][f"{kind}, decay 0.01"][key] for key in ("gone", "accuracy", "pruned")}
            | {"plain accuracy": s["constraints"]["plain, decay 0.01"]["accuracy"]}
        ),
        lambda o: grades(
            middle(o["gone"]) > 0.3 and middle(o["accuracy"]) > middle(o["plain accuracy"]) - 0.03,
            middle(o["gone"]) > 0.05,
        ),
        cause="not established",
    )
    for kind, name in (
        ("sparse", "zeros"),
        ("group", "zero units"),
        ("low_rank", "low rank"),
        ("equal", "equal units"),
    )
] + [
    Claim(
        "2309.16932",
        "gradient noise alone collapses a network",
        "two linear layers of 8, decay 0, batch size 1: rank of the product over learning rates",
        "rank falls",
        "mirror_symmetry_digits",
        ranks("plain"),
        lambda o: grades(
            *(list(o.values())[-1]["high"] < next(iter(o.values()))["low"] - by for by in (2, 0.5))
        ),
        cause="one mode of eight is lost before the learning rate is too large for the rest",
    ),
    Claim(
        "2309.16932",
        "a residual network keeps full rank",
        "the same, (1 + U)(1 + W)",
        "always full",
        "mirror_symmetry_digits",
        ranks("residual"),
        lambda o: grades(
            *(list(o.values())[-1]["low"] > next(iter(o.values()))["high"] - by for by in (0.1, 0.5))
        ),
        cause="without decay a shift of the weights moves the mirror and does not remove it: the ranks are "
        "those of the plain network, run for run",
    ),
]
