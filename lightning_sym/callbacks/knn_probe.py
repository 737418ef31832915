"""How well do nearest neighbours in the representation share a class?"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor
from typing_extensions import override

from lightning_sym.callbacks._quiet import gather_rows
from lightning_sym.callbacks._representation import RepresentationProbe, accuracy
from lightning_sym.functional.neighbours import neighbour_vote


class KNNProbe(RepresentationProbe):
    """Accuracy of a nearest-neighbour vote in the representation; nothing is trained.

    The vote is weighted by similarity (Wu et al., 2018, arXiv:1805.01978; see
    :func:`~lightning_sym.functional.neighbours.neighbour_vote`).

    Logs:
        ``knn/accuracy``: share of validation images whose class wins the vote, in [0, 1], over all
            ranks; at step 0 that of the untrained backbone.

    Args:
        k: neighbours that vote.
        temperature: of their weights.
        options: ``train``, ``val``, ``every_n_epochs``, ``at_start``, ``max_train``, ``max_val``,
            ``represent``, ``seed`` and ``strict``, see
            :class:`~lightning_sym.callbacks._representation.RepresentationProbe`.

    Raises:
        ValueError: if an argument is out of its range; at fit start, if there are no loaders.
        TypeError: at fit start, if ``represent`` is not a method of the module.
    """

    quantity: ClassVar[str] = "knn"

    def __init__(self, *, k: int = 20, temperature: float = 0.07, **options: Any) -> None:
        super().__init__(**options)
        if k < 1 or not temperature > 0:
            raise ValueError(f"k and temperature must be positive, got {k} and {temperature}")
        self.k, self.temperature = k, temperature
        self.settings = {"k": k, "temperature": temperature}

    @override
    def evaluate(
        self, train: tuple[Tensor, Tensor], val: tuple[Tensor, Tensor], classes: int
    ) -> dict[str, float]:
        scores = val[0].new_zeros(0, classes)
        if len(val[1]):
            scores = neighbour_vote(
                val[0],
                bank=train[0],
                labels=train[1],
                classes=classes,
                k=self.k,
                temperature=self.temperature,
            )
        return {"accuracy": accuracy(gather_rows(scores.argmax(dim=1)), gather_rows(val[1]), classes)}
