from __future__ import annotations

from itertools import permutations
from pathlib import Path

import pyarrow as pa
import pytest

from coin_ray import storage, tables
from coin_ray.presets import demo
from coin_ray.stages import predicting
from coin_ray.structures import Detections
from coin_ray.tables import Provenance, detections_row, detections_table

IMAGES = pa.table({"image_id": ["c", "a", "b", "e", "d"], "uri": ["x"] * 5})


def block(*images: str) -> pa.Table:
    """What two detectors say."""
    rows = [detections_row(i, Detections.empty(3), Provenance(name)) for name in ("student", "teacher") for i in images]
    return detections_table(rows)


@pytest.mark.parametrize("order", permutations(range(3)))
def test_predictions_stand_in_the_images_order_whichever_came_first(
    order: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = [block("c", "a"), block("b"), block("e", "d")]
    monkeypatch.setattr(predicting, "_here", lambda *_: (blocks[n] for n in order))
    predicting.write_predictions(dict.fromkeys(("student", "teacher"), ""), IMAGES, demo(), str(tmp_path))
    for name in ("student", "teacher"):
        found = storage.read_table(str(tmp_path / f"{name}.parquet"))
        assert found.schema == tables.DETECTIONS
        assert found["image_id"].to_pylist() == IMAGES["image_id"].to_pylist()
        assert set(found["source"].to_pylist()) == {name}


def test_a_block_is_given_on_as_soon_as_its_turn_has_come() -> None:
    blocks = iter([block("c", "a"), block("e", "d")])
    assert next(predicting._in_order(blocks, IMAGES["image_id"], 2))["image_id"].to_pylist() == ["c", "a"] * 2
    assert len(list(blocks)) == 1
