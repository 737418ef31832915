"""The three mechanisms by their definitions, and on the model in which each of them happens."""

import math

import pytest
import torch

from lightning_sym.functional import mechanism
from lightning_sym.papers.feature_learning import SolvableModel


def test_three_mechanisms_and_none():
    assert mechanism(0.01, alignment_after=0.9, norm_ratio=3.0) == "alignment"
    assert mechanism(-0.9, alignment_after=-0.4, norm_ratio=3.0) == "disalignment"
    assert mechanism(1.0, alignment_after=1.0, norm_ratio=3.0) == "rescaling"
    assert mechanism(0.01, alignment_after=0.02, norm_ratio=1.01) == "none"
    assert mechanism(0.01, alignment_after=0.02, norm_ratio=0.5) == "rescaling"
    assert mechanism(0.0, alignment_after=0.2, norm_ratio=1.0, tolerance=0.3) == "none"


@pytest.mark.parametrize(
    ("u", "w", "target", "expected"),
    [
        ([0.1, -0.1], [0.1, 0.1], 1.0, "alignment"),  # small and orthogonal at the start
        ([2.0, 1.5], [2.0, 2.5], 0.3, "disalignment"),  # aligned, and much too large
        ([0.3, 0.3], [0.3, 0.3], 1.0, "rescaling"),  # aligned for good
        ([40.0, -40.0], [40.0, 40.0], 1.0, "none"),  # a kernel machine
    ],
)
def test_each_happens_in_the_solved_model(u, w, target, expected):
    model = SolvableModel(torch.tensor(u), torch.tensor(w), beta2=target)
    start, end = model.at(torch.tensor([0.0])), model.at(torch.tensor([math.inf]))
    found = mechanism(
        start.alignment.item(),
        alignment_after=end.alignment.item(),
        norm_ratio=(end.norms / start.norms).item(),
    )
    assert found == expected


def test_what_is_no_number_is_refused():
    with pytest.raises(ValueError, match="norm_ratio must be positive, got nan"):
        mechanism(0.1, alignment_after=0.1, norm_ratio=math.nan)
    with pytest.raises(ValueError, match=r"alignment_before must be a cosine in \[-1, 1\], got nan"):
        mechanism(math.nan, alignment_after=0.1, norm_ratio=1.0)
    with pytest.raises(ValueError, match=r"alignment_after must be a cosine in \[-1, 1\], got 2"):
        mechanism(0.1, alignment_after=2.0, norm_ratio=1.0)
