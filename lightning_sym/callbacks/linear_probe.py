"""How far does a linear classifier get on the representation?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from lightning_sym.callbacks.base import at_least
from lightning_sym.callbacks.representation import RepresentationProbe
from lightning_sym.functional.neighbours import linear_classifier


class LinearProbe(RepresentationProbe):
    """Accuracy of a linear classifier on frozen features, fitted anew each time.

    Logistic regression on standardised features without augmentation, solved to convergence
    (:func:`~lightning_sym.functional.neighbours.linear_classifier`): readings depend on the
    representation alone, not on a head's learning rate.

    Logs:
        ``linear/accuracy``: share of validation samples classified right, in [0, 1], over all ranks; at
            step 0 that of the untrained backbone; NaN if a feature is not finite.
        ``linear/train_accuracy``: the same on the samples it was fitted to.

    Args:
        l2: weight of the squared norm.
        solver_steps: L-BFGS iterations at most.
        options: ``train``, ``val``, ``every_n_epochs``, ``at_start``, ``max_train``, ``max_val``,
            ``represent``, ``inputs``, ``targets``, ``seed``, ``keep``, ``name`` and ``strict``, see
            :class:`~lightning_sym.callbacks.representation.RepresentationProbe`.

    Raises:
        ValueError: if an argument is out of its range; at fit start, if there are no loaders.
        TypeError: at fit start, if ``represent`` is not a method of the module.
    """

    quantity: ClassVar[str] = "linear"
    judges_training = True

    def __init__(self, *, l2: float = 1e-3, solver_steps: int = 100, **options: Any) -> None:
        super().__init__(**options)
        at_least("l2", l2, 0)
        at_least("solver_steps", solver_steps, 1)
        self.l2, self.solver_steps = l2, solver_steps

    @override
    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "l2": self.l2}

    @override
    def learn(self, features: Tensor, labels: Tensor, classes: int) -> Callable[[Tensor], Tensor]:
        weight, bias = linear_classifier(
            features, labels=labels, classes=classes, l2=self.l2, steps=self.solver_steps
        )
        return lambda x_NF: F.linear(x_NF, weight, bias).argmax(dim=1)
