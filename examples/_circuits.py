"""Many learning circuits side by side: the four-synapse rule with settings of its own for each.

The rule is that of ``lightning_sym.papers.learning_circuit.FourSynapse`` (a reconstruction), without scaling
of rows, on ReLU layers and labels. What differs between circuits is given circuit by circuit
(:class:`Setting`); a circuit that diverges is set to zero and marked.

Shape letters: K circuits, B samples, O and I upper and lower neurons of a layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

ARMS = ("backprop", "feedback_alignment", "identity", "assembled", "frozen", "sign", "sign_pairs", "plain")


@dataclass(frozen=True)
class Setting:
    """What one circuit does.

    Args:
        arm: ``assembled``: random hidden laterals that learn, the output's held at the identity; ``frozen``:
            the same and nothing lateral learns; ``identity``: hidden laterals that begin at the identity;
            ``plain``: random laterals everywhere, all learn; ``sign``: as ``plain``, and every ascending
            neuron has a sign by which its W takes what it is taught (R learns as ever); ``sign_pairs``: that,
            and the output's lateral joins neurons in pairs, with random weights; ``feedback_alignment``;
            ``backprop``.
        eta: learning rate, which falls to zero on a straight line.
        gamma: decay of all that learns but biases.
        scale: random laterals begin with deviation ``scale / sqrt(neurons)``.
        lateral_rate: learning rate of R and L relative to W's and V's.
        seed: of the synapses and of the order of samples; equal seeds have equal ascending weights.
    """

    arm: str
    eta: float
    gamma: float
    scale: float
    lateral_rate: float
    seed: int


class Circuits:
    """K circuits of one shape.

    Args:
        widths: from the inputs to the outputs, three numbers or more.
        settings: of the circuits.
        dtype: of the synapses.
    """

    def __init__(
        self, widths: Sequence[int], settings: Sequence[Setting], *, dtype: torch.dtype = torch.float32
    ) -> None:
        for setting in settings:
            if setting.arm not in ARMS:
                raise ValueError(f"arm must be one of {ARMS}, got {setting.arm!r}")
        self.widths, self.settings, self.dtype = list(widths), list(settings), dtype
        self.top = len(widths) - 2
        self.eta, self.gamma, self.rate = (
            torch.tensor([getattr(s, key) for s in settings], dtype=dtype).view(-1, 1, 1)
            for key in ("eta", "gamma", "lateral_rate")
        )
        self.transports, self.signed = self._flag("backprop"), self._flag("sign", "sign_pairs")
        self.laterals_learn = self._flag("assembled", "identity", "sign", "sign_pairs", "plain")
        self.output_learns, self.pairs = self._flag("sign", "sign_pairs", "plain"), self._flag("sign_pairs")
        self.feedback_learns = ~self._flag("backprop", "feedback_alignment")
        self.diverged = torch.zeros(len(settings), dtype=torch.bool)
        drawn = [self._draw(setting) for setting in settings]
        self.synapses = [
            {name: torch.stack([d[layer][name] for d in drawn]) for name in drawn[0][layer]}
            for layer in range(self.top + 1)
        ]
        shape = [(len(settings), 1, width) for width in self.widths[1:]]
        self.bias = [torch.zeros(s, dtype=dtype) for s in shape]
        self.signs = [torch.zeros(s, dtype=dtype) for s in shape]  # running mean of what decides the sign

    def _flag(self, *arms: str) -> Tensor:
        return torch.tensor([s.arm in arms for s in self.settings]).view(-1, 1, 1)

    def _draw(self, setting: Setting) -> list[dict[str, Tensor]]:
        forward = torch.Generator().manual_seed(setting.seed)
        other = torch.Generator().manual_seed(setting.seed + 2**40)
        whole = setting.arm in ("backprop", "feedback_alignment", "identity")
        layers = []
        for layer in range(self.top + 1):
            i, o = self.widths[layer : layer + 2]
            w, b = (torch.randn(o, i, generator=g) * (2 / i) ** 0.5 for g in (forward, other))
            r, lateral = (torch.randn(n, n, generator=other) * setting.scale / n**0.5 for n in (o, i))
            if whole:
                r, lateral = torch.eye(o), torch.eye(i)
            if layer == self.top and setting.arm not in ("sign", "plain"):
                pairs = setting.arm == "sign_pairs"
                r = torch.diag(r.diagonal()) * o**0.5 if pairs else torch.eye(o)
            found = {"W": w, "R": r} | ({"B": b, "L": lateral} if layer else {})
            layers.append({name: tensor.to(self.dtype) for name, tensor in found.items()})
        return layers

    def forward(self, x_KBI: Tensor) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Return what enters each layer, what W evokes of it, and that with the bias."""
        below, drives, sums = [], [], []
        for layer, synapses in enumerate(self.synapses):
            below.append(x_KBI)
            drives.append(x_KBI @ synapses["W"].mT)
            sums.append(drives[-1] + self.bias[layer])
            x_KBI = torch.relu(sums[-1])
        return below, drives, sums

    def changes(self, x_KBI: Tensor, y_KB: Tensor) -> list[dict[str, Tensor]]:
        """Return by layer the rule's changes before decay, means over samples; ``bp``: backprop's of W."""
        below, drives, sums = self.forward(x_KBI)
        batch = x_KBI.shape[1]
        error = F.one_hot(y_KB, self.widths[-1]).to(x_KBI) - sums[-1].softmax(dim=2)
        g, exact = error, error
        found: list[dict[str, Tensor]] = [{} for _ in self.synapses]
        for layer in reversed(range(self.top + 1)):
            s = self.synapses[layer]
            taught = torch.where(self.transports, g, g @ s["R"].mT)
            agree = (taught * g).mean(dim=1, keepdim=True)
            self.signs[layer].mul_(0.99).add_(agree, alpha=0.01)
            sign = torch.where(self.signed & (self.signs[layer] < 0), -1.0, 1.0).to(x_KBI)
            taught = taught * sign
            change = {"W": taught.mT @ below[layer] / batch, "bias": taught.mean(dim=1, keepdim=True)}
            change["bp"] = exact.mT @ below[layer] / batch
            learns = self.laterals_learn if layer < self.top else self.laterals_learn & self.output_learns
            if layer == self.top:
                learns = learns & (~self.pairs | torch.eye(self.widths[-1], dtype=torch.bool))
            change["R"] = torch.where(learns, self.rate * (drives[layer].mT @ g) / batch, 0.0)
            if layer:
                descending = torch.where(self.transports, g @ s["W"], g @ s["B"])
                carried = below[layer] @ s["L"].mT
                change["B"] = torch.where(self.feedback_learns, g.mT @ carried / batch, 0.0)
                lateral = self.rate * (descending.mT @ below[layer]) / batch
                change["L"] = torch.where(self.laterals_learn, lateral, 0.0)
                gate = (sums[layer - 1] > 0).to(x_KBI)
                g, exact = gate * descending, gate * (exact @ s["W"])
            found[layer] = change
        return found

    def learn(self, x_KBI: Tensor, y_KB: Tensor, *, share: float) -> None:
        """Make a step.

        Args:
            x_KBI: inputs.
            y_KB: labels.
            share: of the learning rate.
        """
        for layer, change in enumerate(self.changes(x_KBI, y_KB)):
            self.bias[layer] += share * self.eta * change["bias"]
            for name, synapse in self.synapses[layer].items():
                learns = self._learns(name, layer)
                synapse += share * self.eta * (change[name] - torch.where(learns, self.gamma, 0.0) * synapse)

    def _learns(self, name: str, layer: int) -> Tensor:
        if name == "W":
            return torch.ones_like(self.transports)
        if name == "B":
            return self.feedback_learns
        if name == "R" and layer == self.top:
            return self.laterals_learn & self.output_learns
        return self.laterals_learn

    def clear(self, *, limit: float = 1e3) -> None:
        """Set circuits to zero, for good, of which a population is not finite or larger than ``limit``."""
        for s in self.synapses:
            for synapse in s.values():
                size = synapse.square().mean(dim=(1, 2)).sqrt()
                self.diverged |= ~size.isfinite() | (size > limit)
        for tensors in ([t for s in self.synapses for t in s.values()], self.bias, self.signs):
            for tensor in tensors:
                tensor[self.diverged] = 0.0

    def accuracy(self, x_BI: Tensor, y_B: Tensor, *, chunk: int = 2000) -> list[float]:
        """Return the share of right answers, circuit by circuit."""
        right = torch.zeros(len(self.settings))
        for x, y in zip(x_BI.split(chunk), y_B.split(chunk), strict=True):
            outputs = self.forward(x.expand(len(self.settings), -1, -1))[2][-1]
            right += (outputs.argmax(dim=2) == y).sum(dim=1)
        return (right / len(x_BI)).tolist()

    def readings(self, x_BI: Tensor, y_B: Tensor) -> dict[str, list[list[float]]]:
        """Return by name, circuit and hidden layer what tells whether the circuit has assembled.

        ``laterals``: cosine of R and L^T between the streams of a hidden layer. ``feedback``: of W and V^T
        above it. ``update``: of the change of W below it to backprop's, before decay.
        """
        kept = [sign.clone() for sign in self.signs]
        count = len(self.settings)
        changes = self.changes(x_BI.expand(count, -1, -1), y_B.expand(count, -1))
        self.signs = kept
        found: dict[str, list[Tensor]] = {"laterals": [], "feedback": [], "update": []}
        for layer in range(self.top):
            here, above = self.synapses[layer], self.synapses[layer + 1]
            found["laterals"].append(_cosine(here["R"], above["L"].mT))
            found["feedback"].append(_cosine(above["W"], above["B"]))
            found["update"].append(_cosine(changes[layer]["W"], changes[layer]["bp"]))
        return {name: torch.stack(values, dim=1).tolist() for name, values in found.items()}


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    return F.cosine_similarity(a.flatten(1), b.flatten(1), dim=1)
