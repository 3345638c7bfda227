"""Measure reading and checking a COCO set against pycocotools' ``COCO(file)``, which
needs no image: CPU seconds and peak memory, each in a process of its own, in turns.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

REPOSITORY = Path(__file__).resolve().parents[2]
OURS, THEIRS = "coin_ray", "pycocotools"
ROUNDS = 3


def write_coco_set(folder: Path, images: int, boxes: int) -> None:
    """Write a label file, and empty files in place of its images."""
    draw = np.random.default_rng(0)
    image_folder = folder / "val2017"
    (folder / "annotations").mkdir(parents=True)
    image_folder.mkdir()
    names = [f"{number:012d}.jpg" for number in range(images)]
    for name in names:
        (image_folder / name).touch()
    corners = draw.uniform(0, 300, (boxes, 2)).round(2).tolist()
    sides = draw.uniform(1, 180, (boxes, 2)).round(2).tolist()
    image_ids = draw.integers(0, images, boxes).tolist()
    category_ids = draw.integers(1, 81, boxes).tolist()
    rows = zip(corners, sides, image_ids, category_ids, strict=True)
    annotations = [
        {
            "id": number,
            "image_id": image_id,
            "category_id": category_id,
            "bbox": [*corner, *side],
            "area": round(side[0] * side[1], 2),
            "iscrowd": 0,
        }
        for number, (corner, side, image_id, category_id) in enumerate(rows)
    ]
    labels = {
        "images": [
            {"id": number, "file_name": name, "width": 640, "height": 480}
            for number, name in enumerate(names)
        ],
        "annotations": annotations,
        "categories": [{"id": n, "name": f"class {n}"} for n in range(1, 81)],
    }
    path = folder / "annotations" / "instances_val2017.json"
    path.write_text(json.dumps(labels))


def read_once(reader: str, folder: Path) -> dict[str, float]:
    """Read the set in this process; imports do not count."""
    if reader == OURS:
        from coin_ray.data.check import label_faults
        from coin_ray.data.formats import read_dataset

        bytes_before, start = peak_bytes(), time.process_time()
        dataset = read_dataset(f"{folder}#val2017")
        records = [record for record in dataset.records if record.annotated]
        faults = list(label_faults(records, [(r.width, r.height) for r in records]))
        count = sum(len(record.labels) for record in records)
        assert not faults
    else:
        from pycocotools.coco import COCO

        bytes_before, start = peak_bytes(), time.process_time()
        coco = COCO(str(folder / "annotations" / "instances_val2017.json"))
        count = len(coco.anns)
    seconds = time.process_time() - start
    return {"seconds": seconds, "bytes": peak_bytes() - bytes_before, "boxes": count}


def peak_bytes() -> int:
    """Return the peak of this process alone: ru_maxrss begins with the parent's."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def measure_coco(folder: Path, images: int, boxes: int) -> dict[str, float]:
    """Return the medians of both readers, and their ratios."""
    write_coco_set(folder, images, boxes)
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    rows: dict[str, list[dict[str, float]]] = {OURS: [], THEIRS: []}
    for round_number in range(ROUNDS):
        for reader in (OURS, THEIRS) if round_number % 2 else (THEIRS, OURS):
            command = [sys.executable, __file__, reader, str(folder)]
            completed = subprocess.run(
                command, capture_output=True, text=True, check=True, env=environment
            )
            rows[reader].append(json.loads(completed.stdout.splitlines()[-1]))
    assert {row["boxes"] for row in rows[OURS] + rows[THEIRS]} == {boxes}
    figures = {
        f"{reader} {name}": float(np.median([row[name] for row in rows[reader]]))
        for reader in rows
        for name in ("seconds", "bytes")
    }
    for name in ("seconds", "bytes"):
        ratio = figures[f"{OURS} {name}"] / figures[f"{THEIRS} {name}"]
        figures[f"ratio of {name}"] = ratio
    return figures


if __name__ == "__main__":
    print(json.dumps(read_once(sys.argv[1], Path(sys.argv[2]))))
