"""From equations between legs to candidates: groups that nothing written down forbids."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction

import torch

from lightning_sym.symmetry._legs import Chain, Dim, Leg, Mismatch, align, chains_of
from lightning_sym.symmetry._trace import Ref
from lightning_sym.symmetry.kinds import Permutation, Rescaling, Rotation, Scale, SignFlip, Translation
from lightning_sym.symmetry.rules import Equations, Event
from lightning_sym.symmetry.symmetry import Action, Symmetry

Number = int | float | Fraction


@dataclass(frozen=True)
class Candidate:
    """A symmetry that was not ruled out, and a smaller group to fall back on if it is refuted."""

    symmetry: Symmetry
    fallback: Symmetry | None = None


class Elimination:
    """Homogeneous linear equations over the rationals, or over the integers modulo 2."""

    def __init__(self, *, binary: bool = False) -> None:
        self.binary = binary
        self.solved: dict[int, dict[int, Fraction]] = {}
        self.within: dict[int, set[int]] = defaultdict(set)
        self.seen: dict[int, None] = {}

    def add(self, equation: dict[int, Number], *, prefer: frozenset[int] = frozenset()) -> None:
        """Add ``sum of coefficient * variable = 0``; solve for a preferred variable if there is one."""
        row: dict[int, Fraction] = defaultdict(Fraction)
        for variable, coefficient in equation.items():
            self.seen.setdefault(variable)
            for free, factor in self.solved.get(variable, {variable: Fraction(1)}).items():
                row[free] += Fraction(coefficient) * factor
        row = self._reduced(row)
        if not row:
            return
        pivot = next((v for v in row if v in prefer), max(row))
        scale = row.pop(pivot)
        value = self._reduced({v: -c / scale for v, c in row.items()})
        self.solved[pivot] = value
        for free in value:
            self.within[free].add(pivot)
        for other in self.within.pop(pivot, set()):
            old = self.solved[other]
            factor = old.pop(pivot)
            mixed = defaultdict(Fraction, old)
            for free, c in value.items():
                mixed[free] += factor * c
            self.solved[other] = self._reduced(mixed)
            for free in value:
                (self.within[free].add if free in self.solved[other] else self.within[free].discard)(other)

    def _reduced(self, row: dict[int, Fraction]) -> dict[int, Fraction]:
        if self.binary:
            return {v: Fraction(1) for v, c in row.items() if c % 2}
        return {v: c for v, c in row.items() if c}

    def basis(self) -> Iterator[tuple[int, dict[int, Fraction]]]:
        """Yield each free variable with the solution in which it alone is 1."""
        for free in self.seen:
            if free not in self.solved:
                yield free, {free: Fraction(1), **{p: self.solved[p][free] for p in self.within[free]}}


class Classes:
    """Union-find over atoms, with a variance (+1 or -1) against the root."""

    def __init__(self) -> None:
        self.parent: dict[int, tuple[int, int]] = {}
        self.pinned: set[int] = set()
        self.twisted: set[int] = set()

    def root(self, atom: int) -> tuple[int, int]:
        """Return the class of an atom and its variance in it."""
        path, sign = [], 1
        while atom in self.parent:
            path.append((atom, sign))
            atom, step = self.parent[atom]
            sign *= step
        for other, before in path:
            self.parent[other] = (atom, sign * before)
        return atom, sign

    def join(self, a: int, b: int, variance: int = 1) -> None:
        """Put two atoms into one class; contradicting variances leave the orthogonal group."""
        (x, s), (y, t) = self.root(a), self.root(b)
        if x == y:
            if s * t != variance:
                self.twisted.add(x)
            return
        self.parent[y] = (x, s * t * variance)
        if y in self.pinned:
            self.pinned.add(x)
        if y in self.twisted:
            self.twisted.add(x)

    def pin(self, atom: int) -> None:
        """Forbid a class every motion."""
        self.pinned.add(self.root(atom)[0])


@dataclass(frozen=True)
class Place:
    """An atom's position in a dimension of a named tensor."""

    ref: Ref
    name: str
    dim: int
    buffer: bool
    offset: int
    chain: tuple[tuple[int, int, int], ...]
    position: int

    @property
    def atom(self) -> int:
        """The atom's number."""
        return self.chain[self.position][0]

    def siblings(self) -> list[tuple[int, int, int]]:
        """Return the factors beside the atom."""
        return [link for i, link in enumerate(self.chain) if i != self.position]

    def index(self, block: tuple[int, int, int] | None = None) -> torch.Tensor:
        """Return the positions along the dimension, ``[B, U, M]``."""
        _, size, stride = self.chain[self.position]
        rest = torch.tensor([self.offset])
        for link in self.siblings():
            if link != block:
                rest = (rest[:, None] + torch.arange(link[1]) * link[2]).flatten()
        units = torch.arange(size) * stride
        blocks = torch.arange(block[1]) * block[2] if block is not None else torch.zeros(1, dtype=torch.long)
        return blocks[:, None, None] + units[:, None] + rest


class Solver:
    """Settles what the rules wrote down."""

    def __init__(self, rules: Equations) -> None:
        self.rules = rules
        self.sizes: dict[int, int] = {}
        self.perm, self.mix = Classes(), Classes()
        self.scale, self.sign = Elimination(), Elimination(binary=True)
        self._settle(rules.events)
        self.places = self._places()

    def _settle(self, events: list[Event]) -> None:
        """Refine until every equation's dimensions have one structure; what can't is pinned."""
        events = list(events)
        while True:
            before = Leg(1).number
            kept: list[Event] = []
            for event in events:
                try:
                    for other in event.dims[1:]:
                        align(event.dims[0], other)
                    kept.append(event)
                except Mismatch:
                    kept += [Event((dim,), False, ((1,),), ((1,),), None) for dim in event.dims]
            grown = Leg(1).number - before > 1
            events = kept
            if not grown and not any(self._refined(event) for event in events):
                break
        for event in events:
            self._write(event)

    def _refined(self, event: Event) -> bool:
        counts = {sum(leg.size > 1 for leg in self._atoms(dim)) for dim in event.dims}
        return len(counts) > 1

    def _atoms(self, dim: Dim) -> list[Leg]:
        return [atom for leg in dim for atom in leg.atoms()]

    def _write(self, event: Event) -> None:
        columns = [{atom.number: atom for atom in self._atoms(event.dims[0])}]
        for other in event.dims[1:]:
            columns.append({a.number: b for a, b in align(event.dims[0], other)})
        for number in columns[0]:
            atoms = [column[number].number for column in columns if number in column]
            if len(atoms) < len(columns):
                continue
            for atom in atoms:
                self.scale.seen.setdefault(atom)
                self.sign.seen.setdefault(atom)
            for i, atom in enumerate(atoms):
                self.perm.join(atoms[0], atom)
                if event.mix is not None:
                    self.mix.join(atoms[0], atom, event.mix[0] * event.mix[i])
                else:
                    self.mix.pin(atom)
            if not event.perm:
                self.perm.pin(atoms[0])
            prefer = frozenset() if event.makes_up is None else frozenset({atoms[event.makes_up]})
            for system, equations in ((self.scale, event.scale), (self.sign, event.sign)):
                for coefficients in equations:
                    row: dict[int, Number] = defaultdict(int)
                    for atom, coefficient in zip(atoms, coefficients, strict=True):
                        row[atom] += Fraction(coefficient)
                    system.add(row, prefer=prefer)

    def _places(self) -> list[Place]:
        rules, found = self.rules, []
        live = rules.trace.live
        for name, ref in rules.trace.named.items():
            if ref.number not in rules.dims or ref.number not in rules.movable:
                continue
            for axis, dim in enumerate(rules.dims[ref.number]):
                chains: list[Chain] = chains_of(dim)
                for offset, chain in chains:
                    for position, (atom, size, _) in enumerate(chain):
                        self.sizes[atom] = size
                        found.append(
                            Place(ref, name, axis, ref.number not in live, offset, tuple(chain), position)
                        )
        return found

    # Candidates.

    def candidates(self) -> list[Candidate]:
        """Return every candidate, kind by kind."""
        return [
            *self._permutations(),
            *self._factors(self.scale, sign=False),
            *self._factors(self.sign, sign=True),
            *self._rotations(),
            *self._scales(),
        ]

    def _permutations(self) -> Iterator[Candidate]:
        groups: dict[int, list[tuple[Place, Number]]] = defaultdict(list)
        for place in self.places:
            groups[self.perm.root(place.atom)[0]].append((place, 1))
        for root, group in groups.items():
            if root not in self.perm.pinned:
                yield from self._build(Permutation, group, least=2)

    def _rotations(self) -> Iterator[Candidate]:
        groups: dict[int, list[tuple[Place, Number]]] = defaultdict(list)
        for place in self.places:
            root, variance = self.mix.root(place.atom)
            groups[root].append((place, variance))
        for root, group in groups.items():
            if root not in self.mix.pinned:
                if group[0][1] < 0:
                    group = [(place, -variance) for place, variance in group]
                yield from self._build(Rotation, group, least=2, orthogonal=root in self.mix.twisted)

    def _factors(self, system: Elimination, *, sign: bool) -> Iterator[Candidate]:
        at: dict[int, list[Place]] = defaultdict(list)
        for place in self.places:
            at[place.atom].append(place)
        found: list[tuple[set[int], Candidate]] = []
        for _, solution in system.basis():
            group: list[tuple[Place, Number]] = [
                (place, solution[atom]) for atom in solution for place in at[atom]
            ]
            group.sort(key=lambda pair: (pair[0].ref.number, pair[0].dim, pair[0].offset))
            own = [power for place, power in group if not place.buffer]
            if not own:
                continue
            if sign:
                kind: type[Symmetry] = SignFlip
            else:
                unit = math.lcm(*(Fraction(p).denominator for _, p in group)) * (1 if own[0] > 0 else -1)
                group = [(place, power * unit) for place, power in group]
                kind = Scale if all(p > 0 for place, p in group if not place.buffer) else Rescaling
            for candidate in self._build(kind, group, least=1):
                found.append((set(solution), candidate))
        # A factor for a whole head is part of the factors for its units.
        finer = {
            (self.perm.root(link[0])[0], place.name, place.dim)
            for atoms, candidate in found
            if candidate.symmetry.blocks > 1
            for atom in atoms
            for place in at[atom]
            for link in place.chain[: place.position]
        }
        for atoms, candidate in found:
            spots = {
                (self.perm.root(a)[0], place.name, place.dim)
                for a in atoms
                for place in at[a]
                if not place.buffer
            }
            if not spots <= finer:
                yield candidate

    def _build(
        self,
        kind: type[Symmetry],
        group: list[tuple[Place, Number]],
        *,
        least: int,
        orthogonal: bool = False,
    ) -> Iterator[Candidate]:
        sizes = {place.chain[place.position][1] for place, _ in group}
        if len(sizes) != 1 or min(sizes) < least or all(place.buffer for place, _ in group):
            return
        classes = {self.perm.root(place.atom)[0] for place, _ in group}
        if any(self.perm.root(link[0])[0] in classes for place, _ in group for link in place.siblings()):
            return  # an index that meets itself in one dimension
        joint = self._symmetry(kind, group, None, orthogonal)
        block = self._common(place for place, _ in group)
        if block is None:
            yield Candidate(joint)
        else:
            yield Candidate(self._symmetry(kind, group, block, orthogonal), fallback=joint)

    def _common(self, places: Iterable[Place]) -> int | None:
        """Return the class of a sibling factor that stands beside the atom in every tensor."""
        common: dict[int, None] | None = None
        for place in places:
            own = {self.perm.root(atom)[0]: None for atom, size, _ in place.siblings() if size > 1}
            common = own if common is None else {root: None for root in common if root in own}
        return next(iter(common), None) if common else None

    def _symmetry(
        self, kind: type[Symmetry], group: list[tuple[Place, Number]], block: int | None, orthogonal: bool
    ) -> Symmetry:
        actions: list[Action] = []
        for place, power in group:
            beside = next((s for s in place.siblings() if self.perm.root(s[0])[0] == block), None)
            actions.append(Action(place.name, place.dim, place.index(beside), float(power), place.buffer))
        actions = merged(actions)
        path = next((a.name for a in actions if a.dim == 0 and a.name.endswith("weight")), actions[0].name)
        path = path.rpartition(".")[0] or path
        if kind is Rotation:
            return Rotation(tuple(actions), path=path, orthogonal=orthogonal)
        return kind(tuple(actions), path=path)

    def _scales(self) -> Iterator[Candidate]:
        """Yield overall factors that a normalisation divides out of everything written in front of it."""
        live = self.rules.trace.live
        names = {
            ref.number: (name, ref)
            for name, ref in self.rules.trace.named.items()
            if ref.number in self.rules.dims and ref.number in self.rules.movable
        }
        system = Elimination()
        prefer = frozenset(names)
        for equation in self.rules.whole:
            system.add(dict(equation), prefer=prefer)
        normed = set(self.rules.normed)
        for _, solution in system.basis():
            moved = {number: p for number, p in solution.items() if number in names}
            own = [p for number, p in moved.items() if number in live]
            if (
                not own
                or not normed & solution.keys()
                or (not all(p > 0 for p in own) and not all(p < 0 for p in own))
            ):
                continue
            unit = math.lcm(*(p.denominator for p in moved.values())) * (1 if own[0] > 0 else -1)
            actions = []
            for number, power in sorted(moved.items()):
                name, ref = names[number]
                rows = ref.shape[0] if ref.shape else 1
                if ref.shape:
                    index = torch.arange(rows).reshape(1, 1, rows)
                    actions.append(Action(name, 0, index, float(power * unit), number not in live))
            if actions:
                path = actions[0].name.rpartition(".")[0] or actions[0].name
                yield Candidate(Scale(tuple(actions), path=path))

    def translations(self) -> Iterator[Candidate]:
        """Yield the layers that write the output: what they add to every class alike."""
        for ref in self.rules.trace.outputs:
            dims = self.rules.dims.get(ref.number, [])
            for dim in dims[1:][::-1]:
                roots = {self.perm.root(atom.number)[0] for atom in self._atoms(dim)}
                group = [(p, 1) for p in self.places if self.perm.root(p.atom)[0] in roots and not p.buffer]
                if len(roots) == 1 and group and len({p.chain[p.position][1] for p, _ in group}) == 1:
                    symmetry = self._symmetry(Translation, [(p, 1) for p, _ in group], None, False)
                    if symmetry.units > 1:
                        yield Candidate(symmetry)


def merged(actions: list[Action]) -> list[Action]:
    """Put actions on one dimension with one power together, positions side by side."""
    groups: dict[tuple[str, int, float], list[Action]] = defaultdict(list)
    for action in actions:
        groups[action.name, action.dim, action.power].append(action)
    out = []
    for group in groups.values():
        first = group[0]
        index = torch.cat([action.index for action in group], dim=2)
        out.append(Action(first.name, first.dim, index, first.power, first.buffer))
    return out


def touched(symmetries: Iterable[Symmetry]) -> list[str]:
    """Return the names of all tensors that some symmetry moves, once, in order."""
    names = itertools.chain.from_iterable((*s.parameters, *s.buffers) for s in symmetries)
    return list(dict.fromkeys(names))
