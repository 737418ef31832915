"""Gradient noise out of one backward pass, against single-sample derivatives in float64."""

import json
from typing import Any, ClassVar, NamedTuple

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from lightning_sym.callbacks import Monitor
from lightning_sym.observe import GradientNoise, SecondMoments, watchable_layers
from lightning_sym.observe.gains import gains
from lightning_sym.observe.statistics import gradient_noise
from tests.models import Classifier, Flatten, SelfAttention, mlp, trainer

CLASSES = 3


def observable(net):
    return [*watchable_layers(net), *gains(net)]


class Keep(Monitor):
    """Keeps what was observed."""

    def __init__(self, *, max_width=512, max_held_bytes=2**30, **options):
        super().__init__(**{"every_n_steps": 1, "strict": True, "max_layers": 99, **options})
        self.noise = GradientNoise(max_width=max_width, max_held_bytes=max_held_bytes)
        self.needs = (self.noise,)
        self.seen = {}

    def choose(self, module):
        return observable(module) if self.layers is None else super().choose(module)

    def read(self, seen):
        self.seen = {
            layer.name: Noise(layer.get(self.noise), layer.reason(self.noise)) for layer in seen.layers
        }
        return iter(())


class Noise(NamedTuple):
    gradient_noise: Any
    no_noise: str


class Twice(nn.Module):
    """One layer called twice: a sample's gradient is the sum of both calls'."""

    def __init__(self):
        super().__init__()
        self.shared = nn.Linear(5, 5)

    def forward(self, x):
        return self.shared(torch.tanh(self.shared(x)))


class SplitAttention(nn.Module):
    """Queries, keys and values from three widths: three separate weights."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, kdim=5, vdim=3, batch_first=True)
        self.k, self.v = nn.Linear(8, 5), nn.Linear(8, 3)

    def forward(self, x):
        return self.attention(x, self.k(x), self.v(x), need_weights=False)[0]


class Block(nn.Module):
    """Recomputes its inner layers in the backward pass."""

    def __init__(self, reentrant, twice=False):
        super().__init__()
        self.inner = Twice() if twice else mlp(5, 6, 5)
        self.reentrant = reentrant

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=self.reentrant)


class RunningNorm(nn.Module):
    """Batch normalisation by statistics that are not those of the batch, and classes."""

    def __init__(self, width):
        super().__init__()
        self.norm, self.head = nn.BatchNorm1d(width).eval(), nn.Linear(width, CLASSES)
        self.norm.running_mean.uniform_(-1, 1)
        self.norm.running_var.uniform_(0.5, 2)

    def forward(self, x):
        return self.head(self.norm(x))


def convolutions():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 6, (3, 2), stride=2, groups=2, padding=(1, 2), dilation=(1, 2)),
        nn.ReLU(),
        nn.Conv2d(6, 6, 2, groups=6, bias=False, padding=1, padding_mode="circular"),
        nn.Flatten(),
        nn.LazyLinear(CLASSES),
    )


def with_head(*layers, width=5):
    return nn.Sequential(nn.Linear(4, 5), *layers, nn.Linear(width, CLASSES))


CASES = {
    "linear": (lambda: mlp(4, 8, 6, CLASSES, act=nn.ReLU), (4,)),
    "long sequence": (lambda: nn.Sequential(nn.Linear(3, 2), Flatten(), nn.Linear(2, CLASSES)), (30, 3)),
    "sequence": (
        lambda: nn.Sequential(nn.Linear(4, 9), nn.ReLU(), nn.Linear(9, 7), Flatten(), nn.Linear(7, CLASSES)),
        (2, 3, 4),
    ),
    "convolution": (convolutions, (2, 6, 5)),
    "volume": (
        lambda: nn.Sequential(nn.Conv3d(2, 3, 3, padding="same"), nn.Flatten(), nn.Linear(24, CLASSES)),
        (2, 2, 2, 2),
    ),
    "attention": (
        lambda: nn.Sequential(nn.Linear(3, 8), SelfAttention(8, 2), Flatten(), nn.Linear(8, CLASSES)),
        (4, 3),
    ),
    "split attention": (
        lambda: nn.Sequential(nn.Linear(3, 8), SplitAttention(), Flatten(), nn.Linear(8, CLASSES)),
        (4, 3),
    ),
    "layer norms": (
        lambda: nn.Sequential(
            nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 5), nn.RMSNorm(5), Flatten(), nn.Linear(5, CLASSES)
        ),
        (3, 4),
    ),
    "group norms": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 6, 3), nn.GroupNorm(2, 6), nn.ReLU(), nn.Flatten(), nn.Linear(36, CLASSES)
        ),
        (2, 5, 4),
    ),
    "running batch norms": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6).eval(), nn.Flatten(), nn.Linear(36, 5), RunningNorm(5)
        ),
        (2, 5, 4),
    ),
    "twice": (lambda: with_head(Twice()), (4,)),
    "checkpointed": (lambda: with_head(Block(False)), (4,)),
    "reentrant": (lambda: with_head(Block(True)), (4,)),
    "checkpointed twice": (lambda: with_head(Block(False, twice=True)), (4,)),
    "reentrant twice": (lambda: with_head(Block(True, twice=True)), (4,)),
}


def build(name, n=7):
    make, shape = CASES[name]
    torch.manual_seed(0)
    net = make().double()
    x = torch.randn(n, *shape, dtype=torch.float64)
    net(x)  # lazy layers
    return net, x, torch.randint(0, CLASSES, (n,))


def single_gradients(net, x, y):
    """Return each parameter's gradient of each sample's own loss, one after the other, ``[N, ...]``."""
    rows = []
    for n in range(len(x)):
        net.zero_grad()
        nn.functional.cross_entropy(net(x[n : n + 1]), y[n : n + 1]).backward()
        rows.append([p.grad.clone() for p in net.parameters()])
    net.zero_grad()
    return {id(p): torch.stack(g) for p, g in zip(net.parameters(), zip(*rows, strict=True), strict=True)}


def slow(gradient, dim):
    """Return covariance and squared mean over samples, contracted to one dimension, entry by entry."""
    gradient = gradient.movedim(1 + dim, 1).flatten(2) if gradient.ndim > 2 else gradient[:, :, None]
    n, size, rest = gradient.shape
    mean = sum(gradient[k] for k in range(n)) / n
    covariance, square = torch.zeros(size, size).double(), torch.zeros(size, size).double()
    for r in range(rest):
        square += torch.outer(mean[:, r], mean[:, r])
        for k in range(n):
            off = gradient[k, :, r] - mean[:, r]
            covariance += torch.outer(off, off) / (n - 1)
    return covariance, square


def expected(net, x, y):
    """Return ``{(layer, tensor, dim): (covariance, squared mean)}``."""
    gradients = single_gradients(net, x, y)
    found = {}
    for layer in observable(net):
        of_layer = gradients[id(layer.parameter())]
        rows = torch.stack([layer.slice(g) for g in of_layer])
        dims = range(min(rows.ndim - 1, 2))
        found |= {(layer.name, "weight", dim): slow(rows, dim) for dim in dims}
        if (bias := layer.bias_parameter()) is not None:
            rows = torch.stack([layer.slice(g) for g in gradients[id(bias)]])
            found[layer.name, "bias", 0] = slow(rows, 0)
    return found


def fit(net, x, y, watch, *, batch_size=None, **options):
    loader = DataLoader(TensorDataset(x, y), batch_size=batch_size or len(x))
    trainer(callbacks=[watch], max_steps=1, **options).fit(Classifier(net), loader)
    return {name.removeprefix("net."): layer for name, layer in watch.seen.items()}


def check(seen, wanted, *, n, **tolerance):
    assert {name for name, _, _ in wanted} == set(seen)
    for (name, tensor, dim), (covariance, square) in wanted.items():
        noise = seen[name].gradient_noise
        assert noise is not None, (name, seen[name].no_noise)
        assert noise.n == n
        torch.testing.assert_close(noise.covariance(tensor, dim), covariance, **tolerance)
        torch.testing.assert_close(noise.mean_square(tensor, dim), square, **tolerance)


@pytest.mark.filterwarnings("ignore:Found 2 module.* in eval mode")  # Lightning's, and they are meant to be
@pytest.mark.parametrize("name", CASES)
def test_noise_is_that_of_single_samples(name):
    net, x, y = build(name)
    wanted = expected(net, x, y)
    check(fit(net, x, y, Keep()), wanted, n=7)


@pytest.mark.parametrize("name", ["linear", "long sequence", "convolution"])
def test_wide_sides_keep_the_diagonal(name):
    net, x, y = build(name)
    wanted = {
        key: tuple(m.diagonal() if len(m) > 2 else m for m in pair)
        for key, pair in expected(net, x, y).items()
    }
    check(fit(net, x, y, Keep(max_width=2)), wanted, n=7)


@pytest.mark.parametrize("name", ["sequence", "convolution"])
def test_samples_are_taken_in_chunks(name, monkeypatch):
    monkeypatch.setattr("lightning_sym.observe.statistics.gradient_noise.CHUNK", 300)
    net, x, y = build(name)
    wanted = expected(net, x, y)
    check(fit(net, x, y, Keep()), wanted, n=7)


def test_accumulated_batches_are_one_observation():
    net, x, y = build("convolution", n=8)
    wanted = expected(net, x, y)
    check(fit(net, x, y, Keep(), batch_size=2, accumulate_grad_batches=4), wanted, n=8)


def test_half_precision_reads_nearly_the_same():
    net, x, y = build("sequence")
    wanted = expected(net, x, y)
    seen = fit(net.float(), x.float(), y, Keep(), precision="bf16-mixed")
    for (name, tensor, dim), (covariance, _) in wanted.items():
        off = seen[name].gradient_noise.covariance(tensor, dim) - covariance
        assert float(off.norm() / covariance.norm()) < 0.05, (name, tensor, dim)
    check(fit(build("sequence")[0].float(), x.float(), y, Keep()), wanted, n=7, rtol=1e-3, atol=1e-6)


def test_two_ranks_read_what_one_reads(tmp_path):
    class Dump(Keep):
        def on_train_end(self, trainer, pl_module):
            noise = {
                f"{name} {dim}": layer.gradient_noise.covariance("weight", dim).tolist()
                for name, layer in self.seen.items()
                for dim in (0, 1)
            }
            (tmp_path / f"{trainer.world_size}-{trainer.global_rank}.json").write_text(json.dumps(noise))

    for devices, strategy in ((1, "auto"), (2, "ddp_fork")):
        net, x, y = build("convolution", n=8)
        fit(net, x, y, Dump(), batch_size=8 // devices, devices=devices, strategy=strategy)
    one, a, b = (json.loads((tmp_path / name).read_text()) for name in ("1-0.json", "2-0.json", "2-1.json"))
    assert a == b
    assert one.keys() == a.keys()
    for key, value in one.items():
        torch.testing.assert_close(torch.tensor(a[key]), torch.tensor(value))


def test_a_batch_norms_gain_is_read_in_shares_of_the_batchs_gradient():
    torch.manual_seed(0)
    norm, head = nn.BatchNorm1d(5).double(), nn.Linear(5, CLASSES).double()
    nn.init.uniform_(norm.weight)
    x, y = 2 * torch.randn(6, 5).double() + 1, torch.randint(0, CLASSES, (6,))
    own = norm.weight.detach().repeat(6, 1).requires_grad_()  # every sample has a gain of its own
    normal = (x - x.mean(0)) / (x.var(0, correction=0) + norm.eps).sqrt()
    nn.functional.cross_entropy(head(own * normal + norm.bias), y).backward()
    covariance, square = slow(6 * own.grad, 0)
    head.zero_grad()
    noise = fit(nn.Sequential(norm, head), x, y, Keep())["0"].gradient_noise
    torch.testing.assert_close(noise.covariance("weight"), covariance)
    torch.testing.assert_close(noise.mean_square("weight"), square)
    assert norm.num_batches_tracked == 1


def test_a_non_finite_sample_is_left_out():
    net, x, y = build("linear")
    wanted = expected(net, x[1:], y[1:])
    x[0, 0] = torch.nan
    check(fit(net, x, y, Keep()), wanted, n=6)


class Windows(nn.Module):
    """Attention and a layer over windows, more than there are samples."""

    def __init__(self):
        super().__init__()
        self.attention, self.inner = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 4)

    def forward(self, x):
        w = x.unflatten(1, (2, -1)).flatten(0, 1)
        return self.inner(self.attention(w, w, w)[0]).unflatten(0, (len(x), 2)).flatten(1).mean(1, True)


def test_where_samples_cannot_be_told_apart_there_is_no_reading():
    x, y = torch.randn(4, 6, 4), torch.randint(0, CLASSES, (4,))
    net = nn.Sequential(nn.Embedding(5, 4), Flatten(), nn.Linear(4, CLASSES))
    index = torch.randint(0, 5, (4, 6))
    seen = fit(net, index, y, Keep())
    assert (seen["0"].gradient_noise, seen["0"].no_noise) == (None, "its input is an index")
    assert seen["2"].gradient_noise is not None
    seen = fit(nn.Sequential(Windows(), nn.Linear(1, CLASSES)), x, y, Keep())
    for name in ("0.attention.q_proj", "0.attention.out_proj", "0.inner"):
        assert seen[name].gradient_noise is None
        assert "does not begin with the batch's 4 samples" in seen[name].no_noise
    assert seen["1"].gradient_noise is not None


class Activated(nn.BatchNorm1d):
    """A normalisation that does more than its class."""

    def forward(self, x):
        return torch.relu(super().forward(x))


class Doubled(nn.LayerNorm):
    """A subclass that is its class."""


class Channels(nn.LayerNorm):
    """Normalises the first dimension after the samples."""

    def forward(self, x):
        return super().forward(x.mT).mT


def test_normalisations_are_taken_for_what_they_do():
    torch.manual_seed(0)
    x, y = torch.randn(6, 4).double(), torch.randint(0, CLASSES, (6,))
    net = nn.Sequential(
        nn.Linear(4, 5),
        Activated(5),
        Doubled(5),
        nn.Unflatten(1, (5, 1)),
        Channels(5),
        nn.Flatten(),
        nn.Linear(5, 3),
    )
    seen = fit(net.double(), x, y, Keep())
    for name in ("1", "4"):
        assert seen[name].gradient_noise is None
        assert seen[name].no_noise == "its output is not its normalised input times its gain"
    assert seen["2"].gradient_noise is not None
    assert seen["6"].gradient_noise is not None


def test_memory_for_inputs_is_limited_and_given_back():
    net, x, y = build("linear")
    watch = Keep(max_held_bytes=7 * 6 * 8 + 7 * 4 * 8)
    seen = fit(net, x, y, watch)
    readings = [seen[name].gradient_noise is not None for name in ("0", "2", "4")]
    assert readings == [True, False, True]
    assert "would exceed 560 bytes" in seen["2"].no_noise


def test_nothing_is_held_between_steps():
    class Keeps(nn.Module):
        """Keeps an output whose gradient never comes, and the graph behind it."""

        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(4, CLASSES), nn.Linear(4, 5)

        def forward(self, x):
            self.kept = self.unused(x)
            return self.used(x)

    held = []

    class Counted(gradient_noise._Held):
        def __init__(self, x, memory):
            super().__init__(x, memory)
            held.append(self)

    net, (x, y) = Keeps(), (torch.randn(7, 4), torch.randint(0, CLASSES, (7,)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gradient_noise, "_Held", Counted)
        seen = fit(net, x, y, Keep())
    assert seen["used"].gradient_noise.n == 7
    assert seen["unused"].gradient_noise is None
    assert net.kept.grad_fn is not None
    assert len(held) == 2
    assert all(one.x is None for one in held)
    assert held[0].memory.bytes == 0


def test_inputs_changed_in_place_and_second_backward_passes_have_no_reading():
    class Careless(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, CLASSES)
            self.layer.weight.requires_grad_(False)  # else autograd itself would refuse

        def forward(self, x):
            x = x.clone()
            out = self.layer(x)
            x.zero_()
            return out

    net, x, y = build("linear")
    seen = fit(nn.Sequential(Careless()), x.float(), y, Keep())
    assert seen["0.layer"].no_noise == "its input was changed in place"

    class Again(Classifier):
        def backward(self, loss):
            loss.backward(retain_graph=True)
            loss.backward()

    watch = Keep()
    trainer(callbacks=[watch], max_steps=1).fit(Again(net), DataLoader(TensorDataset(x, y), 7))
    assert all("more than one backward pass" in layer.no_noise for layer in watch.seen.values())


def test_only_layers_that_it_was_asked_of_have_it():
    class Other(Monitor):
        gradients = SecondMoments("output_gradients")
        needs = (gradients,)
        seen: ClassVar[dict] = {}

        def read(self, seen):
            noise = GradientNoise()
            self.seen.update(
                {layer.name: (layer[self.gradients].n, layer.get(noise)) for layer in seen.layers}
            )
            return iter(())

    net, x, y = build("linear")
    other, watch = Other(strict=True), Keep(layers="net.2")
    loader = DataLoader(TensorDataset(x, y), 7)
    trainer(callbacks=[other, watch], max_steps=1).fit(Classifier(net), loader)
    assert set(watch.seen) == {"net.2"}
    assert watch.seen["net.2"].gradient_noise is not None
    assert [n for n, _ in other.seen.values()] == [7, 7, 7]
    assert [noise is not None for _, noise in other.seen.values()] == [False, True, False]
