"""The two-matrix embedding model: each coordinate owns an image, and two small layers combine them.

Shape letters: B batch, T tokens (one a value of a coordinate), S pixels a side, K = S components.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from typing_extensions import override

from lightning_sym.papers.composition._checks import check_count, check_weight
from lightning_sym.papers.composition.decoders import BumpDecoder, seeded


class TokenMatrices(nn.Module):
    r"""A matrix for each token, :math:`L \operatorname{diag}(\lambda) R`, with normalised vectors.

    Args:
        size: ``S``; there are as many tokens.

    A code that mixes tokens mixes their factors before they are normalised.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.randn(size, size) / size**0.5)
        self.left = nn.Parameter(normalize(torch.randn(size, size, size), dim=-2))
        self.right = nn.Parameter(normalize(torch.randn(size, size, size), dim=-1))

    def forward(self, code_BT: Tensor) -> Tensor:
        """Return the matrices ``[B, S, S]`` of codes ``[B, T]``."""
        size = code_BT.shape[1]
        left_BSK = normalize((code_BT @ self.left.flatten(1)).view(-1, size, size), dim=-2)
        right_BKS = normalize((code_BT @ self.right.flatten(1)).view(-1, size, size), dim=-1)
        return (left_BSK * (code_BT @ self.values)[:, None, :]) @ right_BKS

    def entropy(self) -> Tensor:
        r"""Return the entropy of :math:`\lambda^2 / \sum \lambda^2`, summed over tokens.

        0 if every matrix has rank one, ``T log S`` if all are as full as can be.
        """
        energy_TK = self.values.square()
        share_TK = (energy_TK / energy_TK.sum(1, keepdim=True)).clamp_min(1e-8)
        return -(share_TK * share_TK.log()).sum()

    def variation(self) -> Tensor:
        """Return the variance of every left and right vector over its pixels, summed over all.

        0 if every vector is constant along its axis, as one of the two is in a stripe.
        """
        return self.left.var(dim=-2).sum() + self.right.var(dim=-1).sum()


class EmbeddingDecoder(BumpDecoder):
    r"""A matrix for x, a matrix for y, two channels of an image that three tiny layers decode.

    The training loss is the mean squared error plus

    .. math:: w_e \sum_t H\bigl(\lambda_t^2 / \|\lambda_t\|^2\bigr)
              + w_s \sum_{t,k} (\operatorname{Var} L_{t,:,k} + \operatorname{Var} R_{t,k,:})

    over the tokens of both coordinates: low entropy makes the matrices of rank one, low variance makes
    them constant along an axis, both together stripes, whose product is a bump anywhere. This is the
    forced factorisation of "Compositional Generalization Requires More Than Disentangled
    Representations" (Liang et al., arXiv:2501.18797), with its released settings, but for the size, as
    defaults. With ``entropy_weight=0, stripe_weight=0`` the model overfits pairs of coordinates.

    Args:
        size: ``S``, by default that of ``GaussianBumpsDataModule``; the released code has 32. The code is
            ``[B, 2 S]``, one unit a pixel of x, then of y (``"one_hot"``).
        hidden_layers: 3 x 3 transposed convolutions from 2 channels to 2, each behind a PReLU, before the
            last, to one channel.
        entropy_weight: ``w_e``; the entropy is a sum over tokens, so this is not small.
        stripe_weight: ``w_s``.
        lr: learning rate of AdamW.
        weight_decay: of AdamW.
        seed: of the initial weights; ``None``: torch's global generator.

    Raises:
        ValueError: if a number is out of its range.
    """

    def __init__(
        self,
        size: int = 28,
        *,
        hidden_layers: int = 2,
        entropy_weight: float = 0.1,
        stripe_weight: float = 0.01,
        lr: float = 1e-3,
        weight_decay: float = 1e-4,
        seed: int | None = None,
    ) -> None:
        super().__init__(2 * size, size=size, lr=lr, weight_decay=weight_decay)
        check_count(hidden_layers, "hidden_layers")
        check_weight(entropy_weight, "entropy_weight")
        check_weight(stripe_weight, "stripe_weight")
        self.entropy_weight, self.stripe_weight = entropy_weight, stripe_weight
        with seeded(seed):
            self.x_matrices, self.y_matrices = TokenMatrices(size), TokenMatrices(size)
            layers: list[nn.Module] = []
            for _ in range(hidden_layers):
                layers += [nn.PReLU(), nn.ConvTranspose2d(2, 2, 3, padding=1)]
            self.net = nn.Sequential(*layers, nn.PReLU(), nn.ConvTranspose2d(2, 1, 3, padding=1))

    def embed(self, code: Tensor) -> Tensor:
        """Return the two matrices of each code as two channels, ``[B, 2, S, S]``."""
        x_BT, y_BT = code.split(self.size, dim=1)
        channels_last = torch.stack([self.x_matrices(x_BT), self.y_matrices(y_BT)], dim=-1)
        return channels_last.permute(0, 3, 1, 2)  # in this layout two channels cost a quarter on CPU

    @override
    def draw(self, code: Tensor) -> Tensor:
        return self.net(self.embed(code))

    @override
    def penalty(self) -> Tensor | None:
        terms = []
        if self.entropy_weight:
            terms.append(self.entropy_weight * (self.x_matrices.entropy() + self.y_matrices.entropy()))
        if self.stripe_weight:
            terms.append(self.stripe_weight * (self.x_matrices.variation() + self.y_matrices.variation()))
        return torch.stack(terms).sum() if terms else None
