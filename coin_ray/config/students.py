"""Students by name, and the settings of those that learn from ``Targets``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from coin_ray.config.fields import check_fraction, require

RegionStudent = Literal["faster-rcnn", "co-detr"]
"""Students that describe any given box, as the published method needs."""
YoloxName = Literal[
    "yolox-nano", "yolox-tiny", "yolox-s", "yolox-m", "yolox-l", "yolox-x"
]
TransformersName = Literal[
    "d-fine-n", "d-fine-s", "rt-detr-v2", "rf-detr-nano", "deimv2-n", "lw-detr-tiny"
]
REGION_STUDENTS: tuple[str, ...] = get_args(RegionStudent)
YOLOX_STUDENTS: tuple[str, ...] = get_args(YoloxName)
STUDENTS: tuple[str, ...] = (
    *REGION_STUDENTS,
    *YOLOX_STUDENTS,
    *get_args(TransformersName),
)
HUB_PREFIX = "hf:"
KindOfBox = Literal["learn", "ignore", "drop"]
"""What becomes of boxes of one kind: they are learned, they are regions without any
loss, or they are background."""


@dataclass(frozen=True)
class TargetSettings:
    """What a separation teaches a student that was a detector before
    (docs/students.md).
    """

    score_min: float = 0.1
    """Cloud boxes with lower scores are not used."""
    trust: Literal["soft", "hard", "ignore"] = "soft"
    """What becomes of boxes with scores below ``certain_score``. soft: they are learned
    with the weight score / certain_score. hard: they are background. ignore: they are
    regions without any loss. Boxes above it have the weight 1."""
    certain_score: float = 0.4
    pair_score: Literal["cloud", "either"] = "either"
    """Score of a box that both teachers found: the cloud's, or the probability that
    either is right, 1 - (1 - a)(1 - b)."""
    inconsistent: KindOfBox = "learn"
    """Boxes that both teachers found and name differently; they are learned with the
    names that ``distill.fusion`` gives."""
    private_cloud: KindOfBox = "learn"
    """Boxes that only the cloud found."""
    private_cloud_score: float = 0.0
    """Those with lower scores are background."""
    private_clip: KindOfBox = "drop"
    """Boxes that only the CLIP detector found."""
    private_clip_score: float = 0.8
    """Those with lower scores are background."""

    def __post_init__(self) -> None:
        for setting in (
            "score_min",
            "certain_score",
            "private_cloud_score",
            "private_clip_score",
        ):
            check_fraction(f"distill.targets.{setting}", getattr(self, setting))
        require(
            self.certain_score > 0,
            f"distill.targets.certain_score must be above 0; got {self.certain_score}",
        )


def is_region_student(name: str) -> bool:
    """Tell whether a student describes any given box, as the published method needs;
    the others learn from ``Targets``.
    """
    return name in REGION_STUDENTS


def check_student_name(name: str) -> None:
    """Raise ConfigError if ``name`` is neither a student's, ``hf:OWNER/NAME`` nor a
    path.
    """
    is_path = "/" in name or "\\" in name
    require(
        name in STUDENTS or is_path,
        f"distill.student must be one of {', '.join(STUDENTS)}, {HUB_PREFIX}OWNER/NAME"
        f" or the path of a transformers folder; got {name!r}",
    )
