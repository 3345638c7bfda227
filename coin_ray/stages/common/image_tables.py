"""Reads the tables of the images step: its images and their annotations."""

from __future__ import annotations

from typing import TypedDict

import pyarrow as pa
import pyarrow.compute as pc

from coin_ray import storage
from coin_ray.tables import TruthTable


class ImageRow(TypedDict):
    """One row of ``tables.IMAGES``."""

    image_id: str
    uri: str
    width: int
    height: int
    split: str


def read_images(images_folder: str, split: str) -> pa.Table:
    """Return the images of one split as a table of ``tables.IMAGES``."""
    images = storage.read_table(storage.join(images_folder, "images.parquet"))
    return images.filter(pc.equal(images["split"], split))


def read_image_rows(images_folder: str, split: str) -> list[ImageRow]:
    """Return the images of one split as rows; meant for splits that are small."""
    rows: list[ImageRow] = read_images(images_folder, split).to_pylist()
    return rows


def open_annotations(images_folder: str, name: str = "annotations") -> TruthTable:
    """Open the annotations of all images, or ``unknown``, the demo's further table."""
    return TruthTable(storage.join(images_folder, f"{name}.parquet"))
