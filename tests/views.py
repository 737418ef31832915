"""Images whose views tests look at, a module that keeps what it sees, and ways to get batches."""

import torch
from lightning.pytorch import LightningModule, Trainer


class Squares:
    """Images that tell their number: all pixels of image n are n."""

    def __init__(self, n=40, side=12):
        self.n, self.side = n, side

    def __len__(self):
        return self.n

    def __getitem__(self, index):
        return torch.full((3, self.side, self.side), index, dtype=torch.uint8), index % 10


class Noise(Squares):
    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        return torch.randint(0, 256, (3, self.side, self.side), generator=generator).byte(), index % 10


class Recorder(LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen, self.validated = [], []

    def training_step(self, batch):
        self.seen.append(batch)
        return self.weight.square()

    def validation_step(self, batch):
        self.validated.append(batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(data, module=None, ckpt=None, **options):
    module = module or Recorder()
    options = {"max_epochs": 2, "logger": False, "enable_checkpointing": False, **options}
    trainer = Trainer(accelerator="cpu", enable_progress_bar=False, enable_model_summary=False, **options)
    trainer.fit(module, datamodule=data, ckpt_path=ckpt)
    return module, trainer


def batches(data, epoch=0):
    data.setup()
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)
    return [data.on_after_batch_transfer(batch, 0) for batch in loader]


def assert_same_batches(seen, expected):
    assert len(seen) == len(expected)
    for (views, labels), (again, other) in zip(seen, expected, strict=True):
        assert torch.equal(labels, other)
        assert all(torch.equal(a, b) for a, b in zip(views, again, strict=True))
