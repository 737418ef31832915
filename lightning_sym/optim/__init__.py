"""What changes training: syre, which removes symmetries, and constraints that are made of them."""

from lightning_sym.optim.dcs import constrain as constrain, finalize as finalize, penalty as penalty
from lightning_sym.optim.syre import SyreHandle as SyreHandle, attach_syre as attach_syre
