"""Self-assembly, 2412.20018."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from _claims.claim import Claim, Numbers, grades, middle, over


def compared(key: str, gamma: str) -> Callable[[dict[str, Any]], Numbers]:
    """Read numbers by seed of assembled circuits against others."""
    return lambda s: {key: over(s["compared"][gamma][key])}


CIRCUIT = [
    Claim(
        "2412.20018",
        "random connectivity assembles itself (hidden laterals)",
        "digits, 64-64, decay .03, output's lateral held: cos(R, L') at the end, frozen laterals beside",
        "self-assembles",
        "self_assembly_random_digits",
        lambda s: {key: over(s["compared"]["0.03"][key]) for key in ("laterals", "laterals_frozen")},
        lambda o: grades(
            o["laterals"]["low"] > 0.9, o["laterals"]["low"] > o["laterals_frozen"]["high"] + 0.1
        ),
        cause="that the error keeps its sign is assumed (the output's lateral is held); hidden laterals come "
        "to about .4 within the first epochs and stay there",
    ),
    Claim(
        "2412.20018",
        "assembled laterals learn better than random frozen ones",
        "digits, decay .03: points of accuracy over frozen, seed by seed",
        "as well as backprop",
        "self_assembly_random_digits",
        compared("points_over_frozen", "0.03"),
        lambda o: grades(o["points_over_frozen"]["low"] > 0, middle(o["points_over_frozen"]) > 0),
    ),
    Claim(
        "2412.20018",
        "the circuit learns as well as backprop, from random laterals",
        "digits, decay .01: points over backprop",
        "as well as backprop",
        "self_assembly_random_digits",
        compared("points_over_backprop", "0.01"),
        lambda o: grades(
            abs(middle(o["points_over_backprop"])) <= 1, abs(middle(o["points_over_backprop"])) <= 5
        ),
        cause="laterals that begin at the identity lose one point, frozen random ones about four: what is "
        "missing is alignment",
    ),
    Claim(
        "2412.20018",
        "a local sign makes up for random output laterals (2505.02248, in our reading)",
        "digits, all laterals random: circuits of five that diverge",
        "local sign",
        "self_assembly_random_digits",
        lambda s: {
            arm: sum(c["diverged"] for c in s["cells"].values() if c["arm"] == arm)
            for arm in ("plain", "sign", "sign_pairs")
        },
        lambda o: grades(o["sign"] == 0, o["sign"] < o["plain"]),
        cause="our reading of the sign (running agreement of what is taught with the neuron beside); "
        "the paper's equations were not available",
    ),
    Claim(
        "2412.20018",
        "the circuit learns as well as backprop, from identity laterals (no self-assembly)",
        "MNIST, 256-256, 3 epochs: points over backprop",
        "as well as backprop",
        "self_assembly_mnist",
        lambda s: {"points": s["rules"]["four_synapse, identity"]["gap"]},
        lambda o: grades(abs(middle(o["points"])) <= 1, abs(middle(o["points"])) <= 5),
    ),
    Claim(
        "2412.20018",
        "assembled laterals learn better than random frozen ones, MNIST",
        "64-64, decay .01, 2 epochs: points of accuracy over frozen, seed by seed; cos(R, L')",
        "as well as backprop",
        "self_assembly_random_mnist",
        lambda s: {key: over(s["compared"]["0.01"][key]) for key in ("points_over_frozen", "laterals")},
        lambda o: grades(
            o["points_over_frozen"]["low"] > 0 and "not_finite" not in o["points_over_frozen"],
            middle(o["points_over_frozen"]) > 0,
        ),
        cause="one frozen control of five diverged; against the other four every assembled circuit is ahead",
    ),
    Claim(
        "2412.20018",
        "the circuit learns as well as backprop, from random laterals, MNIST (goal: within 2 points)",
        "64-64, decay .01, 2 epochs: points over backprop",
        "as well as backprop",
        "self_assembly_random_mnist",
        lambda s: {"points": over(s["compared"]["0.01"]["points_over_backprop"])},
        lambda o: grades(abs(middle(o["points"])) <= 2, abs(middle(o["points"])) <= 10),
        cause="two epochs at a learning rate of .015 (at .03 circuits diverge); updates come to a cosine of "
        ".16 to backprop's only",
    ),
]
