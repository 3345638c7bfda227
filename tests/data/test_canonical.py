from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageCms

from coin_ray.data import canonical, pixels
from coin_ray.data.canonical import canonical_image, decode_rgb
from coin_ray.errors import InputError


def _encode(image: Image.Image, format: str, **options: object) -> bytes:
    sink = io.BytesIO()
    image.save(sink, format, **options)
    return sink.getvalue()


def _corner_image(width: int = 48, height: int = 32) -> Image.Image:
    """Red in the upper left corner of a blue image."""
    image = Image.new("RGB", (width, height), "blue")
    image.paste("red", (0, 0, width // 3, height // 3))
    return image


def _sent_image(raw: bytes, max_side: int = 4096) -> Image.Image:
    return Image.open(io.BytesIO(canonical_image(raw, max_side).data))


def _is_close(pixel: object, expected: tuple[int, ...], tolerance: int = 6) -> bool:
    return bool(np.abs(np.subtract(pixel, expected)).max() <= tolerance)  # type: ignore[arg-type]


def _exif(orientation: int) -> Image.Exif:
    metadata = Image.Exif()
    metadata[0x0112] = orientation
    metadata[0x010F] = "camera"
    return metadata


# Where the red corner of the stored pixels ends up, seen upright.
CORNERS = {1: "ul", 2: "ur", 3: "lr", 4: "ll", 5: "ul", 6: "ur", 7: "lr", 8: "ll"}


@pytest.mark.parametrize(
    ("orientation", "format"), list(itertools.product(CORNERS, ["JPEG", "PNG", "WEBP"]))
)
def test_upright(orientation: int, format: str) -> None:
    raw = _encode(
        _corner_image(),
        format,
        exif=_exif(orientation),
        **({"lossless": True} if format == "WEBP" else {}),
    )
    image = canonical_image(raw, 4096)
    expected = (32, 48) if orientation >= 5 else (48, 32)
    assert (image.width, image.height) == image.original == expected
    upright = _sent_image(raw)
    assert not upright.getexif()
    for decoded in (upright, decode_rgb(raw)):
        width, height = decoded.size
        corners = {
            "ul": (2, 2),
            "ur": (width - 3, 2),
            "ll": (2, height - 3),
            "lr": (width - 3, height - 3),
        }
        red_corners = [
            name
            for name, position in corners.items()
            if _is_close(decoded.getpixel(position), (255, 0, 0), 40)
        ]
        assert red_corners == [CORNERS[orientation]]


@pytest.mark.filterwarnings("ignore:Corrupt EXIF:UserWarning")
def test_damaged_exif_counts_as_upright() -> None:
    raw = _encode(_corner_image(), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff")
    assert decode_rgb(raw).size == (48, 32)


def test_plain_jpeg_is_sent_unchanged() -> None:
    raw = _encode(_corner_image(), "JPEG")
    image = canonical_image(raw, 48)
    assert image.data == raw
    assert image.image_id == hashlib.sha256(raw).hexdigest()
    assert "data" not in repr(image)


METADATA = {
    "exif": {"exif": _exif(1)},
    "comment": {"comment": b"private"},
    "profile": {
        "icc_profile": (
            ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
        )
    },
}


@pytest.mark.parametrize("name", METADATA)
def test_metadata_is_stripped(name: str) -> None:
    raw = _encode(_corner_image(), "JPEG", **METADATA[name])
    image = canonical_image(raw, 4096)
    assert image.data != raw
    assert b"camera" not in image.data
    assert b"private" not in image.data
    assert not {"exif", "icc_profile", "comment"} & set(_sent_image(raw).info)
    assert image.image_id == hashlib.sha256(raw).hexdigest()


def test_trailing_data_is_not_sent() -> None:
    raw = _encode(_corner_image(), "JPEG")
    assert canonical_image(raw + b"secret", 4096).data[-2:] == b"\xff\xd9"


def test_sixteen_bit_is_scaled_not_clipped() -> None:
    ramp = np.tile(np.linspace(0, 65535, 256).astype(np.uint16), (16, 1))
    for format in ("PNG", "TIFF"):
        pixels = np.asarray(decode_rgb(_encode(Image.fromarray(ramp), format)))
        assert pixels.shape == (16, 256, 3)
        assert np.array_equal(pixels[0, :, 0], ramp[0] >> 8)


def test_floats_are_stretched() -> None:
    ramp = np.tile(np.linspace(-3, 5, 64, dtype=np.float32), (16, 1))
    pixels = np.asarray(decode_rgb(_encode(Image.fromarray(ramp), "TIFF")))
    assert (pixels.min(), pixels.max()) == (0, 255)


def _transparent() -> Image.Image:
    image = Image.new("RGBA", (16, 16), (255, 0, 0, 0))
    image.paste((0, 255, 0, 255), (0, 0, 8, 16))
    return image


MODES = {
    "rgba": (_encode(_transparent(), "PNG"), (0, 255, 0), (255, 255, 255)),
    "la": (
        _encode(
            Image.merge(
                "LA", [Image.new("L", (16, 16), 9), _transparent().getchannel("A")]
            ),
            "PNG",
        ),
        (9, 9, 9),
        (255, 255, 255),
    ),
    "palette": (
        _encode(_transparent().quantize(), "PNG"),
        (0, 255, 0),
        (255, 255, 255),
    ),
    "gif": (_encode(_transparent(), "GIF"), (0, 255, 0), (255, 255, 255)),
    "one bit": (
        _encode(Image.new("1", (16, 16), 1), "PNG"),
        (255, 255, 255),
        (255, 255, 255),
    ),
    "grey": (_encode(Image.new("L", (16, 16), 77), "PNG"), (77, 77, 77), (77, 77, 77)),
    "cmyk": (
        _encode(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG"),
        (255, 0, 0),
        (255, 0, 0),
    ),
    "cmyk tiff": (
        _encode(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "TIFF"),
        (255, 0, 0),
        (255, 0, 0),
    ),
}


@pytest.mark.parametrize("name", MODES)
def test_any_mode_becomes_rgb(name: str) -> None:
    raw, left_colour, right_colour = MODES[name]
    image = decode_rgb(raw)
    assert image.mode == _sent_image(raw).mode == "RGB"
    assert _is_close(image.getpixel((2, 8)), left_colour)
    assert _is_close(image.getpixel((13, 8)), right_colour)


def test_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (16, 16), color) for color in ("red", "blue")]
    for format in ("GIF", "WEBP", "TIFF"):
        raw = _encode(frames[0], format, save_all=True, append_images=frames[1:])
        assert _is_close(decode_rgb(raw).getpixel((8, 8)), (255, 0, 0), 12)


def test_profile_is_applied() -> None:
    lab = ImageCms.createProfile("LAB")
    profile = ImageCms.ImageCmsProfile(lab).tobytes()
    raw = _encode(_corner_image(), "PNG", icc_profile=profile)
    assert decode_rgb(raw).size == (48, 32)  # a profile for another mode is ignored
    assert decode_rgb(_encode(_corner_image(), "PNG", icc_profile=b"broken")).size == (
        48,
        32,
    )


@given(
    width=st.integers(8, 90), height=st.integers(8, 90), max_side=st.integers(8, 100)
)
def test_downscaled_to_max_side(width: int, height: int, max_side: int) -> None:
    for format in ("JPEG", "PNG"):
        image = canonical_image(_encode(_corner_image(width, height), format), max_side)
        assert image.original == (width, height)
        assert max(image.width, image.height) == min(max_side, max(width, height))
        assert Image.open(io.BytesIO(image.data)).size == (image.width, image.height)


STORED = (4001, 2251)
RECTANGLE = (301, 203, 3777, 2149)
"""xyxy pixels of the stored image: light grey on dark grey, so that the resize has
nothing to clip."""


def _turn_box(
    box: tuple[int, int, int, int], orientation: int
) -> tuple[int, int, int, int]:
    """Return a box of the stored image, seen upright."""
    mask = Image.new("L", STORED, 0)
    mask.paste(255, box)
    turn = pixels.ORIENTATIONS.get(orientation)
    bounds = (mask.transpose(turn) if turn is not None else mask).getbbox()
    assert bounds is not None
    return bounds


def _light_edges(line: NDArray[np.float64]) -> tuple[float, float]:
    """Return where the light part of a line begins and ends, to parts of a pixel: from
    the light on each side of its middle."""
    middle = len(line) // 2
    light = (line - 64) / 128
    return middle - float(light[:middle].sum()), middle + float(light[middle:].sum())


def _rectangle_in(raw: bytes) -> NDArray[np.float64]:
    with Image.open(io.BytesIO(raw)) as image:
        pixels = np.asarray(image.convert("L"), np.float64)
    y, x = pixels.shape[0] // 2, pixels.shape[1] // 2
    x0, x1 = _light_edges(pixels[y - 20 : y + 20].mean(0))
    y0, y1 = _light_edges(pixels[:, x - 20 : x + 20].mean(1))
    return np.array([x0, y0, x1, y1])


def _encode_photograph(orientation: int, mode: str) -> bytes:
    picture = Image.new("L", STORED, 64)
    picture.paste(192, RECTANGLE)
    return _encode(picture.convert(mode), "JPEG", quality=98, exif=_exif(orientation))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_odd_sides_keep_their_place_in_a_smaller_image(
    orientation: int, mode: str
) -> None:
    image = canonical_image(_encode_photograph(orientation, mode), 1024)
    assert max(image.width, image.height) == 1024
    assert image.original == (STORED[::-1] if orientation >= 5 else STORED)
    factors = np.array(image.original * 2) / (
        image.width,
        image.height,
        image.width,
        image.height,
    )
    error = np.abs(
        _rectangle_in(image.data) * factors - _turn_box(RECTANGLE, orientation)
    )
    assert error.max() <= 0.3


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_a_turned_tiff(orientation: int, compression: str) -> None:
    """Pillow turns TIFFs by itself, and no other format."""
    raw = _encode(
        _corner_image(), "TIFF", exif=_exif(orientation), compression=compression
    )
    image = canonical_image(raw, 4096)
    assert (
        (image.width, image.height)
        == image.original
        == decode_rgb(raw).size
        == ((32, 48) if orientation >= 5 else (48, 32))
    )


def test_very_long_image() -> None:
    image = canonical_image(_encode(Image.new("L", (20_000, 20), 128), "PNG"), 4096)
    assert (image.width, image.height, image.original) == (4096, 4, (20_000, 20))
    panorama = canonical_image(
        _encode(Image.new("RGB", (20_000, 40), "red"), "JPEG", exif=_exif(6)), 1000
    )
    assert (panorama.width, panorama.height, panorama.original) == (
        2,
        1000,
        (40, 20_000),
    )


PHOTO = _encode(Image.effect_noise((64, 64), 80).convert("RGB"), "JPEG")
PNG = _encode(Image.effect_noise((64, 64), 80), "PNG")
REJECTED = {
    "empty": (b"", "empty"),
    "text": (b"width,height\n1,2\n", "not an image"),
    "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image"),
    "postscript": (
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99 99\n",
        "not an image",
    ),
    "truncated jpeg": (PHOTO[: len(PHOTO) // 2], "truncated"),
    "truncated png": (PNG[: len(PNG) // 2], "truncated"),
    "header only": (PHOTO[:20], "truncated|not an image"),
    "one pixel": (_encode(Image.new("RGB", (1, 1)), "PNG"), "too small"),
    "thin": (_encode(Image.new("RGB", (100, 7)), "PNG"), "too small"),
}


@pytest.mark.parametrize("name", REJECTED)
def test_unusable_files(name: str) -> None:
    raw, reason = REJECTED[name]
    for read in (decode_rgb, lambda r: canonical_image(r, 4096)):
        with pytest.raises(InputError, match=reason):
            read(raw)


def test_decompression_bomb(monkeypatch: pytest.MonkeyPatch) -> None:
    huge = bytearray(PNG)
    huge[16:24] = (60_000).to_bytes(4, "big") * 2
    huge[29:33] = zlib.crc32(huge[12:29]).to_bytes(4, "big")
    with pytest.raises(InputError, match="more than"):
        decode_rgb(bytes(huge))
    monkeypatch.setattr(canonical, "PIXELS_MAX", 1000)
    with pytest.raises(InputError, match="more than 1,000 pixels"):
        decode_rgb(PNG)


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
@given(
    offset=st.integers(0, 10_000),
    noise=st.binary(min_size=1, max_size=8),
    source=st.sampled_from([PHOTO, PNG, MODES["gif"][0], MODES["cmyk tiff"][0]]),
)
def test_damage_gives_an_image_or_input_error(
    offset: int, noise: bytes, source: bytes
) -> None:
    offset %= len(source)
    damaged = source[:offset] + noise + source[offset + len(noise) :]
    with contextlib.suppress(InputError):
        assert decode_rgb(damaged).mode == "RGB"
