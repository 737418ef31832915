"""Augmentation of whole batches, every sample with its own parameters, as torchvision would have it."""

from lightning_sym.datamodules.augment.blur import gaussian_blur as gaussian_blur
from lightning_sym.datamodules.augment.colour import (
    brightness as brightness,
    contrast as contrast,
    grayscale as grayscale,
    hue as hue,
    saturation as saturation,
    solarize as solarize,
)
from lightning_sym.datamodules.augment.parameters import ViewParameters as ViewParameters, draw as draw
from lightning_sym.datamodules.augment.recipes import (
    ViewRecipe as ViewRecipe,
    barlow_twins as barlow_twins,
    make_recipe as make_recipe,
    simclr as simclr,
    vicreg as vicreg,
    weak as weak,
)
from lightning_sym.datamodules.augment.resample import crop_resize as crop_resize
from lightning_sym.datamodules.augment.views import make_views as make_views
