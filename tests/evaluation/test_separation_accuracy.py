from __future__ import annotations

from typing import Any

import pytest
import torch

from coin_ray.evaluation.separation_accuracy import separation_accuracy
from coin_ray.tables import Truth

CAR, DOG, NOTHING = [0.8, 0.1, 0.1], [0.1, 0.8, 0.1], [0.1, 0.1, 0.8]
UNSURE = [0.35, 0.05, 0.6]
ON_CAR, ON_DOG, NOWHERE = [0.0, 0, 20, 20], [40.0, 40, 60, 60], [80.0, 0, 99, 20]


def _truth() -> dict[str, Truth]:
    return {
        "a": Truth(
            torch.tensor([ON_CAR, ON_DOG]),
            torch.tensor([0, 1]),
            torch.zeros(2, dtype=torch.bool),
        )
    }


def _label(vector: list[float]) -> int:
    """Return the label of the box: the best entry, but UNSURE is a car all
    the same."""
    return 0 if vector == UNSURE else vector.index(max(vector))


def _separation_row(
    *boxes: tuple[str, list[float], list[float], list[float]], image_id: str = "a"
) -> dict[str, Any]:
    kinds, box_edges, cloud, clip = ([b[i] for b in boxes] for i in range(4))
    names = {
        "cloud_labels": [_label(v) for v in cloud],
        "clip_labels": [_label(v) for v in clip],
    }
    return {
        "image_id": image_id,
        "kind": kinds,
        "boxes": box_edges,
        "cloud_probs": cloud,
        "clip_probs": clip,
    } | names


def test_consistent_and_private_boxes_are_right_or_wrong() -> None:
    shares = separation_accuracy(
        [
            _separation_row(
                ("consistent", ON_CAR, CAR, CAR), ("consistent", ON_DOG, CAR, CAR)
            ),
            _separation_row(
                ("private", NOWHERE, DOG, [0.0] * 3),
                ("private", ON_DOG, DOG, [0.0] * 3),
                ("private", NOWHERE, NOTHING, [0.0] * 3),
            ),
        ],
        _truth(),
    )
    assert shares == {
        "consistent": {"right": 0.5},
        "private": {"right": pytest.approx(2 / 3, abs=1e-4)},
    }


def test_each_teacher_is_scored_on_inconsistent_boxes() -> None:
    shares = separation_accuracy(
        [
            _separation_row(
                ("inconsistent", ON_CAR, [0.9, 0.1, 0.0], DOG),
                ("inconsistent", NOWHERE, CAR, [0.05, 0.05, 0.9]),
                ("inconsistent", NOWHERE, CAR, DOG),
                ("inconsistent", ON_DOG, [0.6, 0.4, 0.0], [0.0, 0.5, 0.5]),
            )
        ],
        _truth(),
    )
    # means: car, background, car or dog (not background), dog
    assert shares == {
        "inconsistent": {"cloud": 0.25, "clip": 0.5, "mean": 0.75, "neither": 0.25}
    }


def test_images_without_truth_and_without_boxes_do_not_count() -> None:
    assert (
        separation_accuracy(
            [
                _separation_row(("consistent", ON_CAR, CAR, CAR), image_id="unknown"),
                _separation_row(),
            ],
            _truth(),
        )
        == {}
    )


def test_a_box_on_an_image_without_objects_is_background() -> None:
    nothing = {
        "a": Truth(
            torch.zeros(0, 4),
            torch.zeros(0, dtype=torch.int64),
            torch.zeros(0, dtype=torch.bool),
        )
    }
    shares = separation_accuracy(
        [
            _separation_row(
                ("consistent", ON_CAR, CAR, CAR),
                ("consistent", ON_CAR, NOTHING, NOTHING),
            )
        ],
        nothing,
    )
    assert shares == {"consistent": {"right": 0.5}}


def test_an_unsure_teacher_is_right_when_its_label_is() -> None:
    """The best entry of a vector with a score below a half is often background;
    training teaches the name."""
    shares = separation_accuracy(
        [
            _separation_row(
                ("consistent", ON_CAR, UNSURE, UNSURE),
                ("private", ON_CAR, UNSURE, [0.0] * 3),
                ("inconsistent", ON_CAR, UNSURE, DOG),
            )
        ],
        _truth(),
    )
    assert shares["consistent"] == shares["private"] == {"right": 1.0}
    assert shares["inconsistent"] == {
        "cloud": 1.0,
        "clip": 0.0,
        "mean": 0.0,
        "neither": 0.0,
    }
