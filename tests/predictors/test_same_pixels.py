"""Every way from a file to a model gives the same pixels, whatever the kind of image."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from coin_ray.config import Detector
from coin_ray.data.canonical import canonical_image, decode_rgb, decode_sent
from coin_ray.data.examples import ImageCache
from coin_ray.data.pixels import IntensityRange, format_range
from coin_ray.predictors.co_detr import CoDetrPredictor
from coin_ray.predictors.mlflow_model import MlflowModel
from coin_ray.predictors.student import StudentPredictor
from coin_ray.serving.server import create_app
from coin_ray.serving.student import PredictorAdapter
from coin_ray.stages.common.prediction import read_image
from coin_ray.structures import Detections
from tests.image_kinds import SIZE, image_files
from tests.serving.helpers import detect_request, post

onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra onnx")

from coin_ray.export.detect import detect
from coin_ray.predictors.onnx_student import OUTPUT_NAMES, OnnxStudent

CLASSES = ("car", "person")
FILES = image_files()
RANGES: dict[str, IntensityRange | None] = {
    "each image's own range": None,
    "the run's range": (20000.0, 30000.0),
}
Pixels = NDArray[np.uint8]
SIDES = Detector(short_side=min(SIZE), long_side=max(SIZE))
EMPTY = Detections(
    torch.zeros(0, 4),
    torch.zeros(0),
    torch.zeros(0, dtype=torch.int64),
    torch.zeros(0, len(CLASSES) + 1),
)


class PixelRecorder:
    """Stands in for a network and keeps the pixels that reach it."""

    def __init__(self) -> None:
        self.pixels: Pixels = np.zeros(0, np.uint8)

    def prepare(self, images: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        self.pixels = images[0].numpy().transpose(1, 2, 0)
        return images

    def predict(self, _: Sequence[torch.Tensor]) -> list[Detections]:
        return [EMPTY]


class RecordingSession:
    """Stands in for onnxruntime's session of an exported student."""

    def __init__(self, intensity_range: IntensityRange | None) -> None:
        self.pixels: Pixels = np.zeros(0, np.uint8)
        metadata = {"classes": "\n".join(CLASSES)}
        if intensity_range is not None:
            metadata["intensity_range"] = format_range(intensity_range)
        self.metadata = metadata

    def get_modelmeta(self) -> Any:
        return SimpleNamespace(custom_metadata_map=self.metadata)

    def get_outputs(self) -> list[Any]:
        return [SimpleNamespace(name=name) for name in OUTPUT_NAMES]

    def run(self, _: object, inputs: dict[str, Pixels]) -> list[NDArray[Any]]:
        (self.pixels,) = inputs["images"]
        boxes, scores, labels, probs = (
            EMPTY.boxes.numpy(),
            EMPTY.scores.numpy(),
            EMPTY.labels.numpy(),
            EMPTY.probs.numpy(),
        )
        return [boxes, scores, labels, labels, probs]


def _opened(file: bytes) -> Image.Image:
    return Image.open(io.BytesIO(file))


def _pixels_by_way(
    file: bytes,
    path: Path,
    intensity_range: IntensityRange | None,
    monkeypatch: pytest.MonkeyPatch,
) -> dict[str, Pixels]:
    """Return the pixels [H, W, 3] that each way gives a model."""
    path.write_bytes(file)
    cache = ImageCache()
    cache.intensity_range = intensity_range
    ways: dict[str, Pixels] = {
        "training": cache[str(path)].numpy().transpose(1, 2, 0),
        "evaluation": read_image(str(path), intensity_range).numpy().transpose(1, 2, 0),
    }
    recorder = PixelRecorder()
    student = StudentPredictor(CLASSES, recorder, SIDES, intensity_range)  # type: ignore[arg-type]
    model = MlflowModel(student)
    with _opened(file) as loaded:
        loaded.load()
        images = {"opened": _opened(file), "loaded": loaded, "copied": loaded.copy()}
    for state, image in images.items():
        student(image)
        ways[f"student, {state} image"] = recorder.pixels
    for kind in (_opened(file), file, str(path)):
        model.predict([kind])
        ways[f"MLflow's model, {type(kind).__name__}"] = recorder.pixels
    adapter = PredictorAdapter(student, "student")
    adapter.detect(_opened(file), CLASSES, 0.1)
    ways["served student"] = recorder.pixels
    (response,) = post(create_app(adapter), detect_request(file, CLASSES))
    assert response.json()["image"] == {"w": SIZE[0], "h": SIZE[1]}
    ways["server"] = recorder.pixels
    co_detr = CoDetrPredictor(
        CLASSES,
        recorder,  # type: ignore[arg-type]
        min(SIZE),
        max(SIZE),
        intensity_range=intensity_range,
    )
    co_detr(_opened(file))
    ways["Co-DETR"] = recorder.pixels
    session = RecordingSession(intensity_range)
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *_, **__: session)
    OnnxStudent(b"")(_opened(file))
    ways["ONNX"] = session.pixels
    detect(session, _opened(file))  # type: ignore[arg-type]
    ways["detect.py"] = session.pixels
    return ways


@pytest.mark.parametrize("range_name", RANGES)
@pytest.mark.parametrize("kind", FILES)
def test_every_way_from_a_file_gives_the_same_pixels(
    kind: str, range_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, intensity_range = FILES[kind], RANGES[range_name]
    expected = np.asarray(decode_rgb(file, intensity_range))
    assert expected.shape == (SIZE[1], SIZE[0], 3)
    ways = _pixels_by_way(file, tmp_path / "image", intensity_range, monkeypatch)
    different = [
        way for way, pixels in ways.items() if not np.array_equal(pixels, expected)
    ]
    assert not different


@pytest.mark.parametrize("range_name", RANGES)
@pytest.mark.parametrize("kind", FILES)
def test_a_cloud_is_sent_these_pixels_but_for_the_loss_of_jpeg(
    kind: str, range_name: str
) -> None:
    file, intensity_range = FILES[kind], RANGES[range_name]
    expected = np.asarray(decode_rgb(file, intensity_range)).astype(int)
    image = canonical_image(file, 4096, intensity_range)
    sent = np.asarray(decode_sent(image)).astype(int)
    assert np.abs(sent - expected).mean() < 4
