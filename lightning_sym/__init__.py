"""Parameter symmetry in training: watched, removed and imposed, in PyTorch Lightning."""

__version__ = "0.1.0"
