"""Posterior collapse: how many latent dimensions does a variational autoencoder still use?

A latent dimension whose posterior equals the prior carries nothing; decoder and encoder weights of it are
then at zero, on the mirror of the latent's sign flip, from where the loss's gradient leads nowhere. A large
``beta`` in ``reconstruction + beta * KL`` and weight decay both lead there. Arms differ in the decay alone:
none, towards 0, towards a random point (syre, small as proposed and of the initial weights' size), towards
the initial weights. Rank never stands alone: a collapsed encoder's output of nearly nothing still has the
full rank of theta_0. The active latents (a threshold on an absolute scale) and the losses tell. Setting after
Ziyin et al., 2024, arXiv 2408.15495; active units after Burda et al., 2015, arXiv 1509.00519.

Shape letters: B batch, N images, D pixels, L latents.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from _report import save, spread, table
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_sym.functional import effective_rank
from lightning_sym.optim import attach_syre

ARMS = {
    "plain": "no decay",
    "decay": "towards 0",
    "syre": "towards theta_0",
    "large": "towards a large theta_0",
    "init": "towards the start",
}
ACTIVE = 0.01  # least variance over images of an active latent's posterior mean
COLUMNS = ("active", "rank", "error", "kl", "bound")


class Autoencoder(nn.Module):
    """Encoder and decoder with one hidden layer each, independent pixels."""

    def __init__(self, pixels: int, hidden: int, latents: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(pixels, hidden), nn.ReLU(), nn.Linear(hidden, 2 * latents))
        self.decoder = nn.Sequential(nn.Linear(latents, hidden), nn.ReLU(), nn.Linear(hidden, pixels))

    def encode(self, x_ND: Tensor) -> tuple[Tensor, Tensor]:
        """Return the posterior's means and log variances, ``[N, L]`` each."""
        mean_NL, log_variance_NL = self.encoder(x_ND).chunk(2, dim=1)
        return mean_NL, log_variance_NL

    def terms(self, x_ND: Tensor, noise_NL: Tensor) -> tuple[Tensor, Tensor]:
        """Return the pixels' cross-entropy and the KL divergence, ``[N]`` each, in nats."""
        mean_NL, log_variance_NL = self.encode(x_ND)
        logits_ND = self.decoder(mean_NL + noise_NL * (log_variance_NL / 2).exp())
        cross_N = F.binary_cross_entropy_with_logits(logits_ND, x_ND, reduction="none").sum(1)
        kl_N = 0.5 * (mean_NL.square() + log_variance_NL.exp() - 1 - log_variance_NL).sum(1)
        return cross_N, kl_N


def load(name: str, root: Path) -> tuple[Tensor, Tensor]:
    """Return training and held-out images with pixels in [0, 1], ``[N, D]``."""
    if name == "mnist":
        from torchvision.datasets import MNIST

        train, test = (MNIST(root, train=train).data.flatten(1).float() / 255 for train in (True, False))
        return train[:10_000], test[:2000]
    from sklearn.datasets import load_digits

    x = torch.from_numpy(load_digits().data).float() / 16
    held_out = torch.arange(len(x)) % 5 == 0
    return x[~held_out], x[held_out]


def train(arm: str, beta: float, decay: float, seed: int, data: tuple[Tensor, Tensor], options: Any) -> Any:
    """Train one autoencoder and measure it on held-out images."""
    x_train, x_test = data
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Autoencoder(x_train.shape[1], options.hidden, options.latents)
    first = [p.detach().clone() for p in model.parameters()]
    native = decay if arm in ("decay", "syre", "large") else 0.0
    optimizer = torch.optim.Adam(model.parameters(), lr=options.lr, weight_decay=native)
    if arm in ("syre", "large"):
        sigma = options.sigma if arm == "syre" else options.large
        attach_syre(optimizer, sigma=sigma, seed=seed, named_parameters=model.named_parameters())
    generator = torch.Generator().manual_seed(1000 + seed)
    for _ in range(options.steps):
        index = torch.randint(len(x_train), (options.batch,), generator=generator)
        noise = torch.randn(options.batch, options.latents, generator=generator)
        cross, kl = model.terms(x_train[index], noise)
        optimizer.zero_grad()
        (cross + beta * kl).mean().backward()
        if arm == "init":
            with torch.no_grad():
                for p, start in zip(model.parameters(), first, strict=True):
                    p.grad += decay * (p - start)
        optimizer.step()
    return measure(model, x_test, generator)


@torch.no_grad()
def measure(model: Autoencoder, x_ND: Tensor, generator: torch.Generator) -> dict[str, float]:
    """Return how many latents are in use, and what the autoencoder is worth."""
    mean_NL, _ = model.encode(x_ND)
    cross_N, kl_N = model.terms(x_ND, torch.randn(mean_NL.shape, generator=generator))
    rebuilt_ND = model.decoder(mean_NL).sigmoid()
    return {
        "active": float((mean_NL.var(0) > ACTIVE).sum()),
        "rank": float(effective_rank(mean_NL)),
        "error": float((rebuilt_ND - x_ND).square().sum() / (x_ND - x_ND.mean(0)).square().sum()),
        "kl": float(kl_N.mean()),
        "bound": float((cross_N + kl_N).mean()),
    }


def draw(results: dict[str, Any], options: Any) -> Any:
    """Draw active latents and reconstruction error over the decay, one row a beta."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 2.5 * len(options.betas)), layout="constrained")
    axes = figure.subplots(len(options.betas), 3, squeeze=False)
    names = {"active": f"active latents of {options.latents}", "rank": "effective rank", "error": "error"}
    for row, beta in zip(axes, options.betas, strict=True):
        for axis, (key, title) in zip(row, names.items(), strict=True):
            plain = results[f"beta {beta:g} plain"][key]["mean"]
            axis.axhline(plain, color="black", linewidth=0.8, label=ARMS["plain"])
            for arm in list(ARMS)[1:]:
                cells = [results[f"beta {beta:g} {arm} {decay:g}"][key] for decay in options.decays]
                means, bars = [c["mean"] for c in cells], [c["std"] for c in cells]
                axis.errorbar(options.decays, means, bars, marker="o", markersize=3, label=ARMS[arm])
            axis.set_xscale("log")
            axis.set_ylim(bottom=0)
            axis.set_title(f"beta {beta:g}: {title}", fontsize=9)
    for axis in axes[-1]:
        axis.set_xlabel("weight decay")
    axes[0][0].legend(frameon=False, fontsize=7)
    return figure


def main() -> None:
    """Run every arm at every beta and decay, and write table, JSON and picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/collapse_vae"))
    parser.add_argument("--name", default="collapse_vae", help="of the JSON and the picture")
    parser.add_argument("--data", choices=["digits", "mnist"], default="digits")
    parser.add_argument("--root", type=Path, default=Path("data"), help="where torchvision's MNIST lies")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--latents", type=int, default=16)
    parser.add_argument("--betas", type=float, nargs="+", default=[1.0, 2.0])
    parser.add_argument("--decays", type=float, nargs="+", default=[1e-3, 1e-2, 1e-1])
    parser.add_argument("--sigma", type=float, default=0.1, help="relative to the initialisation scale")
    parser.add_argument("--large", type=float, default=0.5, help="sigma of the arm with a large theta_0")
    parser.add_argument("--smoke", action="store_true", help="seconds: two seeds, one decay, few steps")
    options = parser.parse_args()
    if options.smoke:
        options.seeds, options.steps, options.decays, options.betas = 2, 250, [1e-2], [0.5, 50.0]
    data = load(options.data, options.root)
    results: dict[str, Any] = {}
    for beta in options.betas:
        for arm in ARMS:
            for decay in [0.0] if arm == "plain" else options.decays:
                seeds = [train(arm, beta, decay, seed, data, options) for seed in range(options.seeds)]
                name = f"beta {beta:g} {arm}" + ("" if arm == "plain" else f" {decay:g}")
                results[name] = {key: spread([s[key] for s in seeds]) for key in COLUMNS} | {"seeds": seeds}
                print(f"{name}: {results[name]['active']['mean']:.1f} active", flush=True)
    rows = [
        [name, *(f"{r[key]['mean']:.3g} +- {r[key]['std']:.1g}" for key in COLUMNS)]
        for name, r in results.items()
    ]
    print(table(rows, ["arm", *COLUMNS]))
    config = {k: v for k, v in vars(options).items() if k not in ("out", "name", "root")}
    save(options.out, options.name, {"config": config, "results": results}, draw(results, options))


if __name__ == "__main__":
    main()
