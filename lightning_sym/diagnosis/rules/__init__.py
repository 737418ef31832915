"""Rules: each a small pure function from the course of a fit to what it finds; one file a family."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from lightning_sym.diagnosis.course import Course
from lightning_sym.diagnosis.finding import Finding
from lightning_sym.diagnosis.rules.attention import attention_collapse
from lightning_sym.diagnosis.rules.blocks import dead_block
from lightning_sym.diagnosis.rules.embeddings import (
    embedding_collapse_complete,
    embedding_collapse_dimensional,
)
from lightning_sym.diagnosis.rules.generative import mode_collapse, posterior_collapse
from lightning_sym.diagnosis.rules.gradients import exploding_gradients, vanishing_gradients
from lightning_sym.diagnosis.rules.learning import edge_of_stability, lazy_training, plasticity_loss
from lightning_sym.diagnosis.rules.loss import divergence
from lightning_sym.diagnosis.rules.rank import rank_collapse
from lightning_sym.diagnosis.rules.trained import frozen
from lightning_sym.diagnosis.rules.units import dead_units, equal_units, saturation
from lightning_sym.diagnosis.rules.weights import weights_vanish

Rule = Callable[[Course], Iterator[Finding]]

#: In the order of precedence: what comes first is told first, and explains what it entails.
RULES: tuple[Rule, ...] = (
    exploding_gradients,
    divergence,
    saturation,
    weights_vanish,
    posterior_collapse,
    dead_block,
    equal_units,
    dead_units,
    attention_collapse,
    mode_collapse,
    embedding_collapse_complete,
    embedding_collapse_dimensional,
    rank_collapse,
    vanishing_gradients,
    frozen,
    plasticity_loss,
    lazy_training,
    edge_of_stability,
)
