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
from coin_ray.stages.common.training_job import save_weights
from coin_ray.stages.propagate import WEIGHTS
from coin_ray.stages.reporting.ckg_probabilities import (
    CKG_FILE,
    predict_ckg_probabilities,
    combine_fusion_modules,
)
from tests.builders import detections

CONFIG = demo()
BOXES = (
    ((10, 10, 60, 60), 0, 0.9),
    ((40, 20, 90, 80), 1, 0.8),
    ((5, 5, 20, 20), 2, 0.01),
)


def test_the_kept_fusion_speaks_of_the_clouds_boxes_above_the_threshold(
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
    images: list[dict[str, object]] = [
        {"image_id": "a", "uri": str(tmp_path / "a.png")},
        {"image_id": "not asked", "uri": ""},
    ]
    assert predict_ckg_probabilities(context, images, answers) == {}  # a run that kept no fusion

    save_weights(
        str(tmp_path / CKG_FILE),
        combine_fusion_modules(
            ckg, Prototypes(embeddings), Prototypes(embeddings)
        ).state_dict(),
    )
    found = predict_ckg_probabilities(context, images, answers)
    assert set(found) == {"a"}
    assert found["a"].shape == (2, len(CONFIG.classes) + 1)
    torch.testing.assert_close(found["a"].sum(1), torch.ones(2))
    other = replace(CONFIG, distill=replace(CONFIG.distill, fusion="average"))
    assert predict_ckg_probabilities(replace(context, config=other), images, answers) == {}
