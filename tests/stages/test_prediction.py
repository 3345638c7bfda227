from __future__ import annotations

from collections.abc import Iterator
from itertools import permutations
from pathlib import Path

import pyarrow as pa
import pytest

from coin_ray import storage, tables
from coin_ray.config import PipelineConfig
from coin_ray.config.presets import demo
from coin_ray.stages.common import prediction
from coin_ray.structures import Detections
from coin_ray.tables import Provenance, detections_row, detections_table

IMAGES = pa.table({"image_id": ["c", "a", "b", "e", "d"], "uri": ["x"] * 5})
DETECTORS = ("student", "teacher")


def _block(*image_ids: str, detectors: tuple[str, ...] = DETECTORS) -> pa.Table:
    """Return predictions without boxes of each detector."""
    rows = [
        detections_row(image_id, Detections.empty(3), Provenance(name))
        for name in detectors
        for image_id in image_ids
    ]
    return detections_table(rows)


def _write_predictions(folder: Path, *detectors: str) -> None:
    weights = dict.fromkeys(detectors, "")
    prediction.write_predictions(weights, IMAGES, demo(), str(folder))


@pytest.mark.parametrize("order", permutations(range(3)))
def test_predictions_stand_in_the_images_order_whichever_came_first(
    order: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = [_block("c", "a"), _block("b"), _block("e", "d")]
    monkeypatch.setattr(
        prediction, "_predict_in_process", lambda *_: (blocks[n] for n in order)
    )
    _write_predictions(tmp_path, *DETECTORS)
    for name in DETECTORS:
        predictions = storage.read_table(str(tmp_path / f"{name}.parquet"))
        assert predictions.schema == tables.DETECTIONS
        assert predictions["image_id"].to_pylist() == IMAGES["image_id"].to_pylist()
        assert set(predictions["source"].to_pylist()) == {name}


def test_a_block_is_given_on_as_soon_as_its_turn_has_come() -> None:
    blocks = iter([_block("c", "a"), _block("e", "d")])
    first_block = next(prediction._in_order(blocks, IMAGES["image_id"], 2))
    assert first_block["image_id"].to_pylist() == ["c", "a"] * 2
    assert len(list(blocks)) == 1


@pytest.mark.parametrize("part_seconds", [0.0, 300.0])
@pytest.mark.parametrize("fails_at", range(5))
def test_a_killed_prediction_goes_on_after_its_last_part(
    fails_at: int, part_seconds: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One image a block: with a part for each block only the one that failed is predicted
    again, with one part for all of them all."""
    predicted_ids: list[str] = []
    fails = True

    def predict(
        weights: dict[str, str], table: pa.Table, config: PipelineConfig
    ) -> Iterator[pa.Table]:
        for image_id in table["image_id"].to_pylist():
            predicted_ids.append(image_id)
            if fails and len(predicted_ids) == fails_at + 1:
                raise KeyboardInterrupt
            yield _block(image_id)

    monkeypatch.setattr(prediction, "_predict_in_process", predict)
    monkeypatch.setattr(prediction, "PART_SECONDS", part_seconds)
    with pytest.raises(KeyboardInterrupt):
        _write_predictions(tmp_path / "killed", *DETECTORS)
    assert not list((tmp_path / "killed").glob("*.parquet"))
    image_ids = IMAGES["image_id"].to_pylist()
    assert predicted_ids == image_ids[: fails_at + 1]
    fails = False
    predicted_ids.clear()
    _write_predictions(tmp_path / "killed", *DETECTORS)
    assert predicted_ids == (image_ids[fails_at:] if part_seconds == 0 else image_ids)
    _write_predictions(tmp_path / "undisturbed", *DETECTORS)
    for name in DETECTORS:
        resumed, undisturbed = (
            storage.read_table(str(tmp_path / folder / f"{name}.parquet"))
            for folder in ("killed", "undisturbed")
        )
        assert resumed.equals(undisturbed)
    assert not list(tmp_path.glob("*/parts/*"))


def test_finished_predictions_are_not_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        prediction,
        "_predict_in_process",
        lambda weights, images, config: iter(
            [_block(*images["image_id"].to_pylist(), detectors=("student",))]
        ),
    )
    _write_predictions(tmp_path, "student")
    stamp = (tmp_path / "student.parquet").stat().st_mtime_ns
    monkeypatch.setattr(
        prediction, "_predict_in_process", lambda *_: pytest.fail("predicted again")
    )
    _write_predictions(tmp_path, "student")
    assert (tmp_path / "student.parquet").stat().st_mtime_ns == stamp


def test_parts_that_were_all_made_are_only_put_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The files are those after a kill between the last image and the tables."""
    for first, image_ids in ((0, ("c", "a", "b")), (3, ("e", "d"))):
        part = _block(*image_ids, detectors=("student",))
        storage.write_table(str(tmp_path / "parts" / f"{first:012}.parquet"), part)
    monkeypatch.setattr(
        prediction, "_predict_in_process", lambda *_: pytest.fail("predicted again")
    )
    _write_predictions(tmp_path, "student")
    predictions = storage.read_table(str(tmp_path / "student.parquet"))
    assert predictions["image_id"].to_pylist() == IMAGES["image_id"].to_pylist()
