"""Why images failed: the commonest reason, with an example image."""

from __future__ import annotations

import re
from collections import Counter

import pyarrow as pa
import pyarrow.compute as pc

from coin_ray import storage, tables

VARIABLE_TEXT = re.compile(r"'[^']*'|\"[^\"]*\"|\b[0-9a-f]{16,}\b|\d+(?:\.\d+)?")
"""Parts of an error in which two images with the same fault differ."""
REASON_CHARACTERS = 300


class FailureReasons:
    """Counts the failed images of a collection by their reason."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.examples: dict[str, tuple[str, str]] = {}
        """Image id and whole error of the first image with each reason."""

    @classmethod
    def read(cls, uri: str) -> FailureReasons:
        """Count the failed images of a ``DETECTIONS`` file."""
        failures = cls()
        for block in storage.stream_table(uri, ["image_id", "status", "error"]):
            failed = pc.is_in(block["status"], value_set=tables.FAILED_STATUSES)
            for row in block.filter(failed).to_pylist():
                failures.add(row["image_id"], row["error"])
        return failures

    @property
    def total(self) -> int:
        """Return the number of failed images."""
        return self.counts.total()

    def add(self, image_id: str, error: str | None) -> None:
        """Count a failed image."""
        text = error or "no reason given"
        reason = VARIABLE_TEXT.sub("_", text)
        self.counts[reason] += 1
        self.examples.setdefault(reason, (image_id, text))

    def describe(self, images: pa.Table, total: int) -> str:
        """Return one line with the commonest reason and an image that failed for it.

        ``images``: columns ``image_id`` and ``uri``; ``total``: images of which these
        failed, at least 1.
        """
        (reason, count), *others = self.counts.most_common()
        image_id, error = self.examples[reason]
        row = pc.index(images["image_id"], image_id).as_py()
        image = images["uri"][row].as_py() if row >= 0 else image_id
        commonest = f"the commonest reason ({count} images)" if others else "the reason"
        return (
            f"{self.total} of {total} images failed; {commonest}:"
            f" {error[:REASON_CHARACTERS]}; for example {image}"
        )
