from __future__ import annotations

import pytest
import torch
from builders import CLASSES, tiny_co_detr, tiny_config, tiny_detector, tiny_network
from torch import Tensor

from coin_ray.models.base import Images
from coin_ray.models.co_detr.collaborative import base_state_dict
from coin_ray.models.co_detr.regional import (
    RegionalDetr,
    load_clip_detector_weights,
    with_network_sampling,
)

BOXES = [torch.tensor([[4.0, 4, 30, 28], [20, 10, 90, 60]]), torch.zeros(0, 4)]


def _prepare_images(student: RegionalDetr) -> Images:
    generator = torch.Generator().manual_seed(0)
    return student.prepare(
        [
            torch.randint(0, 255, (3, *size), dtype=torch.uint8, generator=generator)
            for size in ((64, 96), (60, 64))
        ]
    )


def _region_logits(student: RegionalDetr, boxes: list[Tensor]) -> Tensor:
    shared, _ = student.propose(_prepare_images(student))
    return student.describe(shared, boxes).logits


def test_any_box_is_described_as_the_clip_detector_does() -> None:
    student = tiny_co_detr()
    shared, proposed = student.propose(_prepare_images(student))
    regions = student.describe(shared, BOXES)
    assert regions.logits.shape == (2, len(CLASSES) + 1)
    assert regions.pooled.shape == (2, student.base.config.roi_width)
    torch.testing.assert_close(regions.embedded.norm(dim=1), torch.ones(2))
    torch.testing.assert_close(
        regions.logits,
        regions.embedded @ regions.classes.T / student.config.temperature,
    )
    assert student.describe(shared, [BOXES[1], BOXES[1]]).logits.shape == (
        0,
        len(CLASSES) + 1,
    )
    assert proposed.objectness.shape == (2, len(proposed.anchors))
    assert all(0 < len(image_boxes) <= 24 for image_boxes in proposed.boxes)
    for image_boxes, (height, width) in zip(
        proposed.boxes, _prepare_images(student).sizes, strict=True
    ):
        assert float(image_boxes.min()) >= 0
        assert float(image_boxes[:, 2].max()) <= width
        assert float(image_boxes[:, 3].max()) <= height


def test_a_description_depends_on_its_own_box_and_image_alone() -> None:
    student = tiny_co_detr().eval()
    logits = _region_logits(student, BOXES)
    torch.testing.assert_close(
        _region_logits(student, [BOXES[0][1:], BOXES[0]])[:1], logits[1:]
    )
    assert not torch.allclose(_region_logits(student, [BOXES[1], BOXES[0]]), logits)


@pytest.mark.parametrize("background", ["learned", "prompt"])
def test_the_background_may_be_learned_beside_the_prompts(background: str) -> None:
    student = tiny_co_detr(background=background)
    assert student.background.requires_grad == (background == "learned")
    with torch.no_grad():
        student.background.add_(0.3)
    embeddings, prompts = student.class_embeddings(), student.base.class_embeddings()
    assert torch.equal(embeddings[:-1], prompts[:-1])
    assert torch.equal(embeddings[-1], prompts[-1]) == (background == "prompt")


def test_a_student_takes_tower_prompts_and_background_of_the_clip_detector() -> None:
    detector = tiny_detector(seed=3)
    with torch.no_grad():
        for parameter in detector.parameters():
            parameter.add_(0.01)
    student = load_clip_detector_weights(tiny_co_detr(), detector.state_dict())
    images = _prepare_images(student)
    torch.testing.assert_close(
        student.base.backbone(images.pixels)[1], detector.tower.shared(images.pixels)
    )
    torch.testing.assert_close(student.class_embeddings(), detector.class_embeddings())


def test_the_base_alone_predicts_what_the_student_does() -> None:
    student = tiny_co_detr(seed=1).eval()
    alone = tiny_co_detr(seed=2).base.eval()
    alone.load_state_dict(base_state_dict(student.state_dict()))
    for student_detections, base_detections in zip(
        student.predict(_prepare_images(student)),
        alone.predict(_prepare_images(student)),
        strict=True,
    ):
        assert len(student_detections) > 0
        assert torch.equal(student_detections.boxes, base_detections.boxes)
        assert torch.equal(student_detections.probs, base_detections.probs)


def test_sampling_is_the_networks_and_other_settings_the_detectors() -> None:
    network = tiny_network(rpn_samples=7, roi_samples=9, roi_positive=0.25)
    detector = with_network_sampling(tiny_config(temperature=0.2), network)
    assert (
        detector.rpn_batch,
        detector.roi_batch,
        detector.roi_positive,
        detector.temperature,
        detector.box_loss,
    ) == (7, 9, 0.25, 0.2, "giou")


def test_no_box_at_all_makes_no_query() -> None:
    student = tiny_co_detr()
    shared, _ = student.propose(_prepare_images(student))
    region_queries = student.region_queries(shared, [BOXES[1], BOXES[1]])
    assert region_queries is not None
    assert region_queries[0].content.shape == (2, 0, student.base.config.width)
    assert region_queries[1].shape == (2, 0)
