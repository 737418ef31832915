r"""Do the six relations hold in the head of a ResNet-18 on CIFAR-10, read on test images?

Ziyin et al., 2024, arXiv 2410.03006, see all six alignments above .7 in the two fully connected layers at the
end of a ResNet-18. Here timm's ResNet-18 with a head of two linear layers without biases and ReLU between,
trained by SGD with momentum on images that are shifted and mirrored; the rate falls along a cosine, or is
constant (--constant). Layer 1 is the map from the pooled features to the hidden layer,
layer 2 the output; a is a layer's input side, b its output side. Representations, and gradients of the loss
by them, are of single test images; moments as in the paper's main text (samples normalised, centred).

On the same networks: NC1 of the hidden layer, on training and on test images (neural collapse is a case of
the relations where data are fitted), and the feature ansatz of layer 1, W'W against the mean outer product of
the outputs' gradients.

    python examples/canonical_resnet.py --data CIFAR10            # a quarter of the width, for a CPU
    python examples/canonical_resnet.py --data CIFAR10 --width 1 --small-images --images 50000 \
        --epochs 100 --decays 1e-4 5e-4 --read-at 1 10 30    # a GPU

Shape letters: N images, D features, C classes.
"""

from __future__ import annotations

import argparse
import itertools
import time
from pathlib import Path
from typing import Any

import torch
from _data import Images, add_data_arguments, load_images
from _report import save, spread, table
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_sym.functional import effective_rank, neural_collapse
from lightning_sym.functional.alignment import crh_relations, matrix_alignment, second_moment

CHANNELS = (64, 128, 256, 512)  # of a ResNet's four stages
RELATIONS = [f"{side}/{name}" for side in "ab" for name in ("rga", "rwa", "gwa")]


class Network(nn.Module):
    """A ResNet-18's pooled features and a head of two linear layers.

    Args:
        width: share of a ResNet's channels.
        small_images: a stem that keeps the size; else the usual one, which divides it by four.
        classes: of the output.
    """

    def __init__(self, *, width: float, small_images: bool, classes: int) -> None:
        import timm

        super().__init__()
        channels = [int(width * c) for c in CHANNELS]
        self.body = timm.create_model("resnet18", num_classes=0, channels=channels)
        if small_images:
            self.body.conv1 = nn.Conv2d(3, self.body.conv1.out_channels, 3, padding=1, bias=False)
            self.body.maxpool = nn.Identity()
        self.hidden = nn.Linear(channels[-1], channels[-1], bias=False)
        self.output = nn.Linear(channels[-1], classes, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``[N, C]``."""
        return self.output(torch.relu(self.hidden(self.body(x))))


def scaled(images: Images) -> tuple[Tensor, Tensor]:
    """Return images ``[N, 3, H, W]`` between -1 and 1, in memory as convolutions like it, and labels."""
    x = torch.from_numpy(images.x).permute(0, 3, 1, 2).float() / 127.5 - 1
    return x.contiguous(memory_format=torch.channels_last), torch.from_numpy(images.y)


def moved(x: Tensor, generator: torch.Generator, *, by: int = 4) -> Tensor:
    """Return the images shifted by up to some pixels, all alike, and half of them mirrored."""
    size = x.shape[2]
    down, right = (int(k) for k in torch.randint(2 * by + 1, (2,), generator=generator))
    x = F.pad(x, (by, by, by, by))[:, :, down : down + size, right : right + size]
    mirror = torch.rand(len(x), 1, 1, 1, generator=generator) < 0.5
    return torch.where(mirror.to(x.device), x.flip(3), x)


@torch.no_grad()
def features(net: Network, x: Tensor, *, batch: int = 500) -> Tensor:
    """Return the pooled features of all images, in evaluation mode."""
    training = net.training
    net.eval()
    found = torch.cat([net.body(part) for part in x.split(batch)]).double()
    net.train(training)
    return found


def head(net: Network, z_ND: Tensor, y: Tensor) -> list[dict[str, Any]]:
    """Return by layer of the head what the matrices say, from the images' features and labels."""
    weights = [net.hidden.weight.detach().double(), net.output.weight.detach().double()]
    z_ND = z_ND.detach().requires_grad_()
    above_1 = z_ND @ weights[0].mT
    below_2 = torch.relu(above_1)
    above_2 = below_2 @ weights[1].mT
    places = [(z_ND, above_1), (below_2, above_2)]
    loss = F.cross_entropy(above_2, y, reduction="sum")
    gradients = torch.autograd.grad(loss, [*itertools.chain(*places)], retain_graph=True)
    # Gradients of a random sign's worth of outputs: their second moment is the mean of J'J.
    signs = torch.randn(above_2.shape, generator=torch.Generator().manual_seed(0)).sign().to(above_2)
    by_outputs = torch.autograd.grad((above_2 * signs).sum(), [z_ND, below_2])
    rows = []
    for layer, (weight, (below, above)) in enumerate(zip(weights, places, strict=True)):
        row: dict[str, Any] = {}
        for side, h, g, z in (
            ("a", below, gradients[2 * layer], weight.mT @ weight),
            ("b", above, gradients[2 * layer + 1], weight @ weight.mT),
        ):
            found = crh_relations(second_moment(h.detach()), second_moment(g), z)
            row |= {f"{side}/{name}": float(value) for name, value in found._asdict().items()}
            row[f"{side}/rank"] = float(effective_rank(h.detach()))
        row["least"] = min(row[name] for name in RELATIONS)
        agop = second_moment(by_outputs[layer], moments="raw")
        row["ansatz"] = float(matrix_alignment(agop, weight.mT @ weight))
        rows.append(row)
    return rows


def read(net: Network, parts: dict[str, tuple[Tensor, Tensor]]) -> dict[str, Any]:
    """Return accuracies, NC1 of the hidden layer and the head's relations on test images."""
    found: dict[str, Any] = {}
    for name, (x, y) in parts.items():
        z = features(net, x)
        with torch.no_grad():
            hidden = torch.relu(z @ net.hidden.weight.double().mT)
            weight = net.output.weight.double()
            found[f"{name}_accuracy"] = float(((hidden @ weight.mT).argmax(1) == y).double().mean())
            found[f"{name}_nc1"] = float(neural_collapse(hidden, y, weight).nc1)
        if name == "test":
            found["layers"] = head(net, z, y)
    return found


def run(train: Images, test: Images, *, decay: float, seed: int, options: Any) -> list[dict[str, Any]]:
    """Train one network; return its readings, the last epoch's at the end."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(seed)
    classes = int(train.y.max()) + 1
    net = Network(width=options.width, small_images=options.small_images, classes=classes)
    net = net.to(device, memory_format=torch.channels_last)
    x, y = (part.to(device) for part in scaled(train))
    kept = slice(options.read_train)  # of training images, as many as collapse is measured on
    parts = {"train": (x[kept], y[kept]), "test": tuple(part.to(device) for part in scaled(test))}
    optimizer = torch.optim.SGD(
        net.parameters(), lr=options.lr, momentum=options.momentum, weight_decay=decay
    )
    steps = options.epochs * -(-len(x) // options.batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(1000 + seed)
    rows = []
    for epoch in range(1, options.epochs + 1):
        for index in torch.randperm(len(x), generator=generator).split(options.batch):
            optimizer.zero_grad()
            F.cross_entropy(net(moved(x[index], generator)), y[index]).backward()
            optimizer.step()
            if not options.constant:
                schedule.step()
        if epoch in options.read_at or epoch == options.epochs:
            rows.append({"epoch": epoch, **read(net, parts)})
            last = rows[-1]
            least = [round(layer["least"], 3) for layer in last["layers"]]
            print(
                f"decay {decay:g}, seed {seed}, epoch {epoch}:",
                f"{last['test_accuracy']:.3f}",
                least,
                flush=True,
            )
    return rows


def summary(runs: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """Return the spread over seeds at every reading."""
    found: dict[str, Any] = {}
    for rows in zip(*runs, strict=True):
        cell: dict[str, Any] = {
            key: spread([row[key] for row in rows]) for key in rows[0] if key not in ("epoch", "layers")
        }
        cell["layers"] = [
            {key: spread([row["layers"][k][key] for row in rows]) for key in rows[0]["layers"][k]}
            for k in range(2)
        ]
        cell["seeds with all six above .7 in both layers"] = sum(
            min(layer["least"] for layer in row["layers"]) > 0.7 for row in rows
        )
        found[str(rows[0]["epoch"])] = cell
    return found


def draw(results: dict[str, Any]) -> Any:
    """Draw the six relations of both layers at the last reading, and the least of them over epochs."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.4), layout="constrained")
    axes = figure.subplots(1, 3)
    for k, (decay, by_epoch) in enumerate(results.items()):
        last = list(by_epoch.values())[-1]
        for layer, axis in enumerate(axes[:2]):
            cells = [last["layers"][layer][name] for name in RELATIONS]
            middle = [cell["median"] for cell in cells]
            bars = [
                [cell["median"] - cell["low"] for cell in cells],
                [cell["high"] - cell["median"] for cell in cells],
            ]
            axis.errorbar(RELATIONS, middle, bars, fmt="o", capsize=2, color=f"C{k}", label=f"decay {decay}")
            line = [cell["layers"][layer]["least"]["median"] for cell in by_epoch.values()]
            epochs = [int(epoch) for epoch in by_epoch]
            axes[2].plot(epochs, line, "o-" if layer else "s--", color=f"C{k}", markersize=4)
    axes[0].set_title("layer 1, to the hidden layer")
    axes[1].set_title("layer 2, the output")
    axes[2].set(title="least of the six (dashed: layer 1)", xlabel="epoch")
    for axis in axes:
        axis.axhline(0.7, color="0.6", linestyle=":")
        axis.set_ylim(min(0, axis.get_ylim()[0]), 1.02)
    axes[0].legend(frameon=False, fontsize=7)
    return figure


def main() -> None:
    """Train, read, print the table, write JSON and picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add_data_arguments(parser)
    parser.add_argument("--out", type=Path, default=Path("runs/canonical_resnet"))
    parser.add_argument("--name", default="canonical_resnet", help="of the JSON and the picture")
    parser.add_argument("--constant", action="store_true", help="a constant learning rate")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--width", type=float, default=0.25, help="share of a ResNet's channels")
    parser.add_argument("--small-images", action="store_true", help="a stem for small images")
    parser.add_argument("--images", type=int, default=10_000, help="to train on")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--momentum", type=float, default=0.9)
    parser.add_argument("--decays", type=float, nargs="+", default=[2e-3])
    parser.add_argument("--read-at", type=int, nargs="+", default=[2], help="epochs")
    parser.add_argument("--read-train", type=int, default=2000, help="training images collapse is read on")
    options = parser.parse_args()
    if options.smoke:
        options.seeds, options.images, options.epochs, options.read_at = [0], 1280, 6, [2]
        options.width, options.lr, options.batch, options.decays = 0.125, 0.03, 64, [1e-4, 3e-2]
    began = time.process_time()
    train = load_images(options.data, smoke=options.smoke).take(options.images, seed=0)
    test = load_images(options.data, smoke=options.smoke, train=False)
    runs: dict[str, list[list[dict[str, Any]]]] = {f"{decay:g}": [] for decay in options.decays}
    config = {k: v for k, v in vars(options).items() if k not in ("out", "data", "name")} | {
        "images_of": train.name
    }
    for done, seed in enumerate(options.seeds, start=1):
        for decay in options.decays:
            runs[f"{decay:g}"].append(run(train, test, decay=decay, seed=seed, options=options))
        results = {decay: summary(rows) for decay, rows in runs.items()}
        result = {
            "config": config | {"seeds": options.seeds[:done]},
            "cpu_seconds": time.process_time() - began,
            "results": results,
        }
        save(options.out, options.name, result, draw(results))  # a long run may be cut short
    rows = []
    for decay, by_epoch in results.items():
        for epoch, cell in by_epoch.items():
            least = [
                value
                for layer in cell["layers"]
                for value in (layer["least"]["median"], layer["least"]["low"])
            ]
            names = ("train_accuracy", "test_accuracy", "train_nc1", "test_nc1")
            ansatz = cell["layers"][0]["ansatz"]["median"]
            rows.append((decay, epoch, *(cell[name]["median"] for name in names), *least, ansatz))
    header = ("decay", "epoch", "train", "test", "NC1", "NC1, test")
    print(table(rows, (*header, "least, 1", "worst seed", "least, 2", "worst seed", "ansatz")))


if __name__ == "__main__":
    main()
