"""Finding a network's parameter symmetries: traced, solved for, and each proved by trying it."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_flatten, tree_map

from lightning_sym._names import clean_name
from lightning_sym.symmetry._solve import Candidate, Solver, touched
from lightning_sym.symmetry._trace import InDouble, plain_attention, tensors_of, trace
from lightning_sym.symmetry.kinds import KINDS, Permutation, SignFlip
from lightning_sym.symmetry.rules import write_equations
from lightning_sym.symmetry.symmetry import Action, Symmetry, generator, named_tensors

TOLERANCE = 1e-8
_TINY = 1e-30  # stands in for the normalisations' eps while scales are tried


class Symmetries(list[Symmetry]):
    """The symmetries that were found: a list, with what was not.

    Attributes:
        untraced: what could not be followed, in words; units that pass through it are not reported.
        refuted: candidates that the trace allowed and the trial refuted, one line each.
    """

    def __init__(
        self, found: Sequence[Symmetry] = (), *, untraced: Sequence[str] = (), refuted: Sequence[str] = ()
    ) -> None:
        super().__init__(found)
        self.untraced = tuple(untraced)
        self.refuted = tuple(refuted)

    def of_kind(self, kind: str) -> list[Symmetry]:
        """Return the symmetries of one kind ("permutation", "rescaling", ...)."""
        return [symmetry for symmetry in self if symmetry.kind == kind]


def find_symmetries(
    module: nn.Module,
    *example_inputs: Any,
    loss: Callable[[Any], Tensor] | None = None,
    kinds: str | Sequence[str] | None = None,
    include_frozen: bool = True,
    tolerance: float = TOLERANCE,
    seed: int = 0,
) -> Symmetries:
    r"""Find the transformations of a network's parameters that leave its output alone.

    One forward pass on a float64 copy (on the CPU, in evaluation mode) is traced (see ``_trace`` for the
    choice of tracer), every operation says what may move through it, and the equations are solved. Each
    candidate is then tried: parameters and running statistics of the copy are put to a random point near
    their values, so that nothing is a symmetry only because a weight is zero, a random element that moves
    every unit is applied, and the output must not move by more than ``tolerance`` of its largest absolute
    entry: in evaluation mode and, where there is batch normalisation, with it in training mode. Candidates
    are tried together first and halved where that fails. What fails is not returned. Forward hooks of the
    module run, on the copy.

    Args:
        module: the network. It is copied and left as it is.
        *example_inputs: what ``module(...)`` takes; small and random, nothing special about them. A
            proof reaches as far as they do.
        loss: a function of the module's output, to find what leaves only the loss alone
            (:class:`Translation`).
        kinds: names of the kinds to look for; by default all of them.
        include_frozen: let parameters without ``requires_grad`` move too; else they are constants.
        tolerance: largest change of the output, relative to its largest entry.
        seed: for the random point and elements; the global random state is left alone.

    Returns:
        A list of symmetries bound to ``module``, with the lists ``untraced`` and ``refuted``.

    Raises:
        ValueError: if a kind is unknown, the tolerance not positive, no example is given or the output
            holds no floating-point numbers, or NaN.
        TypeError: if ``module`` is none.

    Warns:
        UserWarning: if parameters pass through operations that can't be followed; what was found is
            returned.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
    known = [kind.kind for kind in KINDS]
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if kinds is not None and not set(kinds) <= set(known):
        raise ValueError(f"kinds must be among {known}, got {sorted(set(kinds) - set(known))}")
    if not tolerance > 0:
        raise ValueError(f"tolerance must be positive, got {tolerance}")
    if not example_inputs:
        raise ValueError("example_inputs must hold what the module's forward takes, got none")
    wanted = set(known if kinds is None else kinds)
    inner = _copy(getattr(module, "_orig_mod", module)).double().cpu().eval()
    inputs = tree_map(_double, example_inputs)
    home = next((tensor.device for tensor in tensors_of(example_inputs)), torch.device("cpu"))
    with torch.random.fork_rng(devices=[]), torch.compiler.set_stance("force_eager"):
        torch.manual_seed(seed)
        traced = trace(inner, _fresh(inputs))
        stats = _running_statistics(inner)
        fixed = {name for name in traced.named if name not in stats and name in dict(inner.named_buffers())}
        if not include_frozen:
            frozen = {name for name, p in module.named_parameters() if not p.requires_grad}
            frozen = {clean_name(name) for name in frozen}
            fixed |= {name for name in traced.named if clean_name(name) in frozen}
        rules = write_equations(traced, fixed=frozenset(fixed))
        solver = Solver(rules)
        trial = _Trial(inner, inputs, tolerance=tolerance, seed=seed, loss=None, home=home)
        candidates = [c for c in solver.candidates() if c.symmetry.kind in wanted]
        proved = trial.prove([_renamed(candidate) for candidate in candidates])
        if loss is not None and "translation" in wanted:
            trial = _Trial(inner, inputs, tolerance=tolerance, seed=seed, loss=loss, home=home)
            found = trial.prove([_renamed(candidate) for candidate in solver.translations()])
            proved = (proved[0] + found[0], proved[1] + found[1])
    order = {name: i for i, name in enumerate(named_tensors(module))}
    held = sorted(proved[0], key=lambda s: (known.index(s.kind), min(order[n] for n in s.parameters)))
    untraced = tuple(rules.untraced)
    if untraced:
        warnings.warn(
            f"some symmetries may be missing: {'; '.join(untraced[:5])}"
            + (f"; and {len(untraced) - 5} more" if len(untraced) > 5 else ""),
            stacklevel=2,
        )
    return Symmetries([s.bind(module) for s in held], untraced=untraced, refuted=[repr(s) for s in proved[1]])


def _copy(module: nn.Module) -> nn.Module:
    """Copy a module, without the trainer it hangs on, and with what it computed and kept cut loose."""
    memo: dict[int, Any] = {}
    for child in module.modules():
        memo |= {
            id(hung): hung for hung in (getattr(child, "_trainer", None), getattr(child, "_fabric", None))
        }
        kept = [leaf for leaf in tree_flatten(vars(child))[0] if isinstance(leaf, Tensor)]
        memo |= {id(tensor): tensor.detach().clone() for tensor in kept if not tensor.is_leaf}
    return copy.deepcopy(module, memo)


def _double(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    leaf = leaf.detach().cpu()
    return leaf.double() if leaf.is_floating_point() else leaf


def _fresh(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return copies of inputs, for a forward pass that may write into them."""
    return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, inputs)


def _running_statistics(module: nn.Module) -> set[str]:
    return {
        f"{name}.{stat}" if name else stat
        for name, child in module.named_modules()
        if isinstance(child, _BatchNorm)
        for stat in ("running_mean", "running_var")
    }


def _renamed(candidate: Candidate) -> Candidate:
    def clean(symmetry: Symmetry) -> Symmetry:
        actions = tuple(
            Action(clean_name(a.name), a.dim, a.index, a.power, a.buffer) for a in symmetry.actions
        )
        return replace(symmetry, actions=actions, path=clean_name(symmetry.path))

    fallback = candidate.fallback
    return Candidate(clean(candidate.symmetry), clean(fallback) if fallback is not None else None)


def _element(symmetry: Symmetry, seed: int, turn: int) -> Tensor:
    """Return a random element that moves every unit, by one turn or the other: any other proves less."""
    if isinstance(symmetry, Permutation):
        rng = generator(seed)
        element = torch.empty(symmetry.blocks, symmetry.units, dtype=torch.long)
        for row in element:  # one cycle through all units
            order = torch.randperm(symmetry.units, generator=rng)
            row[order] = order.roll(1)
        return element
    if isinstance(symmetry, SignFlip):
        return symmetry.random_element(seed) * (-1) ** turn
    return symmetry.random_element(seed)


class _Trial:
    """A copy of the network at a random point, and what it returns there."""

    def __init__(
        self,
        module: nn.Module,
        inputs: tuple[Any, ...],
        *,
        tolerance: float,
        seed: int,
        loss: Callable[[Any], Tensor] | None,
        home: torch.device,
    ) -> None:
        self.module, self.inputs = module, inputs
        self.tolerance, self.seed, self.loss, self.home = tolerance, seed, loss, home
        self.norms = [child for child in module.modules() if isinstance(child, _BatchNorm)]
        self.tensors = named_tensors(module)
        self._shake()
        self.point = {name: tensor.detach().clone() for name, tensor in self.tensors.items()}
        with self._guards(), torch.no_grad(), plain_attention():
            self.reference = [self._run(training) for training in self._modes()]
        if not any(outs for outs in self.reference):
            raise ValueError("module must return floating-point tensors, found none in its output")
        if any(bool(out.isnan().any()) for outs in self.reference for out in outs or []):
            raise ValueError("module must return numbers for example_inputs, found NaN in its output")

    def _modes(self) -> list[bool]:
        return [False, True] if self.norms else [False]

    @torch.no_grad()
    def _shake(self) -> None:
        """Move parameters and running statistics to a generic point near where they are."""
        rng = generator(self.seed)
        statistics = {id(t) for norm in self.norms for t in (norm.running_mean, norm.running_var)}
        parameters = {id(p) for p in self.module.parameters()}
        positive = {id(norm.running_var) for norm in self.norms}
        done: set[int] = set()
        for tensor in self.tensors.values():
            if id(tensor) in done or id(tensor) not in parameters | statistics:
                continue
            done.add(id(tensor))
            if not tensor.is_floating_point():
                continue
            noise = torch.randn(tensor.shape, generator=rng, dtype=torch.float64).to(tensor)
            if id(tensor) in positive:
                tensor.mul_((0.1 * noise).exp())
                continue
            size = tensor.square().mean().sqrt()
            tensor.add_(noise * (0.1 * size if size > 1e-3 else 0.1))

    @contextlib.contextmanager
    def _guards(self) -> Iterator[None]:
        """Set every ``eps`` of a normalisation to nearly zero: scales are exact but for it."""
        kept: list[tuple[Any, float]] = []
        for child in self.module.modules():
            eps: Any = getattr(child, "eps", None)
            if isinstance(eps, float):
                kept.append((child, eps))
        for child, _ in kept:
            child.eps = _TINY
        try:
            yield
        finally:
            for child, eps in kept:
                child.eps = eps

    def _run(self, training: bool) -> list[Tensor] | None:
        for norm in self.norms:
            norm.train(training)
        try:
            with torch.random.fork_rng(devices=[]), InDouble():
                torch.manual_seed(self.seed)
                out = self.module(*_fresh(self.inputs))
        except ValueError:
            if training:  # one value a channel: batch normalisation can't be trained on this example
                return None
            raise
        finally:
            for norm in self.norms:
                norm.eval()
        if self.loss is not None:
            # Targets are where the user's examples are.
            out = self.loss(tree_map(lambda t: t.to(self.home) if isinstance(t, Tensor) else t, out))
        return [t.detach().clone() for t in tensors_of(out) if t.is_floating_point()]

    @torch.no_grad()
    def holds(self, symmetries: Sequence[Symmetry]) -> bool:
        """Whether the output stays where it is when all of them are applied."""
        # Signs twice, the second time those that stayed the first time.
        turns = 2 if any(isinstance(symmetry, SignFlip) for symmetry in symmetries) else 1
        return all(self._holds(symmetries, turn) for turn in range(turns))

    def _holds(self, symmetries: Sequence[Symmetry], turn: int) -> bool:
        try:
            with self._guards(), plain_attention():
                for number, symmetry in enumerate(symmetries):
                    bound = symmetry.bind(self.module)
                    bound.transform(_element(bound, self.seed + 1 + number, turn))
                return all(
                    self._close(reference, self._run(training))
                    for training, reference in zip(self._modes(), self.reference, strict=True)
                )
        finally:
            # Training mode moved the running statistics, too.
            for name in {*touched(symmetries), *(n for n in self.point if "running_" in n)}:
                self.tensors[name].copy_(self.point[name])

    def _close(self, before: list[Tensor] | None, after: list[Tensor] | None) -> bool:
        if before is None or after is None:
            return before is after
        for a, b in zip(before, after, strict=True):
            endless = a.isinf()
            if not torch.equal(a[endless], b[endless]) or not bool(b[~endless].isfinite().all()):
                return False
            a, b = a[~endless], b[~endless]
            if a.numel() and not bool((a - b).abs().max() <= self.tolerance * a.abs().max()):
                return False
        return True

    def prove(self, candidates: Sequence[Candidate]) -> tuple[list[Symmetry], list[Symmetry]]:
        """Return what holds and what doesn't, trying halves where a whole fails."""
        symmetries = [candidate.symmetry for candidate in candidates]
        if not symmetries or self.holds(symmetries):
            return symmetries, []
        if len(candidates) > 1:
            half = len(candidates) // 2
            first, second = self.prove(candidates[:half]), self.prove(candidates[half:])
            return first[0] + second[0], first[1] + second[1]
        fallback = candidates[0].fallback
        if fallback is not None and self.holds([fallback]):
            return [fallback], symmetries
        return [], symmetries
