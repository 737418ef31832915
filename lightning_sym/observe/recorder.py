"""Hooks on one layer for one optimizer step.

What is awkward about hooks is settled here:

* A layer called twice in a forward pools the samples of both calls.
* Under activation checkpointing the recomputed forward, inside the backward pass, is not counted
  a second time; where the first forward ran without a graph, its gradients are taken from there.
* Output gradients come from ``output.register_hook``: right with in-place activations, where full
  backward hooks are not.
* ``nn.MultiheadAttention`` calls no sub-module: its products are caught on their way to
  ``F.linear``, for which a stand-in is put up while it runs.
* Nothing here raises into the user's step: an error is kept for the observer to report.

Shape letters: N samples, A input width, O output width, U input units, K kept features.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_sym.functional.nearest_mean import nearest_mean_disagreements
from lightning_sym.observe.gains import Gain
from lightning_sym.observe.gradient_noise import HeldMemory, NoiseSums
from lightning_sym.observe.layers import ATTENTION_PARTS, Layer, local
from lightning_sym.observe.moments import Moments, Sums, accumulation_dtype, kept_features

if TYPE_CHECKING:
    from lightning_sym.observe.wants import Wants

#: Widest output for which W W^T is formed to get gradient norms.
LARGEST_GRAM = 1024
SIDES = ("inputs", "outputs", "input_gradients", "output_gradients")


@contextlib.contextmanager
def _aside(device_type: str) -> Iterator[None]:
    """Compute without a graph and without autocast: a product in a hook would be cast down too."""
    with torch.no_grad(), torch.autocast(device_type, enabled=False):
        yield


_own_passes = 0


@contextlib.contextmanager
def unobserved() -> Iterator[None]:
    """Run passes of our own through a module: no recorder takes them for the step's."""
    global _own_passes
    _own_passes += 1
    try:
        yield
    finally:
        _own_passes -= 1


def in_backward() -> bool:
    """Return whether a backward pass is running in this thread (a recomputed forward, then)."""
    return torch._C._current_graph_task_id() != -1


class Recorder:
    """Watches one layer from :meth:`attach` to :meth:`detach` and keeps nothing but sums.

    Args:
        layer: the layer.
        wants: what to reduce to.
        scale: returns the factor that turns a gradient of the step's loss into one of a
            per-sample loss.
        labels: returns the labels of the current micro-batch, or None.
        classes: number of classes, for the per-class sums of the head's input.
        seconds: where time is booked.
        reader: the layer that alone reads this layer's units, if known.
        samples: returns the number of samples of the current micro-batch, or None if unknown.
        memory: for inputs that wait for their gradients, shared by all layers.
        paused: returns whether what runs now is not the step (validation within an accumulated one).
    """

    def __init__(
        self,
        layer: Layer,
        wants: Wants,
        *,
        scale: Callable[[], float],
        labels: Callable[[], Tensor | None],
        classes: int,
        seconds: dict[str, float],
        reader: nn.Module | None = None,
        samples: Callable[[], int | None] = lambda: None,
        memory: HeldMemory | None = None,
        paused: Callable[[], bool] = lambda: False,
    ) -> None:
        if isinstance(layer, Gain):  # not a linear map: nothing else is read of it
            nothing: dict[str, Any] = dict.fromkeys(SIDES, Moments.NONE)
            wants = dataclasses.replace(wants, **nothing, activity=False, zero_gradients=False)
        self.layer, self.wants = layer, wants
        self.max_positions = wants.max_positions
        self.scale, self.labels, self.paused = scale, labels, paused
        self.seconds = seconds
        self.error: Exception | None = None
        self.fed_by_data = True
        device = layer.parameter().device
        dtype = accumulation_dtype(device)
        self.blocks = layer.blocks()
        self.bias = layer.bias()
        self.outgoing = None if reader is None else local(reader.weight).clone()  # type: ignore[arg-type]
        widths = (layer.in_features, layer.out_features) * 2
        self.sums: dict[str, Sums] = {}
        for side, width in zip(SIDES, widths, strict=True):
            moments: Moments = getattr(wants, side)
            if moments and width:
                patches = layer.is_convolution and side in ("inputs", "input_gradients")
                keep = kept_features(width, wants.max_patch_width if patches else wants.max_width)
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
        self.disagreements = torch.zeros(1, dtype=dtype, device=device)
        self.noise: NoiseSums | None = None
        if wants.gradient_noise:
            memory = memory or HeldMemory(wants.max_held_bytes)
            self.noise = NoiseSums(layer, max_width=wants.max_noise_width, samples=samples, memory=memory)
        self._features: list[Tensor] = []  # of the head, until its class means are known
        self._backward_weight: tuple[Tensor, Tensor | None] | None = None
        self._handles: list[Any] = []

    def attach(self) -> None:
        """Register the hooks."""
        module = self.layer.module
        if self.layer.part is None:
            self._handles.append(module.register_forward_hook(self._forward))
        else:
            self._handles.append(module.register_forward_pre_hook(self._enter))
            # always_call: an exception must not leave our stand-in for F.linear behind.
            self._handles.append(module.register_forward_hook(self._leave, always_call=True))

    def detach(self) -> None:
        """Remove the hooks; harmless if there are none."""
        while self._handles:
            self._handles.pop().remove()
        self._leave()

    @property
    def held_bytes(self) -> int:
        """Memory of the sums and of the weight's snapshot."""
        snapshots = [t for t in (self.blocks, self.bias, self.outgoing) if t is not None]
        return sum(t.numel() * t.element_size() for t in [*self.tensors(), *snapshots])

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
        noise = self.noise.tensors() if self.noise is not None else []
        return [*own, *noise, *(tensor for sums in self.sums.values() for tensor in sums.tensors())]

    def finish_batch(self) -> None:
        """End a micro-batch: form what sums its per-sample gradients still wait for."""
        if self.noise is None:
            return
        began = time.perf_counter()
        try:
            with _aside(self.layer.parameter().device.type):
                self.noise.finish_batch()
        except Exception as error:
            self.error = self.error or error
            self.noise.give_up("an error")
        finally:
            self.seconds["moments"] += time.perf_counter() - began

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

    def _looks_away(self) -> bool:
        return _own_passes > 0 or self.paused()

    def _enter(self, module: nn.Module, args: Any) -> None:
        if self._looks_away():
            return
        if self.noise is not None:
            query = args[0] if args and isinstance(args[0], Tensor) and args[0].ndim == 3 else None
            self.noise.attention_batch = None if query is None else query.shape[not module.batch_first]
        _linear_calls.enter(self)

    def _leave(self, *_: Any) -> None:
        _linear_calls.leave(self)

    def see_product(self, x: Tensor, weight: Tensor, result: Tensor) -> None:
        """Take in ``result = F.linear(x, weight)`` if the weight is, or holds, this projection's."""
        owner = weight._base if weight._base is not None else weight
        parameter = self.layer.parameter()
        if owner is not parameter:
            return
        # A packed product holds several projections: a slice of its rows is ours.
        offset = (weight.storage_offset() - parameter.storage_offset()) // weight.shape[1]
        packed = parameter.shape[0] > self.layer.out_features
        first = ATTENTION_PARTS.index(self.layer.part) * self.layer.out_features if packed else 0  # type: ignore[arg-type]
        start = first - offset
        if 0 <= start < weight.shape[0]:
            self.see(x, result, part=slice(start, start + self.layer.out_features))

    # -- samples -----------------------------------------------------------------------------

    def _forward(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        x = args[0] if args else None
        if isinstance(output, Tensor):
            self.see(x if isinstance(x, Tensor) else None, output)

    def see(self, x: Tensor | None, output: Tensor, *, part: slice = slice(None)) -> None:
        """Take in one call of the layer, whose output is ``output[..., part]``."""
        if self._looks_away():
            return
        began = time.perf_counter()
        try:
            with _aside(output.device.type):
                if not in_backward():
                    self._take_values(x, output if self.layer.part is None else output[..., part])
            if self.noise is not None and not in_backward():
                self.noise.count_call()
            watched = self.wants.input_gradients or self.wants.output_gradients or self.noise is not None
            if output.requires_grad and watched:
                with _aside(output.device.type):
                    held = self.noise.hold(x, output) if self.noise is not None else None
                # The hook goes on the output itself: a slice of it has no part in the graph.
                whole = self.layer.part is None
                output.register_hook(lambda g: self._gradient(g if whole else g[..., part], held))
        except Exception as error:
            self.error = self.error or error
            if self.noise is not None:
                self.noise.give_up("an error")
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
        self._features.append(x)

    def count_disagreements(self) -> None:
        """Count samples nearest to another class mean than the head says; the means are global by now."""
        weight = self.blocks[0]
        for x in self._features:
            self.disagreements += nearest_mean_disagreements(
                x, self.class_counts, self.class_sums, weight, self.bias
            )
        self._features = []

    def _gradient(self, gradient: Tensor, held: Any = None) -> None:
        began = time.perf_counter()
        try:
            with _aside(gradient.device.type):
                if self.wants.input_gradients or self.wants.output_gradients:
                    self._take_gradients(gradient)
                if self.noise is not None:
                    self.noise.take(held, gradient, scale=self.scale())
        except Exception as error:
            self.error = self.error or error
            if self.noise is not None:
                self.noise.give_up("an error")
        finally:
            self.seconds["moments"] += time.perf_counter() - began

    def _take_gradients(self, gradient: Tensor) -> None:
        rows = self.layer.output_rows(gradient, self.max_positions)
        rows = rows.to(accumulation_dtype(rows.device)) * self.scale()
        if "output_gradients" in self.sums:
            self.sums["output_gradients"].add(rows)
        if "input_gradients" in self.sums:
            self._take_input_gradients(rows)

    def _take_input_gradients(self, g_NO: Tensor) -> None:
        """Add ``g_a = W^T g_b``; of a wide side only the kept features are ever formed."""
        sums = self.sums["input_gradients"]
        if sums.keep is None:
            sums.add(_through_blocks(g_NO, self.blocks))
            return
        if self._backward_weight is None:
            blocks = self.blocks.to(g_NO.dtype)
            # ||g_a|| from W W^T needs no g_a; a vocabulary-sized W W^T would be worse than g_a.
            small = self.layer.out_features <= LARGEST_GRAM
            gram = torch.block_diag(*(blocks @ blocks.mT)) if small else None
            self._backward_weight = dense_columns(blocks, sums.keep), gram
        weight_OK, gram_OO = self._backward_weight
        if gram_OO is not None:
            norm_N = ((g_NO @ gram_OO) * g_NO).sum(dim=1).clamp_min(0.0).sqrt()
            sums.add(g_NO @ weight_OK, norm_N=norm_N)
        else:
            sums.add(_through_blocks(g_NO, self.blocks))


def _through_blocks(g_NO: Tensor, blocks: Tensor) -> Tensor:
    """Return ``g_b W`` for a block-diagonal W, ``[N, A]``."""
    groups, rows, _ = blocks.shape
    g_GNO = g_NO.unflatten(1, (groups, rows)).transpose(0, 1)
    return (g_GNO @ blocks.to(g_NO.dtype)).transpose(0, 1).flatten(1)


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


class _LinearCalls:
    """Shows ``F.linear`` calls to recorders while an attention module of theirs runs.

    ``nn.MultiheadAttention`` calls no sub-module, and a torch function mode sees its whole forward as
    one call: what is left is to stand in for ``F.linear``, in the module that looks it up, for that long.
    Calls with other weights, from other threads too, go through untouched.
    """

    def __init__(self) -> None:
        self.recorders: list[Recorder] = []
        self._plain: Callable[..., Tensor] = F.linear

    def enter(self, recorder: Recorder) -> None:
        if not self.recorders:
            self._plain, F.linear = F.linear, self._linear  # type: ignore[assignment]
        self.recorders.append(recorder)

    def leave(self, recorder: Recorder) -> None:
        if recorder in self.recorders:
            self.recorders.remove(recorder)
            if not self.recorders:
                F.linear = self._plain  # type: ignore[assignment]

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        result = self._plain(x, weight, bias)
        for recorder in self.recorders:
            recorder.see_product(x, weight, result)
        return result


_linear_calls = _LinearCalls()


def has_compiled(module: nn.Module) -> bool:
    """Return whether the module or one inside it runs compiled, where late hooks capture nothing."""
    return any(
        getattr(child, "_compiled_call_impl", None) is not None or "_orig_mod" in child._modules
        for child in module.modules()
    )


__all__ = ["SIDES", "Recorder", "dense_columns", "has_compiled", "in_backward"]
