"""Compositional generalisation needs more than disentangled inputs: it needs a factorised generator.

Liang et al., 2025, arXiv 2501.18797. Decoders that are given the coordinates of a bump apart still fail
where a region of the image was held out: they overlay what they saw. They compose if their representation
is forced to factorise into stripes, or if the training set shows stripes; then the number of images needed
grows about as the side of the image and not as its cube.

Reproduced:

* ``examples/compose_bumps.py``: forced factorisation lowers the error out of distribution 35-fold at
  reduced length; at full length 8-, 18- and 60-fold by seed (paper: 200-fold, one seed).
* ``examples/stripes_vs_bumps.py``: images needed (medians) at sides 12, 16 and 20 are 48, 64 and 80 with
  stripes; 384, 2048 and more than 2560 without.

Read in any fit by :class:`lightning_sym.callbacks.CompositionMonitor`; data by
:class:`lightning_sym.datamodules.GaussianBumpsDataModule`. The room holds the decoders.
"""

from lightning_sym.papers.composition.decoders import (
    BumpDecoder as BumpDecoder,
    MLPDecoder as MLPDecoder,
    PositionMLPDecoder as PositionMLPDecoder,
    TransposedConvDecoder as TransposedConvDecoder,
)
from lightning_sym.papers.composition.embedding import EmbeddingDecoder as EmbeddingDecoder
