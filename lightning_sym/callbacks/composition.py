"""Does a generator compose what it knows, where it was never trained?"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from typing_extensions import override

from lightning_sym.callbacks.base import Probe
from lightning_sym.functional import composition
from lightning_sym.observe.layers import choose_names, clean_name
from lightning_sym.observe.reading import Reading
from lightning_sym.observe.schedule import Schedule

# Shape letters: N samples, C = 2 coordinates (x, y), Y and X grid of coordinates, G grid points, D features.

_FROM_DATA = ("encode", "render", "id_centers", "ood_centers", "background", "amplitude")


class CompositionMonitor(Probe):
    r"""Error in and out of distribution, what was drawn there, and how layers keep the coordinates.

    For any module that makes an image from a code of two coordinates; all it needs to know is how codes
    and the right images are made from coordinates. With ``GaussianBumpsDataModule`` (or any data module
    with attributes of the names of the first six arguments) nothing need be said.

    Logs, with ``<set>`` = ``id`` and ``ood``:
        ``composition/<set>_error``: mean squared error a pixel.
        ``composition/<set>_relative_error``: the same over that of a blank image; at 1 nothing was drawn.
        ``composition/<set>_found``: share of images with a bump where it was asked for, in [0, 1].
        ``composition/ood_distance``: of the brightest pixel from the place asked for, mean, in pixels.
        ``composition/ood_height``: of the peak over the background, 1 if right, mean.
        ``composition/ood_width``: standard deviation of the bump, mean over those that are Gaussian-like,
            in pixels; NaN if none is.
        ``composition/ood_rank``: stable rank of the image as an outer product, mean; a bump has 1.
        ``composition/ood_superposition``: share of the energy of ``f(x, y)`` that ``f(x, mean y) + f(mean
            x, y)`` explains, mean, in [0, 1].
        ``composition/ood_memorised``: share of the energy in the span of training images, mean, in [0, 1].
        ``composition/ood_product``: share of the energy in the best product of two profiles, likewise.
        ``composition/<layer>/factorisation``: in [1/2, 1]; 1 where x and y move the output of the layer
            in orthogonal directions.
        ``composition/<layer>/readout_x``, ``.../readout_y``: coefficient of determination of a linear
            read-out fitted in distribution and scored out of distribution; at most 1.
    and pictures, where a logger takes them:
        ``composition/images``: images drawn out of distribution, over the right ones.
        ``composition/error_map``: relative error over the plane of coordinates.
        ``composition/coordinates``: the grid of coordinates where the module puts it.
    A mean over images leaves out those where the measure is not defined (NaN: all of them).

    Args:
        encode: centres ``[N, 2]`` to the module's input; ``None``: the data module's.
        render: centres ``[N, 2]`` to the right images ``[N, 1, H, W]``.
        id_centers: ``[N, 2]`` or ``[N, 1, 2]``, in distribution.
        ood_centers: likewise, out of distribution.
        background: value of a blank image.
        amplitude: of a bump; negative if dark.
        every_n_steps: an interval in optimizer steps, or a schedule. Step 1 is always due.
        layers: a glob, or a list of globs, on module names; ``None``: all without children, at most
            ``max_layers`` of them, evenly spread.
        max_layers: how many layers to measure when ``layers`` is ``None``; 0 for none.
        grid: points a side, at most, of the regular grid of whole pixels for layers and maps.
        max_samples: centres of each set, at most, drawn once from ``seed``. The span of training images
            is that of this many images in distribution too.
        max_features: of a layer's outputs, at most; of a larger layer a fixed random selection is measured.
        batch_size: images drawn at once.
        pictures: also log pictures.
        seed: of the selections.
        strict: raise what goes wrong in here instead of warning once and going on.

    Raises:
        ValueError: if an argument is out of its range; at fit start, if there is no data module to fill
            in what was not given, it has several bumps in an image, or a glob matches no layer.

    Source: Liang et al., "Compositional Generalization Requires More Than Disentangled Representations",
    arXiv:2501.18797.
    """

    quantity: ClassVar[str] = "composition"

    def __init__(
        self,
        *,
        encode: Callable[[Tensor], Tensor] | None = None,
        render: Callable[[Tensor], Tensor] | None = None,
        id_centers: Tensor | None = None,
        ood_centers: Tensor | None = None,
        background: float | None = None,
        amplitude: float | None = None,
        every_n_steps: int | Schedule = 500,
        layers: str | list[str] | None = None,
        max_layers: int = 12,
        grid: int = 14,
        max_samples: int = 1024,
        max_features: int = 4096,
        batch_size: int = 256,
        pictures: bool = True,
        seed: int = 0,
        strict: bool = False,
    ) -> None:
        super().__init__(every_n_steps=every_n_steps, strict=strict)
        for name, value, least in (
            ("max_layers", max_layers, 0),
            ("grid", grid, 3),
            ("max_samples", max_samples, 2),
            ("max_features", max_features, 1),
            ("batch_size", batch_size, 1),
        ):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        given = (encode, render, id_centers, ood_centers, background, amplitude)
        self._given = dict(zip(_FROM_DATA, given, strict=True))
        self.layers = layers if layers is None or isinstance(layers, str) else list(layers)
        self.max_layers, self.grid = max_layers, grid
        self.max_samples, self.max_features = max_samples, max_features
        self.batch_size, self.pictures, self.seed = batch_size, pictures, seed

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(every_n_steps=repr(self.schedule), layers=self.layers)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Settle what is measured where, so that a mistake shows before the first step."""
        data: Any = getattr(trainer, "datamodule", None)
        settled: dict[str, Any] = {
            name: getattr(data, name, None) if value is None else value for name, value in self._given.items()
        }
        if missing := [name for name, value in settled.items() if value is None]:
            raise ValueError(
                f"CompositionMonitor needs {', '.join(missing)}: pass it, or fit with a data module that has "
                "attributes of this name, such as GaussianBumpsDataModule"
            )
        self._encode, self._render = settled["encode"], settled["render"]
        self._background, self._amplitude = float(settled["background"]), float(settled["amplitude"])
        self._id_NC = self._select(settled["id_centers"], "id_centers")
        self._ood_NC = self._select(settled["ood_centers"], "ood_centers")
        self._layers = self._choose_layers(pl_module)
        both_NC = torch.cat([self._id_NC, self._ood_NC])
        self._x_X, self._y_Y = (self._axis(both_NC[:, axis]) for axis in (0, 1))
        grid_GC = torch.cartesian_prod(self._y_Y, self._x_X).flip(1)
        self._grid_GC = grid_GC
        self._grid_out_G = torch.cdist(grid_GC, self._ood_NC).amin(1) < torch.cdist(
            grid_GC, self._id_NC
        ).amin(1)

    def _select(self, centers: Tensor, name: str) -> Tensor:
        if centers.ndim == 3 and centers.shape[1] == 1:
            centers = centers[:, 0]
        if centers.ndim != 2 or centers.shape[1] != 2 or len(centers) < 2:
            raise ValueError(
                f"{name} must be at least two centres [N, 2] of one bump in an image, got "
                f"{tuple(centers.shape)}"
            )
        centers_NC = centers.detach().float().cpu().unique(dim=0)
        order = torch.randperm(len(centers_NC), generator=torch.Generator().manual_seed(self.seed))
        return centers_NC[order[: self.max_samples].sort().values]

    def _axis(self, values: Tensor) -> Tensor:
        """Return at most ``grid`` evenly spaced whole pixels between the extremes."""
        low, high = values.min().ceil(), values.max().floor()
        stride = max(1.0, ((high - low) / (self.grid - 1)).ceil().item())
        axis = torch.arange(low.item(), high.item() + 1, stride)
        if len(axis) < 2:
            raise ValueError(
                "centres must span at least two whole pixels in x and in y, got "
                f"{low.item()} to {high.item()}"
            )
        return axis

    def _choose_layers(self, pl_module: LightningModule) -> dict[str, nn.Module]:
        modules = {clean_name(name): module for name, module in pl_module.named_modules() if name}
        if self.layers is None:
            modules = {name: module for name, module in modules.items() if not any(module.children())}
        chosen = choose_names(list(modules), self.layers, max_layers=self.max_layers)
        return {name: module for name, module in modules.items() if name in chosen}

    @override
    def measure(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> Iterable[Reading]:
        pl_module.eval()
        with torch.no_grad():
            return [*self._of_images(pl_module), *self._of_layers(pl_module)]

    def _draw(self, pl_module: LightningModule, codes: Tensor) -> Tensor:
        """Return the images ``[N, H, W]`` that the module makes of codes."""
        parts = [pl_module(part) for part in codes.split(self.batch_size)]
        return torch.cat(parts).flatten(0, -3).float()

    def _target(self, centers_NC: Tensor, device: torch.device) -> Tensor:
        return self._render(centers_NC.to(device)).flatten(0, -3).float()

    def _of_images(self, pl_module: LightningModule) -> Iterator[Reading]:
        device, b, a = pl_module.device, self._background, self._amplitude
        drawn: dict[str, tuple[Tensor, Tensor]] = {}
        for name, centers_NC in (("id", self._id_NC), ("ood", self._ood_NC)):
            image = self._draw(pl_module, self._encode(centers_NC.to(device)))
            target = self._target(centers_NC, device)
            drawn[name] = image, target
            bump = composition.find_bump(image, centers_NC.to(device), background=b, amplitude=a)
            error = (image - target).square().mean()
            yield self._reading(f"{name}_error", error)
            yield self._reading(f"{name}_relative_error", error / (target - b).square().mean())
            yield self._reading(f"{name}_found", bump.found.float())
            if name == "ood":
                yield self._reading("ood_distance", bump.distance)
                yield self._reading("ood_height", bump.height)
                yield self._reading("ood_width", bump.width)
        image, target = drawn["ood"]
        x_part, y_part = (self._draw(pl_module, code) for code in self._mean_codes(device))
        made = composition.memorisation(image, drawn["id"][1], background=b)
        yield self._reading("ood_rank", composition.outer_product_rank(image, background=b))
        yield self._reading(
            "ood_superposition", composition.superposition(image, x_part, y_part, background=b)
        )
        yield self._reading("ood_memorised", made.superposition)
        yield self._reading("ood_product", made.product)
        if self.pictures:
            some = torch.linspace(0, len(image) - 1, min(8, len(image))).long()
            yield self._picture("image_pairs", "images", image[some], target[some], self._ood_NC[some])

    def _mean_codes(self, device: torch.device) -> Iterator[Tensor]:
        """Yield the codes of ``(x, mean y)`` and ``(mean x, y)`` for each centre out of distribution.

        The mean is over codes, of up to 64 values that the other coordinate takes in distribution. It
        needs no knowledge of which part of a code stands for which coordinate.
        """
        for kept in (0, 1):
            other_M = self._id_NC[:, 1 - kept]
            other_M = other_M[torch.linspace(0, len(other_M) - 1, min(64, len(other_M))).long()]
            values_V, inverse_N = self._ood_NC[:, kept].unique(return_inverse=True)
            pair_VMC = torch.empty(len(values_V), len(other_M), 2)
            pair_VMC[..., kept] = values_V[:, None]
            pair_VMC[..., 1 - kept] = other_M
            codes = self._encode(pair_VMC.flatten(0, 1).to(device))
            yield codes.unflatten(0, pair_VMC.shape[:2]).mean(dim=1)[inverse_N.to(device)]

    def _of_layers(self, pl_module: LightningModule) -> Iterator[Reading]:
        device = pl_module.device
        height, width = len(self._y_Y), len(self._x_X)
        grid_GC, out_G = self._grid_GC.to(device), self._grid_out_G.to(device)
        step_x, step_y = ((axis[1] - axis[0]).item() for axis in (self._x_X, self._y_Y))
        readings: dict[str, Reading] = {}

        def look(name: str, _: nn.Module, __: Any, output: Any) -> None:  # reduces here: keeps no activation
            if not isinstance(output, Tensor) or output.shape[0] != len(grid_GC) or output.ndim < 2:
                return
            features_GD = self._features(output)
            metric = composition.metric_tensor(
                features_GD.unflatten(0, (height, width)), spacing=(step_x, step_y)
            )
            readings[f"{name}/factorisation"] = self._reading(
                f"{name}/factorisation", composition.factorisation(metric)
            )
            if min(int(out_G.sum()), int((~out_G).sum())) < 2:
                return
            r2_2 = composition.linear_readout(
                features_GD[~out_G],
                grid_GC[~out_G],
                test_features=features_GD[out_G],
                test_coordinates=grid_GC[out_G],
            )
            for axis, value in zip("xy", r2_2, strict=True):
                readings[f"{name}/{axis}"] = self._reading(f"{name}/readout_{axis}", value)

        handles = [
            layer.register_forward_hook(functools.partial(look, name)) for name, layer in self._layers.items()
        ]
        try:
            image = pl_module(self._encode(grid_GC)).flatten(0, -3).float()
        finally:
            for handle in handles:
                handle.remove()
        yield from readings.values()
        if self.pictures:
            error = composition.relative_error(
                image, self._target(self._grid_GC, device), background=self._background
            )
            bump = composition.find_bump(
                image, grid_GC, background=self._background, amplitude=self._amplitude
            )
            out_YX, shape = self._grid_out_G.view(height, width), (height, width)
            yield self._picture("error_map", "error_map", error.view(shape), out_YX, self._x_X, self._y_Y)
            yield self._picture(
                "coordinate_grid",
                "coordinates",
                bump.center.view(height, width, 2),
                (bump.height >= 0.5).view(shape),
                out_YX,
            )

    def _features(self, output: Tensor) -> Tensor:
        features_GD = output.detach().flatten(1).float()
        if features_GD.shape[1] > self.max_features:
            generator = torch.Generator().manual_seed(self.seed)
            chosen = torch.randperm(features_GD.shape[1], generator=generator)[: self.max_features]
            features_GD = features_GD[:, chosen.to(features_GD.device)]
        return features_GD

    def _reading(self, what: str, values: Tensor) -> Reading:
        return Reading(f"{self.quantity}/{what}", values.nanmean())

    def _picture(self, figure: str, what: str, *data: Tensor) -> Reading:
        from lightning_sym.plots import composition as plots  # light: matplotlib is imported when it draws

        kept = [tensor.detach().cpu() for tensor in data]
        return Reading(f"{self.quantity}/{what}", lambda: getattr(plots, figure)(*kept))
