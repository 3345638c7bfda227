"""A run of the demo that is small but has all of its parts, and what tells whether two
of them came to the same."""

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
AT_HAND = IMAGES_PER_CALL * IN_FLIGHT + 1
"""Images that have been asked about, or are about to be, and have no answer on record:
in flight, backing off, or waiting for the disk."""
SMALL = [
    *("--data.train", str(TRAIN), "--data.val", str(VAL), "--data.test", str(TEST)),
    *(
        "--propagate.fit.steps",
        "24",
        "--distill.fit.steps",
        "24",
        "--distill.burn-up",
        "8",
    ),
    *("--propagate.fit.checkpoint-every", "3", "--distill.fit.checkpoint-every", "3"),
    *(
        "--cloud.in-flight",
        str(IN_FLIGHT),
        "--cloud.serve-faults",
        "0.1",
        "--collect.batch",
        "8",
    ),
]
TABLES = (
    "collect-*/cloud",
    "collect-*/clip_labels",
    "separate-*/clip_detector",
    "evaluate-*/predictions/student",
)
WEIGHTS = ("propagate-*/detector.pt", "distill-*/detector.pt", "distill-*/teacher.pt")


def rows(root: Path, pattern: str, columns: list[str]) -> list[dict[str, object]]:
    (path,) = root.glob(pattern)
    found: list[dict[str, object]] = pq.read_table(path, columns=columns).to_pylist()
    return found


def calls(root: Path) -> list[dict[str, object]]:
    """What the cloud was asked, retried faults included, by its own log: ``time``,
    ``key`` and ``image``."""
    log = root / "local_cloud" / "calls.jsonl"
    return (
        [json.loads(line) for line in log.read_text().splitlines()]
        if log.exists()
        else []
    )


def asked(root: Path) -> Counter[str]:
    """How often the cloud was asked about each image."""
    return Counter(str(call["image"]) for call in calls(root))


def assert_same_results(root: Path, reference: Path) -> None:
    """Figures, tables and weights to the bit."""
    summary, expected = (
        json.loads((r / "summary.json").read_text()) for r in (root, reference)
    )
    for figure in ("map50", "map50_unknown", "per_class", "separation"):
        assert summary[figure] == expected[figure], figure
    found = ["image_id", "boxes", "scores", "labels", "probs"]
    for table in TABLES:
        pattern = f"steps/{table}.parquet"
        assert rows(root, pattern, found) == rows(reference, pattern, found), table
    for weights in WEIGHTS:
        ours, theirs = (
            torch.load(next(r.glob(f"steps/{weights}")), weights_only=True)
            for r in (root, reference)
        )
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs), (
            f"{weights} differs to the bit"
        )


@dataclass(frozen=True)
class Kill:
    """``moment`` of a kill, and the journal's keys of what was ``answered`` before it."""

    moment: float
    answered: frozenset[str]

    @classmethod
    def now(cls, root: Path) -> Kill:
        """Read at once: what the killed run leaves behind may still finish a call or
        two."""
        journal = open_journal(journal_uri(str(root)))
        keys = journal.keys()
        answered = frozenset(
            key for key in keys if not key.endswith(TASK) and _readable(journal, key)
        )
        journal.close()
        return cls(time.time(), answered)

    def repeated(self, root: Path) -> list[str]:
        """Keys asked about before and after the kill. Raises AssertionError if one of
        them had an answer."""
        before, after = (
            {
                str(c["key"])
                for c in calls(root)
                if (float(str(c["time"])) <= self.moment) == b
            }
            for b in (True, False)
        )
        assert not after & self.answered, (
            "a paid answer that is on record must never be paid again"
        )
        assert len(before & after) <= AT_HAND, (
            "only calls under way when the run was killed may be made again"
        )
        return sorted(before & after)


def _readable(journal: Journal, key: str) -> bool:
    """Not one of the cloud's truncated bodies, which are kept too, until they are found
    to be no answer."""
    record = journal.get(key)
    try:
        return record is not None and json.loads(record.body) is not None
    except ValueError:
        return False
