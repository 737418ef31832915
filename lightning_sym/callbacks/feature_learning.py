"""Does the network learn features, or a kernel machine's read-out; and by which mechanism?

Shape letters: N probe samples, D inputs and O outputs of a layer.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_map
from typing_extensions import override

from lightning_sym.callbacks.base import Monitor, at_least
from lightning_sym.engine.batch import Arguments, Locator, cut, first_samples, locate, rows_of
from lightning_sym.engine.history import LAST_ROWS, Keep
from lightning_sym.engine.probe import LOST, gathered
from lightning_sym.engine.run import Run
from lightning_sym.engine.schedule import EpochEnds, LogSpaced, Schedule
from lightning_sym.functional.feature_learning import mechanism
from lightning_sym.functional.tangent import CountSketch, kernel_move, layer_alignment, tangent_kernel
from lightning_sym.observe import Observation, Reading
from lightning_sym.observe.layers import Layer, choose_layers
from lightning_sym.sandbox import Apart

VERDICTS = ("kernel", "mixed", "rich")
MECHANISMS = ("none", "alignment", "disalignment", "rescaling")
LOG_SPACED = LogSpaced(6)
_POSITIONS = 8  # of a convolution or sequence, at which its alignment is read


class FeatureLearningMonitor(Monitor):
    r"""How far the tangent kernel, the weights and their alignment have moved since the start.

    The start is where the fit began (before its first step; a resumed fit goes on with the first
    one's), and the parameters are those that were trained then. See Xu and Ziyin (2024, arXiv 2401.07085)
    for the regimes and mechanisms, and :class:`~lightning_sym.papers.feature_learning.SolvableModel` for the
    model on which they are exact.

    Logs:
        ``feature_learning/kernel_change``: :math:`\lVert K_t - K_0\rVert_F / \lVert K_0\rVert_F` of the
            empirical tangent kernel on the probe set, at least 0.
        ``feature_learning/kernel_cosine``: of K_t and K_0, in [0, 1]; 1: its shape stayed.
        ``feature_learning/kernel_growth``: :math:`\operatorname{tr}K_t / \operatorname{tr}K_0`.
        ``feature_learning/weight_change``: :math:`\lVert\theta_t-\theta_0\rVert / \lVert\theta_0\rVert` of
            all that is trained.
        ``feature_learning/<layer>/weight_change``: the same of one weight.
        ``feature_learning/<layer>/alignment``: zeta, :func:`~lightning_sym.functional.layer_alignment` of
            the layer's weight with its input on the probe set, in [0, 1].
        ``feature_learning/alignment``: its mean over the layers that aren't fed by data.
        ``feature_learning/alignment_change``: the same, less what it was at the start, over the layers
            that have one at both.
        ``feature_learning/norms``: product of the layers' Frobenius norms over that at the start, to the
            power of two over their number (as for two layers).
        ``feature_learning/verdict``: 0, kernel: ``kernel_change`` is below ``kernel_below``; 2, rich: above
            ``rich_above`` (the kernel has moved by more than itself); 1, mixed, between.
        ``feature_learning/mechanism``: 1, alignment: ``alignment`` has risen by more than ``tolerance``; 2,
            disalignment: fallen by more; 3, rescaling: it stayed, and ``norms`` differs from 1 by
            more than ``tolerance``; 0, none. (:func:`~lightning_sym.functional.feature_learning.mechanism`)
        ``feature_learning/summary`` (text): both in words, only when one of them changes.

    What is undefined is not logged: the alignment of a layer of which weight or inputs are zero (a low-rank
    adapter at its start), changes and growth from zero, anything that is not finite. Layers whose weight is
    no matrix of real numbers (quantised ones) are left out.

    All is read on a copy of the module in evaluation mode and full precision, which leaves the module as it
    is (:class:`~lightning_sym.sandbox.sandbox.Sandbox`). A reading costs a forward pass and up to
    ``most_outputs`` backward passes for every probe sample, one sample at a time. Parameters must be whole on
    every rank (one device, or DDP).

    Args:
        every_n_steps: an interval in optimizer steps, or a schedule; ``None``: 6 a decade, log-spaced; or
            :class:`~lightning_sym.engine.schedule.EpochEnds`.
        data: probe samples: a tensor ``[N, ...]``, or a tuple or dict of what ``forward`` takes, each with a
            row for each sample; ``None``: the first samples of the first batch.
        samples: at most so many of them, over all ranks.
        inputs: where the input is in a batch: an index, a key, or a function; ``None``: what ``forward``
            names, or the first entry.
        forward: the function to differentiate: a method of the module, or a function of (module, inputs).
            It returns a floating-point tensor, of each sample whatever the others are.
        layers: a glob, or a list of globs, on module names; ``None``: all, at most ``max_layers``.
        max_layers: how many layers to watch when ``layers`` is ``None``.
        most_outputs: more outputs than that are read in so many random directions.
        sketch: gradients of more parameters are sketched to so many numbers, with a relative error of
            the kernel of about ``sqrt(2 / sketch)`` at most, the same at all steps; ``None``: exact.
        by_rate: weigh parameters by their learning rate at the start, relative to the largest.
        kernel_below, rich_above: see ``verdict``.
        tolerance: see ``mechanism``.
        seed: of the sketches, and of what ``forward`` draws: the same at each reading.
        keep: rows of :attr:`history` that a checkpoint holds, or a folder for it
            (:class:`~lightning_sym.callbacks.base.Monitor`).
        name: first part of its keys instead of ``feature_learning``.
        strict: raise what goes wrong in here instead of warning once and going on.

    Raises:
        ValueError: if an argument is out of its range; at fit start, if a glob matches no layer, parameters
            are sharded, or it should read before there is a start to compare with.
        TypeError: at fit start, if the module has no such method.
    """

    quantity: ClassVar[str] = "feature_learning"
    takes_inputs = True
    runs_module = True

    def __init__(
        self,
        *,
        every_n_steps: int | Schedule | EpochEnds | None = None,
        data: Any = None,
        samples: int = 32,
        inputs: Locator = None,
        forward: str | Callable[..., Tensor] = "forward",
        layers: str | list[str] | None = None,
        max_layers: int = 12,
        most_outputs: int | None = 16,
        sketch: int | None = 8192,
        by_rate: bool = False,
        kernel_below: float = 0.1,
        rich_above: float = 1.0,
        tolerance: float = 0.1,
        seed: int = 0,
        keep: Keep = LAST_ROWS,
        name: str | None = None,
        strict: bool = False,
    ) -> None:
        super().__init__(
            every_n_steps=LOG_SPACED if every_n_steps is None else every_n_steps,
            layers=layers,
            max_layers=max_layers,
            keep=keep,
            name=name,
            strict=strict,
        )
        at_least("samples", samples, 1)
        at_least("most_outputs", most_outputs, 1)
        at_least("sketch", sketch, 1)
        if not 0 < kernel_below <= rich_above:
            raise ValueError(
                f"kernel_below must be positive and at most rich_above, got {kernel_below} and {rich_above}"
            )
        if not 0 < tolerance < 1:
            raise ValueError(f"tolerance must be in (0, 1), got {tolerance}")
        if isinstance(data, Tensor) and len(data) < 1:
            raise ValueError("data must hold a sample, got none")
        self.data, self.samples, self.inputs, self.forward = data, samples, inputs, forward
        self.most_outputs, self.sketch, self.by_rate = most_outputs, sketch, by_rate
        self.kernel_below, self.rich_above, self.tolerance = kernel_below, rich_above, tolerance
        self.seed = seed

    @property
    def verdict(self) -> str:
        """``"kernel"``, ``"mixed"`` or ``"rich"``, at the last reading; ``""`` before."""
        return str(self.state.get("verdict", ""))

    @property
    def mechanism(self) -> str:
        """``"alignment"``, ``"disalignment"``, ``"rescaling"`` or ``"none"``, likewise."""
        return str(self.state.get("mechanism", ""))

    @override
    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "by_rate": self.by_rate, "seed": self.seed}

    @override
    def check(self, run: Run) -> None:
        super().check(run)
        run.function(self.forward)
        choose_layers(run.module, self.layers, max_layers=self.max_layers)
        if getattr(self.schedule, "at_start", False):
            raise ValueError(
                f"every_n_steps={self.schedule!r} reads before there is a start to compare with; "
                "pass at_start=False"
            )

    @override
    def start(self, seen: Observation) -> None:
        run = seen.run
        if "start" in seen.state:  # a resumed run goes on with the first one's
            return self._take_up(seen)
        if unset := [name for name, p in run.module.named_parameters() if is_lazy(p)]:
            raise ValueError(
                f"{unset[0]} has no values yet, so there is no start to compare with; run a batch through "
                "the module before the fit"
            )
        probe, rates = self._probe(run), self._rates(run)
        trained = [name for name, p in run.module.named_parameters() if p.requires_grad]
        measured = run.ranks.attempt(lambda: self._measured(run, probe, trained, rates))
        seen.state["samples"] = self.held.take(probe, run)
        seen.state["start"] = {"trained": trained, "rates": rates, **measured}

    def _take_up(self, seen: Observation) -> None:
        run = seen.run
        if self.held.again(run, seen.state.get("samples"), taken=self._probe(run)) is None:
            run.tell(
                f"{type(self).__name__} goes on without the kernel and alignments, which were those of other "
                f"samples: {LOST}."
            )

    def _probe(self, run: Run) -> dict[str, Any]:
        """Return what ``forward`` takes of the probe samples, the same on all ranks."""
        function = run.function(self.forward)
        if self.data is None:
            found = gathered(run, locate(run.batch, self.inputs, function), self.samples)
        else:
            found = locate(self.data, lambda data: data, function)
            if not rows_of((found.args, found.kwargs)):
                raise TypeError("data must be made of tensors with a row for each sample")
            found = first_samples(found, self.samples)
            found = Arguments(*tree_map(_kept, (found.args, found.kwargs)))
        return {"args": list(found.args), "kwargs": dict(found.kwargs)}

    @override
    def read(self, seen: Observation) -> Iterator[Reading]:
        if "start" not in seen.state:  # taking it failed, and a warning has said so
            return
        start = seen.state["start"]
        now = self._measured(seen.run, self.held.samples, start["trained"], start["rates"])
        ratio = _ratio(start["norms"], now["norms"])
        before, after = _both(start["alignment"], now["alignment"])
        values = dict.fromkeys(("kernel_change", "kernel_cosine", "kernel_growth"), math.nan)
        if "kernel" in now:
            move = kernel_move(start["kernel"], now["kernel"])
            values = {f"kernel_{what}": float(getattr(move, what)) for what in ("change", "cosine", "growth")}
        values |= {
            "weight_change": _change(start["theta"], now["theta"]),
            "norms": ratio,
            "alignment": _mean(_inner(now["alignment"]).values()),
            "alignment_change": after - before,
        }
        for name, weight in now["weights"].items():
            if name in start["weights"]:
                values[f"{name}/weight_change"] = _change(start["weights"][name], weight)
        values |= {f"{name}/alignment": value for name, value in now["alignment"].items()}
        for key, value in values.items():
            layer, _, what = key.rpartition("/")
            if math.isfinite(value):
                yield Reading(layer, what, value)
        yield from self._judge(seen, values["kernel_change"], (before, after), ratio)

    def _judge(
        self, seen: Observation, change: float, alignment: tuple[float, float], ratio: float
    ) -> Iterator[Reading]:
        """Put the verdict and the mechanism into numbers and words; nothing where numbers are not finite."""
        said = words = (self.verdict, self.mechanism)
        zeta, zeta_after = alignment
        if math.isfinite(change):
            words = (VERDICTS[(change >= self.kernel_below) + (change > self.rich_above)], words[1])
        judged = math.isfinite(zeta) and math.isfinite(zeta_after) and 0 < ratio < math.inf
        if judged:
            found = mechanism(zeta, alignment_after=zeta_after, norm_ratio=ratio, tolerance=self.tolerance)
            words = (words[0], found)
        # Buffers differ between ranks: numbers logged are the first rank's, and so are the words.
        words = seen.run.ranks.broadcast(words)
        seen.state["verdict"], seen.state["mechanism"] = words
        if math.isfinite(change):
            yield Reading("", "verdict", float(VERDICTS.index(words[0])))
        if judged:
            yield Reading("", "mechanism", float(MECHANISMS.index(words[1])))
        if said != words:
            known = (
                [f"regime: {words[0]} (the kernel has moved by {change:.3g} of itself)"] if words[0] else []
            )
            if words[1]:
                known.append(
                    f"mechanism: {words[1]} (alignment {zeta:.3g} -> {zeta_after:.3g}, norms x {ratio:.3g})"
                )
            yield Reading("", "summary", "; ".join(known))

    def _rates(self, run: Run) -> list[float] | None:
        """Return the learning rate of each trained parameter, over the largest of them."""
        if not self.by_rate:
            return None
        groups = [group for optimizer in run.optimizers for group in optimizer.param_groups]
        rate = {id(p): float(group["lr"]) for group in groups for p in group["params"]}
        rates = [rate.get(id(p), 0.0) for p in run.module.parameters() if p.requires_grad]
        largest = max(rates, default=0.0)
        return [value / largest for value in rates] if largest > 0 else rates

    def _measured(
        self, run: Run, samples: Mapping[str, Any] | None, trained: list[str], rates: list[float] | None
    ) -> dict[str, Any]:
        """Return what is compared: sketched weights, norms, and on samples the kernel and alignments."""
        with run.sandbox.open(grad=True, full_precision=True, seed=self.seed) as apart:
            parameters = _named(apart.module, trained)
            layers, _ = choose_layers(apart.module, self.layers, max_layers=self.max_layers)
            blocks = _weights([layer for layer in layers if layer.by_call and layer.has_input])
            weights = {layer.name: weight.double() for layer, weight in blocks.items()}
            found: dict[str, Any] = {"alignment": {}}
            if samples is not None:
                probe = apart.place((tuple(samples["args"]), samples["kwargs"]))
                found["kernel"] = self._kernel(apart, probe, parameters, rates).cpu()
                found["alignment"] = self._alignments(apart, probe, blocks)
            with torch.no_grad():
                flat = torch.cat([p.detach().double().flatten() for p in parameters])
            return {
                **found,
                "theta": self._sketched(flat),
                "weights": {name: self._sketched(weight.flatten()) for name, weight in weights.items()},
                "norms": {name: float(weight.norm()) for name, weight in weights.items()},
            }

    def _kernel(self, apart: Apart, probe: Any, trained: list[Tensor], rates: list[float] | None) -> Tensor:
        def of_one(n_1: Tensor) -> Tensor:
            args, kwargs = cut(probe, slice(int(n_1), int(n_1) + 1))
            return apart(self.forward, *args, **kwargs)  # type: ignore[no-any-return]

        return tangent_kernel(
            of_one,
            trained,
            torch.arange(rows_of(probe)),
            rates=rates,
            most_outputs=self.most_outputs,
            sketch=self.sketch,
            seed=self.seed,
        )

    def _sketched(self, vector: Tensor) -> Tensor:
        sketch = CountSketch(len(vector), size=self.sketch, seed=self.seed, device=vector.device)
        return sketch(vector[None])[0].cpu()

    def _alignments(
        self, apart: Apart, probe: tuple[tuple[Any, ...], dict[str, Any]], weights: dict[Layer, Tensor]
    ) -> dict[str, float]:
        """Return the alignment of each layer of the copy, in the order in which they are called."""
        found: dict[str, float] = {}

        def hook(layer: Layer, blocks: Tensor) -> Callable[..., None]:
            def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
                x = layer.input_of(args, kwargs)
                h_ND = layer.input_rows(x.detach(), _POSITIONS)
                if h_ND.shape[1] != len(blocks) * blocks.shape[2]:
                    return  # its weight is used in another way
                parts = zip(h_ND.chunk(len(blocks), dim=1), blocks, strict=True)
                found[layer.name] = _mean([float(layer_alignment(h, weight)) for h, weight in parts])

            return see

        with contextlib.ExitStack() as stack, torch.no_grad():
            for layer, blocks in weights.items():
                handle = layer.module.register_forward_hook(hook(layer, blocks), with_kwargs=True)
                stack.callback(handle.remove)
            apart(self.forward, *probe[0], **probe[1])
        return found


def _named(copy: nn.Module, names: Iterable[str]) -> list[Tensor]:
    """Return a copy's parameters by name; they get gradients, also where they are frozen by now."""
    parameters = dict(copy.named_parameters())
    if gone := [name for name in names if name not in parameters]:
        raise ValueError(f"the module has no parameter {gone[0]} any more, which was trained at the start")
    return [parameters[name].requires_grad_() for name in names]


def _kept(leaf: Any) -> Any:
    return leaf.detach().cpu().clone() if isinstance(leaf, Tensor) else leaf


def _weights(layers: Iterable[Layer]) -> dict[Layer, Tensor]:
    """Return the weights ``[G, O / G, A / G]`` that can be read."""
    found = {}
    for layer in layers:
        with contextlib.suppress(ValueError):  # no matrix of real numbers
            found[layer] = layer.blocks()
    return found


def _inner(alignments: Mapping[str, float]) -> dict[str, float]:
    """Return the known alignments of all layers but the first that was called, unless it is the only one."""
    names = list(alignments)
    return {name: alignments[name] for name in names[1:] or names if math.isfinite(alignments[name])}


def _both(before: Mapping[str, float], after: Mapping[str, float]) -> tuple[float, float]:
    """Return the mean alignments of the inner layers that have one both times."""
    first, second = _inner(before), _inner(after)
    shared = [name for name in second if name in first]
    return _mean([first[name] for name in shared]), _mean([second[name] for name in shared])


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values) if values else math.nan


def _ratio(before: Mapping[str, float], after: Mapping[str, float]) -> float:
    """Return the product of norms, later over before, to the power of two over their number."""
    pairs = [(before[name], norm) for name, norm in after.items() if name in before]
    if not pairs or not min(min(pair) for pair in pairs) > 0:
        return math.nan
    logs = [math.log(b / a) for a, b in pairs]
    return math.exp(2 * sum(logs) / len(logs)) if len(logs) > 1 else math.exp(logs[0])


def _change(before: Tensor, after: Tensor) -> float:
    norm = before.norm()
    return float((after - before).norm() / norm) if norm > 0 else math.nan
