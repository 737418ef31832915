"""
Which symmetries does a network have?
=====================================

They are traced through the forward pass, solved, and each is proved by trying it: the output must not change.
"""

import torch
from torch import nn

from lightning_sym import find_symmetries
from lightning_sym.diagnosis import diagnose_weights

torch.manual_seed(0)
net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4))
for symmetry in find_symmetries(net, torch.randn(4, 8)):
    print(symmetry)

# %%
# A network collapses onto the mirrors of its symmetries: here four units of the first layer are made copies
# of four others, with all that leads out of them. The weights alone show it, and the cause is the mirror.
with torch.no_grad():
    net[0].weight[:4] = net[0].weight[4:8]
    net[0].bias[:4] = net[0].bias[4:8]
    net[2].weight[:, :4] = net[2].weight[:, 4:8]
for finding in diagnose_weights(net, torch.randn(4, 8)):
    print(finding)
