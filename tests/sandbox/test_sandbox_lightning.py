"""The sandbox in a running fit of either Lightning package: what a step logs, sets and steps stays inside."""

import gc
import warnings
import weakref

import lightning.pytorch as pl
import pytest
import pytorch_lightning
import torch
from lightning.fabric import Fabric
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_sym.sandbox import Sandbox, training_loss

REGISTRY: list[type] = []


class Registering(type):
    def __init__(cls, *args, **kwargs):
        super().__init__(*args, **kwargs)
        REGISTRY.append(cls)


def make(package, metaclass=type):
    class Model(package.LightningModule, metaclass=metaclass):
        def __init_subclass__(cls, **kwargs):
            REGISTRY.append(cls)

        def __init__(self, manual=False):
            super().__init__()
            self.automatic_optimization = not manual
            self.first, self.second = nn.Linear(4, 3), nn.Linear(3, 2)
            self.child = Child()
            self.opts = []

        def forward(self, x):
            self.log("size", x.mean(), on_step=False, on_epoch=True)
            self.print("spoken")
            return self.child(self.second(self.first(x).relu()))

        def training_step(self, batch, batch_idx):
            loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
            self.logger.log_metrics({"own": 1.0}, step=self.trainer.global_step)
            self.loggers[0].experiment.add_text("a", "b")
            self.trainer.optimizers[0].param_groups[0]["lr"] *= 0.5
            self.trainer.should_stop = True
            if not self.automatic_optimization:
                first, second = self.optimizers()
                schedule = self.lr_schedulers()
                self.opts.append(first)
                self.toggle_optimizer(first)
                first.zero_grad()
                self.manual_backward(loss, retain_graph=True)
                first.step()
                self.untoggle_optimizer(first)
                second.step()
                schedule.step()
            return loss

        def configure_optimizers(self):
            if self.automatic_optimization:
                return torch.optim.SGD(self.parameters(), torch.tensor(0.1), momentum=0.9)
            first = torch.optim.Adam(self.first.parameters(), 0.1)
            second = torch.optim.SGD(self.second.parameters(), 0.1, momentum=0.9)
            return [first, second], [torch.optim.lr_scheduler.StepLR(first, 1)]

    class Child(package.LightningModule):
        def forward(self, x):
            self.print("said by the child")
            return x

    return Model


def recorder(package, found):
    class Sides(package.Callback):
        """Opens a sandbox after each step and says whether anything changed."""

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            trainer.should_stop = False
            before = self.state(trainer, pl_module)
            sandbox = Sandbox(
                pl_module,
                precision=trainer.precision_plugin.forward_context,
                convert=trainer.precision_plugin.convert_input,
                trainer=trainer,
            )
            with sandbox.open(train=True, grad=True, seed=1) as apart:
                placed = apart.place(batch)
                loss = training_loss(apart, placed, "training_step")
                own = [p.detach().clone() for p in apart.module.parameters()]
                assert apart.module.trainer is trainer
                assert isinstance(apart.module, type(pl_module))
                if pl_module.automatic_optimization:
                    loss.backward()
            found.append((self.state(trainer, pl_module) == before, float(loss.detach()), own))
            found[-1] += ([p.detach().clone() for p in pl_module.parameters()],)

        @staticmethod
        def state(trainer, module):
            return repr(
                {
                    "parameters": [
                        (p.tolist(), None if p.grad is None else p.grad.tolist()) for p in module.parameters()
                    ],
                    "needs": [p.requires_grad for p in module.parameters()],
                    "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers],
                    "groups": [
                        id(group) for optimizer in trainer.optimizers for group in optimizer.param_groups
                    ],
                    "schedules": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
                    "steps": trainer.global_step,
                    "stop": trainer.should_stop,
                    "logged": len(trainer.loggers[0].said),
                    "opts": len(module.opts),
                    "metrics": sorted(trainer.fit_loop._results),
                    "random": torch.get_rng_state().tolist(),
                }
            )

    return Sides()


def logger(package):
    base = package.loggers.logger

    class Remembering(base.DummyLogger):
        def __init__(self):
            super().__init__()
            self.said = []

        def log_metrics(self, *args, **kwargs):
            self.said.append(args)

    return Remembering()


def fit(package, module, callbacks):
    trainer = package.Trainer(
        max_steps=4 if module.automatic_optimization else 8,
        accelerator="cpu",
        devices=1,
        logger=logger(package),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
        log_every_n_steps=1,
    )
    torch.manual_seed(3)
    trainer.fit(module, DataLoader(TensorDataset(torch.randn(32, 4), torch.arange(32) % 2), 8))
    return trainer


@pytest.mark.parametrize("manual", [False, True])
@pytest.mark.parametrize("package", [pl, pytorch_lightning])
def test_a_step_on_the_side_of_a_fit(package, manual, capsys):
    torch.manual_seed(0)
    found = []
    module = make(package)(manual)
    known = len(REGISTRY)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*self.log.*")
        warnings.filterwarnings("error", message=".*lr_scheduler.*")
        trainer = fit(package, module, [recorder(package, found)])
    assert len(found) == 4
    assert all(unchanged for unchanged, *_ in found)
    assert all(loss > 0 for _, loss, *_ in found)
    assert len(REGISTRY) == known
    said = capsys.readouterr().out
    assert said.count("spoken") == said.count("child") == 4
    if manual:  # the copies of the optimizers did step the copy
        moved = [[not torch.equal(a, b) for a, b in zip(own, p, strict=True)] for _, _, own, p in found]
        assert all(all(step) for step in moved)

    # A fit without the sandbox ends where this one did.
    torch.manual_seed(0)
    bare = make(package)(manual)

    class GoesOn(package.Callback):
        def on_train_batch_end(self, trainer, *args):
            trainer.should_stop = False

    other = fit(package, bare, [GoesOn()])
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), bare.parameters(), strict=True))
    assert trainer.loggers[0].said == other.loggers[0].said
    assert trainer.callback_metrics == other.callback_metrics


def test_a_fabric_module():
    fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
    inner = nn.Sequential(nn.Linear(4, 3))
    module, _ = fabric.setup(inner, torch.optim.SGD(inner.parameters(), 0.1))
    x = torch.ones(2, 4)
    with Sandbox(module).open(grad=True, full_precision=True) as apart:
        found = apart("forward", x)
        found.sum().backward()
        assert [name for name, _ in apart.module.named_parameters()] == [
            n for n, _ in module.named_parameters()
        ]
    assert torch.equal(found, inner(x))  # without the wrapper's autocast
    assert all(p.grad is None for p in module.parameters())


def test_hooks_of_fabrics_optimizer_run_once_a_step():
    """Fabric's class is made for the optimizer, and derived from torch's, which wraps a class's step."""

    class Plain(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x):
            return self.layer(x)

    module, ran, fabric = Plain(), [], Fabric(accelerator="cpu", devices=1)
    wrapped, optimizer = fabric.setup(module, torch.optim.SGD(module.parameters(), 0.1))
    optimizer.register_step_post_hook(lambda stepped, *_: ran.append(type(stepped).__name__))
    with Sandbox(module).open() as apart:
        mine = apart.module.optimizers()
        assert type(mine) is torch.optim.SGD
        assert mine.param_groups[0]["params"][0] is next(apart.module.parameters())
    fabric.backward(wrapped(torch.ones(2, 4)).sum())
    optimizer.step()
    assert ran == ["SGD"]


def test_metaclasses_are_not_told():
    module = make(pl, Registering)()
    known = len(REGISTRY)
    with Sandbox(module).open() as apart:
        assert type(apart.module) is not type(module)
        assert type(apart.module).__name__ == "Model"
        apart("forward", torch.ones(2, 4))
    assert len(REGISTRY) == known


def test_the_copy_lets_go_of_the_trainer():
    module = make(pl)()
    trainer = fit(pl, module, [])
    with Sandbox(module, trainer=trainer).open() as apart:
        assert apart.module.trainer is trainer
        assert apart.module.child.trainer is trainer
    reference = weakref.ref(trainer)
    module.trainer = None
    del trainer
    gc.collect()
    assert reference() is None
    assert isinstance(apart.module, nn.Module)


def test_an_optimizer_kept_on_the_module():
    """What ``self.optimizers()`` returns leads to the trainer's strategy, which is not copied."""

    class Keeps(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            pl_module.mine = pl_module.optimizers()[0]
            with Sandbox(pl_module, trainer=trainer).open(grad=True) as apart:
                kept = apart.module.mine
                assert kept.param_groups[0]["params"][0] is apart.module.first.weight
                apart.module.first.weight.sum().backward()
                kept.step()
            trainer.should_stop = True

    module = make(pl)(manual=True)
    fit(pl, module, [Keeps()])
