"""Formation of representations: six matrices of a layer become powers of one another.

Ziyin et al., 2024, arXiv 2410.03006. On both sides of a layer, the second moments of activations and of
their gradients and the Gram matrix of the weight align in pairs (six relations, the canonical
representation hypothesis) where gradient noise and weight decay balance. Where only one relation of each
side holds, all six matrices are powers of one another, with exponents between -1 and 3 (the polynomial
alignment hypothesis).

Verdicts, by ``examples/canonical_representation.py``, tanh networks on a noisy tanh teacher, five seeds:

* *reproduced*: at decays of 1e-3 and more RGA of the input side is at least 0.97 in layers 3 to 5, and all
  six relations rise with decay and depth while the ranks fall. Gradient noise is what balances decay:
  without label noise the same networks come to 0.71 to 0.86.
* *direction only* at a decay of 1.3e-4 (0.91 to 0.96, paper 0.97), which takes 77,000 steps to act.
* *direction only* at the output layer: the gradient there is the labels' noise, the same in all directions,
  and the representation is the teacher's (0.76; 0.82 with a teacher of orthogonal outputs).
* *not seen*: G = decay^2 H. Single samples' gradients are those of the labels' noise, whatever the decay.

Read in any fit by :class:`lightning_sym.callbacks.AlignmentMonitor`, from
:mod:`lightning_sym.functional.alignment`. The room holds no code of its own.
"""
