"""What changes training: syre, which removes symmetries; attach it to any torch optimizer."""

from lightning_sym.optim.syre import SyreHandle as SyreHandle, attach_syre as attach_syre
