"""Statistics: what is kept of a layer during one optimizer step. One small class a file."""

from lightning_sym.observe.statistics.activity import Activity as Activity, UnitActivity as UnitActivity
from lightning_sym.observe.statistics.class_means import ClassMeans as ClassMeans, ClassSums as ClassSums
from lightning_sym.observe.statistics.gradient_noise import (
    GradientNoise as GradientNoise,
    NoiseMoments as NoiseMoments,
)
from lightning_sym.observe.statistics.gradient_size import GradientSize as GradientSize
from lightning_sym.observe.statistics.second_moments import (
    SampleMoments as SampleMoments,
    SecondMoments as SecondMoments,
)
from lightning_sym.observe.statistics.statistic import Statistic as Statistic, Tally as Tally
from lightning_sym.observe.statistics.weight import (
    Weight as Weight,
    WeightUpdate as WeightUpdate,
    ZeroGradients as ZeroGradients,
)
