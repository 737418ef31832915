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
        start: ``"keep"`` the model's weights as they are, or ``"shift"`` them by theta_0 when a run
            begins (not when it is resumed).

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
        self._resumed = False

    def _settings(self) -> dict[str, Any]:
        return {
            "sigma": self.sigma,
            "anisotropy": self.anisotropy,
            "seed": self.seed,
            "relative": self.relative,
        }

    @override
    def state_dict(self) -> dict[str, Any]:
        return self._settings()

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name, value in self._settings().items():
            if state_dict[name] != value:
                raise ValueError(
                    f"{name}={value!r}, but the checkpoint was made with {name}={state_dict[name]!r}: "
                    "another theta_0 would be another loss"
                )
        self._resumed = True

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._remove()
        # Once: another fit with the same callback begins anew.
        resumed, self._resumed = self._resumed, False
        self.handles = [
            attach_syre(
                optimizer,
                sigma=self.sigma,
                anisotropy=self.anisotropy,
                seed=self.seed,
                named_parameters=pl_module.named_parameters(),
                relative=self.relative,
                start="keep" if resumed else self.start,
            )
            for optimizer in trainer.optimizers
        ]

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._remove()
        self._resumed = False  # sharded strategies load the state after the fit's start

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._remove()
        self._resumed = False

    def _remove(self) -> None:
        for handle in self.handles:
            handle.remove()
