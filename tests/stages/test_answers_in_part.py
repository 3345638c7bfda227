"""Images that only some of several clouds answered: asked again, the whole answer wins."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

from coin_ray import storage, tables
from coin_ray.config import Cloud, Ensemble, PipelineConfig
from coin_ray.config.presets import folder
from coin_ray.runs.failed_images import count_failed_images, needs_every_cloud
from coin_ray.runs.steps import Manifest, Step
from coin_ray.stages.collect import _remaining_images
from coin_ray.stages.collecting.parts import PART_SCHEMA, CollectedParts

OUTAGE = "http 2: DeadlineExceeded: no answer in 60 s"
REFUSAL = "http 2: Refused: the service answered 451"
IMAGES = pa.table({"image_id": list("abcd"), "uri": list("abcd")})
Row = tuple[str, str, str | None]


def _write(uri: str, *rows: Row) -> None:
    table_rows = [
        dict.fromkeys(PART_SCHEMA.names)
        | {"image_id": image_id, "status": status, "error": error}
        for image_id, status, error in rows
    ]
    storage.write_table(uri, pa.Table.from_pylist(table_rows, schema=PART_SCHEMA))


def _remaining(parts: CollectedParts, **options: bool) -> list[str]:
    images = _remaining_images(
        IMAGES,
        parts,
        options.get("retry_refused", False),
        options.get("every_cloud", True),
    )
    ids: list[str] = images["image_id"].to_pylist()
    return ids


@pytest.fixture
def parts(tmp_path: Path) -> str:
    folder_uri = str(tmp_path / "parts")
    _write(
        f"{folder_uri}/0.parquet",
        ("a", "ok", None),
        ("b", "ok", OUTAGE),
        ("c", "empty", REFUSAL),
        ("d", "error", OUTAGE),
    )
    return folder_uri


def test_the_lacking_cloud_is_asked_again_unless_it_refused(parts: str) -> None:
    collected = CollectedParts(parts)
    assert _remaining(collected) == ["b", "d"]
    assert _remaining(collected, retry_refused=True) == ["b", "c", "d"]
    assert _remaining(collected, every_cloud=False) == ["d"]


def test_a_whole_answer_replaces_the_one_in_part(parts: str) -> None:
    _write(f"{parts}/1.parquet", ("b", "ok", None), ("d", "ok", OUTAGE))
    _write(f"{parts}/2.parquet", ("a", "ok", OUTAGE), ("d", "error", "all failed"))
    collected = CollectedParts(parts)
    assert _remaining(collected) == ["d"]
    rows = collected.select_rows(IMAGES["image_id"])
    errors = collected.index["error"].take(pa.array(rows)).to_pylist()
    assert errors == [None, None, REFUSAL, OUTAGE]


def test_a_second_opinion_in_part_still_replaces_the_first(tmp_path: Path) -> None:
    first, second = str(tmp_path / "parts"), str(tmp_path / "second")
    _write(f"{first}/0.parquet", ("a", "ok", None), ("b", "ok", None))
    _write(f"{second}/0.parquet", ("a", "ok", OUTAGE), ("b", "error", OUTAGE))
    collected = CollectedParts(second, first)
    rows = collected.select_rows(pa.array(["a", "b"]))
    errors = collected.index["error"].take(pa.array(rows)).to_pylist()
    assert errors == [OUTAGE, None]


def _config(mode: str, clouds: int = 2) -> PipelineConfig:
    first, *others = [Cloud(url=f"https://cloud{i}.example.com") for i in range(clouds)]
    return replace(
        folder(),
        classes=("car",),
        cloud=first,
        more_clouds=tuple(others),
        ensemble=Ensemble(mode),  # type: ignore[arg-type]
    )


@pytest.mark.parametrize(
    ("config", "needs_all", "count"),
    [
        (_config("fuse"), True, 2),
        (_config("cascade"), True, 2),
        (_config("failover"), False, 1),
        (_config("fuse", clouds=1), False, 1),
    ],
)
def test_the_same_command_asks_about_them(
    config: PipelineConfig, needs_all: bool, count: int, tmp_path: Path
) -> None:
    collect = Step("collect", "collect", "test")
    root, rows = str(tmp_path), []
    for image_id, status, error in (
        ("a", "ok", None),
        ("b", "cached", OUTAGE),
        ("c", "ok", REFUSAL),
        ("d", "error", OUTAGE),
    ):
        row: dict[str, object] = dict.fromkeys(tables.DETECTIONS.names)
        rows.append(row | {"image_id": image_id, "status": status, "error": error})
    step_folder = collect.folder(root)
    cloud_file = storage.join(step_folder, "cloud.parquet")
    storage.write_table(cloud_file, tables.detections_table(rows))
    metrics = {"calls": {"failed": 1}, "answered_in_part": 2}
    manifest = Manifest(step="collect", metrics=metrics)
    storage.write_json(storage.join(step_folder, "manifest.json"), manifest.to_json())
    assert needs_every_cloud(config) == needs_all
    assert count_failed_images(collect, config, root) == count
