"""What a step shows: hooks, sums, one reduction over ranks, one observation that all monitors read."""

from lightning_sym.observe.moments import Moments as Moments
from lightning_sym.observe.observation import (
    LayerObservation as LayerObservation,
    Observation as Observation,
)
from lightning_sym.observe.observer import Wants as Wants
from lightning_sym.observe.reading import Reading as Reading
from lightning_sym.observe.schedule import Every as Every, LogSpaced as LogSpaced, Schedule as Schedule
