"""Mirror symmetries make constraints: sparsity, low rank and identical neurons.

Ziyin, 2023, arXiv 2309.16932. Where a reflection ``I - 2 O O^T`` leaves the loss as it is, ``O^T theta =
0`` is stationary for every sample, and enough weight decay makes the minimum lie there. Rescaling, rotation
and permutation symmetries contain such mirrors: they lead to zeros, to low rank and to equal units. The
other way round, a constraint can be imposed by a parametrization that has the mirror.

Reproduced: the zeros of the two-factor regression follow the soft threshold (``tests/optim/test_dcs.py``);
there is no example.

In any fit: :func:`lightning_sym.symmetry.find_symmetries`, ``CollapseMonitor(causes=True)``, and
:func:`lightning_sym.optim.constrain` and :func:`lightning_sym.optim.penalty` to impose constraints. The
room holds no code of its own.
"""
