"""Tell image files, label files and files to skip from their paths alone."""

from __future__ import annotations

from coin_ray.data.pixels import HAS_AVIF

AVIF_SUFFIXES = (".avif", ".avifs")

IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".mpo"),
    *(".png", ".apng", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".pfm"),
    *(".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx", ".avif"),
)
"""Endings of image files that can be decoded: ``pixels.FORMATS``."""
OTHER_IMAGE_SUFFIXES = (
    *(".heic", ".heif", ".hif", ".jxl", ".jxr", ".svg", ".eps", ".psd"),
    *(".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf", ".pef", ".srw"),
    *(".ico", ".icns", ".tga", ".pcx", ".exr", ".hdr", ".dds", ".sgi", ".xcf"),
    *(".dcm", ".fits", ".seq", ".fff"),
    *(() if HAS_AVIF else AVIF_SUFFIXES),
)
"""Endings of image files that can not be decoded; a run names such files."""
LABEL_SUFFIXES = (".json", ".xml", ".txt", ".yaml", ".yml", ".names", ".data")
"""Endings of files that annotations are read from."""
SKIPPED_FOLDERS = {"@eaDir", "__MACOSX", "#recycle", "$RECYCLE.BIN", "lost+found"}
"""Folders that operating systems and storage devices make: previews and waste."""


def is_hidden(path: str) -> bool:
    """Tell whether a path below a data set is a hidden file, or lies in a hidden folder
    or in one of ``SKIPPED_FOLDERS``.
    """
    parts = path.split("/")
    return any(part.startswith(".") or part in SKIPPED_FOLDERS for part in parts)
