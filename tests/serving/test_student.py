from __future__ import annotations

from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.ops import box_iou

from coin_ray.config import Cloud
from coin_ray.errors import ConfigError, InputError
from coin_ray.predictors.student import write_exported
from coin_ray.serving.batching import BatchDetector
from coin_ray.serving.launch import local_cloud
from coin_ray.serving.local_cloud import create_app, load
from coin_ray.serving.student import DUPLICATE_IOU, StudentDetector, load_student
from tests.builders import CLASSES, tiny_detector
from tests.serving.test_local_cloud import call, jpeg, post


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    place = str(tmp_path_factory.mktemp("runs") / "harbour")
    write_exported(tiny_detector(score_min=0.01), CLASSES, place)
    return place


def picture() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 255, (6, 9, 3), np.uint8)
    return Image.fromarray(pixels).resize((120, 80))


@pytest.mark.parametrize("asked", [CLASSES, ("stop sign", "cat"), ("traffic light",)])
def test_class_vectors_are_the_student_s_probabilities_of_the_asked_classes(
    folder: str, asked: tuple[str, ...]
) -> None:
    student = load_student(folder)
    found = student.predictor(picture())
    boxes, scores = student.detect(picture(), asked, 0.0)
    assert isinstance(student, BatchDetector)
    assert 0 < len(boxes) < len(found), (
        "the case holds a box that carries several classes"
    )
    columns = [CLASSES.index(name) for name in asked]
    for box, row in zip(boxes, scores, strict=True):
        same = np.isclose(found.boxes.numpy(), box, atol=1e-4).all(1)
        assert same.any()
        assert np.allclose(found.probs[same][:, columns].numpy(), row, atol=1e-6)
    assert (np.diff(scores.max(1)) <= 0).all()
    overlaps = box_iou(torch.from_numpy(boxes), torch.from_numpy(boxes)).fill_diagonal_(
        0
    )
    assert float(overlaps.max()) <= DUPLICATE_IOU


def test_only_boxes_above_the_asked_score(folder: str) -> None:
    student = load_student(folder)
    everything = student.detect(picture(), CLASSES, 0.0)[1].max(1)
    limit = float(np.median(everything))
    assert (
        student.detect(picture(), CLASSES, limit)[1].max(1).tolist()
        == everything[everything >= limit].tolist()
    )
    assert student.detect(picture(), CLASSES, 1.01)[0].shape == (0, 4)


def test_unlearned_classes_are_a_400_with_the_learned_ones(folder: str) -> None:
    refused, answered = post(
        create_app(load_student(folder)),
        call(classes=("cat", "zebra")),
        call(classes=("cat",)),
    )
    assert (refused.status_code, answered.status_code) == (400, 200)
    assert (
        refused.json()["detail"]
        == f"harbour has not learned zebra; ask it about {', '.join(CLASSES)}"
    )


@pytest.mark.parametrize("file", ["", "/", "/model.json", "/model.safetensors"])
def test_an_export_is_named_by_its_folder_or_one_of_its_files(
    folder: str, file: str
) -> None:
    student = load("checkpoint", [folder + file])
    assert isinstance(student, StudentDetector)
    assert (student.name, student.classes) == ("harbour", CLASSES)


def test_a_folder_that_is_no_export_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is no export"):
        load_student(str(tmp_path))


@pytest.mark.parametrize("serve", ["transformers", "checkpoint"])
def test_a_model_must_be_named(serve: str) -> None:
    with pytest.raises(ConfigError, match=f"cloud.serve {serve} needs --cloud.model"):
        Cloud(serve=serve)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="needs one model"):
        load(serve, [])  # type: ignore[arg-type]
    assert Cloud(serve=serve, model="here").model == "here"  # type: ignore[arg-type]


def test_a_run_starts_a_server_for_its_checkpoint(folder: str, tmp_path: Path) -> None:
    # neither counts for a real model
    config = Cloud(
        serve="checkpoint", model=folder, serve_latency=30.0, serve_faults=1.0
    )
    with local_cloud(config, str(tmp_path)) as url:
        assert httpx.get(f"{url}/health").json()["classes"] == list(CLASSES)
        response = httpx.post(
            f"{url}/v1/detect", json=call(jpeg(), CLASSES), timeout=20
        )
    assert response.status_code == 200
    assert response.json()["model"] == "harbour"
