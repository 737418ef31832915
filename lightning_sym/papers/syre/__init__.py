"""Remove symmetries from training: a random offset that decay can't undo.

Ziyin et al., 2024, arXiv 2408.15495. Parameters that a reflection leaves as they are have a gradient of
zero across its mirror, so that training that reaches a mirror stays on it, and weight decay draws it there:
the network loses capacity. Decay towards a frozen random point in place of zero (``theta + theta_0`` in the
loss, ``|theta|^2`` in the penalty) removes all countable reflection symmetries with probability 1; an
offset without decay only moves the mirrors.

Reproduced:

* ``examples/escape_the_trap.py``, groups of identical neurons, 10 seeds: with decay the error stays at
  0.025, with syre it falls to 0.0012; an offset without decay stays trapped.
* ``examples/plasticity_stream.py``, permuted digits over 25 tasks: syre is no better than plain decay.
* ``examples/collapse_vae.py``, posterior collapse on digits: likewise, and the rank alone deceives, since
  theta_0 has full rank.

The technique itself is :class:`lightning_sym.callbacks.Syre` and :func:`lightning_sym.optim.attach_syre`.
The room holds no code of its own.
"""
