"""The figures of one run: the contents of ``summary.json``."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from pydantic import TypeAdapter

SUMMARY_FILE = "summary.json"
Share = float
"""A fraction in 0..1."""
ScoreByMethod = Mapping[str, Share | None]
"""Method keys are those of ``coin_ray.report.methods``; None: could not be computed."""


@dataclass(frozen=True)
class CallCounts:
    """Cloud calls of the collection; None where unknown."""

    made: int | None = None
    cached: int | None = None
    """Images whose response the journal held."""
    failed: int | None = None
    maybe_billed: int | None = None
    """Calls that were sent and have no answer on record; part of the cost."""
    cost_usd: float | None = None
    root_calls: int | None = None
    """Calls of all runs below the root."""
    root_usd: float | None = None


@dataclass(frozen=True)
class Interval:
    """Bounds of a 95 % bootstrap interval; None where it could not be computed."""

    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class BestThreshold:
    """Precision and recall at the score threshold with the best F1."""

    score: Share
    precision: Share
    recall: Share
    f1: Share


@dataclass(frozen=True)
class CkgSide:
    """Disagreements that CKG decides for one side: their share, and how many rightly."""

    share: Share | None = None
    right: Share | None = None


@dataclass(frozen=True)
class KeptBoxes:
    """Cloud boxes on training images: all, and those above the score threshold."""

    boxes: int | None = None
    used: int | None = None


@dataclass(frozen=True)
class TeacherMistakes:
    """A teacher's labels on the images that people corrected."""

    boxes: int
    wrong: int
    missed: int
    images: int
    """Images with a wrong box or a missed object."""


@dataclass(frozen=True)
class CorrectionCounts:
    """Training images that people labelled, and the teachers' mistakes on them."""

    images: int = 0
    boxes: int = 0
    empty: int = 0
    """Images without any object."""
    teachers: Mapping[str, TeacherMistakes] = field(default_factory=dict)


@dataclass(frozen=True)
class SearchLink:
    """A search one of whose trials has the run's settings."""

    name: str
    trial: int
    trials: int
    link: str


@dataclass(frozen=True)
class Hardware:
    """The machine that wrote the report."""

    cpus: int
    memory_gib: float
    gpu: str
    system: str


@dataclass(frozen=True)
class ModelSize:
    """The exported student."""

    parameters: int | None = None
    bytes: int | None = None


@dataclass(frozen=True)
class DeepImages:
    """Grey images with more than 8 bits. ``range``: the values that became black and
    white; None: each image's own. ``outside``: images with no value in the range.
    """

    images: int
    range: tuple[float, float] | None = None
    outside: int = 0


@dataclass(frozen=True)
class StudentChoice:
    """Which of several trained students is delivered, judged without labels. ``scores``
    by candidate: mAP50 on the boxes on which both teachers agree.
    """

    winner: str
    scores: Mapping[str, Share] = field(default_factory=dict)
    reason: str = ""


@dataclass(frozen=True)
class RunSummary:
    """The figures of a run; those of steps that were not run are empty or None."""

    preset: str = ""
    seed: int | None = None
    classes: tuple[str, ...] = ()
    images: Mapping[str, int] = field(default_factory=dict)
    """Images by split: train, val, test."""
    rejected: int = 0
    """Image files that could not be read."""
    in_both: int = 0
    """Test images that are training images too."""
    map50: ScoreByMethod = field(default_factory=dict)
    gap_closed: float | None = None
    """(student - cloud) / (oracle - cloud) in mAP50."""
    separation: Mapping[str, int] = field(default_factory=dict)
    """Boxes by kind: consistent, inconsistent, private."""
    calls: CallCounts = field(default_factory=CallCounts)
    seconds: Mapping[str, float] = field(default_factory=dict)
    """Wall-clock seconds by step, and their "total"."""
    versions: Mapping[str, str] = field(default_factory=dict)
    map50_unknown: ScoreByMethod | None = None
    """mAP50 on objects that neither teacher knows (demo)."""
    coco_map50: ScoreByMethod | None = None
    per_class: Mapping[str, tuple[Share | None, ...]] | None = None
    """AP50 of each class by method."""
    knowledge: Mapping[str, Mapping[str, Share]] | None = None
    """How often each kind of training box has the right class, by kind."""
    note: str | None = None
    map50_interval: Mapping[str, Interval] | None = None
    vs_cloud_interval: Mapping[str, Interval] | None = None
    class_change_interval: tuple[tuple[float | None, float | None], ...] | None = None
    """Bounds of the student's change against the cloud, by class."""
    truth_boxes: tuple[int, ...] | None = None
    """Annotated test boxes by class."""
    operating: Mapping[str, BestThreshold] | None = None
    calibration_error: Mapping[str, Share | None] | None = None
    ckg_sides: Mapping[str, CkgSide] | None = None
    kept: KeptBoxes | None = None
    corrections: CorrectionCounts | None = None
    sweeps: tuple[SearchLink, ...] | None = None
    hardware: Hardware | None = None
    page: str | None = None
    """Path or URI of the report."""
    model: ModelSize | None = None
    choice: StudentChoice | None = None
    intensity: DeepImages | None = None

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> RunSummary:
        """Read the contents of a ``summary.json``; unknown keys are ignored."""
        present = {name: v for name, v in values.items() if v is not None}
        return _summary_adapter().validate_python(present)

    def to_json(self) -> dict[str, Any]:
        """Return the contents of ``summary.json``, without fields that are None."""
        values = dataclasses.asdict(self, dict_factory=_without_none)
        return values | {"gap_closed": self.gap_closed}


def read_summary(root: str) -> RunSummary | None:
    """Read ROOT/summary.json; return None if there is none."""
    # imported here since it imports pyarrow, which printing a summary does not need
    from coin_ray import storage

    file = storage.join(root, SUMMARY_FILE)
    return (
        RunSummary.from_json(storage.read_json(file)) if storage.exists(file) else None
    )


@cache
def _summary_adapter() -> TypeAdapter[RunSummary]:
    return TypeAdapter(RunSummary)


def _without_none(fields: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    return {name: value for name, value in fields if value is not None}
