"""The better of two trained students is delivered, and the run says why."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest
import torch

from coin_ray import storage, tables
from coin_ray.config.presets import demo
from coin_ray.runs.steps import Context
from coin_ray.stages import choose
from coin_ray.structures import Detections
from coin_ray.tables import Provenance, Truth, detections_row

CONFIG = demo()
K = len(CONFIG.classes)
BOX = [10.0, 10.0, 50.0, 50.0]
FAR = [100.0, 100.0, 150.0, 150.0]
IMAGES = ["first", "second"]


def _detections(box: list[float]) -> Detections:
    probs = torch.zeros(1, K + 1)
    probs[0, 0], probs[0, K] = 0.9, 0.1
    return Detections(
        torch.tensor([box]), torch.tensor([0.9]), torch.tensor([0]), probs
    )


def _context(tmp_path: Path, kind: str) -> Context[object]:
    inputs = {}
    for name in ("images", "separate", "distill", "pseudo_label"):
        inputs[name] = str(tmp_path / name)
        (tmp_path / name).mkdir()
    for step in ("distill", "pseudo_label"):
        (tmp_path / step / "detector.pt").write_bytes(step.encode())
    rows = [
        {
            "image_id": image,
            "uri": image,
            "width": 192,
            "height": 192,
            "split": "train",
        }
        for image in IMAGES
    ]
    images = pa.Table.from_pylist(rows, tables.IMAGES)
    storage.write_table(f"{inputs['images']}/images.parquet", images)
    separated = [
        {
            "image_id": image,
            "boxes": [BOX],
            "kind": [kind],
            "cloud_labels": [0],
            "clip_labels": [0],
            "cloud_probs": [[0.0] * (K + 1)],
            "clip_probs": [[0.0] * (K + 1)],
        }
        for image in IMAGES
    ]
    separation = pa.Table.from_pylist(separated, tables.SEPARATION)
    storage.write_table(f"{inputs['separate']}/separation.parquet", separation)
    folder = tmp_path / "choose"
    folder.mkdir()
    return Context(CONFIG, str(tmp_path), str(folder), inputs, {}, "choose")


def _fake_predictions(
    monkeypatch: pytest.MonkeyPatch, boxes: dict[str, list[float]]
) -> None:
    def write(
        weights: dict[str, str], images: pa.Table, config: object, folder: str
    ) -> None:
        for name in weights:
            rows = [
                detections_row(image, _detections(boxes[name]), Provenance(name))
                for image in images["image_id"].to_pylist()
            ]
            uri = storage.join(folder, f"{name}.parquet")
            storage.write_table(uri, tables.detections_table(rows))

    monkeypatch.setattr(choose, "write_predictions", write)


@pytest.mark.parametrize(
    ("boxes", "winner", "step"),
    [
        ({"coin": BOX, "plain": FAR}, "coin", "distill"),
        ({"coin": FAR, "plain": BOX}, "plain", "pseudo_label"),
        ({"coin": BOX, "plain": BOX}, "coin", "distill"),
    ],
)
def test_the_student_that_agrees_with_both_teachers_is_delivered(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    boxes: dict[str, list[float]],
    winner: str,
    step: str,
) -> None:
    context = _context(tmp_path, "consistent")
    _fake_predictions(monkeypatch, boxes)
    metrics = choose.run(context)  # type: ignore[arg-type]
    assert metrics["winner"] == winner
    assert metrics["boxes"] == 2
    assert Path(context.folder, "detector.pt").read_bytes() == step.encode()
    assert choose.NAMES[winner] in metrics["reason"]


def test_without_agreed_boxes_coin_is_delivered(tmp_path: Path) -> None:
    metrics = choose.run(_context(tmp_path, "private"))  # type: ignore[arg-type]
    assert metrics["winner"] == "coin"
    assert metrics["boxes"] == 0
    assert "agree on no box" in metrics["reason"]


def test_many_images_are_sampled_evenly() -> None:
    ids = [str(number) for number in range(1200)]
    nothing = Truth(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.bool))
    images = pa.table({"image_id": ids})
    selected = choose.select_evenly(images, dict.fromkeys(ids[:-1], nothing))
    numbers = [int(image_id) for image_id in selected["image_id"].to_pylist()]
    assert numbers == list(range(0, 1199, 3))
