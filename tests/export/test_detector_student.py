"""Export of students that were detectors before: files equal to the model, read back by
``coin_ray.load``.
"""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from coin_ray.config.presets import demo, with_student
from coin_ray.errors import InputError
from coin_ray.export.equality import compare_predictions, require_equal
from coin_ray.export.package import Int8Images, TrainedStudent, write_package
from coin_ray.export.student_onnx import student_onnx_model
from coin_ray.export.student_torchscript import student_torchscript
from coin_ray.models.students.base import StudentRendering
from coin_ray.models.students.yolox import YoloxStudent
from coin_ray.predictors.loading import open_predictor
from coin_ray.predictors.onnx_student import OnnxStudent
from coin_ray.predictors.student import StudentPredictor, write_exported_student

CLASSES = ("cat", "traffic light", "stop sign")
SIDE = 96
SCORE_MIN = 0.3


def _make_student(seed: int = 0) -> YoloxStudent:
    """A student with the statistics of random images, whose scores differ by place."""
    torch.manual_seed(seed)
    student = YoloxStudent("yolox-nano", len(CLASSES), SIDE)
    head = student.network.head
    for predictor in (*head.cls_preds, *head.obj_preds, *head.reg_preds):
        nn.init.normal_(predictor.weight, std=0.1)
        nn.init.zeros_(predictor.bias)
    for module in student.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.8, 1.2)
            nn.init.uniform_(module.bias, -0.2, 0.2)
            module.momentum = 1.0
    blocks = torch.rand(16, 3, SIDE // 8, SIDE // 8) * 255
    with torch.no_grad():
        student.train().network(F.interpolate(blocks, SIDE, mode="bicubic"))
    student.post_process = replace(student.post_process, score_min=SCORE_MIN)
    return student.eval()


def _make_images() -> list[Image.Image]:
    draw = np.random.default_rng(3)
    images = []
    for width, height in ((96, 96), (120, 80), (70, 133), (48, 64)):
        pixels = draw.integers(0, 255, (height // 8 + 1, width // 8 + 1, 3), np.uint8)
        images.append(Image.fromarray(pixels).resize((width, height)))
    return images


@pytest.mark.slow
def test_files_equal_the_model_and_are_read_back(tmp_path: Path) -> None:
    student = _make_student()
    config = with_student(demo(), "yolox-nano")
    trained = TrainedStudent(student, CLASSES, (), config, {})
    images = _make_images()
    int8 = Int8Images(images, [])
    measured = write_package(trained, images, str(tmp_path), int8)
    assert set(measured.equality) == {"model.onnx", "model.pt"}
    for comparison in measured.equality.values():
        assert comparison.detections > 20
        assert comparison.unmatched == 0
    assert measured.int8 is not None
    model = StudentPredictor(CLASSES, student, config.detector)
    for path in (tmp_path, tmp_path / "model.onnx"):
        loaded = open_predictor(str(path))
        assert loaded.classes == CLASSES
        require_equal(str(path), compare_predictions(model, loaded, images, SCORE_MIN))
    exact = open_predictor(str(tmp_path))(images[1])
    expected = model(images[1])
    assert torch.equal(exact.boxes, expected.boxes)
    assert torch.equal(exact.probs, expected.probs)
    card = (tmp_path / "README.md").read_text()
    assert "A yolox-nano that was pretrained as a detector for 3 classes" in card
    assert "short side 96" in card


@pytest.mark.slow
@pytest.mark.parametrize("rendering", ["grey", "inverted"])
def test_the_rendering_is_inside(rendering: StudentRendering) -> None:
    student = _make_student()
    student.set_rendering(rendering)
    model = StudentPredictor(CLASSES, student, demo().detector)
    onnx_file = OnnxStudent(student_onnx_model(student, CLASSES).SerializeToString())
    images = _make_images()
    require_equal(
        "model.onnx", compare_predictions(model, onnx_file, images, SCORE_MIN)
    )
    script = student_torchscript(student)
    boxes, *_ = script(torch.from_numpy(np.array(images[1])))
    torch.testing.assert_close(boxes, model(images[1]).boxes, atol=1e-2, rtol=1e-3)


@pytest.mark.slow
def test_a_batch_is_its_images() -> None:
    student = _make_student()
    file_bytes = student_onnx_model(student, CLASSES).SerializeToString()
    session = onnxruntime.InferenceSession(file_bytes)
    images = [image.resize((100, 80)) for image in _make_images()]
    batch = np.stack([np.asarray(image) for image in images])
    boxes, scores, labels, image, probs = session.run(None, {"images": batch})
    assert (np.diff(scores) <= 0).all()
    np.testing.assert_allclose(probs.sum(1), 1, atol=1e-5)
    for number, single in enumerate(images):
        expected = OnnxStudent(file_bytes)(single)
        rows = image == number
        np.testing.assert_allclose(boxes[rows], expected.boxes, atol=1e-3)
        assert labels[rows].tolist() == expected.labels.tolist()


def test_the_script_runs_on_any_size() -> None:
    buffer = io.BytesIO()
    torch.jit.save(student_torchscript(_make_student()), buffer)
    buffer.seek(0)
    script = torch.jit.load(buffer)
    for height, width in ((40, 90), (200, 64)):
        boxes, *_ = script(torch.zeros(height, width, 3, dtype=torch.uint8))
        assert (boxes[:, 2] <= width).all()
        assert (boxes[:, 3] <= height).all()


def test_exported_weights_of_another_network_are_named(tmp_path: Path) -> None:
    write_exported_student(_make_student(), CLASSES, str(tmp_path))
    settings = (tmp_path / "model.json").read_text()
    (tmp_path / "model.json").write_text(settings.replace("yolox-nano", "yolox-tiny"))
    with pytest.raises(InputError, match="do not belong together"):
        open_predictor(str(tmp_path))
