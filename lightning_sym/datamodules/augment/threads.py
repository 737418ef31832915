"""Work shared among threads of one core each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Job = TypeVar("Job")
Result = TypeVar("Result")


def side_by_side(work: Callable[[Job], Result], jobs: Sequence[Job], *, threads: int) -> list[Result]:
    """Do jobs on threads of one core each, and return what they return, in order.

    Small operations that are shared among cores wait for each other each time, on a busy machine for
    longer than they take. The number of threads that torch uses afterwards is as before.
    """
    if threads == 1:
        return [work(job) for job in jobs]
    before = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(work, jobs))
    finally:
        torch.set_num_threads(before)  # what new threads, not this one, would have taken over
