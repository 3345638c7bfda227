from __future__ import annotations

from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from torchvision.ops import box_iou

from coin_ray.config import Cloud
from coin_ray.errors import ConfigError, InputError
from coin_ray.predictors.scored_boxes import DUPLICATE_IOU
from coin_ray.serving.detectors import BatchDetector
from coin_ray.serving.launch import local_cloud
from coin_ray.serving.local_cloud import load_served_detector
from coin_ray.serving.server import create_app
from coin_ray.serving.student import PredictorAdapter, load_served_predictor
from tests.builders import CLASSES
from tests.images import jpeg, noise_image
from tests.serving.helpers import detect_request, post

IMAGE = noise_image()


@pytest.mark.parametrize(
    "requested", [CLASSES, ("stop sign", "cat"), ("traffic light",)]
)
def test_class_vectors_are_the_student_s_probabilities_of_the_requested_classes(
    student_folder: str, requested: tuple[str, ...]
) -> None:
    student = load_served_predictor(student_folder)
    detections = student.predictor(IMAGE)
    boxes, scores = student.detect(IMAGE, requested, 0.0)
    assert isinstance(student, BatchDetector)
    assert 0 < len(boxes) < len(detections), (
        "the case contains a box that has several classes"
    )
    columns = [CLASSES.index(name) for name in requested]
    for box, row in zip(boxes, scores, strict=True):
        same = np.isclose(detections.boxes.numpy(), box, atol=1e-4).all(1)
        assert same.any()
        expected = detections.probs[same][:, columns].numpy()
        assert np.allclose(expected, row, atol=1e-6)
    assert (np.diff(scores.max(1)) <= 0).all()
    box_tensor = torch.from_numpy(boxes)
    overlaps = box_iou(box_tensor, box_tensor).fill_diagonal_(0)
    assert float(overlaps.max()) <= DUPLICATE_IOU


def test_only_boxes_above_the_requested_score(student_folder: str) -> None:
    student = load_served_predictor(student_folder)
    scores = student.detect(IMAGE, CLASSES, 0.0)[1].max(1)
    threshold = float(np.median(scores))
    above = student.detect(IMAGE, CLASSES, threshold)[1].max(1)
    assert above.tolist() == scores[scores >= threshold].tolist()
    assert student.detect(IMAGE, CLASSES, 1.01)[0].shape == (0, 4)


def test_unlearned_classes_are_a_400_with_the_learned_ones(student_folder: str) -> None:
    refused, answered = post(
        create_app(load_served_predictor(student_folder)),
        detect_request(classes=("cat", "zebra")),
        detect_request(classes=("cat",)),
    )
    assert (refused.status_code, answered.status_code) == (400, 200)
    learned = ", ".join(CLASSES)
    expected = f"harbour has not learned zebra; ask it about {learned}"
    assert refused.json()["detail"] == expected


@pytest.mark.parametrize("file", ["", "/", "/model.json", "/model.safetensors"])
def test_a_student_is_named_after_its_folder(student_folder: str, file: str) -> None:
    student = load_served_detector("checkpoint", [student_folder + file])
    assert isinstance(student, PredictorAdapter)
    assert (student.name, student.classes) == ("harbour", CLASSES)


def test_a_folder_that_is_no_export_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is no trained detector"):
        load_served_predictor(str(tmp_path))


@pytest.mark.parametrize("serve", ["transformers", "checkpoint"])
def test_a_model_must_be_named(serve: str) -> None:
    with pytest.raises(ConfigError, match=f"cloud.serve {serve} needs --cloud.model"):
        Cloud(serve=serve)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="needs one model"):
        load_served_detector(serve, [])  # type: ignore[arg-type]
    assert Cloud(serve=serve, model="here").model == "here"  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_run_starts_a_server_for_its_checkpoint(
    student_folder: str, tmp_path: Path
) -> None:
    # latency and faults are not emulated for a real model
    config = Cloud(
        serve="checkpoint", model=student_folder, serve_latency=30.0, serve_faults=1.0
    )
    with local_cloud(config, str(tmp_path)) as url:
        assert httpx.get(f"{url}/health").json()["classes"] == list(CLASSES)
        body = detect_request(jpeg(), CLASSES)
        response = httpx.post(f"{url}/v1/detect", json=body, timeout=20)
    assert response.status_code == 200
    assert response.json()["model"] == "harbour"
