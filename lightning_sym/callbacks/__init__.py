"""Callbacks to add to a ``Trainer``: monitors that only watch, and techniques that change training."""

from lightning_sym.callbacks.alignment import AlignmentMonitor as AlignmentMonitor
from lightning_sym.callbacks.balance import BalanceMonitor as BalanceMonitor
from lightning_sym.callbacks.base import Monitor as Monitor
from lightning_sym.callbacks.circuit import CircuitMonitor as CircuitMonitor
from lightning_sym.callbacks.collapse import CollapseMonitor as CollapseMonitor
from lightning_sym.callbacks.composition import CompositionMonitor as CompositionMonitor
from lightning_sym.callbacks.diagnosis import Diagnosis as Diagnosis
from lightning_sym.callbacks.eigenmodes import EigenmodeMonitor as EigenmodeMonitor
from lightning_sym.callbacks.feature_learning import FeatureLearningMonitor as FeatureLearningMonitor
from lightning_sym.callbacks.hierarchy import HierarchyMonitor as HierarchyMonitor
from lightning_sym.callbacks.knn_probe import KNNProbe as KNNProbe
from lightning_sym.callbacks.linear_probe import LinearProbe as LinearProbe
from lightning_sym.callbacks.plasticity import PlasticityMonitor as PlasticityMonitor
from lightning_sym.callbacks.presets import Monitors as Monitors, monitors as monitors
from lightning_sym.callbacks.representation import RepresentationProbe as RepresentationProbe
from lightning_sym.callbacks.sharpness import SharpnessMonitor as SharpnessMonitor
from lightning_sym.callbacks.signal import SignalMonitor as SignalMonitor
from lightning_sym.callbacks.syre import Syre as Syre
from lightning_sym.engine.schedule import EpochEnds as EpochEnds, Every as Every, LogSpaced as LogSpaced
