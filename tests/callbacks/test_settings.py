"""What tells the state of one monitor from another's in a checkpoint."""

from functools import partial

import pytest
from torch.utils.data import DataLoader

from lightning_sym.callbacks import CircuitMonitor, CollapseMonitor, KNNProbe, SharpnessMonitor

LOADER = DataLoader([0])


def _classes_of(batch, k):
    return batch[1] % k


@pytest.mark.parametrize(
    "make",
    [
        lambda how: CollapseMonitor(targets=how),
        lambda how: SharpnessMonitor(loss=how),
        lambda how: CircuitMonitor(every_n_steps=1, loss=how),
        lambda how: KNNProbe(train=LOADER, val=LOADER, represent=how),
    ],
    ids=["Collapse", "Sharpness", "Circuit", "KNN"],
)
def test_the_key_of_a_state_is_the_same_in_every_process(make):
    """A partial's words hold where it is in memory: a run that is resumed would not find its state."""
    one, two = (make(partial(_classes_of, k=2)) for _ in range(2))
    assert one.state_key == two.state_key
    assert "0x" not in one.state_key
