"""Two monitors of one's own, written against the public API alone: what a monitor needs, and what it reads.

    python examples/own_monitors.py            # a few seconds
    python examples/own_monitors.py --smoke    # one epoch

``UnitNoise`` reads each output unit's gradient from sums over single samples that the engine keeps while the
step runs; ``SpectralNorms`` reads parameters alone, so that it can be due at the ends of epochs. Hooks,
ranks, accumulation, loggers and checkpoints are not their business.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_sym import watch
from lightning_sym.callbacks import EpochEnds, Monitor
from lightning_sym.observe import Observation, Reading, SecondMoments, Weight


class UnitNoise(Monitor):
    """Signal to noise of each output unit's gradient: ``|mean| / standard deviation`` over samples."""

    quantity = "unit_noise"
    gradients = SecondMoments("output_gradients", max_width=None)
    needs = (gradients,)

    def read(self, seen: Observation) -> Iterator[Reading]:
        """Yield ``unit_noise/<layer>/median``, over units, and all of them, a histogram."""
        for layer in seen.layers:
            if (g := layer.get(self.gradients)) is not None:
                units = g.mean.abs() / g.covariance.diagonal().clamp_min(0).sqrt()
                yield Reading(layer.name, "median", units.nanmedian())
                yield Reading(layer.name, "units", units)


class SpectralNorms(Monitor):
    """Largest singular value of each weight, at the end of an epoch."""

    quantity = "spectral_norm"
    weight = Weight()
    needs = (weight,)

    def read(self, seen: Observation) -> Iterator[Reading]:
        """Yield ``spectral_norm/<layer>``, at least 0."""
        for layer in seen.layers:
            if (weight := layer.get(self.weight)) is not None:
                yield Reading(layer.name, "", weight.singular_values[0])


def train(*, epochs: int, seed: int = 0) -> list[Monitor]:
    """Train on points of three classes, in a plain loop, and return the monitors."""
    torch.manual_seed(seed)
    centers = 2 * torch.randn(3, 8)
    y = torch.arange(480) % 3
    loader = DataLoader(TensorDataset(centers[y] + torch.randn(480, 8), y), batch_size=48, shuffle=True)
    net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 3))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    own: list[Monitor] = [UnitNoise(every_n_steps=10), SpectralNorms(every_n_steps=EpochEnds())]
    with watch(net, optimizer, own) as watching:
        for _ in range(epochs):
            for x, labels in loader:
                watching.batch((x, labels))
                optimizer.zero_grad()
                nn.functional.cross_entropy(net(x), labels).backward()
                optimizer.step()
            watching.epoch_end()
    return own


def main() -> None:
    """Train and print first and last readings."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--smoke", action="store_true", help="one epoch")
    args = parser.parse_args()
    for monitor in train(epochs=1 if args.smoke else args.epochs):
        for row in (monitor.history[0], monitor.history[-1]):
            print(", ".join(f"{key} {value:.3g}" for key, value in row.items()))


if __name__ == "__main__":
    main()
