"""What monitors and syre cost where a GPU trains: kept apart, and run where one is at hand.

    python benchmarks/gpu.py                             # on a GPU, whose name is recorded
    python benchmarks/gpu.py --reduced --out gpu.json    # anywhere: whether the script runs

A ResNet-18 in bfloat16, channels last, and syre on weights of that network and on 100 million. Times are the
clock's, queued work included; absolute ones are in the file beside the ratios.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import overhead
import syre
import torch
from common import write_json

RESULT = Path(__file__).parents[1] / "docs" / "results" / "gpu.json"
#: What is measured beside the bare fit.
ARMS = ["standard", "full", "standard, deferred", "full, deferred", "norms in hooks"]


def main() -> None:
    """Measure and write.

    Raises:
        SystemExit: if there is no GPU, or the reduced form would overwrite what was measured.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    overhead.settings(parser)
    parser.add_argument("--width", type=int, default=4096, help="of syre's six matrices")
    parser.add_argument("--reduced", action="store_true", help="few small steps, on any machine")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.set_defaults(
        only="",
        networks=["resnet18"],
        arms=ARMS,
        batch=256,
        steps=30,
        pairs=5,
        precision="bf16-mixed",
        channels_last=True,
    )
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.reduced:
        if options.out == RESULT:
            raise SystemExit("--reduced tells no costs: give it an --out of its own")
        options.batch, options.steps, options.pairs, options.width = 4, 12, 1, 32
        options.arms, options.only = ARMS[:1], "100 M"
    elif device == "cpu":
        raise SystemExit("no GPU is at hand; --reduced --out FILE tries the script on the CPU")
    options.accelerator = "gpu" if device == "cuda" else "cpu"
    results: dict[str, Any] = {"device": torch.cuda.get_device_name() if device == "cuda" else "cpu"}
    results["overhead"] = overhead.measure(options)
    results["syre"] = syre.measure(pairs=options.pairs, width=options.width, only=options.only, device=device)
    told = ("batch", "steps", "pairs", "precision", "channels_last", "width", "reduced")
    config = {name: getattr(options, name) for name in told}
    write_json(options.out, config={**config, "lag": overhead.LAG, "every": overhead.EVERY}, results=results)


if __name__ == "__main__":
    main()
