from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from coin_ray.config import Cloud
from coin_ray.config.detector_presets import small
from coin_ray.config.detector_training import DetectorConfig
from coin_ray.errors import InputError
from coin_ray.models.co_detr.collaborative import CollaborativeDetr
from coin_ray.predictors.co_detr import FILE, CoDetrPredictor, load_co_detr, packed
from coin_ray.predictors.student import load_exported
from coin_ray.serving.launch import local_cloud
from coin_ray.serving.local_cloud import load
from coin_ray.serving.student import StudentDetector
from coin_ray.stages.common.training_job import save_weights
from coin_ray.stages.train_detector import new_model
from tests.builders import CLASSES
from tests.serving.test_local_cloud import call, jpeg

CONFIG: DetectorConfig = replace(small(), classes=CLASSES, short_side=64, long_side=96)


def model() -> CollaborativeDetr:
    """Scores that differ: at the start all are .01."""
    made = new_model(CONFIG).eval()
    with torch.no_grad():
        for layer in made.base.decoder.classify:
            layer.weight.mul_(20)  # type: ignore[operator]
            layer.bias.fill_(-1.0)  # type: ignore[operator]
    return made


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> str:
    place = str(tmp_path_factory.mktemp("run") / FILE)
    save_weights(place, packed(model(), CONFIG))
    return place


def picture() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 255, (6, 9, 3), np.uint8)
    return Image.fromarray(pixels).resize((120, 80))


def test_classes_and_sizes_travel_in_the_file_and_predictions_are_the_trained_model_s(
    file: str,
) -> None:
    predictor = load_exported(file)
    assert isinstance(predictor, CoDetrPredictor)
    assert (predictor.classes, predictor.short_side, predictor.long_side) == (
        CLASSES,
        64,
        96,
    )
    found = predictor(picture())
    trained = CoDetrPredictor(CLASSES, model().base, 64, 96)(picture())
    assert torch.equal(found.boxes, trained.boxes)
    assert torch.equal(found.probs, trained.probs)
    assert bool((found.boxes[:, 2:] <= torch.tensor([120.0, 80.0]) + 1e-3).all())
    assert float(found.boxes[:, 2].max()) > 96, (
        "boxes are in the frame of the picture, not of the view"
    )


def test_training_parts_are_not_in_the_file(file: str) -> None:
    names = torch.load(file, weights_only=True)["weights"]
    assert set(names) == set(model().base.state_dict())


def test_a_batch_gives_what_single_images_of_its_size_give(file: str) -> None:
    predictor = load_co_detr(file)
    images = [
        pil_to_tensor(picture()),
        pil_to_tensor(picture().transpose(Image.Transpose.FLIP_LEFT_RIGHT)),
    ]
    for together, image in zip(predictor.many(images), images, strict=True):
        (alone,) = predictor.many([image])
        torch.testing.assert_close(together.scores, alone.scores, atol=1e-4, rtol=0)


def test_the_folder_of_the_file_is_enough(file: str) -> None:
    assert isinstance(load_exported(str(Path(file).parent)), CoDetrPredictor)


def test_a_server_is_named_after_the_file_and_knows_its_classes(file: str) -> None:
    served = load("checkpoint", [file])
    assert isinstance(served, StudentDetector)
    assert (served.name, tuple(served.classes)) == ("co_detr", CLASSES)
    boxes, scores = served.detect(picture(), ("stop sign", "cat"), 0.1)
    assert len(boxes) > 0
    assert scores.shape == (len(boxes), 2)
    assert bool((scores.max(1) >= 0.1).all())


def test_a_run_serves_it_over_http(file: str, tmp_path: Path) -> None:
    with local_cloud(Cloud(serve="checkpoint", model=file), str(tmp_path)) as url:
        assert httpx.get(f"{url}/health").json()["classes"] == list(CLASSES)
        response = httpx.post(
            f"{url}/v1/detect", json=call(jpeg(), CLASSES), timeout=20
        )
    assert response.status_code == 200
    assert response.json()["model"] == "co_detr"
    detections = response.json()["detections"]
    assert detections
    assert set(detections[0]["scores"]) == set(CLASSES)


@pytest.fixture(scope="module", params=["heads", "agreement"])
def with_heads(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> CoDetrPredictor:
    place = str(tmp_path_factory.mktemp(request.param) / FILE)
    save_weights(place, packed(model(), replace(CONFIG, ship=request.param)))
    return load_co_detr(place)


def test_shipped_heads_leave_the_detector_as_it_is_bit_for_bit(
    with_heads: CoDetrPredictor, file: str
) -> None:
    image = pil_to_tensor(picture())
    opinions, (alone,) = with_heads.opinions([image]), load_co_detr(file).many([image])
    assert set(opinions) == {"decoder", "atss", "agreement"}
    own = opinions["decoder"][0]
    assert all(
        torch.equal(getattr(own, part), getattr(alone, part))
        for part in ("boxes", "scores", "labels", "probs")
    )
    (reported,) = with_heads.many([image])
    expected = opinions[with_heads.reported][0]
    assert torch.equal(reported.scores, expected.scores)
    assert with_heads.reported == "decoder" or not torch.equal(
        reported.scores, alone.scores
    )
    assert sorted(reported.boxes.tolist()) == sorted(alone.boxes.tolist())


def test_a_file_without_heads_has_one_opinion(file: str) -> None:
    with pytest.raises(
        InputError, match="shipped without its auxiliary heads: train with --ship heads"
    ):
        load_co_detr(file).opinions([pil_to_tensor(picture())])


def changed(file: str, place: Path, **changes: object) -> str:
    save_weights(str(place), torch.load(file, weights_only=True) | changes)
    return str(place)


def test_files_that_are_none_are_told(file: str, tmp_path: Path) -> None:
    (tmp_path / "text.pt").write_text("no weights")
    torch.save({"state": 1}, tmp_path / "other.pt")
    cases = {
        str(tmp_path / "absent.pt"): "no such file",
        str(tmp_path / "text.pt"): "can't be read",
        str(tmp_path / "other.pt"): "holds no Co-DETR",
        changed(
            file, tmp_path / "old.pt", format=0
        ): "has format 0, this version reads 1",
        changed(
            file, tmp_path / "classes.pt", classes=["cat", "dog"]
        ): r"classify.0.bias should be \[2\] and is \[3\].*Give the classes",
    }
    for place, message in cases.items():
        with pytest.raises(InputError, match=message):
            load_exported(place)
