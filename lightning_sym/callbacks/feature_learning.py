"""Does the network learn features, or a kernel machine's read-out; and by which mechanism?

Shape letters: N probe samples, D inputs and O outputs of a layer.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from typing_extensions import override

from lightning_sym.callbacks._quiet import gather_rows, method
from lightning_sym.callbacks.base import Probe, undisturbed
from lightning_sym.callbacks.trainability import Locator, locate
from lightning_sym.functional.feature_learning import mechanism
from lightning_sym.functional.tangent import CountSketch, kernel_move, layer_alignment, tangent_kernel
from lightning_sym.observe.layers import Layer, choose_layers
from lightning_sym.observe.reading import Reading
from lightning_sym.observe.schedule import LogSpaced, Schedule

VERDICTS = ("kernel", "mixed", "rich")
MECHANISMS = ("none", "alignment", "disalignment", "rescaling")
LOG_SPACED = LogSpaced(6)
_POSITIONS = 8  # of a convolution or sequence, at which its alignment is read


class FeatureLearningMonitor(Probe):
    r"""How far the tangent kernel, the weights and their alignment have moved since the start.

    The start is where the fit began (before its first step; a resumed fit goes on with the first
    one's). See Xu and Ziyin (2024, arXiv 2401.07085) for the regimes and mechanisms, and
    :class:`~lightning_sym.theory.SolvableModel` for the model on which they are exact.

    Logs:
        ``feature_learning/kernel_change``: :math:`\lVert K_t - K_0\rVert_F / \lVert K_0\rVert_F` of the
            empirical tangent kernel on the probe set, at least 0.
        ``feature_learning/kernel_cosine``: of K_t and K_0, in [0, 1]; 1: its shape stayed.
        ``feature_learning/kernel_growth``: :math:`\operatorname{tr}K_t / \operatorname{tr}K_0`.
        ``feature_learning/weight_change``: :math:`\lVert\theta_t-\theta_0\rVert / \lVert\theta_0\rVert` of
            all that is trained; ``feature_learning/<layer>/weight_change``: of one weight.
        ``feature_learning/<layer>/alignment``: zeta, :func:`~lightning_sym.functional.layer_alignment` of
            the layer's weight with its input on the probe set, in [0, 1].
        ``feature_learning/alignment``: its mean over the layers that aren't fed by data.
        ``feature_learning/alignment_change``: the same, less what it was at the start.
        ``feature_learning/norms``: product of the layers' Frobenius norms over that at the start, to the
            power of two over their number (as for two layers).
        ``feature_learning/verdict``: 0, kernel: ``kernel_change`` is below ``kernel_below``; 2, rich: above
            ``rich_above`` (the kernel has moved by more than itself); 1, mixed, between.
        ``feature_learning/mechanism``: 1, alignment: ``alignment`` has risen by more than ``tolerance``; 2,
            disalignment: fallen by more; 3, rescaling: it stayed, and ``norms`` differs from 1 by
            more than ``tolerance``; 0, none. (:func:`~lightning_sym.theory.mechanism`)
        ``feature_learning/summary``: both in words, when one of them changes.

    A reading costs a forward pass and up to ``most_outputs`` backward passes for every probe sample, one
    sample at a time. Parameters must be whole on every rank (one device, or DDP).

    Args:
        every_n_steps: an interval in optimizer steps, or a schedule; ``None``: 6 a decade, log-spaced.
        data: probe samples ``[N, ...]``; ``None``: the first samples of the first batch.
        samples: at most so many of them, over all ranks.
        inputs: where the input is in a batch.
        forward: the function to differentiate: a method of the module, or a function of (module, inputs).
        layers: a glob, or a list of globs, on module names; ``None``: all, at most ``max_layers``.
        max_layers: how many layers to watch when ``layers`` is ``None``.
        most_outputs: more outputs than that are read in so many random directions.
        sketch: gradients of more parameters are sketched to so many numbers, with a relative error of
            the kernel of about ``sqrt(2 / sketch)`` at most, the same at all steps; ``None``: exact.
        by_rate: weigh parameters by their learning rate at the start, relative to the largest.
        kernel_below, rich_above: see ``verdict``.
        tolerance: see ``mechanism``.
        seed: of the sketches.
        strict: raise what goes wrong in here instead of warning once and going on.

    Attributes:
        verdict: "kernel", "mixed" or "rich", at the last reading; "" before.
        mechanism: "alignment", "disalignment", "rescaling" or "none", likewise.

    Raises:
        ValueError: if an argument is out of its range; at fit start, if a glob matches no layer.
        TypeError: at fit start, if the module has no such method.
    """

    quantity: ClassVar[str] = "feature_learning"

    def __init__(
        self,
        *,
        every_n_steps: int | Schedule | None = None,
        data: Tensor | None = None,
        samples: int = 32,
        inputs: Locator = 0,
        forward: str | Callable[[LightningModule, Tensor], Tensor] = "forward",
        layers: str | list[str] | None = None,
        max_layers: int = 12,
        most_outputs: int | None = 16,
        sketch: int | None = 8192,
        by_rate: bool = False,
        kernel_below: float = 0.1,
        rich_above: float = 1.0,
        tolerance: float = 0.1,
        seed: int = 0,
        strict: bool = False,
    ) -> None:
        due = LOG_SPACED if every_n_steps is None else every_n_steps
        super().__init__(every_n_steps=due, strict=strict)
        counts = {
            "samples": samples,
            "max_layers": max_layers,
            "most_outputs": most_outputs,
            "sketch": sketch,
        }
        for name, value in counts.items():
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not 0 < kernel_below <= rich_above:
            raise ValueError(
                f"kernel_below must be positive and at most rich_above, got {kernel_below} and {rich_above}"
            )
        if not 0 < tolerance < 1:
            raise ValueError(f"tolerance must be in (0, 1), got {tolerance}")
        if data is not None and len(data) < 1:
            raise ValueError("data must hold a sample, got none")
        self.data, self.samples, self.inputs, self.forward = data, samples, inputs, forward
        self.layers, self.max_layers = layers, max_layers
        self.most_outputs, self.sketch, self.by_rate = most_outputs, sketch, by_rate
        self.kernel_below, self.rich_above, self.tolerance = kernel_below, rich_above, tolerance
        self.seed = seed
        self.verdict, self.mechanism = "", ""
        self._start: dict[str, Any] | None = None
        self._watched: list[Layer] = []
        self._function: Callable[[Tensor], Any] = torch.nn.Identity()

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(
            every_n_steps=repr(self.schedule), layers=self.layers, by_rate=self.by_rate, seed=self.seed
        )

    @override
    def state_dict(self) -> dict[str, Any]:
        words = {"verdict": self.verdict, "mechanism": self.mechanism}
        return {**super().state_dict(), **words, "start": self._start}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.verdict, self.mechanism = state_dict["verdict"], state_dict["mechanism"]
        self._start = state_dict["start"]

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self._function = method(pl_module, self.forward, argument="forward")
            chosen, _ = choose_layers(pl_module, self.layers, max_layers=self.max_layers)
            self._watched = [layer for layer in chosen if layer.part is None and layer.has_input]

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step < self._last or trainer.global_step == 0:  # a new run: it has its own start
            self._start, self.verdict, self.mechanism = None, "", ""
        super().on_train_start(trainer, pl_module)

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if self._start is None:
            self._start = {}
            with self.guard(trainer, "the start"), undisturbed(pl_module):
                x = locate(batch, self.inputs) if self.data is None else self.data
                if not isinstance(x, Tensor):
                    raise TypeError(
                        f"inputs must find a tensor in a batch, got {type(x).__name__}; pass data"
                    )
                x = x.detach()[: self.samples]
                x = gather_rows(x)[: self.samples] if self.data is None else x
                start = {"x": x.cpu().clone(), "rates": self._rates(trainer, pl_module)}
                self._start = start | self._state(trainer, pl_module, start)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        self._watched, self._function = [], torch.nn.Identity()

    @override
    def measure(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> Iterable[Reading]:
        if not self._start:
            raise RuntimeError("there is no start to compare with: its reading failed")
        start, now = self._start, self._state(trainer, pl_module, self._start)
        move = kernel_move(start["kernel"], now["kernel"])
        ratio = _ratio(start["norms"], now["norms"])
        readings = [
            Reading("feature_learning/kernel_change", move.change),
            Reading("feature_learning/kernel_cosine", move.cosine),
            Reading("feature_learning/kernel_growth", move.growth),
            Reading("feature_learning/weight_change", _change(start["theta"], now["theta"])),
            Reading("feature_learning/norms", ratio),
            Reading("feature_learning/alignment", _inner(now["alignment"])),
            Reading(
                "feature_learning/alignment_change", _inner(now["alignment"]) - _inner(start["alignment"])
            ),
        ]
        for name, weight in now["weights"].items():
            readings.append(
                Reading(f"feature_learning/{name}/weight_change", _change(start["weights"][name], weight))
            )
        for name, value in now["alignment"].items():
            readings.append(Reading(f"feature_learning/{name}/alignment", value))
        return [*readings, *self._judge(float(move.change), start["alignment"], now["alignment"], ratio)]

    def _judge(
        self, change: float, before: dict[str, float], after: dict[str, float], ratio: float
    ) -> Iterator[Reading]:
        """Put the verdict and the mechanism into numbers and words; nothing where numbers are not finite."""
        said = (self.verdict, self.mechanism)
        if math.isfinite(change):
            self.verdict = VERDICTS[(change >= self.kernel_below) + (change > self.rich_above)]
            yield Reading("feature_learning/verdict", float(VERDICTS.index(self.verdict)))
        zeta, zeta_after = _inner(before), _inner(after)
        if math.isfinite(zeta) and math.isfinite(zeta_after) and 0 < ratio < math.inf:
            self.mechanism = mechanism(
                zeta, alignment_after=zeta_after, norm_ratio=ratio, tolerance=self.tolerance
            )
            yield Reading("feature_learning/mechanism", float(MECHANISMS.index(self.mechanism)))
        if said != (self.verdict, self.mechanism):
            yield Reading(
                "feature_learning/summary",
                f"regime: {self.verdict} (the kernel has moved by {change:.3g} of itself); mechanism: "
                f"{self.mechanism} (alignment {zeta:.3g} -> {zeta_after:.3g}, norms x {ratio:.3g})",
            )

    def _rates(self, trainer: Trainer, module: LightningModule) -> list[float] | None:
        """Return the learning rate of each trained parameter, over the largest of them."""
        if not self.by_rate:
            return None
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        rate = {id(p): float(group["lr"]) for group in groups for p in group["params"]}
        rates = [rate.get(id(p), 0.0) for p in _trained(module)]
        largest = max(rates, default=0.0)
        return [value / largest for value in rates] if largest > 0 else rates

    def _state(self, trainer: Trainer, module: LightningModule, start: dict[str, Any]) -> dict[str, Any]:
        """Return what is compared: kernel, sketched weights, norms and alignments."""
        x = trainer.precision_plugin.convert_input(start["x"].to(module.device))
        trained = _trained(module)
        module.eval()
        with (
            torch.compiler.set_stance("force_eager"),
            trainer.precision_plugin.forward_context(),
            torch.autocast(module.device.type, enabled=False),
        ):
            kernel = tangent_kernel(
                self._function,
                trained,
                x,
                rates=start["rates"],
                most_outputs=self.most_outputs,
                sketch=self.sketch,
                seed=self.seed,
            )
            alignment = self._alignments(x)
        weights = {layer.name: layer.blocks().double() for layer in self._watched}
        with torch.no_grad():
            flat = torch.cat([p.detach().double().flatten() for p in trained])
        return {
            "kernel": kernel.cpu(),
            "theta": self._sketched(flat),
            "weights": {name: self._sketched(weight.flatten()) for name, weight in weights.items()},
            "norms": [float(weight.norm()) for weight in weights.values()],
            "alignment": alignment,
        }

    def _sketched(self, vector: Tensor) -> Tensor:
        sketch = CountSketch(len(vector), size=self.sketch, seed=self.seed, device=vector.device)
        return sketch(vector[None])[0].cpu()

    def _alignments(self, x: Tensor) -> dict[str, float]:
        """Return the alignment of each watched layer, in the order in which they are called."""
        found: dict[str, float] = {}

        def hook(layer: Layer) -> Callable[..., None]:
            def read(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
                h_ND = layer.input_rows(args[0].detach(), _POSITIONS)
                blocks = layer.blocks()
                parts = zip(h_ND.chunk(len(blocks), dim=1), blocks, strict=True)
                values = [float(layer_alignment(h, weight)) for h, weight in parts]
                found[layer.name] = sum(values) / len(values)

            return read

        with contextlib.ExitStack() as stack, torch.no_grad():
            for layer in self._watched:
                handle = layer.module.register_forward_hook(hook(layer))
                stack.callback(handle.remove)
            self._function(x)
        return found


def _trained(module: nn.Module) -> list[Tensor]:
    return [p for p in module.parameters() if p.requires_grad]


def _inner(alignments: dict[str, float]) -> float:
    """Return the mean alignment of all layers but the first that was called, unless it is the only one."""
    values = list(alignments.values())
    values = values[1:] or values
    return sum(values) / len(values) if values else math.nan


def _ratio(before: list[float], after: list[float]) -> float:
    """Return the product of norms, later over before, to the power of two over their number."""
    if not before or not min(before) > 0 or not min(after) > 0:
        return math.nan
    logs = [math.log(b / a) for a, b in zip(before, after, strict=True)]
    return math.exp(2 * sum(logs) / len(logs)) if len(logs) > 1 else math.exp(logs[0])


def _change(before: Tensor, after: Tensor) -> float:
    norm = before.norm()
    return float((after - before).norm() / norm) if norm > 0 else math.nan
