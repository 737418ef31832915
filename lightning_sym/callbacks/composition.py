"""Does a generator compose what it knows, where it was never trained?

Shape letters: N samples, C = 2 coordinates (x, y), Y and X grid of coordinates, G grid points, D features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_sym.callbacks.base import Monitor, at_least
from lightning_sym.engine.history import LAST_ROWS, Keep
from lightning_sym.engine.run import Run
from lightning_sym.engine.schedule import EpochEnds, Schedule
from lightning_sym.functional import composition
from lightning_sym.observe import Observation, Reading
from lightning_sym.observe.layers import choose_names, clean_name
from lightning_sym.sandbox import Apart

_FROM_DATA = ("encode", "render", "id_centers", "ood_centers", "background", "amplitude")


@dataclass(frozen=True)
class Plane:
    """Where a generator is measured: the places in and out of distribution, and a grid over both.

    Attributes:
        encode, render: see :class:`CompositionMonitor`.
        background, amplitude: likewise.
        id_centers: places in distribution, ``[N, 2]``.
        ood_centers: places out of distribution, ``[N, 2]``.
        xs: columns of the grid, whole pixels, ``[X]``.
        ys: its rows, ``[Y]``.
        grid: its points, row by row, ``[Y * X, 2]``.
        outside: which of them are nearer to a place out of distribution than to any in it, ``[Y * X]``.
    """

    encode: Callable[[Tensor], Tensor]
    render: Callable[[Tensor], Tensor]
    background: float
    amplitude: float
    id_centers: Tensor
    ood_centers: Tensor
    xs: Tensor
    ys: Tensor
    grid: Tensor
    outside: Tensor

    def target(self, centers_NC: Tensor) -> Tensor:
        """Return the right images ``[N, H, W]`` of places."""
        return _wide(self.render(centers_NC).flatten(0, -3))

    def mean_codes(self, device: torch.device) -> Iterator[Tensor]:
        """Yield the codes of ``(x, mean y)`` and ``(mean x, y)`` for each place out of distribution.

        The mean is over codes, of up to 64 values that the other coordinate takes in distribution. It
        needs no knowledge of which part of a code stands for which coordinate.
        """
        for kept in (0, 1):
            other_M = self.id_centers[:, 1 - kept]
            other_M = other_M[torch.linspace(0, len(other_M) - 1, min(64, len(other_M))).long()]
            values_V, inverse_N = self.ood_centers[:, kept].unique(return_inverse=True)
            pair_VMC = torch.empty(len(values_V), len(other_M), 2)
            pair_VMC[..., kept] = values_V[:, None]
            pair_VMC[..., 1 - kept] = other_M
            codes = self.encode(pair_VMC.flatten(0, 1).to(device))
            yield codes.unflatten(0, pair_VMC.shape[:2]).mean(dim=1)[inverse_N.to(device)]


def plane_of(
    *,
    encode: Callable[[Tensor], Tensor],
    render: Callable[[Tensor], Tensor],
    id_centers: Tensor,
    ood_centers: Tensor,
    background: float,
    amplitude: float,
    grid: int,
    max_samples: int,
    seed: int,
) -> Plane:
    """Return where to measure; for the arguments see :class:`CompositionMonitor`.

    Raises:
        ValueError: if centres are not those of one bump in an image, or span no grid.
    """
    id_NC = _select(id_centers, "id_centers", max_samples, seed)
    ood_NC = _select(ood_centers, "ood_centers", max_samples, seed)
    x_X, y_Y = (_axis(torch.cat([id_NC, ood_NC])[:, axis], grid) for axis in (0, 1))
    grid_GC = torch.cartesian_prod(y_Y, x_X).flip(1)
    out_G = torch.cdist(grid_GC, ood_NC).amin(1) < torch.cdist(grid_GC, id_NC).amin(1)
    return Plane(encode, render, float(background), float(amplitude), id_NC, ood_NC, x_X, y_Y, grid_GC, out_G)


def _select(centers: Tensor, name: str, most: int, seed: int) -> Tensor:
    if centers.ndim == 3 and centers.shape[1] == 1:
        centers = centers[:, 0]
    if centers.ndim != 2 or centers.shape[1] != 2 or len(centers) < 2:
        raise ValueError(
            f"{name} must be at least two centres [N, 2] of one bump in an image, got {tuple(centers.shape)}"
        )
    centers_NC = centers.detach().float().cpu().unique(dim=0)
    order = torch.randperm(len(centers_NC), generator=torch.Generator().manual_seed(seed))
    return centers_NC[order[:most].sort().values]


def _axis(values: Tensor, grid: int) -> Tensor:
    """Return at most ``grid`` evenly spaced whole pixels between the extremes."""
    low, high = values.min().ceil(), values.max().floor()
    stride = max(1.0, ((high - low) / (grid - 1)).ceil().item())
    axis = torch.arange(low.item(), high.item() + 1, stride)
    if len(axis) < 2:
        raise ValueError(
            f"centres must span at least two whole pixels in x and in y, got {low.item()} to {high.item()}"
        )
    return axis


class CompositionMonitor(Monitor):
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
        ``composition/images`` (picture): images drawn out of distribution, over the right ones.
        ``composition/error_map`` (picture): relative error over the plane of coordinates.
        ``composition/coordinates`` (picture): the grid of coordinates where the module puts it.

    A mean over images leaves out those where the measure is not defined (NaN: all of them).

    Args:
        encode: centres ``[N, 2]`` to the module's input; ``None``: the data module's.
        render: centres ``[N, 2]`` to the right images ``[N, 1, H, W]``.
        id_centers: ``[N, 2]`` or ``[N, 1, 2]``, in distribution.
        ood_centers: likewise, out of distribution.
        background: value of a blank image.
        amplitude: of a bump; negative if dark.
        forward: what draws images ``[N, 1, H, W]`` or ``[N, H, W]`` of codes: a method of the module, or a
            function of (module, codes). Codes are converted to the fit's precision.
        every_n_steps: an interval in optimizer steps, a schedule, of which step 1 is always due, or
            :class:`~lightning_sym.engine.schedule.EpochEnds`.
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
        keep: rows of :attr:`history` that a checkpoint holds, or a folder for it
            (:class:`~lightning_sym.callbacks.base.Monitor`).
        name: first part of its keys instead of ``composition``.
        strict: raise what goes wrong in here instead of warning once and going on.

    Raises:
        ValueError: if an argument is out of its range; at fit start, if there is no data module to fill
            in what was not given, it has several bumps in an image, or a glob matches no layer.
        TypeError: at fit start, if ``forward`` is not a method of the module.

    Source: Liang et al., "Compositional Generalization Requires More Than Disentangled Representations",
    arXiv:2501.18797.
    """

    quantity: ClassVar[str] = "composition"
    runs_module = True

    def __init__(
        self,
        *,
        encode: Callable[[Tensor], Tensor] | None = None,
        render: Callable[[Tensor], Tensor] | None = None,
        id_centers: Tensor | None = None,
        ood_centers: Tensor | None = None,
        background: float | None = None,
        amplitude: float | None = None,
        forward: str | Callable[..., Tensor] = "forward",
        every_n_steps: int | Schedule | EpochEnds = 500,
        layers: str | list[str] | None = None,
        max_layers: int = 12,
        grid: int = 14,
        max_samples: int = 1024,
        max_features: int = 4096,
        batch_size: int = 256,
        pictures: bool = True,
        seed: int = 0,
        keep: Keep = LAST_ROWS,
        name: str | None = None,
        strict: bool = False,
    ) -> None:
        at_least("max_layers", max_layers, 0)
        super().__init__(
            every_n_steps=every_n_steps,
            layers=layers,
            max_layers=max(1, max_layers),
            keep=keep,
            name=name,
            strict=strict,
        )
        at_least("grid", grid, 3)
        at_least("max_samples", max_samples, 2)
        at_least("max_features", max_features, 1)
        at_least("batch_size", batch_size, 1)
        given = (encode, render, id_centers, ood_centers, background, amplitude)
        self._given = dict(zip(_FROM_DATA, given, strict=True))
        self.max_layers, self.grid = max_layers, grid
        self.max_samples, self.max_features = max_samples, max_features
        self.forward, self.batch_size, self.pictures, self.seed = forward, batch_size, pictures, seed
        self.end_run()

    @override
    def end_run(self) -> None:
        self._plane: Plane | None = None
        self._names: set[str] = set()

    @override
    def check(self, run: Run) -> None:
        """Settle what is measured where, so that a mistake shows before the first step."""
        super().check(run)
        run.function(self.forward)
        settled: dict[str, Any] = {
            name: getattr(run.datamodule, name, None) if value is None else value
            for name, value in self._given.items()
        }
        if missing := [name for name, value in settled.items() if value is None]:
            raise ValueError(
                f"CompositionMonitor needs {', '.join(missing)}: pass it, or fit with a data module that has "
                "attributes of this name, such as GaussianBumpsDataModule"
            )
        self._plane = plane_of(**settled, grid=self.grid, max_samples=self.max_samples, seed=self.seed)
        modules = {clean_name(name): module for name, module in run.module.named_modules() if name}
        if self.layers is None:
            modules = {name: module for name, module in modules.items() if not any(module.children())}
        if self.layers is not None or self.max_layers:
            self._names = choose_names(list(modules), self.layers, max_layers=self.max_layers)

    # -- reading ------------------------------------------------------------------------------

    @override
    def read(self, seen: Observation) -> Iterable[Reading]:
        if self._plane is None:
            raise RuntimeError("CompositionMonitor reads in a fit only")
        with seen.run.sandbox.open() as apart:
            return [*self._of_images(apart, self._plane), *self._of_layers(apart, self._plane)]

    def _draw(self, apart: Apart, codes: Tensor) -> Tensor:
        """Return the images ``[N, H, W]`` that the module makes of codes."""
        parts = [apart(self.forward, part) for part in apart.place(codes).split(self.batch_size)]
        return _wide(torch.cat(parts).flatten(0, -3))

    def _of_images(self, apart: Apart, plane: Plane) -> Iterator[Reading]:
        b, device = plane.background, apart.device
        drawn: dict[str, tuple[Tensor, Tensor]] = {}
        for name, centers_NC in (("id", plane.id_centers), ("ood", plane.ood_centers)):
            centers_NC = centers_NC.to(device)
            image = self._draw(apart, plane.encode(centers_NC))
            target = plane.target(centers_NC)
            drawn[name] = image, target
            bump = composition.find_bump(image, centers_NC, background=b, amplitude=plane.amplitude)
            error = (image - target).square().mean()
            yield _mean(f"{name}_error", error)
            yield _mean(f"{name}_relative_error", error / (target - b).square().mean())
            yield _mean(f"{name}_found", bump.found.float())
            if name == "ood":
                yield _mean("ood_distance", bump.distance)
                yield _mean("ood_height", bump.height)
                yield _mean("ood_width", bump.width)
        image, target = drawn["ood"]
        x_part, y_part = (self._draw(apart, codes) for codes in plane.mean_codes(device))
        made = composition.memorisation(image, drawn["id"][1].to(image), background=b)
        yield _mean("ood_rank", composition.outer_product_rank(image, background=b))
        yield _mean("ood_superposition", composition.superposition(image, x_part, y_part, background=b))
        yield _mean("ood_memorised", made.superposition)
        yield _mean("ood_product", made.product)
        if self.pictures:
            some = torch.linspace(0, len(image) - 1, min(8, len(image))).long()
            yield _picture("image_pairs", "images", image[some], target[some], plane.ood_centers[some])

    def _of_layers(self, apart: Apart, plane: Plane) -> Iterator[Reading]:
        grid_GC, out_G = plane.grid.to(apart.device), plane.outside.to(apart.device)
        shape = height, width = len(plane.ys), len(plane.xs)
        spacing = (float(plane.xs[1] - plane.xs[0]), float(plane.ys[1] - plane.ys[0]))
        features: dict[str, Tensor] = {}

        def look(name: str, _: nn.Module, __: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.ndim >= 2 and output.shape[0] == len(grid_GC):
                features[name] = self._features(output)

        for name, module in apart.module.named_modules():  # a copy, with hooks of ours alone
            if clean_name(name) in self._names:
                module.register_forward_hook(partial(look, clean_name(name)))
        image = _wide(apart(self.forward, apart.place(plane.encode(grid_GC))).flatten(0, -3))
        for name, features_GD in features.items():
            metric = composition.metric_tensor(features_GD.unflatten(0, shape), spacing=spacing)
            yield _mean("factorisation", composition.factorisation(metric), layer=name)
            if min(int(out_G.sum()), int((~out_G).sum())) < 2:
                continue
            r2_2 = composition.linear_readout(
                features_GD[~out_G],
                grid_GC[~out_G],
                test_features=features_GD[out_G],
                test_coordinates=grid_GC[out_G],
            )
            for axis, value in zip("xy", r2_2, strict=True):
                yield _mean(f"readout_{axis}", value, layer=name)
        if self.pictures:
            b, a = plane.background, plane.amplitude
            error = composition.relative_error(image, plane.target(grid_GC), background=b)
            bump = composition.find_bump(image, grid_GC, background=b, amplitude=a)
            out_YX = plane.outside.view(shape)
            yield _picture("error_map", "error_map", error.view(shape), out_YX, plane.xs, plane.ys)
            center_YXC = bump.center.view(height, width, 2)
            seen_YX = (bump.height >= 0.5).view(shape)
            yield _picture("coordinate_grid", "coordinates", center_YXC, seen_YX, out_YX)

    def _features(self, output: Tensor) -> Tensor:
        """Return a copy: what comes after the layer may change its output in place."""
        features_GD = output.detach().flatten(1)
        if features_GD.shape[1] > self.max_features:
            generator = torch.Generator().manual_seed(self.seed)
            chosen = torch.randperm(features_GD.shape[1], generator=generator)[: self.max_features]
            features_GD = features_GD[:, chosen.to(features_GD.device)]
        return _wide(features_GD).clone()


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _mean(what: str, values: Tensor, *, layer: str = "") -> Reading:
    return Reading(layer, what, values.nanmean())


def _picture(figure: str, what: str, *data: Tensor) -> Reading:
    from lightning_sym.plots import composition as plots  # light: matplotlib is imported when it draws

    kept = [tensor.detach().cpu() for tensor in data]
    return Reading("", what, lambda: getattr(plots, figure)(*kept))
