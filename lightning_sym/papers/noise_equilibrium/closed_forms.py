r"""Where the noise of SGD takes a linear network: balanced, aligned weights, and how sharp they are.

For :math:`\ell = \lVert W_D \cdots W_1 x - y\rVert^2` with :math:`y = V x + \epsilon`, minima are connected:
a change of basis of a hidden layer leaves the loss as it is. Gradient flow conserves
:math:`W_{i+1}^\top W_{i+1} - W_i W_i^\top`; the noise of SGD moves it, to one point
(Ziyin, Wang, Li and Wu, 2024, arXiv 2402.07193; worked out here for any depth). With the forward and
backward second moments :math:`X_i = P \Sigma_x P^\top`, :math:`P = W_i \cdots W_1`, and
:math:`E_i = Q^\top \Sigma_\epsilon Q`, :math:`Q = W_D \cdots W_{i+1}`, that point is

.. math:: \frac{X_i}{\operatorname{tr} X_{i-1}} = \frac{E_i}{\operatorname{tr} E_{i+1}},
          \qquad i = 1, \ldots, D - 1,

for two layers :math:`W \Sigma_x W^\top / \operatorname{tr}\Sigma_x = U^\top \Sigma_\epsilon U /
\operatorname{tr}\Sigma_\epsilon`. Matrices, not norms: layers are aligned as well as balanced.

Shape letters: D layers, I inputs, H hidden units, O outputs, K = rank V. Weights are listed from the input
on, each ``[outputs, inputs]`` as ``nn.Linear`` has them; all results are float64.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class LayerSpectra(NamedTuple):
    """Singular values of the layers at the noise equilibrium."""

    ends: Tensor  #: ``[K]``, descending: of both end layers, seen through the whitened data and noise
    middle: float  #: of every middle layer, K times; its other singular values do not matter


class NoiseBalance(NamedTuple):
    """Both sides of the balance of one hidden layer, ``[H, H]`` each."""

    incoming: Tensor  #: X_i / tr X_{i-1}
    outgoing: Tensor  #: E_i / tr E_{i+1}

    @property
    def residual(self) -> float:
        """``2 |M - N|_F / |M + N|_F``: 0 at the equilibrium, at most 2; NaN where both sides are zero."""
        size = float((self.incoming + self.outgoing).norm())
        return 2 * float((self.incoming - self.outgoing).norm()) / size if size > 0 else math.nan

    @property
    def cosine(self) -> float:
        """Of the two sides, in [0, 1]: 1 where they are aligned; NaN where one is zero."""
        size = float(self.incoming.norm() * self.outgoing.norm())
        return float((self.incoming * self.outgoing).sum()) / size if size > 0 else math.nan

    @property
    def norms(self) -> float:
        """Ratio of the traces, outgoing over incoming: 1 where they are balanced."""
        incoming = float(self.incoming.trace())
        return float(self.outgoing.trace()) / incoming if incoming > 0 else math.nan


def equilibrium_weights(
    target: Tensor, *, hidden: Sequence[int], cov_x: Tensor | None = None, cov_noise: Tensor | None = None
) -> list[Tensor]:
    """Return weights at the noise equilibrium, unique up to rotations of each hidden layer.

    Directions of hidden units that carry nothing are zero here; where SGD starts it may keep others
    between two middle layers, which change neither the function nor the balance.

    Args:
        target: V, ``[O, I]``, not zero.
        hidden: width of each hidden layer, at least the rank of V; one of them: matrix factorisation.
        cov_x: second moment of the inputs ``[I, I]``, positive definite; ``None``: the identity.
        cov_noise: second moment of the noise of y ``[O, O]``, positive definite (without noise there is no
            such point); ``None``: the identity.

    Returns:
        ``[W_1, ..., W_D]`` with ``W_D ... W_1 = V``.

    Raises:
        ValueError: if shapes do not fit, a matrix is not positive definite, V is zero, empty or not finite,
            or a layer is too narrow.

    Example:
        >>> w, u = equilibrium_weights(torch.diag(torch.tensor([4.0, 1.0])), hidden=[2])
        >>> torch.linalg.svdvals(u)
        tensor([2., 1.], dtype=torch.float64)
    """
    left_OK, s_K, right_KI, root_x, root_noise = _whitened(target, cov_x, cov_noise)
    if len(hidden) < 1 or min(hidden) < len(s_K):
        raise ValueError(
            f"hidden must hold widths of at least the rank of target, {len(s_K)}, got {list(hidden)}"
        )
    ends_K, middle = _spectra(s_K, len(hidden) + 1)
    weights = []
    into = ends_K[:, None] * right_KI @ torch.linalg.inv(root_x)
    weights.append(torch.nn.functional.pad(into, (0, 0, 0, hidden[0] - len(s_K))))
    for narrow, wide in itertools.pairwise(hidden):
        weight = torch.zeros(wide, narrow, dtype=torch.float64)
        weight.diagonal()[: len(s_K)] = middle
        weights.append(weight)
    out = torch.linalg.inv(root_noise) @ left_OK * ends_K
    weights.append(torch.nn.functional.pad(out, (0, hidden[-1] - len(s_K))))
    return weights


def equilibrium_spectra(
    target: Tensor, *, layers: int, cov_x: Tensor | None = None, cov_noise: Tensor | None = None
) -> LayerSpectra:
    r"""Return the singular values of each layer at the noise equilibrium.

    With S the singular values of :math:`\bar\Sigma_\epsilon^{1/2} V \bar\Sigma_x^{1/2}`, where a bar divides
    by the trace: middle layers are isotropic, :math:`(\operatorname{tr} S)^{1/D}`, and the end layers have
    :math:`S^{1/2} (\operatorname{tr} S)^{-(D-2)/(2D)}`, both in whitened coordinates (:func:`layer_spectra`).

    Args:
        target: V, ``[O, I]``, not zero.
        layers: D, at least 2.
        cov_x: see :func:`equilibrium_weights`.
        cov_noise: see :func:`equilibrium_weights`.

    Raises:
        ValueError: if there are fewer than two layers, or as :func:`equilibrium_weights`.

    Example:
        >>> spectra = equilibrium_spectra(2 * torch.eye(2), layers=3)
        >>> spectra.ends, round(spectra.middle, 4)
        (tensor([0.8909, 0.8909], dtype=torch.float64), 1.2599)
    """
    if layers < 2:
        raise ValueError(f"layers must be at least 2, got {layers}")
    return _spectra(_whitened(target, cov_x, cov_noise)[1], layers)


def layer_spectra(
    weights: Sequence[Tensor], *, cov_x: Tensor | None = None, cov_noise: Tensor | None = None
) -> list[Tensor]:
    r"""Return the singular values of each layer, of the ends in whitened coordinates.

    Those of :math:`W_1 \bar\Sigma_x^{1/2}`, of the middle layers as they are, and of
    :math:`\bar\Sigma_\epsilon^{1/2} W_D`: what :func:`equilibrium_spectra` predicts.

    Args:
        weights: two or more, ``[W_1, ..., W_D]``.
        cov_x: see :func:`equilibrium_weights`.
        cov_noise: see :func:`equilibrium_weights`.

    Returns:
        ``[min(outputs, inputs)]`` each, descending; NaN where a layer holds a number that is not finite.

    Raises:
        ValueError: if shapes do not fit or a matrix is not positive definite.
    """
    chain = _chain(weights)
    root_x = _root(_covariance(cov_x, chain[0].shape[1], "cov_x"))
    root_noise = _root(_covariance(cov_noise, chain[-1].shape[0], "cov_noise"))
    seen = [chain[0] @ root_x, *chain[1:-1], root_noise @ chain[-1]]
    return [
        torch.linalg.svdvals(weight)
        if bool(weight.isfinite().all())  # the decomposition raises an error of its own
        else weight.new_full((min(weight.shape),), torch.nan)
        for weight in seen
    ]


def noise_balance(
    weights: Sequence[Tensor], *, cov_x: Tensor | None = None, cov_noise: Tensor | None = None
) -> list[NoiseBalance]:
    """Return both sides of the balance of every hidden layer; equal at the noise equilibrium.

    The gradient noise is that of a minimum, where what is left of y is its noise alone.

    Args:
        weights: two or more, ``[W_1, ..., W_D]``.
        cov_x: see :func:`equilibrium_weights`.
        cov_noise: see :func:`equilibrium_weights`.

    Raises:
        ValueError: if shapes do not fit or a matrix is not positive definite.

    Example:
        >>> balance, = noise_balance([torch.eye(2), 3 * torch.eye(2)])
        >>> round(balance.residual, 4), balance.cosine, balance.norms
        (1.6, 1.0, 9.0)
    """
    chain = _chain(weights)
    forward = _carried(chain[:-1], _covariance(cov_x, chain[0].shape[1], "cov_x"))
    back = [weight.mT for weight in reversed(chain[1:])]
    backward = _carried(back, _covariance(cov_noise, chain[-1].shape[0], "cov_noise"))[::-1]
    # forward[i] is X_i and backward[i - 1] is E_i.
    return [
        NoiseBalance(
            forward[i] / forward[i - 1].trace().clamp_min(torch.finfo(torch.float64).tiny),
            backward[i - 1] / backward[i].trace().clamp_min(torch.finfo(torch.float64).tiny),
        )
        for i in range(1, len(chain))
    ]


def charge_change(
    weights: Sequence[Tensor],
    target: Tensor,
    *,
    lr: float,
    batch: int,
    cov_x: Tensor | None = None,
    cov_noise: Tensor | None = None,
) -> Tensor:
    r"""Return what one step of SGD adds to :math:`U^\top U - W W^\top` on average, ``[H, H]``.

    The gradient's first order drops out and what is left has no remainder:
    :math:`\eta^2 (W\, E[G^\top G]\, W^\top - U^\top E[G G^\top]\, U)` with G the batch's mean of
    :math:`2(UWx - y)x^\top`. Its time average is zero where SGD has become stationary, whatever the
    learning rate; to leading order that is the noise equilibrium.

    Args:
        weights: ``[W, U]``, two layers.
        target: V, ``[O, I]``.
        lr: learning rate, positive.
        batch: samples a step, at least 1.
        cov_x: see :func:`equilibrium_weights`; inputs are Gaussian.
        cov_noise: see :func:`equilibrium_weights`.

    Raises:
        ValueError: if there are not two layers, shapes do not fit, or a number is out of its range.
    """
    chain = _chain(weights)
    if len(chain) != 2:
        raise ValueError(f"weights must be of two layers, got {len(chain)}")
    if not lr > 0 or batch < 1:
        raise ValueError(f"lr must be positive and batch at least 1, got {lr!r} and {batch!r}")
    w_HI, u_OH = chain
    v_OI = _target(target, u_OH.shape[0], w_HI.shape[1])
    x_II = _covariance(cov_x, v_OI.shape[1], "cov_x")
    e_OO = _covariance(cov_noise, v_OI.shape[0], "cov_noise")
    off_OI = u_OH @ w_HI - v_OI
    mean_OI = off_OI @ x_II
    residual_OO = e_OO + off_OI @ x_II @ off_OI.mT
    # Fourth moments of Gaussian inputs (Isserlis), for one sample; a batch keeps the mean's square.
    right_II = residual_OO.trace() * x_II + 2 * mean_OI.mT @ mean_OI
    left_OO = x_II.trace() * residual_OO + 2 * mean_OI @ mean_OI.mT
    right_II = right_II / batch + (1 - 1 / batch) * mean_OI.mT @ mean_OI
    left_OO = left_OO / batch + (1 - 1 / batch) * mean_OI @ mean_OI.mT
    return 4 * lr**2 * (w_HI @ right_II @ w_HI.mT - u_OH.mT @ left_OO @ u_OH)


def linear_hessian_trace(weights: Sequence[Tensor], *, cov_x: Tensor | None = None) -> float:
    r"""Return the trace of the Hessian of :math:`E\lVert W_D\cdots W_1 x - y\rVert^2`, at any weights.

    .. math:: 2 \sum_i \lVert W_D \cdots W_{i+1}\rVert_F^2 \operatorname{tr} X_{i-1}

    The loss is quadratic in each layer, so y plays no part in it; for two layers
    :math:`2 O \operatorname{tr}(W\Sigma_x W^\top) + 2\lVert U\rVert_F^2 \operatorname{tr}\Sigma_x`.
    A loss that takes the mean over outputs has 1/O of it.

    Args:
        weights: one or more, ``[W_1, ..., W_D]``.
        cov_x: see :func:`equilibrium_weights`.

    Returns:
        At least 0; NaN where a weight is not finite.

    Raises:
        ValueError: if shapes do not fit or the matrix is not positive definite.

    Example:
        >>> linear_hessian_trace([torch.eye(2), 3 * torch.eye(2)])
        80.0
    """
    return 2 * sum(float(after.square().sum() * before.trace()) for after, before in _around(weights, cov_x))


def linear_hessian_top(weights: Sequence[Tensor], *, cov_x: Tensor | None = None) -> float:
    r"""Return the largest eigenvalue of the same Hessian at a minimum, :math:`W_D \cdots W_1 = V`.

    That of :math:`2\sum_i A_i A_i^\top \otimes \Sigma_x^{1/2} B_i^\top B_i \Sigma_x^{1/2}`, with
    A and B the products of the layers after and before.

    Args:
        weights: one or more, ``[W_1, ..., W_D]``.
        cov_x: see :func:`equilibrium_weights`.

    Returns:
        At least 0; NaN where a weight is not finite.

    Raises:
        ValueError: if shapes do not fit or the matrix is not positive definite.

    Example:
        >>> linear_hessian_top([torch.eye(2), 3 * torch.eye(2)])
        20.0
    """
    chain = _chain(weights)
    root_x = _root(_covariance(cov_x, chain[0].shape[1], "cov_x"), normalise=False)
    before = root_x
    total: Tensor | float = 0.0
    for i in range(len(chain)):
        after = _product(chain[i + 1 :], size=chain[-1].shape[0])
        total = total + torch.kron(after @ after.mT, before.mT @ before)
        before = chain[i] @ before
    hessian = torch.as_tensor(total)
    if not bool(hessian.isfinite().all()):  # the decomposition raises an error of its own
        return math.nan
    return 2 * float(torch.linalg.eigvalsh(hessian)[-1])


def _whitened(
    target: Tensor, cov_x: Tensor | None, cov_noise: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the SVD of V in whitened coordinates, cut to its rank, and the two roots."""
    v_OI = _target(target)
    root_x = _root(_covariance(cov_x, v_OI.shape[1], "cov_x"))
    root_noise = _root(_covariance(cov_noise, v_OI.shape[0], "cov_noise"))
    left, s, right = torch.linalg.svd(root_noise @ v_OI @ root_x, full_matrices=False)
    rank = int((s > s[0] * max(v_OI.shape) * torch.finfo(torch.float64).eps).sum())
    if rank < 1:
        raise ValueError("target must not be zero")
    return left[:, :rank], s[:rank], right[:rank], root_x, root_noise


def _spectra(s_K: Tensor, layers: int) -> LayerSpectra:
    total = float(s_K.sum())
    return LayerSpectra(s_K.sqrt() * total ** (-(layers - 2) / (2 * layers)), total ** (1 / layers))


def _around(weights: Sequence[Tensor], cov_x: Tensor | None) -> list[tuple[Tensor, Tensor]]:
    """Return for each layer the product of the layers after it and the second moment of its inputs."""
    chain = _chain(weights)
    moments = _carried(chain[:-1], _covariance(cov_x, chain[0].shape[1], "cov_x"))
    size = chain[-1].shape[0]
    return [(_product(chain[i + 1 :], size=size), moment) for i, moment in enumerate(moments)]


def _carried(chain: list[Tensor], moment: Tensor) -> list[Tensor]:
    """Return a second moment before and behind each layer."""
    found = [moment]
    for weight in chain:
        found.append(weight @ found[-1] @ weight.mT)
    return found


def _product(chain: list[Tensor], *, size: int) -> Tensor:
    product = torch.eye(size, dtype=torch.float64)
    for weight in reversed(chain):
        product = product @ weight
    return product


def _chain(weights: Sequence[Tensor]) -> list[Tensor]:
    shapes = [tuple(weight.shape) for weight in weights]
    fits = bool(shapes) and all(len(shape) == 2 and min(shape) > 0 for shape in shapes)
    if not fits or any(a[0] != b[1] for a, b in itertools.pairwise(shapes)):
        raise ValueError(f"weights must be matrices [outputs, inputs] that follow each other, got {shapes}")
    return [weight.detach().double().cpu() for weight in weights]


def _target(target: Tensor, outputs: int | None = None, inputs: int | None = None) -> Tensor:
    shape = tuple(target.shape)
    if len(shape) != 2 or min(shape) < 1 or (outputs is not None and shape != (outputs, inputs)):
        wanted = "[O >= 1, I >= 1]" if outputs is None else f"[{outputs}, {inputs}]"
        raise ValueError(f"target must be {wanted}, got {shape}")
    if not bool(target.isfinite().all()):
        raise ValueError("target must be finite, got NaN or infinity")
    return target.detach().double().cpu()


def _covariance(matrix: Tensor | None, size: int, name: str) -> Tensor:
    if matrix is None:
        return torch.eye(size, dtype=torch.float64)
    if matrix.shape != (size, size):
        raise ValueError(f"{name} must be [{size}, {size}], got {tuple(matrix.shape)}")
    matrix = matrix.detach().double().cpu()
    symmetric = bool((matrix - matrix.mT).abs().max() <= 1e-6 * matrix.abs().max())
    if not symmetric or not float(torch.linalg.eigvalsh(matrix)[0]) > 0:
        raise ValueError(f"{name} must be symmetric and positive definite")
    return matrix


def _root(matrix: Tensor, *, normalise: bool = True) -> Tensor:
    """Return the symmetric square root, of the matrix over its trace if asked for."""
    values, vectors = torch.linalg.eigh(matrix / matrix.trace() if normalise else matrix)
    return vectors * values.sqrt() @ vectors.mT
