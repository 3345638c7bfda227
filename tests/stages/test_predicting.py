from __future__ import annotations

from collections.abc import Iterator
from itertools import permutations
from pathlib import Path

import pyarrow as pa
import pytest

from coin_ray import storage, tables
from coin_ray.config import PipelineConfig
from coin_ray.config.presets import demo
from coin_ray.stages.common import prediction as predicting
from coin_ray.structures import Detections
from coin_ray.tables import Provenance, detections_row, detections_table

IMAGES = pa.table({"image_id": ["c", "a", "b", "e", "d"], "uri": ["x"] * 5})


def block(*images: str) -> pa.Table:
    """What two detectors say."""
    rows = [
        detections_row(i, Detections.empty(3), Provenance(name))
        for name in ("student", "teacher")
        for i in images
    ]
    return detections_table(rows)


@pytest.mark.parametrize("order", permutations(range(3)))
def test_predictions_stand_in_the_images_order_whichever_came_first(
    order: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = [block("c", "a"), block("b"), block("e", "d")]
    monkeypatch.setattr(predicting, "_predict_in_process", lambda *_: (blocks[n] for n in order))
    predicting.write_predictions(
        dict.fromkeys(("student", "teacher"), ""), IMAGES, demo(), str(tmp_path)
    )
    for name in ("student", "teacher"):
        found = storage.read_table(str(tmp_path / f"{name}.parquet"))
        assert found.schema == tables.DETECTIONS
        assert found["image_id"].to_pylist() == IMAGES["image_id"].to_pylist()
        assert set(found["source"].to_pylist()) == {name}


def test_a_block_is_given_on_as_soon_as_its_turn_has_come() -> None:
    blocks = iter([block("c", "a"), block("e", "d")])
    assert (
        next(predicting._in_order(blocks, IMAGES["image_id"], 2))[
            "image_id"
        ].to_pylist()
        == ["c", "a"] * 2
    )
    assert len(list(blocks)) == 1


@pytest.mark.parametrize("kept_seconds", [0.0, 300.0])
@pytest.mark.parametrize("fails_at", range(5))
def test_a_killed_prediction_goes_on_after_its_last_part(
    fails_at: int, kept_seconds: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One image a block: with a part for each block only the one that failed is looked
    at again, with one part for all of them all."""
    seen: list[str] = []
    fails = True

    def look(
        weights: dict[str, str], table: pa.Table, config: PipelineConfig
    ) -> Iterator[pa.Table]:
        for image in table["image_id"].to_pylist():
            seen.append(image)
            if fails and len(seen) == fails_at + 1:
                raise KeyboardInterrupt
            yield block(image)

    def write(folder: str) -> None:
        predicting.write_predictions(
            dict.fromkeys(("student", "teacher"), ""),
            IMAGES,
            demo(),
            str(tmp_path / folder),
        )

    monkeypatch.setattr(predicting, "_predict_in_process", look)
    monkeypatch.setattr(predicting, "KEPT_SECONDS", kept_seconds)
    with pytest.raises(KeyboardInterrupt):
        write("killed")
    assert not list((tmp_path / "killed").glob("*.parquet"))
    images, before, fails = IMAGES["image_id"].to_pylist(), seen.copy(), False
    assert before == images[: fails_at + 1]
    seen.clear()
    write("killed")
    assert seen == (images[fails_at:] if kept_seconds == 0 else images)
    write("undisturbed")
    for name in ("student", "teacher"):
        whole = [
            storage.read_table(str(tmp_path / folder / f"{name}.parquet"))
            for folder in ("killed", "undisturbed")
        ]
        assert whole[0].equals(whole[1])
    assert not list(tmp_path.glob("*/parts/*"))


def test_finished_predictions_are_not_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = {"student": ""}
    monkeypatch.setattr(
        predicting,
        "_predict_in_process",
        lambda weights, table, config: iter(
            [predicted(*table["image_id"].to_pylist())]
        ),
    )
    predicting.write_predictions(weights, IMAGES, demo(), str(tmp_path))
    stamp = (tmp_path / "student.parquet").stat().st_mtime_ns
    monkeypatch.setattr(predicting, "_predict_in_process", lambda *_: pytest.fail("looked again"))
    predicting.write_predictions(weights, IMAGES, demo(), str(tmp_path))
    assert (tmp_path / "student.parquet").stat().st_mtime_ns == stamp


def test_parts_that_were_all_made_are_only_put_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a kill between the last image and the tables."""
    storage.write_table(
        str(tmp_path / "parts" / f"{0:012}.parquet"), predicted("c", "a", "b")
    )
    storage.write_table(
        str(tmp_path / "parts" / f"{3:012}.parquet"), predicted("e", "d")
    )
    monkeypatch.setattr(predicting, "_predict_in_process", lambda *_: pytest.fail("looked again"))
    predicting.write_predictions({"student": ""}, IMAGES, demo(), str(tmp_path))
    assert (
        storage.read_table(str(tmp_path / "student.parquet"))["image_id"].to_pylist()
        == IMAGES["image_id"].to_pylist()
    )


def predicted(*images: str) -> pa.Table:
    """What one detector says."""
    return detections_table(
        [detections_row(i, Detections.empty(3), Provenance("student")) for i in images]
    )
