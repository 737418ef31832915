"""How far does a linear classifier get on the representation?"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from lightning_sym.callbacks._quiet import gather_rows
from lightning_sym.callbacks._representation import RepresentationProbe, accuracy
from lightning_sym.functional.neighbours import linear_classifier


class LinearProbe(RepresentationProbe):
    """Accuracy of a linear classifier on frozen features, fitted anew each time.

    Logistic regression on standardised features without augmentation, solved to convergence
    (:func:`~lightning_sym.functional.neighbours.linear_classifier`): readings depend on the
    representation alone, not on a head's learning rate.

    Logs:
        ``linear/accuracy``: share of validation images classified right, in [0, 1], over all ranks; at
            step 0 that of the untrained backbone.
        ``linear/train_accuracy``: the same on the images it was fitted to.

    Args:
        l2: weight of the squared norm.
        solver_steps: L-BFGS iterations at most.
        options: ``train``, ``val``, ``every_n_epochs``, ``at_start``, ``max_train``, ``max_val``,
            ``represent``, ``seed`` and ``strict``, see
            :class:`~lightning_sym.callbacks._representation.RepresentationProbe`.

    Raises:
        ValueError: if an argument is out of its range; at fit start, if there are no loaders.
        TypeError: at fit start, if ``represent`` is not a method of the module.
    """

    quantity: ClassVar[str] = "linear"

    def __init__(self, *, l2: float = 1e-3, solver_steps: int = 100, **options: Any) -> None:
        super().__init__(**options)
        if not l2 >= 0:
            raise ValueError(f"l2 must be at least 0, got {l2}")
        if solver_steps < 1:
            raise ValueError(f"solver_steps must be at least 1, got {solver_steps}")
        self.l2, self.solver_steps = l2, solver_steps
        self.settings = {"l2": l2}

    @override
    def evaluate(
        self, train: tuple[Tensor, Tensor], val: tuple[Tensor, Tensor], classes: int
    ) -> dict[str, float]:
        weight, bias = linear_classifier(
            train[0], labels=train[1], classes=classes, l2=self.l2, steps=self.solver_steps
        )
        guess, learned = (F.linear(features, weight, bias).argmax(dim=1) for features, _ in (val, train))
        return {
            "accuracy": accuracy(gather_rows(guess), gather_rows(val[1]), classes),
            "train_accuracy": accuracy(learned, train[1], classes),
        }
