"""Hierarchies from symmetry breaking, 2502.05300."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from _claims.claim import Claim, Numbers, grades, middle


def units(decay: str) -> Callable[[dict[str, Any]], Numbers]:
    """Read units in use over widths."""
    return lambda s: {f"width {w}": s["rows"][f"{w}, {decay}"]["units"] for w in (16, 48, 144)}


def trained_on(decay: str) -> Callable[[dict[str, Any]], Numbers]:
    """Read units in use as training goes on; without a step, those at the end."""

    def read(stored: dict[str, Any]) -> Numbers:
        rows = {width: stored["rows"][f"{width}, {decay}"] for width in (16, 144)}
        *early, last = rows[16]
        found = {
            f"width {width}, {step} steps": row[step]["units"]
            for step in early
            for width, row in rows.items()
        }
        return found | {f"width {width}": row[last]["units"] for width, row in rows.items()}

    return read


def bounded(ours: Numbers) -> str:
    """Judge whether the widest network uses about as many units as the narrowest."""
    narrow, wide = middle(ours["width 16"]), middle(ours["width 144"])
    return grades(wide < 1.3 * narrow, wide < 0.5 * 144)


def lag(stored: dict[str, Any]) -> Numbers:
    """Read how long after their release the loss halves."""
    rows = {k: v for k, v in stored["results"].items() if k.startswith("all zero, released")}
    found: Numbers = {k.split(", ")[1]: v["steps_until_halved"] for k, v in rows.items()}
    found["never released: seeds whose loss halves"] = stored["results"]["all zero, never released"]["halved"]
    return found


def alike(arm: str) -> Callable[[dict[str, Any]], Numbers]:
    """Read alignment of networks trained apart."""
    return lambda s: {
        f"{place} {when}": s["summary"][arm][f"{place}_{when}"]
        for place in ("same", "across")
        for when in ("start", "end", "cooled")
    }


HIERARCHY = [
    Claim(
        "2502.05300",
        "the loss drops where symmetries break",
        "ReLU student, 5 initial scales, 10 fresh seeds, definitions frozen",
        "dotted lines at drops",
        "loss_staircase",
        lambda s: {key: s["all"][key] for key in ("drops", "met", "by_chance", "p")},
        lambda o: grades(o["p"] < 0.01, o["met"] > o["by_chance"]),
    ),
    Claim(
        "2502.05300",
        "the breaking is the cause of the drop",
        "units held on the mirror and released at three times",
        "theory",
        "staircase_intervention",
        lag,
        lambda o: grades(
            o["never released: seeds whose loss halves"] == 0
            and max(c["high"] for c in list(o.values())[:-1])
            < 2 * min(c["low"] for c in list(o.values())[:-1]),
            o["never released: seeds whose loss halves"] == 0,
        ),
    ),
    Claim(
        "2502.05300",
        "with the symmetries removed a network leaves the mirror by itself",
        "all units at zero, decay 1e-3: towards zero, towards random points of two sizes",
        "theory",
        "staircase_intervention",
        lambda s: (
            {
                name: s["results"][f"all zero, {name}"]["halved"]
                for name in ("decay", "removed, sigma 0.01", "removed, sigma 1")
            }
            | {"of": s["results"]["all zero, decay"]["of"]}
        ),
        lambda o: grades(
            o["decay"] == 0 and o["removed, sigma 0.01"] == o["of"], o["removed, sigma 1"] > o["decay"]
        ),
    ),
    Claim(
        "2502.05300",
        "with the symmetries removed the steps of the loss go",
        "small start, decay 1e-3, sigma 1: drops in a run",
        "implied",
        "staircase_intervention",
        lambda s: {
            "drops": s["results"]["small start"]["drops"],
            "drops, removed": s["results"]["small start, removed, decay 0.001, sigma 1"]["drops"],
            "loss at the end": s["results"]["small start"]["end"],
            "loss, removed": s["results"]["small start, removed, decay 0.001, sigma 1"]["end"],
        },
        lambda o: grades(
            middle(o["drops, removed"]) < 0.5, o["drops, removed"]["mean"] < 0.8 * o["drops"]["mean"]
        ),
        cause="small weights grow faster than decay moves them: the first drop stays where it was, and what "
        "goes is the last plateau",
    ),
    *(
        Claim(
            "2502.05300",
            claim,
            "ReLU student, widths 16, 48, 144, after 6,000 steps",
            "bounded",
            "effective_units",
            units(decay),
            bounded,
            cause="training has not ended after 6,000 steps: trained on, wide networks go on losing units "
            "(rows below)",
        )
        for claim, decay in (
            ("units in use stay bounded as the width grows, decay 0.1", "0.1"),
            ("the same, decay 0.01", "0.01"),
        )
    ),
    *(
        Claim(
            "2502.05300",
            f"the same, trained on, decay {decay}",
            "the same networks, widths 16 and 144, after 6,000, 12,000 and 24,000 steps",
            "bounded",
            "effective_units_course",
            trained_on(decay),
            bounded,
            cause="decay is slow: the wide network is still losing units",
        )
        for decay in ("0.1", "0.01")
    ),
    Claim(
        "2502.05300",
        "networks trained apart become alike (deep linear, noisy SGD)",
        "3 depths x 3 widths behind embeddings of their own, 36 pairs",
        ".7 to .93; theory: 1",
        "trained_apart",
        alike("sgd"),
        lambda o: grades(
            min(o[f"{p} cooled"]["low"] for p in ("same", "across")) >= 0.98,
            middle(o["same end"]) > middle(o["same start"]),
        ),
        note="cooled: 1,000 last steps at a tenth of the learning rate, in which fluctuations die",
    ),
    Claim(
        "2502.05300",
        "gradient descent keeps what it began with",
        "the same networks, expected loss",
        "theory",
        "trained_apart",
        lambda s: {k: v for k, v in alike("gd")(s).items() if "cooled" not in k},
        lambda o: grades(middle(o["same end"]) < 0.9, middle(o["same end"]) < 0.95),
    ),
    Claim(
        "2502.05300",
        "ReLU networks trained apart become alike (linear task)",
        "the same networks with ReLU, noisy SGD",
        ".7 to .93",
        "trained_apart",
        alike("relu"),
        lambda o: grades(middle(o["same cooled"]) >= 0.93, middle(o["same end"]) > middle(o["same start"])),
    ),
    Claim(
        "2502.05300",
        "ReLU networks trained apart become alike (MNIST, projections of their own)",
        "6 layers of 128, 32 numbers seen of an image",
        ".7 to .93",
        "representation_alignment",
        lambda s: {key: s[key] for key in ("same_start", "same_end", "cross_start", "cross_end")},
        lambda o: grades(middle(o["same_end"]) >= 0.9, middle(o["same_end"]) > middle(o["same_start"])),
        cause="32 of 784 numbers are seen of an image: with all of them .88 is reached "
        "(representation_alignment_full.json)",
    ),
]
