"""The networks of the fresh cases.

Shape letters: N samples, T positions, F features, E experts.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .common import Measures

Activation = Callable[[], nn.Module]


def deep(
    inputs: int,
    width: int,
    hidden: int,
    outputs: int,
    *,
    act: Activation = nn.ReLU,
    norm: bool = False,
    bias: tuple[int, float] | None = None,
    gain: float = 1.0,
    zero: bool = False,
) -> nn.Sequential:
    """Return a perceptron.

    Args:
        inputs: how many.
        width: of hidden layers.
        hidden: how many there are.
        outputs: how many.
        act: between them.
        norm: layer normalisation before the activation.
        bias: of which hidden layer all biases (after normalisation) have which value.
        gain: multiplies every weight.
        zero: everything begins at zero.
    """
    layers: list[nn.Module] = []
    for at, (a, b) in enumerate(itertools.pairwise([inputs, *[width] * hidden, outputs])):
        layer = nn.Linear(a, b)
        after = nn.LayerNorm(b) if norm else nn.Identity()
        with torch.no_grad():
            layer.weight *= 0.0 if zero else gain
            layer.bias *= 0.0 if zero else 1.0
            if bias is not None and at == bias[0]:
                (after if norm else layer).bias.fill_(bias[1])  # type: ignore[union-attr, operator]
        layers += [layer, after, act()] if at < hidden else [layer]
    return nn.Sequential(*layers)


class Mixer(nn.Module):
    """Positions (rows of an image) and channels are mixed in turn."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(8, 32), nn.Linear(32, 10)
        self.over_rows = nn.ModuleList(deep(8, 16, 1, 8, act=nn.GELU) for _ in range(2))
        self.over_channels = nn.ModuleList(deep(32, 64, 1, 32, act=nn.GELU) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        x = self.first(x.reshape(-1, 8, 8))
        for rows, channels in zip(self.over_rows, self.over_channels, strict=True):
            x = x + rows(x.mT).mT
            x = x + channels(F.layer_norm(x, x.shape[-1:]))
        return self.head(x.mean(1))


class Squeezing(nn.Module):
    """Convolutions whose channels are weighed by a sigmoid of their means."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(1, 24, 3, padding=1), nn.Conv2d(24, 24, 3, 2, 1)])
        self.norms = nn.ModuleList(nn.BatchNorm2d(24) for _ in range(2))
        self.gates = nn.ModuleList(deep(24, 8, 1, 24) for _ in range(2))
        self.head = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        for conv, norm, gate in zip(self.convs, self.norms, self.gates, strict=True):
            x = F.relu(norm(conv(x)))
            x = x * gate(x.mean((2, 3))).sigmoid()[..., None, None]
        return self.head(x.amax((2, 3)))


class Skips(nn.Module):
    """Residual blocks with a trained gain.

    Args:
        gain: at the start.
        shut: which block has a gain of zero that is not trained.
    """

    def __init__(self, *, gain: float = 1.0, shut: int | None = None) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(64, 48), nn.Linear(48, 10)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(48), deep(48, 96, 1, 48, act=nn.GELU)) for _ in range(4)
        )
        self.gains = nn.ParameterList(nn.Parameter(torch.full((48,), gain)) for _ in range(4))
        if shut is not None:
            self.gains[shut].data.zero_()
            self.gains[shut].requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        x = self.first(x)
        for block, gain in zip(self.blocks, self.gains, strict=True):
            x = x + gain * block(x)
        return self.head(x)


class Words(nn.Module):
    """A bag of words out of a large table."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.rest = nn.Embedding(500, 24), deep(24, 32, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        return self.rest(self.table(x).mean(1))


class Teacher(nn.Module):
    """A network and a frozen one: a teacher, or itself at the start.

    Args:
        centred: the output is this many times the difference to the start; 0: the student's output.
    """

    def __init__(self, *, centred: float = 0.0) -> None:
        super().__init__()
        self.frozen, self.student = deep(64, 128, 2, 10, gain=1.5), deep(64, 128, 2, 10)
        self.centred = centred
        if centred:
            self.frozen.load_state_dict(self.student.state_dict())
        self.frozen.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the student's logits, or the difference."""
        return self.centred * (self.student(x) - self.frozen(x)) if self.centred else self.student(x)

    def distil(self, x: Tensor) -> Tensor:
        """Return the distance of the student's outputs from the teacher's."""
        return F.mse_loss(self.student(x), self.frozen(x))

    def apart(self, x: Tensor) -> Measures:
        """Return that distance over the variance of the teacher's outputs."""
        with torch.no_grad():
            return {"apart": float(self.distil(x) / self.frozen(x).var(0).mean())}


class Experts(nn.Module):
    """Each sample goes to one of four experts, weighed by its share."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(64, 4)
        self.experts = nn.ModuleList(deep(64, 48, 1, 10) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        share_N, best_N = self.gate(x).softmax(-1).max(-1)
        out = x.new_zeros(len(x), 10)
        for at, expert in enumerate(self.experts):
            mine = (best_N == at).nonzero().squeeze(1)
            if len(mine):
                out = out.index_add(0, mine, share_N[mine, None] * expert(x[mine]))
        return out


class Cells(nn.Module):
    """A GRU cell in a loop over rows."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.GRUCell(8, 32), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        h = x.new_zeros(len(x), 32)
        for row in x.unbind(1):
            h = self.cell(row, h)
        return self.head(h)


class Unrolled(nn.Module):
    """A tanh recurrence as two linear layers in a loop.

    Args:
        gain: of the orthogonal recurrent weights.
    """

    def __init__(self, *, gain: float = 1.0) -> None:
        super().__init__()
        self.into, self.again, self.head = nn.Linear(8, 48), nn.Linear(48, 48), nn.Linear(48, 10)
        nn.init.orthogonal_(self.again.weight, gain)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        h = x.new_zeros(len(x), 48)
        for row in x.unbind(1):
            h = torch.tanh(self.into(row) + self.again(h))
        return self.head(h)


class Attentive(nn.Module):
    """Two encoder layers of torch's, normalisation after the sum.

    Args:
        keys: multiplies queries and keys; at 0 they are not trained either.
    """

    def __init__(self, *, keys: float = 1.0) -> None:
        super().__init__()
        self.first, self.place = nn.Linear(8, 32), nn.Parameter(0.1 * torch.randn(1, 8, 32))
        layer = nn.TransformerEncoderLayer(32, 4, 64, 0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(32, 10)
        for each in self.encoder.layers:
            weight, bias = each.self_attn.in_proj_weight, each.self_attn.in_proj_bias  # type: ignore[union-attr]
            with torch.no_grad():
                weight[:64] *= keys  # type: ignore[index, operator]
                bias[:64] *= keys  # type: ignore[index, operator]

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        return self.head(self.encoder(self.first(x) + self.place).mean(1))

    def focus(self, x: Tensor) -> float:
        """Return the largest attention weight of each position in the first layer, on average."""
        x = self.first(x) + self.place
        weights = self.encoder.layers[0].self_attn(x, x, x, average_attn_weights=False)[1]  # type: ignore[union-attr, operator]
        return float(weights.amax(-1).mean())


class Separate(nn.Module):
    """Three layers called by hand.

    Args:
        narrow: width of the one in the middle.
        blind: it runs without gradients.
    """

    def __init__(self, narrow: int, *, blind: bool = False) -> None:
        super().__init__()
        self.first, self.middle = nn.Linear(64, 48), nn.Linear(48, narrow)
        self.head = nn.Linear(narrow, 10)
        self.blind = blind

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        x = F.relu(self.first(x))
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.blind):
            x = F.relu(self.middle(x))
        return self.head(x)


class Shuffled(nn.Module):
    """A perceptron before which pixels are shuffled anew every so many training batches.

    Args:
        every: batches of a task.
    """

    def __init__(self, *, every: int) -> None:
        super().__init__()
        self.net, self.every, self.seen = deep(64, 64, 2, 10), every, 0

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        generator = torch.Generator().manual_seed(self.seen // self.every)
        self.seen += self.training
        return self.net(x[:, torch.randperm(64, generator=generator)])
