"""What is said to be read, and which layers are chosen by default."""

import itertools
import logging
import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_sym.callbacks import CollapseMonitor, monitors
from lightning_sym.observe import Adapter, coverage, register_layer, watchable_layers
from lightning_sym.observe.choice import choose_layers, role, spread
from tests.models import Classifier, mlp, trainer


class Free(nn.Module):
    """Its product is of a shape that nobody could know."""

    def __init__(self):
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(4, 4))

    def forward(self, x):
        return x @ self.matrix


def test_numbers_are_those_of_the_parameters():
    tied = nn.Linear(5, 7, bias=False)
    net = nn.ModuleDict({"words": nn.Embedding(7, 5), "norm": nn.LayerNorm(5), "head": tied, "free": Free()})
    tied.weight = net["words"].weight
    net["frozen"] = nn.Linear(9, 9).requires_grad_(False)
    found = coverage(net)
    assert (found.read, found.trained) == (35, 35 + 10 + 16)
    assert found.share == 35 / 61
    assert found.unread == {"LayerNorm": {"norm.weight": 5, "norm.bias": 5}, "Free": {"free.matrix": 16}}
    assert str(found) == (
        "reads 57 % of 61 trained parameters in 2 of 2 layers; not read: Free (16 in free.matrix), "
        "LayerNorm (10 in norm.weight, norm.bias)"
    )


def test_nothing_trained_is_read_whole():
    assert coverage(nn.Linear(2, 2).requires_grad_(False)).share == 1.0


def test_all_is_never_said_of_almost_all():
    net = nn.ModuleList([nn.Linear(1000, 100), nn.LayerNorm(1)])
    assert str(coverage(net)).startswith("reads 99.9 % of 100.1 k")


def run(net, monitor, caplog, shape=(4,), **options):
    caplog.clear()
    caplog.set_level(logging.INFO)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        done = trainer(max_steps=3, callbacks=monitor, **options)
        data = TensorDataset(torch.randn(24, *shape), torch.arange(24) % 3)
        done.fit(Classifier(net), DataLoader(data, batch_size=8))
    assert done.global_step == 3
    said = [r.getMessage() for r in caplog.records if r.getMessage().startswith("lightning_sym reads")]
    return said, [
        str(w.message) for w in caught if "Warning" in w.category.__name__ and "layer" in str(w.message)
    ]


def test_it_is_said_once_for_all_monitors(caplog):
    net = mlp(4, *[8] * 12, 3)
    said, warned = run(net, monitors("light", every_n_steps=1), caplog)
    assert len(said) == 1
    assert said[0].startswith("lightning_sym reads ")
    assert " in 4 of 13 layers (all layers: 100 %): net.0, net.8, net.16, net.24. Choose others" in said[0]
    assert not warned


def test_less_than_half_is_a_warning_and_more_is_none(caplog):
    class Kernel(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.matrix = nn.Parameter(torch.randn(width, 4))

        def forward(self, x):
            return x + self.matrix.sum()

    for width, expected in ((40, 1), (3, 0)):
        _, warned = run(
            nn.Sequential(Kernel(width), nn.Linear(4, 3)), [CollapseMonitor(every_n_steps=1)], caplog
        )
        assert len(warned) == expected
        assert all("not read: Kernel (160 in net.0.matrix)" in text for text in warned)


def test_a_fit_with_nothing_to_watch_goes_on(caplog):
    head = nn.Sequential(Free(), nn.LayerNorm(4))
    _, warned = run(head, [CollapseMonitor(every_n_steps=1)], caplog)
    assert "Classifier has no layer to watch: Free (16 in net.0.matrix), LayerNorm (8 in" in warned[0]
    assert len(warned) == 1
    with pytest.raises(ValueError, match=r"layers='net\.\*' matches no layer"):
        run(head, [CollapseMonitor(layers="net.*")], caplog)


@pytest.mark.parametrize("lazy", [0, 1])
def test_lazy_layers_are_chosen_when_they_exist(lazy, caplog):
    first = nn.LazyLinear(16) if lazy else nn.Linear(4, 16)
    monitor = CollapseMonitor(every_n_steps=1)
    said, warned = run(nn.Sequential(first, nn.ReLU(), nn.LazyLinear(3)), [monitor], caplog)
    assert "lazy layers before their first batch (" in said[0]
    assert "in 2 of 2 layers: net.0, net.2" in said[1]
    assert not warned
    read = ["collapse/net.2/effective_rank" in row for row in monitor.history]
    assert read[-2:] == [True, True]
    assert not any(read[:-2])


def test_roles_are_covered_over_depth():
    parts = ("attn.q", "attn.k", "attn.v", "attn.o", "gate", "up", "down")
    llama = ["embed", *(f"layers.{i}.{part}" for i in range(32) for part in parts), "head"]
    for most in (9, 12, 30):
        chosen = spread(llama, most)
        assert len(chosen) == most
        assert {role(name) for name in chosen} == {role(name) for name in llama}
        depths = sorted(int(name.split(".")[1]) for name in chosen if name.startswith("layers"))
        assert depths[0] == 0
        assert depths[-1] == 31
        assert max(b - a for a, b in itertools.pairwise(depths)) <= 32 / (most - 3) + 1
    few = spread(llama, 4)
    assert few[0] == "embed"
    assert few[-1] == "head"
    assert len(few) == 4


def test_roles_of_a_residual_network():
    names = [
        "conv1",
        *(f"layer{s}.{b}.conv{c}" for s in range(1, 5) for b in range(3) for c in (1, 2, 3)),
        "fc",
    ]
    chosen = spread(names, 12)
    assert {role(name) for name in chosen} == {"conv1", "layer.conv1", "layer.conv2", "layer.conv3", "fc"}
    assert len({name.split(".")[0] for name in chosen}) == 6


@pytest.mark.parametrize("most", range(1, 12))
def test_as_many_are_chosen_as_there_may_be(most):
    names = [f"a.{i}" for i in range(7)] + ["b", "c", "d.0", "d.1"]
    assert len(spread(names, most)) == most == len(set(spread(names, most)))


def test_frozen_layers_are_watched_on_request_alone():
    net = nn.ModuleDict({"teacher": mlp(4, 5, 3).requires_grad_(False), "student": mlp(4, 5, 3)})
    assert {layer.name for layer in choose_layers(net, None, max_layers=9)[0]} == {"student.0", "student.2"}
    assert len(choose_layers(net, "*", max_layers=9)[0]) == 4
    net["student"].requires_grad_(False)
    assert len(choose_layers(net, None, max_layers=9)[0]) == 4
    net["student"][0].bias.requires_grad_(True)
    assert [layer.name for layer in choose_layers(net, None, max_layers=9)[0]] == ["student.0"]


def test_a_frozen_layer_counts_in_no_summary():
    rows = []
    for teacher in (False, True):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        net[0].requires_grad_(False)
        watching = monitors("standard", every_n_steps=1, layers=["net.0", "net.2"] if teacher else "net.2")
        done = trainer(max_steps=1, callbacks=watching)
        data = TensorDataset(torch.randn(16, 4), torch.arange(16) % 3)
        done.fit(Classifier(net), DataLoader(data, batch_size=16))
        rows.append({k: v for monitor in watching for k, v in monitor.history[0].items()})
    assert "collapse/net.0/effective_rank" in rows[1]
    # Of a layer that is not watched is said, too, that it ran and is not trained.
    shared = [{key: value for key, value in row.items() if "/net.0/" not in key} for row in rows]
    assert shared[0] == shared[1]
    assert {key for key in rows[0] if "/net.0/" in key} == {"signal/net.0/moved", "signal/net.0/trained"}


def test_a_glob_on_a_module_stands_for_all_of_its_maps():
    net = nn.ModuleDict({"qkv": nn.Linear(4, 12), "rnn": nn.LSTM(3, 4), "out": nn.Linear(4, 4)})
    names = [layer.name for layer in choose_layers(net, ["qkv", "rnn"], max_layers=1)[0]]
    assert names == ["qkv.q_proj", "qkv.k_proj", "qkv.v_proj", "rnn.ih_l0", "rnn.hh_l0"]


def test_only_three_equal_parts_are_taken_apart():
    class HeadsFirst(nn.Module):
        def __init__(self, head_first):
            super().__init__()
            self.qkv, self.head_first = nn.Linear(4, 12), head_first

    assert len(watchable_layers(nn.ModuleDict({"qkv": nn.Linear(4, 8)}))) == 1
    assert len(watchable_layers(nn.ModuleDict({"other": nn.Linear(4, 12)}))) == 1
    assert len(watchable_layers(HeadsFirst(True))) == 1
    assert len(watchable_layers(HeadsFirst(False))) == 3


def test_a_registered_type_is_refused_where_it_is_none():
    with pytest.raises(TypeError, match=r"kind must be a subclass of nn\.Module, got 3"):
        register_layer(3, Adapter())
    with pytest.raises(TypeError, match="adapter must be an Adapter or None, got 'weight'"):
        register_layer(Free, "weight")


def test_what_an_adapter_says_is_checked():
    register_layer(Free, Adapter("matrix"))  # in fact it is [inputs, outputs]
    try:
        monitor = CollapseMonitor(every_n_steps=1)
        done = trainer(max_steps=1, callbacks=[monitor])
        with pytest.warns(UserWarning, match=r"layer net\.0 has no readings of Weight .*not W h \+ b"):
            done.fit(
                Classifier(nn.Sequential(Free(), nn.Linear(4, 3))),
                DataLoader(TensorDataset(torch.randn(8, 4), torch.arange(8) % 3), batch_size=8),
            )
        assert "collapse/net.0/effective_rank" in monitor.history[0]
        assert "collapse/net.0/weight_stable_rank" not in monitor.history[0]
    finally:
        register_layer(Free, None)


@pytest.mark.parametrize("sparse", [False, True])
def test_bags_of_words_are_read_on_their_output(sparse):
    class Bags(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.head = nn.EmbeddingBag(11, 6, mode="mean", sparse=sparse), nn.Linear(6, 3)

        def forward(self, x):
            return self.head(self.words(x.abs().mul(3).long().clamp(max=10)))

    watching = monitors("standard", every_n_steps=1, strict=True)
    torch.manual_seed(0)
    done = trainer(max_steps=1, callbacks=watching)
    x = torch.randn(16, 4)
    net = Bags()
    with torch.no_grad():
        y = net.words(x.abs().mul(3).long().clamp(max=10)).double()
        used = x.abs().mul(3).long().clamp(max=10).unique()
    done.fit(Classifier(net), DataLoader(TensorDataset(x, torch.arange(16) % 3), batch_size=16))
    row = {k: v for monitor in watching for k, v in monitor.history[0].items()}
    sigma = torch.linalg.svdvals(y - y.mean(0))
    p = sigma / sigma.sum()
    assert row["collapse/net.words/effective_rank"] == pytest.approx(
        float(torch.special.entr(p).sum().exp()), rel=1e-4
    )
    assert row["plasticity/net.words/zero_gradients"] == pytest.approx(1 - len(used) / 11)
    assert "collapse/net.words/dead_units" not in row
