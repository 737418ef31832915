"""Composition, 2501.18797."""

from __future__ import annotations

from typing import Any

from _report import spread

from _claims.claim import Claim, Numbers, grades


def gains(stored: dict[str, Any]) -> Numbers:
    """Read how much forced factorisation lowers the error out of distribution."""
    summary = stored["summary"]
    return {"of medians": summary["gain_of_medians"], "by seed": spread(summary["gain_by_seed"])}


def images(stored: dict[str, Any]) -> Numbers:
    """Read for each side how many images each kind of training set needs, medians, and the power of N.

    The smallest and the largest set that were tried bound the number, and are said to.
    """
    summary, found = stored["summary"], {}
    for arm in ("stripes", "bumps"):
        for side, count in summary["median"][arm].items():
            tried = [row["images"] for row in stored["runs"] if (row["arm"], row["size"]) == (arm, int(side))]
            least, most = min(tried), max(tried)
            bound = f"more than {most}" if count is None else f"at most {least}" if count <= least else None
            found[f"{arm}, N = {side}"] = bound or float(count)
    if any(isinstance(count, str) for key, count in found.items() if key.startswith("stripes")):
        return found | {"power of N with stripes": "not known"}
    slopes = summary["exponent"]["stripes"]
    return found | {"power of N with stripes": slopes["of_medians"], "by seed": slopes["spread"]}


def fewer(ours: Numbers) -> str:
    """Judge whether stripes need about N images, and bumps alone four times as many at every side."""

    def number(count: float | str) -> float:
        return float(count.split()[-1]) if isinstance(count, str) else count

    stripes = {key: count for key, count in ours.items() if key.startswith("stripes, N")}
    many = all(number(ours[k.replace("stripes", "bumps")]) >= 4 * number(n) for k, n in stripes.items())
    power = ours["power of N with stripes"]
    return grades(many and isinstance(power, float) and abs(power - 1) <= 0.5, many)


COMPOSITION = [
    Claim(
        "2501.18797",
        f"forced factorisation lowers the error out of distribution, {length}",
        "embedding model, three seeds: ratio of medians",
        "200 (one seed, last epoch)",
        source,
        gains,
        lambda o: grades(o["of medians"] > 100, o["of medians"] > 3),
        cause="the paper's is one seed at its last epoch; ours scatter by a factor of ten over seeds",
    )
    for length, source in (("reduced length", "compose_bumps"), ("full length", "compose_bumps_full"))
] + [
    Claim(
        "2501.18797",
        "stripes cut the images needed to compose to about N, the side of the image",
        "three sides, training sets from N / 2 images up in factors of two: medians of three seeds",
        "about N; without stripes about N^3",
        "stripes_vs_bumps",
        images,
        fewer,
        cause="three sides so near each other, and factors of two between training sets, leave the power of "
        "N open: over seeds it scatters from about one to above two",
    )
]
