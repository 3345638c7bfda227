from __future__ import annotations

import pytest
import torch

from coin_ray.fusion.vectors import CLOUD_VECTOR_FORMS
from coin_ray.structures import Detections

BOXES = torch.tensor([[0.0, 0, 1, 1], [2, 2, 3, 3]])


def _cloud(
    scores: list[float], labels: list[int], probs: list[list[float]]
) -> Detections:
    return Detections(
        BOXES, torch.tensor(scores), torch.tensor(labels), torch.tensor(probs)
    )


SEVERAL = _cloud([0.6, 0.3], [0, 2], [[0.6, 0.15, 0.05, 0.2], [0.05, 0.1, 0.25, 0.6]])


@pytest.mark.parametrize(
    ("form", "scores", "probs"),
    [
        ("collected", [0.6, 0.3], [[0.6, 0.15, 0.05, 0.2], [0.05, 0.1, 0.25, 0.6]]),
        (
            "normalised",
            [0.75, 0.625],
            [[0.75, 0.1875, 0.0625, 0], [0.125, 0.25, 0.625, 0]],
        ),
        ("smoothed", [0.6, 0.3], [[0.6, 0.2, 0.2, 0], [0.35, 0.35, 0.3, 0]]),
        ("one_hot", [1, 1], [[1, 0, 0, 0], [0, 0, 1, 0]]),
    ],
)
def test_forms_by_hand(
    form: str, scores: list[float], probs: list[list[float]]
) -> None:
    converted = CLOUD_VECTOR_FORMS[form](SEVERAL)
    torch.testing.assert_close(
        converted.scores, torch.tensor(scores, dtype=torch.float32)
    )
    torch.testing.assert_close(
        converted.probs, torch.tensor(probs, dtype=torch.float32)
    )
    assert torch.equal(converted.boxes, SEVERAL.boxes)
    assert torch.equal(converted.labels, SEVERAL.labels)


@pytest.mark.parametrize(
    ("form", "scores"),
    [
        ("collected", [0.6, 0.3]),
        ("normalised", [1, 1]),
        ("smoothed", [0.6, 0.3]),
        ("one_hot", [1, 1]),
    ],
)
def test_vectors_of_one_class(form: str, scores: list[float]) -> None:
    """The published conversion of Grounding DINO makes every score 1; as collected, or
    as GLIP, scores keep their order."""
    converted = CLOUD_VECTOR_FORMS[form](
        _cloud([0.6, 0.3], [0, 0], [[0.6, 0.4], [0.3, 0.7]])
    )
    torch.testing.assert_close(
        converted.scores, torch.tensor(scores, dtype=torch.float32)
    )
    torch.testing.assert_close(converted.probs.sum(1), torch.ones(2))
    if form != "collected":
        assert converted.probs.tolist() == [[1, 0], [1, 0]]


@pytest.mark.parametrize("form", sorted(CLOUD_VECTOR_FORMS))
@pytest.mark.parametrize("classes", [1, 3])
def test_images_without_boxes_have_empty_vectors(form: str, classes: int) -> None:
    converted = CLOUD_VECTOR_FORMS[form](Detections.empty(classes))
    assert (len(converted), converted.num_classes) == (0, classes)
