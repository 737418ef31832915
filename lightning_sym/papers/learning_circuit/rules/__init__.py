"""Layers of a learning circuit, and the rules by which their synapses change."""

from lightning_sym.papers.learning_circuit.rules.four_synapse import FourSynapse as FourSynapse
from lightning_sym.papers.learning_circuit.rules.geometry import (
    Conv as Conv,
    Dense as Dense,
    Geometry as Geometry,
)
from lightning_sym.papers.learning_circuit.rules.rule import (
    RULES as RULES,
    Rule as Rule,
    Site as Site,
    register_rule as register_rule,
)
from lightning_sym.papers.learning_circuit.rules.transport import (
    Backprop as Backprop,
    FeedbackAlignment as FeedbackAlignment,
    KolenPollack as KolenPollack,
)
