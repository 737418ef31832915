"""What share of an architecture's trained parameters is read, and is a fit what it is without monitors?

Each network is fitted for two steps with and without monitors of all its layers; parameters and buffers
must be bitwise equal, and whatever is warned of is kept.

Run:
    python benchmarks/coverage.py --out docs/results/coverage.json
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_sym.callbacks import Monitor, monitors
from lightning_sym.engine.loop import watch
from lightning_sym.observe import (
    Activity,
    Observation,
    Reading,
    SecondMoments,
    Weight,
    WeightUpdate,
    ZeroGradients,
    coverage,
)

sys.path.insert(0, str(Path(__file__).parent))
from common import write_json
from look_alikes import OWN, TIMM, image

STEPS = 2


class Everything(Monitor):
    """Reads a number of everything that can be seen of every layer, of few features, which is cheap."""

    quantity = "everything"
    sides = tuple(
        SecondMoments(side, max_width=16, max_patch_width=16)
        for side in ("inputs", "outputs", "input_gradients", "output_gradients")
    )
    needs = (*sides, Activity(), Weight(), WeightUpdate(), ZeroGradients())

    def __init__(self) -> None:
        super().__init__(every_n_steps=1, max_layers=10_000, strict=True)

    def read(self, seen: Observation) -> Iterator[Reading]:
        """Yield one number of each."""
        for layer in seen.layers:
            for side in self.sides:
                if (moments := layer.get(side)) is not None:
                    yield Reading(layer.name, side.side, moments.second.trace())
            for what, need in zip(("activity", "weight", "update", "zeros"), self.needs[4:], strict=True):
                if (found := layer.get(need)) is not None:
                    value = {"activity": lambda x: x.mean.mean(), "weight": lambda x: x.norm}.get(
                        what, float
                    )(found)
                    yield Reading(layer.name, what, value)


def networks() -> Iterator[str]:
    """Yield the names of all architectures."""
    yield from OWN
    yield from (f"timm {name}" for name in TIMM)
    yield from (f"torchvision {name}" for name in TORCHVISION)


TORCHVISION: dict[str, tuple[dict[str, Any], int]] = {
    "mobilenet_v2": ({}, 32),
    "googlenet": ({"aux_logits": False, "init_weights": False}, 32),
    "squeezenet1_1": ({}, 64),
    "shufflenet_v2_x0_5": ({}, 32),
    "mnasnet0_5": ({}, 32),
}


def make(name: str) -> tuple[nn.Module, tuple[Any, ...]]:
    """Return a network and what it is called with."""
    torch.manual_seed(0)
    if name in OWN:
        return OWN[name]()
    library, _, model = name.partition(" ")
    if library == "timm":
        import timm

        options, size = TIMM[model]
        return timm.create_model(model, num_classes=5, **options), (image(size, batch=2),)
    import torchvision

    options, size = TORCHVISION[model]
    return torchvision.models.get_model(model, weights=None, num_classes=5, **options), (
        image(size, batch=2),
    )


def loss_of(output: Any) -> Tensor:
    """Return a loss of whatever a network puts out."""
    parts = [x for x in torch.utils._pytree.tree_leaves(output) if isinstance(x, Tensor) and x.requires_grad]
    return sum(((x - 0.1).square().mean() for x in parts), torch.zeros(()))


def fit(name: str, *, watched: bool) -> tuple[dict[str, Tensor], list[str], list[str], nn.Module]:
    """Fit a network for two steps.

    Returns:
        Its parameters and buffers, what was warned of, the layers that were read, and the network.
    """
    net, inputs = make(name)
    torch.manual_seed(1)
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], 1e-3)
    watching: list[Monitor] = [Everything()] if watched else []
    watching += [*monitors("standard", every_n_steps=1)] if watched and name in OWN else []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with watch(net, optimizer, watching) if watching else contextlib.nullcontext() as observed:
            for _ in range(STEPS):
                if observed is not None:
                    observed.batch(inputs)
                loss_of(net(*inputs)).backward()
                optimizer.step()
                optimizer.zero_grad()
    keys = sorted(
        {key.split("/")[1] for row in (watching[0].history if watched else []) for key in row if "/" in key}
    )
    ours = [
        str(w.message) for w in caught if "lightning_sym" in str(w.filename) or "readings" in str(w.message)
    ]
    return net.state_dict(), ours, keys, net


def measure(name: str) -> dict[str, Any]:
    """Return the row of an architecture."""
    began = time.perf_counter()
    bare, _, _, _ = fit(name, watched=False)
    state, warned, keys, net = fit(name, watched=True)
    found = coverage(net)
    return {
        "trained": found.trained,
        "read": found.read,
        "share": round(found.share, 4),
        "layers": found.total,
        "unread": {kind: sum(names.values()) for kind, names in found.unread.items()},
        "missing": found.missing(),
        "bitwise": all(torch.equal(bare[key], state[key]) for key in bare),
        "warnings": warned,
        "layers read": len(keys),
        "seconds": round(time.perf_counter() - began, 1),
    }


def main() -> None:
    """Measure all, print a table and save it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("docs/results/coverage.json"))
    parser.add_argument("--only", nargs="*", help="names of architectures")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = {}
    for name in args.only or networks():
        row = rows[name] = measure(name)
        said = f"; {len(row['warnings'])} warnings" if row["warnings"] else ""
        same = "bitwise" if row["bitwise"] else "DIFFERS"
        same = f"{row['share']:.3f} of {row['trained']:>9} {same}"
        read = f"{row['layers read']:3} of {row['layers']:3} layers {row['seconds']:5.1f} s"
        print(f"{name:32} {same} {read}{said}; {row['missing'][:110]}", flush=True)
        for text in row["warnings"]:
            print("    !", text[:300])
    if not args.only:
        write_json(
            args.out, config={"steps": STEPS, "monitors": "all statistics of all layers"}, results=rows
        )


if __name__ == "__main__":
    main()
