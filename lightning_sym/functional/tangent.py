"""The empirical tangent kernel of a network, exact or sketched so that wide models fit in memory.

Shape letters: N samples, O outputs, V readouts, P parameters, R size of a sketch, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_sym.functional._checks import (
    as_matrix,
    as_real,
    as_square,
    check_count,
    check_same_shape,
    nan_like,
    promoted,
)


class KernelMove(NamedTuple):
    """How far a kernel has moved, each a scalar ``[]``; NaN where the first kernel is zero."""

    change: Tensor  #: relative, in Frobenius norm; at least 0
    cosine: Tensor  #: of the two matrices, in [-1, 1]; NaN too if the second is zero
    growth: Tensor  #: ratio of traces; at least 0


class CountSketch:
    r"""A linear map of long vectors to R numbers that keeps inner products (Charikar et al., 2002).

    Every entry is added, with a random sign, to a random one of R buckets. Inner products are right on
    average, with a standard deviation of at most :math:`\sqrt{2/R}\,\lVert a\rVert\lVert b\rVert`.
    Vectors of at most R numbers are kept as they are: exact.

    Args:
        length: P.
        size: R; ``None``: no sketch.
        seed: of signs and buckets; the global random state is left alone.
        device: where vectors will be.

    Raises:
        ValueError: if a number is not positive.

    Example:
        >>> CountSketch(3, size=8)(torch.tensor([[1.0, 2.0, 3.0]]))
        tensor([[1., 2., 3.]])
    """

    def __init__(
        self, length: int, *, size: int | None, seed: int = 0, device: torch.device | str = "cpu"
    ) -> None:
        for name, value in (("length", length), ("size", size)):
            if value is not None:
                check_count(name, value)
        self.length = length
        self.size = length if size is None else min(size, length)
        self.exact = self.size == length
        if not self.exact:
            rng = torch.Generator().manual_seed(seed)
            self._bucket_P = torch.randint(self.size, (length,), generator=rng).to(device)
            self._sign_P = (torch.randint(2, (length,), generator=rng, dtype=torch.int8) * 2 - 1).to(device)

    def __call__(self, vectors: Tensor) -> Tensor:
        """Return the sketches ``[V, R]`` of vectors ``[V, P]``, in their precision.

        Raises:
            TypeError: if the vectors are not a real floating-point tensor.
            ValueError: if the vectors are not of the length the sketch was made for.
        """
        as_real(vectors, name="vectors")
        if vectors.ndim != 2 or vectors.shape[1] != self.length:
            raise ValueError(f"vectors must be [V, {self.length}], got {tuple(vectors.shape)}")
        if self.exact:
            return vectors
        return vectors.new_zeros(len(vectors), self.size).index_add_(
            1, self._bucket_P, vectors * self._sign_P.to(vectors.dtype)
        )


def readouts(outputs: int, *, most: int | None, seed: int = 0) -> Tensor:
    r"""Return directions ``[V, O]`` to read outputs in; the mean of :math:`vv^\top` is I/O.

    Each output by itself where there are at most ``most``, else so many vectors of random signs.

    Args:
        outputs: O.
        most: the largest V; ``None``: all outputs.
        seed: of the signs; the global random state is left alone.

    Raises:
        ValueError: if a number is not at least 1.

    Example:
        >>> readouts(2, most=4)
        tensor([[1., 0.],
                [0., 1.]])
    """
    check_count("outputs", outputs)
    if most is not None:
        check_count("most", most)
    if most is None or outputs <= most:
        return torch.eye(outputs)
    rng = torch.Generator().manual_seed(seed)
    return (torch.randint(2, (most, outputs), generator=rng) * 2 - 1) / math.sqrt(outputs)


def tangent_kernel(
    function: Callable[[Tensor], Tensor],
    parameters: Sequence[Tensor],
    x: Tensor,
    *,
    rates: Sequence[float] | None = None,
    most_outputs: int | None = 16,
    sketch: int | None = 8192,
    seed: int = 0,
) -> Tensor:
    r"""Empirical neural tangent kernel of a network on some samples (Jacot et al., 2018).

    .. math:: K_{nm} = \frac1O \sum_o \sum_p \eta_p\,
              \frac{\partial f_o(x_n)}{\partial\theta_p} \frac{\partial f_o(x_m)}{\partial\theta_p}

    One gradient a sample and readout, each sketched before the next is taken: memory is P + N V R
    numbers. ``grad`` fields are left alone.

    Args:
        function: maps samples ``[1, ...]`` to outputs ``[1, ...]``, one sample at a time, independent of
            others (evaluation mode).
        parameters: what to differentiate by; of those that play no part the derivative is zero.
        x: samples ``[N, ...]``.
        rates: eta, a number a parameter, at least 0; by default 1.
        most_outputs: networks with more outputs are read in so many random directions
            (:func:`readouts`), right on average; ``None``: in all.
        sketch: R, see :class:`CountSketch`; ``None``: exact.
        seed: of sketch and readouts. Kernels are comparable for one seed: sketching errors go along.

    Returns:
        ``[N, N]`` float64, symmetric positive semi-definite.

    Raises:
        TypeError: if the outputs or a parameter are not real floating-point tensors.
        ValueError: if there are no samples or parameters, their numbers do not fit, or a rate is not
            finite and at least 0.

    Example:
        >>> w = torch.tensor([[1.0, 2.0]], requires_grad=True)
        >>> tangent_kernel(lambda x: x @ w.mT, [w], torch.tensor([[1.0, 0.0], [1.0, 1.0]]))
        tensor([[1., 1.],
                [1., 2.]], dtype=torch.float64)
    """
    if len(x) < 1 or len(parameters) < 1:
        raise ValueError(f"x and parameters must not be empty, got {len(x)} and {len(parameters)}")
    for parameter in parameters:
        as_real(parameter, name="parameters")
    if rates is not None and (
        len(rates) != len(parameters) or not all(0 <= rate < math.inf for rate in rates)
    ):
        raise ValueError(f"rates must be {len(parameters)} numbers of at least 0, got {list(rates)}")
    weights = [1.0] * len(parameters) if rates is None else [math.sqrt(rate) for rate in rates]
    device = parameters[0].device
    total = sum(p.numel() for p in parameters)
    sketched = CountSketch(total, size=sketch, seed=seed, device=device)
    rows: list[Tensor] = []
    v_VO: Tensor | None = None
    with torch.inference_mode(False), torch.enable_grad():
        for n in range(len(x)):
            out = function(x[n : n + 1])
            if not isinstance(out, Tensor) or not out.is_floating_point():
                kind = out.dtype if isinstance(out, Tensor) else type(out).__name__
                raise TypeError(f"outputs must be a floating-point tensor, got {kind}")
            f_O = out.reshape(-1)
            if v_VO is None:
                v_VO = readouts(f_O.numel(), most=most_outputs, seed=seed).to(f_O)
            read = [
                _gradient(v_O @ f_O, parameters, weights, keep=k + 1 < len(v_VO))
                for k, v_O in enumerate(v_VO)
            ]
            rows.append(sketched(torch.stack(read)).double())
    features_NVR = torch.stack(rows)
    features = features_NVR.flatten(1)
    return features @ features.mT / features_NVR.shape[1]


def _gradient(value: Tensor, parameters: Sequence[Tensor], weights: list[float], *, keep: bool) -> Tensor:
    if not value.requires_grad:
        return torch.cat([torch.zeros_like(p).flatten() for p in parameters])
    found = torch.autograd.grad(value, list(parameters), retain_graph=keep, allow_unused=True)
    return torch.cat(
        [
            (torch.zeros_like(p) if g is None else w * g).flatten()
            for g, p, w in zip(found, parameters, weights, strict=True)
        ]
    )


def kernel_move(before: Tensor, after: Tensor) -> KernelMove:
    r"""How far a kernel has moved: relative change, cosine and growth.

    .. math:: \frac{\lVert K' - K\rVert_F}{\lVert K\rVert_F},\qquad
              \frac{\langle K', K\rangle}{\lVert K'\rVert_F\lVert K\rVert_F},\qquad
              \frac{\operatorname{tr} K'}{\operatorname{tr} K}

    One minus the cosine is the kernel distance of Fort et al. (2020).

    Args:
        before: positive semi-definite ``[N, N]``.
        after: the same later.

    Returns:
        :class:`KernelMove`; all NaN where a kernel is not finite.

    Raises:
        TypeError: if a kernel is not a real floating-point tensor.
        ValueError: if the matrices are not square, or differ in shape.

    Example:
        >>> kernel_move(torch.eye(2), 3 * torch.eye(2))
        KernelMove(change=tensor(2.), cosine=tensor(1.), growth=tensor(3.))
    """
    k_NN, l_NN = promoted(as_square(before, name="before"), as_square(after, name="after"))
    check_same_shape(k_NN, l_NN, names="before and after")
    norm, other = k_NN.norm(), l_NN.norm()
    if not norm > 0 or not (norm.isfinite() and other.isfinite()):
        return KernelMove(*[nan_like(k_NN)] * 3)
    unit = l_NN / other if other > 0 else l_NN * torch.nan
    return KernelMove(
        (l_NN - k_NN).norm() / norm,
        ((k_NN / norm) * unit).sum().clamp(-1, 1),
        l_NN.diagonal().sum() / k_NN.diagonal().sum(),
    )


def layer_alignment(inputs: Tensor, weight: Tensor) -> Tensor:
    r"""How well a layer's weight is aligned with what comes in.

    .. math:: \zeta = \frac{\sqrt{\sum_n \lVert W h_n \rVert^2}}
              {\lVert W \rVert_F \sqrt{\sum_n \lVert h_n \rVert^2}}

    For a network :math:`u^\top w x` of one hidden layer and inputs along a line the readout's is
    :math:`\lvert\langle u, w\rangle\rvert / (\lVert u\rVert\lVert w\rVert)`, the size of the zeta of
    Xu and Ziyin (2024, arXiv 2401.07085). About :math:`1/\sqrt D` for a random weight of D inputs.

    Args:
        inputs: ``[N, D]``; half types are computed in float32.
        weight: ``[O, D]``.

    Returns:
        Scalar ``[]`` in ``[0, 1]``; NaN where weight or inputs are zero.

    Raises:
        TypeError: if an argument is not a real floating-point tensor.
        ValueError: if the shapes do not fit or an argument is empty.

    Example:
        >>> layer_alignment(torch.tensor([[1.0, 0.0]]), torch.tensor([[3.0, 4.0]]))
        tensor(0.6000)
    """
    h_ND, w_OD = promoted(as_matrix(inputs, name="inputs"), as_matrix(weight, name="weight"))
    if inputs.shape[1] != weight.shape[1]:
        raise ValueError(
            f"inputs must be [N, D] and weight [O, D], got {tuple(inputs.shape)} and {tuple(weight.shape)}"
        )
    size = w_OD.norm() * h_ND.norm()
    aligned = (h_ND @ w_OD.mT).norm() / torch.where(size > 0, size, 1.0)
    return torch.where(size > 0, aligned.clamp(0, 1), torch.nan)
