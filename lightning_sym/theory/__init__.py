"""Closed forms of the papers this package builds on: what the monitors should read, as numbers."""

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
    "Staircase",
    "aligned_scales",
    "embedding_eigenvalues",
    "final_embedding",
    "final_weight",
    "kernel_correlation",
    "learning_times",
    "pair_correlation",
    "singular_values",
    "staircase_loss",
    "tangent_kernel",
]
