"""Evaluate a trained detector on the labelled images it has not seen."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from coin_ray import storage, tables
from coin_ray.config.detector_training import DetectorConfig
from coin_ray.data.pixels import IntensityRange
from coin_ray.evaluation.coco import coco_average_precision
from coin_ray.evaluation.voc import average_precision
from coin_ray.models.co_detr.collaborative import DECODER
from coin_ray.predictors.co_detr import CO_DETR_FILE, CoDetrPredictor, load_co_detr
from coin_ray.predictors.transformers_folder import (
    TRANSFORMERS_FOLDER,
    TransformersPredictor,
    load_transformers_predictor,
)
from coin_ray.runs.steps import Context, Metrics
from coin_ray.stages.common.cluster import count_torch_threads
from coin_ray.stages.common.labelled_images import AnnotatedImages, read_labelled_images
from coin_ray.stages.common.prediction import read_image
from coin_ray.stages.common.progress import show_progress
from coin_ray.structures import Detections
from coin_ray.tables import Provenance, detections_row

Predictor = CoDetrPredictor | TransformersPredictor


def run(context: Context[DetectorConfig]) -> Metrics:
    """Write ``predictions/SPLIT.parquet`` of val and test; the metrics hold VOC and
    COCO AP in 0..1, also by class.

    A detector with auxiliary heads is also measured by each head's own detections, and
    by the decoder's with the confidences that all share.
    """
    config = context.config
    torch.set_num_threads(count_torch_threads())
    predictor = load_predictor(context.inputs["train"], config)
    reported_head = DECODER
    if isinstance(predictor, CoDetrPredictor):
        reported_head = predictor.reported
    predictor.to(torch.device("cuda" if config.fit.gpu else "cpu"))
    metrics: Metrics = {}
    for split in ("val", "test"):
        images = read_labelled_images(context.inputs["images"], split)
        if not images.rows:
            continue
        predictions = predict_labelled_images(
            predictor, images, config.evaluate_batch, config.found_intensity_range
        )
        uri = storage.join(context.folder, "predictions", f"{split}.parquet")
        _write_predictions(uri, predictions[reported_head], config.model)
        by_head = {
            head: measure(by_image, images, config.classes)
            for head, by_image in predictions.items()
        }
        metrics[split] = by_head[reported_head]
        if len(by_head) > 1:
            metrics[split] = by_head[reported_head] | {"heads": by_head}
    return metrics


def _write_predictions(uri: str, by_image: dict[str, Detections], model: str) -> None:
    rows = [
        detections_row(image_id, detections, Provenance(model))
        for image_id, detections in by_image.items()
    ]
    storage.write_table(uri, tables.detections_table(rows))


def load_predictor(folder: str, config: DetectorConfig) -> Predictor:
    """Return the detector that was trained into ``folder``."""
    if config.model == "co-detr":
        return load_co_detr(storage.join(folder, CO_DETR_FILE))
    return load_transformers_predictor(
        storage.join(folder, TRANSFORMERS_FOLDER),
        config.model,
        config.co_detr.detections,
    )


def predict_labelled_images(
    predictor: Predictor,
    images: AnnotatedImages,
    batch_size: int,
    intensity_range: IntensityRange | None = None,
) -> dict[str, dict[str, Detections]]:
    """Return detections by head and image id; a detector without auxiliary heads has
    the decoder's alone. ``intensity_range``: of deep grey images.
    """
    predictions: dict[str, dict[str, Detections]] = {}
    with show_progress("evaluate", len(images.rows)) as progress:
        for start in range(0, len(images.rows), batch_size):
            batch = images.rows[start : start + batch_size]
            originals = [read_image(row["uri"], intensity_range) for row in batch]
            for head, detections in _predict_by_head(predictor, originals).items():
                by_image = predictions.setdefault(head, {})
                for row, in_image in zip(batch, detections, strict=True):
                    by_image[row["image_id"]] = in_image
            progress.update(start + len(batch))
    return predictions


def _predict_by_head(
    predictor: Predictor, originals: Sequence[Tensor]
) -> dict[str, list[Detections]]:
    if isinstance(predictor, CoDetrPredictor) and predictor.collaborative is not None:
        return predictor.predict_by_head(originals)
    return {DECODER: predictor.predict_batch(originals)}


def measure(
    by_image: dict[str, Detections], images: AnnotatedImages, classes: tuple[str, ...]
) -> Metrics:
    """Return AP50 as VOC and as COCO measure it, and COCO's mean over IoU .5 to .95."""
    voc = average_precision(by_image, images.truth, len(classes))
    coco = coco_average_precision(by_image, images.truth, len(classes))
    by_class = {
        name: _rounded_or_none(float(ap))
        for name, ap in zip(classes, voc.ap, strict=True)
    }
    return {
        "images": len(images.rows),
        "voc_ap50": _rounded_or_none(voc.map),
        "coco_ap50": _rounded_or_none(coco.map50),
        "coco_ap": _rounded_or_none(coco.map),
        "voc_ap50_by_class": by_class,
    }


def _rounded_or_none(figure: float) -> float | None:
    return None if math.isnan(figure) else round(figure, 4)
