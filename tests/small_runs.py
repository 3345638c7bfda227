"""Settings of a small run of the whole demo, and helpers that compare two such runs."""

from __future__ import annotations

import json
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
import torch

from coin_ray.cloud.journal.base import Journal
from coin_ray.cloud.journal.keys import TASK
from coin_ray.cloud.journal.opening import open_journal
from coin_ray.stages.collecting.cloud_actor import IMAGES_PER_CALL, journal_uri

TRAIN, VAL, TEST = 48, 4, 20
IMAGES = TRAIN + TEST
IN_FLIGHT = 8
CALLS_IN_PROGRESS_MAX = IMAGES_PER_CALL * IN_FLIGHT + 1
"""Largest number of images with a call but no recorded answer: in flight, backing off, or
being written to disk."""
SMALL = [
    *("--data.train", str(TRAIN), "--data.val", str(VAL), "--data.test", str(TEST)),
    *("--propagate.fit.steps", "24", "--propagate.fit.checkpoint-every", "3"),
    *("--distill.fit.steps", "24", "--distill.fit.checkpoint-every", "3"),
    *("--distill.burn-up", "8", "--collect.batch", "8"),
    *("--cloud.in-flight", str(IN_FLIGHT), "--cloud.serve-faults", "0.1"),
]
"""Settings of a run of the demo with few images and steps."""
TABLES = (
    "collect-*/cloud",
    "collect-*/clip_labels",
    "separate-*/clip_detector",
    "evaluate-*/predictions/student",
)
WEIGHTS = ("propagate-*/detector.pt", "distill-*/detector.pt", "distill-*/teacher.pt")


def read_rows(root: Path, pattern: str, columns: list[str]) -> list[dict[str, object]]:
    (path,) = root.glob(pattern)
    table_rows: list[dict[str, object]] = pq.read_table(
        path, columns=columns
    ).to_pylist()
    return table_rows


def read_call_log(root: Path) -> list[dict[str, object]]:
    """Return ``time``, ``key`` and ``image`` of all calls that the local cloud logged,
    retried ones included."""
    log = root / "local_cloud" / "calls.jsonl"
    if not log.exists():
        return []
    return [json.loads(line) for line in log.read_text().splitlines()]


def count_calls_by_image(root: Path) -> Counter[str]:
    """Return the number of calls about each image."""
    return Counter(str(call["image"]) for call in read_call_log(root))


def assert_same_results(root: Path, reference: Path) -> None:
    """Check that figures, tables and weights are equal to the bit."""
    summary, expected = (
        json.loads((folder / "summary.json").read_text())
        for folder in (root, reference)
    )
    for figure in ("map50", "map50_unknown", "per_class", "separation"):
        assert summary[figure] == expected[figure], figure
    columns = ["image_id", "boxes", "scores", "labels", "probs"]
    for table in TABLES:
        pattern = f"steps/{table}.parquet"
        assert read_rows(root, pattern, columns) == read_rows(
            reference, pattern, columns
        ), table
    for pattern in WEIGHTS:
        weights, expected_weights = (
            torch.load(next(folder.glob(f"steps/{pattern}")), weights_only=True)
            for folder in (root, reference)
        )
        assert all(
            torch.equal(weights[name], expected_weights[name])
            for name in expected_weights
        ), f"{pattern} differs"


@dataclass(frozen=True)
class Kill:
    """The ``moment`` of a kill, and the journal keys that were ``answered`` before it."""

    moment: float
    answered: frozenset[str]

    @classmethod
    def now(cls, root: Path) -> Kill:
        """Read the journal right after the kill: processes of the killed run may still
        finish a call or two."""
        journal = open_journal(journal_uri(str(root)))
        keys = journal.keys()
        answered = frozenset(
            key for key in keys if not key.endswith(TASK) and _is_answer(journal, key)
        )
        journal.close()
        return cls(time.time(), answered)

    def repeated(self, root: Path) -> list[str]:
        """Return the keys called before and after the kill. Raises AssertionError if one of
        them had an answer."""
        before, after = set[str](), set[str]()
        for call in read_call_log(root):
            is_before = float(str(call["time"])) <= self.moment
            keys = before if is_before else after
            keys.add(str(call["key"]))
        assert not after & self.answered, "a recorded answer must never be paid again"
        assert len(before & after) <= CALLS_IN_PROGRESS_MAX, (
            "only calls in progress when the run was killed may be repeated"
        )
        return sorted(before & after)


def _is_answer(journal: Journal, key: str) -> bool:
    """Whether the recorded body is an answer: truncated bodies are recorded too, until they
    are rejected."""
    record = journal.get(key)
    try:
        return record is not None and json.loads(record.body) is not None
    except ValueError:
        return False
