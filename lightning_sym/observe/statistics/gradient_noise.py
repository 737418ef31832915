r"""How per-sample gradients of a layer's weight and bias scatter, in sums formed inside the hooks.

With a sample's inputs h and output gradients g at its P positions, its gradient of the weight is
:math:`G_n = \sum_p g_{np} h_{np}^\top`, and :math:`\sum_p g_{np}` of the bias. Only sums over samples
are kept: of :math:`G_n`, of :math:`G_n G_n^\top` and of :math:`G_n^\top G_n`. All positions are used:
a gradient over some of them would be another gradient. Of a normalisation's gain, which multiplies the
normalised h, it is :math:`\sum_p g_{np} \odot h_{np}`.

Shape letters: B samples, P positions, O outputs, G groups, C input channels of a group, K kernel
positions (1 for a linear layer), A = C * K.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from lightning_sym.observe.gains import Gain
from lightning_sym.observe.statistics.statistic import Statistic, Tally
from lightning_sym.observe.weights import accumulation_dtype

if TYPE_CHECKING:
    from lightning_sym.observe.call import Call
    from lightning_sym.observe.hooks import LayerWatch
    from lightning_sym.observe.layers import Layer

#: Numbers that are formed at once, of as many samples as that allows.
CHUNK = 2**23
#: Largest weight (in entries) whose mean gradient is kept.
LARGEST_WEIGHT = 2**24


@dataclass(frozen=True)
class GradientNoise(Statistic):
    """How per-sample gradients of weight and bias scatter, from all positions: :class:`NoiseMoments`.

    A layer has none (and the monitor is told why) if its calls can't be taken apart into the batch's
    samples, if it is called by more than one backward pass of a batch, if its input was changed in
    place, or if the memory for inputs is used up. An embedding, whose input is an index, has none.

    Args:
        max_width: widest side of a weight of which a matrix is kept (None: no limit); of wider ones the
            diagonal, which is cheaper.
        max_held_bytes: memory for inputs that wait for their gradient, of all layers together (None: no
            limit).
    """

    max_width: int | None = 512
    max_held_bytes: int | None = 2**30
    uses_gradients: ClassVar[bool] = True

    def where(self, layers: Sequence[Layer]) -> list[Layer]:
        """Return all layers: gains of normalisations have noise, too."""
        return list(layers)

    def begin(self, watch: LayerWatch) -> Tally:
        """Return the empty sums."""
        memory = watch.step.shared(self, lambda: HeldMemory(self.max_held_bytes))
        return NoiseTally(watch, max_width=self.max_width, memory=memory)


@dataclass
class HeldMemory:
    """Bytes of inputs that wait for their gradient, of all layers together.

    They are references to what the backward pass keeps as a rule; under autocast and activation
    checkpointing they are memory of their own.

    Args:
        most: the limit in bytes; ``None``: no limit.
    """

    most: int | None
    bytes: int = 0


class _Held:
    """A call's input, as it was, until its gradient comes."""

    def __init__(self, x: Tensor, memory: HeldMemory) -> None:
        self.x: Tensor | None = x.detach()
        self.version, self.memory, self.bytes = x._version, memory, _bytes(x)
        memory.bytes += self.bytes

    def release(self) -> Tensor | None:
        """Let go of the input and return it; None if that was done before."""
        x, self.x = self.x, None
        if x is not None:
            self.memory.bytes -= self.bytes
        return x

    def __del__(self) -> None:
        self.release()


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()


class NoiseTally(Tally):
    """Sums of one layer's per-sample gradients, and the inputs that wait for them."""

    def __init__(self, watch: LayerWatch, *, max_width: int | None, memory: HeldMemory) -> None:
        layer = watch.layer
        self.watch, self.layer, self.memory = watch, layer, memory
        device = watch.device
        dtype = accumulation_dtype(device)
        outputs, channels, width = layer.out_features, layer.in_channels, layer.in_features // layer.groups
        self.channels = channels

        def sums(n: int) -> Tensor:
            whole = max_width is None or n <= max_width
            return torch.zeros((n, n) if whole else (n,), dtype=dtype, device=device)

        self.reason = ""
        self.gain = layer if isinstance(layer, Gain) else None
        if self.gain is not None:
            channels, width = 0, 1
        elif layer.no_noise:
            self.reason = layer.no_noise
        elif outputs * width > LARGEST_WEIGHT:
            self.reason = f"its weight has more than {LARGEST_WEIGHT} entries"
        if self.reason:
            outputs = channels = width = 0
        # samples, non-finite samples, times that something stood in the way
        self.counts = torch.tensor([0.0, 0.0, float(bool(self.reason))], dtype=dtype, device=device)
        self.first_OA = torch.zeros(outputs, width, dtype=dtype, device=device)
        biases = 0 if layer.bias_parameter() is None else outputs
        self.first_O = torch.zeros(biases, dtype=dtype, device=device)
        self.out, self.into, self.bias = sums(outputs), sums(channels), sums(biases)
        self._calls = self._gradients = 0
        self._parts: list[tuple[Tensor, Tensor]] = []
        self._waiting: weakref.WeakSet[_Held] = weakref.WeakSet()

    def tensors(self) -> list[Tensor]:
        """Return the sums."""
        return [self.counts, self.first_OA, self.first_O, self.out, self.into, self.bias]

    def result(self) -> NoiseMoments | None:
        """Return the moments, or None where something stood in the way or there are fewer than 2 samples."""
        return NoiseMoments(self) if not float(self.counts[2]) and float(self.counts[0]) >= 2 else None

    def give_up(self, reason: str) -> None:
        """Have no reading at this step, on any rank."""
        self.reason = self.reason or reason
        self.counts[2] += 1
        self._parts = []
        for held in list(self._waiting):
            held.release()

    def forward(self, call: Call) -> None:
        """Take note of a forward call that is not a recomputed one."""
        self._calls += 1

    def hold(self, call: Call) -> None:
        """Keep a reference to a call's input until the gradient of its output comes."""
        if self.reason:
            return
        if call.x is None:
            return self.give_up("its input is not its first argument")
        if self.gain is not None and not self.gain.agrees(call.x, call.output):
            return self.give_up("its output is not its normalised input times its gain")
        if self.memory.most is not None and self.memory.bytes + _bytes(call.x) > self.memory.most:
            return self.give_up(f"inputs that wait for gradients would exceed {self.memory.most} bytes")
        held = _Held(call.x, self.memory)
        self._waiting.add(held)
        call.kept[self] = held

    def backward(self, call: Call, gradient: Tensor) -> None:
        """Take in the gradient of a call's output; when the last call's has come, form the sums."""
        held = call.kept.get(self)
        if self.reason or held is None:
            return
        x = held.release()
        self._gradients += 1
        if x is None or self._gradients > self._calls:
            return self.give_up("more than one backward pass of a batch went through it")
        if x._version != held.version:
            return self.give_up("its input was changed in place")
        x = x if self.gain is None else self.gain.normalized(x)
        count = self.watch.step.samples
        x_B, g_B = self._by_sample(x, count), self._by_sample(gradient, count)
        if x_B is None or g_B is None:
            shape = tuple(x.shape)
            return self.give_up(f"its input {shape} does not begin with the batch's {count} samples")
        self._parts.append((x_B, g_B * self.watch.step.scale))
        if self._gradients == self._calls:
            self._reduce()

    def end_batch(self) -> None:
        """End a micro-batch: calls whose gradient has not come by now will get none."""
        for held in list(self._waiting):
            held.release()
        self._calls = self._gradients = 0
        self._reduce()

    def _by_sample(self, x: Tensor, count: int | None) -> Tensor | None:
        """Return x with the samples first, or None if they can't be told apart."""
        if count is None or x.ndim < 2:
            return None
        x = self.watch.batch_first(x)
        return x if x.shape[0] == count else None

    def _rows(self, x: Tensor, *, inputs: bool) -> Tensor:
        """Return ``[B, P, features]`` in at least float32."""
        x = x if x.dtype == torch.float64 else x.float()
        if self.gain is not None:
            return self.gain.rows(x)
        if self.layer.is_convolution:
            return self.watch.layer.patches(x) if inputs else x.flatten(2).mT
        return x.unsqueeze(1) if x.ndim == 2 else x.flatten(1, -2)

    def _reduce(self) -> None:
        parts, self._parts = self._parts, []
        if not parts or self.reason:
            return
        outputs, width = self.first_OA.shape
        positions = sum(self._positions(g) for _, g in parts)
        groups = self.layer.groups
        wide = outputs * (self.out.ndim == 2), self.channels * (self.into.ndim == 2)
        formed = outputs * width * (positions + sum(wide))
        by_position = positions**2 * (width + outputs) + positions * (outputs * wide[0] + width * wide[1])
        gram = groups == 1 and by_position <= formed
        gram = gram and self.gain is None
        size = positions * (self.layer.in_features + outputs) + (positions**2 if gram else outputs * width)
        for x, g in _chunks(parts, max(1, CHUNK // size)):
            h_BPA = torch.cat([self._rows(part, inputs=True) for part in x], dim=1)
            g_BPO = torch.cat([self._rows(part, inputs=False) for part in g], dim=1).to(h_BPA.dtype)
            fine_B = h_BPA.isfinite().all(2).all(1) & g_BPO.isfinite().all(2).all(1)
            fine_B11 = fine_B[:, None, None]
            h_BPA, g_BPO = torch.where(fine_B11, h_BPA, 0.0), torch.where(fine_B11, g_BPO, 0.0)
            n = fine_B.sum()
            self.counts[:2] += torch.stack([n, len(fine_B) - n])
            if len(self.first_O):
                b_BO = g_BPO.sum(1)
                self.first_O += b_BO.sum(0)
                _add(self.bias, b_BO, b_BO)
            if self.gain is not None:
                w_BO = (h_BPA * g_BPO).sum(1)
                self.first_OA += w_BO.sum(0)[:, None]
                _add(self.out, w_BO, w_BO)
            elif gram:
                self._add_by_position(h_BPA, g_BPO)
            else:
                self._add_formed(h_BPA, g_BPO)

    def _positions(self, g: Tensor) -> int:
        return g[0].numel() // self.layer.out_features

    def _add_by_position(self, h_BPA: Tensor, g_BPO: Tensor) -> None:
        """Add from Gram matrices of positions: cheaper than G_n where there are few of them."""
        self.first_OA += g_BPO.flatten(0, 1).mT @ h_BPA.flatten(0, 1)
        _add(self.out, g_BPO.flatten(0, 1), ((h_BPA @ h_BPA.mT) @ g_BPO).flatten(0, 1))
        other = (g_BPO @ g_BPO.mT) @ h_BPA
        _add(self.into, self._by_channel(h_BPA.flatten(0, 1)), self._by_channel(other.flatten(0, 1)))

    def _add_formed(self, h_BPA: Tensor, g_BPO: Tensor) -> None:
        groups = self.layer.groups
        g_BGOP = g_BPO.unflatten(2, (groups, -1)).permute(0, 2, 3, 1)
        h_BGPA = h_BPA.unflatten(2, (groups, -1)).transpose(1, 2)
        gradient_BOA = (g_BGOP @ h_BGPA).flatten(1, 2)
        self.first_OA += gradient_BOA.sum(0)
        rows = gradient_BOA.transpose(1, 2).flatten(0, 1)  # [B A, O]
        _add(self.out, rows, rows)
        columns = self._by_channel(gradient_BOA.flatten(0, 1))
        _add(self.into, columns, columns)

    def _by_channel(self, x_NA: Tensor) -> Tensor:
        """Return ``[N K, C]``: kernel positions are samples."""
        return x_NA.unflatten(1, (self.channels, -1)).transpose(1, 2).flatten(0, 1)


def _chunks(parts: list[tuple[Tensor, Tensor]], size: int) -> list[tuple[list[Tensor], list[Tensor]]]:
    count = len(parts[0][0])
    return [
        ([x[start : start + size] for x, _ in parts], [g[start : start + size] for _, g in parts])
        for start in range(0, count, size)
    ]


def _add(sums: Tensor, a_ND: Tensor, b_ND: Tensor) -> None:
    """Add ``sum_n a_n b_n^T``, or its diagonal if no more is kept."""
    sums += a_ND.mT @ b_ND if sums.ndim == 2 else (a_ND * b_ND).sum(0)


class NoiseMoments:
    r"""Covariance of a layer's per-sample gradients, contracted to one dimension of weight or bias.

    Per-sample gradients are those of per-sample losses: the loss's batch mean, the gradient
    accumulation's division and the loss scale are undone. With batch normalisation in training mode
    samples depend on each other, and these are each sample's share of the gradient.

    Attributes:
        n: samples that went in, over all ranks, at least 2.
    """

    def __init__(self, sums: NoiseTally) -> None:
        self._sums = sums
        self.n = int(sums.counts[0])

    def covariance(self, tensor: Literal["weight", "bias"], dim: int = 0) -> Tensor:
        r"""Return :math:`\sum_r \operatorname{Cov}(G_{ir}, G_{jr})` over all other dimensions r.

        Args:
            tensor: "weight" or "bias".
            dim: 0: outputs; 1, of a weight: inputs, or the input channels of a convolution's group.

        Returns:
            ``[D, D]``, unbiased (divided by n - 1); its diagonal ``[D]`` where D is wider than the
            statistic's ``max_width``.
        """
        second = self._second(tensor, dim)
        return (second - self.n * self.mean_square(tensor, dim)) / (self.n - 1)

    def mean_square(self, tensor: Literal["weight", "bias"], dim: int = 0) -> Tensor:
        r"""Return :math:`\sum_r \bar G_{ir} \bar G_{jr}` of the mean, shaped as :meth:`covariance`."""
        sums, second = self._sums, self._second(tensor, dim)
        if tensor == "weight" and second.ndim == 1:
            squares = torch.linalg.vector_norm(sums.first_OA, dim=1 - dim).square() / self.n**2
            return squares if dim == 0 else squares.unflatten(0, (sums.channels, -1)).sum(1)
        if tensor == "bias":
            rows = sums.first_O[None] / self.n
        else:
            rows = (sums.first_OA.mT if dim == 0 else sums._by_channel(sums.first_OA)) / self.n
        found = torch.zeros_like(second)
        _add(found, rows, rows)
        return found

    def _second(self, tensor: Literal["weight", "bias"], dim: int) -> Tensor:
        if tensor not in ("weight", "bias") or dim not in ((0,) if tensor == "bias" else (0, 1)):
            raise ValueError(f"dim must be 0, or 1 of a weight, got {dim} of {tensor!r}")
        if tensor == "bias":
            return self._sums.bias
        return self._sums.out if dim == 0 else self._sums.into
