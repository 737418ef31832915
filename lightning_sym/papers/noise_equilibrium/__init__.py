"""Parameter symmetry and noise equilibrium: SGD has one preferred point among connected minima.

Ziyin, Wang, Li and Wu, 2024, arXiv 2402.07193. Minima that a continuous symmetry connects are equal for
gradient descent, which conserves a charge. Gradient noise moves the charge to one value: for matrix
factorisation and deep linear networks to balanced and aligned layers, and with them to one sharpness, above
or below that of the start (progressive sharpening, or flattening).

Verdicts, by ``examples/noise_equilibrium.py``, two linear layers and three lopsided starts:

* *reproduced*: SGD ends at one balanced point (imbalance of time averages 0.03 with even noise, 0.08 with
  uneven; gradient descent keeps 0.6 to 1.8) and at one trace of the Hessian, within 1.4 % of the closed
  form for even noise and 6 % below it for uneven noise.
* *direction only*: at one moment the imbalance is 0.08 and 0.23, since SGD moves about the point; for the
  same reason the largest eigenvalue is a third above its closed form with even noise, an eighth below it with
  uneven. The cause is the size of a step (``examples/noise_floor.py``): begun at the closed
  form, SGD comes to these numbers too, and with a quarter of the learning rate to 0.02 and 0.10, and to
  eigenvalues of 1.17 and 0.98 of the closed form.
* *reproduced* (``examples/noise_and_scale.py``): where weights are divided by their norm, noise lengthens
  them for ever, by lr^2 |g|^2 a step to rounding; the squared norm grows sixfold in 6,000 steps, 3 % under
  gradient descent, and stops with decay. From Kaiming's and Xavier's start, two linear layers, SGD comes to
  one sharpness, 0.998 of the closed form (gradient descent to 1.27 and 1.03), with twice as many hidden units
  too. That warm-up matters is not seen.
* *reproduced* (``examples/representation_normalisation.py``, three linear layers, uneven inputs and noise):
  SGD brings both hidden representations to the size of the closed form, within 1.7 %, from three lopsided
  starts alike; gradient descent keeps a factor of 3 between them. The middle layer's singular values come to
  a ratio of 1.14 (theory 1; gradient descent 1.9 to 2.2). *Direction only* in a tanh network: the two sides
  of the balance come to a cosine of 0.94, under gradient descent 0.68 to 0.84. That is because its units
  curve (``examples/tanh_balance.py``, units tanh(a x) / a): 0.99 at a = 0, 0.97 at 0.5, 0.92 at 1.5.

Read in any fit by :class:`lightning_sym.callbacks.BalanceMonitor` and
:class:`lightning_sym.callbacks.SharpnessMonitor`. The room holds the equilibrium in closed form and
:class:`DeepLinearNetwork`, whose equilibrium it is.
"""

from lightning_sym.papers.noise_equilibrium.closed_forms import (
    LayerSpectra as LayerSpectra,
    NoiseBalance as NoiseBalance,
    charge_change as charge_change,
    equilibrium_spectra as equilibrium_spectra,
    equilibrium_weights as equilibrium_weights,
    layer_spectra as layer_spectra,
    linear_hessian_top as linear_hessian_top,
    linear_hessian_trace as linear_hessian_trace,
    noise_balance as noise_balance,
)
from lightning_sym.papers.noise_equilibrium.network import DeepLinearNetwork as DeepLinearNetwork
