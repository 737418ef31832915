"""Which symmetry's mirror the units of a layer lie on, and what an offset would push off it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from lightning_sym._names import clean_name
from lightning_sym.diagnosis.finding import Finding
from lightning_sym.symmetry import (
    Permutation,
    Rescaling,
    Rotation,
    SignFlip,
    Symmetries,
    Symmetry,
    collapse_causes,
    collapsed_units,
    find_symmetries,
    least_force,
)

KINDS = ("permutation", "rescaling", "signflip", "rotation")
_WHAT = {
    "permutation": "of its units equal another one (permutation mirror)",
    "rescaling": "of its units are zero (rescaling mirror)",
    "rotation": "of its directions are lost (rotation mirror)",
}
#: Lost units that a mirror explains, as kinds of findings.
_EXPLAINED = {
    "equal_units": ("permutation",),
    "dead_units": ("rescaling", "permutation"),
    "zero_units": ("rescaling", "permutation"),
    "rank_collapse": ("rotation", "permutation", "rescaling"),
}


@dataclass(frozen=True)
class OnMirror:
    """Units of one symmetry that lie on its mirror.

    Args:
        kind: of the symmetry.
        path: where its units live.
        units: how many lie on the mirror.
        of: how many there are.
        push: the least push away from the mirror that an offset of random entries (standard deviation 1,
            weight decay 1) has there; 0 where it has none.
    """

    kind: str
    path: str
    units: int
    of: int
    push: float


@dataclass
class Mirrors:
    """What is known of a network's symmetries.

    Args:
        symmetries: those that were found; ``None``: not looked for.
        why: why they were not looked for.
    """

    symmetries: Symmetries | None = None
    why: str = "nothing asked for it"
    _forces: dict[str, torch.Tensor] = field(default_factory=dict, repr=False)

    @classmethod
    def found_on(cls, module: nn.Module, example: tuple[Any, ...]) -> Mirrors:
        """Search for a module's symmetries; why there are none is kept where the search fails.

        Args:
            module: the network.
            example: positional arguments of its forward.
        """
        try:
            return cls(find_symmetries(module, *example, kinds=KINDS))
        except (TypeError, ValueError, RuntimeError) as error:  # a NaN output, a module that can't be copied
            return cls(why=f"the search failed: {error}")

    def causes(self, layer: str) -> dict[str, float]:
        """Return the shares of a layer's units on each kind of mirror, without those that are 0.

        Args:
            layer: its name.
        """
        if self.symmetries is None:
            return {}
        shares = collapse_causes(self.symmetries, layer)
        return {kind: share for kind, share in shares.items() if share > 0}

    def acts_on(self, layer: str) -> bool:
        """Return whether a symmetry of those found moves the layer's output units.

        Args:
            layer: its name.
        """
        return self.symmetries is not None and bool(collapse_causes(self.symmetries, layer))

    def occupied(self) -> Iterator[OnMirror]:
        """Yield each symmetry with units on its mirror."""
        for symmetry in self.symmetries or ():
            if isinstance(symmetry, Permutation | Rescaling | SignFlip | Rotation):
                on_S = collapsed_units(symmetry).cpu()
                if on_S.any():
                    push = float(symmetry.mirror_norm(self._force(symmetry)).cpu()[on_S].min())
                    yield OnMirror(symmetry.kind, symmetry.path, int(on_S.sum()), symmetry.size, push)

    def push(self, layer: str) -> float | None:
        """Return the least push that a random offset (as :class:`OnMirror`'s) gives a layer's units.

        Args:
            layer: its name.
        """
        if self.symmetries is None:
            return None
        for symmetry in self.symmetries:
            self._force(symmetry)
        return least_force(self.symmetries, layer, self._forces)

    def _force(self, symmetry: Symmetry) -> dict[str, torch.Tensor]:
        """Return a random offset of the parameters that a symmetry moves."""
        if symmetry.module is not None:
            own = {clean_name(name): p for name, p in symmetry.module.named_parameters()}
            for name in symmetry.parameters:
                if name not in self._forces and name in own:
                    generator = torch.Generator().manual_seed(sum(map(ord, name)))
                    self._forces[name] = torch.randn(own[name].shape, generator=generator).to(
                        own[name].device
                    )
        return self._forces


def with_cause(finding: Finding, mirrors: Mirrors) -> Finding:
    """Return a finding of lost units with its cause: the mirror that they lie on, or why that isn't known.

    Args:
        finding: any; of other kinds it is returned as it is.
        mirrors: what is known of the symmetries.
    """
    kinds: Sequence[str] = _EXPLAINED.get(finding.kind, ())
    if not kinds:
        return finding
    if mirrors.symmetries is None:
        return replace(finding, cause=f"not known: symmetries not looked for ({mirrors.why})")
    layer, whose = finding.layer, ""
    if not mirrors.acts_on(layer) and mirrors.acts_on(parent := layer.rpartition(".")[0]):
        layer, whose = parent, f"of {parent}: "  # a projection that shares its weight with others
    causes = {kind: share for kind, share in mirrors.causes(layer).items() if kind in kinds}
    if causes:
        said = whose + ", ".join(f"{share:.0%} {_WHAT[kind]}" for kind, share in causes.items())
        push = mirrors.push(layer)
        more = " Syre would push them off it." if push else ""
        return replace(finding, cause=said, remedy=finding.remedy + more)
    if finding.kind == "equal_units":
        cause = (
            "its units are on no mirror: incoming weights are equal, but what else moves with a unit "
            "(outgoing weights, gains) is not, so gradients can part them"
        )
    else:
        cause = "not known: its units are on no mirror of a symmetry that was found"
    return replace(finding, cause=cause)
