"""Self-supervised LightningModules ready to fit."""

from lightning_sym.modules.barlow_twins import BarlowTwins
from lightning_sym.modules.features import extract_features
from lightning_sym.modules.joint_embedding import JointEmbedding
from lightning_sym.modules.simclr import SimCLR
from lightning_sym.modules.vicreg import VICReg

__all__ = ["BarlowTwins", "JointEmbedding", "SimCLR", "VICReg", "extract_features"]
