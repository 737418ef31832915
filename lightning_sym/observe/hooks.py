"""On and off a layer for one optimizer step.

What is awkward about hooks is settled here:

* A layer called twice in a forward pass pools the samples of both calls.
* Passes without gradient (a target network, a teacher, somebody's picture) are left out where the
  layer is trained, unless no other came: then the module learns without autograd.
* Under activation checkpointing the recomputed forward, inside the backward pass, is not counted
  a second time; where the first forward ran without a graph, its gradients are taken from there.
* Output gradients come from ``output.register_hook``: right with in-place activations, where full
  backward hooks are not.
* With several optimizers a layer's step ends when its own optimizer has stepped; what ran through it
  before another one's step is dropped once it is run anew.
* Nothing here raises into the user's step: an error is kept, for the one statistic that it concerns.

Shape letters: G groups, O outputs, A inputs, K kept features.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_sym.observe.call import Call
from lightning_sym.observe.layers import ATTENTION_PARTS, Layer
from lightning_sym.observe.products import linear_calls
from lightning_sym.observe.statistics.statistic import Statistic, Tally, Unavailable
from lightning_sym.observe.step import Step
from lightning_sym.observe.weights import LayerWeight, accumulation_dtype, is_parametrized, next_weight

#: Rows of the first call on which output and W h + b are compared.
COMPARED = 8


@contextlib.contextmanager
def aside(device_type: str) -> Iterator[None]:
    """Compute without a graph and without autocast: a product in a hook would be cast down too."""
    with torch.no_grad(), torch.autocast(device_type, enabled=False):
        yield


def in_backward() -> bool:
    """Return whether a backward pass is running in this thread (a recomputed forward, then)."""
    return torch._C._current_graph_task_id() != -1


class LayerWatch:
    """Watches one layer from :meth:`attach` to :meth:`detach` and keeps what its tallies keep.

    Args:
        layer: the layer.
        statistics: what to keep of it.
        step: the step that is observed.
        looking: returns whether what runs now belongs to the step.
        seconds: where time is booked.
        reader: the layer that alone reads this layer's units, if known.
        compared: by layer, what stands against reading its weight (``""``: nothing), once that is known.

    Attributes:
        errors: by statistic, what went wrong on this rank.
        closed: whether the layer's own optimizer has stepped.
        fed_by_data: whether no input of the layer carried a gradient (raw data, frozen layers).
    """

    def __init__(
        self,
        layer: Layer,
        statistics: Sequence[Statistic],
        *,
        step: Step,
        looking: Callable[[], bool],
        seconds: dict[str, float],
        reader: Layer | None = None,
        compared: dict[str, str] | None = None,
    ) -> None:
        self.layer, self.statistics, self.step, self.reader = layer, list(statistics), step, reader
        self._compared = {} if compared is None else compared
        self._looking, self._seconds = looking, seconds
        self.device = layer.parameter().device
        self.trained = layer.trained
        self.closed = False
        self._attention_batch: int | None = None
        self._handles: list[Any] = []
        self._computed: Tensor | None = None  # what a parametrization returned last
        self._gathered = self._gather()
        self._weight: LayerWeight | None = None
        self._no_weight = ""
        self._begin()

    # -- the weight ---------------------------------------------------------------------------

    def _gather(self) -> Tensor | None:
        """Return a sharded weight whole: all ranks do that together, before any runs the layer."""
        sharded = any(hasattr(p, "full_tensor") for p in self.layer.sources())
        return next_weight(*self.layer.holder) if sharded else None

    def weight(self) -> LayerWeight:
        """Return the weight that the forward pass used, and the bias.

        Raises:
            Unavailable: if it is not known.
        """
        if self._weight is None:
            if self._no_weight:
                raise Unavailable(self._no_weight)
            module, name = self.layer.holder
            weight = self._gathered if self._gathered is not None else self._computed
            if weight is None:
                if is_parametrized(module, name):
                    raise Unavailable("its weight was not computed in the forward pass")
                weight = getattr(module, name)
            try:
                blocks = self.layer.as_blocks(weight.detach()).clone()
            except ValueError as error:
                self._no_weight = str(error)
                raise Unavailable(self._no_weight) from error
            self._weight = LayerWeight(blocks, self.layer.bias(), self._outgoing())
        return self._weight

    def at_rest(self) -> None:
        """Read the weight as it stands, where no step is observed."""
        self.calls += 1
        try:
            self._weight = LayerWeight(self.layer.blocks(), self.layer.bias(), self._outgoing())
        except ValueError as error:
            self.errors.update(dict.fromkeys(self.statistics, Unavailable(str(error))))

    def _outgoing(self) -> Tensor | None:
        """Return the weight of the one layer that reads this one's units."""
        if self.reader is None or any(hasattr(p, "full_tensor") for p in self.reader.sources()):
            return None
        return self.reader.blocks().flatten(0, 1).unflatten(-1, (self.reader.in_units, -1))

    def _compare(self, call: Call) -> None:
        """Find out whether the output is W h + b: a subclass may do something else."""
        layer = self.layer
        if call.x is None or not layer.has_input or not layer.linear:
            return
        some = slice(COMPARED) if layer.part is None else slice(None)
        try:
            h = layer.inputs(self.batch_first(call.x[some]), 1)
            y = layer.outputs(self.batch_first(call.output[some]), 1)
            h_NA, y_NO = (s.features().flatten(0, 1)[:COMPARED].double() for s in (h, y))
            blocks, bias = self.weight().blocks.double(), self.weight().bias
            made_NO = torch.einsum("nga,goa->ngo", h_NA.unflatten(1, (len(blocks), -1)), blocks).flatten(1)
            made_NO = made_NO if bias is None else made_NO + bias
            off_NO = (made_NO - y_NO).abs()
        except Unavailable:
            return
        except (RuntimeError, ValueError, AttributeError):
            fault = "its shapes are not those of its weight"
        else:
            kinds = {call.output.dtype, self.weight().blocks.dtype}
            rough = 1e-3 if self.device.type == "cuda" else 1e-5  # TF32
            tolerance = 1e-2 if kinds - {torch.float32, torch.float64} else rough
            size = (h_NA.abs().amax(1) * blocks.abs().sum(-1).amax()).clamp_min(1e-30)
            wrong = off_NO.isfinite() & (off_NO > tolerance * size[:, None])
            fault = "its output is not W h + b of its weight" if wrong.any() else ""
        self._compared[layer.name] = fault
        if fault:
            self._no_weight, self._weight = fault, None

    # -- attaching ----------------------------------------------------------------------------

    def _begin(self) -> None:
        """Begin all tallies anew: what was seen so far is dropped."""
        self.calls = torch.zeros(1, dtype=accumulation_dtype(self.device), device=self.device)
        self.errors: dict[Statistic, Exception] = {}
        self.fed_by_data = True
        self._mode = ""  # "plain" while only passes without gradient were seen, then "graph"
        self._foreign = False  # another optimizer stepped since
        self._no_weight = self._compared.get(self.layer.name, "")
        self._weight = None
        self.tallies: dict[Statistic, Tally] = {}
        for statistic in self.statistics:
            with self._keeping(statistic):
                self.tallies[statistic] = statistic.begin(self)

    @contextlib.contextmanager
    def _keeping(self, statistic: Statistic) -> Iterator[None]:
        """Keep an error for the statistic that it concerns."""
        try:
            yield
        except Exception as error:
            self.errors.setdefault(statistic, error)

    def attach(self) -> None:
        """Register the hooks."""
        module, (holder, name) = self.layer.module, self.layer.holder
        if is_parametrized(holder, name):
            made = holder.parametrizations[name].register_forward_hook(self._keep_computed)  # type: ignore[index, union-attr]
            self._handles.append(made)
        if self.layer.part is None:
            self._handles.append(module.register_forward_hook(self._forward, with_kwargs=True))
        else:
            self._handles.append(module.register_forward_pre_hook(self._enter, with_kwargs=True))
            # always_call: an exception must not leave our replacement of F.linear behind.
            self._handles.append(module.register_forward_hook(self._leave, always_call=True))

    def detach(self) -> None:
        """Remove the hooks; harmless if there are none."""
        while self._handles:
            self._handles.pop().remove()
        self._leave()

    def _keep_computed(self, module: nn.Module, args: Any, output: Tensor) -> None:
        if self._computed is None or self._weight is None:
            self._computed = output

    # -- the step -----------------------------------------------------------------------------

    def end_batch(self) -> None:
        """End a micro-batch."""
        with self._timed():
            for statistic, tally in self.tallies.items():
                with self._keeping(statistic):
                    tally.end_batch()

    def own_step(self) -> None:
        """The layer's optimizer has stepped: read parameters, and look no more."""
        if self.closed:
            return
        self.closed = True
        self.end_batch()
        with self._timed():
            for statistic, tally in self.tallies.items():
                with self._keeping(statistic):
                    tally.stepped()

    def other_step(self) -> None:
        """Another optimizer has stepped: what comes now is another pass."""
        self._foreign = True

    @contextlib.contextmanager
    def _timed(self) -> Iterator[None]:
        began = time.perf_counter()
        try:
            with aside(self.device.type):
                yield
        finally:
            self._seconds["moments"] += time.perf_counter() - began

    # -- attention ----------------------------------------------------------------------------

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self.closed or not (in_backward() or self._looking()):
            return
        query = args[0] if args else kwargs.get("query")
        self._attention_batch = 1
        if isinstance(query, Tensor) and query.ndim == 3:
            self._attention_batch = query.shape[0 if module.batch_first else 1]
        linear_calls.enter(self)

    def _leave(self, *_: Any) -> None:
        linear_calls.leave(self)

    def see_product(self, x: Tensor, weight: Tensor, result: Tensor) -> None:
        """Take in ``result = F.linear(x, weight)`` if the weight is, or holds, this projection's."""
        owner = weight._base if weight._base is not None else weight
        holder, name = self.layer.holder
        parameter = holder._parameters.get(name)
        if parameter is None or owner is not parameter:
            return
        # A packed product holds several projections: a slice of its rows is ours.
        offset = (weight.storage_offset() - parameter.storage_offset()) // weight.shape[1]
        packed = parameter.shape[0] > self.layer.out_features
        first = ATTENTION_PARTS.index(self.layer.part) * self.layer.out_features if packed else 0  # type: ignore[arg-type]
        start = first - offset
        if 0 <= start < weight.shape[0]:
            self.see(x, result, part=slice(start, start + self.layer.out_features))

    def batch_first(self, x: Tensor) -> Tensor:
        """Return a tensor with samples first: attention works on ``[P, B, width]``, flat on its output."""
        if self.layer.part is None:
            return x
        return x.reshape(-1, self._attention_batch or 1, x.shape[-1]).transpose(0, 1)

    # -- samples ------------------------------------------------------------------------------

    def _forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        x = args[0] if args else next(iter(kwargs.values()), None)
        if isinstance(output, Tensor):
            self.see(x if isinstance(x, Tensor) else None, output)

    def _belongs(self) -> bool:
        """Return whether a forward pass that runs now is counted; begin anew where it replaces others."""
        if not self.trained:
            return True
        graph = torch.is_grad_enabled() and self.layer.trained
        if graph and (self._foreign or self._mode == "plain"):
            self._begin()
        elif self._mode == "graph" and not graph:
            return False
        self._mode = "graph" if graph else "plain"
        return True

    def see(self, x: Tensor | None, output: Tensor, *, part: slice | None = None) -> None:
        """Take in one call of the layer, whose output is ``output[..., part]``."""
        again = in_backward()  # a recomputed forward, after the training step has returned
        if self.closed or not output.numel() or not (again or (self._looking() and self._belongs())):
            return
        with self._timed():
            mine = output if part is None else output[..., part]
            call = Call(self, None if x is None else x.detach(), mine.detach(), list(self.tallies.values()))
            if not again:
                self.calls += 1
                if x is not None:
                    self.fed_by_data = self.fed_by_data and not x.requires_grad
                if self.layer.name not in self._compared:
                    self._compare(call)
                self._show(call, Tally.forward)
            if output.requires_grad and any(s.uses_gradients for s in self.statistics):
                self._show(call, Tally.hold)
                # The hook goes on the output itself: a slice of it has no part in the graph.
                output.register_hook(partial(self._gradient, call, part))
        call.release()

    def _show(self, call: Call, method: Callable[..., None], *arguments: Any) -> None:
        """Show a call to its tallies, unless they were replaced since."""
        name = method.__name__
        for statistic, tally in self.tallies.items():
            if any(tally is shown for shown in call.tallies) and statistic not in self.errors:
                with self._keeping(statistic):
                    getattr(tally, name)(call, *arguments)

    def _gradient(self, call: Call, part: slice | None, gradient: Tensor) -> None:
        if self.closed:
            return
        with self._timed():
            self._show(call, Tally.backward, gradient if part is None else gradient[..., part])
        call.release()

    # -- what it came to ----------------------------------------------------------------------

    def status(self) -> Tensor:
        """Return for each statistic 1 where this rank has no result for it, else 0."""
        weightless = bool(self._no_weight)
        bad = [
            float(s in self.errors or (weightless and s.uses_weight and s in self.tallies))
            for s in self.statistics
        ]
        return torch.tensor([*bad, float(not self.fed_by_data)], dtype=self.calls.dtype, device=self.device)

    def reason(self, statistic: Statistic) -> tuple[bool, str]:
        """Return whether it is a fault of ours, and what stands in the way on this rank ("" if nothing)."""
        error = self.errors.get(statistic)
        if isinstance(error, Unavailable):
            return False, str(error)
        if error is not None:
            return True, f"{type(error).__name__}: {error}"
        return False, self._no_weight if statistic.uses_weight else ""

    def tensors(self) -> list[Tensor]:
        """Return every tensor to be summed over ranks, in a fixed order."""
        sums = [t for statistic in self.statistics for t in self._sums(statistic)]
        return [self.calls, *sums]

    def _sums(self, statistic: Statistic) -> list[Tensor]:
        tally = self.tallies.get(statistic)
        if tally is None:
            return []
        with self._keeping(statistic):
            return tally.tensors()
        return []


def has_compiled(module: nn.Module) -> bool:
    """Return whether the module or one inside it runs compiled, where late hooks capture nothing."""
    return any(
        getattr(child, "_compiled_call_impl", None) is not None or "_orig_mod" in child._modules
        for child in module.modules()
    )
