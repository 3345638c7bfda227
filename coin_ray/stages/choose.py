"""Choose: deliver the better of the trained students, judged without labels.

The candidates are COIN's student and the same network on plain cloud labels.
"""

from __future__ import annotations

from collections.abc import Mapping

import pyarrow as pa

from coin_ray import storage, tables
from coin_ray.config import PipelineConfig
from coin_ray.evaluation.candidates import agreed_boxes, agreement_score
from coin_ray.runs.steps import Context, Metrics
from coin_ray.stages.common.image_tables import read_images
from coin_ray.stages.common.prediction import write_predictions
from coin_ray.stages.propagate import WEIGHTS
from coin_ray.tables import Truth

CANDIDATES = {"coin": "distill", "plain": "pseudo_label"}
"""Step that trains each candidate; the first is delivered if both are equally good."""
NAMES = {"coin": "COIN", "plain": "plain cloud labels"}
JUDGED_IMAGES = 500
"""Training images, at most, that candidates are judged on."""


def run(context: Context[PipelineConfig]) -> Metrics:
    """Write ``detector.pt``, the weights of the better candidate. The metrics hold the
    ``winner``, the ``scores``, the number of agreed ``boxes`` and ``images`` that they
    were measured on, and the ``reason`` in words.
    """
    agreed = _open_agreed_boxes(context.inputs["separate"])
    images = select_evenly(read_images(context.inputs["images"], "train"), agreed)
    judged = {image_id: agreed[image_id] for image_id in images["image_id"].to_pylist()}
    scores = _score_candidates(context, images, judged)
    winner = max(scores, key=lambda name: scores[name])
    weights = storage.join(context.inputs[CANDIDATES[winner]], WEIGHTS)
    storage.write_bytes(
        storage.join(context.folder, WEIGHTS), storage.read_bytes(weights)
    )
    boxes = sum(int((~truth.difficult).sum()) for truth in judged.values())
    return {
        "winner": winner,
        "scores": {name: round(score, 4) for name, score in scores.items()},
        "boxes": boxes,
        "images": len(judged),
        "reason": explain_choice(scores, winner, boxes),
    }


def _open_agreed_boxes(separate_folder: str) -> dict[str, Truth]:
    uri = storage.join(separate_folder, "separation.parquet")
    rows = (row for block in storage.stream_table(uri) for row in block.to_pylist())
    return agreed_boxes(rows)


def select_evenly(images: pa.Table, agreed: Mapping[str, Truth]) -> pa.Table:
    """Return at most ``JUDGED_IMAGES`` of the images in ``agreed``, evenly spaced."""
    is_agreed = [image_id in agreed for image_id in images["image_id"].to_pylist()]
    images = images.filter(pa.array(is_agreed, pa.bool_()))
    interval = max(1, -(-len(images) // JUDGED_IMAGES))
    return images.take(pa.array(range(0, len(images), interval), pa.int64()))


def _score_candidates(
    context: Context[PipelineConfig], images: pa.Table, judged: Mapping[str, Truth]
) -> dict[str, float]:
    config = context.config
    if not judged:
        return dict.fromkeys(CANDIDATES, 0.0)
    weights = {
        name: storage.join(context.inputs[step], WEIGHTS)
        for name, step in CANDIDATES.items()
    }
    write_predictions(weights, images, config, context.folder)
    num_classes = len(config.classes)
    scores = {}
    for name in CANDIDATES:
        uri = storage.join(context.folder, f"{name}.parquet")
        detections = tables.open_detections(uri, num_classes)
        scores[name] = agreement_score(detections, judged, num_classes)
    return scores


def explain_choice(scores: Mapping[str, float], winner: str, boxes: int) -> str:
    """Say in a sentence why the winner is delivered."""
    if not boxes:
        return (
            "Nothing to judge by: the teachers agree on no box of the training images,"
            f" so {NAMES[winner]} was kept."
        )
    compared = " and ".join(
        f"{NAMES[name]} {100 * score:.1f}" for name, score in scores.items()
    )
    return (
        f"Delivered: the student of {NAMES[winner]}. On {boxes} boxes of training images"
        f" on which both teachers agree, mAP50 is {compared}. No label was used."
    )
