"""Remove symmetries from training: a random offset that decay can't undo.

Ziyin et al., 2024, arXiv 2408.15495. Parameters that a reflection leaves as they are have a gradient of
zero across its mirror, so that training that reaches a mirror stays on it, and weight decay draws it there:
the network loses capacity. Decay towards a frozen random point in place of zero (``theta + theta_0`` in the
loss, ``|theta|^2`` in the penalty) removes all countable reflection symmetries with probability 1; an
offset without decay only moves the mirrors.

Verdicts:

* *reproduced* (``examples/escape_the_trap.py``, groups of identical neurons, 10 seeds): with decay the
  error stays at 0.025, with syre it falls to 0.0012; an offset without decay stays trapped.
* *reproduced* with sigma 0.5 (``examples/collapse_vae.py``, posterior collapse on digits, decay 0.1): 7
  latents of 16 in use and an error of 0.62, where plain decay has none and 1.01. *Not seen* with sigma 0.1:
  none, and the rank of 13 deceives, since theta_0 has full rank. Decay towards the start does as well (11,
  0.61).
* *direction only* (``examples/plasticity_random_labels.py``, new random labels on 800 MNIST images,
  12 tasks): without decay accuracy falls from 0.97 to 0.20. Each kind of decay at its best strength:
  towards zero 0.922, rank 53 of 64; syre with sigma 1 0.934, rank 56, no dormant unit, ahead in every seed
  by 0.5 to 3.2 points; towards the start 0.933, ahead in four of five. Syre's best decay, 0.01, is one at
  which plain decay has lost rank (29) and accuracy (0.82); with sigma 0.3 syre gains nothing.
* *not seen* on a convolutional network (``--convolutional``, 300 images, 8 tasks): that syre fits better than
  tuned decay. Without decay accuracy falls from 1 to 0.11 and rank to 2. Each at its best: towards zero 0.987
  (decay 0.01, rank 29, dormant 0.43), syre 0.990 (decay 0.03, rank 44, dormant 0.13), ahead in three seeds of
  five. At equal decay syre is 14, 7 and 9 points ahead at 0.001, 0.003 and 0.03, and 3 behind at 0.01.
* ``examples/plasticity_stream.py``, permuted digits, has nothing to lose: 1.6 points over 25 tasks.

The technique itself is :class:`lightning_sym.callbacks.Syre` and :func:`lightning_sym.optim.attach_syre`.
The room holds no code of its own.
"""
