"""Images that tests detect in."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
from PIL import Image


def noise_image(
    width: int = 120, height: int = 80, seed: int = 0, patch: int = 12
) -> Image.Image:
    """Return random colours in patches of about ``patch`` pixels."""
    shape = (max(1, height // patch), max(1, width // patch), 3)
    pixels = np.random.default_rng(seed).integers(0, 255, shape, np.uint8)
    return Image.fromarray(pixels).resize((width, height))


def jpeg(grey: int = 200, size: tuple[int, int] = (40, 20)) -> bytes:
    """Return a JPEG file of one grey level."""
    return encode(Image.new("RGB", size, (grey,) * 3), "JPEG")


def encode(image: Image.Image, file_format: str) -> bytes:
    file = io.BytesIO()
    image.save(file, file_format)
    return file.getvalue()


def png_bomb(side: int) -> bytes:
    """Return a valid PNG of side x side black pixels in a few kilobytes."""
    compressor = zlib.compressobj(9)
    row = bytes(side // 8 + 1)
    rows = b"".join(compressor.compress(row) for _ in range(side)) + compressor.flush()
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    chunks = [_chunk(b"IHDR", header), _chunk(b"IDAT", rows), _chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def _chunk(kind: bytes, content: bytes) -> bytes:
    checksum = struct.pack(">I", zlib.crc32(kind + content))
    return struct.pack(">I", len(content)) + kind + content + checksum
