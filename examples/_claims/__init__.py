"""What the papers claim, where our numbers of it stand, and the rules that make verdicts of them."""

from _claims.canonical import CANONICAL
from _claims.circuit import CIRCUIT
from _claims.claim import Claim as Claim
from _claims.composition import COMPOSITION
from _claims.features import FEATURES
from _claims.hierarchy import HIERARCHY
from _claims.noise import BALANCE, NOISE
from _claims.stepwise import STEPWISE
from _claims.syre import MIRROR, SYRE

CLAIMS: list[Claim] = [
    *CANONICAL,
    *HIERARCHY,
    *CIRCUIT,
    *BALANCE,
    *NOISE,
    *STEPWISE,
    *COMPOSITION,
    *FEATURES,
    *SYRE,
    *MIRROR,
]
