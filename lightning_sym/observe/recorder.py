"""Hooks on one layer for one optimizer step.

What is awkward about hooks is settled here:

* A layer called twice in a forward pools the samples of both calls.
* Under activation checkpointing the recomputed forward, inside the backward pass, is not counted
  a second time; where the first forward ran without a graph, its gradients are taken from there.
* Output gradients come from ``output.register_hook``: right with in-place activations, where full
  backward hooks are not.
* ``nn.MultiheadAttention`` calls no sub-module: its products are caught on their way to
  ``F.linear``.
* Nothing here raises into the user's step: an error is kept for the observer to report.

Shape letters: N samples, A input width, O output width, U input units, K kept features.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lightning_sym.observe.layers import Layer, clean_name
from lightning_sym.observe.moments import Moments, Sums, accumulation_dtype, kept_features

if TYPE_CHECKING:
    from lightning_sym.observe.observer import Wants

SIDES = ("inputs", "outputs", "input_gradients", "output_gradients")


@contextlib.contextmanager
def _aside(device_type: str) -> Iterator[None]:
    """Compute without a graph and without autocast: a product in a hook would be cast down too."""
    with torch.no_grad(), torch.autocast(device_type, enabled=False):
        yield


def in_backward() -> bool:
    """Return whether a backward pass is running in this thread (a recomputed forward, then)."""
    return torch._C._current_graph_task_id() != -1


class Recorder:
    """Watches one layer from :meth:`attach` to :meth:`detach` and keeps nothing but sums.

    Args:
        layer: the layer.
        wants: what to reduce to.
        max_positions: positions per sample that count as samples.
        max_width: widest moment matrix; wider sides keep a fixed random subset of features.
        scale: returns the factor that turns a gradient of the step's loss into one of a
            per-sample loss.
        labels: returns the labels of the current micro-batch, or None.
        classes: number of classes, for the per-class sums of the head's input.
        seconds: where time is booked.
    """

    def __init__(
        self,
        layer: Layer,
        wants: Wants,
        *,
        max_positions: int | None,
        max_width: int | None,
        scale: Callable[[], float],
        labels: Callable[[], Tensor | None],
        classes: int,
        seconds: dict[str, float],
    ) -> None:
        self.layer, self.wants = layer, wants
        self.max_positions = max_positions
        self.scale, self.labels = scale, labels
        self.seconds = seconds
        self.error: Exception | None = None
        self.fed_by_data = True
        device = layer.parameter().device
        dtype = accumulation_dtype(device)
        self.blocks = layer.blocks()
        self.bias = layer.bias()
        widths = (layer.in_features, layer.out_features) * 2
        self.sums: dict[str, Sums] = {}
        for side, width in zip(SIDES, widths, strict=True):
            moments: Moments = getattr(wants, side)
            if moments and width:
                keep = kept_features(width, max_width)
                self.sums[side] = Sums(width, moments, keep=keep, device=device)
        units = layer.in_units if wants.activity and layer.has_input else 0
        # samples and positions seen; then per unit the sum of |x| and how often x is not zero
        self.activity_count = torch.zeros(1, dtype=dtype, device=device)
        self.activity = torch.zeros(2, units, dtype=dtype, device=device)
        self.calls = torch.zeros(1, dtype=dtype, device=device)
        self.zero_gradients = torch.zeros(2, dtype=dtype, device=device)  # zeros, entries
        width = layer.in_features if classes else 0
        self.class_counts = torch.zeros(classes, dtype=dtype, device=device)
        self.class_sums = torch.zeros(classes, width, dtype=dtype, device=device)
        self.class_second = torch.zeros(width, width, dtype=dtype, device=device)
        self._backward_weight: tuple[Tensor, Tensor] | None = None
        self._mode: _AttentionMode | None = None
        self._handles: list[Any] = []

    def attach(self) -> None:
        """Register the hooks."""
        module = self.layer.module
        if self.layer.part is None:
            self._handles.append(module.register_forward_hook(self._forward))
        else:
            self._handles.append(module.register_forward_pre_hook(self._enter))
            # always_call: a mode left on the stack by an exception would haunt the whole process.
            self._handles.append(module.register_forward_hook(self._leave, always_call=True))

    def detach(self) -> None:
        """Remove the hooks; harmless if there are none."""
        while self._handles:
            self._handles.pop().remove()
        self._leave()

    def tensors(self) -> list[Tensor]:
        """Return every tensor to be summed across ranks, in a fixed order."""
        own = [
            self.calls,
            self.activity_count,
            self.activity,
            self.zero_gradients,
            self.class_counts,
            self.class_sums,
            self.class_second,
        ]
        return own + [tensor for sums in self.sums.values() for tensor in sums.tensors()]

    def read_gradient(self) -> None:
        """Count exact zeros of the weight's gradient, just before the optimizer uses it."""
        gradient = self.layer.parameter().grad
        if gradient is None or not self.wants.zero_gradients:
            return
        full = getattr(gradient, "full_tensor", None)
        rows = self.layer.slice(full() if full is not None else gradient)
        zeros = (rows == 0).sum().to(self.zero_gradients)
        self.zero_gradients.copy_(torch.stack([zeros, torch.full_like(zeros, rows.numel())]))

    # -- attention ---------------------------------------------------------------------------

    def _enter(self, module: nn.Module, args: Any) -> None:
        self._mode = _AttentionMode(self)
        self._mode.__enter__()

    def _leave(self, *_: Any) -> None:
        if self._mode is not None:
            mode, self._mode = self._mode, None
            mode.__exit__(None, None, None)

    # -- samples -----------------------------------------------------------------------------

    def _forward(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        x = args[0] if args else None
        if isinstance(output, Tensor):
            self.see(x if isinstance(x, Tensor) else None, output)

    def see(self, x: Tensor | None, output: Tensor) -> None:
        """Take in one call of the layer."""
        began = time.perf_counter()
        try:
            with _aside(output.device.type):
                if not in_backward():
                    self._take_values(x, output)
            if output.requires_grad and (self.wants.input_gradients or self.wants.output_gradients):
                output.register_hook(self._gradient)
        except Exception as error:
            self.error = self.error or error
        finally:
            self.seconds["moments"] += time.perf_counter() - began

    def _take_values(self, x: Tensor | None, output: Tensor) -> None:
        self.calls += 1
        if "outputs" in self.sums:
            self.sums["outputs"].add(self.layer.output_rows(output, self.max_positions))
        if x is None or not self.layer.has_input:
            return
        self.fed_by_data = self.fed_by_data and not x.requires_grad
        if "inputs" in self.sums:
            self.sums["inputs"].add(self.layer.input_rows(x, self.max_positions))
        if self.activity.numel():
            self._take_activity(x)
        if len(self.class_counts):
            self._take_classes(x)

    def _take_activity(self, x: Tensor) -> None:
        if self.layer.is_convolution:
            size = len(self.layer.module.kernel_size)  # type: ignore[arg-type]
            x = x.transpose(-1 - size, -1)
        x = x.reshape(-1, x.shape[-1])
        # A NaN or Inf counts as active and adds nothing to the mean.
        size_NU = x.abs().to(torch.float32 if x.dtype != torch.float64 else x.dtype)
        size_NU = size_NU.nan_to_num(nan=0.0, posinf=0.0)
        self.activity_count += len(x)
        self.activity[0] += size_NU.sum(dim=0, dtype=self.activity.dtype)
        self.activity[1] += (x != 0).sum(dim=0)

    def _take_classes(self, x: Tensor) -> None:
        labels = self.labels()
        if labels is None or x.ndim != 2 or labels.shape != x.shape[:1]:
            shape = None if labels is None else tuple(labels.shape)
            raise ValueError(
                f"targets must give one label a row of the head's input {tuple(x.shape)}, got {shape}"
            )
        x = x.to(self.class_sums.dtype)
        fine = x.isfinite().all(dim=1)
        x, labels = x[fine], labels[fine]
        self.class_counts.index_add_(0, labels, torch.ones_like(x[:, 0]))
        self.class_sums.index_add_(0, labels, x)
        self.class_second.addmm_(x.mT, x)

    def _gradient(self, gradient: Tensor) -> None:
        began = time.perf_counter()
        try:
            with _aside(gradient.device.type):
                rows = self.layer.output_rows(gradient, self.max_positions)
                rows = rows.to(accumulation_dtype(rows.device)) * self.scale()
                if "output_gradients" in self.sums:
                    self.sums["output_gradients"].add(rows)
                if "input_gradients" in self.sums:
                    self._take_input_gradients(rows)
        except Exception as error:
            self.error = self.error or error
        finally:
            self.seconds["moments"] += time.perf_counter() - began

    def _take_input_gradients(self, g_NO: Tensor) -> None:
        """Add ``g_a = W^T g_b``; of a wide side only the kept features are ever formed."""
        sums = self.sums["input_gradients"]
        if self._backward_weight is None:
            blocks = self.blocks.to(g_NO.dtype)
            gram = torch.block_diag(*(blocks @ blocks.mT))  # W W^T, so that ||g_a|| needs no g_a
            self._backward_weight = dense_columns(blocks, sums.keep), gram
        weight_OK, gram_OO = self._backward_weight
        norm_N = ((g_NO @ gram_OO) * g_NO).sum(dim=1).clamp_min(0.0).sqrt()
        sums.add(g_NO @ weight_OK, norm_N=norm_N)


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


class _AttentionMode(TorchFunctionMode):
    """Hands the recorder those ``F.linear`` calls that use its projection's weight."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder
        layer = recorder.layer
        self.parameter = layer.parameter()
        self.rows = layer.out_features
        packed = layer.part != "out_proj" and layer.module.in_proj_weight is not None
        self.first = ("q_proj", "k_proj", "v_proj").index(layer.part) * self.rows if packed else 0  # type: ignore[arg-type]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is F.linear and len(args) >= 2 and isinstance(result, Tensor):
            x, weight = args[0], args[1]
            owner = weight._base if weight._base is not None else weight
            if owner is self.parameter:
                offset = (weight.storage_offset() - self.parameter.storage_offset()) // weight.shape[1]
                start = self.first - offset
                if 0 <= start < weight.shape[0]:
                    # A packed product holds several projections: a slice shares its graph.
                    self._split(x, result, start, weight.shape[0])
        return result

    def _split(self, x: Tensor, result: Tensor, start: int, rows: int) -> None:
        recorder = self.recorder
        if rows == self.rows:
            recorder.see(x, result)
            return
        part = slice(start, start + self.rows)
        began = time.perf_counter()
        try:
            with _aside(result.device.type):
                if not in_backward():
                    recorder._take_values(x, result[..., part])
            if result.requires_grad and (recorder.wants.input_gradients or recorder.wants.output_gradients):
                result.register_hook(lambda gradient: recorder._gradient(gradient[..., part]))
        except Exception as error:
            recorder.error = recorder.error or error
        finally:
            recorder.seconds["moments"] += time.perf_counter() - began


def has_compiled(module: nn.Module) -> bool:
    """Return whether the module or one inside it runs compiled, where late hooks capture nothing."""
    return any(
        getattr(child, "_compiled_call_impl", None) is not None or "_orig_mod" in child._modules
        for child in module.modules()
    )


__all__ = ["SIDES", "Recorder", "clean_name", "dense_columns", "has_compiled", "in_backward"]
