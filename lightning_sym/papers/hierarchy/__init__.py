"""Learning goes from symmetry to symmetry: over time, over widths, over depth.

Ziyin et al., 2025, arXiv 2502.05300. A network that starts symmetric learns in steps, each of which breaks
a symmetry (temporal); with weight decay it keeps no more distinct neurons than its task needs (functional);
layers first expand, then reduce, then pass on representations, and networks that were trained apart come to
represent alike (spatial).

Reproduced, on a task of our own, since the paper's is not known to us:

* ``examples/loss_staircase.py``: steps of the loss from small initial weights only; 10 of 14 drops fall on
  a breaking, where chance gives 5.5.
* ``examples/effective_units.py``: with a decay of 0.1 the units in use number 8, 12 and 17 at widths 16, 48
  and 144; without decay 15, 44 and 130.
* ``examples/representation_alignment.py``: networks trained apart become more alike, 0.30 to 0.51, and not
  as alike as the paper's, 0.7 to 0.93.

Read in any fit by :class:`lightning_sym.callbacks.HierarchyMonitor`. The room holds the teacher and the
student of the first two examples.
"""

from lightning_sym.papers.hierarchy.student import (
    Data as Data,
    Student as Student,
    problem as problem,
)
