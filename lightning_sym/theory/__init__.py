"""Closed forms of the papers this package builds on: what the monitors should read, as numbers."""

from lightning_sym.theory.balance import DiagonalNetwork
from lightning_sym.theory.solvable import (
    SolvableModel,
    initial_size,
    kernel_growth,
    mechanism,
    pace,
    regime,
)
from lightning_sym.theory.stepwise import (
    Staircase,
    aligned_scales,
    embedding_eigenvalues,
    final_embedding,
    final_weight,
    kernel_correlation,
    learning_times,
    pair_correlation,
    singular_values,
    staircase_loss,
    tangent_kernel,
)

__all__ = [
    "DiagonalNetwork",
    "SolvableModel",
    "Staircase",
    "aligned_scales",
    "embedding_eigenvalues",
    "final_embedding",
    "final_weight",
    "initial_size",
    "kernel_correlation",
    "kernel_growth",
    "learning_times",
    "mechanism",
    "pace",
    "pair_correlation",
    "regime",
    "singular_values",
    "staircase_loss",
    "tangent_kernel",
]
