"""Everything in double precision, whatever a module asks for.

A module that computes its norms in float32, as language models do, would otherwise add float32's
rounding to a proof in float64. Operations that double precision has no kernel for (grouped matrix
products of mixtures of experts) run in the highest precision that has one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

LOW = (torch.float32, torch.float16, torch.bfloat16)


def doubled(tensor: Tensor) -> Tensor:
    """Return a tensor of floating-point numbers in double precision, any other as it is."""
    if tensor.is_complex():
        return tensor.to(torch.complex128)
    return tensor.double() if tensor.is_floating_point() else tensor


def run_in_double(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, torch.dtype | None]:
    """Run an operation in double precision, or in the highest that it has a kernel for.

    Args:
        func: an operation that a dispatch mode was handed.
        args: its positional arguments.
        kwargs: its keyword arguments; a lower ``dtype`` among them is replaced.

    Returns:
        Its result in double precision, and the lower precision that it was computed in, None if it was not.

    Raises:
        RuntimeError: the operation's own error, if it runs in no precision.
    """
    if kwargs.get("dtype") in LOW:
        kwargs = {**kwargs, "dtype": torch.float64}
    try:
        return func(*args, **kwargs), None
    except (RuntimeError, NotImplementedError):
        if func._schema.is_mutable:  # it would write into what was cast
            raise
        for kind in (torch.float64, torch.float32, torch.bfloat16):
            again = tree_map(lambda leaf, kind=kind: _cast(leaf, kind), (args, kwargs))
            if all(
                old is new for old, new in zip(tree_leaves((args, kwargs)), tree_leaves(again), strict=True)
            ):
                continue
            try:
                out = func(*again[0], **again[1])
            except (RuntimeError, NotImplementedError):
                continue
            out = tree_map(lambda leaf: doubled(leaf) if isinstance(leaf, Tensor) else leaf, out)
            return out, None if kind == torch.float64 else kind
        raise


def _cast(leaf: Any, kind: torch.dtype) -> Any:
    return leaf.to(kind) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf


class InDouble(TorchDispatchMode):
    """Runs what asks for less than double precision in double precision."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return run_in_double(func, args, kwargs or {})[0]
