"""Finding a network's parameter symmetries: traced, solved for, and each proved by trying it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_sym._names import clean_name
from lightning_sym.symmetry._copies import Copied, unnoticed
from lightning_sym.symmetry._example import Example, tensors_of
from lightning_sym.symmetry._solve import Candidate, Solver
from lightning_sym.symmetry._trace import Captured, trace
from lightning_sym.symmetry._trial import Trial
from lightning_sym.symmetry.kinds import KINDS
from lightning_sym.symmetry.rules import write_equations
from lightning_sym.symmetry.symmetry import Action, Symmetry, named_tensors, uncompiled

TOLERANCE = 1e-8
_ORDER = [kind.kind for kind in KINDS]
_CAPTURED = (
    "the forward pass reaches the module itself from its copy (by a captured or global variable): nothing "
    "can be tried out on a copy"
)


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
    example_kwargs: Mapping[str, Any] | None = None,
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
    are tried together first and halved where that fails. What fails is not returned.

    Nothing of the module's changes: no forward hook of the user's fires (those of torch that compute a
    weight do, on the copy), a LightningModule's ``log`` tells its trainer nothing, and random states are put
    back. A function that is kept as an attribute and captured the module runs the copy.

    Args:
        module: the network. It is copied and left as it is.
        *example_inputs: what ``module(...)`` takes; small and random, nothing special about them. A
            proof reaches as far as they do. Tensors may stand in containers or in attributes of objects
            (graphs); they are copied in double precision. Numbers and arrays that are no tensors are
            taken for constants.
        example_kwargs: keyword arguments of ``module(...)``, likewise.
        loss: a function of the module's output, to find what leaves only the loss alone
            (:class:`Translation`).
        kinds: names of the kinds to look for; by default all of them.
        include_frozen: let parameters without ``requires_grad`` move too; else they are constants.
        tolerance: largest change of the output, relative to its largest entry.
        seed: for the random point and elements; the global random state is left alone.

    Returns:
        A list of symmetries bound to ``module``, with the lists ``untraced`` and ``refuted``.

    Raises:
        ValueError: if a kind is unknown, the tolerance not positive, no example is given, the output
            holds no floating-point numbers, or NaN, or a lazy parameter has no shape yet.
        TypeError: if ``module`` is none or can't be copied, or ``example_kwargs`` is no mapping by names.

    Warns:
        UserWarning: if parameters pass through operations that can't be followed; what was found is
            returned.
    """
    wanted = _checked(module, example_inputs, example_kwargs, kinds=kinds, tolerance=tolerance)
    example = Example.in_double(example_inputs, example_kwargs or {})
    # Targets of a loss are where the user's examples are.
    home = next((t.device for t in tensors_of((example_inputs, example_kwargs))), torch.device("cpu"))
    copied = Copied(uncompiled(module))
    try:
        with unnoticed(seed):
            try:
                traced = trace(copied, example)
            except Captured:
                return _told(Symmetries(untraced=[_CAPTURED]))
            fixed = _fixed(module, copied.module, list(traced.named), include_frozen=include_frozen)
            equations = write_equations(traced, fixed=frozenset(fixed))
            solver = Solver(equations)
            trial = Trial(copied.module, example, tolerance=tolerance, seed=seed, loss=None, home=home)
            candidates = [c for c in solver.candidates() if c.symmetry.kind in wanted]
            proved, refuted = trial.prove([_renamed(candidate) for candidate in candidates])
            if loss is not None and "translation" in wanted:
                trial = Trial(copied.module, example, tolerance=tolerance, seed=seed, loss=loss, home=home)
                more = trial.prove([_renamed(candidate) for candidate in solver.translations()])
                proved, refuted = proved + more[0], refuted + more[1]
    finally:
        copied.close()
    place = {name: i for i, name in enumerate(named_tensors(module))}
    proved.sort(key=lambda s: (_ORDER.index(s.kind), min(place[name] for name in s.parameters)))
    untraced = [*example.missed, *traced.missed, *equations.untraced]
    held = [symmetry.bind(module) for symmetry in proved]
    return _told(Symmetries(held, untraced=untraced, refuted=[repr(symmetry) for symmetry in refuted]))


def _checked(
    module: Any,
    inputs: tuple[Any, ...],
    keywords: Any,
    *,
    kinds: str | Sequence[str] | None,
    tolerance: float,
) -> set[str]:
    """Return the kinds to look for.

    Raises:
        TypeError: if an argument is of another type, see :func:`find_symmetries`.
        ValueError: if one is out of its range.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
    if keywords is not None and not (
        isinstance(keywords, Mapping) and all(isinstance(name, str) for name in keywords)
    ):
        raise TypeError(f"example_kwargs must be a mapping from names, got {type(keywords).__name__}")
    if not inputs and not keywords:
        raise ValueError("example_inputs must hold what the module's forward takes, got none")
    wanted = set(_ORDER if kinds is None else [kinds] if isinstance(kinds, str) else kinds)
    if not wanted <= set(_ORDER):
        raise ValueError(f"kinds must be among {_ORDER}, got {sorted(wanted - set(_ORDER))}")
    if not tolerance > 0:
        raise ValueError(f"tolerance must be positive, got {tolerance}")
    return wanted


def _told(found: Symmetries) -> Symmetries:
    """Return what was found, after a warning of what could not be followed."""
    if found.untraced:
        more = len(found.untraced) - 5
        warnings.warn(
            f"some symmetries may be missing: {'; '.join(found.untraced[:5])}"
            + (f"; and {more} more" if more > 0 else ""),
            stacklevel=3,
        )
    return found


def _fixed(module: nn.Module, copied: nn.Module, names: list[str], *, include_frozen: bool) -> set[str]:
    """Return which named tensors may not move: buffers but running statistics, frozen ones on request."""
    statistics = {
        f"{name}.{statistic}" if name else statistic
        for name, child in copied.named_modules()
        if isinstance(child, _BatchNorm)
        for statistic in ("running_mean", "running_var")
    }
    buffers = dict(copied.named_buffers())
    fixed = {name for name in names if name in buffers and name not in statistics}
    if not include_frozen:
        frozen = {clean_name(name) for name, p in module.named_parameters() if not p.requires_grad}
        fixed |= {name for name in names if clean_name(name) in frozen}
    return fixed


def _renamed(candidate: Candidate) -> Candidate:
    def clean(symmetry: Symmetry) -> Symmetry:
        actions = tuple(
            Action(clean_name(a.name), a.dim, a.index, a.power, a.buffer) for a in symmetry.actions
        )
        return replace(symmetry, actions=actions, path=clean_name(symmetry.path))

    fallback = candidate.fallback
    return Candidate(clean(candidate.symmetry), clean(fallback) if fallback is not None else None)
