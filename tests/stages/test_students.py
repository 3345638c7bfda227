"""Which network each detector of a run is, and that it comes back from its file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from builders import CLASSES, TEMPLATES, tiny_clip, tiny_config, tiny_network
from PIL import Image
from torchvision.ops import box_iou
from torchvision.transforms.functional import pil_to_tensor

from coin_ray.config import Cloud, DemoScenes, Distill, PipelineConfig
from coin_ray.models.co_detr.regional import DetrWithRegionHead, RegionalDetr
from coin_ray.models.co_detr.text import TextDetr
from coin_ray.models.faster_rcnn_clip.model import ClipDetector
from coin_ray.predictors.student import load_exported_student, write_exported_student
from coin_ray.runs.graph import build_steps
from coin_ray.stages.common.prediction import predict
from coin_ray.stages.common.students import (
    load_trained_detector,
    new_clip_detector,
    new_student,
    select_forward,
    student_from_clip_detector,
)
from coin_ray.stages.common.training_job import save_weights
from coin_ray.training.queries import forward_detr_student
from coin_ray.training.student_outputs import forward_student

PLAIN = PipelineConfig(
    "test", CLASSES, DemoScenes(), Cloud(), clip=TEMPLATES, detector=tiny_config()
)
DETR = replace(PLAIN, distill=Distill(student="co-detr", co_detr=tiny_network()))
CLIP = tiny_clip()


@pytest.mark.parametrize(
    ("config", "kind", "forward"),
    [
        (PLAIN, ClipDetector, forward_student),
        (DETR, RegionalDetr, forward_detr_student),
    ],
)
def test_a_student_is_drawn_from_its_seed_and_runs_as_its_kind_does(
    config: PipelineConfig, kind: type, forward: object
) -> None:
    first, same, other = (new_student(CLIP, config, seed=seed) for seed in (3, 3, 4))
    assert isinstance(first, kind)
    assert select_forward(first) is forward
    weights, same_weights, other_weights = (
        s.head.embed.weight for s in (first, same, other)
    )
    assert torch.equal(weights, same_weights)
    assert not torch.equal(weights, other_weights)


@pytest.mark.parametrize("config", [PLAIN, DETR])
def test_a_student_may_start_from_the_clip_detector(config: PipelineConfig) -> None:
    detector = new_clip_detector(CLIP, config, seed=0)
    with torch.no_grad():
        for parameter in detector.parameters():
            parameter.add_(0.01)
    student = student_from_clip_detector(
        new_student(CLIP, config, seed=1), detector.state_dict()
    )
    assert torch.equal(student.class_embeddings(), detector.class_embeddings())


@pytest.mark.parametrize(
    ("config", "name", "kind"),
    [
        (PLAIN, "student", ClipDetector),
        (DETR, "student", TextDetr),
        (DETR, "oracle", TextDetr),
        (DETR, "clip_detector", ClipDetector),
    ],
)
def test_what_was_trained_is_what_is_evaluated(
    config: PipelineConfig, name: str, kind: type, tmp_path: Path
) -> None:
    trained = (new_clip_detector if name == "clip_detector" else new_student)(
        CLIP, config, seed=5
    ).eval()
    uri = str(tmp_path / "detector.pt")
    save_weights(uri, trained.state_dict())
    loaded = load_trained_detector(name, uri, CLIP, config)
    assert isinstance(loaded, kind)
    images = [torch.randint(0, 255, (3, 90, 120), dtype=torch.uint8)]
    whole = trained if isinstance(trained, ClipDetector) else trained.base
    (from_file,), (from_memory,) = (
        predict(loaded, images, config.detector),
        predict(whole, images, config.detector),
    )
    assert torch.equal(from_file.boxes, from_memory.boxes)
    assert torch.equal(from_file.probs, from_memory.probs)


def test_a_student_may_be_deployed_with_its_auxiliary_head(tmp_path: Path) -> None:
    """It finds boxes that the decoder and the proposals place, one for each object and
    name, and its export finds the same."""
    config = replace(DETR, distill=replace(DETR.distill, co_detr_detects="regions"))
    trained = new_student(CLIP, config, seed=5).eval()
    assert isinstance(trained, RegionalDetr)
    with torch.no_grad():
        trained.background.normal_()
    save_weights(str(tmp_path / "detector.pt"), trained.state_dict())
    loaded = load_trained_detector(
        "student", str(tmp_path / "detector.pt"), CLIP, config
    )
    assert isinstance(loaded, DetrWithRegionHead)
    image = Image.fromarray(
        torch.randint(0, 255, (90, 120, 3), dtype=torch.uint8).numpy()
    )
    write_exported_student(
        loaded, config.classes, str(tmp_path / "export"), config.detector
    )
    (detections,) = predict(loaded, [pil_to_tensor(image)], config.detector)
    exported = load_exported_student(str(tmp_path / "export"))(image)
    assert len(detections) > 0
    for predicted, expected in (
        (detections.boxes, exported.boxes),
        (detections.probs, exported.probs),
        (detections.labels, exported.labels),
    ):
        assert torch.allclose(predicted, expected, atol=1e-5)
    assert torch.equal(
        detections.scores, detections.scores.sort(descending=True).values
    )
    same = (detections.labels[:, None] == detections.labels[None]).triu(1)
    assert (
        float((box_iou(detections.boxes, detections.boxes) * same).max())
        <= config.detector.nms + 1e-6
    )


def test_how_a_student_is_deployed_costs_no_training() -> None:
    decoder, regions = (
        build_steps(replace(DETR, distill=replace(DETR.distill, co_detr_detects=how)))
        for how in ("decoder", "regions")
    )
    changed = {
        name
        for name in decoder
        if decoder[name].fingerprint != regions[name].fingerprint
    }
    assert changed == {"evaluate", "export", "report"}
