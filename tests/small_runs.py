"""A run of the demo that is small but has all of its parts, and what tells whether two of them came to the same."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import torch

TRAIN, VAL, TEST = 48, 4, 20
IMAGES = TRAIN + TEST
IN_FLIGHT = 8
SMALL = [
    *("--data.train", str(TRAIN), "--data.val", str(VAL), "--data.test", str(TEST)),
    *("--propagate.fit.steps", "24", "--distill.fit.steps", "24", "--distill.burn-up", "8"),
    *("--propagate.fit.checkpoint-every", "3", "--distill.fit.checkpoint-every", "3"),
    *("--cloud.in-flight", str(IN_FLIGHT), "--cloud.serve-faults", "0.1", "--collect.batch", "8"),
]
TABLES = ("collect-*/cloud", "collect-*/clip_labels", "separate-*/clip_detector", "evaluate-*/predictions/student")
WEIGHTS = ("propagate-*/detector.pt", "distill-*/detector.pt", "distill-*/teacher.pt")


def rows(root: Path, pattern: str, columns: list[str]) -> list[dict[str, object]]:
    (path,) = root.glob(pattern)
    found: list[dict[str, object]] = pq.read_table(path, columns=columns).to_pylist()
    return found


def asked(root: Path) -> Counter[str]:
    """How often the cloud was asked about each image, retried faults included, by its own log."""
    lines = (root / "local_cloud" / "calls.jsonl").read_text().splitlines()
    return Counter(json.loads(line)["image"] for line in lines)


def assert_same_results(root: Path, reference: Path) -> None:
    """Figures, tables and weights to the bit."""
    summary, expected = (json.loads((r / "summary.json").read_text()) for r in (root, reference))
    for figure in ("map50", "map50_unknown", "per_class", "separation"):
        assert summary[figure] == expected[figure], figure
    found = ["image_id", "boxes", "scores", "labels", "probs"]
    for table in TABLES:
        pattern = f"steps/{table}.parquet"
        assert rows(root, pattern, found) == rows(reference, pattern, found), table
    for weights in WEIGHTS:
        ours, theirs = (torch.load(next(r.glob(f"steps/{weights}")), weights_only=True) for r in (root, reference))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs), f"{weights} differs to the bit"


def repeated_calls(root: Path, reference: Path) -> list[str]:
    """Images asked about more often than in the undisturbed run."""
    ours, theirs = asked(root), asked(reference)
    assert set(ours) == set(theirs)
    return [image for image, times in ours.items() if times > theirs[image]]
