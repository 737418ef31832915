r"""What a parameter symmetry is: a group that moves parameters and leaves the network's function alone.

A symmetry acts on slices of named tensors, its *units*. Everything is read from the matrix of unit
vectors :math:`\Theta = [\theta_1, \dots, \theta_U]`, the slices of every tensor that move with a unit,
laid side by side. Every kind contains reflections ("mirrors", Ziyin 2024, arXiv 2309.16932)
:math:`m = I - 2P`; parameters with :math:`P\theta = 0` are on the mirror, where gradient descent
stays for good and the network acts like a smaller one.

Shape letters: B independent blocks (the heads of an attention layer), U units of a block, M positions
along the dimension that move with one unit, R the tensor's other entries, D = sum of M * R over the
tensors, S = B * U the size.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from lightning_sym._names import clean_name


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return a module's parameters and buffers under their clean names, tied ones under each name."""
    tensors: dict[str, Tensor] = {}
    tensors.update((clean_name(n), b) for n, b in module.named_buffers(remove_duplicate=False))
    tensors.update((clean_name(n), p) for n, p in module.named_parameters(remove_duplicate=False))
    return tensors


@dataclass(frozen=True, eq=False)
class Action:
    """How one tensor moves along one of its dimensions.

    Args:
        name: the tensor's clean name in the module.
        dim: the dimension that the group acts on.
        index: positions along ``dim``, ``[B, U, M]``: which of them move with which unit.
        power: the exponent with which a factor acts (+1 what is multiplied, -1 what makes up for it,
            2 a running variance); for a rotation +1 is the matrix, -1 its inverse transpose.
        buffer: whether the tensor is a buffer (running statistics), which follows and is not counted
            in distances and charges.
    """

    name: str
    dim: int
    index: Tensor = field(repr=False)
    power: float = 1.0
    buffer: bool = False

    def gather(self, tensor: Tensor) -> Tensor:
        """Return the slices of ``tensor`` that move, ``[B, U, M, R]``, as a copy."""
        flat_NR = tensor.movedim(self.dim, 0).reshape(tensor.shape[self.dim], -1)
        return flat_NR[self.index.to(tensor.device)]

    def scatter_(self, tensor: Tensor, slices_BUMR: Tensor) -> None:
        """Write slices back in place, the inverse of :meth:`gather`."""
        moved = tensor.movedim(self.dim, 0)
        index = self.index.to(tensor.device).reshape(-1)
        moved[index] = slices_BUMR.reshape(index.numel(), *moved.shape[1:])


@dataclass(frozen=True, eq=False)
class Symmetry(abc.ABC):
    """A group of transformations of named parameters that leaves a network's output unmoved.

    Args:
        actions: what moves, and how.
        module: the network that it was found on; methods take another of the same architecture.
        path: where the units live, for people: the name of the layer that makes them.
        per_block: names the number of independent blocks, if there is more than one ("heads").

    Attributes:
        kind: "permutation", "rescaling", "signflip", "rotation", "scale" or "translation".
        continuous: whether the group is a Lie group.
        conserved: whether gradient flow conserves a :meth:`charge`.
    """

    actions: tuple[Action, ...]
    module: nn.Module | None = field(default=None, repr=False)
    path: str = ""

    kind: ClassVar[str]
    continuous: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not any(not action.buffer for action in self.actions):
            raise ValueError("actions must move at least one parameter, got none")
        shapes = {tuple(action.index.shape[:2]) for action in self.actions}
        if len(shapes) != 1:
            raise ValueError(f"actions must agree on [blocks, units], got {sorted(shapes)}")

    # What it is.

    @property
    def blocks(self) -> int:
        """Number of independent copies of the group (1, or the heads of an attention layer)."""
        return int(self.actions[0].index.shape[0])

    @property
    def units(self) -> int:
        """Number of units in one block."""
        return int(self.actions[0].index.shape[1])

    @property
    def size(self) -> int:
        """Number of units, ``blocks * units``."""
        return self.blocks * self.units

    @property
    def conserved(self) -> bool:
        """Whether gradient flow conserves a :meth:`charge`."""
        return self.continuous

    @property
    def parameters(self) -> dict[str, tuple[int, ...]]:
        """Names of the parameters that move, with the dimensions they move along."""
        return self._dims(buffer=False)

    @property
    def buffers(self) -> dict[str, tuple[int, ...]]:
        """Names of the buffers that follow (running statistics), with their dimensions."""
        return self._dims(buffer=True)

    def _dims(self, *, buffer: bool) -> dict[str, tuple[int, ...]]:
        dims: dict[str, tuple[int, ...]] = {}
        for action in self.actions:
            if action.buffer == buffer and action.dim not in dims.get(action.name, ()):
                dims[action.name] = (*dims.get(action.name, ()), action.dim)
        return dims

    def __repr__(self) -> str:
        count = f"{self.units} units" if self.units != 1 else "1 unit"
        if self.blocks != 1:
            count = f"{self.blocks} x {count}"
        parts = [f"{name}[{','.join(map(str, dims))}]" for name, dims in self.parameters.items()]
        if len(parts) > 4:
            parts = [*parts[:3], f"and {len(parts) - 3} more"]
        where = f" of {self.path}" if self.path else ""
        return f"{type(self).__name__}({count}{where}: {', '.join(parts)})"

    def bind(self, module: nn.Module) -> Self:
        """Return the same symmetry, acting on another module of the same architecture."""
        return replace(self, module=module)

    # What it does.

    @abc.abstractmethod
    def random_element(self, seed: int) -> Tensor:
        """Return a random group element (float64, on the CPU), the same for the same ``seed``.

        ``[B, U]`` (``[B, U, U]`` for a rotation); the global random state is not touched.
        """

    @abc.abstractmethod
    def inverse(self, element: Tensor) -> Tensor:
        """Return the element that undoes ``element``."""

    @torch.no_grad()
    def transform(self, element: Tensor, *, module: nn.Module | None = None, inverse: bool = False) -> None:
        """Move the parameters in place (and the running statistics that follow them).

        Args:
            element: a group element shaped as :meth:`random_element` returns it; with one block the
                leading dimension may be left out.
            module: the module to move; by default the one the symmetry was found on.
            inverse: apply the inverse element.

        Raises:
            ValueError: if ``element`` has another shape or is not in the group.
        """
        self.move_(self._tensors(module), self.inverse(element) if inverse else element)

    @torch.no_grad()
    def move_(self, tensors: Mapping[str, Tensor], element: Tensor) -> None:
        """Move tensors in place, as :meth:`transform` moves those of a module.

        Args:
            tensors: by clean names; all that the symmetry moves must be there.
            element: a group element shaped as :meth:`random_element` returns it.

        Raises:
            ValueError: if ``element`` has another shape or is not in the group.
        """
        element = self._checked(element)
        for action in self.actions:
            tensor = tensors[action.name]
            action.scatter_(tensor, self._move(action.gather(tensor), element.to(tensor.device), action))

    @abc.abstractmethod
    def _move(self, slices_BUMR: Tensor, element: Tensor, action: Action) -> Tensor: ...

    def _checked(self, element: Tensor) -> Tensor:
        shape = self._element_shape()
        if not isinstance(element, Tensor):
            raise ValueError(f"element must be a tensor {list(shape)} for {self!r}, got {element!r}")
        if tuple(element.shape) == shape[1:] and self.blocks == 1:
            element = element.unsqueeze(0)
        if tuple(element.shape) != shape:
            raise ValueError(f"element must be {list(shape)} for {self!r}, got {tuple(element.shape)}")
        return element

    def _element_shape(self) -> tuple[int, ...]:
        return (self.blocks, self.units)

    # What it says about a network.

    @abc.abstractmethod
    def distance(self, module: nn.Module | None = None) -> Tensor:
        """Return each unit's distance to its mirror's fixed subspace, ``[S]`` float64 in ``[0, 1]``.

        0: collapsed onto it; 1: fully broken. Degenerate (all zero) parameters are collapsed: 0.
        """

    def charge(self, module: nn.Module | None = None) -> Tensor:
        """Return what gradient flow conserves (Noether's charge), one number a unit, float64.

        Args:
            module: the module to read; by default the one the symmetry was found on.

        Raises:
            TypeError: if the group is discrete or conserves nothing under gradient flow (see
                ``conserved``).
        """
        raise TypeError(f"{self!r} has no conserved charge: it is not continuous")

    @abc.abstractmethod
    def mirror_norm(self, tensors: Mapping[str, Tensor]) -> Tensor:
        r"""Return :math:`\lVert P v\rVert` for each unit: how far a vector points away from its mirror.

        This is what measures the removal of a symmetry by an offset (syre, Ziyin et al. 2024,
        arXiv 2408.15495): on a mirror the decay pulls with ``weight_decay * mirror_norm(theta_0)``.

        Args:
            tensors: a vector in parameter space by clean parameter names; missing names count as zero.

        Returns:
            ``[S]``, at least 0. Where a unit has several mirrors, the least of them.
        """

    @abc.abstractmethod
    def fixed_part(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the projection of a vector onto what every element of the group leaves in place.

        Args:
            tensors: a vector in parameter space by clean parameter names.

        Returns:
            New tensors for the given names; those that the symmetry does not touch are copied.
            ``tensors - fixed_part(tensors)`` is the component orthogonal to the fixed subspace.
        """

    # Reading tensors.

    def _tensors(self, module: nn.Module | None) -> dict[str, Tensor]:
        module = self.module if module is None else module
        if module is None:
            raise ValueError(f"{self!r} is bound to no module: pass module=")
        tensors = named_tensors(module)
        missing = [action.name for action in self.actions if action.name not in tensors]
        if missing:
            raise ValueError(f"module has no tensor named {missing[0]!r}, which {self!r} moves")
        if self.module is not None and module is not self.module:
            own = named_tensors(self.module)
            for name in (action.name for action in self.actions):
                if tensors[name].shape != own[name].shape:
                    raise ValueError(
                        f"module must have {name!r} of shape {tuple(own[name].shape)} for {self!r}, "
                        f"got {tuple(tensors[name].shape)}"
                    )
        return tensors

    def _parts(self, tensors: Mapping[str, Tensor]) -> list[tuple[Action, Tensor]]:
        """Return ``(action, slices [B, U, M * R])`` of the parameters, in float64."""
        return [
            (action, action.gather(plain(tensors[action.name]).double()).flatten(2))
            for action in self.actions
            if not action.buffer and action.name in tensors
        ]

    def _rows(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return the unit vectors side by side, ``[B, U, D]`` float64."""
        parts = [slices for _, slices in self._parts(tensors)]
        return torch.cat(parts, dim=2) if parts else torch.zeros(self.blocks, self.units, 0).double()

    def _squares(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return the squared norm of what moves when one unit is acted on, ``[B, U]``."""
        total_BU = self._rows(tensors).square().sum(2)
        for powers, cross_BUUK in self._crossings(tensors):
            own_BU = torch.diagonal(cross_BUUK, dim1=1, dim2=2).square().sum(1)
            # An entry in the unit's own row and column was counted twice: it moves once, or not at all.
            total_BU = total_BU - own_BU * (2 if self._cancel(powers) else 1)
        return total_BU.clamp_min(0)

    def _cancel(self, powers: tuple[float, float]) -> bool:
        return sum(powers) == 0

    def _crossed(self, tensors: Mapping[str, Tensor]) -> list[tuple[Action, Action]]:
        """Return the pairs of actions that move one tensor along two dimensions."""
        actions = [a for a in self.actions if not a.buffer and a.name in tensors]
        return [
            (first, second)
            for i, first in enumerate(actions)
            for second in actions[i + 1 :]
            if first.name == second.name and first.dim != second.dim
        ]

    def _crossings(self, tensors: Mapping[str, Tensor]) -> list[tuple[tuple[float, float], Tensor]]:
        """Return the entries of tensors acted on along two dimensions, ``[B, U, U, K]`` each.

        Entry ``[b, u, v]`` holds what moves with unit u along the first and unit v along the second.
        """
        found = []
        for first, second in self._crossed(tensors):
            view, where = entries_of(plain(tensors[first.name]).double(), first, second)
            found.append(((first.power, second.power), view[where].flatten(3)))
        return found


def entries_of(tensor: Tensor, first: Action, second: Action) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Return a view of a tensor and where in it two actions meet: ``view[where]`` is [B, U, V, M, L, ...]."""
    view = tensor.movedim((first.dim, second.dim), (0, 1))
    i_BUM, j_BVL = first.index.to(view.device), second.index.to(view.device)
    return view, (i_BUM[:, :, None, :, None], j_BVL[:, None, :, None, :])


def plain(tensor: Tensor) -> Tensor:
    """Return a plain detached tensor; a sharded one is gathered, on every rank alike."""
    tensor = tensor.detach()
    gather = getattr(tensor, "full_tensor", None)
    return gather() if gather is not None else tensor


def relative(norms_BU: Tensor) -> Tensor:
    """Return norms over their root mean square over the units of a block, at most 1; 0 where all are 0."""
    rms_B1 = norms_BU.square().mean(1, keepdim=True).sqrt()
    safe = torch.where(rms_B1 > 0, rms_B1, torch.ones_like(rms_B1))
    return (norms_BU / safe).clamp(max=1).flatten()


def generator(seed: int) -> torch.Generator:
    """Return a CPU generator of its own for ``seed``."""
    return torch.Generator().manual_seed(seed)
