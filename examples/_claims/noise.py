"""Law of balance, 2308.06671, and noise equilibrium, 2402.07193."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

from _claims.claim import Claim, Numbers, grades, middle

BALANCE = [
    Claim(
        "2308.06671",
        "gradient noise balances layers at the rate of the law: what decayed",
        "ReLU 20-200-20, SGD: the law's decay over the measured one",
        "the law",
        "law_of_balance",
        lambda s: {"law / measured": s["arms"]["SGD"]["law_over_measured"]},
        lambda o: grades(
            abs(middle(o["law / measured"]) - 1) < 0.05, abs(middle(o["law / measured"]) - 1) < 0.3
        ),
    ),
    Claim(
        "2308.06671",
        "the same: what remains",
        "ReLU 20-200-20, SGD",
        "the law",
        "law_of_balance",
        lambda s: {key: s["arms"]["SGD"][key] for key in ("kept", "predicted_kept")},
        lambda o: grades(
            abs(middle(o["kept"]) / middle(o["predicted_kept"]) - 1) < 0.05,
            abs(middle(o["kept"]) / middle(o["predicted_kept"]) - 1) < 0.3,
        ),
        cause="the law is estimated at every tenth step, from a batch of two: from seed to seed it scatters "
        "five times as far as what is measured, to both sides of it",
    ),
    Claim(
        "2308.06671",
        "gradient descent conserves the difference",
        "ReLU 20-200-20: what remains",
        "1",
        "law_of_balance",
        lambda s: {"kept": s["arms"]["GD"]["kept"]},
        lambda o: grades(abs(middle(o["kept"]) - 1) < 1e-3, abs(middle(o["kept"]) - 1) < 0.1),
    ),
    Claim(
        "2308.06671",
        "the stationary density of a product of weights",
        "stochastic differential equation: mean less the formula's, at T = .05, .1, .2",
        "closed form",
        "stationary_density",
        lambda s: {
            f"T {t}": s["equation"][t]["mean"]["mean"] - s["equation"][t]["formula"]["mean"]
            for t in ("0.05", "0.1", "0.2")
        },
        lambda o: grades(max(map(abs, o.values())) < 0.01, max(map(abs, o.values())) < 0.1),
    ),
    Claim(
        "2308.06671",
        "the same density under discrete SGD",
        "batch size 1: share of chains that diverge",
        "figures",
        "stationary_density",
        lambda s: {f"T {t}": s["sgd"][t]["diverged"] for t in ("0.05", "0.1", "0.2")},
        lambda o: grades(max(map(middle, o.values())) < 0.01, min(map(middle, o.values())) < 0.01),
        cause="at batch size 1 the temperature is the learning rate: at .1 and more a step is too large",
    ),
]


def equilibrium(kind: str, what: str) -> Callable[[dict[str, Any]], Numbers]:
    """Read a number of the three starts over its closed form."""
    return lambda s: {k: row[f"{what}_over_closed"] for k, row in s["found"][kind].items() if ":" in k}


def floor(kind: str) -> Callable[[dict[str, Any]], Numbers]:
    """Read how far SGD stays from the closed form at each learning rate, and the powers of the rate."""

    def read(stored: dict[str, Any]) -> Numbers:
        found = stored["results"][kind]
        keys = ("imbalance", "top")
        far = {f"{key}, rate {rate}": cell[key] for key in keys for rate, cell in found["rates"].items()}
        return far | {f"power of {key}": found["power"][key] for key in keys}

    return read


def shrinks(ours: Numbers) -> str:
    """Judge whether both deviations shrink with the rate, at every rate and at least as its root over all."""
    falls = []
    for key, rest in (("imbalance", 0.0), ("top", 1.0)):
        far = [abs(middle(cell) - rest) for name, cell in ours.items() if name.startswith(f"{key}, rate")]
        falls.append(all(a < b for a, b in itertools.pairwise(far)))
    powers = [middle(cell) for name, cell in ours.items() if name.startswith("power")]
    return grades(all(falls) and min(powers) >= 0.45, all(falls))


def worst(ours: Numbers) -> float:
    """Return the largest distance of a median from 1."""
    return max(abs(middle(cell) - 1) for cell in ours.values())


def ends(stored: dict[str, Any]) -> Numbers:
    """Read the trace at the end from each start, with warm-up and without, and with twice as many units."""
    starts = ("kaiming", "kaiming, warm-up", "xavier", "xavier, warm-up")
    found = {
        f"{k}, {how}": stored["sharpness"][f"{k}, {how}"]["end"] for how in ("SGD", "GD") for k in starts
    }
    return found | {"twice as wide": stored["sharpness"]["kaiming, twice as wide, SGD"]["end"]}


def one_value(ours: Numbers) -> str:
    """Judge whether SGD's ends are one, and that of the closed form."""
    sgd = [middle(cell) for key, cell in ours.items() if key.endswith("SGD")]
    apart = middle(ours["kaiming, GD"]) - middle(ours["xavier, GD"])
    one = max(sgd) - min(sgd) < 0.2 * abs(apart)
    return grades(one and max(abs(value - 1) for value in sgd) < 0.1, one)


def over_starts(network: str, key: str) -> Callable[[dict[str, Any]], Numbers]:
    """Read a number of SGD's and gradient descent's ends at the three starts."""
    return lambda s: {
        f"{how} {start}": cell[key]
        for how in ("SGD", "GD")
        for start, cell in s["results"][f"{network}, {how}"].items()
    }


def of(ours: Numbers, how: str) -> list[dict[str, float]]:
    """Return the cells of SGD or of gradient descent."""
    return [cell for key, cell in ours.items() if key.startswith(how)]


def apart(cells: list[dict[str, float]]) -> float:
    """Return the largest median over the smallest."""
    return max(map(middle, cells)) / min(map(middle, cells))


def straightened(ours: Numbers) -> str:
    """Judge whether the sides align where units are linear, and the less the more units curve."""
    cells = list(ours.values())
    return grades(
        cells[0]["low"] > 0.98 and all(middle(a) > middle(b) for a, b in itertools.pairwise(cells)),
        middle(cells[0]) > middle(cells[-1]),
    )


def one_size(ours: Numbers) -> str:
    """Judge whether SGD's sizes are the closed form's, and gradient descent's those of the starts."""
    closed = max(abs(middle(cell) - 1) for cell in of(ours, "SGD")) < 0.1
    kept = apart(of(ours, "GD")) > 2
    return grades(closed and kept, apart(of(ours, "SGD")) < 0.5 * apart(of(ours, "GD")))


NOISE = [
    Claim(
        "2402.07193",
        "SGD ends at one balanced point: imbalance of time averages",
        "two linear layers, three lopsided starts, uneven noise; gradient descent beside",
        "0; kept",
        "noise_equilibrium",
        lambda s: {
            f"{how} {k}": s["found"]["uneven"][k][how]["residual"]
            for how in ("sgd", "gd")
            for k in ("1:3", "1:1", "3:1")
        },
        lambda o: grades(
            max(middle(c) for k, c in o.items() if "sgd" in k) < 0.1,
            max(middle(c) for k, c in o.items() if "sgd" in k) < 0.5,
        ),
    ),
    Claim(
        "2402.07193",
        "the same, at one moment",
        "two linear layers, uneven noise",
        "0",
        "noise_equilibrium",
        lambda s: {k: s["found"]["uneven"][k]["sgd"]["instant"] for k in ("1:3", "1:1", "3:1")},
        lambda o: grades(max(map(middle, o.values())) < 0.1, max(map(middle, o.values())) < 0.5),
        cause="SGD moves about the point, the further the larger the learning rate (rows on a step's size)",
    ),
    *(
        Claim(
            "2402.07193",
            f"one sharpness, whatever the start: {name}, {kind} noise",
            "over its closed form, three starts",
            "1",
            "noise_equilibrium",
            equilibrium(kind, what),
            lambda o: grades(worst(o) < 0.1, worst(o) < 0.5),
            cause="the closed form is of the balanced point, about which weights fluctuate; at smaller "
            "learning rates SGD comes nearer to it (rows on a step's size)"
            if what == "top"
            else "",
        )
        for what, name in (("trace", "trace of the Hessian"), ("top", "largest eigenvalue"))
        for kind in ("even", "uneven")
    ),
    *(
        Claim(
            "2402.07193",
            f"what keeps SGD from the closed form is the size of a step, {kind} noise",
            "begun at the closed form: imbalance at one moment, and largest eigenvalue over its closed form, "
            "at four learning rates; powers of the rate with which both deviate",
            "theory of small steps",
            "noise_floor",
            floor(kind),
            shrinks,
            cause="not established",
        )
        for kind in ("even", "uneven")
    ),
    *(
        Claim(
            "2402.07193",
            f"noise makes the norm of scale-invariant weights grow for ever, {which}",
            "squared norm at the end over that at the start; gradient descent, and SGD with decay, beside",
            "monotone under SGD",
            "noise_and_scale",
            lambda s, net=net: (
                {how: s["norms"][f"net {net}, {how}"]["growth"] for how in ("SGD", "GD", "SGD with decay")}
                | {"law's error": s["norms"][f"net {net}, SGD"]["law_error"]}
            ),
            lambda o: grades(
                o["SGD"]["low"] > 1.5 > 1.1 > o["GD"]["high"] and o["law's error"]["high"] < 1e-9,
                o["SGD"]["low"] > o["GD"]["high"],
            ),
            cause="not established",
        )
        for net, which in (("A", "one scale for all weights"), ("B", "a scale for each layer"))
    ),
    Claim(
        "2402.07193",
        "SGD takes the sharpness to one value, from Kaiming's and Xavier's start",
        "two linear layers: trace of the Hessian over the closed form; gradient descent beside",
        "only Kaiming with warm-up improves it",
        "noise_and_scale",
        ends,
        one_value,
        cause="not established",
        note="that warm-up matters is not seen at this rate",
    ),
    *(
        Claim(
            "2402.07193",
            f"noise fixes the size of representations, whatever the start: {which}",
            "three linear layers, uneven inputs and noise, three lopsided starts: trace over its closed form",
            "normalised; gradient descent keeps the start's",
            "representation_normalisation",
            over_starts("linear", key),
            one_size,
            cause="not established",
        )
        for key, which in (("first", "first hidden layer"), ("second", "second hidden layer"))
    ),
    Claim(
        "2402.07193",
        "a middle layer of a deep linear network becomes isotropic",
        "the same networks: largest singular value of the middle layer over the smallest",
        "1",
        "representation_normalisation",
        over_starts("linear", "middle"),
        lambda o: grades(
            max(map(middle, of(o, "SGD"))) < 1.2 and min(map(middle, of(o, "GD"))) > 1.5,
            max(map(middle, of(o, "SGD"))) < min(map(middle, of(o, "GD"))),
        ),
        cause="not established",
    ),
    Claim(
        "2402.07193",
        "both sides of the balance align in a two-layer tanh network under SGD",
        "uneven inputs and noise, three lopsided starts: cosine; gradient descent beside",
        "similar under SGD, different under gradient descent (pictures)",
        "representation_normalisation",
        over_starts("tanh", "cosine"),
        lambda o: grades(
            min(map(middle, of(o, "SGD"))) >= 0.95 and max(map(middle, of(o, "GD"))) <= 0.8,
            min(c["low"] for c in of(o, "SGD")) > max(c["high"] for c in of(o, "GD")),
        ),
        cause="units that curve: the straighter they are, the better both sides align, .99 where they are "
        "linear at the same learning rate (next row); theory is of linear networks",
    ),
    Claim(
        "2402.07193",
        "the same with units tanh(a x) / a under SGD, linear at a = 0",
        "the same task and starts: cosine at five values of a",
        "1 where linear",
        "tanh_balance",
        lambda s: {name.split(",")[0]: cell["cosine"] for name, cell in s["cells"].items()},
        straightened,
        cause="not established",
    ),
]
