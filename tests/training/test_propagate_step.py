from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from builders import examples, propagation, tiny_config, tiny_fit

from coin_ray.data.examples import iterate_batches
from coin_ray.structures import Separation
from coin_ray.training.student_outputs import common_size, forward_student


def test_soft_labels_teach_probabilities(tmp_path: Path) -> None:
    """RoIs on a box learn its class vector, with its background share; the others learn
    background."""
    fit = tiny_fit(steps=1)
    task = propagation(fit, soft_labels=True)
    (batch,) = iterate_batches(
        examples(tmp_path), fit, tiny_config(), seed=2, first=0, rank=0, workers=1
    )
    labels = [
        Separation.from_labels(image_labels)
        for image_labels in batch.detections["labels"]
    ]
    outputs = forward_student(
        task.detector, batch.strong, common_size(batch.strong), labels, batch.generators
    )
    targets = task.soft_targets(outputs)
    boxes = len(outputs.consistent_rows)
    torch.testing.assert_close(targets.sum(1), torch.ones(len(outputs.labelled_rows)))
    torch.testing.assert_close(targets[:boxes], outputs.consistent.clip.probs)
    assert bool((targets[boxes:, -1] == 1).all())


def test_soft_and_hard_labels_differ_only_in_the_class_loss(tmp_path: Path) -> None:
    fit = tiny_fit(steps=1)
    losses = []
    for soft_labels in (False, True):
        (batch,) = iterate_batches(
            examples(tmp_path), fit, tiny_config(), seed=2, first=0, rank=0, workers=1
        )
        torch.manual_seed(0)
        losses.append(
            {
                n: float(v.detach())
                for n, v in (
                    propagation(fit, soft_labels=soft_labels)
                    .train_step(batch, 0)
                    .items()
                )
            }
        )
    hard, soft_parts = losses
    assert hard.pop("consistent") != pytest.approx(soft_parts.pop("consistent"))
    assert hard == pytest.approx(soft_parts)


@pytest.mark.parametrize(("views", "images"), [("strong", 2), ("both", 4)])
def test_weak_images_are_trained_with_the_same_labels(
    views: str, images: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[int, list[list[float]]]] = []

    def recorded_forward(
        student: Any, pixels: Any, size: Any, separations: Any, generators: Any
    ) -> Any:
        calls.append(
            (len(pixels), [s.consistent.cloud.scores.tolist() for s in separations])
        )
        return forward_student(student, pixels, size, separations, generators)

    fit = tiny_fit(steps=1)
    (batch,) = iterate_batches(
        examples(tmp_path), fit, tiny_config(), seed=2, first=0, rank=0, workers=1
    )
    task = propagation(fit, views=views)
    monkeypatch.setattr(task, "forward_student", recorded_forward)
    task.train_step(batch, 0)
    ((count, labels),) = calls
    assert count == images
    assert (
        labels[:2]
        == labels[-2:]
        == [d.scores.tolist() for d in batch.detections["labels"]]
    )
