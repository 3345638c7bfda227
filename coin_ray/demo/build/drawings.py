"""Rebuild ``assets/drawings.parquet`` from Debian's ``openclipart-png`` (public domain,
CC0).

    apt-get install openclipart-png
    python -m coin_ray.demo.build.drawings --everything build/everything.parquet

The repository ships the drawings of the eight classes and the target's clutter.
``--everything`` writes a second file with all usable drawings, which only the training
of the tiny CLIP reads.
"""

from __future__ import annotations

import argparse
import io
import random
import re
from collections import defaultdict
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, UnidentifiedImageError

from coin_ray.demo.build.openclipart_paths import (
    CLASS_FILES,
    CLUTTER,
    ENGLISH,
    NOT_PICTURES,
    NOT_WORDS,
)
from coin_ray.demo.drawings import ASSETS, CLASSES

ORIGIN = Path("/usr/share/openclipart/png")
LONG_SIDE = 96
SHARES = {"source": 0.45, "target": 0.35, "unseen": 0.20}
KNOWN_SHARES = {"known_to_cloud": 0.50, "known_to_clip": 0.60}
SHIPPED_CLUTTER = 120
OPAQUE = 40
"""Alpha above which a pixel counts as part of the drawing."""
COLUMNS = (
    "name",
    "label",
    "group",
    "share",
    "known_to_cloud",
    "known_to_clip",
    "words",
)


def words_from_name(name: str) -> list[str]:
    """Return English nouns from the file's name and its folder, without authors'
    names.
    """
    folder, file = name.split("/")[-2:]
    file_words = [word.lower() for word in re.split(r"[^A-Za-z]+", file[:-4])]
    file_words = [word for word in file_words if len(word) > 2]
    file_words = [
        ENGLISH.get(word, word) for word in file_words if word not in NOT_WORDS
    ]
    folder_words = [
        word.rstrip("s")
        for word in re.split("[/_]", folder)
        if len(word) > 2 and word not in ("and", "unsorted")
    ]
    return file_words[:2] + folder_words


def group_from_name(name: str) -> str:
    """Return the group of near-duplicates (numbered, black-and-white, outline) of a
    drawing; a group stays in one share.
    """
    stem = name.rsplit("/", 1)[-1][:-4].lower()
    stem = re.sub(r"(_|\b)(bw|contour|outline|colour|color)(?=_|\b)", "", stem)
    return re.sub(r"[^a-z]", "", stem)[:14]


def label_from_name(name: str) -> str | None:
    """Return the class of a drawing by its path; None for clutter."""
    for label, pattern in CLASS_FILES.items():
        if re.match(f"({pattern})", name):
            return label
    return None


def cut_out(name: str) -> Image.Image | None:
    """Crop the drawing to its opaque part; return None if it is too small, too thin,
    too faint or has no transparency.
    """
    try:
        image: Image.Image = Image.open(ORIGIN / name)
    except (UnidentifiedImageError, Image.DecompressionBombError):
        return None
    if image.mode not in ("RGBA", "LA", "P"):
        return None
    image = image.convert("RGBA")
    opaque = np.asarray(image)[..., 3] > OPAQUE
    ys, xs = np.nonzero(opaque)
    if len(ys) < 400 or opaque.all():
        return None
    x1, y1 = int(xs.min()), int(ys.min())
    x2, y2 = int(xs.max()) + 1, int(ys.max()) + 1
    short_side, long_side = sorted((x2 - x1, y2 - y1))
    is_faint = opaque[y1:y2, x1:x2].mean() < 0.12
    if is_faint or long_side / short_side > 4 or short_side < 24:
        return None
    image = image.crop((x1, y1, x2, y2))
    image.thumbnail((LONG_SIDE, LONG_SIDE), Image.Resampling.LANCZOS)
    return image


def usable_drawings() -> list[dict[str, Any]]:
    """Return a row for each usable drawing, without exact duplicates."""
    names = sorted(str(path.relative_to(ORIGIN)) for path in ORIGIN.rglob("*.png"))
    names = [name for name in names if not NOT_PICTURES.search(name)]
    with ProcessPoolExecutor(2) as pool:
        images = list(pool.map(cut_out, names, chunksize=16))
    thumbnails: set[bytes] = set()
    rows = []
    for name, image in zip(names, images, strict=True):
        if image is None:
            continue
        thumbnail = image.resize((24, 24)).tobytes()
        if thumbnail in thumbnails:
            continue
        thumbnails.add(thumbnail)
        rows.append(
            {
                "name": name,
                "label": label_from_name(name),
                "group": group_from_name(name),
                "words": words_from_name(name),
                "image": image,
            }
        )
    return rows


def assign_shares(rows: list[dict[str, Any]]) -> None:
    """Assign whole near-duplicate groups to the shares, class by class, largest group
    first.
    """
    order = random.Random(7)
    for label in (None, *CLASSES):
        groups = defaultdict(list)
        for row in rows:
            if row["label"] == label:
                groups[row["group"]].append(row)
        names = sorted(groups)
        order.shuffle(names)
        names.sort(key=lambda name: -len(groups[name]))
        total = sum(map(len, groups.values()))
        targets = {share: part * total for share, part in SHARES.items()}
        counts = dict.fromkeys(SHARES, 0)
        for name in names:
            deficits = {
                share: (target - counts[share]) / target
                for share, target in targets.items()
            }
            share = max(deficits, key=deficits.__getitem__)
            counts[share] += len(groups[name])
            for row in groups[name]:
                row["share"] = share


def assign_known_drawings(rows: list[dict[str, Any]]) -> None:
    """Mark the target drawings that each teacher is trained on: independent draws of
    whole groups, class by class.
    """
    for row in rows:
        row["known_to_cloud"] = row["known_to_clip"] = row["share"] == "source"
    for seed, (column, fraction) in enumerate(KNOWN_SHARES.items(), start=1):
        for index, label in enumerate((None, *CLASSES)):
            drawings = [
                row
                for row in rows
                if row["share"] == "target" and row["label"] == label
            ]
            groups = sorted({row["group"] for row in drawings})
            random.Random(1000 * seed + index).shuffle(groups)
            known_count = 0
            for group in groups:
                if known_count >= round(fraction * len(drawings)):
                    break
                for row in drawings:
                    if row["group"] == group:
                        row[column] = True
                        known_count += 1


def write_drawings(rows: Iterable[dict[str, Any]], path: Path) -> None:
    """Write the rows as a Parquet file with WebP images."""
    encoded_rows = [
        {column: row[column] for column in COLUMNS} | {"webp": _encode(row["image"])}
        for row in rows
    ]
    table = pa.Table.from_pylist(encoded_rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)
    print(f"{path}: {table.num_rows} drawings, {path.stat().st_size / 1e6:.1f} MB")


def _encode(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=90, method=6)
    return buffer.getvalue()


def shipped_drawings(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Select the class drawings and a sample of the target's and the source's
    clutter.
    """
    clutter = [
        row for row in rows if row["label"] is None and CLUTTER.match(row["name"])
    ]
    target_clutter = [row for row in clutter if row["share"] == "target"]
    source_clutter = [row for row in clutter if row["share"] == "source"]
    draw = random.Random(3)
    return [
        *(row for row in rows if row["label"]),
        *draw.sample(target_clutter, SHIPPED_CLUTTER),
        *draw.sample(source_clutter, SHIPPED_CLUTTER // 2),
    ]


def main() -> None:
    """Write both files and print the number of drawings of each class and share."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--everything", type=Path, required=True)
    everything = parser.parse_args().everything
    rows = usable_drawings()
    assign_shares(rows)
    assign_known_drawings(rows)
    write_drawings(shipped_drawings(rows), ASSETS / "drawings.parquet")
    write_drawings(rows, everything)
    for label in CLASSES:
        shares = [row["share"] for row in rows if row["label"] == label]
        print(label, {share: shares.count(share) for share in SHARES})


if __name__ == "__main__":
    main()
