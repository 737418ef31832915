"""Trying candidates out: a copy of the network at a random point, and what it returns there."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_map

from lightning_sym.sandbox.restore import reseed
from lightning_sym.symmetry._example import Example, tensors_of
from lightning_sym.symmetry._precision import InDouble
from lightning_sym.symmetry._solve import Candidate, touched
from lightning_sym.symmetry.kinds import Permutation, SignFlip
from lightning_sym.symmetry.symmetry import Symmetry, generator, named_tensors

_TINY = 1e-30  # stands in for the normalisations' eps while scales are tried


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


class Trial:
    """A copy of the network at a random point, and what it returns there."""

    def __init__(
        self,
        module: nn.Module,
        example: Example,
        *,
        tolerance: float,
        seed: int,
        loss: Callable[[Any], Tensor] | None,
        home: torch.device,
    ) -> None:
        self.module, self.example = module, example
        self.tolerance, self.seed, self.loss, self.home = tolerance, seed, loss, home
        self.norms = [child for child in module.modules() if isinstance(child, _BatchNorm)]
        self.tensors = named_tensors(module)
        self._shake()
        self.point = {name: tensor.detach().clone() for name, tensor in self.tensors.items()}
        with self._guards(), torch.no_grad():
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
            reseed(self.seed)
            given = self.example.fresh()
            with InDouble():
                out = self.module(*given.args, **given.kwargs)
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
            with self._guards():
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
