"""The search for permutations and signs that bring one network's tensors nearest to another's.

For the units of one permutation, everything else held, the gain of putting unit v of b at place u of a is a
sum of inner products, and the best order is a linear assignment; units that may also change sign are
assigned with the better sign. Going round the permutations until none gains is coordinate ascent
(Ainsworth, Hayase and Srinivasa, 2023, arXiv 2209.04836, for fixed architectures and without signs, heads
and groups). It starts from b as it is, and from orders that are found without knowing the others': by the
sorted magnitudes of a unit's weights, which neither order nor sign of other units changes.

Shape letters: B blocks, U and V units of a and b, M positions of a unit, R other entries, D = M * R.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_sym.symmetry._assignment import assign
from lightning_sym.symmetry._gauge import Tensors, distance
from lightning_sym.symmetry.kinds import Permutation, SignFlip
from lightning_sym.symmetry.symmetry import Action, Symmetry

#: For each set of flips that acts on it, how well each unit of b fits each place of a, ``[B, U, V]``.
Gains = dict[tuple[int, ...], Tensor]
#: What is known of a group's units besides their weights; None: nothing.
Known = Callable[["Group"], Gains | None]


@dataclass(frozen=True)
class Part:
    """An action of a permutation, and which of its group's sign flips act on the same positions."""

    action: Action
    flips: tuple[int, ...]


class Group:
    """A permutation, and the sign flips of the very same units.

    Args:
        permutation: of the units.
        flips: all sign flips there are.
    """

    def __init__(self, permutation: Permutation, flips: Sequence[SignFlip]) -> None:
        self.permutation = permutation
        covers = [(flip, _cover(permutation, flip)) for flip in flips]
        found = [(flip, cover) for flip, cover in covers if cover is not None]
        self.flips = [flip for flip, _ in found]
        self.names = list(permutation.parameters)
        self.parts: list[Part] = []
        for number, action in enumerate(permutation.actions):
            if action.buffer:
                continue
            patterns: dict[tuple[int, ...], list[int]] = defaultdict(list)
            for m in range(action.index.shape[2]):
                acting = tuple(i for i, (_, cover) in enumerate(found) if (number, m) in cover)
                patterns[acting].append(m)
            for acting, positions in patterns.items():
                self.parts.append(Part(replace(action, index=action.index[:, :, positions]), acting))

    @property
    def is_crossed(self) -> bool:
        """Whether a tensor is moved along two dimensions at once."""
        return any(len(dims) > 1 for dims in self.permutation.parameters.values())


def _cover(permutation: Permutation, flip: SignFlip) -> set[tuple[int, int]] | None:
    """Return the places ``(action, m)`` of a permutation that a flip turns; None: other units."""
    if (flip.blocks, flip.units) != (permutation.blocks, permutation.units):
        return None
    covered: set[tuple[int, int]] = set()
    for turned in flip.actions:
        if turned.buffer:
            continue
        for number, action in enumerate(permutation.actions):
            if (action.name, action.dim) != (turned.name, turned.dim):
                continue
            if action.index.shape[2] * turned.index.shape[2] > 4096:
                return None
            hit_BUMN = action.index[..., :, None] == turned.index[..., None, :]
            if not bool(hit_BUMN.any(2).all()):
                continue
            if turned.power % 2:
                hit_M = hit_BUMN.any(3).flatten(0, 1)
                if not torch.equal(hit_M.all(0), hit_M.any(0)):
                    return None
                covered |= {(number, m) for m in torch.nonzero(hit_M[0]).flatten().tolist()}
            break
        else:
            return None
    return covered


class Alignment:
    """b on its way to a.

    Args:
        goal: a's tensors, float64, by clean names.
        tensors: b's, which are moved in place.
        symmetries: permutations and sign flips.

    Attributes:
        steps: what was done to b, in order.
    """

    def __init__(self, goal: Tensors, tensors: Tensors, symmetries: Sequence[Symmetry]) -> None:
        self.goal, self.tensors = goal, tensors
        self.steps: list[tuple[Symmetry, Tensor]] = []
        self.flips = [s for s in symmetries if isinstance(s, SignFlip)]
        groups = [Group(s, self.flips) for s in symmetries if isinstance(s, Permutation)]
        # Whole heads and groups first: within them units are compared block by block.
        self.groups = sorted(groups, key=lambda group: group.permutation.blocks > 1)

    def do(self, symmetry: Symmetry, element: Tensor) -> None:
        """Move b's tensors, and keep what moved them."""
        still = torch.arange(symmetry.units) if isinstance(symmetry, Permutation) else torch.ones(())
        if not torch.equal(element, still.to(element.dtype).expand_as(element)):
            symmetry.move_(self.tensors, element)
            self.steps.append((symmetry, element))

    def undo(self, count: int) -> None:
        """Take steps back until ``count`` are left."""
        while len(self.steps) > count:
            symmetry, element = self.steps.pop()
            symmetry.move_(self.tensors, symmetry.inverse(element))

    # The start.

    def begin(self, known: Known, is_told: Callable[[SignFlip], bool]) -> None:
        """Set every order and sign from what does not depend on those that are not set yet.

        Args:
            known: what is known of a group's units besides their weights.
            is_told: whether that tells of a flip's signs; else weights do.
        """
        unset: list[Symmetry] = [*(group.permutation for group in self.groups), *self.flips]
        for group in self.groups:
            own = {id(group.permutation), *map(id, group.flips)}
            others = {name for s in unset if id(s) not in own for name in s.parameters}
            given = known(group)
            gains = self._first_gains(group, others) if given is None else given
            decided = {flip for acting in gains for flip in acting}
            if given is not None:
                decided = {flip for flip in decided if is_told(group.flips[flip])}
            self._settle(group, gains, decided)
            settled = {id(group.permutation), *(id(group.flips[flip]) for flip in decided)}
            unset = [s for s in unset if id(s) not in settled]
        self._first_signs([flip for flip in unset if isinstance(flip, SignFlip)])

    def _first_gains(self, group: Group, unset: set[str]) -> Gains:
        """Return gains by entries where all else is set, by sorted magnitudes elsewhere."""
        gains: Gains = {}
        for part in group.parts:
            if part.action.name in unset or group.is_crossed:
                a_BUD, b_BVD = (self._slices(part, side).abs().sort(2).values for side in self._sides)
                _add(gains, (), a_BUD @ b_BVD.mT)
            else:
                _add(gains, part.flips, self._products(part))
        return gains

    def _first_signs(self, unset: list[SignFlip]) -> None:
        """Set signs from weights between units whose signs are set; where there are none, from all."""
        while unset:
            chosen, votes = unset[0], self._votes(unset[0], skip=set())
            for flip in unset:
                others = {name for other in unset if other is not flip for name in other.parameters}
                sure = self._votes(flip, skip=others)
                if sure is not None:
                    chosen, votes = flip, sure
                    break
            if votes is not None:
                self.do(chosen, torch.where(votes < 0, -1.0, 1.0).double())
            unset = [flip for flip in unset if flip is not chosen]

    # Ascent.

    def ascend(self, *, sweeps: int) -> int:
        """Improve one symmetry after another until none gains; return the passes that it took."""
        for sweep in range(sweeps):
            moved = [self._improve(group) for group in self.groups] + [self._turn(f) for f in self.flips]
            if not any(moved):
                return sweep + 1
        return sweeps

    def turn(self, flips: Sequence[SignFlip], *, sweeps: int) -> None:
        """Improve signs alone until none gains."""
        for _ in range(sweeps):
            turned = [self._turn(flip) for flip in flips]  # all of them, not only up to the first
            if not any(turned):
                return

    def _improve(self, group: Group) -> bool:
        gains: Gains = {}
        for part in group.parts:
            _add(gains, part.flips, self._products(part))
        return self._try(group.names, lambda: self._settle(group, gains, set(range(len(group.flips)))))

    def _turn(self, flip: SignFlip) -> bool:
        votes = self._votes(flip, skip=set())
        if votes is None:
            return False
        element = torch.where(votes < 0, -1.0, 1.0).double()
        return self._try(list(flip.parameters), lambda: self.do(flip, element))

    def _try(self, names: list[str], deed: Callable[[], None]) -> bool:
        count, before = len(self.steps), distance(self.tensors, self.goal, names)
        deed()
        if len(self.steps) == count:
            return False
        if distance(self.tensors, self.goal, names) < before * (1 - 1e-9):
            return True
        self.undo(count)
        return False

    # Pieces.

    @property
    def _sides(self) -> tuple[Tensors, Tensors]:
        return self.goal, self.tensors

    def _slices(self, part: Part, tensors: Tensors) -> Tensor:
        return part.action.gather(tensors[part.action.name]).flatten(2)

    def _products(self, part: Part) -> Tensor:
        return self._slices(part, self.goal) @ self._slices(part, self.tensors).mT

    def _votes(self, flip: SignFlip, *, skip: set[str]) -> Tensor | None:
        """Return how much each unit's sign agrees, ``[B, U]``; None if no weight tells."""
        acting = [a for a in flip.actions if not a.buffer and a.power % 2 and a.name not in skip]
        if not acting:
            return None
        pairs = [(a.gather(self.goal[a.name]), a.gather(self.tensors[a.name])) for a in acting]
        return torch.stack([(a * b).sum((2, 3)) for a, b in pairs]).sum(0)

    def _settle(self, group: Group, gains: Gains, decided: set[int]) -> None:
        """Apply the best order, each unit with its best signs, and the signs of the decided flips."""
        free = sorted({flip for acting in gains for flip in acting})
        combinations = list(itertools.product((1, -1), repeat=len(free)))
        values = torch.stack([_signed(gains, dict(zip(free, c, strict=True))) for c in combinations])
        best_BUV, which_BUV = values.max(0)
        element_BU = torch.stack([assign(block_UV) for block_UV in best_BUV])
        which_BU = which_BUV.gather(2, element_BU.unsqueeze(2)).squeeze(2)
        self.do(group.permutation, element_BU)
        signs = torch.tensor(combinations).reshape(len(combinations), -1).double()
        for place, flip in enumerate(free):
            if flip in decided:
                self.do(group.flips[flip], signs[which_BU, place])


def _signed(gains: Gains, signs: dict[int, int]) -> Tensor:
    total = torch.zeros(())
    for acting, gain_BUV in gains.items():
        sign = 1
        for flip in acting:
            sign *= signs.get(flip, 1)
        total = total + sign * gain_BUV
    return total


def _add(gains: Gains, acting: tuple[int, ...], gain_BUV: Tensor) -> None:
    gains[acting] = gains[acting] + gain_BUV if acting in gains else gain_BUV
