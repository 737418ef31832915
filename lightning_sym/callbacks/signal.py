"""Does signal pass through the network, forward and back, and does training move it?"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_sym.callbacks.base import Monitor
from lightning_sym.engine.run import Run
from lightning_sym.observe import GradientSize, Observation, Reading, SecondMoments
from lightning_sym.observe.functions import FunctionWatch, variances
from lightning_sym.observe.layers import Layer, choose_layers
from lightning_sym.observe.observation import LayerObservation
from lightning_sym.observe.parameters import fingerprint, gradient_norm, kept_entries, parameter_groups
from lightning_sym.observe.weights import LARGEST_GRAM

_INPUTS, _OUTPUTS, _GRADIENT = SecondMoments("inputs"), SecondMoments("outputs"), GradientSize()
#: A layer of fewer outputs has too few directions to lose.
NARROW = 8
Sums = dict[tuple[str, str], Tensor]


class SignalMonitor(Monitor):
    """What passes forward and back, what moves, and the loss: what findings are made from.

    Logs:
        ``signal/loss``: the step's loss, the mean over batches and ranks, where it is known.
        ``signal/off``: share of the layers that ran whose weights don't ask for gradients, in [0, 1]; only
            where they are known.
        ``signal/off_runs``: how many stretches of such layers there are, one after another in the order in
            which layers run; only where they are known.
    for every watched layer:
        ``signal/<layer>/input_share``, ``signal/<layer>/output_share``: share of the mean square that is
            variance over samples and positions, in [0, 1]; 0: the same for every sample.
        ``signal/<layer>/input_directions``, ``signal/<layer>/directions``: participation ratio of inputs and
            outputs, from two halves of the samples, at least about 1; only where there are 8 of them or more.
        ``signal/<layer>/gradient``: root mean square of output gradients, of per-sample losses.
        ``signal/<layer>/weight_gradient``: norm of the weight's gradient as the optimizer used it.
        ``signal/<layer>/trained``: 1 if the weight asks for gradients, else 0.
        ``signal/<layer>/moved``: 1 if a bit of the weight changed in the step or since the last reading, else
            0; of layers that are not watched, only a 0 of one that ran.
        ``signal/<layer>/left_out``: 1, only where a weight asks for gradients and is in no optimizer.
        ``signal/<layer>/distance``: norm of the change since the run's start over the norm then, of (some of)
            the weight's entries, at least 0.
    of what follows a layer, watched or not:
        ``signal/<layer>/saturated``: share of tanh, sigmoid and gate values within 0.01 of an end, in [0, 1];
            only where there are such values.
        ``signal/<layer>/dead``: share of the units of a ReLU that were 0 on every sample and position looked
            at, in [0, 1]; only where there is a ReLU.
        ``signal/<layer>/added``: the smaller over the larger of two summands' deviations over samples, in
            [0, 1], near 0 where a block adds nothing; only where two tensors of one shape are added.
        ``signal/<layer>/reach``: gradient of the last output by the first input over that by the last, at
            least 0; only where the module is recurrent. Of a layer that is called eight times or more in a
            row, as in a loop over positions: gradient of its first output over that of its last.
        ``signal/<layer>/early``: 1 if outputs of the first half of the positions are used by themselves, else
            0; only where the module is recurrent.
        ``signal/<layer>/attention_least``, ``signal/<layer>/attention_most``: entropy of attention over that
            of looking at all alike, in [0, 1]: of the sharpest and of the flattest head; only where there is
            attention.
        ``signal/<layer>/attention_varies``: share of the attention weights' square that differs between
            samples; only where there is attention.
        ``signal/<layer>/code``: largest variance over samples of what noise is added to, as to a VAE's code;
            only where noise is added.
        ``signal/<layer>/cover``: of 64 samples of data, how many are the nearest one of some sample that a
            generator made, over how many are that of another sample of data; above 0, near 1 where it makes
            what is like data; only where a layer gets both.
        ``signal/<layer>/spread``: deviation of what a generator made over that of data; only where a layer
            gets both.
    of the step after a reading:
        ``signal/turn``: cosine of two successive gradients, in [-1, 1]; only when training is plain
            full-batch SGD without momentum.
        ``signal/sharpness``: learning rate times curvature along the gradient; 2: the edge of stability; only
            when ``turn`` is read.

    Args:
        every_n_steps: an interval in optimizer steps, or a schedule. Step 1 is always due.
        layers: a glob, or a list of globs, on module names; ``None``: all, at most ``max_layers``.
        max_layers: how many layers to watch when ``layers`` is ``None``.
        name: first part of its keys instead of ``signal``.
        strict: raise what goes wrong in here instead of warning once and going on.

    Raises:
        ValueError: if an argument is out of its range.
    """

    quantity: ClassVar[str] = "signal"
    needs = (_INPUTS, _OUTPUTS, _GRADIENT)

    @override
    def begin_run(self) -> None:
        super().begin_run()
        self.end_run()

    @override
    def end_run(self) -> None:
        self._look: FunctionWatch | None = None
        self._before: dict[str, int] = {}
        self._gradients: dict[str, float] = {}
        for handle in getattr(self, "_handles", ()):
            handle.remove()
        self._handles: list[Any] = []

    @override
    def choose(self, module: nn.Module) -> list[Layer]:
        """Return the layers to watch, frozen ones among them: whether they are meant to be is a question."""
        return choose_layers(module, self.layers, max_layers=self.max_layers, frozen=True)[0]

    # -- around the step ----------------------------------------------------------------------

    @override
    def start(self, seen: Observation) -> None:
        if "start" not in seen.state:
            seen.state["start"] = {
                layer.name: kept_entries(layer) for layer in self.choose(seen.run.module) if layer.sources()
            }
        if _is_plain(seen.run):
            # Once a fit: a hook that is put on while an optimizer steps would disturb those that run.
            self._handles = [seen.run.optimizers[0].register_step_post_hook(partial(self._compare, seen.run))]

    @override
    def prepare(self, seen: Observation) -> None:
        module = seen.run.module
        if not _takes_shortcuts(module):
            self._look = seen.look = FunctionWatch(module)
        self._gradients = {}
        self._before = {name: fingerprint(parts) for name, parts in parameter_groups(module).items()}

    @override
    def optimizer_stepped(self, run: Run, optimizer: Any) -> None:
        owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for name, parts in parameter_groups(run.module).items():
            norm = gradient_norm([p for p in parts if id(p) in owned])
            if norm is not None:
                self._gradients[name] = norm
        if _is_plain(run):
            self._compare(run, optimizer)  # the step before was due, too
            kept = [None if p.grad is None else p.grad.detach().clone() for p in _owned(optimizer)]
            self.state["gradient"], self.state["gradient_at"] = kept, run.step
            self.state["gradient_of"] = _batch_print(run.batch)

    def _compare(self, run: Run, optimizer: Any, *_: Any) -> None:
        """Compare the gradient of the step after a due one with that of the due one."""
        if self.state.get("gradient_at", run.step) == run.step:
            return
        before = self.state.pop("gradient")
        del self.state["gradient_at"]
        of = self.state.pop("gradient_of")
        if of is None or of != _batch_print(run.batch):
            return  # two minibatches that pull in turn look the same, and are not
        found = _turn(before, [p.grad for p in _owned(optimizer)])
        if found is not None:
            self.state["turn"] = found

    # -- reading ------------------------------------------------------------------------------

    @override
    def read(self, seen: Observation) -> Iterator[Reading]:
        run = seen.run
        known = run.ranks.total(torch.tensor(float(len(run.losses)), dtype=torch.float64))
        loss = run.loss()
        if float(known):
            yield Reading("", "loss", loss)
        turn = seen.state.pop("turn", None)
        if turn is not None:
            yield Reading("", "turn", turn[0])
            yield Reading("", "sharpness", turn[1])
        look, self._look = self._look, None
        error = look.error if look is not None else None
        sums = run.ranks.attempt(lambda: _checked(look, error))
        sums = _added(run.ranks.gather(sums))
        order = {} if look is None else dict(zip(look.ran, range(len(look.ran)), strict=True))
        watched = {layer.name: layer for layer in seen.every}
        movements = self._movements(seen, watched, order)
        # As they ran: the first layer and the last mean something.
        for name in sorted({**watched, **movements}, key=lambda name: order.get(name, -1)):
            if name in watched:
                seen.current = name
                for what, value in _of_layer(watched[name]):
                    yield Reading(name, what, value)
            for what, value in movements.get(name, {}).items():
                yield Reading(name, what, value)
        if order:
            off = [name in movements and not movements[name]["trained"] for name in order]
            yield Reading("", "off", sum(off) / len(off))
            yield Reading(
                "", "off_runs", float(sum(b and not a for a, b in itertools.pairwise([False, *off])))
            )
        for (layer_name, what), values in sums.items():
            if what in _READ and not (what == "made" and (layer_name, "data") not in sums):
                other = sums.get((layer_name, "data"))
                for key, value in _READ[what](values, other):
                    if math.isfinite(value):
                        yield Reading(layer_name, key, value)

    def _movements(
        self, seen: Observation, watched: dict[str, LayerObservation], ran: Mapping[str, int]
    ) -> dict[str, dict[str, float]]:
        """Return whether training moves layers: those that are watched, and those that ran and stayed."""
        owned = {id(p) for optimizer in seen.run.optimizers for p in _owned(optimizer)}
        found: dict[str, dict[str, float]] = {}
        last: dict[str, int] = seen.state.setdefault("bits", {})
        for name, parts in parameter_groups(seen.run.module).items():
            bits, before = fingerprint(parts), self._before.get(name)
            # Two optimizers may step in turn: that a layer rested in this step alone means nothing.
            moved = bits != before or bits != last.get(name, bits)
            last[name] = bits
            trained = any(p.requires_grad for p in parts)
            if name not in watched and (moved or name not in ran):
                continue
            values = found[name] = {"trained": float(trained), "moved": float(moved)}
            if trained and not any(id(p) in owned for p in parts):
                values["left_out"] = 1.0
            if name in watched:
                if name in self._gradients:
                    values["weight_gradient"] = self._gradients[name]
                start = seen.state.get("start", {}).get(name)
                now = kept_entries(watched[name].layer)
                if start is not None and start.shape == now.shape and float(start.norm()) > 0:
                    values["distance"] = float((now - start).norm() / start.norm())
        self._before = {}
        return found


def _of_layer(layer: LayerObservation) -> Iterator[tuple[str, float]]:
    wide = layer.layer.out_features >= NARROW
    for side, statistic, directions in (
        ("input", _INPUTS, "input_directions"),
        ("output", _OUTPUTS, "directions"),
    ):
        found = layer.get(statistic)
        if found is None or found.n < 2:
            continue
        if math.isfinite(found.variance_share):
            yield f"{side}_share", min(max(found.variance_share, 0.0), 1.0)
        enough = side == "output" or layer.layer.in_features >= NARROW
        readable = wide and enough and len(found.mean) <= LARGEST_GRAM
        if readable and math.isfinite(found.participation_ratio):
            yield directions, found.participation_ratio
    gradient = layer.get(_GRADIENT)
    if gradient is not None:
        yield "gradient", gradient


def _checked(look: FunctionWatch | None, error: Exception | None) -> Sums:
    if error is not None:
        raise error
    if look is not None:
        look.finish()
    return {} if look is None else {key: values.cpu() for key, values in look.sums.items()}


def _added(parts: list[Sums]) -> Sums:
    """Return sums over ranks, of what every rank saw alike."""
    found: Sums = dict(parts[0])
    for other in parts[1:]:
        found = {k: v + other[k] for k, v in found.items() if k in other and other[k].shape == v.shape}
    return found


def _saturated(sums: Tensor, other: Tensor | None) -> Iterator[tuple[str, float]]:
    yield "saturated", float(sums[0] / sums[1])


def _dead(sums: Tensor, other: Tensor | None) -> Iterator[tuple[str, float]]:
    yield "dead", float((sums == 0).double().mean())


def _chosen(sums: Tensor, other: Tensor | None) -> Iterator[tuple[str, float]]:
    yield "cover", float(sums[0] / sums[1])


def _block(sums: Tensor, other: Tensor | None) -> Iterator[tuple[str, float]]:
    low, high = variances(sums).sum(-1).sqrt().sort().values.tolist()
    if high > 0:
        yield "added", low / high


def _reach(sums: Tensor, other: Tensor | None) -> Iterator[tuple[str, float]]:
    if sums[1] > 0:
        yield "reach", float((sums[0] / sums[1]).sqrt())


def _early(sums: Tensor, other: Tensor | None) -> Iterator[tuple[str, float]]:
    yield "early", float(sums[0] > 0)


def _attention(sums: Tensor, other: Tensor | None) -> Iterator[tuple[str, float]]:
    shares_H = sums[1:] / sums[0]
    yield "attention_least", float(shares_H.min())
    yield "attention_most", float(shares_H.max())


def _looks(sums: Tensor, other: Tensor | None) -> Iterator[tuple[str, float]]:
    square = float((sums[2] / sums[0]).sum())
    if square > 0:
        yield "attention_varies", float(variances(sums).sum()) / square


def _code(sums: Tensor, other: Tensor | None) -> Iterator[tuple[str, float]]:
    yield "code", float(variances(sums).max())


def _spread(sums: Tensor, other: Tensor | None) -> Iterator[tuple[str, float]]:
    if other is not None and other.shape == sums.shape:
        data = float(variances(other).sum())
        if data > 0:
            yield "spread", math.sqrt(float(variances(sums).sum()) / data)


_READ = {
    "dead": _dead,
    "early": _early,
    "chosen": _chosen,
    "saturated": _saturated,
    "block": _block,
    "reach": _reach,
    "attention": _attention,
    "looks": _looks,
    "code": _code,
    "made": _spread,
}


def _takes_shortcuts(module: nn.Module) -> bool:
    """Return whether a part takes a faster way, and rounds otherwise, where nobody sees its functions."""
    fast = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerEncoder)
    return any(isinstance(child, fast) and not child.training for child in module.modules())


def _owned(optimizer: Any) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _is_plain(run: Run) -> bool:
    """Return whether each step is a step along the gradient itself."""
    if len(run.optimizers) != 1 or type(run.optimizers[0]) is not torch.optim.SGD:
        return False
    groups = run.optimizers[0].param_groups
    return all(group["momentum"] == 0 and not group["maximize"] for group in groups)


def _batch_print(batch: Any) -> int | None:
    """Return a sum of the bits of a batch's tensors, whatever the order of samples; None without tensors."""
    if isinstance(batch, Tensor):
        return int(batch.double().view(torch.int64).sum())
    parts = batch.values() if isinstance(batch, dict) else batch if isinstance(batch, list | tuple) else ()
    found = [each for each in map(_batch_print, parts) if each is not None]
    return sum(found) if found else None


def _turn(before: list[Tensor | None], after: list[Tensor | None]) -> tuple[float, float] | None:
    """Return the cosine of two successive gradients, and learning rate times curvature along the first.

    A step ``-lr g`` changes the gradient by ``-lr H g``: ``lr g^T H g / |g|^2 = 1 - g . g' / |g|^2``.
    """
    pairs = [(a, b) for a, b in zip(before, after, strict=False) if a is not None and b is not None]
    if not pairs or any(a.shape != b.shape for a, b in pairs):
        return None
    sums = torch.stack(
        [torch.stack([(a * b).sum(), (a * a).sum(), (b * b).sum()]).double() for a, b in pairs]
    ).sum(0)
    product, first, second = sums.tolist()
    if not math.isfinite(product) or first <= 0 or second <= 0:
        return None
    return product / math.sqrt(first * second), 1 - product / first
