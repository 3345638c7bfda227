"""Images that a finished collection has no answer for, and which of them are asked
again.
"""

from __future__ import annotations

import re

import pyarrow.compute as pc

from coin_ray import storage, tables
from coin_ray.config import PipelineConfig
from coin_ray.runs.steps import Manifest, Step

FINAL_TYPES = {"Refused", "ImageRejected", "UnusableBoxes"}
"""Errors that another call about the same image would end with again."""
LABELER_DEATH = "the process that labelled it has died"
"""How the error of an image begins that killed its labelers."""
ERROR_TYPE = re.compile(r"(?:^|; )(?:[a-z][\w +-]*: )?([A-Z][A-Za-z]+): ")
"""The type of an error, or of each cloud's, in the text of a failed image."""


def is_final(error: str) -> bool:
    """Return whether the error of a failed image says that asking again is useless:
    every cloud refused it or answered of no use, or labelling it killed processes.
    """
    if error.startswith(LABELER_DEATH):
        return True
    error_types = set(ERROR_TYPE.findall(error))
    return bool(error_types) and error_types <= FINAL_TYPES


def count_failed_images(step: Step | None, config: PipelineConfig, root: str) -> int:
    """Return the images that a finished collection failed in and that are asked again:
    all but refused ones, with ``collect.retry_refused`` those too.

    ``step``: the collection; None, or an unfinished one, has no such images.
    """
    manifest = step.read_manifest(root) if step is not None else None
    if step is None or manifest is None or not failed_count(manifest):
        return 0
    uri = storage.join(step.folder(root), "cloud.parquet")
    count = 0
    for block in storage.stream_table(uri, ["status", "error"]):
        failed = pc.is_in(block["status"], value_set=tables.FAILED_STATUSES)
        errors = block["error"].filter(failed).to_pylist()
        count += sum(
            config.collect.retry_refused or not is_final(error or "")
            for error in errors
        )
    return count


def failed_count(manifest: Manifest) -> int:
    """Return the failed images that a collection's manifest counts."""
    return int(manifest.metrics.get("calls", {}).get("failed", 0))
