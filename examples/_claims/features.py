"""Feature learning, 2401.07085."""

from __future__ import annotations

from typing import Any

from _claims.claim import Claim, Numbers, grades, middle


def accuracies(stored: dict[str, Any]) -> Numbers:
    """Read test accuracy where the training loss is the same, at the scales that came to it."""
    return {
        f"scale {scale}": cell["test_accuracy"]
        for scale, cell in stored["results"].items()
        if cell["fitted"] == cell["of"]
    }


def falls(ours: Numbers) -> str:
    """Judge whether the largest scale is worse than the smallest, by five points in every seed."""
    small, *_, large = ours.values()
    return grades(large["high"] < small["low"] - 0.05, middle(large) < middle(small) - 0.02)


FEATURES = [
    Claim(
        "2401.07085",
        "the solved model: growth of the tangent kernel",
        "six cases, width 1000: largest relative error",
        "exact",
        "feature_mechanisms",
        lambda s: {"largest error": max(abs(middle(case["error"])) for case in s["solved"].values())},
        lambda o: grades(o["largest error"] < 0.005, o["largest error"] < 0.05),
    ),
    Claim(
        "2401.07085",
        "larger initial weights generalise worse",
        "two-layer ReLU on MNIST from f = 0: test accuracy over initial scales",
        "falls (CIFAR-10)",
        "feature_mechanisms",
        lambda s: {f"scale {k}": row["test"] for k, row in s["relu"].items()},
        lambda o: grades(
            middle(o["scale 3.0"]) < middle(o["scale 0.03"]) - 0.05,
            middle(o["scale 3.0"]) < middle(o["scale 0.03"]) - 0.02,
        ),
        cause="a start at f = 0 removes the effect; it needs an ordinary start and training to one loss "
        "(next row)",
    ),
    Claim(
        "2401.07085",
        "the same from an ordinary start, at equal training loss",
        "two-layer ReLU on 500 images of CIFAR-10 (whitened components), stopped at half a constant's loss",
        "falls (CIFAR-10)",
        "feature_scales",
        accuracies,
        falls,
        cause="not established",
    ),
    Claim(
        "2401.07085",
        "exponents alone say which scalings learn features (phase diagram)",
        "32 scalings, four widths, five seeds: share of runs whose measured exponents name the phase",
        "phase diagram",
        "feature_phases",
        lambda s: dict(s["agree"]),
        lambda o: grades(min(o.values()) > 0.95, min(o.values()) > 0.7),
        cause="not established",
    ),
]
