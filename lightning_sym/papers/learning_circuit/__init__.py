"""A biologically plausible learning circuit that assembles itself.

Liao et al., 2024, arXiv 2412.20018. An ascending and a descending stream are joined by lateral synapses;
four kinds of synapses learn at once, each from what it touches (the other pathway's drive on its target
times its own input). No weight is transported, the initial connectivity is random, and the circuit is said
to come to learn as well as backprop.

Reproduced: ``examples/self_assembly.py``, on MNIST. The paper's equations were not available: the
four-synapse rule here is a reconstruction (:class:`FourSynapse`). It and the Kolen-Pollack rule come within
0.6 points of backprop's 97.9 %, feedback alignment 3.5 below; but only with lateral synapses that begin at
the identity, which is not self-assembly: with random ones every setting tried diverged.

Read in any fit by :class:`lightning_sym.callbacks.CircuitMonitor`. The room holds the circuit
(:class:`LearningCircuit`) and the rules by which its synapses change.
"""

from lightning_sym.papers.learning_circuit.circuit import (
    CircuitDivergenceError as CircuitDivergenceError,
    LearningCircuit as LearningCircuit,
)
from lightning_sym.papers.learning_circuit.rules import (
    RULES as RULES,
    Backprop as Backprop,
    Conv as Conv,
    Dense as Dense,
    FeedbackAlignment as FeedbackAlignment,
    FourSynapse as FourSynapse,
    Geometry as Geometry,
    KolenPollack as KolenPollack,
    Rule as Rule,
    Site as Site,
    register_rule as register_rule,
)
