"""Models: each fitted by a Trainer and in a plain loop, and on two ranks and one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_sym import watch
from lightning_sym.callbacks import CollapseMonitor, KNNProbe, LinearProbe, Monitor, Syre
from lightning_sym.optim import attach_syre
from tests.matrix.rows import Column, Outcome, fitted, outcome, watching
from tests.matrix.several import ONE, one, two
from tests.observe.test_kinds import Conv1D, Experts, LoRA, Pairing, Recurrent
from tests.promises.every import BATCH, Module
from tests.promises.ranked import shares

SAMPLES, CLASSES, WORDS = 24, 3, 11


class Tokens(nn.Module):
    """A small GPT-2: ``Conv1D`` for the maps, and the output map is the embedding's own weight."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(WORDS, width), nn.Embedding(5, width)
        self.norm, self.c_attn, self.c_proj = (
            nn.LayerNorm(width),
            Conv1D(3 * width, width),
            Conv1D(width, width),
        )
        self.c_fc, self.c_out = Conv1D(2 * width, width), Conv1D(width, 2 * width)
        self.head = nn.Linear(width, WORDS, bias=False)
        for layer in (self.c_attn, self.c_proj, self.c_fc, self.c_out):
            nn.init.normal_(layer.weight, std=0.3)
        self.head.weight = self.words.weight

    def forward(self, x: Tensor) -> Tensor:
        h = self.words(x) + self.places.weight
        q, k, v = self.c_attn(self.norm(h)).chunk(3, -1)
        h = h + self.c_proj(nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True))
        h = h + self.c_out(nn.functional.gelu(self.c_fc(h)))
        return self.head(h)[:, -1]


class Twice(nn.Module):
    """Calls one layer twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.shared, self.last = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = self.shared(torch.tanh(self.first(x)))
        return self.last(torch.tanh(self.shared(torch.tanh(h))))


def resnet() -> nn.Module:
    """Return timm's, narrow."""
    from timm.models.resnet import BasicBlock, ResNet

    return ResNet(BasicBlock, (1, 1, 1, 1), num_classes=CLASSES, in_chans=1, channels=(4, 4, 8, 8))


def vit() -> nn.Module:
    """Return timm's, small."""
    from timm.models.vision_transformer import VisionTransformer

    shape = {"img_size": 8, "patch_size": 4, "in_chans": 1, "num_classes": CLASSES}
    return VisionTransformer(**shape, embed_dim=8, depth=1, num_heads=2)


def with_lora() -> nn.Module:
    """Return a frozen layer, an adapted one, and a head."""
    frozen = nn.Linear(6, 8).requires_grad_(False)
    adapted = LoRA(8, 7)
    nn.init.normal_(adapted.lora_B["default"].weight)
    return nn.Sequential(frozen, nn.Tanh(), adapted, nn.Tanh(), nn.Linear(7, CLASSES))


def transposed() -> nn.Module:
    """Return a network with transposed convolutions."""
    up = nn.ConvTranspose2d(2, 4, 3, stride=2, padding=1, output_padding=1, groups=2)
    return nn.Sequential(
        up, nn.ReLU(), nn.ConvTranspose2d(4, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(75, CLASSES)
    )


def maps() -> nn.Module:
    """Return layers of transformers' kind."""
    return nn.Sequential(Conv1D(7, 6), nn.Tanh(), Conv1D(5, 7), nn.Tanh(), nn.Linear(5, CLASSES))


def lazy() -> nn.Module:
    """Return layers that get their shape from the first batch."""
    return nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.LazyLinear(CLASSES))


def pairs() -> nn.Module:
    """Return a network with a bilinear layer."""
    return Pairing()


#: A model and the shape of a sample; None: tokens.
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...] | None]] = {
    "timm ResNet": (resnet, (1, 32, 32)),
    "timm ViT": (vit, (1, 8, 8)),
    "GPT-2-like, tied embeddings, `Conv1D`": (Tokens, None),
    "`Conv1D` alone": (maps, (6,)),
    "LSTM": (partial(Recurrent, nn.LSTM, batch_first=True), (4, 3)),
    "transposed convolutions": (transposed, (2, 2, 2)),
    "mixture of experts": (partial(Experts, "linear"), (4, 3)),
    "bilinear": (pairs, (3, 3)),
    "a layer called twice": (Twice, (6,)),
    "frozen backbone with LoRA": (with_lora, (6,)),
    "lazy layers": (lazy, (6,)),
}


class Fitted(Module):
    """Fits a model to class labels."""

    def __init__(self, name: str) -> None:
        super().__init__("mlp")
        torch.manual_seed(0)
        self.net = MODELS[name][0]().double()

    def embed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the output, twice."""
        y = self.net(x)
        return y, y

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return SGD of what is trained."""
        trained = [p for p in self.parameters() if p.requires_grad]
        return torch.optim.SGD(trained, **self.settings)


def data(name: str) -> TensorDataset:
    """Return samples of a model, labels and other labels."""
    shape = MODELS[name][1]
    generator = torch.Generator().manual_seed(5)
    if shape is None:
        x = torch.randint(0, WORDS, (SAMPLES, 5), generator=generator)
    else:
        x = torch.randn(SAMPLES, *shape, generator=generator).double()
    if name == "mixture of experts":
        x[1::2, :, 1] = -x[
            1::2, :, 1
        ].abs()  # every second sample, of the second rank, has none for the third
    return TensorDataset(x, torch.arange(SAMPLES) % CLASSES, torch.arange(SAMPLES) // 2 % 2)


def watch_of(name: str) -> list[Monitor]:
    """Return monitors for a model."""
    chosen = watching()
    if name == "lazy layers":  # causes are found by running the module, which has no shape yet
        chosen[0] = CollapseMonitor(every_n_steps=1, targets=1, histograms=True)
    for monitor in chosen:
        monitor.strict = False
        if isinstance(monitor, KNNProbe | LinearProbe):
            monitor.train = monitor.val = DataLoader(data(name), BATCH)
    return chosen


def fit(name: str, callbacks: Sequence[Any], *_: Any) -> Outcome:
    """Fit a model with a Trainer."""
    return fitted(callbacks, Fitted(name), loader=DataLoader(data(name), BATCH))


def loop(name: str, callbacks: Sequence[Any], *_: Any) -> Outcome:
    """Train it in a plain loop."""
    module = Fitted(name)
    optimizer = module.configure_optimizers()
    monitors = [each for each in callbacks if isinstance(each, Monitor)]
    for each in callbacks:
        if isinstance(each, Syre):
            named = module.named_parameters()
            attach_syre(optimizer, sigma=each.sigma, seed=each.seed, named_parameters=named)
    if not monitors:
        _steps(name, module, optimizer, None)
    else:
        with watch(module, optimizer, monitors) as watched:
            _steps(name, module, optimizer, watched)
    return outcome(module, [optimizer], callbacks)


def _steps(name: str, module: Any, optimizer: Any, watched: Any) -> None:
    for _ in range(2):
        module.train()
        for batch in DataLoader(data(name), BATCH):
            if watched is not None:
                watched.batch(batch)
            loss = nn.functional.cross_entropy(module(batch[0]), batch[1])
            if watched is not None:
                watched.loss(loss)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if watched is not None:
            watched.epoch_end()


def on(count: Callable[..., Outcome], name: str, callbacks: Sequence[Any], folder: Any) -> Outcome:
    """Fit a model on ranks, or in one process."""
    return count(callbacks, folder, make=partial(Fitted, name), data=lambda: shares(data(name), BATCH))


#: Batch statistics are those of a rank's own batch; DDP takes no lazy layers.
NOT_ON_RANKS = ("timm ResNet", "lazy layers")
#: Tokens that came to an expert are halved by their order there, which is another on each rank.
OF_EXPERTS = {
    "unread": r"participation_ratio|directions|alignment/net\.(up|down)|alignment/(mean|null)",
    "note": "what comes from halves of an expert's tokens is not compared",
}
REFUSED = {
    "lazy layers": {
        "CircuitMonitor": "net.0.weight and others have no values yet",
        "FeatureLearningMonitor": "net.0.weight has no values yet",
        "BalanceMonitor": "module must have been run once",
        "HierarchyMonitor": "module must have been run once",
        "Syre": "parameters without a shape, of lazy layers",
    }
}
NEEDS = {name: "timm" for name in MODELS if name.startswith("timm")}
COLUMNS = [
    Column(
        name, partial(fit, name), partial(loop, name), "a plain loop", watch=partial(watch_of, name),
        needs=NEEDS.get(name, ""), refused=REFUSED.get(name, {}),
    )
    for name in MODELS
] + [
    Column(
        f"{name}, on two ranks", partial(on, two, name), partial(on, one, name), ONE,
        places=1e-5 if "ViT" in name else 1e-6,  # ranks of a spectrum that is nearly empty
        watch=partial(watch_of, name), needs=NEEDS.get(name, ""), **(OF_EXPERTS if "expert" in name else {}),
    )
    for name in MODELS
    if name not in NOT_ON_RANKS
]  # fmt: skip
