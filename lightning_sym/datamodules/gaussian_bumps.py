"""Gaussian bumps: the smallest world in which a generator may or may not compose.

Shape letters: N samples, K bumps in an image, S pixels a side, E code length.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from typing_extensions import override

from lightning_sym.datamodules import _bumps
from lightning_sym.datamodules._holdouts import Predicate, make_holdout

Batch = tuple[Tensor, Tensor]


def gaussian_bumps(
    centers: Tensor,
    *,
    size: int,
    sigma: float = 1.0,
    background: float = 0.0,
    amplitude: float = 1.0,
    out: Tensor | None = None,
) -> Tensor:
    r"""Draw a batch of bumps as outer products of two profiles.

    .. math:: f(X, Y) = b + a \, e^{-(X - x)^2 / 2\sigma^2} \, e^{-(Y - y)^2 / 2\sigma^2}

    Args:
        centers: ``[N, 2]`` places ``(x, y)`` in pixels, or ``[N, K, 2]`` for sums of ``K`` bumps. A
            coordinate that is NaN is absent: its factor is 1, which makes a stripe.
        size: pixels a side.
        sigma: standard deviation in pixels.
        background: ``b``, value of a blank image.
        amplitude: ``a``; the paper's bumps are dark ones on white, ``b = 1``, ``a = -1``.
        out: buffer ``[N, 1, size, size]`` to draw into, in the dtype and on the device of ``centers``.

    Returns:
        ``[N, 1, size, size]``; rows are y, columns are x.

    Raises:
        ValueError: if a shape is off, ``size`` is not positive or ``sigma`` is not positive.

    Example:
        >>> gaussian_bumps(torch.tensor([[1.0, 0.0]]), size=3, sigma=0.1)[0, 0].round()
        tensor([[0., 1., 0.],
                [0., 0., 0.],
                [0., 0., 0.]])
    """
    if centers.ndim not in (2, 3) or centers.shape[-1] != 2 or not centers.is_floating_point():
        raise ValueError(
            f"centers must be floating point [N, 2] or [N, K, 2], got {centers.dtype} {tuple(centers.shape)}"
        )
    _check_size(size)
    _check_positive(sigma, "sigma")
    if out is not None and out.shape != (len(centers), 1, size, size):
        raise ValueError(f"out must be [{len(centers)}, 1, {size}, {size}], got {tuple(out.shape)}")
    centers_NKC = centers if centers.ndim == 3 else centers[:, None]
    return _bumps.draw(
        centers_NKC, size=size, sigma=sigma, background=background, amplitude=amplitude, out=out
    )


class BumpDataset(Dataset[Batch]):
    """Centres that are stored, codes and images that are made a batch at a time when asked for."""

    def __init__(self, centers_NKC: Tensor, make: Callable[[Tensor, Tensor], Batch]) -> None:
        self.centers = centers_NKC
        self._make = make

    def __len__(self) -> int:
        return len(self.centers)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """Return one batch; torch's fetcher calls this instead of collating single samples."""
        index_N = torch.as_tensor(indices, device=self.centers.device)
        return self._make(index_N, self.centers[index_N])

    def __getitem__(self, index: int) -> Batch:
        code, image = self.__getitems__([index])
        return code[0], image[0]


def _whole(batch: Batch) -> Batch:
    return batch


class GaussianBumpsDataModule(LightningDataModule):
    r"""Coordinates in, an image of a bump at these coordinates out; some places are never trained on.

    Batches are ``(code [B, E], image [B, 1, size, size])``, float32. Images are made in closed form
    when a batch is asked for, on ``device``; only centres are stored (8 bytes a bump). A sample is a
    function of its index alone, so workers and ranks agree. Data of "Compositional Generalization
    Requires More Than Disentangled Representations" (Liang et al., arXiv:2501.18797); its settings are
    ``size=28, sigma=1, encoding="bump", samples=2000, ood_samples=500`` (decoders) and ``size=32,
    sigma=1.5, polarity="bright", holdout="corner"`` (embedding model), the latter with each training
    centre once an epoch.

    Args:
        size: pixels a side.
        sigma: standard deviation of a bump in pixels.
        encoding: how a coordinate is handed to the model. ``"scalar"``: as it is, in pixels (``E =
            2``). ``"ramp"``: one unit a pixel, which rises from 0 to 1 as the coordinate passes it.
            ``"bump"``: one unit a pixel with a Gaussian tuning curve. ``"one_hot"``: one unit a pixel,
            on where the coordinate is (``E = 2 size`` for these three). (The paper's "ramp" is
            ``"scalar"`` here.)
        holdout: where training has no bump: ``"center"`` or ``"corner"``, squares; ``"random"``, single
            cells; or a predicate ``(x [N], y [N]) -> bool [N]``.
        holdout_size: side of the square in pixels (17 of 28 and 20 of 32 pixels, as in the paper, scaled
            to ``size``) or share of the cells (0.2).
        batch_size: samples a batch.
        polarity: ``"dark"`` bumps on a background of 1, or ``"bright"`` ones on 0.
        centers: ``"grid"``, on the pixels, or ``"continuous"``, uniform in ``[0, size - 1]``.
        code_sigma: width of the tuning curves of ``"bump"``, in pixels; ``None``: ``sigma``.
        samples: bumps in the training set, drawn with replacement, once. ``None``: every training centre
            of the grid once, 2000 if continuous or if there are several bumps in an image.
        ood_samples: likewise for the out-of-distribution set (500), and for the in-distribution test
            set, which is drawn anew.
        stripes: images in the training set that depend on one coordinate only, the other's code being
            zero; half of them on x, half on y, evenly spread over all coordinates, those of the hold-out
            included.
        bumps: bumps in an image, added up; their codes are concatenated. An image is out of distribution
            if all of its bumps are held out, and in distribution if none is.
        label_noise: standard deviation of normal noise on the training images, the same in every epoch.
        seed: of the random draws.
        device: where codes and images are made. With a device of its own, ``num_workers`` must be 0.
        num_workers: worker processes.

    Attributes:
        background: value of a blank image.
        amplitude: of a bump, -1 if dark.
        code_length: ``E``.
        blank_error: mean squared error of a blank image on the out-of-distribution set, about
            ``pi sigma^2 / size^2``: what an out-of-distribution error must be compared with.

    Raises:
        ValueError: if an argument is out of its range, an encoding can't represent the centres asked
            for, or a hold-out leaves nothing to train or nothing to test on.
        TypeError: if the hold-out is of the wrong type.
    """

    val_names = ("id", "ood")

    def __init__(
        self,
        size: int = 28,
        *,
        sigma: float = 1.0,
        encoding: Literal["scalar", "ramp", "bump", "one_hot"] = "one_hot",
        holdout: str | Predicate = "center",
        holdout_size: int | float | None = None,
        batch_size: int = 32,
        polarity: Literal["dark", "bright"] = "dark",
        centers: Literal["grid", "continuous"] = "grid",
        code_sigma: float | None = None,
        samples: int | None = None,
        ood_samples: int | None = None,
        stripes: int = 0,
        bumps: int = 1,
        label_noise: float = 0.0,
        seed: int = 0,
        device: str | torch.device = "cpu",
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        _check_size(size)
        _check_positive(sigma, "sigma")
        _check_choice(encoding, _bumps.ENCODINGS, "encoding")
        _check_choice(polarity, ("dark", "bright"), "polarity")
        _check_choice(centers, ("grid", "continuous"), "centers")
        _check_count(batch_size, "batch_size", least=1)
        _check_count(stripes, "stripes", least=0)
        _check_count(bumps, "bumps", least=1)
        _check_count(num_workers, "num_workers", least=0)
        _check_count(0 if samples is None else samples, "samples", least=0)
        _check_count(1 if ood_samples is None else ood_samples, "ood_samples", least=1)
        if not (math.isfinite(label_noise) and label_noise >= 0):
            raise ValueError(f"label_noise must be a standard deviation >= 0, got {label_noise}")
        width = sigma if code_sigma is None else code_sigma
        _check_positive(width, "code_sigma")
        _check_encoding(encoding, centers=centers, width=width, stripes=stripes)
        if stripes and bumps > 1:
            raise ValueError(
                f"stripes are images of one bump without its other coordinate, got bumps={bumps}"
            )
        if samples == 0 and not stripes:
            raise ValueError(
                "samples=0 without stripes leaves nothing to train on; pass samples >= 1 or stripes"
            )
        device = torch.device(device)
        if device.type != "cpu" and num_workers:
            raise ValueError(f"num_workers must be 0 for images made on {device}, got {num_workers}")
        self.size, self.sigma, self.encoding, self.centers_on = size, float(sigma), encoding, centers
        self.background, self.amplitude = (1.0, -1.0) if polarity == "dark" else (0.0, 1.0)
        self.code_sigma, self.batch_size, self.num_workers = float(width), batch_size, num_workers
        self.label_noise, self.seed, self.device = float(label_noise), seed, device
        self.held_out, self.holdout_size = make_holdout(
            holdout, size=size, holdout_size=holdout_size, seed=seed
        )
        self.bumps, self.stripes = bumps, stripes
        self._check_leaves_something(holdout)
        generator = torch.Generator().manual_seed(seed)
        listed = centers == "grid" and bumps == 1
        if listed and samples is None:
            train_NKC = self._grid(held_out=False)[:, None]
        else:
            train_NKC = self._draw(2000 if samples is None else samples, False, generator)
        if listed and ood_samples is None:
            ood_NKC, id_NKC = self._grid(held_out=True)[:, None], self._grid(held_out=False)[:, None]
        else:
            count = 500 if ood_samples is None else ood_samples
            ood_NKC = self._draw(count, True, generator)
            id_NKC = self._draw(count, False, generator)
        train_NKC = torch.cat([train_NKC, *([self._stripes(generator)[:, None]] if stripes else [])])
        self._train, self._id, self._ood = (c.to(device) for c in (train_NKC, id_NKC, ood_NKC))

    @property
    def code_length(self) -> int:
        """Length ``E`` of a code."""
        return self.bumps * (2 if self.encoding == "scalar" else 2 * self.size)

    @property
    def train_centers(self) -> Tensor:
        """Centres of the training set, ``[N, K, 2]``; a stripe has a NaN."""
        return self._train

    @property
    def id_centers(self) -> Tensor:
        """Centres of the in-distribution test set, ``[N, K, 2]``."""
        return self._id

    @property
    def ood_centers(self) -> Tensor:
        """Centres of the out-of-distribution test set, ``[N, K, 2]``."""
        return self._ood

    @property
    def blank_error(self) -> float:
        """Mean squared error of a blank image on the out-of-distribution set."""
        return float((self.render(self._ood) - self.background).square().mean())

    def encode(self, centers: Tensor) -> Tensor:
        """Return the codes ``[N, E]`` of centres ``[N, 2]`` or ``[N, K, 2]``, ``(x, y)`` in pixels.

        Raises:
            ValueError: if the shape is another, or a centre off the grid meets ``encoding="one_hot"``.
        """
        centers_NKC = self._as_centers(centers)
        if self.encoding == "one_hot":
            known = (centers_NKC == centers_NKC.round()) & (centers_NKC >= 0) & (centers_NKC < self.size)
            if not bool((known | centers_NKC.isnan()).all()):
                raise ValueError(
                    f"encoding='one_hot' represents the pixels 0 ... {self.size - 1} only, got centres "
                    "off them; use 'bump', 'ramp' or 'scalar' for others"
                )
        return _bumps.encode(centers_NKC, size=self.size, encoding=self.encoding, sigma=self.code_sigma)

    def render(self, centers: Tensor) -> Tensor:
        """Return the images ``[N, 1, size, size]`` of centres ``[N, 2]`` or ``[N, K, 2]``, without noise."""
        return _bumps.draw(
            self._as_centers(centers),
            size=self.size,
            sigma=self.sigma,
            background=self.background,
            amplitude=self.amplitude,
        )

    def loader(self, name: Literal["train", "id", "ood"]) -> DataLoader[Batch]:
        """Return the loader of one of the sets by its name.

        Raises:
            ValueError: if there is no set of this name.
        """
        _check_choice(name, ("train", "id", "ood"), "name")
        dataset = BumpDataset({"train": self._train, "id": self._id, "ood": self._ood}[name], self._make)
        if name == "train":
            dataset = BumpDataset(self._train, self._make_noisy)
        return DataLoader(
            dataset,
            batch_size=self.batch_size,
            shuffle=name == "train",
            generator=torch.Generator().manual_seed(self.seed),  # or the global one is drawn from
            num_workers=self.num_workers,
            collate_fn=_whole,  # type: ignore[arg-type]  # the fetcher returns whole batches
        )

    @override
    def train_dataloader(self) -> DataLoader[Batch]:
        return self.loader("train")

    @override
    def val_dataloader(self) -> list[DataLoader[Batch]]:
        """Return the loaders of :attr:`val_names`, in that order."""
        return [self.loader("id"), self.loader("ood")]

    @override
    def test_dataloader(self) -> list[DataLoader[Batch]]:
        return self.val_dataloader()

    def _make(self, _: Tensor, centers_NKC: Tensor) -> Batch:
        return self.encode(centers_NKC), self.render(centers_NKC)

    def _make_noisy(self, index_N: Tensor, centers_NKC: Tensor) -> Batch:
        code, image = self._make(index_N, centers_NKC)
        if self.label_noise:
            noise = _bumps.hashed_normal(index_N, self.size**2, seed=self.seed)
            image += self.label_noise * noise.view_as(image)
        return code, image

    def _as_centers(self, centers: Tensor) -> Tensor:
        if centers.ndim == 2 and self.bumps == 1:
            centers = centers[:, None]
        if centers.ndim != 3 or centers.shape[1:] != (self.bumps, 2):
            wanted = "[N, 2] or [N, 1, 2]" if self.bumps == 1 else f"[N, {self.bumps}, 2]"
            raise ValueError(f"centers must be {wanted}, got {tuple(centers.shape)}")
        return centers if centers.is_floating_point() else centers.float()

    def _grid(self, *, held_out: bool) -> Tensor:
        pixels = torch.arange(self.size, dtype=torch.float32)
        centers_NC = torch.cartesian_prod(pixels, pixels).flip(1)  # x runs fastest
        return centers_NC[self._is_out(centers_NC) == held_out]

    def _is_out(self, centers: Tensor) -> Tensor:
        mask = self.held_out(centers[..., 0], centers[..., 1])
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != centers.shape[:-1]:
            raise ValueError(
                "holdout must be a predicate that returns a bool tensor of the shape of x and y, got "
                f"{tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__}"
            )
        return mask

    def _check_leaves_something(self, holdout: str | Predicate) -> None:
        if self.centers_on == "grid":
            probe = torch.cartesian_prod(*[torch.arange(self.size, dtype=torch.float32)] * 2)
        else:
            probe = self._uniform(20000, torch.Generator().manual_seed(self.seed))
        share = self._is_out(probe).float().mean().item()
        if share in (0.0, 1.0):
            what = "nothing to train on" if share else "nothing to test out of distribution on"
            raise ValueError(
                f"holdout={holdout!r} with holdout_size={self.holdout_size!r} leaves {what}: it holds out "
                f"{'all' if share else 'none'} of the {len(probe)} centres looked at"
            )

    def _uniform(self, count: int, generator: torch.Generator) -> Tensor:
        if self.centers_on == "grid":
            return torch.randint(self.size, (count, 2), generator=generator).float()
        return torch.rand(count, 2, generator=generator) * (self.size - 1)

    def _draw(self, count: int, held_out: bool, generator: torch.Generator) -> Tensor:
        """Return ``[count, K, 2]`` centres by rejection; the share of hits is known not to be 0."""
        wanted, kept = count * self.bumps, [torch.empty(0, 2)]
        while sum(map(len, kept)) < wanted:
            proposed_NC = self._uniform(max(2 * wanted, 1024), generator)
            kept.append(proposed_NC[self._is_out(proposed_NC) == held_out])
        return torch.cat(kept)[:wanted].view(count, self.bumps, 2)

    def _stripes(self, generator: torch.Generator) -> Tensor:
        """Return ``[stripes, 2]`` centres with one coordinate absent."""
        number = torch.arange(self.stripes)
        place_N = torch.div(number, 2, rounding_mode="floor")
        if self.centers_on == "grid":
            value_N = (place_N % self.size).float()
        else:  # one in each of as many equal intervals
            share_N = (place_N + torch.rand(self.stripes, generator=generator)) / max(
                1, (self.stripes + 1) // 2
            )
            value_N = share_N * (self.size - 1)
        centers_NC = torch.full((self.stripes, 2), math.nan)
        centers_NC[number, number % 2] = value_N
        return centers_NC


def _check_size(size: int) -> None:
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ValueError(f"size must be a positive number of pixels a side, got {size!r}")


def _check_positive(value: float, name: str) -> None:
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be a positive number of pixels, got {value}")


def _check_choice(value: str, choices: tuple[str, ...], name: str) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {choices}, got {value!r}")


def _check_count(value: int, name: str, *, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be an integer >= {least}, got {value!r}")


def _check_encoding(encoding: str, *, centers: str, width: float, stripes: int) -> None:
    if encoding == "one_hot" and centers == "continuous":
        raise ValueError(
            "encoding='one_hot' can't represent continuous centers; use 'bump', 'ramp' or 'scalar', or "
            "centers='grid'"
        )
    if encoding == "bump" and centers == "continuous" and width < 0.14:
        raise ValueError(
            f"code_sigma={width} is too narrow for continuous centers: between two pixels no unit of the "
            "code responds (less than 0.002 of its peak); use at least 0.14"
        )
    if encoding == "scalar" and stripes:
        raise ValueError(
            "encoding='scalar' can't leave a coordinate out, as stripes do: 0 is a coordinate like any "
            "other; use 'one_hot', 'bump' or 'ramp'"
        )
