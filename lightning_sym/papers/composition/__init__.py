"""Compositional generalisation needs more than disentangled inputs: it needs a factorised generator.

Liang et al., 2025, arXiv 2501.18797. Decoders that are given the coordinates of a bump apart still fail
where a region of the image was held out: they overlay what they saw. They compose if their representation
is forced to factorise into stripes, or if the training set shows stripes; then the number of images needed
grows about as the side of the image and not as its cube.

Verdicts:

* *direction only* (``examples/compose_bumps.py``): forced factorisation lowers the error out of
  distribution 43-fold at reduced length, 18-fold at full length (ratios of medians over three seeds; by
  seed 23 to 61 and 8 to 60; paper: 200-fold, one seed at its last epoch). Errors scatter by a factor of ten
  over seeds.
* *direction only* (``examples/stripes_vs_bumps.py``, three seeds): with stripes 24, 64 and 80 images are
  enough at sides 12, 16 and 20 (medians), without 192, 2048 and more than 2560. The power of N with stripes
  is 1.1 to 2.4 by seed (paper: about 1): three near sides and a grid of factors of two do not tell it.

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
