"""Mirror symmetries make constraints: sparsity, low rank and identical neurons.

Ziyin, 2023, arXiv 2309.16932. Where a reflection ``I - 2 O O^T`` leaves the loss as it is, ``O^T theta =
0`` is stationary for every sample, and enough weight decay makes the minimum lie there. Rescaling, rotation
and permutation symmetries contain such mirrors: they lead to zeros, to low rank and to equal units. The
other way round, a constraint can be imposed by a parametrization that has the mirror.

Verdicts, by ``examples/mirror_symmetry.py``, the first layer of an MLP on digits, five seeds, decay 0.01
(plain decay is 0.978 accurate, with 6 % of its entries gone):

* *reproduced* for zeros (88 % of entries gone, accuracy 0.953; pruned as much by size: 0.919) and low rank
  (51 of 64 directions gone, 0.969; pruned 0.975). *Direction only* for zero units (22 % gone) and equal
  ones (11 %), which need more decay: *reproduced* at 0.03, where 73 % of the units are zero (accuracy 0.967;
  pruned as much 0.806) and 80 % another one's equal (0.956; 0.800).
* *direction only*: gradient noise alone, without decay, takes the rank of two linear layers from 8 to 7;
  the next rate diverges. *Not seen*: that a residual network keeps full rank. Without decay a shift of the
  weights is another start of the same run, and the ranks are equal run for run.
* The zeros of the two-factor regression follow the soft threshold (``tests/optim/test_dcs.py``).

In any fit: :func:`lightning_sym.symmetry.find_symmetries`, ``CollapseMonitor(causes=True)``, and
:func:`lightning_sym.optim.constrain` and :func:`lightning_sym.optim.penalty` to impose constraints. The
room holds no code of its own.
"""
