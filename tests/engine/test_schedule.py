"""When is a step due?"""

import pytest

from lightning_sym.engine.schedule import Every, LogSpaced, as_schedule


def due(schedule, until):
    steps, last = [], 0
    while (step := schedule.next(last)) <= until:
        assert step > last
        steps.append(step)
        last = step
    return steps


def test_every():
    assert due(Every(1), 4) == [1, 2, 3, 4]
    assert due(Every(5), 16) == [1, 5, 10, 15]


def test_log_spaced_steps_are_even_on_a_logarithmic_axis():
    steps = due(LogSpaced(4), 10_000)
    assert steps[0] == 1
    assert {10, 100, 1000, 10_000} <= set(steps)
    assert len([s for s in steps if 100 < s <= 1000]) == 4


@pytest.mark.parametrize("bad", [0, -1, 1.5, "7", True])
def test_what_is_no_schedule(bad):
    with pytest.raises((ValueError, TypeError), match="every_n_steps"):
        as_schedule(bad)
