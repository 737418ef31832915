"""A biologically plausible learning circuit that assembles itself.

Liao et al., 2024, arXiv 2412.20018. An ascending and a descending stream are joined by lateral synapses;
four kinds of synapses learn at once, each from what it touches (the other pathway's drive on its target
times its own input). No weight is transported, the initial connectivity is random, and the circuit is said
to come to learn as well as backprop.

The paper's equations were not available: the four-synapse rule here is a reconstruction
(:class:`FourSynapse`). Verdicts:

* *direction only* (``examples/self_assembly_random.py``, digits, five seeds): from random laterals
  everywhere all five diverge, for a reason: an output lateral on the wrong side of its weight leads away for
  ever (of 16 other settings 14 diverge on digits and all on MNIST, ``examples/self_assembly.py --search``).
  With the output's lateral held at the identity (the error keeps its sign: an assumption) the hidden ones
  assemble: the cosine of R and L' goes from 0 to 0.37, frozen ones stay at 0. At a decay of 0.03 that is
  worth 1.7 to 6.4 points of accuracy over frozen laterals, at 0.1 15 to 35, in every seed; at 0.01 two to
  five points are missing to backprop.
* *not seen*: that a local sign for each neuron (arXiv 2505.02248, in our reading) makes up for random
  output laterals: all five seeds diverge.
* ``examples/self_assembly.py``, MNIST, from *identity* laterals, which is not self-assembly: the
  four-synapse rule and Kolen-Pollack come within 0.6 points of backprop's 97.9 %, feedback alignment 3.5
  below.

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
