"""What a step shows: hooks, sums, one reduction over ranks, one observation that all monitors read."""

from lightning_sym.observe.gradient_noise import GradientNoise as GradientNoise
from lightning_sym.observe.likeness import (
    layer_features as layer_features,
    representation_alignment as representation_alignment,
)
from lightning_sym.observe.moments import Moments as Moments
from lightning_sym.observe.observation import (
    LayerObservation as LayerObservation,
    Observation as Observation,
)
from lightning_sym.observe.reading import Reading as Reading
from lightning_sym.observe.schedule import Every as Every, LogSpaced as LogSpaced, Schedule as Schedule
from lightning_sym.observe.wants import Wants as Wants
