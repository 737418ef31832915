"""Figures and words made from readings."""

from lightning_sym.plots.overview import overview as overview
from lightning_sym.plots.readings import summary as summary
from lightning_sym.plots.words import in_words as in_words
