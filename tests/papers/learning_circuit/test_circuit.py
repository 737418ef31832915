"""Local rules against autograd and closed forms."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_sym.papers.learning_circuit import CircuitDivergenceError, LearningCircuit
from lightning_sym.papers.learning_circuit.rules import (
    RULES,
    Conv,
    Dense,
    FourSynapse,
    Geometry,
    Rule,
    register_rule,
)
from lightning_sym.papers.learning_circuit.rules.rule import Site, bias_update
from tests.models import trainer

NAMES = ["backprop", "feedback_alignment", "kolen_pollack", "four_synapse"]
LAYERS: list[int | Dense | Conv] = [Conv(4, kernel_size=3, stride=2, padding=1), Conv(3, kernel_size=2), 7, 3]


def images(n: int = 12, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(n, 2, 6, 6, generator=rng).to(dtype), torch.randint(3, (n,), generator=rng)


def circuit(rule: str | Rule, **settings: object) -> LearningCircuit:
    made = LearningCircuit((2, 6, 6), layers=LAYERS, rule=rule, activation="tanh", **settings)  # type: ignore[arg-type]
    return made.double()


def fit(
    module: LearningCircuit,
    batch: tuple[Tensor, Tensor],
    *,
    epochs: int = 1,
    batch_size: int = 4,
    ckpt_path: Path | None = None,
    **settings: object,
) -> Trainer:
    run = trainer(max_epochs=epochs, **settings)
    run.fit(module, DataLoader(TensorDataset(*batch), batch_size=batch_size), ckpt_path=ckpt_path)
    return run


def loss(module: LearningCircuit, batch: tuple[Tensor, Tensor]) -> float:
    return float(module.backprop_loss(batch).detach())


def single_samples(module: LearningCircuit, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """The four-synapse equations by loops over samples, neurons and pixels; fully connected layers only."""
    layers, total = module.stack, dict[str, Tensor]()
    for x, y in zip(*batch, strict=True):
        h, drives, sums = [x.flatten()], [], []
        for layer in layers:
            drives.append(layer.W.detach() @ h[-1])
            sums.append(drives[-1] + layer.get_parameter("bias").detach())
            h.append(torch.tanh(sums[-1]))
        p = torch.softmax(sums[-1], 0)
        g = torch.tensor([float(k == y) for k in range(len(p))]).double() - p
        for k in range(len(layers) - 1, -1, -1):
            s = layers[k].synapses()
            rate = module.rule.lateral_rate  # type: ignore[attr-defined]
            found = {
                "W": torch.outer(s["R"] @ g, h[k]),
                "bias": s["R"] @ g,
                "R": rate * torch.outer(drives[k], g),
            }
            if k:
                below = s["B"].T @ g
                found["B"] = torch.outer(g, s["L"] @ h[k])
                found["L"] = rate * torch.outer(below, h[k])
                g = (1 - torch.tanh(sums[k - 1]) ** 2) * below
            for name, value in found.items():
                key = f"layers.{k}.{name}"
                total[key] = total.get(key, torch.zeros_like(value)) + value / len(batch[0])
    return total


@pytest.mark.parametrize("task", ["classification", "regression"])
@pytest.mark.parametrize("activation", ["tanh", "relu", "softplus", lambda a: a * torch.sigmoid(a)])
def test_backprop_is_autograd(task: str, activation: Any) -> None:
    module = LearningCircuit(
        (2, 6, 6), layers=LAYERS, rule="backprop", task=task, activation=activation
    ).double()
    x, y = images()
    target = (
        y
        if task == "classification"
        else torch.randn(12, 3, generator=torch.Generator().manual_seed(5)).double()
    )
    changes, outputs = module.local_updates((x, target))
    names, parameters = zip(*module.named_parameters(), strict=True)
    expected = torch.autograd.grad(module.backprop_loss((x, target)), parameters)
    assert sorted(names) == sorted(changes)
    for name, gradient in zip(names, expected, strict=True):
        torch.testing.assert_close(changes[name], -gradient, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(outputs, module(x))


@pytest.mark.parametrize("laterals", ["identity", "random", "positive"])
def test_four_synapses_equal_a_loop_over_samples(laterals: str) -> None:
    rule = FourSynapse(0.3, laterals=laterals)
    module = LearningCircuit((5,), layers=[6, 4, 3], rule=rule, activation="tanh", seed=2).double()
    batch = torch.randn(7, 5, generator=torch.Generator().manual_seed(1)).double(), torch.arange(7) % 3
    changes, _ = module.local_updates(batch)
    expected = single_samples(module, batch)
    assert sorted(changes) == sorted(expected)
    for name, value in expected.items():
        torch.testing.assert_close(changes[name], value, rtol=1e-11, atol=1e-13)


def test_feedback_is_the_transpose_of_a_convolution() -> None:
    geometry = Conv(3, kernel_size=3, stride=2, padding=1).on((2, 6, 5))
    rng = torch.Generator().manual_seed(0)
    w = torch.randn(geometry.weight_shape, generator=rng).double()
    x = torch.randn(4, *geometry.lower, generator=rng).double().requires_grad_()
    up = geometry.up(x, w)
    g = torch.randn(up.shape, generator=rng).double()
    torch.testing.assert_close(geometry.down(g, w), torch.autograd.grad((up * g).sum(), x)[0])
    leaf = w.clone().requires_grad_()
    expected = torch.autograd.grad((geometry.up(x.detach(), leaf) * g).sum(), leaf)[0]
    torch.testing.assert_close(geometry.outer(g, x.detach()), expected)


def test_kolen_pollack_forgets_the_difference_geometrically() -> None:
    module = circuit("kolen_pollack", lr=0.2, decay=0.3)
    before = {name: w - b for name, (w, b) in module.feedback_pairs().items()}
    assert fit(module, images(), epochs=5).global_step == 15
    assert len(before) == 3
    for name, (w, b) in module.feedback_pairs().items():
        torch.testing.assert_close(w - b, (1 - 0.2 * 0.3) ** 15 * before[name], rtol=1e-10, atol=1e-14)


def test_four_synapses_with_frozen_identities_are_kolen_pollack() -> None:
    kolen, four = circuit("kolen_pollack"), circuit(FourSynapse(frozen_laterals=True))
    for name, value in kolen.named_parameters():  # both begin alike: laterals at the identity draw nothing
        assert torch.equal(four.get_parameter(name), value)
        assert name.endswith("B") or torch.equal(circuit("backprop").get_parameter(name), value)
    for module in (kolen, four):
        fit(module, images(), epochs=4)
    for name, value in kolen.named_parameters():
        torch.testing.assert_close(four.get_parameter(name), value, rtol=1e-12, atol=1e-14)
    for layer in four.stack:
        torch.testing.assert_close(layer.synapses()["R"], torch.eye(layer.geometry.upper[0]).double())


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_self_assembly_residuals_follow_their_decay_law(decay: float) -> None:
    rule = FourSynapse(0.5, laterals="random", unit_rows=False)
    errors = []
    for lr, steps in ((0.02, 25), (0.01, 50)):
        module = LearningCircuit(
            (5,), layers=[6, 4, 3], rule=rule, activation="tanh", lr=lr, decay=decay, seed=3
        )
        module = module.double()
        start = {k: {n: a - b for n, (a, b) in v.items()} for k, v in module.balances().items()}
        x = torch.randn(4, 5, generator=torch.Generator().manual_seed(1)).double()
        fit(module, (x, torch.arange(4) % 3), epochs=steps)
        worst = 0.0
        for layer, pairs in module.balances().items():
            for name in ("WWt_RRt", "VVt_LLt"):
                if name in pairs:
                    left = pairs[name][0] - pairs[name][1]
                    right = torch.exp(torch.tensor(-2 * decay * lr * steps)) * start[layer][name]
                    worst = max(worst, float((left - right).norm() / start[layer][name].norm()))
        errors.append(worst)
    assert errors[0] < 0.02
    assert errors[1] < 0.6 * errors[0]  # what is left is the finite step's, and shrinks with it


@pytest.mark.parametrize("rule", NAMES)
def test_a_fit_learns(rule: str) -> None:
    x, y = images(48, seed=3)
    x[:, :, :3] += (y[:, None, None, None] - 1).double()
    module = circuit(rule, lr=0.1)
    before = loss(module, (x, y))
    fit(module, (x, y), epochs=60, batch_size=16)
    assert loss(module, (x, y)) < 0.5 * before
    assert all(p.grad is None or p.grad.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize("rule", ["kolen_pollack", "four_synapse"])
def test_a_fit_regresses(rule: str) -> None:
    x = torch.randn(64, 5, generator=torch.Generator().manual_seed(0)).double()
    y = torch.stack([x[:, 0] * x[:, 1], x.sum(1)], 1)
    module = LearningCircuit((5,), layers=[32, 16, 2], rule=rule, task="regression", lr=0.05).double()
    before = loss(module, (x, y))
    fit(module, (x, y), epochs=60, batch_size=16)
    assert loss(module, (x, y)) < 0.2 * before


@pytest.mark.parametrize("rule", NAMES)
def test_all_tensors_are_on_the_circuits_device(rule: str) -> None:
    module = circuit(rule).to("meta")  # a product with a tensor left on the CPU would raise
    batch = (images()[0].to("meta"), images()[1].to("meta"))
    changes, outputs = module.local_updates(batch)
    assert {value.device.type for value in (*changes.values(), outputs)} == {"meta"}
    assert module.backprop_loss(batch).device.type == "meta"


@pytest.mark.parametrize("rule", NAMES)
def test_a_resumed_fit_is_bitwise_the_whole_one(rule: str, tmp_path: Path) -> None:
    batch = images(dtype=torch.float64)
    whole = circuit(rule, momentum=0.9, lr=0.02)
    fit(whole, batch, epochs=4)
    half = circuit(rule, momentum=0.9, lr=0.02)
    fit(half, batch, epochs=2).save_checkpoint(tmp_path / "half.ckpt", weights_only=False)
    torch.load(tmp_path / "half.ckpt", weights_only=True)
    rest = circuit(rule, momentum=0.9, lr=0.02, seed=9)
    fit(rest, batch, epochs=4, ckpt_path=tmp_path / "half.ckpt")
    for name, value in whole.state_dict().items():
        assert torch.equal(value, rest.state_dict()[name]), name


def test_a_step_without_a_trainer_is_the_trainers() -> None:
    batch = images(8)
    fitted, stepped = circuit("four_synapse", momentum=0.9), circuit("four_synapse", momentum=0.9)
    fit(fitted, batch)
    optimizer = stepped.configure_optimizers()
    for part in (slice(0, 4), slice(4, 8)):
        stepped.learn((batch[0][part], batch[1][part]), optimizer)
    for name, value in fitted.state_dict().items():
        assert torch.equal(value, stepped.state_dict()[name]), name
    with pytest.raises(
        CircuitDivergenceError, match=r"the circuit diverged: the update of W of layers\.3 under"
    ):
        stepped.learn((batch[0] * torch.nan, batch[1]), optimizer)


def test_no_graph_is_built_through_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("backward was called")

    monkeypatch.setattr(Tensor, "backward", refuse)
    module = circuit("kolen_pollack")
    changes, outputs = module.local_updates(images())
    assert not outputs.requires_grad
    assert not any(change.requires_grad for change in changes.values())
    fit(module, images())


def test_mixed_precision_is_taken_in_the_parameters_type() -> None:
    batch = images(dtype=torch.float32)
    plain, mixed = (LearningCircuit((2, 6, 6), layers=LAYERS, rule="kolen_pollack") for _ in range(2))
    fit(plain, batch)
    fit(mixed, batch, precision="bf16-mixed")
    for name, value in plain.state_dict().items():
        assert torch.equal(value, mixed.state_dict()[name]), name


@pytest.mark.parametrize("how", ["lr", "nan"])
def test_divergence_names_layer_and_rule(how: str) -> None:
    x, y = images(dtype=torch.float64)
    module = circuit("four_synapse", lr=1e6) if how == "lr" else circuit("four_synapse")
    if how == "nan":
        x[5] = float("nan")
    with pytest.raises(CircuitDivergenceError, match=r"layers\.\d under the rule 'four_synapse'"):
        fit(module, (x, y), epochs=20)
    if how == "nan":  # the update was not made
        assert all(p.isfinite().all() for p in module.parameters())


def test_a_rule_of_ones_own() -> None:
    class Slow(Rule):
        """Descends through a population of its own that follows the ascending changes slowly."""

        name = "test_slow"

        def synapses(self, geometry: Geometry, *, first: bool) -> dict[str, str | Tensor]:
            return {"slow": torch.full(geometry.weight_shape, 0.1)}

        def descend(self, geometry: Geometry, synapses: Mapping[str, Tensor], error: Tensor) -> Tensor:
            return geometry.down(error, synapses["slow"])

        def updates(self, site: Site) -> dict[str, Tensor]:
            change = site.geometry.outer(site.error, site.below)
            return {"W": change, "slow": 0.1 * change, "bias": bias_update(site.error)}

    register_rule(Slow)
    try:
        module = circuit("test_slow", lr=0.1)
        before = loss(module, images())
        fit(module, images(), epochs=10)
        assert loss(module, images()) < before
        assert not torch.equal(module.get_parameter("layers.1.slow"), torch.full((3, 4, 2, 2), 0.1).double())
        with pytest.raises(ValueError, match="test_slow"):
            register_rule(type("Other", (Slow,), {}))
    finally:
        del RULES["test_slow"]


@pytest.mark.parametrize(
    ("kinds", "words"), [({"R": "zero"}, "R must begin .*'zero'"), ({"M": "random"}, "among B, R and L.*'M'")]
)
def test_a_rule_that_asks_for_nonsense_is_told(kinds: dict[str, str], words: str) -> None:
    class Odd(FourSynapse):
        def synapses(self, geometry: Geometry, *, first: bool) -> dict[str, str]:
            return kinds

    with pytest.raises(ValueError, match=words):
        circuit(Odd())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rule": "backdrop"}, "backdrop"),
        ({"task": "ranking"}, "task"),
        ({"layers": []}, "layers"),
        ({"layers": [Conv(3)]}, "layers"),
        ({"layers": [0, 3]}, "features"),
        ({"layers": [Conv(3, kernel_size=9), 3]}, "kernel"),
        ({"lr": 0.0}, "lr"),
        ({"decay": -1.0}, "decay"),
        ({"momentum": 1.0}, "momentum"),
        ({"seed": -1}, "seed"),
        ({"activation": "rellu"}, "rellu"),
        ({"activation": "argmax"}, "argmax"),
        ({"activation": lambda a: a.softmax(-1)}, "elementwise"),
        ({"activation": torch.relu_}, "leaves its argument"),
    ],
)
def test_bad_arguments_are_named(settings: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        LearningCircuit((2, 6, 6), **{"layers": LAYERS, **settings})  # type: ignore[arg-type]


def test_bad_inputs_and_types_are_named() -> None:
    with pytest.raises(ValueError, match=r"x must be \[N, 2, 6, 6\]"):
        circuit("backprop")(torch.zeros(3, 72).double())
    with pytest.raises(TypeError, match="rule"):
        LearningCircuit((5,), layers=[3], rule=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="laterals"):
        FourSynapse(laterals="zero")
    with pytest.raises(ValueError, match="lateral_rate"):
        FourSynapse(-1.0)
    with pytest.raises(ValueError, match="channels"):
        Conv(0)
    assert Dense(3).on((2, 2)).fan_in == 4


def _rank(rank: int, folder: str, rule: str, dtype: torch.dtype) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    x, y = images(10)
    cut = (slice(0, 7), slice(7, 10))[rank]  # uneven on purpose
    changes, _ = circuit(rule).to(dtype).local_updates((x[cut], y[cut]))
    torch.save(changes, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_two_ranks_take_the_mean_over_all_samples(dtype: torch.dtype, tmp_path: Path) -> None:
    args = (str(tmp_path), "four_synapse", dtype)
    mp.start_processes(_rank, args=args, nprocs=2, start_method="fork")
    expected, _ = circuit("four_synapse").to(dtype).local_updates(images(10))
    near = {"rtol": 1e-11, "atol": 1e-13} if dtype == torch.float64 else {"rtol": 0.05, "atol": 0.01}
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, **near)  # type: ignore[arg-type]


class Keep(Callback):
    """Writes what every rank ends with."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        torch.save(
            dict(pl_module.state_dict()), self.folder / f"{trainer.world_size}-{trainer.global_rank}.pt"
        )


def test_a_fit_on_two_ranks_is_one_on_joined_batches(tmp_path: Path) -> None:
    whole = images(16)  # a batch an epoch: ranks shuffle
    for devices, strategy in ((1, "auto"), (2, "ddp_fork")):
        settings = {"devices": devices, "strategy": strategy, "callbacks": [Keep(tmp_path)]}
        fit(circuit("four_synapse"), whole, epochs=5, batch_size=16 // devices, **settings)
    one, first, second = (
        torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("1-0", "2-0", "2-1")
    )
    for name, value in one.items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], value, rtol=1e-10, atol=1e-12)


def test_divergence_on_one_rank_ends_the_fit_on_all(tmp_path: Path) -> None:
    x, y = images(8)
    x[3] = torch.nan
    with pytest.raises(mp.ProcessRaisedException, match=r"the update of \w+ of layers\.\d under the rule"):
        fit(circuit("four_synapse"), (x, y), batch_size=4, devices=2, strategy="ddp_fork")
