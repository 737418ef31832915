"""Callbacks to add to a ``Trainer``: monitors that only watch, and techniques that change training."""

from lightning_sym.callbacks.alignment import AlignmentMonitor as AlignmentMonitor
from lightning_sym.callbacks.base import Monitor as Monitor
from lightning_sym.callbacks.collapse import CollapseMonitor as CollapseMonitor
from lightning_sym.callbacks.composition import CompositionMonitor as CompositionMonitor
from lightning_sym.callbacks.eigenmodes import EigenmodeMonitor as EigenmodeMonitor
from lightning_sym.callbacks.knn_probe import KNNProbe as KNNProbe
from lightning_sym.callbacks.linear_probe import LinearProbe as LinearProbe
from lightning_sym.callbacks.plasticity import PlasticityMonitor as PlasticityMonitor
from lightning_sym.callbacks.presets import Monitors as Monitors, monitors as monitors
from lightning_sym.callbacks.syre import Syre as Syre
