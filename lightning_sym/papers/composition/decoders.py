"""Decoders from a code of coordinates to an image, as LightningModules ready to fit.

Architectures and settings of "Compositional Generalization Requires More Than Disentangled
Representations" (Liang et al., arXiv:2501.18797). Data: ``GaussianBumpsDataModule``.

Shape letters: B batch, E code length, S pixels a side, P = S * S pixels, D width.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from typing_extensions import override

from lightning_sym.papers.composition._checks import check_count, check_weight


@contextlib.contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Draw initial weights from ``seed``, and leave the global generator as it was; ``None``: from it."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


class BumpDecoder(LightningModule):
    """What the decoders share: mean squared error, its two validation sets, AdamW.

    A batch is ``(code [B, E], image [B, 1, S, S])``. Logs ``mse/train`` each epoch and, for the
    validation loaders of ``GaussianBumpsDataModule``, ``mse/id`` and ``mse/ood``.

    Args:
        code_length: ``E``.
        size: ``S``.
        lr: learning rate of AdamW.
        weight_decay: of AdamW.

    Attributes:
        anneal: let the learning rate fall to 0 over the fit, along a cosine. Not the paper's; it makes a
            short run comparable with a long one, whose error out of distribution jumps from step to step.

    Raises:
        ValueError: if a length is not a positive integer or a rate is out of its range.
    """

    anneal: bool = False

    def __init__(self, code_length: int, *, size: int, lr: float, weight_decay: float) -> None:
        super().__init__()
        check_count(code_length, "code_length")
        check_count(size, "size")
        check_weight(lr, "lr")
        check_weight(weight_decay, "weight_decay")
        self.code_length, self.size, self.lr, self.weight_decay = code_length, size, lr, weight_decay

    def draw(self, code: Tensor) -> Tensor:
        """Return the images ``[B, 1, S, S]`` of codes ``[B, E]`` of the right length."""
        raise NotImplementedError

    def penalty(self) -> Tensor | None:
        """Return what is added to the training loss, or ``None``."""
        return None

    @override
    def forward(self, code: Tensor) -> Tensor:
        """Return the images ``[B, 1, S, S]`` of codes ``[B, E]``.

        Raises:
            ValueError: if the codes are not of the length the decoder was made for.
        """
        if code.ndim != 2 or code.shape[1] != self.code_length:
            raise ValueError(f"code must be [B, {self.code_length}], got {tuple(code.shape)}")
        return self.draw(code)

    @override
    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        code, image = batch
        loss = nn.functional.mse_loss(self(code), image)
        self.log("mse/train", loss, on_step=False, on_epoch=True, batch_size=len(code), sync_dist=True)
        penalty = self.penalty()
        return loss if penalty is None else loss + penalty

    @override
    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        code, image = batch
        name = ("id", "ood")[dataloader_idx] if dataloader_idx < 2 else str(dataloader_idx)
        loss = nn.functional.mse_loss(self(code), image)
        self.log(f"mse/{name}", loss, batch_size=len(code), add_dataloader_idx=False, sync_dist=True)

    @override
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=self.weight_decay)
        if not self.anneal:
            return optimizer
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class TransposedConvDecoder(BumpDecoder):
    """Transposed convolutions from one pixel to an image.

    The first layer makes an image of 7 x 7 pixels (for ``size=28``; in general ``size`` halved while
    it is even and above 7). Hidden layers double it (kernel 4, stride 2) until it is full size, and
    keep it so from there on (kernel 3). ReLU after each but the last.

    Args:
        code_length: ``E``.
        size: ``S``.
        channels: of each hidden image; the paper has 64, and up to 256.
        hidden_layers: after the first; the paper has 2 to 10.
        lr: learning rate of AdamW.
        weight_decay: of AdamW.
        seed: of the initial weights; ``None``: torch's global generator.

    Raises:
        ValueError: if a number is out of its range or the hidden layers are too few to reach ``size``.
    """

    def __init__(
        self,
        code_length: int = 56,
        *,
        size: int = 28,
        channels: int = 64,
        hidden_layers: int = 4,
        lr: float = 1e-3,
        weight_decay: float = 0.01,
        seed: int | None = None,
    ) -> None:
        super().__init__(code_length, size=size, lr=lr, weight_decay=weight_decay)
        check_count(channels, "channels")
        check_count(hidden_layers, "hidden_layers")
        doublings, start = 0, size
        while start % 2 == 0 and start > 7:
            doublings, start = doublings + 1, start // 2
        if hidden_layers < doublings:
            raise ValueError(
                f"hidden_layers must be at least {doublings} to get from {start} to {size} pixels a side, "
                f"got {hidden_layers}"
            )
        with seeded(seed):
            layers: list[nn.Module] = [nn.ConvTranspose2d(code_length, channels, start), nn.ReLU()]
            for layer in range(hidden_layers):
                kernel, stride = (4, 2) if layer < doublings else (3, 1)
                layers += [nn.ConvTranspose2d(channels, channels, kernel, stride, padding=1), nn.ReLU()]
            layers.append(nn.ConvTranspose2d(channels, 1, 3, padding=1))
        self.net = nn.Sequential(*layers)

    @override
    def draw(self, code: Tensor) -> Tensor:
        return self.net(code[:, :, None, None])


class MLPDecoder(BumpDecoder):
    """Linear layers and ReLUs, the last with one output a pixel.

    Args:
        code_length: ``E``.
        size: ``S``.
        width: of the hidden layers.
        hidden_layers: the paper has 3 to 7.
        lr: learning rate of AdamW.
        weight_decay: of AdamW.
        seed: of the initial weights; ``None``: torch's global generator.

    Raises:
        ValueError: if a number is out of its range.
    """

    def __init__(
        self,
        code_length: int = 56,
        *,
        size: int = 28,
        width: int = 256,
        hidden_layers: int = 3,
        lr: float = 1e-3,
        weight_decay: float = 0.01,
        seed: int | None = None,
    ) -> None:
        super().__init__(code_length, size=size, lr=lr, weight_decay=weight_decay)
        check_count(width, "width")
        check_count(hidden_layers, "hidden_layers")
        with seeded(seed):
            layers: list[nn.Module] = []
            for layer in range(hidden_layers):
                layers += [nn.Linear(width if layer else code_length, width), nn.ReLU()]
            layers.append(nn.Linear(width, size * size))
        self.net = nn.Sequential(*layers)

    @override
    def draw(self, code: Tensor) -> Tensor:
        return self.net(code).view(-1, 1, self.size, self.size)


class PositionMLPDecoder(BumpDecoder):
    """One small MLP for every pixel, which is told the code and where the pixel is.

    The code goes through one linear layer, to which a fixed two-dimensional sinusoidal encoding of
    the pixel's place is added; then linear layers and PReLUs, and a linear layer to one value.

    Args:
        code_length: ``E``.
        size: ``S``.
        width: ``D``, a multiple of 4.
        hidden_layers: the paper has 2 and 4.
        lr: learning rate of AdamW.
        weight_decay: of AdamW.
        seed: of the initial weights; ``None``: torch's global generator.

    Raises:
        ValueError: if a number is out of its range or ``width`` is not a multiple of 4.
    """

    position: Tensor

    def __init__(
        self,
        code_length: int = 56,
        *,
        size: int = 28,
        width: int = 256,
        hidden_layers: int = 4,
        lr: float = 1e-3,
        weight_decay: float = 1e-4,
        seed: int | None = None,
    ) -> None:
        super().__init__(code_length, size=size, lr=lr, weight_decay=weight_decay)
        check_count(width, "width")
        check_count(hidden_layers, "hidden_layers")
        if width % 4:
            raise ValueError(f"width must be a multiple of 4 (sine and cosine of x and of y), got {width}")
        with seeded(seed):
            self.embed = nn.Linear(code_length, width)
            layers: list[nn.Module] = []
            for _ in range(hidden_layers):
                layers += [nn.Linear(width, width), nn.PReLU()]
            self.net = nn.Sequential(*layers, nn.Linear(width, 1))
        self.register_buffer("position", position_encoding(size, width), persistent=False)

    @override
    def draw(self, code: Tensor) -> Tensor:
        tokens_BPD = self.embed(code)[:, None] + self.position
        return self.net(tokens_BPD).view(-1, 1, self.size, self.size)


def position_encoding(size: int, width: int) -> Tensor:
    r"""Return sines and cosines of each pixel's row and column, ``[P, D]``, rows slowest.

    Columns ``4k ... 4k + 3`` are :math:`\sin(r w_k), \cos(r w_k), \sin(c w_k), \cos(c w_k)` with
    :math:`w_k = 10000^{-4k / D}` for row ``r`` and column ``c``.
    """
    frequency_K = torch.exp(torch.arange(0, width, 4) * (-math.log(10000.0) / width))
    angle_SK = torch.arange(size)[:, None] * frequency_K
    wave_SK2 = torch.stack([angle_SK.sin(), angle_SK.cos()], dim=-1)
    row = wave_SK2[:, None].expand(size, size, -1, 2)
    column = wave_SK2[None].expand(size, size, -1, 2)
    return torch.cat([row, column], dim=-1).reshape(size * size, width)
