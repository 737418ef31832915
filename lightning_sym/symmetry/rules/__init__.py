"""What each traced operation allows to move, one file for each family of operations.

==================== =========================================================================
file                 operations
==================== =========================================================================
``shapes``           copies, ``view``, ``transpose``, ``permute``, ``squeeze``, ``expand``
``pieces``           ``select``, ``unbind``, ``slice``, ``split``, ``cat``, ``stack``, padding, look-ups
``activations``      element by element: ``relu``, ``tanh``, ``gelu``, powers, ``where``
``arithmetic``       ``add``, ``sub``, ``mul``, ``div``
``products``         ``mm``, ``addmm``, ``bmm``, convolution
``normalisation``    batch, layer, group and weight normalisation, vector norms
``attention``        softmax and fused attention
``reductions``       ``mean``, ``sum``, ``amax``, pooling
==================== =========================================================================

A rule is a function of the equations so far and of the operation, registered under the names of the
ATen operations that it is for::

    @rule("mean", "sum")
    def average(equations: Equations, step: Step) -> None: ...

It writes equations between the dimensions of the tensors (``equations``), sets the dimensions of the
outputs, and raises :class:`~lightning_sym.symmetry.rules.registry.NoRule` where it does not apply. Rules
need be neither complete nor right: every candidate that they leave is tried before it is returned.
"""

from lightning_sym.symmetry.rules.equations import Equations as Equations, Event as Event
from lightning_sym.symmetry.rules.registry import NoRule as NoRule, rule as rule
from lightning_sym.symmetry.rules.walk import write_equations as write_equations
