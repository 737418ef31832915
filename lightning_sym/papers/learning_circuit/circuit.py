"""A network that learns by local rules: two streams, and synapses that see what they touch.

Shape letters: N samples, O upper channels, C lower channels, K outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, cast

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.amp import is_autocast_available
from torch.nn import functional as F
from typing_extensions import override

from lightning_sym.papers.learning_circuit.rules import RULES, Conv, Dense, Geometry, Rule, Site

Activation = Callable[[Tensor], Tensor]
TASKS = ("classification", "regression")


class CircuitDivergenceError(RuntimeError):
    """A circuit whose synapses stopped being finite, or grew out of all measure."""


class CircuitLayer(nn.Module):
    """The synapses of one layer, as parameters: ``W``, ``bias`` and what the rule asks for.

    Args:
        geometry: what the layer connects.
        kinds: by population how it begins, see :meth:`Rule.synapses`.
        generators: draw ``"W"`` and, ``""``, all others.
        bias: whether upper neurons have one.
    """

    W: nn.Parameter

    def __init__(
        self,
        geometry: Geometry,
        *,
        kinds: Mapping[str, str | Tensor],
        generators: Mapping[str, torch.Generator],
        bias: bool,
    ) -> None:
        super().__init__()
        self.geometry = geometry
        self.populations = ["W", *kinds]
        for name in self.populations:
            drawn = self._begin(name, kinds.get(name), generators.get(name, generators[""]))
            self.register_parameter(name, nn.Parameter(drawn))
        self.bias = nn.Parameter(torch.zeros(geometry.upper[0])) if bias else None

    def _begin(self, name: str, kind: str | Tensor | None, generator: torch.Generator) -> Tensor:
        if isinstance(kind, Tensor):
            return kind.detach().clone()
        if name in ("W", "B"):
            scale = (2 / self.geometry.fan_in) ** 0.5
            return torch.randn(self.geometry.weight_shape, generator=generator) * scale
        if name not in ("R", "L"):
            raise ValueError(
                f"a rule's populations must be among B, R and L, or begin with a tensor, got {name!r}"
            )
        if kind not in ("random", "identity", "positive"):
            raise ValueError(
                f"{name} must begin 'random', 'identity', 'positive' or with a tensor, got {kind!r}"
            )
        channels = (self.geometry.upper if name == "R" else self.geometry.lower)[0]
        if kind == "identity":
            return torch.eye(channels)
        drawn = torch.randn(channels, channels, generator=generator) * channels**-0.5
        return drawn @ drawn.mT if kind == "positive" else drawn

    def synapses(self) -> dict[str, Tensor]:
        """Return the populations by name, detached."""
        return {name: getattr(self, name).detach() for name in self.populations}

    @override
    def forward(self, below: Tensor) -> Tensor:
        return self.biased(self.geometry.up(below, self.W))

    def biased(self, drive: Tensor) -> Tensor:
        """Return what W evokes with the bias added."""
        return drive if self.bias is None else drive + self.bias.view(-1, *[1] * (drive.ndim - 2))


class LearningCircuit(LightningModule):
    r"""A network of an ascending and a descending stream that learns by a local rule.

    Ascending, :math:`h_l = \sigma(W_l h_{l-1} + b_l)`, linear at the top. Descending,
    :math:`g_l = \sigma'_l \odot (\text{feedback of } g_{l+1})`, from the error at the top:
    :math:`y - \operatorname{softmax}(z)` or :math:`y - z`. The rule says what the feedback is and how
    synapses change (:class:`~lightning_sym.papers.learning_circuit.Rule`). Nothing is differentiated
    through the network: :math:`\sigma'` is each neuron's own. Updates are means over the samples of all
    ranks, less ``decay`` times the synapse (biases do not decay); an optimizer takes them as it takes
    gradients, under manual optimization.

    ``four_synapse`` is a reconstruction (:class:`~lightning_sym.papers.learning_circuit.FourSynapse`).

    Logs:
        ``train/loss``, ``val/loss``, ``test/loss``: the mean over a batch's samples.
        ``train/accuracy``, ``val/accuracy``, ``test/accuracy``: the share classified right, in [0, 1]; only
            where the task is classification.

    Args:
        shape: shape of one input, ``(features,)`` or ``(C, X, Y)``.
        layers: widths of fully connected layers, or :class:`Dense` and :class:`Conv`. The last one is
            the output: its width is the number of classes or of targets.
        rule: a registered rule's name (``four_synapse``, ``kolen_pollack``, ``feedback_alignment``,
            ``backprop``) or a :class:`Rule`.
        task: ``"classification"`` (labels ``int64 [N]``, cross-entropy) or ``"regression"`` (targets
            ``[N, K]``; half the squared error, summed over outputs).
        activation: the name of a function in ``torch``, or an elementwise function of a tensor. Its
            derivative is taken neuron by neuron.
        lr: learning rate.
        momentum: of the optimizer, in [0, 1).
        decay: the rate at which every synapse that changes decays, per unit of ``lr``.
        bias: whether neurons have one.
        seed: of the initial synapses, at least 0; the ascending ones depend on nothing else.
        optimizer: a function from parameters to an optimizer in place of SGD; give it no weight decay.
        max_rms: root mean square of a population beyond which the circuit has diverged.

    Under mixed precision the local products are taken in the parameters' own type.

    Raises:
        ValueError: if an argument is out of its range; at fit start, under ``precision="16-mixed"``.
        TypeError: if ``activation`` or ``rule`` is of a wrong type.
        CircuitDivergenceError: while fitting, if an update is not finite (it is not made) or a population
            exceeds ``max_rms``. It names layer, population and rule, and ends the fit.

    Example:
        >>> circuit = LearningCircuit((1, 8, 8), layers=[Conv(4, stride=2), 16, 10], rule="kolen_pollack")
        >>> circuit(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        shape: Sequence[int],
        *,
        layers: Sequence[int | Dense | Conv],
        rule: str | Rule = "four_synapse",
        task: str = "classification",
        activation: str | Activation = "relu",
        lr: float = 0.1,
        momentum: float = 0.0,
        decay: float = 1e-3,
        bias: bool = True,
        seed: int = 0,
        optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None = None,
        max_rms: float = 1e3,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        if task not in TASKS:
            raise ValueError(f"task must be one of {TASKS}, got {task!r}")
        if not layers:
            raise ValueError("layers must name at least the output, got none")
        for name, value, right in (
            ("lr", lr, lr > 0),
            ("momentum", momentum, 0 <= momentum < 1),
            ("decay", decay, decay >= 0),
            ("seed", seed, isinstance(seed, int) and 0 <= seed < 2**62),
            ("max_rms", max_rms, max_rms > 0),
        ):
            if not right:
                raise ValueError(f"{name} is out of its range, got {value!r}")
        self.rule = _rule(rule)
        self.task, self.activation = task, _activation(activation)
        self.lr, self.momentum, self.decay, self.max_rms = lr, momentum, decay, max_rms
        self._optimizer = optimizer
        # Two streams, so that W begins alike under every rule.
        generators = {"W": torch.Generator().manual_seed(seed), "": torch.Generator().manual_seed(~seed)}
        self.shape = at = tuple(shape)
        if isinstance(layers[-1], Conv):
            raise ValueError(f"layers must end with a fully connected one, got {layers[-1]}")
        self.layers = nn.ModuleList()
        for k, entry in enumerate(layers):
            geometry = (entry if isinstance(entry, Dense | Conv) else Dense(entry)).on(at)
            kinds = self.rule.synapses(geometry, first=k == 0)
            self.layers.append(CircuitLayer(geometry, kinds=kinds, generators=generators, bias=bias))
            at = geometry.upper

    @property
    def stack(self) -> list[CircuitLayer]:
        """The layers from the input on."""
        return cast("list[CircuitLayer]", list(self.layers))

    @override
    def forward(self, x: Tensor) -> Tensor:
        """Return outputs (logits in classification), ``[N, K]``.

        Raises:
            ValueError: if inputs are not of the shape the circuit was made for.
        """
        if tuple(x.shape[1:]) != self.shape:
            raise ValueError(f"x must be [N, {', '.join(map(str, self.shape))}], got {list(x.shape)}")
        *hidden, top = self.stack
        for layer in hidden:
            x = self.activation(layer(x))
        return top(x)

    def backprop_loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Return the loss whose negative gradient the ``backprop`` rule follows, as a graph.

        Training does not use it: it is what monitors differentiate.
        """
        return self._loss(self(batch[0]), batch[1])

    @torch.no_grad()
    def local_updates(self, batch: tuple[Tensor, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        """Return the rule's changes before decay, and the outputs.

        Args:
            batch: inputs and labels or targets of this rank.

        Returns:
            By parameter name the mean over the samples of all ranks; and this rank's ``[N, K]``.
        """
        device = self.device.type
        mixed = torch.autocast(device, enabled=False) if is_autocast_available(device) else nullcontext()
        with mixed:  # the products below know no mixed types
            return self._local_updates(batch[0].to(self.stack[0].W.dtype), batch[1])

    def _local_updates(self, x: Tensor, y: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        layers = self.stack
        below: list[Tensor] = []
        drives: list[Tensor] = []
        sums: list[Tensor] = []
        for layer in layers:
            below.append(x)
            drives.append(layer.geometry.up(x, layer.W))
            sums.append(layer.biased(drives[-1]))
            x = self.activation(sums[-1])
        outputs = sums[-1]
        g = self._error(outputs, y)
        changes: dict[str, Tensor] = {}
        for k in reversed(range(len(layers))):
            layer, synapses = layers[k], layers[k].synapses()
            descending = self.rule.descend(layer.geometry, synapses, g) if k else None
            site = Site(layer.geometry, synapses, below[k], drives[k], g, descending)
            for name, change in self.rule.updates(site).items():
                if getattr(layer, name) is not None:
                    changes[f"layers.{k}.{name}"] = change
            if descending is not None:
                g = _derivative(self.activation, sums[k - 1]) * descending
        return _mean_over_ranks(changes, len(outputs)), outputs

    @override
    def on_fit_start(self) -> None:
        if getattr(self.trainer.precision_plugin, "scaler", None) is not None:
            raise ValueError(
                "precision='16-mixed' scales losses, and a circuit has none to scale: "
                "use precision='bf16-mixed' or '32-true'"
            )

    @torch.no_grad()
    def learn(self, batch: tuple[Tensor, Tensor], optimizer: Any) -> Tensor:
        """Make one step by the rule: all that a training step does but logging; needs no Trainer.

        Args:
            batch: inputs and labels or targets of this rank.
            optimizer: of the circuit's parameters, see :meth:`configure_optimizers`.

        Returns:
            The outputs before the step, ``[N, K]``.

        Raises:
            CircuitDivergenceError: see the class.
        """
        changes, outputs = self.local_updates(batch)
        self._check(changes, "the update of ")
        optimizer.zero_grad()
        for name, change in changes.items():
            parameter = self.get_parameter(name)
            fade = 0.0 if name.endswith("bias") else self.decay
            parameter.grad = (fade * parameter - change).to(parameter.dtype)
        optimizer.step()
        for layer in self.stack:
            self.rule.after_step(layer.synapses())
        self._check({name: self.get_parameter(name).detach() for name in changes}, "")
        return outputs

    @override
    def training_step(self, batch: Any, batch_idx: int) -> None:
        self._log("train", self.learn(batch, self.optimizers()), batch[1])

    @override
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self._log("val", self(batch[0]), batch[1])

    @override
    def test_step(self, batch: Any, batch_idx: int) -> None:
        self._log("test", self(batch[0]), batch[1])

    @override
    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0] if isinstance(batch, tuple | list) else batch)

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        parameters = list(self.parameters())
        if self._optimizer is not None:
            return self._optimizer(parameters)
        return torch.optim.SGD(parameters, lr=self.lr, momentum=self.momentum)

    # What a monitor asks a circuit; plain dicts, so that it need not know the class.

    def feedback_pairs(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Return by layer ``W`` and the feedback ``V^T`` next to it, in one shape; backprop has none."""
        named = ((f"layers.{k}", layer.synapses()) for k, layer in enumerate(self.stack))
        return {name: (found["W"], found["B"]) for name, found in named if "B" in found}

    def balances(self) -> dict[str, dict[str, tuple[Tensor, Tensor]]]:
        """Return by layer pairs of matrices that self-assembly makes equal, see :meth:`Rule.balances`."""
        found = {
            f"layers.{k}": self.rule.balances(layer.geometry, layer.synapses())
            for k, layer in enumerate(self.stack)
        }
        return {name: pairs for name, pairs in found.items() if pairs}

    def _loss(self, outputs: Tensor, y: Tensor) -> Tensor:
        if self.task == "classification":
            return F.cross_entropy(outputs, y)
        return (outputs - y.view_as(outputs)).square().sum(1).mean() / 2

    def _error(self, outputs: Tensor, y: Tensor) -> Tensor:
        if self.task == "classification":
            return F.one_hot(y, outputs.shape[1]).to(outputs) - outputs.softmax(1)
        return y.view_as(outputs) - outputs

    def _log(self, stage: str, outputs: Tensor, y: Tensor) -> None:
        shared = {"batch_size": len(y), "on_step": False, "on_epoch": True, "sync_dist": True}
        self.log(f"{stage}/loss", self._loss(outputs, y), **shared)  # type: ignore[arg-type]
        if self.task == "classification":
            right = (outputs.argmax(1) == y).float().mean()
            self.log(f"{stage}/accuracy", right, **shared)  # type: ignore[arg-type]

    def _check(self, tensors: dict[str, Tensor], what: str) -> None:
        """Raise if anything is not finite or, of synapses, too large; every rank sees the same."""
        norms = torch.stack([torch.linalg.vector_norm(tensor) for tensor in tensors.values()])
        rms = norms / norms.new_tensor([tensor.numel() ** 0.5 for tensor in tensors.values()])
        limit = float("inf") if what else self.max_rms
        bad = ~norms.isfinite() | (rms > limit)
        if not bad.any():
            return
        k = int(bad.nonzero()[0])
        layer, population = list(tensors)[k].rsplit(".", 1)
        size = f"{float(rms[k]):.3g}" + (f", more than {limit:g}" if rms[k] > limit else "")
        step = "" if self._trainer is None else f" at step {self._trainer.global_step}"
        raise CircuitDivergenceError(
            f"the circuit diverged: {what}{population} of {layer} under the rule {self.rule.name!r} has a "
            f"root mean square of {size}{step}. Lower lr (or the rule's lateral_rate), or raise decay."
        )


def _rule(rule: str | Rule) -> Rule:
    if isinstance(rule, Rule):
        return rule
    if not isinstance(rule, str):
        raise TypeError(f"rule must be a rule's name or a Rule, got {rule!r}")
    if rule not in RULES:
        raise ValueError(f"rule must be one of {sorted(RULES)} or a Rule, got {rule!r}")
    return RULES[rule]()


def _activation(activation: str | Activation) -> Activation:
    found: Any = activation
    if isinstance(activation, str):
        found = getattr(torch, activation, None) or getattr(F, activation, None)
    elif not callable(activation):
        raise TypeError(f"activation must be a name or a function, got {activation!r}")
    if not callable(found) or not _elementwise(found):
        raise ValueError(
            "activation must be a differentiable elementwise function of a tensor that leaves its argument "
            f"as it is, such as 'relu' or 'tanh', got {activation!r}"
        )
    return found  # type: ignore[no-any-return]


def _elementwise(function: Any) -> bool:
    """Return whether a function acts on numbers one by one, purely and with a derivative, by trying it."""
    given = torch.linspace(-1.5, 2.0, 6).view(2, 3)
    tried = given.clone()
    try:
        whole, one = function(tried), function(given[1, 2:].clone())
        _derivative(function, given)
    except (RuntimeError, TypeError, ValueError):
        return False
    return whole.shape == given.shape and torch.equal(tried, given) and torch.allclose(whole[1, 2], one[0])


def _derivative(activation: Activation, a: Tensor) -> Tensor:
    """Return the derivative of an elementwise function, neuron by neuron."""
    with torch.enable_grad():
        leaf = a.detach().requires_grad_()
        return torch.autograd.grad(activation(leaf).sum(), leaf)[0]


def _mean_over_ranks(changes: dict[str, Tensor], samples: int) -> dict[str, Tensor]:
    """Return sums over samples as means over the samples of all ranks, in one packed all-reduce."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return {name: change / samples for name, change in changes.items()}
    values = list(changes.values())
    wide = torch.promote_types(values[0].dtype, torch.float32)  # half types count to 256 only
    packed = torch.cat(
        [*(value.flatten().to(wide) for value in values), values[0].new_tensor([samples], dtype=wide)]
    )
    dist.all_reduce(packed)
    parts = (packed[:-1] / packed[-1]).split([value.numel() for value in values])
    return {
        name: part.view_as(value).to(value.dtype)
        for (name, value), part in zip(changes.items(), parts, strict=True)
    }
