from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from coin_ray.config.detector_presets import small
from coin_ray.config.detector_training import DetectorConfig
from coin_ray.errors import InputError
from coin_ray.models.co_detr.collaborative import CollaborativeDetr
from coin_ray.predictors.co_detr import (
    CO_DETR_FILE,
    CoDetrPredictor,
    load_co_detr,
    pack_co_detr,
)
from coin_ray.serving.local_cloud import load_served_detector
from coin_ray.serving.server import create_app
from coin_ray.serving.student import PredictorAdapter
from coin_ray.stages.common.training_job import save_weights
from coin_ray.stages.train_detector import new_co_detr
from tests.builders import CLASSES
from tests.images import jpeg, noise_image
from tests.serving.helpers import detect_request, post

CONFIG: DetectorConfig = replace(small(), classes=CLASSES, short_side=64, long_side=96)
IMAGE = noise_image()
PIXELS = pil_to_tensor(IMAGE)


def _new_model() -> CollaborativeDetr:
    """Scores that differ: at the start all are .01."""
    model = new_co_detr(CONFIG).eval()
    with torch.no_grad():
        for layer in model.base.decoder.classify:
            layer.weight.mul_(20)  # type: ignore[operator]
            layer.bias.fill_(-1.0)  # type: ignore[operator]
    return model


@pytest.fixture(scope="module")
def weights_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = str(tmp_path_factory.mktemp("run") / CO_DETR_FILE)
    save_weights(path, pack_co_detr(_new_model(), CONFIG))
    return path


def test_classes_and_sizes_are_in_the_file_and_predictions_are_the_trained_model_s(
    weights_file: str,
) -> None:
    predictor = load_co_detr(weights_file)
    assert predictor.classes == CLASSES
    assert (predictor.short_side, predictor.long_side) == (64, 96)
    detections = predictor(IMAGE)
    trained = CoDetrPredictor(CLASSES, _new_model().base, 64, 96)(IMAGE)
    assert torch.equal(detections.boxes, trained.boxes)
    assert torch.equal(detections.probs, trained.probs)
    corners = detections.boxes[:, 2:]
    assert bool((corners <= torch.tensor([120.0, 80.0]) + 1e-3).all())
    assert float(corners[:, 0].max()) > 96, (
        "boxes are in the frame of the image, not of the resized image"
    )


def test_training_parts_are_not_in_the_file(weights_file: str) -> None:
    names = torch.load(weights_file, weights_only=True)["weights"]
    assert set(names) == set(_new_model().base.state_dict())


def test_a_batch_gives_what_single_images_of_its_size_give(weights_file: str) -> None:
    predictor = load_co_detr(weights_file)
    flipped = IMAGE.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    images = [PIXELS, pil_to_tensor(flipped)]
    batch = predictor.predict_batch(images)
    for in_batch, image in zip(batch, images, strict=True):
        (alone,) = predictor.predict_batch([image])
        torch.testing.assert_close(in_batch.scores, alone.scores, atol=1e-4, rtol=0)


def test_a_server_is_named_after_the_file_and_knows_its_classes(
    weights_file: str,
) -> None:
    detector = load_served_detector("checkpoint", [weights_file])
    assert isinstance(detector, PredictorAdapter)
    assert (detector.name, tuple(detector.classes)) == ("co_detr", CLASSES)
    boxes, scores = detector.detect(IMAGE, ("stop sign", "cat"), 0.1)
    assert len(boxes) > 0
    assert scores.shape == (len(boxes), 2)
    assert bool((scores.max(1) >= 0.1).all())
    app = create_app(detector)
    (response,) = post(app, detect_request(jpeg(), CLASSES))
    assert response.status_code == 200
    assert response.json()["model"] == "co_detr"
    detections = response.json()["detections"]
    assert detections
    assert set(detections[0]["scores"]) == set(CLASSES)


@pytest.fixture(scope="module", params=["heads", "agreement"])
def with_heads(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> CoDetrPredictor:
    path = str(tmp_path_factory.mktemp(request.param) / CO_DETR_FILE)
    config = replace(CONFIG, ship=request.param)
    save_weights(path, pack_co_detr(_new_model(), config))
    return load_co_detr(path)


def test_shipped_heads_leave_the_detector_as_it_is_bit_for_bit(
    with_heads: CoDetrPredictor, weights_file: str
) -> None:
    by_head = with_heads.predict_by_head([PIXELS])
    (base,) = load_co_detr(weights_file).predict_batch([PIXELS])
    assert set(by_head) == {"decoder", "atss", "agreement"}
    decoder = by_head["decoder"][0]
    for part in ("boxes", "scores", "labels", "probs"):
        assert torch.equal(getattr(decoder, part), getattr(base, part)), part
    (reported,) = with_heads.predict_batch([PIXELS])
    expected = by_head[with_heads.reported][0]
    assert torch.equal(reported.scores, expected.scores)
    assert with_heads.reported == "decoder" or not torch.equal(
        reported.scores, base.scores
    )
    assert sorted(reported.boxes.tolist()) == sorted(base.boxes.tolist())


def test_a_file_without_heads_has_no_detections_by_head(weights_file: str) -> None:
    message = "shipped without its auxiliary heads: train with --ship heads"
    with pytest.raises(InputError, match=message):
        load_co_detr(weights_file).predict_by_head([PIXELS])


def _save_changed(weights_file: str, path: Path, **changes: object) -> str:
    save_weights(str(path), torch.load(weights_file, weights_only=True) | changes)
    return str(path)


def test_other_files_are_refused_with_the_reason(
    weights_file: str, tmp_path: Path
) -> None:
    text, other = tmp_path / "text.pt", tmp_path / "other.pt"
    text.write_text("no weights")
    torch.save({"state": 1}, other)
    old = _save_changed(weights_file, tmp_path / "old.pt", format=0)
    fewer = _save_changed(weights_file, tmp_path / "classes.pt", classes=["cat", "dog"])
    messages = {
        str(tmp_path / "absent.pt"): "no such file",
        str(text): "can't be read",
        str(other): "holds no Co-DETR",
        old: "has format 0, this version reads 1",
        fewer: r"classify.0.bias of shape \[2\], got \[3\].*Give the classes",
    }
    for path, message in messages.items():
        with pytest.raises(InputError, match=message):
            load_co_detr(path)


def test_the_range_of_deep_grey_images_is_in_the_file(tmp_path: Path) -> None:
    path = str(tmp_path / CO_DETR_FILE)
    trained = CONFIG.with_intensity_range((290.0, 310.5))
    save_weights(path, pack_co_detr(_new_model(), trained))
    assert load_co_detr(path).intensity_range == (290.0, 310.5)
    save_weights(path, pack_co_detr(_new_model(), CONFIG))
    assert load_co_detr(path).intensity_range is None
