r"""syre: weight decay towards a frozen random point, which removes parameter symmetries.

The training follows :math:`\ell(\theta + \theta_0) + \gamma\,\theta^\top D\,\theta` with a random
:math:`\theta_0` that is drawn once (Ziyin, Xu, Chuang, 2024, arXiv 2408.15495). In the weights that the
model holds, :math:`\phi = \theta + \theta_0`, that is decay of strength ``weight_decay`` (:math:`2\gamma`)
towards :math:`\theta_0` instead of 0.

How a step is made, and what it costs beyond the optimizer's own:

* coupled decay (SGD, Adam, RMSprop, Adagrad, ...: ``grad + weight_decay * param``): after the closure the
  gradient takes on ``-weight_decay * theta_0``, and has it until it is zeroed. One pass: reads two
  tensors, writes one.
* decoupled decay (AdamW, ...: ``param * (1 - lr * weight_decay)``): before the update the parameter goes
  the share ``lr * weight_decay`` of its way to ``theta_0``, in place of the optimizer's own decay, which
  is 0 for the length of the update. One pass, likewise. (Added to what the optimizer shrinks by itself,
  ``lr * weight_decay * theta_0`` would be below float32's resolution of the weight, and lost.)
* any other optimizer: the parameters are moved to :math:`\theta` for the update and back after it. Two
  passes; right for whatever the optimizer does with its parameters, but for the rounding of the two moves.

Memory: :math:`\theta_0` takes as much as the weights it is for (and as much again with anisotropy).
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from lightning_sym._names import clean_name

if TYPE_CHECKING:
    from lightning_sym.symmetry import Symmetry

#: Optimizers that add ``weight_decay * param`` to the gradient, unless their group says otherwise.
COUPLED = ("SGD", "Adam", "RMSprop", "Adagrad", "Adamax", "NAdam", "RAdam", "Adadelta")
#: Optimizers that shrink the parameter by ``lr * weight_decay`` before their update.
DECOUPLED = ("AdamW",)


class SyreHandle:
    """What :func:`attach_syre` returns: the offsets, and the way back.

    Attributes:
        sigma, anisotropy, seed: as attached.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        named: dict[Tensor, str] | None,
        *,
        sigma: float,
        anisotropy: float,
        seed: int,
        relative: bool,
    ) -> None:
        self._optimizer, self._named, self._relative = optimizer, named, relative
        self.sigma, self.anisotropy, self.seed = sigma, anisotropy, seed
        self._offsets: dict[Tensor, Tensor] = {}
        self._stretches: dict[Tensor, Tensor] = {}
        self._names: dict[Tensor, str] = {}
        self._groups = 0  # how many of the optimizer's groups have what they get
        self._route = _route(optimizer)
        self._draw()
        self._shifted: list[Tensor] = []
        self._decays: list[tuple[dict[str, Any], Any]] = []  # of groups whose decay we made in this step
        self._hooks = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        ]

    def _draw(self) -> None:
        """Draw offsets for groups that have come in since the last look.

        Raises:
            ValueError: if two parameters have one name.
        """
        groups = self._optimizer.param_groups[self._groups :]
        if not groups:
            return
        self._names |= _names(groups, self._named, first=self._groups)
        if len(set(self._names.values())) < len(self._names):
            raise ValueError("named_parameters gives two parameters one name; theta_0 is drawn by name")
        self._groups += len(groups)
        for group in groups:
            for parameter in group["params"]:
                if parameter.ndim < 2 or not parameter.requires_grad or not group.get("weight_decay", 0):
                    continue
                key = f"{self.seed}/{self._names[parameter]}"
                scale = self.sigma / (math.sqrt(math.prod(parameter.shape[1:])) if self._relative else 1)
                self._offsets[parameter] = _like(parameter, scale * _normal(parameter, f"offset/{key}"))
                if self.anisotropy:
                    uniform = torch.erf(_normal(parameter, f"stretch/{key}") / math.sqrt(2))  # on (-1, 1)
                    self._stretches[parameter] = _like(parameter, self.anisotropy * uniform)

    @property
    def names(self) -> list[str]:
        """Names of the parameters that have an offset."""
        self._draw()
        return [self._names[parameter] for parameter in self._offsets]

    @property
    def decays(self) -> list[float]:
        """The optimizer's weight decays, group by group: the strength at this moment."""
        return [float(group.get("weight_decay", 0.0)) for group in self._optimizer.param_groups]

    def offset(self, parameter: Tensor) -> Tensor:
        """Return theta_0 of a parameter, of its shape; zero for one that has none.

        Raises:
            KeyError: if the parameter is not one of the optimizer's.
        """
        self._draw()
        if parameter in self._offsets:
            return self._offsets[parameter].clone()
        if parameter not in self._names:
            raise KeyError("parameter is not one of the optimizer's")
        return torch.zeros_like(parameter, requires_grad=False)

    def offsets(self) -> dict[str, Tensor]:
        """Return theta_0 by parameter name."""
        self._draw()
        return {self._names[parameter]: value.clone() for parameter, value in self._offsets.items()}

    def residual_force(self, symmetries: Iterable[Symmetry]) -> dict[Symmetry, Tensor]:
        r"""Return the push away from each symmetry's mirrors: its strength of removal.

        On a mirror the loss has no gradient across it. What is left is the decay's,
        :math:`\| P\, w\, \theta_0 \|` with :math:`w` the weight decay and :math:`P` the projection
        across the mirror; D is left out, being close to 1.

        Args:
            symmetries: what :func:`~lightning_sym.symmetry.find_symmetries` found in the module whose
                names the offsets have.

        Returns:
            By symmetry, the force for each of its units; 0: still a place to be stuck in.

        Raises:
            ValueError: if no symmetry moves a parameter of the optimizer: names of another module.
        """
        forces, found = self.forces(), list(symmetries)
        if found and not any(name in forces for symmetry in found for name in symmetry.parameters):
            raise ValueError(
                f"symmetries must be of the module whose names the offsets have ({', '.join([*forces][:3])}, "
                f"...), got {', '.join([*found[0].parameters][:3])}, ...: pass named_parameters of the "
                "module that find_symmetries was given"
            )
        return {symmetry: symmetry.mirror_norm(forces) for symmetry in found}

    def forces(self) -> dict[str, Tensor]:
        """Return what the decay pulls with at weights of zero, ``weight_decay * theta_0``, by name.

        Every parameter of the optimizer is there; those without an offset are pulled by nothing.
        """
        self._draw()
        return {
            self._names[parameter]: self.offset(parameter) * float(group.get("weight_decay", 0.0))
            for group in self._optimizer.param_groups
            for parameter in group["params"]
        }

    @torch.no_grad()
    def shift(self) -> None:
        """Add theta_0 to the weights, as ``start="shift"`` does: once, when training begins."""
        for parameter, offset in self._offsets.items():
            parameter += offset

    def remove(self) -> None:
        """Give the optimizer back: the weights stay as they are, the decay goes to 0 again."""
        self._unshift()
        while self._hooks:
            self._hooks.pop().remove()

    # -- the step ------------------------------------------------------------------------------

    def _before(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._unshift()  # a step that raised did not come to its end
        self._draw()
        place = "kwargs" if kwargs.get("closure") is not None else "args"
        closure = kwargs.get("closure") if place == "kwargs" else (args[1] if len(args) > 1 else None)
        if closure is None:
            self._apply()
            return None

        def adjusted() -> Any:
            self._unshift()  # a line search calls the closure again
            loss = closure()
            self._apply()
            return loss

        if place == "kwargs":
            return args, {**kwargs, "closure": adjusted}
        return (args[0], adjusted, *args[2:]), kwargs

    def _after(self, *_: Any) -> None:
        self._unshift()

    @torch.no_grad()
    def _apply(self) -> None:
        found_inf = getattr(self._optimizer, "found_inf", None)
        if found_inf is not None and bool(found_inf.sum() > 0):
            return  # a fused optimizer under a GradScaler: the step will not be made
        if not self.sigma and not self.anisotropy:
            return  # theta_0 is 0, and the optimizer's own decay is right as it is
        for group in self._optimizer.param_groups:
            params = [p for p in group["params"] if p in self._offsets and p.grad is not None]
            if not params:
                continue
            if self._route == "shift":
                for kind in _by_kind(params):
                    torch._foreach_sub_(kind, [self._offsets[p] for p in kind])
                self._shifted += params
                continue
            decay = float(group["weight_decay"])
            if decay == 0:
                continue
            if _is_decoupled(self._optimizer, group):
                rate = float(group["lr"]) * decay
                if params[0].dtype != torch.float64:  # the factor that the optimizer itself would round to
                    rate = 1 - float(torch.tensor(1 - rate, dtype=torch.float32))
                for kind in _by_kind(params):
                    torch._foreach_lerp_(kind, self._pulls(kind), rate)
                for kind in _by_kind(
                    p for p in group["params"] if p not in self._offsets and p.grad is not None
                ):
                    torch._foreach_mul_(kind, 1 - rate)
                self._decays.append((group, group["weight_decay"]))
                group["weight_decay"] = 0.0
                continue
            scale = getattr(self._optimizer, "grad_scale", None)
            alpha = -decay * (float(scale) if scale is not None else 1.0)
            alpha = -alpha if group["maximize"] else alpha  # the optimizer turns the gradient round
            for kind in _by_kind(params):
                grads = [p.grad for p in kind if p.grad is not None]
                torch._foreach_add_(grads, self._pulls(kind), alpha=alpha)

    def _pulls(self, params: list[Tensor]) -> list[Tensor]:
        """Return ``theta_0 - (D - 1) (phi - theta_0)``: what native decay, ``phi``, is off by."""
        offsets = [self._offsets[p] for p in params]
        if not self._stretches:
            return offsets
        return [offset - self._stretches[p] * (p - offset) for p, offset in zip(params, offsets, strict=True)]

    @torch.no_grad()
    def _unshift(self) -> None:
        while self._decays:
            group, decay = self._decays.pop()
            group["weight_decay"] = decay
        if self._shifted:
            params, self._shifted = self._shifted, []
            for kind in _by_kind(params):
                torch._foreach_add_(kind, [self._offsets[p] for p in kind])


def attached(optimizer: torch.optim.Optimizer) -> list[SyreHandle]:
    """Return the handles of what :func:`attach_syre` put on an optimizer and nobody removed: one or none."""
    owners = [getattr(hook, "__self__", None) for hook in optimizer._optimizer_step_pre_hooks.values()]
    return [owner for owner in owners if isinstance(owner, SyreHandle)]


def attach_syre(
    optimizer: torch.optim.Optimizer,
    *,
    sigma: float = 0.01,
    anisotropy: float = 0.0,
    seed: int = 0,
    named_parameters: Iterable[tuple[str, Tensor]] | None = None,
    relative: bool = True,
    start: Literal["keep", "shift"] = "keep",
) -> SyreHandle:
    """Turn an optimizer's weight decay into decay towards a frozen random point.

    Offsets are given to trainable tensors of two dimensions or more in groups whose ``weight_decay``
    is not 0. Biases and normalisation gains (one dimension) keep their ordinary decay: gains are
    centred at 1, to which an offset around 0 would do nothing useful. Frozen tensors are left alone.
    What is frozen or free of decay at this moment stays without an offset; a group that comes in later
    (``add_param_group``) is looked at by the same rule at the next step, and its weights stay as they are.

    Args:
        optimizer: any ``torch.optim.Optimizer``, or a wrapper with one in its attribute ``optimizer``
            (Lightning's, in manual optimization). Its own ``weight_decay`` is the strength, and may
            change during training.
        sigma: standard deviation of theta_0: relative to ``1 / sqrt(fan_in)`` of each tensor (fan_in: the
            product of all dimensions but the first), or absolute.
        anisotropy: b of ``D = 1 + U(-b, b)``, in [0, 1); 0: D is the identity. It breaks rotations
            too. Only for optimizers whose decay is known to be coupled or decoupled.
        seed: of theta_0 and D. Both depend on the seed, the parameter's name and shape alone: the same on
            every rank, under sharding, and after a restart.
        named_parameters: where names come from, usually ``module.named_parameters()``; ``None``:
            places in the optimizer's groups. What ``torch.compile`` and FSDP put into names is taken out;
            of ``DistributedDataParallel`` give the module inside.
        relative: whether ``sigma`` is relative to the initialisation scale.
        start: ``"keep"``: the model's weights stay as they are, and theta is what theta_0 leaves of
            them; ``"shift"``: theta_0 is added to them, as if training began at theta.

    Returns:
        A handle: ``offset(parameter)``, ``offsets()``, ``remove()``.

    Raises:
        ValueError: if an argument is out of its range, names are missing or ambiguous, parameters have no
            shape yet (lazy layers), or syre is attached to the optimizer already.
        TypeError: if ``optimizer`` is none, ``seed`` no integer, or ``named_parameters`` no pairs.

    Warns:
        UserWarning: once, if no group decays (syre then does nothing), if an offset is larger than its
            weights (training then starts far from where theta_0 pulls), or if weights are of half
            precision (which is too coarse for the pull).

    Example:
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1)
        >>> handle = attach_syre(optimizer, named_parameters=model.named_parameters())
        >>> handle.names
        ['weight']
    """
    inner = getattr(optimizer, "optimizer", optimizer)
    if not isinstance(inner, torch.optim.Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    optimizer = inner
    if any(is_lazy(p) for group in optimizer.param_groups for p in group["params"]):
        raise ValueError(
            "optimizer has parameters without a shape, of lazy layers; run a batch through the module before"
        )
    if not isinstance(seed, int):
        raise TypeError(f"seed must be an integer, got {seed!r}")
    if not sigma >= 0 or not math.isfinite(sigma):
        raise ValueError(f"sigma must be finite and at least 0, got {sigma}")
    if not 0 <= anisotropy < 1:
        raise ValueError(f"anisotropy must be in [0, 1), got {anisotropy}")
    if start not in ("keep", "shift"):
        raise ValueError(f"start must be 'keep' or 'shift', got {start!r}")
    if anisotropy and _route(optimizer) == "shift":
        raise ValueError(
            f"anisotropy={anisotropy} needs an optimizer whose decay is known, one of "
            f"{', '.join(COUPLED + DECOUPLED)}; got {type(optimizer).__name__}"
        )
    if attached(optimizer):
        raise ValueError("syre is attached to this optimizer already: call its handle's remove() first")
    named: dict[Tensor, str] | None = None
    if named_parameters is not None:
        named = _named(named_parameters)
    handle = SyreHandle(optimizer, named, sigma=sigma, anisotropy=anisotropy, seed=seed, relative=relative)
    offsets = handle._offsets
    too_large = [handle._names[p] for p, offset in offsets.items() if _norm(offset) > _norm(p)]
    coarse = [handle._names[p] for p in offsets if p.dtype in (torch.bfloat16, torch.float16)]
    if not offsets:
        warnings.warn(
            "syre does nothing: no parameter group has both a weight_decay above 0 and a trainable tensor of "
            "two dimensions or more",
            stacklevel=2,
        )
    if too_large:
        warnings.warn(
            f"syre's offset is larger than the weights of {', '.join(too_large)}; sigma={sigma} should be "
            "well below the initialisation scale",
            stacklevel=2,
        )
    if coarse:
        warnings.warn(
            f"syre's pull is mostly lost to rounding in the half-precision weights of {', '.join(coarse)}; "
            "keep the optimizer's weights in float32 (mixed precision does)",
            stacklevel=2,
        )
    if start == "shift":
        handle.shift()
    return handle


def _route(optimizer: torch.optim.Optimizer) -> Literal["native", "shift"]:
    known = type(optimizer).__module__.startswith("torch.optim")
    return "native" if known and type(optimizer).__name__ in COUPLED + DECOUPLED else "shift"


def _by_kind(params: Iterable[Tensor]) -> list[list[Tensor]]:
    """Return parameters that one foreach call takes together: plain ones, and DTensors of each mesh."""
    kinds: dict[Any, list[Tensor]] = {}
    for parameter in params:
        kinds.setdefault(getattr(parameter, "device_mesh", None), []).append(parameter)
    return list(kinds.values())


def _is_decoupled(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> bool:
    return type(optimizer).__name__ in DECOUPLED or bool(group.get("decoupled_weight_decay", False))


def _named(pairs: Iterable[tuple[str, Tensor]]) -> dict[Tensor, str]:
    """Return the clean names of parameters.

    Raises:
        TypeError: if these are no pairs of a name and a parameter.
    """
    named: dict[Tensor, str] = {}
    wanted = (
        "named_parameters must be pairs of a name and a parameter, as module.named_parameters() gives them"
    )
    if isinstance(pairs, torch.nn.Module):
        raise TypeError(f"{wanted}; got the module")
    for pair in pairs:
        if not (isinstance(pair, tuple | list) and len(pair) == 2 and isinstance(pair[0], str)):
            raise TypeError(f"{wanted}; got a {type(pair).__name__}")
        named.setdefault(pair[1], clean_name(pair[0]))
    return named


def _names(
    groups: Sequence[dict[str, Any]], named: dict[Tensor, str] | None, *, first: int
) -> dict[Tensor, str]:
    """Return a name for each parameter of an optimizer's groups, the first of which has this place.

    Raises:
        ValueError: if a parameter has no name.
    """
    own = {p: f"{g}.{i}" for g, group in enumerate(groups, first) for i, p in enumerate(group["params"])}
    if named is None:
        return own
    missing = [place for parameter, place in own.items() if parameter not in named]
    if missing:
        raise ValueError(
            f"named_parameters lacks {len(missing)} of the optimizer's parameters "
            f"(places {', '.join(missing[:5])})"
        )
    return {parameter: named[parameter] for parameter in own}


def _normal(parameter: Tensor, key: str) -> Tensor:
    """Return standard normal numbers, float64, that depend on the key and the full shape alone."""
    digest = hashlib.sha256(key.encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.randn(tuple(parameter.shape), generator=generator, dtype=torch.float64)


def _norm(tensor: Tensor) -> float:
    """Return the norm of a whole tensor, a sharded one's over all ranks."""
    gather = getattr(tensor, "full_tensor", None)
    return float((tensor if gather is None else gather()).detach().norm())


def _like(parameter: Tensor, value: Tensor) -> Tensor:
    """Return a value in the parameter's precision, on its device, sharded as it is."""
    value = value.to(parameter.dtype).to(parameter.device)
    if getattr(parameter, "placements", None) is None:
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, parameter.device_mesh, parameter.placements)  # type: ignore[attr-defined]
