"""Formation of representations: six matrices of a layer become powers of one another.

Ziyin et al., 2024, arXiv 2410.03006. On both sides of a layer, the second moments of activations and of
their gradients and the Gram matrix of the weight align in pairs (six relations, the canonical
representation hypothesis) where gradient noise and weight decay balance. Where only one relation of each
side holds, all six matrices are powers of one another, with exponents between -1 and 3 (the polynomial
alignment hypothesis).

Reproduced: ``examples/alignment_vs_decay.py``. Alignment rises with decay and with depth, as in the paper;
its level of 0.97 and more is not reached in 10,000 steps.

Read in any fit by :class:`lightning_sym.callbacks.AlignmentMonitor`, from
:mod:`lightning_sym.functional.alignment`. The room holds no code of its own.
"""
