"""How well do nearest neighbours in the representation share a class?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor
from typing_extensions import override

from lightning_sym.callbacks.representation import RepresentationProbe
from lightning_sym.functional.neighbours import neighbour_vote


class KNNProbe(RepresentationProbe):
    """Accuracy of a nearest-neighbour vote in the representation; nothing is trained.

    The vote is weighted by similarity (Wu et al., 2018, arXiv:1805.01978; see
    :func:`~lightning_sym.functional.neighbours.neighbour_vote`).

    Logs:
        ``knn/accuracy``: share of validation samples whose class wins the vote, in [0, 1], over all
            ranks; at step 0 that of the untrained backbone; NaN if a feature is not finite.

    Args:
        k: neighbours that vote.
        temperature: of their weights.
        options: ``train``, ``val``, ``every_n_epochs``, ``at_start``, ``max_train``, ``max_val``,
            ``represent``, ``inputs``, ``targets``, ``seed``, ``keep``, ``name`` and ``strict``, see
            :class:`~lightning_sym.callbacks.representation.RepresentationProbe`.

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

    @override
    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "k": self.k, "temperature": self.temperature}

    @override
    def learn(self, features: Tensor, labels: Tensor, classes: int) -> Callable[[Tensor], Tensor]:
        def find(queries: Tensor) -> Tensor:
            how = {"k": self.k, "temperature": self.temperature}
            votes = neighbour_vote(queries, bank=features, labels=labels, classes=classes, **how)  # type: ignore[arg-type]
            return votes.argmax(dim=1)

        return find
