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


def batch(student: RegionalDetr) -> Images:
    draw = torch.Generator().manual_seed(0)
    return student.prepare(
        [
            torch.randint(0, 255, (3, *size), dtype=torch.uint8, generator=draw)
            for size in ((64, 96), (60, 64))
        ]
    )


def described(student: RegionalDetr, boxes: list[Tensor]) -> Tensor:
    shared, _ = student.propose(batch(student))
    return student.describe(shared, boxes).logits


def test_any_box_is_described_as_the_clip_detector_does() -> None:
    student = tiny_co_detr()
    shared, proposed = student.propose(batch(student))
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
    assert all(0 < len(own) <= 24 for own in proposed.boxes)
    for own, (height, width) in zip(proposed.boxes, batch(student).sizes, strict=True):
        assert float(own.min()) >= 0
        assert float(own[:, 2].max()) <= width
        assert float(own[:, 3].max()) <= height


def test_a_description_depends_on_its_own_box_and_image_alone() -> None:
    student = tiny_co_detr().eval()
    both = described(student, BOXES)
    torch.testing.assert_close(
        described(student, [BOXES[0][1:], BOXES[0]])[:1], both[1:]
    )
    assert not torch.allclose(described(student, [BOXES[1], BOXES[0]]), both)


@pytest.mark.parametrize("background", ["learned", "prompt"])
def test_the_background_may_be_learned_beside_the_prompts(background: str) -> None:
    student = tiny_co_detr(background=background)
    assert student.background.requires_grad == (background == "learned")
    with torch.no_grad():
        student.background.add_(0.3)
    ours, prompts = student.class_embeddings(), student.base.class_embeddings()
    assert torch.equal(ours[:-1], prompts[:-1])
    assert torch.equal(ours[-1], prompts[-1]) == (background == "prompt")


def test_a_student_takes_tower_prompts_and_background_of_the_clip_detector() -> None:
    detector = tiny_detector(seed=3)
    with torch.no_grad():
        for parameter in detector.parameters():
            parameter.add_(0.01)
    student = load_clip_detector_weights(tiny_co_detr(), detector.state_dict())
    images = batch(student)
    torch.testing.assert_close(
        student.base.backbone(images.pixels)[1], detector.tower.shared(images.pixels)
    )
    torch.testing.assert_close(student.class_embeddings(), detector.class_embeddings())


def test_the_base_alone_predicts_what_the_student_does() -> None:
    student = tiny_co_detr(seed=1).eval()
    alone = tiny_co_detr(seed=2).base.eval()
    alone.load_state_dict(base_state_dict(student.state_dict()))
    for ours, theirs in zip(
        student.predict(batch(student)), alone.predict(batch(student)), strict=True
    ):
        assert len(ours) > 0
        assert torch.equal(ours.boxes, theirs.boxes)
        assert torch.equal(ours.probs, theirs.probs)


def test_rois_are_sampled_as_the_network_says_and_seen_as_the_detector_does() -> None:
    network = tiny_network(rpn_samples=7, roi_samples=9, roi_positive=0.25)
    own = with_network_sampling(tiny_config(temperature=0.2), network)
    assert (
        own.rpn_batch,
        own.roi_batch,
        own.roi_positive,
        own.temperature,
        own.box_loss,
    ) == (7, 9, 0.25, 0.2, "giou")


def test_no_box_at_all_makes_no_query() -> None:
    student = tiny_co_detr()
    shared, _ = student.propose(batch(student))
    made = student.region_queries(shared, [BOXES[1], BOXES[1]])
    assert made is not None
    assert made[0].content.shape == (2, 0, student.base.config.width)
    assert made[1].shape == (2, 0)
