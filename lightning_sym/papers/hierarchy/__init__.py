"""Learning goes from symmetry to symmetry: over time, over widths, over depth.

Ziyin et al., 2025, arXiv 2502.05300. A network that starts symmetric learns in steps, each of which breaks
a symmetry (temporal); with weight decay it keeps no more distinct neurons than its task needs (functional);
layers first expand, then reduce, then pass on representations, and networks that were trained apart come to
represent alike (spatial).

Verdicts, on a task of our own, since the paper's is not known to us:

* *reproduced* (``examples/loss_staircase.py``): steps of the loss from small initial weights only. What
  counts as a drop was frozen, and on ten fresh seeds 32 of 46 drops fall on a breaking, where chance gives
  17.4 (p = 1e-4).
* *reproduced* (``examples/staircase_intervention.py``): breaking is the cause. Units held at zero and
  released make the loss halve 52 to 57 steps later, whenever they are released, and never if they are not;
  with the symmetry removed they need no release, in ten of ten seeds. *Not seen*: that the steps go where
  symmetries are removed. From a small start the first drop stays where it was, since decay is slow beside
  the growth of small weights; what goes is the last plateau.
* *direction only* (``examples/effective_units.py``): units in use at widths 16, 48 and 144: 6, 9 and 10
  with a decay of 0.1; 7, 15 and 49 with 0.01; 15, 45 and 131 without (medians, 6,000 steps). Training has not
  ended there (``examples/effective_units_course.py``): after 24,000 steps width 144 is at 6 with a decay of
  0.1, width 16 at 5 (*reproduced*); with 0.01 it has come from 49 to 11, width 16 from 7 to 6.
* *reproduced* (``examples/trained_apart.py``): nine deep linear networks a seed, of three depths and widths
  and behind embeddings of their own, come to an alignment of 0.98 under noisy SGD, and of 0.995 when its
  fluctuations are let die; gradient descent keeps 0.68, as SGD without label noise does. With ReLU 0.94.
* *direction only* (``examples/representation_alignment.py``, ReLU on MNIST, five seeds): 0.33 to 0.54.

Read in any fit by :class:`lightning_sym.callbacks.HierarchyMonitor`. The room holds the teacher and the
student of the first two examples.
"""

from lightning_sym.papers.hierarchy.student import (
    Data as Data,
    Student as Student,
    problem as problem,
)
