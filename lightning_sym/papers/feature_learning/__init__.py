"""When does feature learning happen, and by which mechanism? A solved model tells.

Xu and Ziyin, 2024, arXiv 2401.07085. A linear network of one hidden layer on data along a line can be
solved at any width, with a learning rate for each layer and any scales. It learns features where its
initial size is small against the slope to be learned (else it is a kernel machine), by one of three
mechanisms: alignment of the two layers, disalignment, or rescaling of their norms.

Verdicts:

* *reproduced* (``examples/feature_mechanisms.py``): six cases of the solved model, growth of the tangent
  kernel within 0.06 % of the exact value, each mechanism named. A ReLU network on MNIST over initial
  scales: rich at 0.03 and 0.1, mixed at 0.3, kernel from 1 on.
* *reproduced* (``examples/feature_phases.py``): the exponents that trained networks show over widths name
  the predicted regime and pace in all 32 scalings that were tried.
* *not seen* from a start at f = 0 (MNIST, the same example): a fall of test accuracy with the scale (0.87 at
  all). *Reproduced* from an ordinary start, where each network stops at one training loss
  (``examples/feature_scales.py``, 500 images of CIFAR-10): 0.26, 0.23, 0.16 and 0.14 at scales 0.1, 0.3, 1
  and 2 (chance is 0.1). The kernel changes by 4.5 at 0.1 and by 0.2 to 0.3 at the others. At scale 3 no
  network came to that loss in 12,000 steps.

Read in any fit by :class:`lightning_sym.callbacks.FeatureLearningMonitor`. The room holds the solution
(:class:`SolvableModel`) and the network that follows it (:class:`SolvableNetwork`).
"""

from lightning_sym.papers.feature_learning.closed_forms import (
    Solution as Solution,
    SolvableModel as SolvableModel,
    initial_size as initial_size,
    kernel_growth as kernel_growth,
    pace as pace,
    regime as regime,
)
from lightning_sym.papers.feature_learning.network import SolvableNetwork as SolvableNetwork
