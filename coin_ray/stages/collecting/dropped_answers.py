"""Make collections below a root ask again about an image whose answer was dropped."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from coin_ray import storage, tables
from coin_ray.runs.steps import Manifest, read_manifest, read_reopened, reopen_step
from coin_ray.stages.collecting.parts import BOX_COUNTS, CollectedParts

DROPPED = "the answer was dropped, to be asked again"
"""Error of such an image in the parts."""
LIST_COLUMNS = ("boxes", "scores", "labels", "probs", "prob_source", "clip_probs")
PARTS_FOLDERS = ("parts", "second_opinions")


def ask_again(root: str, image_id: str) -> int:
    """Make every collection below the root unfinished that has an answer about the
    image; return how many those are.

    What was paid stays in the parts. The steps that read a collection are removed once
    it has an answer again.
    """
    count = 0
    for folder in storage.list_folders(storage.join(root, "steps")):
        if not folder.rpartition("/")[2].startswith("collect-"):
            continue
        changed = [
            _drop_rows(storage.join(folder, name), image_id) for name in PARTS_FOLDERS
        ]
        if any(changed):
            count += 1
            _reopen_with_one_more_failure(folder)
    return count


def _drop_rows(parts_folder: str, image_id: str) -> bool:
    """Turn the image's answers in the parts into failures; return whether there were
    any.
    """
    is_changed = False
    for file in CollectedParts(parts_folder).files:
        part = storage.read_table(file)
        is_dropped = pc.and_(
            pc.equal(part["image_id"], image_id),
            pc.invert(pc.is_in(part["status"], value_set=tables.FAILED_STATUSES)),
        ).to_pylist()
        if not any(is_dropped):
            continue
        rows = part.to_pylist()
        new_rows = [
            _as_dropped(row) if dropped else row
            for row, dropped in zip(rows, is_dropped, strict=True)
        ]
        schema = part.schema.with_metadata(_without_image(part.schema, image_id))
        storage.write_table(file, pa.Table.from_pylist(new_rows, schema=schema))
        is_changed = True
    return is_changed


def _without_image(schema: pa.Schema, image_id: str) -> dict[str, str] | None:
    """Return a part's metadata without the counts of the image's boxes."""
    metadata = schema.metadata or {}
    if BOX_COUNTS.encode() not in metadata:
        return None
    counts = json.loads(metadata[BOX_COUNTS.encode()])
    counts.pop(image_id, None)
    return {BOX_COUNTS: json.dumps(counts)}


def _as_dropped(row: dict[str, Any]) -> dict[str, Any]:
    empty: dict[str, Any] = {name: [] for name in LIST_COLUMNS if name in row}
    return {**row, **empty, "status": "error", "error": DROPPED}


def _reopen_with_one_more_failure(folder: str) -> None:
    """Reopen a collection, finished or reopened before, as one in which the image had
    failed, so that a new answer about it counts as a change.
    """
    manifest = read_reopened(folder)
    if storage.exists(storage.join(folder, "manifest.json")):
        manifest = read_manifest(folder)
    if manifest is None:
        return
    reopen_step(folder, _with_one_more_failure(manifest))


def _with_one_more_failure(manifest: Manifest) -> Manifest:
    calls = dict(manifest.metrics.get("calls", {}))
    calls["failed"] = calls.get("failed", 0) + 1
    return replace(manifest, metrics={**manifest.metrics, "calls": calls})
