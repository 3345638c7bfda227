"""Targets from separations, by hand-made cases."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from builders import detections

from coin_ray.config import Separate, TargetSettings
from coin_ray.fusion.rules import average
from coin_ray.fusion.separate import separate_knowledge
from coin_ray.structures import Separation, Targets
from coin_ray.training.separation_targets import (
    foreground_distribution,
    label_targets,
    make_targets,
)

AGREED = (0.0, 0.0, 10.0, 10.0)
DISPUTED = (20.0, 0.0, 30.0, 10.0)
CLOUD_ONLY = (40.0, 0.0, 50.0, 10.0)
CLIP_ONLY = (60.0, 0.0, 70.0, 10.0)


def separate() -> Separation:
    """One box of each kind: agreed (cat), disputed (cat, stop sign), and one of each
    teacher alone.
    """
    cloud = detections((AGREED, 0, 0.2), (DISPUTED, 0, 0.8), (CLOUD_ONLY, 1, 0.1))
    clip = detections((AGREED, 0, 0.1), (DISPUTED, 2, 0.8), (CLIP_ONLY, 2, 0.9))
    return separate_knowledge(
        cloud, clip, Separate(), fuse_boxes=False, generator=torch.Generator()
    )


def targets(**settings: Any) -> Targets:
    return make_targets(separate(), TargetSettings(**settings), average)


def boxes(tensor: torch.Tensor) -> list[tuple[float, ...]]:
    return [tuple(box) for box in tensor.tolist()]


def test_separation_says_whose_a_private_box_is() -> None:
    separation = separate()
    assert boxes(separation.private.boxes) == [CLOUD_ONLY, CLIP_ONLY]
    assert separation.cloud_private == 1
    assert separation.to(torch.device("cpu")).cloud_private == 1
    lone = separate_knowledge(
        detections((AGREED, 0, 0.9)),
        detections(),
        Separate(lone_cloud_consistent=False),
        fuse_boxes=False,
        generator=torch.Generator(),
    )
    assert lone.cloud_private == 1


def test_soft_trust_weighs_by_score() -> None:
    made = targets(pair_score="cloud")
    assert boxes(made.boxes) == [AGREED, DISPUTED, CLOUD_ONLY]
    assert made.weights.tolist() == pytest.approx([0.5, 1.0, 0.25])
    assert made.ignored.shape == (0, 4)


def test_both_teachers_are_surer_than_one() -> None:
    made = targets(pair_score="either")
    # 1 - .8 x .9 = .28, over .4
    assert float(made.weights[0]) == pytest.approx(0.7)
    assert float(made.weights[2]) == pytest.approx(0.25)


def test_classes_are_distributions_over_the_foreground() -> None:
    made = targets()
    torch.testing.assert_close(made.probs.sum(1), torch.ones(3))
    assert (made.probs[:, -1] == 0).all()
    # disputed: the mean of (.8, .067, .067) and (.067, .067, .8), without background
    torch.testing.assert_close(
        made.probs[1], torch.tensor([0.4643, 0.0714, 0.4643, 0.0]), atol=1e-3, rtol=0
    )
    # the cloud alone: its own opinion .1 of (.3, .1, .3)
    torch.testing.assert_close(
        made.probs[2], torch.tensor([3.0, 1.0, 3.0, 0.0]) / 7, atol=1e-3, rtol=0
    )


def test_hard_trust_drops_uncertain_boxes() -> None:
    made = targets(trust="hard", pair_score="cloud")
    assert boxes(made.boxes) == [DISPUTED]
    assert made.weights.tolist() == [1.0]
    assert made.ignored.shape == (0, 4)


def test_uncertain_boxes_may_be_ignored_regions() -> None:
    made = targets(trust="ignore", pair_score="cloud")
    assert boxes(made.boxes) == [DISPUTED]
    assert boxes(made.ignored) == [AGREED, CLOUD_ONLY]


def test_each_kind_is_a_switch() -> None:
    made = targets(inconsistent="ignore", private_cloud="drop", private_clip="learn")
    assert boxes(made.boxes) == [AGREED, CLIP_ONLY]
    assert boxes(made.ignored) == [DISPUTED]
    assert made.weights.tolist()[1] == 1.0


def test_lone_boxes_below_their_threshold_are_background() -> None:
    made = targets(
        private_cloud="ignore",
        private_cloud_score=0.2,
        private_clip="learn",
        private_clip_score=0.95,
    )
    assert boxes(made.boxes) == [AGREED, DISPUTED]
    assert made.ignored.shape == (0, 4)


def test_a_review_is_certain_and_complete() -> None:
    labels = detections((AGREED, 2, 0.05))
    reviewed = Separation.from_labels(labels, reviewed=True)
    made = make_targets(reviewed, TargetSettings(trust="hard"), average)
    assert boxes(made.boxes) == [AGREED]
    assert made.weights.tolist() == [1.0]
    assert made.probs.tolist() == [[0, 0, 1, 0]]


def test_an_empty_image_teaches_background() -> None:
    separation = Separation.from_labels(detections())
    made = make_targets(separation, TargetSettings(), average)
    assert (len(made), made.num_classes, len(made.ignored)) == (0, 3, 0)


def test_plain_labels_are_certain() -> None:
    made = label_targets(detections((AGREED, 1, 0.3), (DISPUTED, 0, 0.9)))
    assert made.weights.tolist() == [1, 1]
    assert made.labels.tolist() == [1, 0]


def test_pure_background_is_every_class_alike() -> None:
    distribution = foreground_distribution(torch.tensor([[0.0, 0.0, 1.0]]))
    assert distribution.tolist() == [[0.5, 0.5, 0.0]]


def test_settings_are_checked() -> None:
    for setting in ("score_min", "certain_score", "private_clip_score"):
        with pytest.raises(ValueError, match=f"distill.targets.{setting}"):
            dataclasses.replace(TargetSettings(), **{setting: 1.5})


def test_disputed_boxes_have_the_names_that_ckg_gives() -> None:
    separation = separate()
    fused = torch.tensor([[0.1, 0.5, 0.2, 0.2]])
    settings = TargetSettings(private_cloud="drop")
    made = make_targets(separation, settings, average, fused)
    assert boxes(made.boxes) == [AGREED, DISPUTED]
    torch.testing.assert_close(made.probs[1], torch.tensor([0.125, 0.625, 0.25, 0.0]))


def test_disputed_boxes_of_which_ckg_is_not_sure_are_ignored() -> None:
    fused = torch.tensor([[0.1, 0.5, 0.2, 0.2]])
    settings = TargetSettings(private_cloud="drop")
    made = make_targets(separate(), settings, average, fused, fused_score_min=0.6)
    assert boxes(made.boxes) == [AGREED]
    assert boxes(made.ignored) == [DISPUTED]
    dropped = TargetSettings(private_cloud="drop", inconsistent="drop")
    made = make_targets(separate(), dropped, average, fused, fused_score_min=0.6)
    assert not len(made.ignored)
