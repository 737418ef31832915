"""Each operation against torchvision's, and each parameter's distribution against its transforms'."""

import math

import pytest
import torch
from scipy import stats
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv

from lightning_sym.datamodules import augment
from lightning_sym.datamodules.augment import blur, resample, views
from lightning_sym.datamodules.augment.parameters import ViewParameters, draw
from lightning_sym.datamodules.augment.recipes import ViewRecipe

N, SIDE = 24, 21


def some_images(n=N, side=SIDE, channels=3, seed=0):
    x = torch.rand(n, channels, side, side + 4, generator=torch.Generator().manual_seed(seed))
    x[0] = 0.5  # no hue
    x[1, :, :4] = x[1, :1, :4]  # partly grey
    x[2] = (x[2] > 0.5).float()  # pure colours: ties between channels
    return x


def uniform(low, high, n=N, seed=1):
    return low + (high - low) * torch.rand(n, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("ours", "theirs", "low", "high"),
    [
        (augment.brightness, tv.adjust_brightness, 0.0, 2.0),
        (augment.contrast, tv.adjust_contrast, 0.0, 2.0),
        (augment.saturation, tv.adjust_saturation, 0.0, 2.0),
        (augment.hue, tv.adjust_hue, -0.5, 0.5),
        (augment.solarize, tv.solarize, 0.0, 1.0),
    ],
)
def test_colours_equal_torchvisions(ours, theirs, low, high, channels):
    x, factor = some_images(channels=channels), uniform(low, high)
    one_by_one = torch.stack([theirs(image, float(f)) for image, f in zip(x, factor, strict=True)])
    assert torch.allclose(ours(x, factor), one_by_one, atol=2e-5)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("ours", "theirs", "low", "high"),
    [
        (augment.brightness, tv.adjust_brightness, 0.0, 2.0),
        (augment.contrast, tv.adjust_contrast, 0.0, 2.0),
        (augment.saturation, tv.adjust_saturation, 0.0, 2.0),
        (augment.solarize, lambda x, f: tv.solarize(x, f * 255), 0.0, 1.0),
        (augment.hue, tv.adjust_hue, -0.5, 0.5),
    ],
)
def test_colours_of_bytes_equal_torchvisions(ours, theirs, low, high, channels):
    """Torchvision cuts grey values and results down to whole bytes: ours lie within one above, uncut."""
    byte = (some_images(200, channels=channels) * 255).round().byte()
    factor = uniform(low, high, 200)
    expected = torch.stack([theirs(image, float(f)) for image, f in zip(byte, factor, strict=True)])
    over = ours(byte.float(), factor, white=255.0) - expected
    assert over.max() <= 1.001
    assert over.min() >= (-0.999 if theirs is tv.adjust_hue else -0.001)  # it spreads its hues over 255.99
    whole = ours(byte, factor)
    assert whole.dtype == torch.uint8
    off = (whole.int() - expected.int()).abs()
    assert off.max() <= 1
    if theirs is not tv.adjust_hue:
        assert (off > 0).float().mean() < 1e-3  # a value that is whole but for rounding


def test_grey_equals_torchvisions():
    x = some_images()
    assert torch.allclose(augment.grayscale(x), tv.rgb_to_grayscale(x, num_output_channels=3), atol=1e-6)
    byte = (x * 255).round().byte()
    assert torch.equal(augment.grayscale(byte), tv.rgb_to_grayscale(byte, num_output_channels=3))


@pytest.mark.parametrize("kernel", [3, 9, 23])
def test_blur_equals_torchvisions(kernel):
    x, sigma = some_images(), uniform(0.1, 2.0)
    theirs = [
        tv.gaussian_blur(image, [kernel, kernel], [float(s)]) for image, s in zip(x, sigma, strict=True)
    ]
    assert torch.allclose(augment.gaussian_blur(x, sigma, kernel_size=kernel), torch.stack(theirs), atol=1e-5)
    with pytest.raises(ValueError, match="kernel_size must be odd"):
        augment.gaussian_blur(x, sigma, kernel_size=4)


@pytest.mark.parametrize("size", [7, 32])
@pytest.mark.parametrize("looped", [False, True])
def test_crop_equals_torchvisions(size, looped, monkeypatch):
    monkeypatch.setattr(resample, "LOOP_PIXELS", 0 if looped else 10**9)
    x = (some_images() * 255).round().byte()
    generator = torch.Generator().manual_seed(2)
    tall = torch.randint(1, SIDE + 1, (N,), generator=generator)
    wide = torch.randint(1, SIDE + 5, (N,), generator=generator)
    top = (torch.rand(N, generator=generator) * (SIDE + 1 - tall)).long()
    left = (torch.rand(N, generator=generator) * (SIDE + 5 - wide)).long()
    flip = torch.arange(N) % 2 == 0
    boxes = torch.stack([top, left, tall, wide], dim=1)
    ours = augment.crop_resize(x, boxes, size=size, flip=flip)
    for n in range(N):
        theirs = tv.resized_crop(x[n].float() / 255, *boxes[n].tolist(), [size, size], antialias=True)
        assert torch.allclose(ours[n], theirs.flip(-1) if flip[n] else theirs, atol=2e-5)
    with pytest.raises(ValueError, match="boxes must lie within"):
        augment.crop_resize(x, boxes + 20, size=size)


def strong(**other):
    values = {
        "jitter": 0.8,
        "brightness": 0.8,
        "contrast": 0.8,
        "saturation": 0.8,
        "hue": 0.2,
        "grayscale": 0.3,
    }
    return ViewRecipe(**{**values, "blur": 0.5, "blur_kernel": 5, "solarize": 0.3, **other})


def drawn(recipe, n=4000, height=30, width=40, key=(0, 0, 0)):
    full = torch.full((n,), height), torch.full((n,), width)
    return draw(recipe, index=torch.arange(n), heights=full[0], widths=full[1], key=key)


def one_view(image, own: ViewParameters, n, size, kernel):
    """The slow twin: torchvision, one operation after the other."""
    x = tv.resized_crop(image, *own.boxes[n].tolist(), [size, size], antialias=True)
    x = x.flip(-1) if own.flip[n] else x
    change = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue)
    for which in own.order[n].tolist() if own.jitter[n] else ():
        x = change[which](x, float(own.factors[n, which]))
    x = tv.rgb_to_grayscale(x, num_output_channels=3) if own.grayscale[n] else x
    if own.blur_sigma[n] > 0:
        x = tv.gaussian_blur(x, [kernel, kernel], [float(own.blur_sigma[n])])
    return tv.solarize(x, float(own.solarize_threshold[n])) if own.solarize_threshold[n] <= 1 else x


def test_whole_views_equal_torchvisions_one_by_one():
    x, recipe = (some_images(64) * 255).round() / 255, strong()
    own = [drawn(recipe, 64, SIDE, SIDE + 4, (0, 0, view)) for view in range(2)]
    made = augment.make_views(x, own, size=16, blur_kernels=[5, 5])
    for view in range(2):
        theirs = torch.stack([one_view(x[n], own[view], n, 16, 5) for n in range(64)])
        off = (made[view] - theirs).abs() > 1 / 255
        assert off.float().mean() < 1e-3  # a pixel at a threshold may fall on its other side
    scaled = augment.make_views(
        x, own, size=16, blur_kernels=[5, 5], mean=torch.full((3,), 0.4), std=torch.full((3,), 0.2)
    )
    assert torch.allclose(scaled[0], (made[0] - 0.4) / 0.2, atol=1e-5)


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
def test_one_change_of_bytes_is_torchvisions_to_a_byte(name):
    recipe = ViewRecipe(crop_scale=(1, 1), crop_ratio=(1, 1), flip=0.5, jitter=1.0, **{name: 0.8})
    x = (torch.rand(64, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 255).byte()
    own = drawn(recipe, 64, 32, 32)
    (made,) = augment.make_views(x, [own], size=32, blur_kernels=[3])
    change, column = {
        "brightness": (tv.adjust_brightness, 0),
        "contrast": (tv.adjust_contrast, 1),
        "saturation": (tv.adjust_saturation, 2),
    }[name]
    for n in range(64):
        theirs = change(x[n].flip(-1) if own.flip[n] else x[n], float(own.factors[n, column]))
        assert (made[n] * 255 - theirs).abs().max() <= 1.001


def test_small_widths_leave_no_subnormal_number():
    """They would make the blur's products an order of magnitude slower."""
    for dtype in (torch.float32, torch.float64):
        kernels = blur.gaussian_kernels(torch.linspace(0.1, 3, 50, dtype=dtype), kernel_size=23)
        assert not bool(((kernels > 0) & (kernels < 1e-20)).any())
        torch.testing.assert_close(kernels.sum(dim=1), torch.ones(50, dtype=dtype))


@pytest.mark.parametrize("chunk", [1, 500, 10**6])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_chunks_and_threads_change_nothing(chunk, dtype, monkeypatch):
    byte, own = (some_images(64) * 255).round().byte(), [drawn(strong(), 64, SIDE, SIDE + 4)]
    x = byte if dtype == torch.uint8 else byte / 255
    options = {"size": 16, "blur_kernels": [5], "mean": torch.full((3,), 0.4), "std": torch.full((3,), 0.2)}
    (expected,) = augment.make_views(x, own, **options)
    monkeypatch.setitem(views.CHUNK, "cpu", chunk)
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            (made,) = augment.make_views(x, own, **options)
            assert (made - expected).abs().max() < (2e-5 if dtype == torch.float32 else 0.03)
            assert (made - expected).abs().mean() < 1e-5  # a grey value may round to another byte
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.9, 1.0)])
def test_crops_are_distributed_as_torchvisions(scale):
    own = drawn(strong(crop_scale=scale))
    transform = v2.RandomResizedCrop(8, scale=scale)
    image = torch.zeros(3, 30, 40)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = [transform.make_params([image]) for _ in range(4000)]
    for column, name in enumerate(("top", "left", "height", "width")):
        expected = [each[name] for each in theirs]
        assert stats.ks_2samp(own.boxes[:, column].numpy(), expected).pvalue > 1e-3, name


def test_colours_are_distributed_as_torchvisions():
    own = drawn(strong())
    jitter = v2.ColorJitter(0.8, 0.8, 0.8, 0.2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = [jitter.make_params([]) for _ in range(4000)]
        sigma = [v2.GaussianBlur(5, (0.1, 2.0)).make_params([])["sigma"][0] for _ in range(2000)]
    for column, name in enumerate(("brightness", "contrast", "saturation", "hue")):
        expected = [each[f"{name}_factor"] for each in theirs]
        assert stats.ks_2samp(own.factors[:, column].numpy(), expected).pvalue > 1e-3, name
    assert stats.ks_2samp(own.blur_sigma[own.blur_sigma > 0].numpy(), sigma).pvalue > 1e-3
    order = own.order @ torch.tensor([64, 16, 4, 1])
    counts = order.unique(return_counts=True)[1]
    assert len(counts) == math.factorial(4)
    assert stats.chisquare(counts.numpy()).pvalue > 1e-3
    for share, p in (
        (own.flip, 0.5),
        (own.jitter, 0.8),
        (own.grayscale, 0.3),
        (own.blur_sigma > 0, 0.5),
        (own.solarize_threshold <= 1, 0.3),
    ):
        assert stats.binomtest(int(share.sum()), 4000, p).pvalue > 1e-3


def test_draws_depend_on_key_and_index_alone():
    before = torch.get_rng_state()
    whole, part = drawn(strong(), 50), drawn(strong(), 20)
    assert torch.equal(whole.boxes[:20], part.boxes)
    assert torch.equal(whole.factors[:20], part.factors)
    for key in ((1, 0, 0), (0, 1, 0), (0, 0, 1)):
        assert not torch.equal(drawn(strong(), 50, key=key).factors, whole.factors)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_crop_that_never_fits_falls_back_on_the_middle():
    own = drawn(strong(crop_scale=(1.0, 1.0)), 5, height=10, width=100)
    assert own.boxes.tolist() == [[0, 43, 10, 13]] * 5


def test_recipes():
    first, second = augment.barlow_twins(224)
    assert (first.blur, second.blur, first.solarize, second.solarize) == (1.0, 0.1, 0.0, 0.2)
    assert augment.barlow_twins(32, solarize=(0.5, 0.1))[0].solarize == 0.5
    assert augment.simclr(224)[0].brightness == 0.8
    assert augment.simclr(224)[0].blur_kernel == 23
    assert augment.simclr(32)[0].blur == 0
    assert len(augment.make_recipe("barlow_twins", views=3, image_size=32)) == 3
    with pytest.raises(ValueError, match="did you mean 'simclr'"):
        augment.make_recipe("simcrl", views=2, image_size=32)
    with pytest.raises(ValueError, match="did you mean 'solarize'"):
        augment.make_recipe("vicreg", views=2, image_size=32, options={"solarise": 1})
    with pytest.raises(ValueError, match="hue must be in"):
        augment.simclr(32, hue=0.7)


def test_threads_change_nothing(monkeypatch):
    x, own = (some_images(64) * 255).round().byte(), [drawn(strong(), 64, SIDE, SIDE + 4)]
    made, threads = [], torch.get_num_threads()
    monkeypatch.setitem(views.CHUNK, "cpu", 3 * 16 * 16 * 5)
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            made += augment.make_views(x, own, size=16, blur_kernels=[5])
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    assert torch.allclose(made[0], made[1], atol=1e-6)
