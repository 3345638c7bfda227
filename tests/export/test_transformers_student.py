"""Export of transformers students: files equal to the model, read back by
``coin_ray.load`` without the hub.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from coin_ray.config.presets import demo, with_student
from coin_ray.export.equality import (
    ExportComparison,
    compare_predictions,
    require_equal,
)
from coin_ray.export.package import (
    ExportMeasurements,
    Int8Images,
    TrainedStudent,
    render_card,
    write_package,
)
from coin_ray.export.student_onnx import student_onnx_model
from coin_ray.models.students.base import InputFormat
from coin_ray.models.students.transformers_student import TransformersStudent
from coin_ray.models.students.transformers_weights import load_transformers_student
from coin_ray.predictors.loading import open_predictor
from coin_ray.predictors.onnx_student import OnnxStudent
from coin_ray.predictors.student import StudentPredictor, write_exported_student
from tests.models.students.tiny_networks import (
    MODEL_TYPES,
    SIDE,
    save_tiny_network,
    tiny_network,
)

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()

CLASSES = ("cat", "traffic light", "stop sign")
INPUT = InputFormat(SIDE, keep_ratio=False, multiple=1, std=(255.0, 255.0, 255.0))


def _make_student(model_type: str, folder: Path) -> TransformersStudent:
    save_tiny_network(folder, model_type, CLASSES)
    student = load_transformers_student(str(folder), CLASSES, seed=0).eval()
    return with_score_min(student)


def with_score_min(student: TransformersStudent) -> TransformersStudent:
    """Let some of the scores be detections, and not all."""
    images = [torch.from_numpy(np.array(i)).permute(2, 0, 1) for i in _make_images()]
    student.post_process = replace(student.post_process, score_min=0.0)
    scores = torch.cat([detections.scores for detections in student.predict(images)])
    score_min = float(scores.quantile(0.3))
    student.post_process = replace(student.post_process, score_min=score_min)
    return student


def _make_images() -> list[Image.Image]:
    draw = np.random.default_rng(3)
    images = []
    for width, height in ((96, 96), (120, 80), (70, 133)):
        pixels = draw.integers(0, 255, (height // 8 + 1, width // 8 + 1, 3), np.uint8)
        images.append(Image.fromarray(pixels).resize((width, height)))
    return images


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_weights_are_read_back_without_the_hub(
    model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = _make_student(model_type, tmp_path / "start")
    write_exported_student(student, CLASSES, str(tmp_path / "export"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    loaded = open_predictor(str(tmp_path / "export"))
    assert loaded.classes == CLASSES
    model = StudentPredictor(CLASSES, student, demo().detector)
    for image in _make_images():
        expected, detections = model(image), loaded(image)
        assert len(detections) == len(expected) > 0
        assert torch.equal(detections.boxes, expected.boxes)
        assert torch.equal(detections.probs, expected.probs)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_the_onnx_file_equals_the_model(model_type: str, tmp_path: Path) -> None:
    student = _make_student(model_type, tmp_path)
    file_bytes = student_onnx_model(student, CLASSES).SerializeToString()
    model = StudentPredictor(CLASSES, student, demo().detector)
    comparison = compare_predictions(
        model, OnnxStudent(file_bytes), _make_images(), student.post_process.score_min
    )
    assert comparison.detections > 10
    require_equal("model.onnx", comparison)
    images = np.stack([np.asarray(i.resize((100, 80))) for i in _make_images()])
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(file_bytes)
    boxes, _, labels, image, _ = session.run(None, {"images": images})
    for number in range(len(images)):
        single = OnnxStudent(file_bytes)(Image.fromarray(images[number]))
        np.testing.assert_allclose(boxes[image == number], single.boxes, atol=1e-2)
        assert labels[image == number].tolist() == single.labels.tolist()


@pytest.mark.slow
def test_the_folder_holds_all_files(tmp_path: Path) -> None:
    student = _make_student("d_fine", tmp_path / "start")
    config = with_student(demo(), "d-fine-n")
    trained = TrainedStudent(student, CLASSES, (), config, {})
    folder = tmp_path / "export"
    int8 = Int8Images(_make_images(), [])
    measured = write_package(trained, _make_images(), str(folder), int8)
    assert measured.int8 is not None
    assert OnnxStudent((folder / "model.int8.onnx").read_bytes()).classes == CLASSES
    assert set(measured.equality) == {"model.onnx", "model.pt"}
    for comparison in measured.equality.values():
        assert comparison.detections > 10
        assert comparison.unmatched == 0
    model = StudentPredictor(CLASSES, student, config.detector)
    onnx_file = open_predictor(str(folder / "model.onnx"))
    score_min = student.post_process.score_min
    comparison = compare_predictions(model, onnx_file, _make_images(), score_min)
    require_equal("model.onnx", comparison)
    card = (folder / "README.md").read_text()
    assert "d-fine-n" in card
    assert all(name in card for name in CLASSES)


def test_the_card_names_a_folder_without_its_path() -> None:
    config = with_student(demo(), "/home/me/weights")
    student = TransformersStudent(tiny_network("lw_detr"), INPUT).eval()
    trained = TrainedStudent(student, CLASSES, (), config, {})
    equal = ExportComparison(3, 10, 0, 0, 1.0, 0.0)
    measured = ExportMeasurements({"model.onnx": equal, "model.pt": equal}, None)
    card = render_card(trained, measured)
    assert "A weights that was pretrained as a detector" in card
    assert "/home/me" not in card
