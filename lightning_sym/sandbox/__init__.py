"""Running a module apart from its training: on a copy, nothing of which gets out. Needs torch alone."""

from lightning_sym.sandbox.sandbox import (
    Apart as Apart,
    NotApartError as NotApartError,
    Sandbox as Sandbox,
    training_loss as training_loss,
)
