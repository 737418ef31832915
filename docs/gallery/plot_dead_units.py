"""
Which layer is dead?
====================

A small network without normalisation is to learn real digits, at a learning rate that is too large: most of
its units die in the first steps. The monitors watch a plain training loop, and say so.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn

from lightning_sym import monitors, watch
from lightning_sym.diagnosis import diagnose_run
from lightning_sym.plots import overview

torch.manual_seed(0)
digits = load_digits()
x = torch.tensor(digits.images / 16, dtype=torch.float32).flatten(1)
y = torch.tensor(digits.target)
net = nn.Sequential(
    *(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU()),
    *(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)),
)
optimizer = torch.optim.SGD(net.parameters(), lr=0.6, momentum=0.9)

# %%
# The loop is as it was, but for the lines with ``watch`` and ``watching``.
chosen = monitors("standard", every_n_steps=20, targets=1)
with watch(net, optimizer, chosen) as watching:
    for _ in range(200):
        batch = torch.randint(len(x), (64,))
        watching.batch((x[batch], y[batch]))
        loss = nn.functional.cross_entropy(net(x[batch]), y[batch])
        watching.loss(loss)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

# %%
# What was wrong, where, since when, and what to do:
rows = [row for monitor in chosen for row in monitor.history]
for finding in diagnose_run(rows):
    print(finding)

# %%
# The same at a glance: layers by depth over time.
figure = overview(rows)
