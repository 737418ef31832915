"""The solvable network walks its solution."""

import math

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_sym.papers.feature_learning import SolvableNetwork, kernel_growth
from tests.models import trainer

SCALINGS = {
    "ntk": {"output_scale": 200**-0.5},
    "standard": {"var_u": 1 / 200, "var_w": 1 / 200},
    "mean field": {"output_scale": 1 / 200, "lr_u": 200.0, "lr_w": 200.0},
    "small": {"output_scale": 1 / 200, "var_u": 0.1, "var_w": 0.1},
}


def line(slope=0.8, inputs=1):
    a = torch.tensor([1.0, -0.5, 2.0, 0.3], dtype=torch.float64)
    direction = torch.nn.functional.normalize(torch.arange(1.0, inputs + 1), dim=0).double()
    return a[:, None] * direction, slope * a


def fit(network, x, y, steps):
    loader = DataLoader(TensorDataset(x, y), batch_size=len(x))
    trainer(max_steps=steps, max_epochs=-1).fit(network, loader)


@pytest.mark.parametrize("name", SCALINGS)
def test_kernel_grows_as_solved(name):
    network = SolvableNetwork(200, **SCALINGS[name], pace=0.05)
    x, y = line()
    solution = network.solution(x, y=y)
    start = network.solution(x, y=y).at(torch.zeros(1)).kernel
    fit(network, x, y, 600)
    end = network.solution(x, y=y).at(torch.zeros(1))
    assert end.slope.item() == pytest.approx(0.8, rel=1e-4)
    assert float(end.kernel / start) == pytest.approx(solution.growth, rel=0.02)
    assert solution.growth == pytest.approx(kernel_growth(0.8, size=solution.size))


def test_the_course_is_the_flow_at_its_time():
    network = SolvableNetwork(
        60, inputs=3, output_scale=0.1, lr_u=0.5, lr_w=2.0, alignment=0.6, pace=0.01, seed=1
    )
    x, y = line(inputs=3)
    solution = network.solution(x, y=y)
    fit(network, x, y, 60)
    expected = solution.at(network.time[None])
    seen = network.solution(x, y=y).at(torch.zeros(1))
    start = solution.at(torch.zeros(1))
    assert abs(float(expected.slope - start.slope)) > 0.1
    for what in ("slope", "kernel", "alignment", "norms"):
        value, wanted = getattr(seen, what).item(), getattr(expected, what).item()
        assert value == pytest.approx(wanted, rel=0.01), what
    assert network(x[:1]).item() == pytest.approx(float(seen.slope * x[0].norm()))


def test_alignment_at_the_start():
    x, y = line()
    for alignment in (-1.0, 0.5, 1.0):
        network = SolvableNetwork(5000, alignment=alignment)
        found = network.solution(x, y=y).at(torch.zeros(1)).alignment.item()
        assert found == pytest.approx(alignment, abs=0 if abs(alignment) == 1 else 3 / math.sqrt(5000))
    assert SolvableNetwork(10)(torch.ones(1, 1).double()).item() == 0.0
    state = torch.get_rng_state()
    SolvableNetwork(10, seed=4)
    assert torch.equal(state, torch.get_rng_state())


def test_bad_input_is_named():
    for options, message in (
        ({"width": 0}, "width must be a positive integer, got 0"),
        ({"width": 3}, "width must be even"),
        ({"width": 4, "lr_u": -1.0}, "lr_u must be positive, got -1.0"),
        ({"width": 4, "alignment": 2.0}, r"alignment must be in \[-1, 1\] or None, got 2.0"),
        ({"width": 4, "pace": 0.0}, r"pace must be in \(0, 1\], got 0.0"),
    ):
        with pytest.raises(ValueError, match=message):
            SolvableNetwork(**options)
    network = SolvableNetwork(4, inputs=2)
    with pytest.raises(ValueError, match="multiples of one direction"):
        network.solution(torch.eye(2), y=torch.ones(2))
    with pytest.raises(ValueError, match=r"x must be \[B, I\]"):
        network.solution(torch.eye(2), y=torch.ones(3))
