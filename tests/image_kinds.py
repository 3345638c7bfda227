"""One file of every kind of image that people have, made by Pillow."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import Image, ImageCms

from coin_ray.data.pixels import HAS_AVIF

SIZE = (48, 32)
"""Width and height of the upright images."""
TURNS = {
    3: Image.Transpose.ROTATE_180,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    8: Image.Transpose.ROTATE_270,
}
"""How an upright image is stored for an EXIF orientation."""
GROUND, OBJECT = 21000, 24000
"""Values of the 16-bit scene: hundredths of a kelvin."""


def draw_scene() -> Image.Image:
    """Red in the upper left corner of a blue gradient."""
    gradient = np.linspace(60, 255, SIZE[0] * SIZE[1]).astype(np.uint8)
    pixels = np.zeros((SIZE[1], SIZE[0], 3), np.uint8)
    pixels[:, :, 2] = gradient.reshape(SIZE[1], SIZE[0])
    pixels[:11, :16] = (255, 0, 0)
    return Image.fromarray(pixels)


def deep_scene(kind: str = "uint16") -> Image.Image:
    """A warm object in the upper left corner of a ground that grows warmer."""
    ground = np.linspace(GROUND, GROUND + 1000, SIZE[0] * SIZE[1])
    values = ground.reshape(SIZE[1], SIZE[0])
    values[:11, :16] = OBJECT
    return Image.fromarray(values.astype(kind))


def encode_image(
    image: Image.Image, file_format: str, orientation: int = 1, **options: Any
) -> bytes:
    """Return the image's file; it is stored as a camera held at ``orientation`` would."""
    if orientation != 1:
        options["exif"] = Image.Exif()
        options["exif"][0x0112] = orientation
        image = image.transpose(TURNS[orientation])
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def _clear_scene() -> Image.Image:
    """The scene, transparent outside the red corner."""
    clear = draw_scene().convert("RGBA")
    alpha = Image.new("L", SIZE, 0)
    alpha.paste(255, (0, 0, 16, 11))
    alpha.paste(128, (16, 0, 32, 11))
    clear.putalpha(alpha)
    return clear


def _floats_with_gaps() -> Image.Image:
    values = np.array(deep_scene("float32"))
    values[20:24] = np.nan
    values[24:26] = np.inf
    return Image.fromarray(values)


def image_files() -> dict[str, bytes]:
    """Return the bytes of each kind of image by what is special about it."""
    picture, grey, clear = draw_scene(), draw_scene().convert("L"), _clear_scene()
    lab = ImageCms.profileToProfile(
        picture,
        ImageCms.createProfile("sRGB"),
        ImageCms.createProfile("LAB"),
        outputMode="LAB",
    )
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    lossless = {"lossless": True}
    encode = encode_image
    files = {
        "JPEG": encode(picture, "JPEG"),
        "JPEG turned by 180 degrees": encode(picture, "JPEG", 3),
        "JPEG turned right": encode(picture, "JPEG", 6),
        "PNG turned left": encode(picture, "PNG", 8),
        "PNG transposed": encode(picture, "PNG", 5),
        "TIFF turned right": encode(picture, "TIFF", 6),
        "WebP turned right": encode(picture, "WEBP", 6, **lossless),
        "16 bits PNG": encode(deep_scene(), "PNG"),
        "16 bits PNG turned right": encode(deep_scene(), "PNG", 6),
        "16 bits PNG with a transparent value": encode(
            deep_scene(), "PNG", transparency=OBJECT
        ),
        "16 bits TIFF": encode(deep_scene(), "TIFF"),
        "16 bits TIFF turned left": encode(deep_scene(), "TIFF", 8),
        "16 bits JPEG 2000": encode(deep_scene(), "JPEG2000"),
        "16 bits PGM": encode(deep_scene("int32"), "PPM"),
        "32 bits TIFF": encode(deep_scene("int32"), "TIFF"),
        "floats TIFF": encode(deep_scene("float32"), "TIFF"),
        "floats TIFF with gaps": encode(_floats_with_gaps(), "TIFF"),
        "palette": encode(picture.quantize(16), "PNG"),
        "palette with transparency": encode(clear.quantize(16), "PNG"),
        "GIF with transparency": encode(clear, "GIF"),
        "GIF with two frames": encode(
            picture, "GIF", save_all=True, append_images=[Image.new("RGB", SIZE)]
        ),
        "RGBA": encode(clear, "PNG"),
        "RGBA turned right": encode(clear, "PNG", 6),
        "grey with alpha": encode(clear.convert("LA"), "PNG"),
        "a transparent colour": encode(picture, "PNG", transparency=(255, 0, 0)),
        "a transparent grey": encode(grey, "PNG", transparency=grey.getpixel((0, 0))),
        "grey": encode(grey, "JPEG"),
        "1 bit": encode(grey.convert("1"), "PNG"),
        "1 bit TIFF": encode(grey.convert("1"), "TIFF", compression="group4"),
        "CMYK JPEG": encode(picture.convert("CMYK"), "JPEG"),
        "CMYK TIFF turned right": encode(picture.convert("CMYK"), "TIFF", 6),
        "Lab TIFF": encode(lab, "TIFF"),
        "with a profile": encode(picture, "PNG", icc_profile=profile),
        "BMP": encode(picture, "BMP"),
        "JPEG 2000": encode(picture, "JPEG2000"),
    }
    if HAS_AVIF:
        files["AVIF turned right"] = encode(picture, "AVIF", 6)
    return files
