"""Every kind of image becomes the bytes a person would see, or is refused by its kind."""

import io
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_sym.datamodules._pixels import as_bytes

SIDE = 16
GENERATOR = np.random.default_rng(0)
RGB = GENERATOR.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
GREY = GENERATOR.integers(0, 256, (SIDE, SIDE), dtype=np.uint8)
ALPHA = GENERATOR.integers(0, 256, (SIDE, SIDE), dtype=np.uint8)
WIDE = np.linspace(0, 65535, SIDE * SIDE).reshape(SIDE, SIDE).round().astype(np.uint16)


def read(image, channels=3, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return as_bytes(image, channels=channels, max_side=None, **options)


def planes(array):
    """The twin's images: ``[H, W]`` or ``[H, W, 3]`` to ``[3, H, W]``."""
    array = np.repeat(array[..., None], 3, axis=2) if array.ndim == 2 else array
    return torch.from_numpy(np.ascontiguousarray(array.transpose(2, 0, 1)))


def on_white(colour, alpha):
    """The twin of a transparent picture, in float64, from the definition."""
    share = alpha.astype(np.float64) / 255
    share = share[..., None] if colour.ndim == 3 else share
    return colour * share + 255 * (1 - share)


def close(ours, theirs, atol=1.01):
    expected = planes(np.asarray(theirs, dtype=np.float64))
    assert ours.dtype == torch.uint8
    assert (ours.double() - expected).abs().max() <= atol


def stored(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return Image.open(io.BytesIO(file.getvalue()))


def with_colour_table(alpha=None):
    image = Image.fromarray(GREY % 8).convert("P")
    table = GENERATOR.integers(0, 256, (8, 3), dtype=np.uint8)
    image.putpalette(table.tobytes())
    if alpha is not None:
        image.info["transparency"] = bytes(alpha)
    return image, table[GREY % 8]


def test_modes_of_whole_colours():
    cmyk = 255 - np.concatenate([RGB, np.full((SIDE, SIDE, 1), 255, dtype=np.uint8)], axis=2)
    inks = [Image.fromarray(np.ascontiguousarray(cmyk[..., k])) for k in range(4)]
    exact = {
        "L": (Image.fromarray(GREY), GREY),
        "RGB": (Image.fromarray(RGB), RGB),
        "RGBX": (Image.fromarray(RGB).convert("RGBX"), RGB),
        "1": (Image.fromarray(GREY > 99), (GREY > 99) * 255),
        "P": with_colour_table(),
        "CMYK": (Image.merge("CMYK", inks), RGB),
    }
    for mode, (image, expected) in exact.items():
        assert image.mode == mode
        assert torch.equal(read(image).long(), planes(np.asarray(expected, dtype=np.int64))), mode
    for mode in ("YCbCr", "HSV", "LAB"):
        other = Image.fromarray(RGB).convert(mode)
        assert other.mode == mode
        seen = read(other)
        assert (seen.double() - planes(RGB).double()).abs().mean() < 3  # eight bits of another space
        assert read(other, channels=1).shape == (1, SIDE, SIDE)


def test_sixteen_bits_keep_their_ramp():
    expected = WIDE.astype(np.float64) * (255 / 65535)
    for image in (
        Image.fromarray(WIDE),
        stored(Image.fromarray(WIDE), "PNG"),
        stored(Image.fromarray(WIDE), "TIFF"),
        stored(Image.fromarray(WIDE.astype(np.int32)), "PPM"),  # Pillow calls a grey one of 16 bits "I"
        WIDE,
        WIDE.astype(">u2"),
        torch.from_numpy(WIDE),
    ):
        close(read(image), expected, atol=0.5001)
        assert torch.equal(read(image, channels=1)[0], read(image)[1])
    big_endian = Image.frombytes("I;16B", (SIDE, SIDE), WIDE.astype(">u2").tobytes())
    close(read(big_endian), expected, atol=0.5001)


def test_what_has_no_known_range_is_refused_by_its_mode():
    with pytest.raises(ValueError, match=r"mode 'I' \(32-bit integers\) has no known range; save it"):
        read(Image.fromarray(WIDE.astype(np.int32)))
    with pytest.raises(ValueError, match=r"a floating image must be in \[0, 1\], got values from 0 to 255"):
        read(Image.fromarray(np.linspace(0, 255, 16, dtype=np.float32).reshape(4, 4)))
    with pytest.raises(ValueError, match="uint8, uint16, bool or floating in"):
        read(np.zeros((3, 4, 4), dtype=np.int64))
    with pytest.raises(ValueError, match=r"1 or 3 channels, got shape \(4, 4, 4\)"):
        read(np.zeros((4, 4, 4), dtype=np.uint8))
    with pytest.raises(ValueError, match="must have pixels"):
        read(np.zeros((3, 0, 4), dtype=np.uint8))
    with pytest.raises(ValueError, match="must be a PIL image, an array, a tensor or a path"):
        read(7)
    unit = np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16)
    close(read(Image.fromarray(unit)), unit.astype(np.float64) * 255, atol=0.51)


def test_what_is_transparent_lies_on_white():
    image, colours = with_colour_table(alpha=[0, 64, 255, 255, 128, 255, 255, 30])
    alpha = np.array([0, 64, 255, 255, 128, 255, 255, 30], dtype=np.uint8)[GREY % 8]
    close(read(image), on_white(colours, alpha))
    close(read(stored(image, "PNG")), on_white(colours, alpha))
    close(read(image.convert("RGBA")), on_white(colours, alpha))
    rgba = np.concatenate([RGB, ALPHA[..., None]], axis=2)
    close(read(Image.fromarray(rgba)), on_white(RGB, ALPHA))
    close(read(Image.fromarray(np.stack([GREY, ALPHA], axis=2))), on_white(GREY, ALPHA))  # LA
    close(read(Image.fromarray(rgba).convert("RGBa")), on_white(RGB, ALPHA), atol=3)
    whole = Image.fromarray(RGB)
    whole.putalpha(255)
    assert torch.equal(read(whole), planes(RGB))
    one_colour = Image.fromarray(GREY)
    one_colour.info["transparency"] = int(GREY[0, 0])
    close(read(one_colour), np.where(GREY[0, 0] == GREY, 255, GREY))
    grey = read(Image.fromarray(rgba), channels=1)
    weighed = on_white(RGB, ALPHA) @ np.array([0.299, 0.587, 0.114])
    assert (grey[0].double() - torch.from_numpy(weighed)).abs().max() <= 2


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_followed_by_choice(orientation):
    turns = {
        1: lambda x: x,
        2: lambda x: x[:, ::-1],
        3: lambda x: x[::-1, ::-1],
        4: lambda x: x[::-1],
        5: lambda x: x.transpose(1, 0, 2),
        6: lambda x: x.transpose(1, 0, 2)[:, ::-1],
        7: lambda x: x.transpose(1, 0, 2)[::-1, ::-1],
        8: lambda x: x.transpose(1, 0, 2)[::-1],
    }
    tall = RGB[:, :10]
    exif = Image.Exif()
    exif[0x0112] = orientation
    for kind in ("PNG", "WEBP", "TIFF"):
        image = stored(Image.fromarray(tall), kind, exif=exif, lossless=True)
        assert torch.equal(read(image), planes(turns[orientation](tall)))
        if kind != "TIFF":  # which Pillow turns on reading
            assert torch.equal(read(image, upright=False), planes(tall))
    older = Image.fromarray(WIDE[:, :10].astype(np.int32))  # as older versions of Pillow read 16 bits
    older.format = "PNG"
    older.getexif()[0x0112] = orientation
    for deep in (stored(Image.fromarray(WIDE[:, :10]), "PNG", exif=exif), older):
        turned = turns[orientation](WIDE[:, :10, None])[..., 0]  # a turned image forgets its format
        close(read(deep), turned * (255 / 65535), atol=0.51)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_a_damaged_orientation_costs_no_picture():
    whole = stored(Image.fromarray(RGB), "PNG", exif=b"Exif\x00\x00II*\x00\xff\xff\xff\x7f")
    assert torch.equal(as_bytes(whole, channels=3, max_side=None), planes(RGB))


def test_arrays_of_any_layout():
    expected = planes(RGB)
    for image in (
        RGB,
        RGB.transpose(2, 0, 1),
        np.asfortranarray(RGB),
        RGB[:, ::-1][:, ::-1],
        (RGB / 255).astype(np.float64),
        (RGB / 255).astype(">f4"),
        torch.from_numpy(RGB),
        torch.from_numpy(RGB / 255).permute(2, 0, 1),
    ):
        assert torch.equal(read(image), expected)
    assert torch.equal(read(GREY > 99), planes((GREY > 99).astype(np.uint8) * 255))
    locked = RGB.copy()
    locked.flags.writeable = False
    assert torch.equal(read(locked), expected)
    half = torch.from_numpy(GREY / 255).half()
    close(read(half), GREY.astype(np.float64), atol=0.6)


def test_files_and_encoded_bytes(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(RGB).save(path)
    for image in (
        path,
        str(path),
        {"bytes": path.read_bytes(), "path": None},
        {"bytes": None, "path": str(path)},
    ):
        assert torch.equal(read(image), planes(RGB))
