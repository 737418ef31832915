"""Self-supervised training on views: one backbone, one projector, a loss of two embeddings.

Shape letters: B batch, F representation width, D embedding dimensions.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.memory import is_oom_error
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from lightning_sym.losses._pairs import PairLoss
from lightning_sym.modules import _parts, _saving, _views


class JointEmbedding(LightningModule):
    """A LightningModule that pulls the embeddings of a sample's views together.

    A batch is ``(views, labels)`` with ``views`` a list of two or more ``[B, C, H, W]``; labels are
    not used. With more than two views the loss is the mean over all pairs; if they differ in size, over
    all pairs of a largest one with any other (:func:`~lightning_sym.modules._views.pairs_of`). Works in
    any precision and on any number of ranks: the loss is of the global batch, and with
    ``sync_batchnorm`` the statistics are too.

    ``load_from_checkpoint(path)`` alone gives the module as it was trained; an argument that is an object
    (a backbone or a loss of one's own) is to be given again: ``load_from_checkpoint(path, backbone=net)``.

    Args:
        loss: the loss of two embeddings ``[B, D]``.
        backbone: name of a timm model, or a module that maps images to ``[B, F]``.
        projector: widths of the projector's layers, the embedding's last; empty: none.
        small_images: a ResNet's stem for images of about 32 pixels.
        features: F, for a backbone that is a module.
        backbone_options: passed to ``timm.create_model``.
        optimizer: a ``torch.optim`` name, ``"lars"`` or an optimizer class.
        optimizer_options: passed to it, ``{"momentum": 0.9}`` say.
        lr: peak learning rate. None: ``base_lr`` times the global batch size over 256.
        weight_decay: of weights; biases and normalisation layers have none.
        warmup_epochs: epochs of linear warm-up, at most a tenth of the run.
        schedule: ``"cosine"`` down from the peak to the end of the run, whichever of the trainer's
            ``max_epochs``, ``max_steps`` and ``max_time`` comes first (the last is estimated anew at every
            step, from the steps made so far); or ``"constant"``: no warm-up either.
        final_lr_share: share of the peak the cosine ends at.
        init_scale: multiplies every parameter once at the start. Below one it sharpens the steps in
            which dimensions are learned; layers followed by a normalisation do not feel it.
        joint_forward: one forward pass of all views, so that they share their batch statistics.
        compile: run the backbone compiled; a mapping is passed to ``torch.compile``.
        sync_batchnorm: batch statistics of all ranks (on GPUs). ``Trainer(sync_batchnorm=True)`` does
            the same for a ResNet, but loses the activations that many other timm models fuse into
            their normalisation; it is refused with those.
        rank_check: what to do about a batch whose centred embeddings cannot have full rank
            (global batch size minus one below D) under a loss that asks for it: the papers
            train like this themselves (2048 samples, 8192 dimensions), hence a warning by default.

    Raises:
        ValueError: if a name or a size is wrong; before the first step, if there is no batch, batches
            have one sample or do not hold views the backbone can take, for ``rank_check="error"``, or if
            the trainer has taken activations away.
    """

    base_lr: ClassVar[float] = 0.2

    def __init__(
        self,
        loss: PairLoss,
        backbone: str | torch.nn.Module = "resnet18",
        *,
        projector: Sequence[int] = (2048, 2048, 2048),
        small_images: bool = False,
        features: int | None = None,
        backbone_options: Mapping[str, Any] | None = None,
        optimizer: str | type[torch.optim.Optimizer] = "lars",
        optimizer_options: Mapping[str, Any] | None = None,
        lr: float | None = None,
        weight_decay: float = 1e-6,
        warmup_epochs: float = 10.0,
        schedule: Literal["cosine", "constant"] = "cosine",
        final_lr_share: float = 0.0,
        init_scale: float = 1.0,
        joint_forward: bool = False,
        compile: bool | Mapping[str, Any] = False,
        sync_batchnorm: bool = False,
        rank_check: Literal["warn", "error", "off"] = "warn",
    ) -> None:
        super().__init__()
        frame = inspect.currentframe()
        assert frame is not None  # CPython has them
        self.save_hyperparameters(_saving.arguments(self, frame))
        _saving.refuse_foreign(
            backbone=backbone, loss=loss, optimizer=optimizer, backbone_options=backbone_options,
            optimizer_options=optimizer_options, compile=compile,
        )  # fmt: skip
        _check_options(lr, weight_decay, warmup_epochs, schedule, final_lr_share, init_scale, rank_check)
        _parts.optimizer_class(optimizer)
        self.loss = loss
        if isinstance(backbone, str):
            self.backbone, width = _parts.backbone(
                backbone, small_images=small_images, **(backbone_options or {})
            )
        elif features is None:
            raise ValueError("features must be given with a backbone that is a module, got None")
        else:
            self.backbone, width = backbone, features
        self.backbone_name = repr(backbone) if isinstance(backbone, str) else type(backbone).__name__
        self._width = width
        self._timm_name = backbone if isinstance(backbone, str) else None
        self._small_images, self._backbone_options = small_images, dict(backbone_options or {})
        self._fits = False  # whether the backbone has taken a batch
        self.projector: torch.nn.Module = _parts.projector(width, projector)
        self.dimensions = projector[-1] if len(projector) else width
        self.optimizer = optimizer
        self.optimizer_options = dict(optimizer_options or {})
        self.lr, self.weight_decay = lr, weight_decay
        self.warmup_epochs, self.schedule, self.final_lr_share = warmup_epochs, schedule, final_lr_share
        self.joint_forward, self.rank_check = joint_forward, rank_check
        self.compile_backbone, self.sync_batchnorm = compile, sync_batchnorm
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.mul_(init_scale)

    @override
    def forward(self, x: Tensor) -> Tensor:
        """Return the representation of images, ``[B, C, H, W]`` to ``[B, F]``."""
        return self.backbone(x)

    def embed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the representation ``[B, F]`` and the embedding ``[B, D]`` of images."""
        try:
            representation = self.backbone(x)
        except (RuntimeError, AssertionError, ValueError, TypeError) as error:
            if self._fits or is_oom_error(error):  # then it is not that they do not go together
                raise
            told = _views.misfit(x, self.backbone, name=self.backbone_name, error=error)
            raise ValueError(told) from error
        _views.check_representation(representation, x, name=self.backbone_name, features=self._width)
        self._fits = True
        return representation, self.projector(representation)

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the mean loss over all pairs of views, and log it as ``train_loss``."""
        loss = self.views_loss(batch)
        self.log("train_loss", loss, prog_bar=True, batch_size=1)  # of the global batch: equal on ranks
        return loss

    @override
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Log the mean loss over all pairs of held-out views, in eval mode, as ``val_loss``."""
        self.log("val_loss", self.views_loss(batch), prog_bar=True, batch_size=len(batch[0][0]))

    def views_loss(self, batch: Any) -> Tensor:
        """Return the mean loss over the pairs of views of a batch.

        Raises:
            ValueError: if the batch is not ``(views, labels)`` with two views at least, of the same samples.
        """
        views = _views.views_of(batch)
        embeddings: list[Tensor] = [*views]
        if self.joint_forward:
            for shape in dict.fromkeys(view.shape for view in views):
                same = [k for k, view in enumerate(views) if view.shape == shape]
                joint = self.embed(torch.cat([views[k] for k in same]))[1].chunk(len(same))
                for k, embedding in zip(same, joint, strict=True):
                    embeddings[k] = embedding
        else:
            embeddings = [self.embed(view)[1] for view in views]
        pairs = _views.pairs_of(views)
        losses = torch.stack([self.loss(embeddings[a], embeddings[b]) for a, b, _ in pairs])
        weights = losses.new_tensor([weight for *_, weight in pairs])
        return (losses * weights).sum() / weights.sum()

    def export_backbone(self, path: str | Path) -> None:
        """Write the backbone as a safetensors file from which timm alone rebuilds it.

        The file's metadata hold ``timm_name`` and ``timm_args``, JSON of the arguments of
        ``timm.create_model``; the weights go in with ``load_state_dict``. timm's ResNets have no argument
        for the stem of ``small_images=True``, whose first convolution has stride one: the metadata then
        hold ``timm_parts`` too, JSON of the modules of ``torch.nn`` to put into the model before the
        weights go in, ``{"conv1": ["Conv2d", {...}], "maxpool": ["Identity", {}]}``::

            for name, (kind, options) in json.loads(metadata.get("timm_parts", "{}")).items():
                model.set_submodule(name, getattr(torch.nn, kind)(**options))

        Weights of another type than float32 keep it: the rebuilt model is then to be cast.

        Args:
            path: of the file.

        Raises:
            ValueError: if timm cannot rebuild the backbone from its name and arguments: it is no timm
                model, or was changed.
        """
        if not isinstance(self._timm_name, str):
            raise ValueError(
                f"backbone must be the name of a timm model to be exported, got a {self.backbone_name}; save "
                "module.backbone.state_dict() instead"
            )
        _saving.export(
            self.backbone,
            path,
            name=self._timm_name,
            options=self._backbone_options,
            small_images=self._small_images,
        )

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep a reloaded module from fetching pretrained weights it then overwrites."""
        kept = checkpoint.get(self.CHECKPOINT_HYPER_PARAMS_KEY) or {}
        options = kept.get("backbone_options")
        if options:
            options = {k: v for k, v in options.items() if k not in _saving.FROM_ELSEWHERE}
            checkpoint[self.CHECKPOINT_HYPER_PARAMS_KEY] = {**kept, "backbone_options": options}

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the floating point type the weights were trained in, unless a trainer has chosen one."""
        if self._trainer is None and self._fabric is None:
            weights = checkpoint["state_dict"]
            types = {w.dtype for name, w in weights.items() if w.is_floating_point()}
            if len(types) == 1:
                self.to(types.pop())

    @override
    def setup(self, stage: str) -> None:
        if stage != "fit":
            return
        if self.sync_batchnorm:
            self.backbone, self.projector = map(_parts.synchronised, (self.backbone, self.projector))
        if self.compile_backbone is not False:
            options = {} if self.compile_backbone is True else self.compile_backbone
            self.backbone.compile(**options)  # in place: names in checkpoints stay as they are

    @override
    def on_fit_start(self) -> None:
        lost = _parts.ignored_activations(self)
        if lost:
            raise ValueError(
                f"Trainer(sync_batchnorm=True) took the activations of {len(lost)} fused normalisations, "
                f"{lost[0]!r} the first; give the module sync_batchnorm=True instead"
            )

    @override
    def configure_optimizers(self) -> Any:
        trainer = self.trainer
        if trainer.train_dataloader is None:
            trainer.fit_loop.setup_data()  # from here on batch sizes are known
        per_rank = _batch_size(trainer.train_dataloader)
        batch = None if per_rank is None else per_rank * trainer.world_size
        self._check_batch(batch)
        lr = self.lr
        if lr is None:
            if batch is None:
                raise ValueError("lr must be given where the loader does not tell its batch size, got None")
            lr = self.base_lr * batch * trainer.accumulate_grad_batches / 256
        made = _parts.optimizer(
            self.optimizer,
            self.named_parameters(),
            lr=lr,
            weight_decay=self.weight_decay,
            options=self.optimizer_options,
        )
        if self.schedule == "constant":
            return made
        per_epoch = trainer.num_training_batches / trainer.accumulate_grad_batches
        warmup = self.warmup_epochs * per_epoch if self.warmup_epochs else 0.0
        total = float(trainer.estimated_stepping_batches)
        total = math.inf if total < 0 else total  # what a trainer says of an endless loader
        timed = _parts.time_share(trainer) is not None
        if math.isinf(total) and math.isinf(warmup) and not timed:
            raise ValueError(
                "warmup_epochs and the cosine need a run of known length: set max_steps, max_epochs or "
                "max_time, or schedule='constant'"
            )

        def share(step: int) -> float:
            passed = _parts.time_share(trainer)
            length = min(total, step / passed) if passed else total
            line = min(warmup, 0.1 * length)
            line = int(line) if math.isfinite(line) else line
            return _parts.warmup_cosine(step, warmup=line, total=length, final=self.final_lr_share)

        scheduler = torch.optim.lr_scheduler.LambdaLR(made, share)
        return {"optimizer": made, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _check_batch(self, batch: int | None) -> None:
        """Raise or warn, before the first step, about batches the loss can do nothing with."""
        if self.trainer.num_training_batches == 0 and self.trainer.limit_train_batches:
            samples = _length(self.trainer.train_dataloader)
            raise ValueError(
                f"batch_size must leave a step, got {batch} for {samples} samples; lower it, or set "
                "drop_last=False"
            )
        if batch is None:
            return
        if batch < 2:
            raise ValueError(f"batch_size must be at least 2 over all ranks, got {batch}: no pair of samples")
        loader = self.trainer.train_dataloader
        if self.trainer.world_size == 1 and not getattr(loader, "drop_last", True):
            left = _length(loader) % batch
            if left == 1:
                raise ValueError(
                    f"batch_size {batch} leaves a last batch of one sample; set drop_last=True or change it"
                )
        if self.rank_check != "off" and self.loss.whitening and batch - 1 < self.dimensions:
            message = (
                f"an embedding of {self.dimensions} dimensions is above the rank {batch - 1} of a "
                f"centred batch of {batch}: the loss cannot fall below what "
                f"{self.dimensions - batch + 1} unlearned dimensions cost. Raise batch_size, or end "
                "projector in a smaller width"
            )
            if self.rank_check == "error":
                raise ValueError(message)
            rank_zero_warn(message)


def _check_options(
    lr: float | None,
    weight_decay: float,
    warmup_epochs: float,
    schedule: str,
    final_lr_share: float,
    init_scale: float,
    rank_check: str,
) -> None:
    if lr is not None and not 0 < lr < math.inf:
        raise ValueError(f"lr must be positive and finite, got {lr!r}")
    if not 0 < init_scale < math.inf:
        raise ValueError(f"init_scale must be positive and finite, got {init_scale!r}")
    if not 0 <= weight_decay < math.inf:
        raise ValueError(f"weight_decay must be at least 0 and finite, got {weight_decay!r}")
    if not 0 <= warmup_epochs < math.inf:
        raise ValueError(f"warmup_epochs must be at least 0 and finite, got {warmup_epochs!r}")
    if not 0 <= final_lr_share <= 1:
        raise ValueError(f"final_lr_share must be in [0, 1], got {final_lr_share!r}")
    if schedule not in ("cosine", "constant"):
        raise ValueError(f"schedule must be 'cosine' or 'constant', got {schedule!r}")
    if rank_check not in ("warn", "error", "off"):
        raise ValueError(f"rank_check must be 'warn', 'error' or 'off', got {rank_check!r}")


def _batch_size(loader: Any) -> int | None:
    """Return a loader's batch size on this rank, if it tells."""
    size = getattr(loader, "batch_size", None)
    if size is None:
        size = getattr(getattr(loader, "batch_sampler", None), "batch_size", None)
    return size if isinstance(size, int) else None


def _length(loader: Any) -> int:
    """Return the samples a loader goes through in an epoch, 0 if it does not tell."""
    try:
        return len(loader.sampler)
    except (AttributeError, TypeError):
        return 0
