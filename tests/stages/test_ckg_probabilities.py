from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image

from coin_ray.config.presets import demo
from coin_ray.fusion.ckg import ConsistentKnowledge
from coin_ray.models.faster_rcnn_clip.backbone import load_backbone, starting_embeddings
from coin_ray.models.faster_rcnn_clip.model import build_detector
from coin_ray.models.prototypes import Prototypes
from coin_ray.runs.steps import Context
from coin_ray.stages.common.image_tables import ImageRow
from coin_ray.stages.common.training_job import save_weights
from coin_ray.stages.propagate import WEIGHTS
from coin_ray.stages.reporting.ckg_probabilities import (
    CKG_FILE,
    combine_fusion_modules,
    predict_ckg_probabilities,
)
from tests.builders import detections

CONFIG = demo()
BOXES = (
    ((10, 10, 60, 60), 0, 0.9),
    ((40, 20, 90, 80), 1, 0.8),
    ((5, 5, 20, 20), 2, 0.01),
)


def _image_row(image_id: str, uri: str) -> ImageRow:
    return {
        "image_id": image_id,
        "uri": uri,
        "width": 128,
        "height": 96,
        "split": "test",
    }


def test_the_trained_fusion_predicts_the_clouds_boxes_above_the_threshold(
    tmp_path: Path,
) -> None:
    picture = io.BytesIO()
    Image.new("RGB", (128, 96), "gray").save(picture, "PNG")
    (tmp_path / "a.png").write_bytes(picture.getvalue())
    backbone = load_backbone(CONFIG)
    student = build_detector(backbone, CONFIG.classes, CONFIG.detector, seed=0)
    save_weights(str(tmp_path / WEIGHTS), student.state_dict())
    embeddings = starting_embeddings(backbone, CONFIG)
    ckg = ConsistentKnowledge(
        embeddings.shape[1], len(CONFIG.classes), CONFIG.distill.ckg_heads
    )
    context = Context(
        CONFIG, str(tmp_path), str(tmp_path), {"distill": str(tmp_path)}, {}, "report"
    )
    answers = {
        name: {"a": detections(*BOXES, classes=len(CONFIG.classes))}
        for name in ("cloud", "clip_labels")
    }
    images = [_image_row("a", str(tmp_path / "a.png")), _image_row("not asked", "")]
    assert (
        predict_ckg_probabilities(context, images, answers) == {}
    )  # a run without a trained fusion

    save_weights(
        str(tmp_path / CKG_FILE),
        combine_fusion_modules(
            ckg, Prototypes(embeddings), Prototypes(embeddings)
        ).state_dict(),
    )
    probs = predict_ckg_probabilities(context, images, answers)
    assert set(probs) == {"a"}
    assert probs["a"].shape == (2, len(CONFIG.classes) + 1)
    torch.testing.assert_close(probs["a"].sum(1), torch.ones(2))
    other = replace(CONFIG, distill=replace(CONFIG.distill, fusion="average"))
    assert (
        predict_ckg_probabilities(replace(context, config=other), images, answers) == {}
    )
