"""Deep grey images: 16 bits, 32 bits and floats, and the range in which a run sees
them.
"""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from coin_ray.config import Folder
from coin_ray.data.canonical import decode_rgb, upright_size_and_range
from coin_ray.data.intensity import (
    IntensityStatistics,
    describe_intensity,
    earlier_range,
)
from coin_ray.data.pixels import (
    IntensityRange,
    TooFewLevels,
    format_range,
    orientation,
    own_range,
    parse_range,
    upright_rgb,
)
from coin_ray.errors import ConfigError, InputError
from tests.image_kinds import GROUND, OBJECT, encode_image

DEEP_KINDS = ("uint16", "int32", "float32")


def _seen(values: NDArray[Any], intensity_range: IntensityRange | None) -> list[int]:
    """Return the grey levels of an image with these values, stored as TIFF."""
    file = encode_image(Image.fromarray(values), "TIFF")
    pixels = np.asarray(decode_rgb(file, intensity_range))
    assert (pixels == pixels[:, :, :1]).all()
    return pixels[:, :, 0].ravel().tolist()


def _image_of(values: list[float], kind: str) -> NDArray[Any]:
    """Return an image of 16 x 16 pixels with the values in columns of equal width."""
    return np.repeat(np.tile(values, (16, 1)), 16 // len(values), axis=1).astype(kind)


@pytest.mark.parametrize("kind", DEEP_KINDS)
def test_a_range_says_which_values_are_black_and_white(kind: str) -> None:
    image = _image_of([10_000, 20_000, 26_000, 40_000], kind)
    levels = _seen(image, (20_000.0, 30_000.0))[:16:4]
    assert levels == [0, 0, 153, 255]


@pytest.mark.parametrize("kind", DEEP_KINDS)
@pytest.mark.parametrize("low", [GROUND, 3000])
def test_without_a_range_an_image_is_stretched_by_its_own_values(
    low: int, kind: str
) -> None:
    assert _seen(_image_of([low, low + 500], kind), None)[::8][:2] == [0, 255]


@pytest.mark.parametrize("kind", DEEP_KINDS)
def test_a_dead_pixel_takes_no_contrast(kind: str) -> None:
    values = np.full((64, 64), GROUND, kind)
    values[:32] = OBJECT
    values[0, 0], values[63, 63] = 65_535, 0
    levels = _seen(values, None)
    assert {levels[1], levels[-2]} == {0, 255}


@pytest.mark.parametrize("kind", DEEP_KINDS)
def test_an_object_of_a_few_pixels_is_seen(kind: str) -> None:
    values = np.full((100, 100), GROUND, kind)
    values[50, 50] = OBJECT
    levels = _seen(values, None)
    assert (levels[0], levels[50 * 100 + 50]) == (0, 255)


def test_pixels_without_a_number_take_no_contrast() -> None:
    values = _image_of([GROUND, OBJECT, np.nan, np.inf], "float32")
    assert _seen(values, None)[:16:4] == [0, 255, 0, 255]
    assert own_range(Image.fromarray(np.full((9, 9), np.nan, np.float32))) == (0.0, 0.0)


def test_a_constant_image_is_black() -> None:
    for kind in DEEP_KINDS:
        assert set(_seen(np.full((9, 9), GROUND, kind), None)) == {0}


def test_a_transparent_value_is_white_and_takes_no_contrast() -> None:
    values = _image_of([0, GROUND, OBJECT, 0], "uint16")
    file = encode_image(Image.fromarray(values), "PNG", transparency=0)
    levels = np.asarray(decode_rgb(file))[0, ::4, 0].tolist()
    assert levels == [255, 0, 255, 255]


@pytest.mark.parametrize("mode", ["La", "PA", "RGBa", "YCbCr", "HSV", "RGBX", "LAB"])
def test_images_in_memory_may_have_any_mode(mode: str) -> None:
    assert upright_rgb(Image.new(mode, (9, 9))).mode == "RGB"


def test_an_image_in_memory_is_turned_once() -> None:
    file = encode_image(Image.new("RGB", (20, 10)), "JPEG", 6)
    with Image.open(io.BytesIO(file)) as image:
        converted = image.convert("L")
        assert orientation(converted) == 6
        upright = upright_rgb(converted)
    assert upright.size == (20, 10)
    assert orientation(upright) == 1
    assert upright_rgb(upright).size == (20, 10)


def _png_of_colours(values: NDArray[np.uint16]) -> bytes:
    """Return a PNG of 16-bit colours [H, W, 3], which Pillow reads but does not write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        checksum = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)

    height, width, _ = values.shape
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    data = zlib.compress(rows)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def test_colours_of_12_bits_stored_as_16_are_told() -> None:
    ramp = np.linspace(0, 4095, 3 * 16 * 16).reshape(16, 16, 3).astype(np.uint16)
    with pytest.raises(InputError, match="none of which exceeds 4095 of 65535"):
        upright_size_and_range(_png_of_colours(ramp))
    size, intensity = upright_size_and_range(_png_of_colours(16 * ramp))
    assert (size, intensity) == ((16, 16), None)


def test_measurements_stored_as_colours_are_told() -> None:
    """Hundredths of a kelvin in three equal channels: 12 levels of the upper 8 bits."""
    ramp = np.linspace(21_000, 24_000, 16 * 16).reshape(16, 16, 1).astype(np.uint16)
    with pytest.raises(InputError, match="nearly uniform, with 12 levels; store it as"):
        upright_size_and_range(_png_of_colours(np.repeat(ramp, 3, axis=2)))
    with pytest.raises(InputError, match="nearly uniform"):
        decode_rgb(_png_of_colours(np.repeat(ramp, 3, axis=2)))
    with (
        Image.open(io.BytesIO(_png_of_colours(np.repeat(ramp, 3, axis=2)))) as image,
        pytest.raises(TooFewLevels, match="nearly uniform"),
    ):
        upright_rgb(image)
    wide = np.linspace(21_000, 30_000, 16 * 16).reshape(16, 16, 1).astype(np.uint16)
    size, _ = upright_size_and_range(_png_of_colours(np.repeat(wide, 3, axis=2)))
    assert size == (16, 16)


@pytest.mark.parametrize("kind", ["uint16", "float32"])
def test_low_values_of_a_tiff_are_white_if_it_says_so(kind: str) -> None:
    values = np.linspace(0, 200, 16 * 16).reshape(16, 16).astype(kind)
    for photometric, corner in ((0, 255), (1, 0)):
        file = io.BytesIO()
        Image.fromarray(values).save(file, "TIFF")
        raw = _set_photometric(file.getvalue(), photometric)
        pixels = np.asarray(decode_rgb(raw, (0.0, 200.0)))
        assert pixels[0, 0].tolist() == [corner] * 3
        assert pixels[-1, -1].tolist() == [255 - corner] * 3


def _set_photometric(raw: bytes, photometric: int) -> bytes:
    """Set the tag in a little-endian TIFF, since Pillow writes its own value."""
    entry = struct.pack("<HHI", 262, 3, 1)
    start = raw.index(entry) + len(entry)
    return raw[:start] + struct.pack("<I", photometric) + raw[start + 4 :]


def test_32_bits_without_a_sign_do_not_become_negative() -> None:
    values = np.linspace(1e9, 4e9, 16 * 16).reshape(16, 16).astype(np.uint32)
    file = io.BytesIO()
    Image.fromarray(values.view(np.int32)).save(file, "TIFF")
    raw = file.getvalue()
    entry = struct.pack("<HHIH", 339, 3, 1, 2)
    raw = raw.replace(entry, struct.pack("<HHIH", 339, 3, 1, 1))
    pixels = np.asarray(decode_rgb(raw))[..., 0]
    assert (pixels[0, 0], pixels[-1, -1]) == (0, 255)
    assert (np.diff(pixels.ravel().astype(int)) >= 0).all()


OWN_RANGES: dict[str, tuple[list[tuple[str, IntensityRange]], dict[str, Any]]] = {
    "no deep image": ([], {}),
    "from the lowest to the highest": (
        [("train", (10.0, 20.0)), ("train", (15.0, 30.0)), ("test", (0.0, 12.0))],
        {"range": [10.0, 30.0], "images": 3, "outside": 0},
    ),
    "a constant image does not count": (
        [("train", (10.0, 20.0)), ("train", (900.0, 900.0))],
        {"range": [10.0, 20.0], "images": 2, "outside": 1},
    ),
    "one broken image in a hundred does not count": (
        [("train", (10.0, 20.0))] * 199 + [("train", (0.0, 65_535.0))],
        {"range": [10.0, 20.0], "images": 200, "outside": 0},
    ),
    "test images in another unit are told": (
        [("train", (290.0, 310.0)), ("test", (29_000.0, 31_000.0))],
        {"range": [290.0, 310.0], "images": 2, "outside": 1},
    ),
    "only test images are deep": (
        [("test", (10.0, 20.0))],
        {"range": None, "images": 1, "outside": 0},
    ),
}


@pytest.mark.parametrize("name", OWN_RANGES)
def test_a_run_has_one_range(name: str) -> None:
    own_ranges, expected = OWN_RANGES[name]
    statistics = IntensityStatistics("auto")
    for split, own in own_ranges:
        statistics.add(split, own)
    metrics = statistics.metrics()
    assert metrics.get("intensity", {}) == expected
    line = describe_intensity(metrics)
    assert bool(line) == bool(own_ranges)
    assert ("have no value in this range" in line) == bool(expected.get("outside"))


def test_a_set_range_comes_first_and_a_found_one_stays() -> None:
    statistics = IntensityStatistics((0.0, 50.0))
    statistics.add("train", (10.0, 20.0))
    metrics = statistics.metrics()
    assert metrics["intensity"]["range"] == [0.0, 50.0]
    assert earlier_range(metrics, "auto") == (0.0, 50.0)
    assert earlier_range(metrics, (1.0, 2.0)) == (1.0, 2.0)
    assert earlier_range({}, "auto") == "auto"


def test_a_constant_data_set_has_a_range() -> None:
    statistics = IntensityStatistics("auto")
    statistics.add("train", (7.0, 7.0))
    low, high = statistics.choose_range() or (0.0, 0.0)
    assert low == 7.0 < high


@pytest.mark.parametrize("wrong", [(2.0, 1.0), (1.0, 1.0), (0.0, float("nan"))])
def test_a_wrong_range_is_told(wrong: tuple[float, float]) -> None:
    with pytest.raises(ConfigError, match="must be auto, or two"):
        Folder(images="photos", intensity_range=wrong)


def test_a_range_in_metadata_reads_back() -> None:
    assert parse_range(format_range((273.15, 1e5 / 3))) == (273.15, 1e5 / 3)
    assert parse_range("") is None
