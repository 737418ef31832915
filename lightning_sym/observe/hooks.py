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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from lightning_sym.observe.call import Call
from lightning_sym.observe.guard import guarded, without_frames
from lightning_sym.observe.kinds.lora import added
from lightning_sym.observe.layer import Layer
from lightning_sym.observe.products import Product
from lightning_sym.observe.statistics.statistic import Statistic, Tally, Unavailable
from lightning_sym.observe.step import Step
from lightning_sym.observe.weights import LayerWeight, accumulation_dtype

#: Rows of the first call on which output and W h + b are compared.
COMPARED = 8


@contextlib.contextmanager
def aside(device_type: str) -> Iterator[None]:
    """Compute without a graph and without autocast: a product in a hook would be cast down too."""
    # Function modes are off, too: what is computed here is not the module's.
    with torch.no_grad(), torch.autocast(device_type, enabled=False), torch._C.DisableTorchFunction():
        yield


def in_backward() -> bool:
    """Return whether a backward pass is running in this thread (a recomputed forward, then)."""
    return torch._C._current_graph_task_id() != -1


def transforming() -> bool:
    """Return whether a transform of ``torch.func`` (vmap, grad, jvp, ...) is running in this thread."""
    return torch._C._functorch.peek_interpreter_stack() is not None


class LayerWatch:
    """Watches one layer from :meth:`attach` to :meth:`detach` and keeps what its tallies keep.

    Args:
        layer: the layer.
        statistics: what to keep of it.
        step: the step that is observed.
        looking: returns whether what runs now belongs to the step.
        seconds: where time is booked.
        reader: the layer that alone reads this layer's units, if known.
        agreed: names of layers whose output is known to be W h + b: the comparison is made once a fit.

    Attributes:
        errors: by statistic, what went wrong on this rank.
        closed: whether the layer's own optimizer has stepped.
        batch: of an attention module, the samples of the call that is running.
        made: whether the weight that was used is not a parameter: its forward makes it of others.
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
        agreed: set[str] | None = None,
    ) -> None:
        self._agreed = set() if agreed is None else agreed
        self.layer, self.statistics, self.step, self.reader = layer, list(statistics), step, reader
        self._looking, self._seconds = looking, seconds
        self.device = layer.parameter().device
        self.trained = layer.trained
        self.closed = False
        self.batch: int | None = None
        self._handles: list[Any] = []
        self._computed: Tensor | None = None  # what a parametrization returned last
        self._gathered = self._gather()
        self._weight: LayerWeight | None = None
        self._product: Product | None = None
        self._no_weight, self.made = "", False
        self._begin()

    # -- the weight ---------------------------------------------------------------------------

    def _gather(self) -> Tensor | None:
        """Return a sharded weight whole: all ranks do that together, before any runs the layer."""
        sharded = any(hasattr(p, "full_tensor") for p in self.layer.sources())
        return self.layer.blocks() if sharded else None

    def weight(self) -> LayerWeight:
        """Return the weight that the forward pass used, and the bias.

        Raises:
            Unavailable: if it is not known.
        """
        if self._weight is None:
            if self._no_weight:
                raise Unavailable(self._no_weight)
            try:
                if self._product is not None and self.made:
                    blocks = self.layer.as_blocks(self._product.weight.detach(), oriented=True)
                elif self._gathered is not None:
                    blocks = self._gathered
                elif self._computed is not None:
                    blocks = self.layer.as_blocks(self._computed)
                elif (found := self.layer.used()) is not None:
                    blocks = found
                else:
                    raise Unavailable("its weight was not computed in the forward pass")
            except ValueError as error:
                self._no_weight = str(error)
                raise Unavailable(self._no_weight) from error
            self._weight = LayerWeight(blocks.clone(), self._bias(), self._outgoing())
        return self._weight

    def _bias(self) -> Tensor | None:
        bias = None if self._product is None else self._product.bias
        if bias is not None:
            return self.layer.slice(bias.detach()).clone()
        return None if self.made else self.layer.bias()

    def use(self, product: Product) -> None:
        """Take note of the product that the layer's output is: its weight may be made in the forward."""
        if product.geometry is not None:
            self.layer = replace(self.layer, geometry=product.geometry)
        if self._product is None:
            module, name = self.layer.holder
            own, weight = module._parameters.get(name), product.weight
            self.made = weight is not own and (weight._base is None or weight._base is not own)
            self._product = product

    def keep_computed(self, module: nn.Module, args: Any, output: Tensor) -> None:
        """Take note of what a parametrization made of its parameters."""
        if self._computed is None or self._weight is None:
            self._computed = output.detach()

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
        self._compared = True
        layer = self.layer
        if call.x is None or call.lengths is not None or not layer.has_input or not layer.linear:
            return
        try:
            h = layer.inputs(self.batch_first(layer.few(call.x, COMPARED)), 1)
            y = layer.outputs(self.batch_first(layer.few(call.output, COMPARED)), 1)
            h_NA, y_NO = (s.features().flatten(0, 1)[:COMPARED].double() for s in (h, y))
            weight = self.weight()
            made_NO = _product(h_NA, weight.blocks, weight.bias)
        except Unavailable:
            return
        except (RuntimeError, ValueError, AttributeError, IndexError, TypeError):
            self._no_weight = "its shapes are not those of its weight"
            return
        kinds = {call.output.dtype, weight.blocks.dtype}
        rough = 1e-3 if self.device.type == "cuda" else 1e-5  # TF32
        tolerance = 1e-2 if kinds - {torch.float32, torch.float64} else rough
        size_N = h_NA.abs().amax(1) * weight.blocks.double().abs().sum(-1).amax()
        size_N = (size_N + (0.0 if weight.bias is None else weight.bias.double().abs().amax())).clamp_min(
            1e-30
        )
        if made_NO.shape != y_NO.shape:
            self._no_weight = "its shapes are not those of its weight"
        elif not _alike(made_NO, y_NO, tolerance * size_N):
            more = added(layer.module)
            whole = None if more is None else weight.blocks + layer.as_blocks(more.to(weight.blocks))
            if whole is not None and _alike(_product(h_NA, whole, weight.bias), y_NO, tolerance * size_N):
                self.made, self._weight = True, LayerWeight(whole, weight.bias, weight.outgoing)
            else:
                self._no_weight = "its output is not W h + b of its weight"
        if self._no_weight:
            self._weight = None
        elif not self.made:
            self._agreed.add(layer.name)

    # -- attaching ----------------------------------------------------------------------------

    def _begin(self) -> None:
        """Begin all tallies anew: what was seen so far is dropped."""
        self.calls = torch.zeros(1, dtype=accumulation_dtype(self.device), device=self.device)
        self.errors: dict[Statistic, Exception] = {}
        self.fed_by_data = True
        self.transformed = False
        self._mode = ""  # "plain" while only passes without gradient were seen, then "graph"
        self._foreign = False  # another optimizer stepped since
        self._compared, self._no_weight = False, ""
        self._product, self._weight, self.made = None, None, False
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
            self.errors.setdefault(statistic, without_frames(error))

    def attach(self) -> None:
        """Register the hooks."""
        self._handles += self.layer.attach(self)

    def detach(self) -> None:
        """Remove the hooks; harmless if there are none."""
        while self._handles:
            self._handles.pop().remove()

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
        with self.booked(), aside(self.device.type):
            yield

    @contextlib.contextmanager
    def booked(self) -> Iterator[None]:
        """Book time as that of statistics."""
        began = perf_counter()
        try:
            yield
        finally:
            self._seconds["moments"] += perf_counter() - began

    # -- samples ------------------------------------------------------------------------------

    def batch_first(self, x: Tensor) -> Tensor:
        """Return a tensor with samples first."""
        return self.layer.batch_first(x, self.batch)

    def open(self) -> bool:
        """Return whether a call that is made now may be taken in."""
        if self.closed or self._is_transformed():
            return False
        return in_backward() or self._looking()

    def _is_transformed(self) -> bool:
        """Return whether a transform of ``torch.func`` runs, whose tensors don't outlive it."""
        if not transforming():
            return False
        self.transformed = self.transformed or self._looking()
        return True

    def guard(self, hook: Callable[..., None]) -> Callable[..., None]:
        """Return a hook that keeps what goes wrong in it: nothing of ours ends the user's step."""
        return guarded(hook, self.fail)

    def fail(self, error: Exception) -> None:
        """Take note of an error while a call was looked at: no statistic has a result."""
        if self.open():
            error = without_frames(error)
            self.errors.update({s: error for s in self.statistics if s not in self.errors})

    def unreadable(self, reason: str) -> None:
        """Take note of a call that can't be read, and read what parameters alone show."""
        if in_backward() or not self.open() or not self._belongs():
            return
        self.calls += 1
        for statistic, tally in self.tallies.items():
            if statistic.of_calls:
                self.errors.setdefault(statistic, Unavailable(reason))
            else:
                with self._timed(), self._keeping(statistic):
                    tally.parameters()

    def turn(self, layer: Layer) -> None:
        """Begin anew with another reading of the layer's weight."""
        self.layer = layer
        self._begin()

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

    def see(
        self,
        x: Tensor | None,
        output: Tensor,
        *,
        part: Callable[[Tensor], Tensor] | None = None,
        lengths: list[int] | None = None,
        from_data: bool | None = None,
        graph: bool | None = None,
    ) -> Call | None:
        """Take in one call of the layer.

        Args:
            x: the input.
            output: the output, or what holds it.
            part: takes the layer's part out of the output, and of its gradient.
            lengths: of each sample, how many of its positions count; None: all.
            from_data: whether no input of the call carried a gradient; None: x tells.
            graph: whether the gradient comes through :meth:`deliver`; None: from the output's own hook.

        Returns:
            The call, or None if it was not taken in.
        """
        again = in_backward()  # a recomputed forward, after the training step has returned
        if self.closed or not output.numel() or self._is_transformed():
            return None
        if not again and not (self._looking() and self._belongs()):
            return None
        with self._timed():
            mine = output if part is None else part(output)
            seen_x = None if x is None else x.detach()
            call = Call(self, seen_x, mine.detach(), list(self.tallies.values()), lengths=lengths)
            if not again:
                self.calls += 1
                if x is not None:
                    data = not x.requires_grad if from_data is None else from_data
                    self.fed_by_data = self.fed_by_data and data
                if not self._compared and self.layer.name not in self._agreed:
                    self._compare(call)
                self._show(call, Tally.forward)
            has_graph = output.requires_grad if graph is None else graph
            if has_graph and any(s.uses_gradients for s in self.statistics):
                self._show(call, Tally.hold)
                if graph is None:
                    # The hook goes on the output itself: a slice of it has no part in the graph.
                    output.register_hook(self.guard(partial(self._gradient, call, part)))
        call.release()
        return call

    def deliver(self, call: Call, gradient: Tensor) -> None:
        """Take in the gradient of a call's output."""
        self._gradient(call, None, gradient)

    def _show(self, call: Call, method: Callable[..., None], *arguments: Any) -> None:
        """Show a call to its tallies, unless they were replaced since."""
        name = method.__name__
        for statistic, tally in self.tallies.items():
            if any(tally is shown for shown in call.tallies) and statistic not in self.errors:
                with self._keeping(statistic):
                    getattr(tally, name)(call, *arguments)

    def _gradient(self, call: Call, part: Callable[[Tensor], Tensor] | None, gradient: Tensor) -> None:
        if self.closed:
            return
        with self._timed():
            self._show(call, Tally.backward, gradient if part is None else part(gradient))
        call.release()

    # -- what it came to ----------------------------------------------------------------------

    def lacks(self, statistic: Statistic) -> bool:
        """Return whether this rank has no result for a statistic."""
        weightless = bool(self._no_weight) and statistic.uses_weight
        return statistic in self.errors or (weightless and statistic in self.tallies)

    def reason(self, statistic: Statistic) -> tuple[bool, str]:
        """Return whether it is a fault of ours, and what stands in the way on this rank ("" if nothing)."""
        error = self.errors.get(statistic)
        if isinstance(error, Unavailable):
            return False, str(error)
        if error is not None:
            return True, f"{type(error).__name__}: {error}"
        return False, self._no_weight if statistic.uses_weight else ""

    def sums(self, statistic: Statistic) -> list[Tensor]:
        """Return what is summed over ranks of a statistic; nothing where it failed."""
        return self._asked(statistic, "tensors")

    def more_sums(self, statistic: Statistic) -> list[Tensor]:
        """Return what is summed over ranks once the first sums are global; nothing where it failed."""
        return self._asked(statistic, "second_pass")

    def _asked(self, statistic: Statistic, method: str) -> list[Tensor]:
        tally = self.tallies.get(statistic)
        if tally is None:
            return []
        with self._keeping(statistic):
            found: list[Tensor] = getattr(tally, method)()
            if not isinstance(found, list) or not all(isinstance(x, Tensor) for x in found):
                raise TypeError(
                    f"{type(tally).__name__}.{method} must return a list of tensors, got {found!r}"
                )
            return found
        return []


def _product(h_NA: Tensor, blocks: Tensor, bias: Tensor | None) -> Tensor:
    """Return ``W h + b`` in float64."""
    h_NGA = h_NA.unflatten(1, (len(blocks), -1))
    made_NO = torch.einsum("nga,goa->ngo", h_NGA, blocks.double()).flatten(1)
    return made_NO if bias is None else made_NO + bias


def _alike(made_NO: Tensor, y_NO: Tensor, most_N: Tensor) -> bool:
    """Return whether rows that are finite differ by no more."""
    fine_N = made_NO.isfinite().all(1) & y_NO.isfinite().all(1)
    return not ((made_NO - y_NO).abs().amax(1)[fine_N] > most_N[fine_N]).any()


def has_compiled(module: nn.Module) -> bool:
    """Return whether the module or one inside it runs compiled, where late hooks capture nothing."""
    return any(
        getattr(child, "_compiled_call_impl", None) is not None or "_orig_mod" in child._modules
        for child in module.modules()
    )
