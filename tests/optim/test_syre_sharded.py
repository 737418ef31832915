"""syre on sharded parameters: DTensors on two gloo ranks, and FSDP2 in a Trainer."""

from __future__ import annotations

import os
import socket
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from lightning.pytorch import Callback
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import functional as F

from lightning_sym.callbacks import Syre
from lightning_sym.optim import attach_syre
from tests.models import Classifier, images, mlp, trainer


class Unknown(torch.optim.SGD):
    """An optimizer that the package does not know."""


CASES = {
    "sgd": (torch.optim.SGD, {"momentum": 0.9}, 0.2),
    "adam": (torch.optim.Adam, {}, 0.0),
    "adamw": (torch.optim.AdamW, {}, 0.2),
    "fused adamw": (torch.optim.AdamW, {"fused": True}, 0.0),
    "unknown": (Unknown, {}, 0.0),
}


def run(net: nn.Module, name: str) -> tuple[dict[str, Tensor], nn.Module, dict[str, Tensor]]:
    kind, settings, anisotropy = CASES[name]
    optimizer = kind(net.parameters(), lr=0.01, weight_decay=0.3, **settings)
    handle = attach_syre(
        optimizer, sigma=0.3, anisotropy=anisotropy, named_parameters=net.named_parameters(), start="shift"
    )
    draw = torch.Generator().manual_seed(1)
    for _ in range(10):
        x = torch.randn(8, 4, generator=draw).double()
        optimizer.zero_grad()
        F.mse_loss(net(x), x[:, :3]).backward()
        optimizer.step()
    return handle.offsets(), net, handle.forces()


def net_of(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return mlp(4, 7, 3).double()  # 7 rows on two ranks: shards of different sizes


def on_two_ranks(work, *args) -> None:
    """Run ``work(rank, *args)`` in two processes that have each other's address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.start_processes(_started, (port, work, args), nprocs=2, start_method="fork")


def _started(rank: int, port: int, work, args) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), LOCAL_RANK=str(rank), NODE_RANK="0", WORLD_SIZE="2"
    )
    os.environ["RANK"] = str(rank)
    warnings.filterwarnings("ignore", "DTensor random operators may not")  # torch 2.6 warns on any CPU mesh
    work(rank, *args)


def _shards(rank: int, folder) -> None:
    dist.init_process_group("gloo", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    found = {}
    for name in CASES:
        net = net_of()
        fully_shard(net, mesh=mesh)
        assert all(isinstance(p, DTensor) for p in net.parameters())
        offsets, net, forces = run(net, name)
        assert all(isinstance(v, DTensor) for v in offsets.values())
        for n, parameter in net.named_parameters():
            if n in offsets:  # this rank's rows of theta_0 stand beside its rows of the weight
                assert offsets[n].to_local().shape == parameter.to_local().shape
        found[name] = {
            "local": {n: v.to_local().clone() for n, v in offsets.items()},
            "force": {n: v.full_tensor() for n, v in forces.items() if n in offsets},
            "weight": {n: p.detach().full_tensor() for n, p in net.named_parameters()},
        }
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_shards_of_the_offset_and_steps_are_those_of_the_whole(tmp_path):
    on_two_ranks(_shards, tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    for name in CASES:
        offsets, net, _ = run(net_of(), name)
        for n, value in offsets.items():
            assert torch.equal(torch.cat([first[name]["local"][n], second[name]["local"][n]]), value)
            torch.testing.assert_close(first[name]["force"][n], 0.3 * value)
        assert len(first[name]["local"]["0.weight"]) == 4
        for n, parameter in net.named_parameters():
            for rank in (first, second):
                torch.testing.assert_close(
                    rank[name]["weight"][n], parameter.detach(), rtol=1e-12, atol=1e-14
                )


MIXED = [name for name in CASES if "fused" not in name]  # torch's fused steps refuse such a group


def _mixed(rank: int, folder) -> None:
    """Tensor-parallel layers beside plain ones, all in one group; gains and biases of both kinds too."""
    dist.init_process_group("gloo", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    found = {}
    for name in MIXED:
        net = mixed_net()
        parallelize_module(net, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
        kinds = {type(p) for p in net.parameters()}
        assert len(kinds) == 2
        offsets, net, _ = run(net, name)
        found[name] = {
            part: {n: v.detach().full_tensor() if isinstance(v, DTensor) else v.detach() for n, v in values}
            for part, values in (("offset", offsets.items()), ("weight", net.named_parameters()))
        }
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


def mixed_net() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 6), nn.LayerNorm(6), nn.Linear(6, 3)]
    return nn.Sequential(*layers).double()


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_sharded_and_plain_tensors_share_a_group(tmp_path):
    on_two_ranks(_mixed, tmp_path)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for name in MIXED:
        offsets, net, _ = run(mixed_net(), name)
        for rank in ranks:
            assert rank[name]["offset"].keys() == offsets.keys()
            for n, parameter in net.named_parameters():
                torch.testing.assert_close(
                    rank[name]["weight"][n], parameter.detach(), rtol=1e-10, atol=1e-12
                )
                if n in offsets:
                    assert torch.equal(rank[name]["offset"][n], offsets[n])


def _warned(rank: int, folder) -> None:
    """One half of the weight is large: only the whole norm says that the offset is not larger."""
    dist.init_process_group("gloo", rank=rank, world_size=2)
    layer = nn.Linear(4, 2, bias=False)
    with torch.no_grad():
        layer.weight.zero_()
        layer.weight[0] = 5.0
    fully_shard(layer, mesh=init_device_mesh("cpu", (2,)))
    import warnings

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, weight_decay=0.1)
        attach_syre(optimizer, sigma=0.1, named_parameters=layer.named_parameters())
    (folder / str(rank)).write_text("\n".join(str(w.message) for w in caught if "offset" in str(w.message)))
    dist.destroy_process_group()


def test_the_norm_of_a_sharded_weight_is_the_whole_one(tmp_path):
    on_two_ranks(_warned, tmp_path)
    assert [(tmp_path / str(rank)).read_text() for rank in range(2)] == ["", ""]


class Sharded(Classifier):
    """Shards its network when the Trainer asks for it."""

    def configure_model(self):
        if self.device_mesh is not None and not isinstance(next(self.parameters()), DTensor):
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])


class Keep(Callback):
    def __init__(self, syre: Syre, path) -> None:
        self.syre, self.path = syre, path

    def on_train_end(self, trainer, pl_module):
        whole = {n: p.detach() for n, p in pl_module.named_parameters()}
        state = {"weight": whole, "offset": self.syre.handles[0].offsets()}
        gathered = {
            k: {n: v.full_tensor() if isinstance(v, DTensor) else v.clone() for n, v in d.items()}
            for k, d in state.items()
        }
        torch.save(gathered, self.path)


def fit(path, **settings) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), *mlp(64, 7, 4))
    model = Sharded(net, optimizer=torch.optim.AdamW, weight_decay=0.3).double()
    syre = Syre(sigma=0.2, seed=5, start="shift")
    loader = images(batch_size=8)
    loader.dataset.tensors = (loader.dataset.tensors[0].double(), loader.dataset.tensors[1])
    trainer(max_epochs=2, use_distributed_sampler=False, callbacks=[syre, Keep(syre, path)], **settings).fit(
        model, loader
    )


def _fitted(rank: int, folder) -> None:
    strategy = ModelParallelStrategy(
        data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo"
    )
    fit(folder / f"{rank}.pt", strategy=strategy, devices=2)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_sharded_fit_is_the_plain_one(tmp_path):
    on_two_ranks(_fitted, tmp_path)
    fit(tmp_path / "plain.pt")
    plain, *ranks = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("plain", 0, 1))
    assert set(plain["offset"]) == {"net.1.weight", "net.3.weight"}
    for rank in ranks:
        for name, value in plain["offset"].items():
            assert torch.equal(rank["offset"][name], value)
        for name, value in plain["weight"].items():
            torch.testing.assert_close(rank["weight"][name], value, rtol=1e-10, atol=1e-12)
