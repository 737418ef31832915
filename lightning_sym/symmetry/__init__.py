"""Parameter symmetries: what they are, and finding those of a network."""

from lightning_sym.symmetry.barrier import Barrier as Barrier, loss_barrier as loss_barrier
from lightning_sym.symmetry.breaking import (
    breaking_distances as breaking_distances,
    effective_units as effective_units,
    narrowed as narrowed,
)
from lightning_sym.symmetry.collapse import (
    collapse_causes as collapse_causes,
    collapsed_units as collapsed_units,
    least_force as least_force,
)
from lightning_sym.symmetry.find import Symmetries as Symmetries, find_symmetries as find_symmetries
from lightning_sym.symmetry.graph import Affine as Affine, Graph as Graph
from lightning_sym.symmetry.kinds import (
    Permutation as Permutation,
    Rescaling as Rescaling,
    Rotation as Rotation,
    Scale as Scale,
    SignFlip as SignFlip,
    Translation as Translation,
)
from lightning_sym.symmetry.matching import Match as Match, match as match
from lightning_sym.symmetry.symmetry import Action as Action, Symmetry as Symmetry
