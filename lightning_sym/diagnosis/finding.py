"""A finding: one thing that is wrong with a network, where, since when, why, and what to do about it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

Level = Literal["note", "warning", "alarm"]
LEVELS: tuple[Level, ...] = ("note", "warning", "alarm")


@dataclass(frozen=True)
class Finding:
    """What a rule found.

    Args:
        kind: the rule's name, such as ``"dead_units"``.
        level: ``"note"`` (worth knowing), ``"warning"`` (may hurt) or ``"alarm"`` (learning is impaired).
        layer: name of the layer, or ``""`` for the whole network.
        step: optimizer step at which it began; 0 where weights alone were looked at.
        value: the number that was read.
        limit: the number that it passed.
        message: one sentence: what was found.
        cause: what drives it, as far as the readings tell; ``"not known"`` else.
        remedy: one sentence: what to do.

    Raises:
        ValueError: if ``level`` is another word.
    """

    kind: str
    level: Level
    layer: str
    step: int
    value: float
    limit: float
    message: str
    cause: str = "not known"
    remedy: str = ""

    def __post_init__(self) -> None:
        if self.level not in LEVELS:
            raise ValueError(f"level must be among {LEVELS}, got {self.level!r}")

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain values, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        where = f" in {self.layer}" if self.layer else ""
        since = f" since step {self.step}" if self.step else ""
        found = f"{self.level}: {self.kind}{where}{since}. {self.message}"
        return f"{found} Cause: {self.cause}. {self.remedy}".strip()
