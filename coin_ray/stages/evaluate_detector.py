"""Evaluate a trained detector on the labelled images it has not seen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from coin_ray import storage, tables
from coin_ray.config.detector_training import DetectorConfig
from coin_ray.data.canonical import decode_rgb
from coin_ray.evaluation.coco import coco_average_precision
from coin_ray.evaluation.voc import average_precision
from coin_ray.models.co_detr.collaborative import DECODER
from coin_ray.predictors.co_detr import FILE, CoDetrPredictor, load_co_detr
from coin_ray.predictors.transformers_folder import (
    FOLDER,
    FastPredictor,
    load_fast_predictor,
)
from coin_ray.runs.steps import Context
from coin_ray.stages.common.cluster import threads
from coin_ray.stages.common.labelled_images import Labelled, labelled
from coin_ray.stages.common.progress import bar
from coin_ray.structures import Detections
from coin_ray.tables import Provenance, detections_row


def run(context: Context) -> dict[str, Any]:
    """Write ``predictions/SPLIT.parquet`` of val and test; the metrics hold VOC and
    COCO AP in 0..1, also by class.

    Where auxiliary heads were shipped, also of each head's own detections, and of the
    decoder's with the confidences that all share.
    """
    config: DetectorConfig = context.options["detector"]
    torch.set_num_threads(threads())
    predictor = load_predictor(context.inputs["train"], config)
    reported = predictor.reported if isinstance(predictor, CoDetrPredictor) else DECODER
    predictor.to(torch.device("cuda" if config.fit.gpu else "cpu"))
    metrics: dict[str, Any] = {}
    for split in ("val", "test"):
        images = labelled(context.inputs["images"], split)
        if images.rows:
            found = predictions(predictor, images, config.evaluate_batch)
            rows = [
                detections_row(i, d, Provenance(config.model))
                for i, d in found[reported].items()
            ]
            storage.write_table(
                storage.join(context.folder, "predictions", f"{split}.parquet"),
                tables.detections_table(rows),
            )
            by_head = {
                name: measure(own, images, config.classes)
                for name, own in found.items()
            }
            metrics[split] = by_head[reported] | (
                {"heads": by_head} if len(by_head) > 1 else {}
            )
    return metrics


def load_predictor(
    folder: str, config: DetectorConfig
) -> CoDetrPredictor | FastPredictor:
    """What was trained into ``folder``."""
    if config.model == "co-detr":
        return load_co_detr(storage.join(folder, FILE))
    return load_fast_predictor(
        storage.join(folder, FOLDER), config.model, config.co_detr.detections
    )


def predictions(
    predictor: CoDetrPredictor | FastPredictor, images: Labelled, batch: int
) -> dict[str, dict[str, Detections]]:
    """By head and image id; where no auxiliary heads were shipped, the decoder's alone."""
    found: dict[str, dict[str, Detections]] = {}
    with bar("evaluate", len(images.rows)) as shown:
        for start in range(0, len(images.rows), batch):
            chunk = images.rows[start : start + batch]
            originals = [
                pil_to_tensor(decode_rgb(storage.read_bytes(row["uri"])))
                for row in chunk
            ]
            for name, own in _opinions(predictor, originals).items():
                found.setdefault(name, {}).update(
                    {str(row["image_id"]): d for row, d in zip(chunk, own, strict=True)}
                )
            shown.update(start + len(chunk))
    return found


def _opinions(
    predictor: CoDetrPredictor | FastPredictor, originals: Sequence[Tensor]
) -> dict[str, list[Detections]]:
    if isinstance(predictor, CoDetrPredictor) and predictor.whole is not None:
        return predictor.opinions(originals)
    return {DECODER: predictor.many(originals)}


def measure(
    found: dict[str, Detections], images: Labelled, classes: tuple[str, ...]
) -> dict[str, Any]:
    """AP50 as VOC and as COCO measure it, and COCO's mean over IoU .5 to .95."""
    voc = average_precision(found, images.truth, len(classes))
    coco = coco_average_precision(found, images.truth, len(classes))
    return {
        "images": len(images.rows),
        "voc_ap50": _rounded(voc.map),
        "coco_ap50": _rounded(coco.map50),
        "coco_ap": _rounded(coco.map),
        "voc_ap50_by_class": {
            name: _rounded(float(ap)) for name, ap in zip(classes, voc.ap, strict=True)
        },
    }


def _rounded(value: float) -> float | None:
    return None if value != value else round(value, 4)
