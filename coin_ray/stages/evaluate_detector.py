"""Evaluate a trained detector on the labelled images it has not seen."""

from __future__ import annotations

from typing import Any

import torch
from torchvision.transforms.functional import pil_to_tensor

from coin_ray import storage, tables
from coin_ray.data.canonical import decode_rgb
from coin_ray.detectors.config import DetectorConfig
from coin_ray.evaluation.coco import coco_average_precision
from coin_ray.evaluation.voc import average_precision
from coin_ray.serving.co_detr import FILE, CoDetrPredictor, load_co_detr
from coin_ray.stages.cluster import threads
from coin_ray.stages.labelled import Labelled, labelled
from coin_ray.stages.progress import bar
from coin_ray.steps import Context
from coin_ray.structures import Detections
from coin_ray.tables import Provenance, detections_row


def run(context: Context) -> dict[str, Any]:
    """Write ``predictions/SPLIT.parquet`` of val and test; the metrics hold VOC and COCO AP in 0..1, also by class."""
    config: DetectorConfig = context.options["detector"]
    torch.set_num_threads(threads())
    predictor = load_co_detr(storage.join(context.inputs["train"], FILE))
    predictor.detector.to(torch.device("cuda" if config.fit.gpu else "cpu"))
    metrics: dict[str, Any] = {}
    for split in ("val", "test"):
        images = labelled(context.inputs["images"], split)
        if images.rows:
            found = predictions(predictor, images, config.evaluate_batch)
            rows = [detections_row(i, d, Provenance("co-detr")) for i, d in found.items()]
            storage.write_table(storage.join(context.folder, "predictions", f"{split}.parquet"), tables.detections_table(rows))
            metrics[split] = measure(found, images, config.classes)
    return metrics


def predictions(predictor: CoDetrPredictor, images: Labelled, batch: int) -> dict[str, Detections]:
    found: dict[str, Detections] = {}
    with bar("evaluate", len(images.rows)) as shown:
        for start in range(0, len(images.rows), batch):
            chunk = images.rows[start : start + batch]
            originals = [pil_to_tensor(decode_rgb(storage.read_bytes(row["uri"]))) for row in chunk]
            found |= {str(row["image_id"]): d for row, d in zip(chunk, predictor.many(originals), strict=True)}
            shown.update(len(found))
    return found


def measure(found: dict[str, Detections], images: Labelled, classes: tuple[str, ...]) -> dict[str, Any]:
    """AP50 as VOC and as COCO measure it, and COCO's mean over IoU .5 to .95."""
    voc = average_precision(found, images.truth, len(classes))
    coco = coco_average_precision(found, images.truth, len(classes))
    return {
        "images": len(images.rows),
        "voc_ap50": _rounded(voc.map),
        "coco_ap50": _rounded(coco.map50),
        "coco_ap": _rounded(coco.map),
        "voc_ap50_by_class": {name: _rounded(float(ap)) for name, ap in zip(classes, voc.ap, strict=True)},
    }


def _rounded(value: float) -> float | None:
    return None if value != value else round(value, 4)
