"""Recipes: what a view is made of, with each paper's numbers as defaults."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

Range = tuple[float, float]
SMALL = 64  # pixels a side up to which an image is small: CIFAR's settings instead of ImageNet's


@dataclass(frozen=True)
class ViewRecipe:
    """How one view is drawn: crop, flip, colours in random order, grey, blur, solarize; in that turn.

    The distributions are those of torchvision's ``RandomResizedCrop``, ``RandomHorizontalFlip``,
    ``RandomApply([ColorJitter], p)``, ``RandomGrayscale``, ``RandomApply([GaussianBlur], p)`` and
    ``RandomSolarize``.

    Args:
        crop_scale: area of the crop as a share of the image's, uniform in this range.
        crop_ratio: width over height of the crop, log-uniform in this range.
        flip: probability of a mirror image.
        jitter: probability that colours are changed at all.
        brightness: factor uniform in ``[max(0, 1 - b), 1 + b]``.
        contrast: likewise.
        saturation: likewise.
        hue: shift uniform in ``[-hue, hue]`` turns, at most 0.5.
        grayscale: probability of a grey image.
        blur: probability of a blurred one.
        blur_sigma: standard deviation in pixels, uniform in this range.
        blur_kernel: taps of the blur, odd.
        solarize: probability that bright pixels are inverted.
        solarize_threshold: what is bright, in [0, 1].

    Raises:
        ValueError: if a value is out of its range.
    """

    crop_scale: Range = (0.08, 1.0)
    crop_ratio: Range = (3 / 4, 4 / 3)
    flip: float = 0.5
    jitter: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    grayscale: float = 0.0
    blur: float = 0.0
    blur_sigma: Range = (0.1, 2.0)
    blur_kernel: int = 3
    solarize: float = 0.0
    solarize_threshold: float = 128 / 255

    def __post_init__(self) -> None:
        for name in ("flip", "jitter", "grayscale", "blur", "solarize", "solarize_threshold"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {value!r}")
        for name in ("brightness", "contrast", "saturation"):
            value = getattr(self, name)
            if not 0 <= value < float("inf"):
                raise ValueError(f"{name} must be at least 0, got {value!r}")
        if not 0 <= self.hue <= 0.5:
            raise ValueError(f"hue must be in [0, 0.5] turns, got {self.hue!r}")
        for name in ("crop_scale", "crop_ratio", "blur_sigma"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ValueError(f"{name} must be (low, high) with 0 < low <= high, got {(low, high)!r}")
        if self.crop_scale[1] > 1:
            raise ValueError(f"crop_scale is a share of the image, at most 1, got {self.crop_scale!r}")
        if self.blur_kernel < 1 or self.blur_kernel % 2 == 0:
            raise ValueError(f"blur_kernel must be odd and positive, got {self.blur_kernel!r}")


def kernel_for(image_size: int) -> int:
    """Return a tenth of the image in taps, as SimCLR has it, odd and at least 3 (23 at 224 pixels)."""
    return max(3, int(0.1 * image_size) // 2 * 2 + 1)


def sigma_for(image_size: int) -> Range:
    """Return the papers' (0.1, 2.0) at 224 pixels, the upper end scaled with the image, at least 0.2."""
    return 0.1, max(0.2, 2.0 * image_size / 224)


def simclr(image_size: int, *, strength: float | None = None, **values: Any) -> tuple[ViewRecipe, ...]:
    """SimCLR's views (Chen et al., arXiv:2002.05709, appendix A), all views alike.

    Crop of 8 to 100 % of the area, flip, colour jitter (0.8, 0.8, 0.8, 0.2) times ``strength`` with
    probability 0.8, grey with 0.2, blur with 0.5. On small images (64 pixels or less) strength is 0.5
    and there is no blur, as in the paper's CIFAR-10 experiments (appendix B.9).

    Args:
        image_size: pixels a side.
        strength: of the colour jitter; None: 1, or 0.5 on small images.
        values: fields of :class:`ViewRecipe` that differ.
    """
    small = image_size <= SMALL
    s = (0.5 if small else 1.0) if strength is None else strength
    return (
        _made(
            image_size,
            {
                "jitter": 0.8,
                "brightness": 0.8 * s,
                "contrast": 0.8 * s,
                "saturation": 0.8 * s,
                "hue": 0.2 * s,
            },
            {"grayscale": 0.2, "blur": 0.0 if small else 0.5},
            values,
        ),
    )


def barlow_twins(image_size: int, **values: Any) -> tuple[ViewRecipe, ...]:
    """Barlow Twins' two different views (Zbontar et al., arXiv:2103.03230, appendix A), BYOL's.

    Colour jitter (0.4, 0.4, 0.2, 0.1) with probability 0.8, grey with 0.2; the first view is always
    blurred and never solarized, the second is blurred with probability 0.1 and solarized with 0.2.

    Args:
        image_size: pixels a side; the blur's width scales with it.
        values: fields of :class:`ViewRecipe` that differ; a probability may be a pair, one for each view.
    """
    return tuple(
        _made(image_size, _BYOL, {"blur": blur, "solarize": solarize}, _nth(values, view))
        for view, (blur, solarize) in enumerate(((1.0, 0.0), (0.1, 0.2)))
    )


def vicreg(image_size: int, **values: Any) -> tuple[ViewRecipe, ...]:
    """VICReg's views (Bardes et al., arXiv:2105.04906, appendix C.1): BYOL's made symmetric.

    As :func:`barlow_twins`, every view blurred with probability 0.5 and solarized with 0.1.

    Args:
        image_size: pixels a side.
        values: fields of :class:`ViewRecipe` that differ.
    """
    return (_made(image_size, _BYOL, {"blur": 0.5, "solarize": 0.1}, values),)


def weak(image_size: int, **values: Any) -> tuple[ViewRecipe, ...]:
    """Crops of 64 to 100 % of the area and flips, nothing else; no paper's.

    Args:
        image_size: pixels a side.
        values: fields of :class:`ViewRecipe` that differ.
    """
    return (_made(image_size, {"crop_scale": (0.64, 1.0)}, values),)


_BYOL = {"jitter": 0.8, "brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1, "grayscale": 0.2}
RECIPES: dict[str, Callable[..., tuple[ViewRecipe, ...]]] = {
    "simclr": simclr,
    "barlow_twins": barlow_twins,
    "vicreg": vicreg,
    "weak": weak,
}


def make_recipe(
    recipe: str | ViewRecipe | Sequence[ViewRecipe],
    *,
    views: int,
    image_size: int,
    options: Mapping[str, Any] | None = None,
) -> tuple[ViewRecipe, ...]:
    """Return one recipe for each view.

    Args:
        recipe: a name, one recipe for all views, or several that the views take in turn.
        views: how many views.
        image_size: pixels a side.
        options: keywords of the named recipe.

    Raises:
        ValueError: for an unknown name or option, options without a name, or more recipes than views.
    """
    options = dict(options or {})
    if isinstance(recipe, str):
        if recipe not in RECIPES:
            raise ValueError(unknown("recipe", recipe, RECIPES))
        known = {field.name for field in fields(ViewRecipe)}
        known |= set(inspect.signature(RECIPES[recipe]).parameters) - {"image_size", "values"}
        for name in options:
            if name not in known:
                raise ValueError(unknown(f"recipe_options of {recipe!r}", name, known))
        made = RECIPES[recipe](image_size, **options)
    else:
        if options:
            raise ValueError("recipe_options are keywords of a recipe given by name; change the ViewRecipe")
        made = (recipe,) if isinstance(recipe, ViewRecipe) else tuple(recipe)
        if not made or not all(isinstance(one, ViewRecipe) for one in made):
            raise ValueError(f"recipe must be a name, a ViewRecipe or several of them, got {recipe!r}")
    if isinstance(recipe, str):
        made = made[:views]  # one view of an asymmetric pair is refused elsewhere
    if len(made) > views:
        raise ValueError(f"recipe has {len(made)} different views, but views={views}")
    chosen = tuple(made[view % len(made)] for view in range(views))
    for one in chosen:
        if one.blur and one.blur_kernel >= 2 * image_size:
            raise ValueError(
                f"blur_kernel must be below twice image_size={image_size}, got {one.blur_kernel}"
            )
    return chosen


def local_recipe(recipe: ViewRecipe, *, size: int, local_size: int, crop_scale: Range) -> ViewRecipe:
    """Return a recipe for small crops: other areas, and a blur that shrinks with the view.

    Args:
        recipe: of the large crops.
        size: their pixels a side.
        local_size: pixels a side of the small ones.
        crop_scale: area of the small crops as a share of the image's.
    """
    low, high = (max(0.1, sigma * local_size / size) for sigma in recipe.blur_sigma)
    kernel = min(recipe.blur_kernel, kernel_for(local_size))
    return replace(recipe, crop_scale=_plain(crop_scale), blur_sigma=(low, high), blur_kernel=kernel)


def unknown(what: str, name: object, known: Mapping[str, Any] | set[str]) -> str:
    """Return the message for a name that is not known: which come near it, and which there are."""
    near = difflib.get_close_matches(str(name), sorted(known), n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
    return f"unknown {what}: {name!r}; {hint}known: {', '.join(sorted(known))}"


def _made(image_size: int, *layers: Mapping[str, Any]) -> ViewRecipe:
    recipe = ViewRecipe(blur_kernel=kernel_for(image_size), blur_sigma=sigma_for(image_size))
    for layer in layers:
        recipe = replace(recipe, **{name: _plain(value) for name, value in layer.items()})
    return recipe


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


_RANGES = ("crop_scale", "crop_ratio", "blur_sigma")


def _nth(values: Mapping[str, Any], view: int) -> dict[str, Any]:
    """Return each value, or its entry for one of two views where a pair was given for a number."""
    return {
        name: value[view] if isinstance(value, list | tuple) and name not in _RANGES else value
        for name, value in values.items()
    }
