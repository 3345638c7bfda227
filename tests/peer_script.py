"""Write or read a data set with another library: run by ``tests.peers``, without this
project.

    peer_script.py write|read LIBRARY FORMAT FOLDER [SPLIT ...]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

CLASSES = ["cat", "dog"]
IMAGES = {
    "train": {
        "0.png": [[3, 2, 20, 14, "cat"], [8, 5, 39, 29, "dog"]],
        "1.png": [[1, 1, 12, 9, "dog"]],
        "2.png": [],
    },
    "val": {
        "3.png": [[10, 4, 33, 25, "cat"], [2, 3, 9, 8, "cat"], [12, 11, 18, 28, "dog"]]
    },
}
"""The boxes of images of 40 x 30: no edge is 0, which would tell where VOC's pixels
begin."""
DATUMARO_IMPORTERS = {"coco": "coco", "voc": "voc", "yolo": "yolo"}


def paint(name: str) -> Any:
    """Return the pixels of an image."""
    return np.full((30, 40, 3), 40 * int(Path(name).stem), np.uint8)


def write_datumaro(format: str, folder: str) -> None:
    import datumaro
    from datumaro.components.media import Image

    items = []
    for split, images in IMAGES.items():
        for name, boxes in images.items():
            annotations = [
                datumaro.Bbox(x1, y1, x2 - x1, y2 - y1, label=CLASSES.index(label))
                for x1, y1, x2, y2, label in boxes
            ]
            items.append(
                datumaro.DatasetItem(
                    id=Path(name).stem,
                    subset=split,
                    media=Image.from_numpy(data=paint(name)),
                    annotations=annotations,
                )
            )
    dataset = datumaro.Dataset.from_iterable(items, categories=CLASSES)
    dataset.export(folder, format, save_media=True)


def write_supervision(format: str, folder: str) -> None:
    import supervision

    images, detections = {}, {}
    for name, boxes in (IMAGES["train"] | IMAGES["val"]).items():
        images[name] = paint(name)
        corners = [box[:4] for box in boxes]
        labels = [CLASSES.index(box[4]) for box in boxes]
        detections[name] = supervision.Detections(
            xyxy=np.array(corners, np.float32).reshape(-1, 4),
            class_id=np.array(labels, int),
        )
    dataset = supervision.DetectionDataset(CLASSES, images, detections)
    pixels = f"{folder}/images"
    if format == "coco":
        annotations = f"{folder}/annotations.json"
        dataset.as_coco(images_directory_path=pixels, annotations_path=annotations)
    elif format == "voc":
        dataset.as_pascal_voc(pixels, f"{folder}/annotations")
    else:
        dataset.as_yolo(pixels, f"{folder}/labels", f"{folder}/data.yaml")


def read_datumaro(format: str, folder: str, splits: list[str]) -> dict[str, Any]:
    import datumaro

    dataset = datumaro.Dataset.import_from(folder, DATUMARO_IMPORTERS[format])
    categories = dataset.categories()[datumaro.AnnotationType.label]
    boxes = {}
    for item in dataset:
        boxes[Path(item.id).stem] = [
            [*bbox.points, categories[bbox.label].name]
            for bbox in item.annotations
            if bbox.type == datumaro.AnnotationType.bbox
            and not bbox.attributes.get("is_crowd")
        ]
    return boxes


def read_supervision(format: str, folder: str, splits: list[str]) -> dict[str, Any]:
    import supervision

    readers = {
        "coco": lambda split: supervision.DetectionDataset.from_coco(
            f"{folder}/images/{split}", f"{folder}/annotations/instances_{split}.json"
        ),
        "yolo": lambda split: supervision.DetectionDataset.from_yolo(
            f"{folder}/images/{split}",
            f"{folder}/labels/{split}",
            f"{folder}/data.yaml",
        ),
        "voc": lambda _: supervision.DetectionDataset.from_pascal_voc(
            f"{folder}/JPEGImages", f"{folder}/Annotations"
        ),
    }
    boxes: dict[str, Any] = {}
    for split in splits:
        dataset = readers[format](split)
        for path, detections in dataset.annotations.items():
            is_crowd = detections.data.get("iscrowd", np.zeros(len(detections)))
            boxes[Path(path).stem] = [
                [*map(float, corners), dataset.classes[label]]
                for corners, label, crowd in zip(
                    detections.xyxy, detections.class_id, is_crowd, strict=True
                )
                if not crowd
            ]
    return boxes


def read_pycocotools(format: str, folder: str, splits: list[str]) -> dict[str, Any]:
    from pycocotools.coco import COCO

    boxes: dict[str, Any] = {}
    for split in splits:
        coco = COCO(f"{folder}/annotations/instances_{split}.json")
        for image_id, image in coco.imgs.items():
            rows = coco.loadAnns(coco.getAnnIds(image_id, iscrowd=False))
            boxes[Path(image["file_name"]).stem] = []
            for row in rows:
                left, top, width, height = row["bbox"]
                name = coco.cats[row["category_id"]]["name"]
                box = [left, top, left + width, top + height, name]
                boxes[Path(image["file_name"]).stem].append(box)
    return boxes


if __name__ == "__main__":
    action, library, format, folder, *splits = sys.argv[1:]
    function = globals()[f"{action}_{library}"]
    if action == "write":
        function(format, folder)
        written = IMAGES["train"] | IMAGES["val"]
        print(json.dumps({Path(name).stem: boxes for name, boxes in written.items()}))
    else:
        print(json.dumps(function(format, folder, splits)))
