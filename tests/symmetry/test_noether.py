"""The charge's form: of parameters it is the charge, of a second moment what loops over units give."""

import pytest
import torch
from torch import nn

from lightning_sym.symmetry import Action, find_symmetries
from lightning_sym.symmetry.kinds import Rescaling, Rotation
from lightning_sym.symmetry.noether import incoming, outgoing, own_moment, quadratic_form, unit_moment
from tests.models import SelfAttention, mlp


@pytest.mark.parametrize(
    ("net", "shape"),
    [
        (mlp(4, 9, 7, 3, act=nn.ReLU), (4,)),
        (nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), SelfAttention(8, 2)), (5, 4)),
    ],
)
def test_of_parameters_it_is_the_charge(net, shape):
    found = find_symmetries(net, torch.randn(3, *shape), kinds=["rescaling", "rotation", "scale"])
    assert {symmetry.kind for symmetry in found} >= {"rescaling"}
    tensors = dict(net.named_parameters())
    for symmetry in found:
        moment = own_moment(symmetry, tensors)
        form = quadratic_form(symmetry, moment)
        charge = symmetry.charge()
        torch.testing.assert_close(form.reshape(charge.shape), charge)
        into, out = (quadratic_form(symmetry, moment, side) for side in (incoming, outgoing))
        torch.testing.assert_close(into - out, form)
        assert float(into.min() if into.ndim == 2 else torch.linalg.eigvalsh(into).min()) > -1e-9


def test_second_moments_come_down_to_units():
    draw = torch.randn(8, 20, dtype=torch.float64)
    second = draw @ draw.T / 20
    index = torch.tensor([[[0, 3], [1, 4], [7, 5]]])  # two positions a unit
    action = Action("w", 0, index + 2)
    scalings, turns = Rescaling((action,)), Rotation((action,))
    factors = unit_moment(scalings, action, second, start=2)
    matrix = unit_moment(turns, action, second, start=2)
    for u in range(3):
        assert float(factors[0, u]) == pytest.approx(sum(float(second[i, i]) for i in index[0, u]))
        for v in range(3):
            pairs = zip(index[0, u], index[0, v], strict=True)
            assert float(matrix[0, u, v]) == pytest.approx(sum(float(second[i, j]) for i, j in pairs))
    torch.testing.assert_close(unit_moment(scalings, action, second.diagonal(), start=2), factors)
    assert unit_moment(turns, action, second.diagonal(), start=2) is None
    assert unit_moment(scalings, action, second) is None  # positions 8 and 9 are not there
    assert quadratic_form(scalings, lambda _: None) is None
