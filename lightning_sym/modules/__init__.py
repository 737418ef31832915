"""LightningModules ready to fit."""

from lightning_sym.modules.barlow_twins import BarlowTwins
from lightning_sym.modules.bump_decoders import MLPDecoder, PositionMLPDecoder, TransposedConvDecoder
from lightning_sym.modules.bump_embedding import EmbeddingDecoder
from lightning_sym.modules.deep_linear import DeepLinearNetwork
from lightning_sym.modules.diagonal import DiagonalLinearNetwork
from lightning_sym.modules.features import extract_features
from lightning_sym.modules.joint_embedding import JointEmbedding
from lightning_sym.modules.learning_circuit import CircuitDivergenceError, LearningCircuit
from lightning_sym.modules.simclr import SimCLR
from lightning_sym.modules.solvable import SolvableNetwork
from lightning_sym.modules.vicreg import VICReg

__all__ = [
    "BarlowTwins",
    "CircuitDivergenceError",
    "DeepLinearNetwork",
    "DiagonalLinearNetwork",
    "EmbeddingDecoder",
    "JointEmbedding",
    "LearningCircuit",
    "MLPDecoder",
    "PositionMLPDecoder",
    "SimCLR",
    "SolvableNetwork",
    "TransposedConvDecoder",
    "VICReg",
    "extract_features",
]
