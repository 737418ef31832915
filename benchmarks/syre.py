"""What does syre cost? Optimizer steps and whole steps with it, over those without, in pairs.

    OMP_NUM_THREADS=1 python benchmarks/syre.py

Each pair steps the two in turn and takes the processor's time of the thread that trains, so that other
processes count little; where there is an accelerator, seconds.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import paired, synchronize, write_json
from torch import Tensor, nn
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


def seconds(run: Callable[[], object]) -> float:
    """Return what a step takes: the thread's work, or where an accelerator works the clock's time."""
    now = time.perf_counter if torch.cuda.is_available() else time.thread_time
    synchronize()
    began = now()
    run()
    synchronize()
    return now() - began


def optimizer_step(net: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[], float]:
    """Return what times a step of the optimizer alone."""
    for p in net.parameters():
        p.grad = torch.full_like(p, 1e-6)
    return lambda: seconds(optimizer.step)


def whole_step(net: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[], float]:
    """Return what times a training step on images of 32 x 32."""
    device = next(net.parameters()).device
    x, y = torch.randn(64, 3, 32, 32, device=device), torch.randint(0, 10, (64,), device=device)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()

    return lambda: seconds(step)


def compare(
    build: Callable[[], nn.Module], make: Any, step: Any, *, pairs: int, device: str
) -> dict[str, Any]:
    """Step with syre and without in turn; return the report of :func:`common.paired`."""
    runs: dict[str, Callable[[], float]] = {}
    for arm in ("bare", "syre"):
        net = build().to(device)
        optimizer = make(net.parameters())
        if arm == "syre":
            attach_syre(optimizer, named_parameters=net.named_parameters())
        runs[arm] = step(net, optimizer)
    return paired(runs, baseline="bare", pairs=pairs, warmup=2)  # type: ignore[arg-type]


def forms(sizes: list[int], *, pairs: int, device: str = "cpu") -> dict[str, Any]:
    """Compare ways to bring the pull and a fused AdamW step together, on tensors of these sizes.

    A pass of its own over all weights, which is what syre does, and one over each part that fits a cache,
    right before the part's step.
    """
    weights, gradients, firsts, seconds_, offsets = (
        [torch.full((n,), value, device=device) for n in sizes] for value in (0.1, 1e-6, 0.0, 0.0, 0.01)
    )
    steps = [torch.tensor(5.0, device=device) for _ in sizes]

    def update(rows: list[tuple[Tensor, ...]], decay: float) -> None:
        p, g, m, v, s = ([row[k] for row in rows] for k in range(5))
        betas = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "amsgrad": False, "maximize": False}
        torch._fused_adamw_(p, g, m, v, [], s, lr=1e-4, weight_decay=decay, **betas)

    rows = list(zip(weights, gradients, firsts, seconds_, steps, strict=True))

    def apart() -> None:
        torch._foreach_lerp_(weights, offsets, 1e-6)
        update(rows, 0.0)

    def in_parts(most: int) -> Callable[[], None]:
        kept = [
            [*zip(*(x.split(most) for x in (p, m, v, t)), strict=True)]
            for p, m, v, t in zip(weights, firsts, seconds_, offsets, strict=True)
        ]

        def run() -> None:
            for parts, g, s in zip(kept, gradients, steps, strict=True):  # gradients are new in each step
                for (p, m, v, t), part in zip(parts, g.split(most), strict=True):
                    p.lerp_(t, 1e-6)
                    update([(p, part, m, v, s)], 0.0)

        return run

    ways = {"no pull": lambda: update(rows, 1e-2), "a pass of its own": apart}
    ways |= {f"in parts of {most // 1024} Ki": in_parts(most) for most in (2**15, 2**16, 2**17, 2**18)}
    runs = {name: (lambda run=run: seconds(run)) for name, run in ways.items()}
    return paired(runs, baseline="no pull", pairs=pairs, warmup=2)


def resnet() -> nn.Module:
    """Return a timm ResNet-18: 11 million parameters."""
    import timm

    return timm.create_model("resnet18", num_classes=10)


def large(width: int = 4096) -> nn.Module:
    """Return six square matrices; of the default width they have 100 million parameters."""
    return nn.Sequential(*[nn.Linear(width, width, bias=False) for _ in range(6)])


def measure(*, pairs: int, width: int = 4096, only: str = "", device: str = "cpu") -> dict[str, Any]:
    """Return the reports of all optimizers, on the two sets of weights and in whole steps; those so named."""
    kinds: dict[str, tuple[Any, Callable[[], nn.Module]]] = {
        "optimizer step, 11 M": (optimizer_step, resnet),
        "optimizer step, 100 M": (optimizer_step, lambda: large(width)),
        "whole step, ResNet-18, batch 64": (whole_step, resnet),
    }
    results: dict[str, Any] = {}
    for kind, (step, build) in kinds.items():
        for name, make in OPTIMIZERS.items() if only in kind else ():
            report = compare(build, make, step, pairs=pairs, device=device)
            results[f"{kind}, {name}"] = report
            ratio = report["syre"]
            said = f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})"
            print(f"{kind}, {name}: {said}", flush=True)
    for kind, build in (("11 M", resnet), ("100 M", lambda: large(width))):
        if only not in kind:
            continue
        with torch.device("meta"):
            sizes = [p.numel() for p in build().parameters()]
        report = results[f"forms of the pull, {kind}"] = forms(sizes, pairs=pairs, device=device)
        print(
            f"{kind}: { ({name: round(row.get('median', 1.0), 2) for name, row in report.items()}) }",
            flush=True,
        )
    return results


def main() -> None:
    """Measure all pairs and write the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("docs/results/syre_benchmark.json"))
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--width", type=int, default=4096, help="of the six matrices; 4096 is measured")
    parser.add_argument("--only", default="", help="a part of the names of what is measured")
    options = parser.parse_args()
    results = measure(pairs=options.pairs, width=options.width, only=options.only)
    config = {"pairs": options.pairs, "width": options.width, "clock": "processor time of the thread"}
    write_json(options.out, config=config, results=results)


if __name__ == "__main__":
    main()
