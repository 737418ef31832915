"""
A monitor of one's own, and a figure
====================================

A monitor says which statistics it needs, and reads them. This one keeps each layer's spectrum, which is drawn
at the end: weight decay that is too strong leaves a cliff.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn

from lightning_sym import watch
from lightning_sym.callbacks import Monitor
from lightning_sym.observe import Reading, SecondMoments
from lightning_sym.plots.spectrum import spectrum


class Spectra(Monitor):
    """The covariance spectrum of each layer's output, and the ratio of its two largest eigenvalues."""

    quantity = "gap"
    outputs = SecondMoments("outputs")
    needs = (outputs,)

    def read(self, seen):
        """Keep the last spectra, and yield the ratios."""
        self.spectra = {layer.name: layer[self.outputs].eigenvalues.cpu() for layer in seen.layers}
        for name, values in self.spectra.items():
            largest = values.sort(descending=True).values
            yield Reading(name, "", largest[0] / largest[1])


# %%
# The same network with and without strong decay:
digits = load_digits()
x = torch.tensor(digits.images / 16, dtype=torch.float32).flatten(1)
y = torch.tensor(digits.target)


def fitted(weight_decay):
    """Return the spectra at the end of a short fit."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 10))
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=weight_decay)
    watched = Spectra(every_n_steps=50)
    with watch(net, optimizer, watched):
        for _ in range(300):
            batch = torch.randint(len(x), (128,))
            nn.functional.cross_entropy(net(x[batch]), y[batch]).backward()
            optimizer.step()
            optimizer.zero_grad()
    return watched.spectra


weak, strong = fitted(0.01), fitted(5.0)
figure = spectrum({"weak decay": weak["2"], "strong decay": strong["2"]})
