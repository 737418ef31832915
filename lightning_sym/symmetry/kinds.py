r"""The six kinds of parameter symmetry, each with its group, mirrors, distances and charges.

========== ============================== ============================== =========================
kind       an element                     a collapsed unit               charge of gradient flow
========== ============================== ============================== =========================
permutation order of the units            equals another unit            none (discrete)
rescaling  factors > 0, in and out        is zero                        sum of power * norm^2
signflip   signs, in and out              is zero                        none (discrete)
rotation   a matrix, in and out           a lost rank                    sum of power * Theta Theta^T
scale      factors > 0                    is zero                        norm^2
translation a vector added to all classes classes' mean is zero          classes' mean
========== ============================== ============================== =========================

Shape letters: B blocks, U units of a block, M positions of a unit, R other entries, D length of a
unit vector, S = B * U.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_sym.symmetry.symmetry import Action, Symmetry, entries_of, generator, plain, relative

_PAIRS = 4096  # pairs whose differences are held at once


class Permutation(Symmetry):
    r"""Hidden units (channels, heads) that may change places.

    The mirror of units a and b exchanges them; on it they are equal. With :math:`\tau` that exchange,
    ``distance`` of a unit is the least over the others of

    .. math:: \min\Bigl(1, \frac{\lVert\theta - \tau\theta\rVert}{\sqrt2\,\lVert\theta_{ab}\rVert}\Bigr)
        = \min\Bigl(1, \frac{\lVert\theta_a-\theta_b\rVert}{\sqrt{\lVert\theta_a\rVert^2 +
        \lVert\theta_b\rVert^2}}\Bigr),

    0 for twins, 1 for orthogonal (or opposite) units; :math:`\theta_{ab}` is all that the exchange
    moves. Two units that are both zero are twins. Elements: ``element[b, u]`` is the unit that comes
    to stand at place u.
    """

    kind: ClassVar[str] = "permutation"

    @override
    def random_element(self, seed: int) -> Tensor:
        rng = generator(seed)
        return torch.stack([torch.randperm(self.units, generator=rng) for _ in range(self.blocks)])

    @override
    def inverse(self, element: Tensor) -> Tensor:
        return torch.argsort(self._checked(element), dim=1)

    @override
    def _checked(self, element: Tensor) -> Tensor:
        element = super()._checked(element)
        if not torch.equal(element.sort(dim=1).values, torch.arange(self.units).expand_as(element)):
            raise ValueError(f"element must hold every unit 0..{self.units - 1} once in each block")
        return element

    @override
    def _move(self, slices_BUMR: Tensor, element: Tensor, action: Action) -> Tensor:
        block_B1 = torch.arange(self.blocks, device=element.device).unsqueeze(1)
        return slices_BUMR[block_B1, element]

    @override
    def distance(self, module: nn.Module | None = None) -> Tensor:
        return self.pair_distances(module).amin(2).flatten()

    def nearest(self, module: nn.Module | None = None) -> Tensor:
        """Return the unit of the same block that each unit is closest to, ``[S]`` (within the block)."""
        return self.pair_distances(module).argmin(2).flatten()

    def pair_distances(self, module: nn.Module | None = None) -> Tensor:
        """Return the distance of every pair of units in a block, ``[B, U, U]``; infinite to itself."""
        moved_BUU, all_BUU = self._pairs(self._tensors(module))
        safe = torch.where(all_BUU > 0, all_BUU, torch.ones_like(all_BUU))
        distances = (moved_BUU / safe).sqrt().clamp(max=1)
        return distances.masked_fill(torch.eye(self.units, dtype=torch.bool, device=safe.device), torch.inf)

    @override
    def mirror_norm(self, tensors: Mapping[str, Tensor]) -> Tensor:
        moved_BUU, _ = self._pairs(tensors)
        eye = torch.eye(self.units, dtype=torch.bool, device=moved_BUU.device)
        return (moved_BUU / 2).sqrt().masked_fill(eye, torch.inf).amin(2).flatten()

    def _pairs(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return half of ``|v - exchanged v|^2`` and the squared norm of what the exchange moves."""
        rows_BUD = self._rows(tensors)
        squares_BU = rows_BUD.square().sum(2)
        all_BUU = squares_BU.unsqueeze(2) + squares_BU.unsqueeze(1)
        moved_BUU = all_BUU - 2 * rows_BUD @ rows_BUD.mT
        # The Gram matrix loses twins to rounding: their differences are taken one by one.
        close = torch.nonzero(moved_BUU <= 1e-10 * all_BUU)
        for block, a, b in (chunk.unbind(1) for chunk in close.split(_PAIRS)):
            difference = rows_BUD[block, a] - rows_BUD[block, b]
            moved_BUU[block, a, b] = difference.square().sum(1)
        for _, w_BUUK in self._crossings(tensors):
            # Exchange in rows and columns at once: w_aa meets w_bb and w_ab meets w_ba.
            own_BUK = torch.diagonal(w_BUUK, dim1=1, dim2=2).movedim(-1, 1)
            turned = w_BUUK.transpose(1, 2)
            a, b = own_BUK.unsqueeze(2), own_BUK.unsqueeze(1)
            wrong = (a - turned).square() + (w_BUUK - b).square()
            wrong = wrong + (a - w_BUUK).square() + (turned - b).square()
            right = (a - b).square() + (w_BUUK - turned).square()
            moved_BUU = moved_BUU + (right - wrong).sum(-1)
            counted = a.square() + b.square() + w_BUUK.square() + turned.square()
            all_BUU = all_BUU - counted.sum(-1)
        return moved_BUU.clamp_min(0), all_BUU.clamp_min(0)

    @override
    def fixed_part(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the mean over all orders of the units: what every permutation leaves in place."""
        fixed = {name: plain(tensor).clone() for name, tensor in tensors.items()}
        for action in self.actions:
            if action.buffer or action.name not in fixed:
                continue
            tensor = fixed[action.name]
            slices_BUMR = action.gather(tensor)
            action.scatter_(tensor, slices_BUMR.mean(1, keepdim=True).expand_as(slices_BUMR))
        for (_, w_BUUK), (first, second) in zip(
            self._crossings(tensors), self._crossed(tensors), strict=True
        ):
            # A matrix permuted on both sides keeps two numbers: the mean of its diagonal and of the rest.
            eye = torch.eye(self.units, dtype=torch.bool, device=w_BUUK.device)
            own_BK = torch.diagonal(w_BUUK, dim1=1, dim2=2).mean(-1)
            rest_BK = (w_BUUK.sum((1, 2)) - own_BK * self.units) / max(self.units * (self.units - 1), 1)
            new = torch.where(eye[None, :, :, None], own_BK[:, None, None], rest_BK[:, None, None])
            view, where = entries_of(fixed[first.name], first, second)
            view[where] = new.reshape(view[where].shape).to(view.dtype)
        return fixed


class _Factors(Symmetry):
    """Units that are multiplied by numbers."""

    @override
    def inverse(self, element: Tensor) -> Tensor:
        return 1 / self._checked(element)

    @override
    def _move(self, slices_BUMR: Tensor, element: Tensor, action: Action) -> Tensor:
        factors = element.to(slices_BUMR.dtype).pow(action.power)
        return slices_BUMR * factors[:, :, None, None]

    @override
    def distance(self, module: nn.Module | None = None) -> Tensor:
        return relative(self._squares(self._tensors(module)).sqrt())

    @override
    def mirror_norm(self, tensors: Mapping[str, Tensor]) -> Tensor:
        return self._squares(tensors).sqrt().flatten()

    @override
    def fixed_part(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the vector with all that any factor moves set to zero."""
        marks = {name: torch.zeros_like(plain(t), dtype=torch.float64) for name, t in tensors.items()}
        units_BU = torch.rand(self.blocks, self.units, generator=generator(0), dtype=torch.float64) + 1
        for action in self.actions:
            if not action.buffer and action.name in marks:
                slices = action.gather(marks[action.name])
                marks_of = action.power * units_BU.to(slices.device)[:, :, None, None]
                action.scatter_(marks[action.name], slices + marks_of)
        # The exponents of u and 1/u cancel on the diagonal.
        return {name: plain(t).masked_fill(marks[name].abs() > 1e-9, 0) for name, t in tensors.items()}


class _Positive(_Factors):
    continuous: ClassVar[bool] = True

    @override
    def random_element(self, seed: int) -> Tensor:
        draw = torch.randn(self.blocks, self.units, generator=generator(seed), dtype=torch.float64)
        return (0.3 * draw).exp()

    @override
    def _checked(self, element: Tensor) -> Tensor:
        element = super()._checked(element)
        if not bool((element > 0).all() and element.isfinite().all()):
            raise ValueError(f"element must hold positive factors, got a least of {element.min():g}")
        return element

    @override
    def charge(self, module: nn.Module | None = None) -> Tensor:
        r"""Return :math:`\sum_i p_i \lVert\theta_{i,u}\rVert^2`, ``[S]``, conserved by gradient flow.

        The sum runs over the tensors that move with powers :math:`p_i`: incoming minus outgoing squared
        norm for a rescaling (Du et al., 2018), the squared norm itself for a scale. A step of learning
        rate ``lr`` moves it by order ``lr^2``; gradient noise moves it by the law of balance (Ziyin et
        al., 2023, arXiv 2308.06671).
        """
        parts = self._parts(self._tensors(module))
        return sum((a.power * s.square().sum(2) for a, s in parts), torch.tensor(0.0).double()).flatten()


class Rescaling(_Positive):
    r"""Units whose incoming weights may be multiplied by a factor that the outgoing ones make up for.

    :math:`\ell(\lambda u, w/\lambda) = \ell(u, w)`, through linear maps and positively homogeneous
    activations (ReLU, LeakyReLU, PReLU, max pooling). On the mirror the unit is zero, in and out.
    ``distance`` is the norm of all that moves with the unit over the root mean square of its block,
    at most 1.
    """

    kind: ClassVar[str] = "rescaling"


class Scale(_Positive):
    r"""Weights that a normalisation divides out: multiplying them has no effect on the output.

    One factor a channel in front of batch normalisation, one a group in front of group
    normalisation, one for everything written into the stream in front of layer normalisation. Running
    statistics move along. Exact up to the normalisation's ``eps``, which the proof sets to nearly
    zero. With a single unit ``distance`` is 1 unless the weights are zero.
    """

    kind: ClassVar[str] = "scale"


class SignFlip(_Factors):
    """Units whose incoming and outgoing weights may both change sign: odd activations.

    On the mirror the unit is zero, in and out; ``distance`` as for :class:`Rescaling`.
    """

    kind: ClassVar[str] = "signflip"

    @override
    def random_element(self, seed: int) -> Tensor:
        bits = torch.randint(0, 2, (self.blocks, self.units), generator=generator(seed))
        return (2 * bits - 1).double()

    @override
    def inverse(self, element: Tensor) -> Tensor:
        return self._checked(element)

    @override
    def _cancel(self, powers: tuple[float, float]) -> bool:
        return sum(powers) % 2 == 0

    @override
    def _checked(self, element: Tensor) -> Tensor:
        element = super()._checked(element)
        if not bool((element.abs() == 1).all()):
            raise ValueError("element must hold signs, +1 or -1")
        return element


@dataclass(frozen=True, eq=False, repr=False)
class Rotation(Symmetry):
    r"""Units between two linear maps: :math:`W_2 W_1 = (W_2 A^{-1})(A W_1)` for every invertible A.

    Two linear layers in a row, queries and keys, values and output of an attention head, the two
    factors of a low-rank adapter. Every direction n has a mirror :math:`I - 2nn^\top`; on it the
    hidden space has lost the direction, :math:`n^\top\Theta = 0`. ``distance`` is therefore given for
    the singular directions of :math:`\Theta`, from the strongest to the weakest of each block: the
    singular value over the root mean square, at most 1.

    Args:
        orthogonal: only orthogonal A leave the function alone (a tensor meets itself on the way);
            else every invertible A does.
    """

    orthogonal: bool = False

    kind: ClassVar[str] = "rotation"
    continuous: ClassVar[bool] = True

    @property
    def conserved(self) -> bool:
        """Whether gradient flow conserves a charge: the scalings' do, the orthogonal part has none."""
        return not self.orthogonal

    @override
    def random_element(self, seed: int) -> Tensor:
        """Return ``[B, U, U]``: an orthogonal matrix, times positive scalings unless ``orthogonal``."""
        rng = generator(seed)
        draw = torch.randn(self.blocks, self.units, self.units, generator=rng, dtype=torch.float64)
        q_BUU, r_BUU = torch.linalg.qr(draw)
        q_BUU = q_BUU * torch.diagonal(r_BUU, dim1=1, dim2=2).sign().unsqueeze(1)
        if self.orthogonal:
            return q_BUU
        scalings = torch.randn(self.blocks, 1, self.units, generator=rng, dtype=torch.float64)
        return q_BUU * (0.3 * scalings).exp()

    @override
    def inverse(self, element: Tensor) -> Tensor:
        return torch.linalg.inv(self._checked(element))

    @override
    def _element_shape(self) -> tuple[int, ...]:
        return (self.blocks, self.units, self.units)

    @override
    def _checked(self, element: Tensor) -> Tensor:
        element = super()._checked(element).double()
        if self.orthogonal:
            eye = torch.eye(self.units, dtype=torch.float64, device=element.device)
            if not torch.allclose(element @ element.mT, eye.expand_as(element), atol=1e-6):
                raise ValueError(f"element must be orthogonal for {self!r}")
        elif not bool((torch.linalg.matrix_rank(element) == self.units).all()):
            raise ValueError("element must be invertible")
        return element

    @override
    def _move(self, slices_BUMR: Tensor, element: Tensor, action: Action) -> Tensor:
        matrix_BUU = element if action.power > 0 else torch.linalg.inv(element).mT
        moved = torch.einsum("buv,bvmr->bumr", matrix_BUU, slices_BUMR.to(matrix_BUU.dtype))
        return moved.to(slices_BUMR.dtype)

    @override
    def distance(self, module: nn.Module | None = None) -> Tensor:
        return relative(self._singular(self._tensors(module)))

    @override
    def mirror_norm(self, tensors: Mapping[str, Tensor]) -> Tensor:
        return self._singular(tensors).flatten()

    def _singular(self, tensors: Mapping[str, Tensor]) -> Tensor:
        rows_BUD = self._rows(tensors)
        if not bool(rows_BUD.isfinite().all()):
            return rows_BUD.new_full((self.blocks, self.units), torch.nan)
        sigma_BK = torch.linalg.svdvals(rows_BUD)
        return torch.nn.functional.pad(sigma_BK, (0, self.units - sigma_BK.shape[1]))

    @override
    def charge(self, module: nn.Module | None = None) -> Tensor:
        r"""Return :math:`\sum_i p_i \Theta_i\Theta_i^\top`, ``[B, U, U]``, conserved by gradient flow.

        For two linear layers this is the balancedness :math:`W_1W_1^\top - W_2^\top W_2` (Saxe et
        al., 2014). It belongs to the symmetric generators; the antisymmetric ones, the rotations
        proper, have no charge under gradient flow.

        Raises:
            TypeError: if the group is orthogonal: it conserves none.
        """
        if not self.conserved:
            raise TypeError(f"{self!r} has no conserved charge: an orthogonal group conserves none")
        parts = self._parts(self._tensors(module))
        return sum((a.power * s @ s.mT for a, s in parts), torch.tensor(0.0).double())

    @override
    def fixed_part(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the vector with all that moves set to zero, but what commutes with every matrix.

        That is the identity's component, in tensors that turn on both sides.
        """
        fixed = {name: plain(tensor).clone() for name, tensor in tensors.items()}
        for action in self.actions:
            if not action.buffer and action.name in fixed:
                action.scatter_(fixed[action.name], torch.zeros_like(action.gather(fixed[action.name])))
        for (_, w_BUUK), (first, second) in zip(
            self._crossings(tensors), self._crossed(tensors), strict=True
        ):
            own_BK = torch.diagonal(w_BUUK, dim1=1, dim2=2).mean(-1)
            eye = torch.eye(self.units, dtype=w_BUUK.dtype, device=w_BUUK.device)
            new = eye[None, :, :, None] * own_BK[:, None, None]
            view, where = entries_of(fixed[first.name], first, second)
            view[where] = new.reshape(view[where].shape).to(view.dtype)
        return fixed


class Translation(Symmetry):
    r"""A vector added to every class of the logits' layer: softmax, and so the loss, ignores it.

    The output moves, the loss doesn't, so it is looked for only where a loss is given. The units are
    the classes; an element adds one number to each column of the layer, the same for every class:
    ``[D]`` numbers, D the inputs (and the bias). The mirror of a column removes its classes' mean
    twice; on it the mean is zero. ``distance`` is the share of a column that the mean makes up,
    :math:`\sqrt{U}\,\lvert\bar w_d\rvert / \lVert w_d\rVert`, 0 for a zero column.
    """

    kind: ClassVar[str] = "translation"
    continuous: ClassVar[bool] = True

    @property
    def size(self) -> int:
        """Number of columns D: inputs of the layer, and 1 for its bias."""
        return self._rows(self._tensors(None)).shape[2]

    @override
    def _element_shape(self) -> tuple[int, ...]:
        return (1, self.size)

    @override
    def random_element(self, seed: int) -> Tensor:
        """Return ``[1, D]``: what is added to each column."""
        return torch.randn(1, self.size, generator=generator(seed), dtype=torch.float64)

    @override
    def inverse(self, element: Tensor) -> Tensor:
        return -self._checked(element)

    @override
    @torch.no_grad()
    def move_(self, tensors: Mapping[str, Tensor], element: Tensor) -> None:
        element = self._checked(element)
        start = 0
        for action in self.actions:
            slices_BUMR = action.gather(tensors[action.name])
            width = slices_BUMR[0, 0].numel()
            shift = element[0, start : start + width].reshape(1, 1, *slices_BUMR.shape[2:])
            action.scatter_(tensors[action.name], slices_BUMR + shift.to(slices_BUMR))
            start += width

    @override
    def _move(self, slices_BUMR: Tensor, element: Tensor, action: Action) -> Tensor:
        raise NotImplementedError("a translation moves all its tensors at once")

    @override
    def distance(self, module: nn.Module | None = None) -> Tensor:
        w_UD = self._rows(self._tensors(module))[0]
        norm_D = w_UD.norm(dim=0)
        share_D = (
            w_UD.mean(0).abs() * self.units**0.5 / torch.where(norm_D > 0, norm_D, torch.ones_like(norm_D))
        )
        return share_D.clamp(max=1)

    @override
    def mirror_norm(self, tensors: Mapping[str, Tensor]) -> Tensor:
        return self._rows(tensors)[0].mean(0).abs() * self.units**0.5

    @override
    def charge(self, module: nn.Module | None = None) -> Tensor:
        """Return the classes' mean of each column, ``[D]``: the softmax gradient sums to zero over them."""
        return self._rows(self._tensors(module))[0].mean(0)

    @override
    def fixed_part(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the vector with the classes' mean taken out of every column."""
        fixed = {name: plain(tensor).clone() for name, tensor in tensors.items()}
        for action in self.actions:
            if action.name in fixed:
                slices_BUMR = action.gather(fixed[action.name])
                action.scatter_(fixed[action.name], slices_BUMR - slices_BUMR.mean(1, keepdim=True))
        return fixed


KINDS: tuple[type[Symmetry], ...] = (Permutation, Rescaling, SignFlip, Rotation, Scale, Translation)
