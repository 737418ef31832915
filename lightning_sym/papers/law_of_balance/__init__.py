"""The law of balance: SGD's noise balances layers, and decides what a diagonal network ends at.

Ziyin et al., 2023, arXiv 2308.06671. Where the loss is the same after ``u -> lambda u, w -> w / lambda``,
the noise of SGD makes ``|u|^2 - |w|^2`` decay, at the rate of the temperature (learning rate over batch
size) times the gradient noise of both sides. For diagonal linear networks of any depth the stationary
distribution follows in closed form; at two factors, everything goes to zero above a critical temperature.

Verdicts:

* *reproduced* (``examples/law_of_balance.py``, a ReLU network 20-200-20, five seeds): the law predicts 97 %
  of what decays under SGD (96 to 101 % by seed); gradient descent conserves to 2e-5. *Direction only*: of
  what remains, 0.239 against the law's 0.263. The law is estimated at every tenth step, from a batch of two,
  and scatters from 0.229 to 0.269, what is measured from 0.231 to 0.240.
* *reproduced* (``examples/stationary_density.py``): means within 0.0011 at three temperatures below the
  critical one; above it 96 % of the time is spent next to zero. *Direction only*: discrete SGD at batch
  size 1 diverges from T = 0.1 on, where the temperature is the learning rate itself.

Read in any fit by :class:`lightning_sym.callbacks.BalanceMonitor`. The room holds the stationary
distribution (:class:`DiagonalNetwork`), its stochastic differential equation (:func:`simulate`) and the
network to fit (:class:`DiagonalLinearNetwork`).
"""

from lightning_sym.papers.law_of_balance.closed_forms import (
    DiagonalNetwork as DiagonalNetwork,
    noise_matrices as noise_matrices,
    simulate as simulate,
)
from lightning_sym.papers.law_of_balance.network import DiagonalLinearNetwork as DiagonalLinearNetwork
