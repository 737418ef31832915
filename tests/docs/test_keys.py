"""The contract of keys: what monitors log is what their docstrings and ``docs/keys.md`` say."""

import re
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch.loggers.logger import Logger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_sym.datamodules import GaussianBumpsDataModule
from lightning_sym.papers.composition import MLPDecoder
from lightning_sym.papers.learning_circuit import LearningCircuit
from tests.models import Classifier, trainer

sys.path.insert(0, str(Path(__file__).parents[2] / "docs" / "_ext"))
import keys
import logs

KIND = r"(?:permutation|rescaling|signflip|rotation|scale)(?:_\d+)?"
STANDS_FOR = {
    "<layer>": r"[^/]+",
    "<side>": r"(?:in|out)",
    "<relation>": r"(?:rga|rwa|gwa)",
    "<kind>": KIND,
    "<what>": KIND,
    "<set>": r"(?:id|ood)",
    "<pair>": r"(?:WWt_RRt|VVt_LLt|VRt_LWt|W_Vt)",
    "<parameter>": r"\w+",
    "<j>": r"[1-9]\d*",
}
BLOCKS = keys.blocks()


class Recorder(Logger):
    """Keeps the key of everything it is given; its experiment takes pictures, too."""

    name, version = "recorder", 0

    def __init__(self):
        super().__init__()
        self.keys = set()

    @property
    def experiment(self):
        return self

    def log_metrics(self, metrics, step=None):
        self.keys |= {key for key in metrics if key not in ("epoch", "loss")}

    def log_hyperparams(self, params, *args, **kwargs):
        pass

    def add_text(self, key, *args, **kwargs):
        self.keys.add(key)

    add_histogram = add_text

    def add_figure(self, key, figure, step, close):
        assert figure.axes
        self.keys.add(key)


class Embedder(Classifier):
    """Its logits are an embedding as well."""

    def embed(self, x):
        return self.net[:2](x), self.net(x)

    def loss_of(self, batch):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])


def network():
    """Units that may be permuted, rescaled, flipped and rotated, and a layer of free scale."""
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 7)),
        *(nn.Linear(7, 8), nn.LayerNorm(8, elementwise_affine=False), nn.Linear(8, 4)),
    )


def samples():
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(torch.randn(48, 6, generator=generator), torch.arange(48) % 4)


class Still:
    """Predicts for every step what it is at first: some theory."""

    def eigenvalues(self, steps):
        return torch.linspace(1.0, 0.1, 4).expand(*torch.as_tensor(steps).shape, 4)


def options_of(name, *, everything, folder):
    """Return the arguments with which a monitor logs all it can, or those without which it can't run."""
    two = {"data": (torch.randn(16, 6), torch.randn(16, 6))}
    loaders = {"train": DataLoader(samples(), 16), "val": DataLoader(samples(), 16)}
    needed = {"EigenmodeMonitor": two, "KNNProbe": loaders, "LinearProbe": loaders}.get(name, {})
    if not name.endswith("Probe"):
        needed = {"every_n_steps": 1, **needed}
    more = {
        "AlignmentMonitor": {"exponents": True},
        "BalanceMonitor": {"details": True},
        "CollapseMonitor": {"causes": True, "targets": 1, "histograms": True},
        "HierarchyMonitor": {"histograms": True, "reference": str(folder / "reference.ckpt")},
        "PlasticityMonitor": {"trainability_steps": 2},
        "SharpnessMonitor": {"per_layer": True},
        "EigenmodeMonitor": {"theory": Still()},
    }
    return {**needed, **(more.get(name, {}) if everything else {}), "strict": True}


def logged(name, folder, *, everything):
    """Return all keys of one monitor's fits."""
    torch.save(Embedder(network()).state_dict(), folder / "reference.ckpt")
    modules = [Embedder(network(), lr=0.05, weight_decay=0.01)]
    settings = {"train_dataloaders": DataLoader(samples(), 16)}
    if name == "CompositionMonitor":
        modules = [MLPDecoder(24, size=12, width=16, hidden_layers=2, seed=0)]
        data = {"size": 12, "sigma": 1.2, "encoding": "bump", "batch_size": 16, "holdout_size": 5}
        settings = {"datamodule": GaussianBumpsDataModule(**data)}
    if name == "CircuitMonitor":
        rules = ("four_synapse", "kolen_pollack")
        shape = {"layers": [8, 7, 4], "activation": "tanh", "seed": 1}
        modules += [LearningCircuit((6,), rule=rule, **shape) for rule in rules]
    found = set()
    for module in modules:
        recorder = Recorder()
        kind = BLOCKS[name][0]
        monitor = kind(**options_of(name, everything=everything, folder=folder))
        run = trainer(
            callbacks=[monitor], logger=recorder, max_steps=3, limit_val_batches=0, log_every_n_steps=1
        )
        run.fit(module, **settings)
        found |= {key for key in recorder.keys if key.startswith(f"{kind.quantity}/")}
    return found


def patterns(name):
    """Return each documented key with its item and what matches it."""
    for group in BLOCKS[name][1].groups:
        for item in group.items:
            for key in item.keys:
                pieces = re.split(r"(<\w+>)", key)
                assert all(piece in STANDS_FOR for piece in pieces[1::2]), f"{key}: unknown placeholder"
                yield key, item, "".join(STANDS_FOR.get(piece, re.escape(piece)) for piece in pieces)


@pytest.mark.parametrize("name", BLOCKS)
def test_every_key_is_documented_and_every_documented_key_is_logged(name, tmp_path):
    found = logged(name, tmp_path, everything=True)
    known = list(patterns(name))
    assert [k for k in sorted(found) if not any(re.fullmatch(p, k) for _, _, p in known)] == []
    missing = [
        key
        for key, item, pattern in known
        if not item.conditional and not any(re.fullmatch(pattern, k) for k in found)
    ]
    assert missing == []


@pytest.mark.parametrize(
    "name", [name for name in BLOCKS if any(item.option for _, item, _ in patterns(name))]
)
def test_keys_of_an_option_are_logged_with_it_alone(name, tmp_path):
    found = logged(name, tmp_path, everything=False)
    always = [pattern for _, item, pattern in patterns(name) if not item.option or item.option == "picture"]
    assert found
    assert [key for key in sorted(found) if not any(re.fullmatch(p, key) for p in always)] == []


def test_the_page_is_what_the_docstrings_say():
    assert keys.PAGE.read_text() == keys.page(), "run: python docs/_ext/keys.py"


def test_a_block_is_parsed_to_its_end():
    lines = [
        *("First.", "", "Logs, of each layer:", "    ``a/<layer>/b``, ``c``: one", "        and more."),
        *("    ``.../d`` (histogram): two, only when told.", "with ``deep``, also:"),
        *("    ``a/e``: three", "", "No more: ``a/f``:", "    text."),
    ]
    block = logs.parse(lines)
    assert (block.start, block.end) == (2, 8)
    first, second, third = [item for group in block.groups for item in group.items]
    assert (first.keys, first.text, first.option) == (["a/<layer>/b", "a/<layer>/c"], "one and more.", "")
    assert (second.keys, second.kind, second.conditional) == (["a/<layer>/d"], "histogram", True)
    assert (third.keys, third.option, third.conditional) == (["a/e"], "deep", False)
    with pytest.raises(ValueError, match="must begin with"):
        logs.parse(["Logs:", "    ``a`` to ``b``: no"])
