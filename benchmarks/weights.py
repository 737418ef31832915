"""What weights alone tell of timm's families, untrained and spoiled.

    python benchmarks/weights.py

Untrained networks should raise no alarm. In copies of each one layer is spoiled in five ways, one at a time:
every second unit made equal to another, half of the units zero, rank two, a weight scaled to nothing, a NaN.
Each alarm is held against the layer and the kind that the spoiling asks for.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from common import write_json
from torch import Tensor, nn

from lightning_sym.diagnosis import diagnose_weights

RESULT = Path(__file__).parents[1] / "docs" / "results" / "weights_alone.json"
#: One of each family, small ones where there are several, and a size that all its layers take.
NETWORKS = (
    *("resnet18", "resnetv2_50", "vit_tiny_patch16_224", "convnext_atto", "swin_tiny_patch4_window7_224"),
    *("efficientnet_b0", "mixer_s32_224", "regnetx_002", "regnety_002", "mobilenetv3_small_050"),
    *("densenet121", "deit_tiny_patch16_224", "maxvit_rmlp_pico_rw_256", "beit_base_patch16_224"),
    *("vgg11", "poolformer_s12", "resmlp_12_224", "levit_128s", "ghostnet_050", "cait_xxs24_224"),
)


def equal(weight: Tensor, bias: Tensor | None) -> None:
    """Make every second unit equal to the one before."""
    for tensor in (weight,) if bias is None else (weight, bias):
        tensor[1::2] = tensor[: 2 * (len(tensor) // 2) : 2]


def zero(weight: Tensor, bias: Tensor | None) -> None:
    """Make half of the units zero."""
    for tensor in (weight,) if bias is None else (weight, bias):
        tensor[: len(tensor) // 2] = 0


def low(weight: Tensor, bias: Tensor | None) -> None:
    """Leave two directions."""
    u, s, v = torch.linalg.svd(weight.flatten(1), full_matrices=False)
    weight.copy_((u[:, :2] * s[:2] @ v[:2]).view_as(weight))


def nothing(weight: Tensor, bias: Tensor | None) -> None:
    """Scale the weight to nothing."""
    weight.mul_(1e-8)


def broken(weight: Tensor, bias: Tensor | None) -> None:
    """Put in a NaN."""
    weight.view(-1)[3] = math.nan


#: By kinds that are right.
SPOILED: dict[str, tuple[Callable[[Tensor, Tensor | None], None], tuple[str, ...]]] = {
    "equal": (equal, ("equal_units",)),
    "zero": (zero, ("dead_units", "zero_units")),
    "low": (low, ("rank_collapse",)),
    "nothing": (nothing, ("weights_vanish",)),
    "broken": (broken, ("divergence",)),
}


def middle(net: nn.Module) -> str:
    """Return a layer in the middle: the widest ordinary linear or convolution of the middle third."""
    found = [
        name
        for name, child in net.named_modules()
        if isinstance(child, nn.Linear | nn.Conv2d)
        and getattr(child, "groups", 1) == 1
        and min(child.weight.flatten(1).shape) >= 16
    ]
    third = found[len(found) // 3 : 2 * len(found) // 3 + 1]
    return max(third, key=lambda name: min(net.get_submodule(name).weight.flatten(1).shape))  # type: ignore[union-attr, operator]


def alarms(net: nn.Module) -> list[tuple[str, str]]:
    """Return kinds and layers of alarms."""
    found = diagnose_weights(net, search=False)
    return [(finding.kind, finding.layer) for finding in found if finding.level == "alarm"]


def measure(name: str, *, spoil: bool) -> dict[str, Any]:
    """Return what is told of a network."""
    torch.manual_seed(0)
    net = timm.create_model(name)
    began = time.process_time()
    result: dict[str, Any] = {"untrained": alarms(net), "seconds": round(time.process_time() - began, 2)}
    if spoil:
        layer = result["layer"] = middle(net)
        for word, (ruin, right) in SPOILED.items():
            twin = copy.deepcopy(net)
            spoiled = twin.get_submodule(layer)
            with torch.no_grad():
                ruin(spoiled.weight, spoiled.bias)  # type: ignore[arg-type]
            told = alarms(twin)
            named = any(kind in right and where == layer for kind, where in told)
            result[word] = {"named": named, "others": [pair for pair in told if pair[1] != layer]}
    return result


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=NETWORKS)
    parser.add_argument("--plain", action="store_true", help="untrained networks alone")
    parser.add_argument("--out", type=Path, default=RESULT, help="what it holds of other networks stays")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = json.loads(options.out.read_text())["results"] if options.out.exists() else {}
    for name in options.only:
        try:
            results[name] = measure(name, spoil=not options.plain)
        except Exception as error:
            results[name] = {"error": f"{type(error).__name__}: {error}"[:300]}
        print(name, results[name], flush=True)
        config = {"networks": list(results)}
        write_json(options.out, config=config, results=results)


if __name__ == "__main__":
    main()
