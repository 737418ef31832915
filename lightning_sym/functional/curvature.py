"""How curved a loss is: Hessian-vector products, the trace by Hutchinson, the largest eigenvalue by Lanczos.

Both need products of the Hessian with vectors only, never the matrix.

Shape letters: P parameters, N random vectors, L blocks of parameters, K Lanczos steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_sym.functional._checks import as_real, check_count, check_number

Product = Callable[[Tensor], Tensor]


class TraceEstimate(NamedTuple):
    """A trace and how sure it is, float64."""

    value: Tensor  #: the trace, ``[]``
    error: Tensor  #: its standard error, ``[]``: 0 if exact, NaN from one random vector
    blocks: Tensor  #: the traces of the diagonal blocks, ``[L]``; they sum to the value


class TopEigenvalue(NamedTuple):
    """The largest eigenvalue, float64; NaN where a product is not finite."""

    value: Tensor  #: a lower bound of it, up to rounding, ``[]``
    error: Tensor  #: some eigenvalue lies within that distance of the value, ``[]``


def hessian_product(loss: Tensor, parameters: Sequence[Tensor]) -> Product:
    """Return the function that multiplies the Hessian of a loss with a vector ``[P]``.

    The graph of the gradient is built once, so that a product is one backward pass through it (about 2.5
    gradients; building it takes little more than one). It is kept as long as the function is.
    ``grad`` fields are left alone.

    Args:
        loss: a scalar, with its graph; all it is made of must be twice differentiable.
        parameters: what to differentiate by; the vector has their entries in this order. Those that play
            no part have derivatives of zero.

    Returns:
        The function; a vector that is not a real floating-point ``[P]`` is refused by it.

    Raises:
        TypeError: if the loss or a parameter is not a real floating-point tensor.
        ValueError: if the loss is no scalar, does not depend on the parameters, or there are none, or one
            that needs no gradient.

    Example:
        >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> hessian_product(x[0] ** 2 * x[1], [x])(torch.tensor([1.0, 0.0]))
        tensor([4., 2.])
    """
    as_real(loss, name="loss")
    parameters = list(parameters)
    for parameter in parameters:
        as_real(parameter, name="parameters")
        if not parameter.requires_grad:
            raise ValueError(
                f"parameters must require gradients, got one of {tuple(parameter.shape)} that does not"
            )
    if loss.numel() != 1 or not parameters:
        raise ValueError(
            f"loss must be a scalar of one or more parameters, got shape {tuple(loss.shape)} and "
            f"{len(parameters)} parameters"
        )
    if not loss.requires_grad:
        raise ValueError("loss must depend on the parameters: it has no graph")
    sizes = [p.numel() for p in parameters]
    with torch.enable_grad():
        slopes = torch.autograd.grad(loss.reshape(()), parameters, create_graph=True, allow_unused=True)
    # A gradient that is constant has no graph of its own; its rows of the Hessian are zero.
    curved = [i for i, slope in enumerate(slopes) if slope is not None and slope.requires_grad]

    def multiply(vector_P: Tensor) -> Tensor:
        as_real(vector_P, name="vector")
        if vector_P.shape != (sum(sizes),):
            raise ValueError(f"vector must be [P={sum(sizes)}], got {tuple(vector_P.shape)}")
        parts = [
            part.view_as(p).to(p.dtype) for part, p in zip(vector_P.split(sizes), parameters, strict=True)
        ]
        if not curved:
            return torch.zeros_like(vector_P)
        found = torch.autograd.grad(
            [slopes[i] for i in curved],
            parameters,
            [parts[i] for i in curved],
            retain_graph=True,
            allow_unused=True,
        )
        return torch.cat(
            [
                (torch.zeros_like(p) if h is None else h).reshape(-1)
                for h, p in zip(found, parameters, strict=True)
            ]
        )

    return multiply


def hutchinson_trace(
    product: Product,
    sizes: Sequence[int],
    *,
    vectors: int,
    seed: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> TraceEstimate:
    r"""Trace of a symmetric matrix from products with random signs (Hutchinson, 1990).

    .. math:: \operatorname{tr} H = E[v^\top H v], \qquad v \in \{-1, 1\}^P

    Right on average, with a variance of :math:`2 \sum_{i \ne j} H_{ij}^2 / N`; the standard error is taken
    from the spread of the N values. With as many vectors as there are parameters, or more, the P unit
    vectors are used instead: exact.

    Args:
        product: maps ``[P]`` to H times it.
        sizes: lengths of the consecutive blocks; they sum to P.
        vectors: N, at least 1.
        seed: of the signs; the global random state is left alone.
        device: of the vectors.
        dtype: of the vectors. Sums are in float64.

    Returns:
        :class:`TraceEstimate`; NaN where a product is not finite.

    Raises:
        TypeError: if ``dtype`` or the product is not real and floating-point.
        ValueError: if there are no vectors or no parameters, or the product is not ``[P]``.

    Example:
        >>> hutchinson_trace(lambda v: 2 * v, [3], vectors=2)
        TraceEstimate(value=tensor(6., dtype=torch.float64), error=tensor(0., dtype=torch.float64),
        blocks=tensor([6.], dtype=torch.float64))
    """
    total = _size(sizes)
    check_count("vectors", vectors)
    _check_dtype(dtype)
    exact = vectors >= total
    rng = torch.Generator().manual_seed(seed)
    samples = []
    for n in range(total if exact else vectors):
        if exact:
            vector_P = torch.zeros(total, device=device, dtype=dtype)
            vector_P[n] = 1.0
        else:
            vector_P = _signs(total, rng, device, dtype)
        products_P = vector_P * _multiplied(product, vector_P)  # by 1 and -1, 0: exact
        samples.append(torch.stack([p.sum(dtype=torch.float64) for p in products_P.split(list(sizes))]))
    samples_NL = torch.stack(samples)
    samples_NL = torch.where(samples_NL.isfinite(), samples_NL, torch.nan)
    if exact:
        blocks_L = samples_NL.sum(0)
        return TraceEstimate(blocks_L.sum(), torch.zeros_like(blocks_L[0]), blocks_L)
    values_N = samples_NL.sum(1)
    error = values_N.std() / vectors**0.5 if vectors > 1 else torch.full_like(values_N[0], torch.nan)
    return TraceEstimate(values_N.mean(), error, samples_NL.mean(0))


def lanczos_top(
    product: Product,
    size: int,
    *,
    steps: int,
    seed: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> TopEigenvalue:
    r"""Largest eigenvalue of a symmetric matrix by Lanczos' method (1950).

    The largest Ritz value of K orthogonal vectors, each the product with the one before, made orthogonal to
    all. It comes from below, the faster the further the eigenvalue lies from the others. The error is the
    length of the residual, :math:`\lVert H q - \theta q\rVert`. Always min(K, P) products: where an
    invariant subspace is found, the search goes on in a new direction.

    Args:
        product: maps ``[P]`` to H times it.
        size: P.
        steps: K, at least 1; so many vectors are kept.
        seed: of the first vector; the global random state is left alone.
        device: of the vectors.
        dtype: of the vectors.

    Returns:
        :class:`TopEigenvalue`.

    Raises:
        TypeError: if ``dtype`` or the product is not real and floating-point.
        ValueError: if a number is not positive or the product is not ``[P]``.

    Example:
        >>> d = torch.tensor([1.0, 5.0, 2.0]).double()
        >>> top = lanczos_top(lambda v: d * v, 3, steps=3, dtype=torch.float64)
        >>> round(float(top.value), 6)
        5.0
    """
    total = _size([size])
    check_count("steps", steps)
    _check_dtype(dtype)
    count = min(steps, total)
    rng = torch.Generator().manual_seed(seed)
    basis_KP = torch.empty(count, total, device=device, dtype=dtype)
    diagonal = torch.zeros(count, dtype=torch.float64)
    beside = torch.zeros(count, dtype=torch.float64)  # the last: length of what is left
    q_P = _unit(_signs(total, rng, device, dtype))
    tiny = torch.finfo(dtype).eps * total**0.5
    largest = 0.0
    for k in range(count):
        basis_KP[k] = q_P
        h_P = _multiplied(product, q_P)
        diagonal[k] = float((q_P * h_P).sum(dtype=torch.float64))
        largest = max(largest, float(h_P.norm()))
        left_P = _orthogonal(h_P, basis_KP[: k + 1])
        beside[k] = float(left_P.norm())
        if not beside[k] > tiny * largest:  # nothing new: an invariant subspace (or a NaN, told below)
            beside[k] = 0.0
            if k + 1 < count:
                left_P = _orthogonal(_signs(total, rng, device, dtype), basis_KP[: k + 1])
        q_P = _unit(left_P)
    if not bool(diagonal.isfinite().all() and beside.isfinite().all()):
        return TopEigenvalue(*[torch.tensor(torch.nan, dtype=torch.float64)] * 2)
    between = torch.diag(beside[:-1], 1)
    values_K, vectors_KK = torch.linalg.eigh(torch.diag(diagonal) + between + between.mT)
    return TopEigenvalue(values_K[-1], (beside[-1] * vectors_KK[-1, -1]).abs())


def stability_line(
    lr: float, *, momentum: float = 0.0, dampening: float = 0.0, nesterov: bool = False
) -> float:
    r"""Largest curvature at which gradient descent on a quadratic does not diverge.

    :math:`2/\eta` without momentum, :math:`(2 + 2\mu)/\eta` with heavy-ball momentum, and
    :math:`(2 + 2\mu)/(\eta\,(1 + 2\mu))` with Nesterov's (Cohen et al., 2021, arXiv 2103.00065);
    dampening d makes :math:`\eta` a :math:`(1 - d)\eta`. Weight decay adds itself to the curvature.

    Args:
        lr: learning rate, at least 0.
        momentum: mu, in [0, 1).
        dampening: d, in [0, 1]; no part is played by it without momentum.
        nesterov: Nesterov's momentum, as ``torch.optim.SGD`` has it.

    Returns:
        Positive; infinite at a rate of 0.

    Raises:
        ValueError: if a number is out of its range.

    Example:
        >>> stability_line(0.5), stability_line(0.5, momentum=0.5)
        (4.0, 6.0)
    """
    for name, value in (("lr", lr), ("momentum", momentum), ("dampening", dampening)):
        check_number(name, value)
    if not lr >= 0 or not 0 <= momentum < 1 or not 0 <= dampening <= 1:
        raise ValueError(
            "lr must be at least 0, momentum in [0, 1) and dampening in [0, 1], "
            f"got {lr!r}, {momentum!r} and {dampening!r}"
        )
    rate = lr * (1 - dampening if momentum else 1) * (1 + 2 * momentum if nesterov else 1)
    return (2 + 2 * momentum) / rate if rate > 0 else math.inf


def _size(sizes: Sequence[int]) -> int:
    for size in sizes:
        check_count("sizes", size, least=0)
    total = sum(sizes)
    if total < 1:
        raise ValueError(f"sizes must be of at least one parameter, got {list(sizes)}")
    return total


def _check_dtype(dtype: torch.dtype) -> None:
    if not dtype.is_floating_point:
        raise TypeError(f"dtype must be real and floating-point, got {dtype}")


def _multiplied(product: Product, vector_P: Tensor) -> Tensor:
    found_P = product(vector_P)
    as_real(found_P, name="product(vector)")
    if found_P.shape != vector_P.shape:
        raise ValueError(f"product must return [P={len(vector_P)}], got {tuple(found_P.shape)}")
    return found_P


def _signs(size: int, rng: torch.Generator, device: torch.device | str, dtype: torch.dtype) -> Tensor:
    bytes_B = torch.randint(256, (-(-size // 8),), generator=rng, dtype=torch.uint8)  # eight signs each
    bits = (bytes_B[:, None] >> torch.arange(8, dtype=torch.uint8)).bitwise_and_(1).view(-1)[:size]
    return bits.to(device=device, dtype=dtype).mul_(2).sub_(1)


def _orthogonal(vector_P: Tensor, basis_KP: Tensor) -> Tensor:
    vector_P = vector_P.clone()
    for _ in range(2):  # once loses orthogonality where much is taken away
        vector_P.addmv_(basis_KP.mT, basis_KP @ vector_P, alpha=-1)
    return vector_P


def _unit(vector_P: Tensor) -> Tensor:
    norm = vector_P.norm()
    return vector_P / torch.where(norm > 0, norm, 1.0)
