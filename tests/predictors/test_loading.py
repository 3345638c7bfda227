"""``coin_ray.load`` opens every kind of trained detector."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import coin_ray
from coin_ray.errors import InputError
from coin_ray.predictors.co_detr import CO_DETR_FILE, CoDetrPredictor, pack_co_detr
from coin_ray.predictors.mlflow_model import MlflowModel
from coin_ray.predictors.student import StudentPredictor, write_exported_student
from coin_ray.serving import registered
from coin_ray.stages.common.training_job import save_weights
from coin_ray.stages.train_detector import new_co_detr
from tests.builders import CLASSES, tiny_detector
from tests.images import encode, noise_image
from tests.predictors.test_co_detr import CONFIG

IMAGE = noise_image()


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("student")
    write_exported_student(tiny_detector(score_min=0.01), CLASSES, str(folder))
    return folder


@pytest.fixture(scope="module")
def co_detr(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("detector") / CO_DETR_FILE
    save_weights(str(path), pack_co_detr(new_co_detr(CONFIG).eval(), CONFIG))
    return path


@pytest.mark.parametrize("file", ["", "model.json", "model.safetensors"])
def test_a_student_is_opened_by_its_folder_or_a_file(student: Path, file: str) -> None:
    predictor = coin_ray.load(student / file)
    assert isinstance(predictor, StudentPredictor)
    assert predictor.classes == CLASSES
    assert len(predictor(IMAGE)) > 0


def test_a_co_detr_is_opened_by_its_file_or_folder(co_detr: Path) -> None:
    for path in (co_detr, co_detr.parent):
        predictor = coin_ray.load(path)
        assert isinstance(predictor, CoDetrPredictor)
        assert predictor.classes == CLASSES


@pytest.mark.parametrize("name", ["absent", "absent.onnx", "absent/model.json", "."])
def test_anything_else_is_refused_with_what_was_expected(
    tmp_path: Path, name: str
) -> None:
    with pytest.raises(InputError, match=r"expected .*model\.json"):
        coin_ray.load(tmp_path / name)


def test_the_package_imports_nothing_heavy() -> None:
    script = "import sys, coin_ray; coin_ray.load; print('torch' in sys.modules)"
    command = [sys.executable, "-c", script]
    process = subprocess.run(command, capture_output=True, text=True, check=True)
    assert process.stdout == "False\n"


@pytest.mark.parametrize("source", ["image", "bytes", "path"])
def test_models_registered_by_earlier_versions_are_loaded(
    student: Path, tmp_path: Path, source: str
) -> None:
    """Their loader module is coin_ray.serving.registered."""
    model = registered._load_pyfunc(str(student))
    assert isinstance(model, MlflowModel)
    file = tmp_path / "image.png"
    file.write_bytes(encode(IMAGE, "PNG"))
    sources = {"image": IMAGE, "bytes": file.read_bytes(), "path": str(file)}
    (answer,) = model.predict([sources[source]])
    detections = coin_ray.load(student)(IMAGE)
    assert answer["boxes"] == detections.boxes.tolist()
    assert answer["scores"] == detections.scores.tolist()
    assert [CLASSES.index(name) for name in answer["labels"]] == (
        detections.labels.tolist()
    )
