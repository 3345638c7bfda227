"""Images that a finished collection has no answer for, and which of them are asked
again.
"""

from __future__ import annotations

import re

import pyarrow as pa
import pyarrow.compute as pc

from coin_ray import storage, tables
from coin_ray.config import PipelineConfig
from coin_ray.runs.steps import Metrics, Step

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


def needs_every_cloud(config: PipelineConfig) -> bool:
    """Return whether an image needs the answers of several clouds or renderings: one
    that lacks some of them has an answer and an error.
    """
    return len(config.clouds) > 1 and config.ensemble.mode != "failover"


def count_failed_images(step: Step | None, config: PipelineConfig, root: str) -> int:
    """Return the images that a finished collection failed in, with one of several clouds
    at least, and that are asked again: all but refused ones, with
    ``collect.retry_refused`` those too.

    ``step``: the collection; None, or an unfinished one, has no such images.
    """
    manifest = step.read_manifest(root) if step is not None else None
    if step is None or manifest is None or not failed_count(manifest.metrics):
        return 0
    uri = storage.join(step.folder(root), "cloud.parquet")
    count = 0
    for block in storage.stream_table(uri, ["status", "error"]):
        asked_again = pc.is_in(block["status"], value_set=tables.FAILED_STATUSES)
        if needs_every_cloud(config):
            asked_again = pc.or_(asked_again, has_error(block["error"]))
        errors = block["error"].filter(asked_again).to_pylist()
        count += sum(
            config.collect.retry_refused or not is_final(error or "")
            for error in errors
        )
    return count


def has_error(errors: pa.Array | pa.ChunkedArray) -> pa.Array | pa.ChunkedArray:
    """Return for each row whether it has an error, which is null or empty otherwise."""
    return pc.not_equal(pc.fill_null(errors, ""), "")


def failed_count(metrics: Metrics) -> int:
    """Return the images that a collection's metrics count as failed, those included that
    only some of several clouds answered.
    """
    failed = metrics.get("calls", {}).get("failed", 0)
    return int(failed) + int(metrics.get("answered_in_part", 0))
