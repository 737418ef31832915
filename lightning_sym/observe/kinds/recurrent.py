"""The input and recurrent maps of LSTM, GRU and RNN layers and cells, the gates of one stacked as in torch.

Fused kernels call no sub-module, and keep what happens inside to themselves: the states are computed
once more in torch's elementary functions, and compared with what the layer put out. Gradients with
respect to the maps' outputs come from a backward pass through that computation alone, from the
gradients that the layer's outputs received. Nothing of it touches the fit.

Shape letters: T steps, B samples, N = all steps of all samples (packed), A inputs, H hidden units,
Z = gates * H.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence

from lightning_sym.observe.guard import guarded
from lightning_sym.observe.layer import Layer
from lightning_sym.observe.weights import is_parametrized, local

if TYPE_CHECKING:
    from lightning_sym.observe.call import Call
    from lightning_sym.observe.hooks import LayerWatch

#: How far recomputed outputs may be from a layer's own, relative to the largest, by their type.
_ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-3}


@dataclass(frozen=True, eq=False, repr=False)
class RecurrentMap(Layer):
    """``W_ih``, ``W_hh`` or ``W_hr`` (an LSTM's projection) of one layer and direction.

    ``h_a`` is the step's input or last state, ``h_b = W h_a`` with the map's own bias; its gradient is
    that of the step's pre-activations, which of a GRU's new gate differ between both maps.
    """

    by_call = False

    @property
    def no_noise(self) -> str:
        """Why gradient noise is not read of an LSTM's projection, which has no pre-activation."""
        return "it projects the hidden state" if self.part and self.part.startswith("hr") else ""

    def attach(self, watch: LayerWatch) -> list[Any]:
        """Show calls to a watch; return handles whose ``remove`` ends it."""
        replays: Replays = watch.step.shared(("replays", self.module), partial(Replays, self.module))
        return [replays.attach(str(self.part), watch)]


def maps(name: str, module: nn.RNNBase | nn.RNNCellBase) -> Iterator[Layer]:
    """Yield the maps of a recurrent layer or cell."""
    for key, weight in list(module._parameters.items()):
        kind = key.removeprefix("weight_")
        if weight is None or kind == key or isinstance(weight, nn.UninitializedParameter):
            continue
        label = f"{name}.{kind}" if name else kind
        rows, width = weight.shape
        yield RecurrentMap(label, module, kind, width, rows, weight_name=key, bias_name=f"bias_{kind}")


@dataclass
class _Made:
    """What a map did in one call: its inputs and outputs, and a leaf whose gradient is the outputs'."""

    x: Tensor  # [T, B, A]
    y: Tensor  # [T, B, Z]
    zero: Tensor  # [T, B, Z]


@dataclass
class _Replay:
    """One call, computed once more.

    Attributes:
        maps: by map, what it did.
        outputs: the layer's outputs: those of all steps, then the last states.
        lengths: of each sample its steps, where they differ.
        order: where each sample is among the rows, if they were sorted.
        waiting: calls that wait for their gradients.
    """

    maps: dict[str, _Made] = field(default_factory=dict)
    outputs: list[Tensor] = field(default_factory=list)
    lengths: list[int] | None = None
    order: Tensor | None = None
    waiting: list[tuple[LayerWatch, str, Call]] = field(default_factory=list)

    def rows(self, x_TBD: Tensor) -> Tensor:
        """Return ``[B, T, D]`` in the batch's order."""
        x_TBD = x_TBD.detach()
        return (x_TBD if self.order is None else x_TBD.index_select(1, self.order)).transpose(0, 1)

    def gradients(self, gradients: Any) -> None:
        """Take in the gradients of the outputs, None where there is none: go backward through the replay."""
        pairs = [(y, g) for y, g in zip(self.outputs, gradients, strict=True) if g is not None]
        pairs = [(y, g.detach().to(y.dtype)) for y, g in pairs if y.requires_grad]
        waiting, self.waiting = self.waiting, []
        if not pairs or not waiting:
            return
        leaves = [self.maps[key].zero for _, key, _ in waiting]
        outputs, given = zip(*pairs, strict=True)
        with torch.autocast(leaves[0].device.type, enabled=False):
            try:
                found = torch.autograd.grad(outputs, leaves, given, allow_unused=True)
            except Exception as error:
                for watch, _, _ in waiting:
                    watch.fail(error)
                return
        for (watch, _, call), leaf, gradient in zip(waiting, leaves, found, strict=True):
            watch.deliver(call, self.rows(torch.zeros_like(leaf) if gradient is None else gradient))
        self.maps, self.outputs = {}, []


class Replays:
    """Computes the calls of one recurrent module once more, for all watches of its maps.

    Args:
        module: the layer or cell.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module: Any = module
        self.watches: dict[str, LayerWatch] = {}
        self._hooks: list[Any] = []
        self._random: Tensor | None = None

    def attach(self, key: str, watch: LayerWatch) -> _Handle:
        """Show calls to the watch of one map."""
        self.watches[key] = watch
        if not self._hooks:
            self._hooks = [
                self.module.register_forward_pre_hook(guarded(self._enter, self._fail)),
                self.module.register_forward_hook(guarded(self._leave, self._fail), with_kwargs=True),
            ]
        return _Handle(self, key)

    def detach(self, key: str) -> None:
        """Show no more to one of them."""
        self.watches.pop(key, None)
        while self._hooks and not self.watches:
            self._hooks.pop().remove()

    def _fail(self, error: Exception) -> None:
        for watch in list(self.watches.values()):
            watch.fail(error)

    def _enter(self, *_: Any) -> None:
        module = self.module
        drops = (
            getattr(module, "dropout", 0.0) > 0 and module.training and getattr(module, "num_layers", 1) > 1
        )
        on_cpu = next(module.parameters()).device.type == "cpu"
        # The masks between layers are the only numbers that are drawn inside: the same can be drawn again.
        self._random = torch.get_rng_state() if drops and on_cpu else None

    def _leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        watches = {key: watch for key, watch in self.watches.items() if watch.open()}
        if not watches:
            return
        first = next(iter(watches.values()))
        leaves = [x for x in _leaves(output) if x.requires_grad]
        wants = bool(leaves) and any(s.uses_gradients for watch in watches.values() for s in watch.statistics)
        try:
            with (
                torch.set_grad_enabled(wants),
                torch._C.DisableTorchFunction(),  # what is computed here is not the module's
                torch.autocast(leaves[0].device.type if leaves else first.device.type, enabled=False),
                first.booked(),
            ):
                made = _replay(self.module, _call(args, kwargs), self._random, nested=_nested(module, leaves))
                reason = _differs(made.outputs, list(_leaves(output)))
        except _UnreadableError as error:
            reason = str(error)
        if reason:
            for watch in watches.values():
                watch.unreadable(reason)
            return
        x = args[0] if args else kwargs.get("input")
        data = x.data if isinstance(x, PackedSequence) else x
        for key, watch in watches.items():
            found = made.maps[key]
            fed = key in ("ih", "ih_l0", "ih_l0_reverse") and not data.requires_grad
            call = watch.see(
                made.rows(found.x),
                made.rows(found.y),
                lengths=made.lengths,
                from_data=fed,
                graph=wants,
            )
            if call is not None and wants:
                made.waiting.append((watch, key, call))
        if made.waiting:
            every = list(_leaves(output))
            asked = [i for i, x in enumerate(every) if x.requires_grad]

            def take(gradients: Any) -> None:
                given = dict(zip(asked, gradients, strict=True))
                made.gradients([given.get(i) for i in range(len(every))])

            hook = guarded(take, self._fail)
            torch.autograd.graph.register_multi_grad_hook([every[i] for i in asked], hook, mode="all")


@dataclass
class _Handle:
    """What ends a watch."""

    replays: Replays
    key: str

    def remove(self) -> None:
        """End it."""
        self.replays.detach(self.key)


class _UnreadableError(Exception):
    """Why a call can't be computed once more."""


def _call(args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Return input and initial state of a call."""
    given = [*args, *[kwargs[key] for key in ("input", "hx") if key in kwargs]]
    return given[0], given[1] if len(given) > 1 else None


def _leaves(output: Any) -> Iterator[Tensor]:
    """Yield the tensors that a layer or cell puts out."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, PackedSequence):
        yield output.data
    elif isinstance(output, tuple):
        for part in output:
            yield from _leaves(part)


def _differs(mine: list[Tensor], theirs: list[Tensor]) -> str:
    """Return in words that recomputed outputs are not the layer's, or ``""``."""
    if [x.shape for x in mine] != [y.shape for y in theirs]:
        return "its outputs are not those of its type"
    for x, y in zip(mine, theirs, strict=True):
        tolerance = _ROUNDING.get(y.dtype, 0.03)
        off, size = (x.detach() - y.detach().to(x.dtype)).abs(), y.detach().abs()
        fine = off.isfinite()
        if (
            y.numel()
            and fine.any()
            and float(off[fine].max()) > tolerance * max(1.0, float(size[fine].max()))
        ):
            return (
                "its states can't be computed once more (a dropout between layers that can't be drawn again?)"
            )
    return ""


def _nested(module: nn.Module, leaves: list[Tensor]) -> bool:
    """Return whether the gradient of a cell's state holds what comes through its output.

    So it is where a kernel that is not fused computes the output from the state.
    """
    functions = [x.grad_fn for x in leaves]  # held: the id of an object that is gone says nothing
    return isinstance(module, nn.LSTMCell) and len({id(function) for function in functions}) > 1


def _replay(module: Any, call: tuple[Any, Any], random: Tensor | None, *, nested: bool = False) -> _Replay:
    """Compute a call once more.

    Raises:
        _UnreadableError: if it can't be done.
    """
    x, states = call
    names = [name for name in module._parameters if name.startswith(("weight_", "bias_"))]
    if any(is_parametrized(module, name) for name in getattr(module, "_flat_weights_names", names)):
        raise _UnreadableError("its weights are made by a parametrization")
    w = {name: _wide(local(getattr(module, name))) for name in names if getattr(module, name) is not None}
    made = _Replay()
    if isinstance(module, nn.RNNCellBase):
        single = x.ndim == 1
        h, c = _states(states, lambda s: s[None] if single else s)
        steps_TBA = _wide(x[None, None] if single else x[None])
        _, (h, c) = _layer(_mode(module), "", w, steps_TBA, h, c, [steps_TBA.shape[1]], made, nested=nested)
        made.outputs = [s[0] if single else s for s in (h, c) if s is not None]
        return made
    return _stack(module, x, states, w, made, random)


def _stack(module: Any, x: Any, states: Any, w: dict[str, Tensor], made: _Replay, random: Any) -> _Replay:
    """Compute all layers and directions of a call."""
    packed = isinstance(x, PackedSequence)
    single = not packed and x.ndim == 2
    if packed:
        alive = x.batch_sizes.tolist()
        steps_TBA = _padded(list(_wide(x.data).split(alive)), alive[0])
        lengths = torch.tensor([sum(n > b for n in alive) for b in range(alive[0])])
        made.order = x.unsorted_indices
        made.lengths = (lengths if made.order is None else lengths[made.order.cpu()]).tolist()
    else:
        x = x.unsqueeze(0 if module.batch_first else 1) if single else x
        steps_TBA = _wide(x.transpose(0, 1) if module.batch_first else x)
        alive = [steps_TBA.shape[1]] * len(steps_TBA)
    sort = x.sorted_indices if packed else None
    h_LBH, c_LBH = _states(
        states, lambda s: (s.unsqueeze(1) if single else s) if sort is None else s.index_select(1, sort)
    )
    ends: list[tuple[Tensor, Tensor | None]] = []
    generator = _Dropped(module, random)
    for layer in range(module.num_layers):
        if layer:
            steps_TBA = generator(steps_TBA, alive, batch_first=module.batch_first and not packed)
        sides = []
        for reverse in range(2 if module.bidirectional else 1):
            k = len(ends)
            suffix = f"_l{layer}" + ("_reverse" if reverse else "")
            h = None if h_LBH is None else h_LBH[k]
            c = None if c_LBH is None else c_LBH[k]
            side, end = _layer(_mode(module), suffix, w, steps_TBA, h, c, alive, made, reverse=bool(reverse))
            sides.append(side)
            ends.append(end)
        steps_TBA = torch.cat(sides, dim=-1)
    if packed:
        y = torch.cat([step[:n] for step, n in zip(steps_TBA, alive, strict=True)])
    else:
        y = steps_TBA.transpose(0, 1) if module.batch_first else steps_TBA
        y = y.squeeze(0 if module.batch_first else 1) if single else y
    last = [torch.stack(s) for s in zip(*ends, strict=True) if s[0] is not None]  # type: ignore[arg-type]
    if made.order is not None:
        last = [s.index_select(1, made.order) for s in last]
    made.outputs = [y, *(s.squeeze(1) if single else s for s in last)]
    return made


class _Dropped:
    """Draws the dropout masks between layers once more, as torch's kernel for the CPU draws them."""

    def __init__(self, module: Any, random: Tensor | None) -> None:
        self.share, self.random = float(module.dropout) if module.training else 0.0, random

    def __call__(self, steps_TBA: Tensor, alive: list[int], *, batch_first: bool) -> Tensor:
        """Return steps with some features dropped."""
        if not self.share:
            return steps_TBA
        if self.random is None:
            raise _UnreadableError("the dropout between its layers can't be drawn again on this device")
        uneven = any(n < alive[0] for n in alive)
        ones = (
            torch.cat([step[:n] for step, n in zip(steps_TBA, alive, strict=True)]) if uneven else steps_TBA
        )
        before = torch.get_rng_state()
        try:
            torch.set_rng_state(self.random)
            mask = F.dropout(torch.ones_like(ones), self.share)
            self.random = torch.get_rng_state()
        finally:
            torch.set_rng_state(before)
        return steps_TBA * (_padded(list(mask.split(alive)), alive[0]) if uneven else mask)


def _layer(
    mode: str,
    suffix: str,
    w: dict[str, Tensor],
    x_TBA: Tensor,
    h: Tensor | None,
    c: Tensor | None,
    alive: list[int],
    made: _Replay,
    *,
    reverse: bool = False,
    nested: bool = False,
) -> tuple[Tensor, tuple[Tensor, Tensor | None]]:
    """Compute one layer in one direction; return its states at all steps ``[T, B, H]`` and the last ones."""
    steps, batch = x_TBA.shape[:2]
    ih, hh, hr = (w.get(f"weight_{kind}{suffix}") for kind in ("ih", "hh", "hr"))
    if ih is None or hh is None:
        raise _UnreadableError("its weights are not its own parameters")
    width, hidden = hh.shape[1], hh.shape[0] // {"LSTM": 4, "GRU": 3}.get(mode, 1)
    x_grad = torch.is_grad_enabled()
    zeros = [x_TBA.new_zeros(steps, batch, len(hh), requires_grad=x_grad) for _ in range(2)]
    into_TBZ = F.linear(x_TBA, ih, w.get(f"bias_ih{suffix}")) + zeros[0]
    zero_TBP = None if hr is None else x_TBA.new_zeros(steps, batch, width, requires_grad=x_grad)
    h = x_TBA.new_zeros(batch, width) if h is None else h
    if mode == "LSTM" and c is None:
        c = x_TBA.new_zeros(batch, hidden)
    before, recurrent, inner, after = ([h] * steps for _ in range(4))
    for t in reversed(range(steps)) if reverse else range(steps):
        n = alive[t]
        before[t] = h[:n]
        recurrent[t] = F.linear(h[:n], hh, w.get(f"bias_hh{suffix}")) + zeros[1][t, :n]
        new, cell = _cell(mode, into_TBZ[t, :n], recurrent[t], h[:n], None if c is None else c[:n], nested)
        if hr is not None and zero_TBP is not None:
            inner[t], new = new, F.linear(new, hr) + zero_TBP[t, :n]
        after[t] = new
        h = torch.cat([new, h[n:]])
        c = None if c is None or cell is None else torch.cat([cell, c[n:]])
    made.maps[f"ih{suffix}"] = _Made(x_TBA, into_TBZ, zeros[0])
    made.maps[f"hh{suffix}"] = _Made(_padded(before, batch), _padded(recurrent, batch), zeros[1])
    states_TBH = _padded(after, batch)
    if zero_TBP is not None:
        made.maps[f"hr{suffix}"] = _Made(_padded(inner, batch), states_TBH, zero_TBP)
    return states_TBH, (h, c)


def _cell(
    mode: str, a_BZ: Tensor, b_BZ: Tensor, h: Tensor, c: Tensor | None, nested: bool
) -> tuple[Tensor, Tensor | None]:
    """Return the next states from what both maps put out."""
    if mode == "LSTM":
        i, f, g, o = (a_BZ + b_BZ).chunk(4, dim=-1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()  # type: ignore[operator]
        return o.sigmoid() * (c.detach() if nested else c).tanh(), c
    if mode == "GRU":
        (r, z, n), (r_h, z_h, n_h) = a_BZ.chunk(3, dim=-1), b_BZ.chunk(3, dim=-1)
        z = (z + z_h).sigmoid()
        n = (n + (r + r_h).sigmoid() * n_h).tanh()
        return (1 - z) * n + z * h, None
    return (a_BZ + b_BZ).relu() if mode == "RNN_RELU" else (a_BZ + b_BZ).tanh(), None


def _mode(module: Any) -> str:
    if isinstance(module, nn.RNNBase):
        return module.mode
    kinds = {nn.LSTMCell: "LSTM", nn.GRUCell: "GRU"}
    found = next((mode for kind, mode in kinds.items() if isinstance(module, kind)), None)
    return found or f"RNN_{module.nonlinearity.upper()}"


def _states(states: Any, prepare: Any) -> tuple[Tensor | None, Tensor | None]:
    """Return the initial states, detached: an LSTM has two."""
    given = states if isinstance(states, tuple) else (states, None)
    h, c = (None if s is None else _wide(prepare(s)) for s in given)
    return h, c


def _wide(x: Tensor) -> Tensor:
    """Return a detached tensor in at least float32."""
    return x.detach() if x.dtype == torch.float64 else x.detach().float()


def _padded(steps: list[Tensor], batch: int) -> Tensor:
    """Return ``[T, B, D]``, zero where a sequence has ended."""
    return torch.stack([F.pad(step, (0, 0, 0, batch - len(step))) for step in steps])
