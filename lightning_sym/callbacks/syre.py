"""syre for every optimizer of a Trainer."""

from __future__ import annotations

from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from lightning_sym.optim.syre import SyreHandle, attach_syre


class Syre(Callback):
    """Attaches :func:`~lightning_sym.optim.syre.attach_syre` to every optimizer of the fit.

    The strength is each optimizer's own ``weight_decay``. theta_0 is not stored in checkpoints: it is
    drawn again from the seed and the parameters' names, and a resumed run continues bitwise.

    Args:
        sigma: standard deviation of theta_0, relative to each tensor's ``1 / sqrt(fan_in)``, or absolute.
        anisotropy: b of ``D = 1 + U(-b, b)``, in [0, 1).
        seed: of theta_0 and D.
        relative: whether ``sigma`` is relative to the initialisation scale.
        start: ``"keep"`` the model's weights as they are, or ``"shift"`` them by theta_0 before the first
            step (at the train start, after the sanity check). A run goes on, and is not shifted, if its
            Trainer has made steps (resumed from a checkpoint, or a second ``fit`` of one Trainer) or if the
            checkpoint was written after the shift.

    Attributes:
        handles: one :class:`~lightning_sym.optim.syre.SyreHandle` an optimizer, during the fit.

    Raises:
        TypeError: if ``seed`` is no integer.
        ValueError: if an argument is out of its range, or if the checkpoint to be
            resumed was made with other settings.
    """

    def __init__(
        self,
        *,
        sigma: float = 0.01,
        anisotropy: float = 0.0,
        seed: int = 0,
        relative: bool = True,
        start: Literal["keep", "shift"] = "keep",
    ) -> None:
        if not isinstance(seed, int):
            raise TypeError(f"seed must be an integer, got {seed!r}")
        if not 0 <= sigma < float("inf"):
            raise ValueError(f"sigma must be finite and at least 0, got {sigma}")
        if not 0 <= anisotropy < 1:
            raise ValueError(f"anisotropy must be in [0, 1), got {anisotropy}")
        if start not in ("keep", "shift"):
            raise ValueError(f"start must be 'keep' or 'shift', got {start!r}")
        self.sigma, self.anisotropy, self.seed = sigma, anisotropy, seed
        self.relative, self.start = relative, start
        self.handles: list[SyreHandle] = []
        self._shifted = False  # whether the weights of this run have theta_0 added to them

    def _settings(self) -> dict[str, Any]:
        return {
            "sigma": self.sigma,
            "anisotropy": self.anisotropy,
            "seed": self.seed,
            "relative": self.relative,
        }

    @override
    def state_dict(self) -> dict[str, Any]:
        return {**self._settings(), "shifted": self._shifted}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name, value in self._settings().items():
            if state_dict[name] != value:
                raise ValueError(
                    f"{name}={value!r}, but the checkpoint was made with {name}={state_dict[name]!r}: "
                    "another theta_0 would be another loss"
                )
        self._shifted = bool(state_dict["shifted"])

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and trainer.global_step == 0:
            self._shifted = False  # another run with the same callback; a checkpoint is loaded after this

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._remove()
        self.handles = [
            attach_syre(
                optimizer,
                sigma=self.sigma,
                anisotropy=self.anisotropy,
                seed=self.seed,
                named_parameters=pl_module.named_parameters(),
                relative=self.relative,
            )
            for optimizer in trainer.optimizers
        ]

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Here, not at the fit's start: only now has every strategy loaded its checkpoint, and has a tuner
        # put back what it saved (which calls load_state_dict, and is no resumption).
        if self.start == "shift" and trainer.global_step == 0 and not self._shifted:
            for handle in self.handles:
                handle.shift()
            self._shifted = True

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._remove()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._remove()

    def _remove(self) -> None:
        for handle in self.handles:
            handle.remove()
