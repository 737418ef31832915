"""What one optimizer step shows of each layer. Needs torch alone."""

from lightning_sym.observe.coverage import Coverage as Coverage, coverage as coverage
from lightning_sym.observe.kinds.adapted import Adapter as Adapter, register_layer as register_layer
from lightning_sym.observe.layers import Layer as Layer, watchable_layers as watchable_layers
from lightning_sym.observe.likeness import (
    layer_features as layer_features,
    representation_alignment as representation_alignment,
)
from lightning_sym.observe.observation import (
    LayerObservation as LayerObservation,
    Observation as Observation,
)
from lightning_sym.observe.reading import Reading as Reading
from lightning_sym.observe.statistics import (
    Activity as Activity,
    ClassMeans as ClassMeans,
    GradientNoise as GradientNoise,
    GradientSize as GradientSize,
    SecondMoments as SecondMoments,
    Statistic as Statistic,
    Tally as Tally,
    Weight as Weight,
    WeightUpdate as WeightUpdate,
    ZeroGradients as ZeroGradients,
)
