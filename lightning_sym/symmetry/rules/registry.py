"""The register of rules: which function is for which operation."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lightning_sym.symmetry._trace import Ref, Step

if TYPE_CHECKING:
    from lightning_sym.symmetry.rules.equations import Equations

Rule = Callable[["Equations", Step], None]

#: Rules by the ATen operation's name, without overload and without the underscore of in-place forms.
RULES: dict[str, Rule] = {}


class NoRule(Exception):  # noqa: N818 - it is caught, never shown
    """A rule does not apply to an operation: what passes through it is held in place."""


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for the ATen operations of these names.

    Args:
        *names: as in ``torch.ops.aten``, without overload; in-place forms belong to the plain ones.

    Raises:
        ValueError: if an operation has a rule already.
    """
    if taken := [name for name in names if name in RULES]:
        raise ValueError(f"names must be operations without a rule, got {taken[0]!r}, which has one")

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


def operation(step: Step) -> str:
    """Return the name under which an operation's rule is registered; "" for one that is not ATen's."""
    namespace, name, *_ = step.op.split(".")
    if namespace != "aten":
        return ""
    return name if name.startswith("__") else name.rstrip("_")


def tensor(step: Step, place: int) -> Ref:
    """Return an argument that must be a tensor.

    Raises:
        NoRule: if it is missing or something else (``2 ** x`` has a number in front).
    """
    found = argument(step, place)
    if not isinstance(found, Ref):
        raise NoRule
    return found


def argument(step: Step, place: int, default: Any = None) -> Any:
    """Return an argument by its place, or the default where it was left out."""
    return step.args[place] if len(step.args) > place else default


def axis_of(step: Step, place: int, ndim: int) -> int:
    """Return an axis argument, counted from the front; 0 where it was left out."""
    return int(argument(step, place, 0)) % max(ndim, 1)
