"""How much of the data a generator's samples stand for.

Shape letters: M made samples, N samples of data, F features.
"""

from __future__ import annotations

import torch
from torch import Tensor


def chosen(made_MF: Tensor, data_NF: Tensor) -> Tensor:
    """Count the samples of data nearest to some made sample, and nearest to some other sample of data.

    Made samples all alike choose one sample of data; samples like data choose as many as data do of
    themselves. Both counts are of as many choosers as there are of the fewer.

    Args:
        made_MF: what a generator made, ``M >= 2``.
        data_NF: data, ``N >= 2``.

    Returns:
        Both counts, float64 ``[2]``, each at least 1.
    """
    few = min(len(made_MF), len(data_NF))
    between_MN = torch.cdist(made_MF[:few].double(), data_NF.double())
    among_NN = torch.cdist(data_NF.double(), data_NF.double()).fill_diagonal_(torch.inf)[:few]
    counts = [len(distances.argmin(1).unique()) for distances in (between_MN, among_NN)]
    return torch.tensor(counts, dtype=torch.float64)
