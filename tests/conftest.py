"""What every test process, and every test, begins with."""

import random

import numpy as np
import pytest
import torch

# Autograd starts its threads, one a device, in a process' first backward. ``torch.compile`` and the
# propagation of DTensors' shardings register a stand-in CUDA device where there is none; were that first, the
# stand-in would get a thread, and no process forked afterwards could run a backward at all.
torch.ones(1, requires_grad=True).sum().backward()


@pytest.fixture(autouse=True)
def _same_numbers_in_any_order():
    """A test that draws without a seed of its own draws the same alone, in the suite and on either worker."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - the state that other libraries draw from
    torch.manual_seed(0)
