"""A small transformer that tells its attention, for the ViT and GPT families.

Shape letters: N samples, T positions, H heads, E width.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn


class Attention(nn.Module):
    """Multi-head attention from four linear layers.

    Args:
        width: E.
        heads: H.
        causal: positions look back alone.
        dropout: of the attention weights.
    """

    def __init__(self, width: int, heads: int, *, causal: bool, dropout: float) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(width, width), nn.Linear(width, width)
        self.v, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.heads, self.causal, self.dropout = heads, causal, nn.Dropout(dropout)

    def weights(self, x: Tensor) -> Tensor:
        """Return who looks at whom, ``[N, H, T, T]``, rows summing to one."""
        q, k = (each(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for each in (self.q, self.k))
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        if self.causal:
            future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
            scores = scores.masked_fill(future, -torch.inf)
        return scores.softmax(-1)

    def forward(self, x: Tensor) -> Tensor:
        """Return what was attended to, ``[N, T, E]``."""
        values = self.v(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        return self.out((self.dropout(self.weights(x)) @ values).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and a perceptron, each normalised first and added.

    Args:
        width: E.
        heads: H.
        residual: False: neither is added to what came in, it takes its place.
        perceptron: with the perceptron.
        options: of :class:`Attention`.
    """

    def __init__(
        self, width: int, heads: int, *, residual: bool = True, perceptron: bool = True, **options: Any
    ) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads, **options)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width))
        self.residual = 1.0 if residual else 0.0
        self.perceptron = perceptron

    def forward(self, x: Tensor) -> Tensor:
        """Return the stream after the block."""
        if not self.perceptron:
            return self.residual * x + self.attention(x)
        x = self.residual * x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def attention_entropy(blocks: nn.ModuleList, x: Tensor) -> dict[str, float]:
    """Return the entropy of attention over its most, ``log`` of the positions a row can see.

    Of each head the mean over samples and rows that can see two positions or more; then the least, the mean
    and the most of the heads: 0: each position looks at one other; 1: at all alike.
    """
    shares = []
    for block in blocks:
        stream = block.norm1(x) if block.perceptron else x
        weights = block.attention.weights(stream)
        entropy = torch.special.entr(weights).sum(-1)  # [N, H, T]
        seen = (
            torch.arange(1, x.shape[1] + 1)
            if block.attention.causal
            else torch.full((x.shape[1],), x.shape[1])
        )
        share = entropy[..., seen > 1] / seen[seen > 1].log()
        shares.append(share.mean(dim=(0, 2)))
        x = block(x)
    every = torch.cat(shares)
    return {
        "entropy_least": float(every.min()),
        "entropy_mean": float(every.mean()),
        "entropy_most": float(every.max()),
    }


def scaled_queries(blocks: nn.ModuleList, factor: float) -> None:
    """Multiply the queries' and keys' weights; 0: they stay at zero, for each is the other's gradient."""
    for block in blocks:
        for part in (block.attention.q, block.attention.k):
            part.weight.data.mul_(factor)
            if factor == 0:
                nn.init.zeros_(part.bias)


def block_effects(blocks: nn.ModuleList, x: Tensor) -> dict[str, float]:
    """Return the least effect of a block: how much what it adds differs between samples, over the stream.

    0: the block adds the same to every sample. Blocks that take the stream's place are compared as well.
    """
    effects = []
    for block in blocks:
        out = block(x)
        added = out - block.residual * x
        effects.append(float((added - added.mean(0)).norm() / (x - x.mean(0)).norm()))
        x = out
    return {"block_least": min(effects)}
