"""What does syre cost? Optimizer steps and whole steps with it, over those without, in pairs."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import environment, paired, write_json
from torch import nn
from torch.nn import functional as F

from lightning_sym.optim import attach_syre

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9, weight_decay=1e-4),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-4, weight_decay=1e-2),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=1e-4, weight_decay=1e-2, fused=True),
}


class Unknown(torch.optim.SGD):
    """An optimizer that syre does not know: parameters are moved there and back."""


OPTIMIZERS["sgd, moved"] = lambda p: Unknown(p, lr=1e-3, momentum=0.9, weight_decay=1e-4)


def step_seconds(build: Callable[[], nn.Module], make: Any, *, syre: bool, repeats: int) -> float:
    """Return the median seconds of an optimizer step."""
    net = build()
    optimizer = make(net.parameters())
    if syre:
        attach_syre(optimizer, named_parameters=net.named_parameters())
    for p in net.parameters():
        p.grad = torch.full_like(p, 1e-6)
    seconds = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        optimizer.step()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:])


def whole_seconds(build: Callable[[], nn.Module], make: Any, *, syre: bool, repeats: int) -> float:
    """Return the median seconds of a training step of the ResNet."""
    net = build()
    optimizer = make(net.parameters())
    if syre:
        attach_syre(optimizer, named_parameters=net.named_parameters())
    x, y = torch.randn(64, 3, 32, 32), torch.randint(0, 10, (64,))
    seconds = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:])


def resnet() -> nn.Module:
    """Return a timm ResNet-18: 11 million parameters."""
    import timm

    return timm.create_model("resnet18", num_classes=10)


def large() -> nn.Module:
    """Return 100 million parameters in six square matrices."""
    return nn.Sequential(*[nn.Linear(4096, 4096, bias=False) for _ in range(6)])


def main() -> None:
    """Measure all pairs and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/results/syre_benchmark.json"))
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    results: dict[str, Any] = {}
    kinds = {
        "optimizer step, 11 M": (step_seconds, resnet),
        "optimizer step, 100 M": (step_seconds, large),
        "whole step, ResNet-18, batch 64": (whole_seconds, resnet),
    }
    for kind, (measure, build) in kinds.items():
        for name, make in OPTIMIZERS.items():
            report = paired(
                {
                    arm: lambda m=measure, b=build, o=make, s=(arm == "syre"): m(  # type: ignore[misc]
                        b, o, syre=s, repeats=options.repeats
                    )
                    for arm in ("bare", "syre")
                },
                baseline="bare",
                pairs=options.pairs,
            )
            results[f"{kind}, {name}"] = report
            ratio = report["syre"]
            print(
                f"{kind}, {name}: {ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})",
                flush=True,
            )
    config = {"pairs": options.pairs, "repeats": options.repeats, "environment": environment()}
    write_json(options.out, config=config, results=results)


if __name__ == "__main__":
    main()
