"""The weight that a layer's forward pass used, and the one its next pass will use.

``module.weight`` need not be a parameter. Under ``torch.nn.utils.parametrize`` reading it computes it
anew (a power iteration under spectral normalisation, which would change the run); under the older
``weight_norm``, ``spectral_norm`` and ``prune`` it is a copy from the last forward pass.

Shape letters: G groups, O outputs, A inputs, K kept features.
"""

from __future__ import annotations

import copy
import functools
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_sym.observe.grams import gram

#: Most outputs of which W W^T is formed.
LARGEST_GRAM = 1024
#: Widest matrix of a weight that is decomposed.
WIDEST_SPECTRUM = 512
#: Products of more multiplications than this are formed in float32.
EXACT_PRODUCTS = 2**27
#: Eigenvalues of a float32 product below this share of the largest are rounding: up to 3e-6 at 512 rows.
FLOAT32_FLOOR = 1e-5


def local(tensor: Tensor) -> Tensor:
    """Return a plain detached tensor; a sharded one is gathered, which all ranks must do together."""
    tensor = tensor.detach()
    gather = getattr(tensor, "full_tensor", None)
    return gather() if gather is not None else tensor


def is_parametrized(module: nn.Module, name: str) -> bool:
    """Return whether reading the attribute computes it."""
    return parametrize.is_parametrized(module, name)


def sources(module: nn.Module, name: str) -> list[nn.Parameter]:
    """Return the parameters that a weight is made from; the weight itself, first, where it is one.

    Low-rank factors that a layer keeps beside its weight (``lora_A``, ``lora_B``) are among them.
    """
    if is_parametrized(module, name):
        return list(module.parametrizations[name].parameters(recurse=False))  # type: ignore[index, union-attr]
    if (own := module._parameters.get(name)) is not None:
        factors = [module._parameters.get(f"lora_{side}") for side in "AB"] if name == "weight" else []
        return [own, *(p for p in factors if p is not None)]
    return [p for key, p in module._parameters.items() if p is not None and key.startswith(f"{name}_")]


def next_weight(module: nn.Module, name: str) -> Tensor:
    """Return the weight that the next forward pass will use; the module stays as it is.

    What computes it runs on a copy: its buffers, counters and random numbers are not the user's.
    """
    if (own := module._parameters.get(name)) is not None:
        return local(own)
    cpu_only: list[int] = []
    with torch.no_grad(), torch.random.fork_rng(devices=cpu_only):
        if is_parametrized(module, name):
            return _without_hooks(module.parametrizations[name])().detach()  # type: ignore[index, union-attr, arg-type]
        hook: Any
        for hook in module._forward_pre_hooks.values():
            hook_of = getattr(hook, "_tensor_name", None) or getattr(hook, "name", None)
            if hook_of != name:
                continue
            twin = copy.copy(module)
            twin._buffers = {k: None if b is None else b.detach().clone() for k, b in module._buffers.items()}
            if hasattr(hook, "apply_mask"):  # pruning
                return hook.apply_mask(twin).detach()
            if hasattr(hook, "n_power_iterations"):
                return hook.compute_weight(twin, do_power_iteration=module.training).detach()
            if hasattr(hook, "compute_weight"):
                return hook.compute_weight(twin).detach()
    return local(getattr(module, name))


def _without_hooks(module: nn.Module) -> nn.Module:
    """Return a deep copy in which neither the user's hooks nor ours fire."""
    memo: dict[int, Any] = {}
    for child in module.modules():
        for key, value in vars(child).items():
            if key.endswith("_hooks") and isinstance(value, dict):
                memo[id(value)] = type(value)()
    return copy.deepcopy(module, memo)


def accumulation_dtype(device: torch.device) -> torch.dtype:
    """Return float64, or float32 on devices that have none (MPS)."""
    return torch.float32 if device.type == "mps" else torch.float64


@functools.lru_cache(maxsize=256)
def kept_features(width: int, most: int | None, device: torch.device) -> Tensor | None:
    """Return the indices of the features kept of a wide layer, or None if all are.

    A fixed random subset: strides would alias with the kernel positions of a convolution's
    patches. Entries of the kept principal submatrix are exact; what is estimated is the rest.
    """
    if most is None or width <= most:
        return None
    generator = torch.Generator().manual_seed(width)
    return torch.randperm(width, generator=generator)[:most].sort().values.to(device)


class LayerWeight:
    """A weight and what is computed of it, each thing once.

    Attributes:
        blocks: ``[G, O / G, A / G]``; an embedding's ``[1, V, O]``.
        bias: ``[O]``, or None.
        outgoing: rows ``[M, O, ...]`` of the one layer that reads this layer's units, where that is plain
            from an ``nn.Sequential``, or None.
    """

    def __init__(self, blocks: Tensor, bias: Tensor | None = None, outgoing: Tensor | None = None) -> None:
        self.blocks, self.bias, self.outgoing = blocks, bias, outgoing
        self._columns: dict[int, tuple[Tensor, Tensor]] = {}

    @cached_property
    def norm(self) -> float:
        """Frobenius norm."""
        return float(torch.linalg.vector_norm(self.row_norms))

    @cached_property
    def row_norms(self) -> Tensor:
        """Norms of the rows, of all blocks, ``[O]`` (of an embedding ``[V]``), float64."""
        rows = self._work.flatten(0, 1)
        found = torch.linalg.vector_norm(rows, dim=1)
        exact = accumulation_dtype(rows.device)
        if rows.dtype != exact and not found.isfinite().all():
            found = torch.linalg.vector_norm(rows, dim=1, dtype=exact)
        return found.to(exact)

    @cached_property
    def _work(self) -> Tensor:
        return self.blocks if self.blocks.dtype == torch.float64 else self.blocks.float()

    @cached_property
    def row_grams(self) -> Tensor | None:
        """``W W^T`` of each block ``[G, O / G, O / G]``; None where there are more than 1024 outputs."""
        small = self.blocks.shape[0] * self.blocks.shape[1] <= LARGEST_GRAM
        if not small:
            return None
        return gram(self._work[0].mT)[None] if len(self._work) == 1 else self._work @ self._work.mT

    @cached_property
    def singular_values(self) -> Tensor:
        """Singular values (of all its blocks), descending, float64; NaN where an entry is not finite.

        Where the shorter side is wider than 512, those of a fixed random subset of its rows. Of a large
        weight that is no wider type, products are formed in float32: values below 3e-3 of the largest are 0.
        """
        exact = accumulation_dtype(self.blocks.device)
        groups, rows, columns = self.blocks.shape
        side = self._work.mT if rows > columns else self._work
        keep = kept_features(side.shape[1], WIDEST_SPECTRUM, side.device)
        side = side if keep is None else side[:, keep]
        small = groups * side.shape[1] ** 2 * side.shape[2] <= EXACT_PRODUCTS
        if rows <= columns and self.row_grams is not None and not small:
            grams = self.row_grams if keep is None else self.row_grams[:, keep][:, :, keep]
        else:
            side = side.to(exact) if small else side
            grams = gram(side[0].mT)[None] if groups == 1 else side @ side.mT
        if not grams.sum().isfinite():  # eigvalsh raises on these
            return torch.full_like(grams[:, 0].flatten(), torch.nan, dtype=exact)
        values = torch.linalg.eigvalsh(grams).to(exact).flatten().clamp_min(0.0).sort(descending=True).values
        if grams.dtype != exact:
            values = torch.where(values >= FLOAT32_FLOOR * values[0], values, 0.0)
        return values.sqrt()

    def columns(self, keep: Tensor) -> Tensor:
        """Return the kept columns of the block-diagonal matrix, ``[O, K]``."""
        found = self._columns.get(id(keep))
        if found is None:
            found = self._columns[id(keep)] = keep, dense_columns(self._work, keep)
        return found[1]

    def gram(self, side: str, keep: Tensor | None) -> Tensor:
        """Return ``Z_a = W^T W`` (``"in"``) or ``Z_b = W W^T`` (``"out"``), ``[K, K]``, float64.

        Args:
            side: ``"in"`` or ``"out"``.
            keep: indices of the features to keep, or None for all.
        """
        exact = accumulation_dtype(self.blocks.device)
        if side == "in":
            columns_OK = dense_columns(self._work, None) if keep is None else self.columns(keep)
            return gram(columns_OK).to(exact)
        groups, rows, _ = self.blocks.shape
        if self.row_grams is not None:
            whole = torch.block_diag(*self.row_grams) if groups > 1 else self.row_grams[0]
            return (whole if keep is None else whole[keep][:, keep]).to(exact)
        index = torch.arange(groups * rows, device=self.blocks.device) if keep is None else keep
        chosen, group = self._work.flatten(0, 1)[index], index // rows
        return torch.where(group[:, None] == group, chosen @ chosen.mT, 0.0).to(exact)


def dense_columns(blocks: Tensor, keep: Tensor | None) -> Tensor:
    """Return columns of the block-diagonal matrix of ``[G, O / G, A / G]`` blocks, ``[O, K]``."""
    groups, rows, columns = blocks.shape
    if groups == 1:
        return blocks[0] if keep is None else blocks[0][:, keep]
    index = torch.arange(groups * columns, device=blocks.device) if keep is None else keep
    dense = blocks.new_zeros(groups, rows, len(index))
    group = index // columns
    dense[group, :, torch.arange(len(index), device=blocks.device)] = blocks[group, :, index % columns]
    return dense.flatten(0, 1)
