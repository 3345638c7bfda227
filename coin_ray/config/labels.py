"""Settings of what is collected, and of what of it is used in training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from coin_ray.config.fields import check, check_fraction, new_field, runtime_only


@dataclass(frozen=True)
class Collect:
    """Cloud answers and the second opinion on their boxes."""

    labeler: Literal["roi", "crop", "none"] = "roi"
    """CLIP on RoI features of the whole image (one pass) as published, on crops
    (slower, and right more often), or no CLIP at all."""
    crop_context: float = 1.2
    """labeler crop: side of what is cut out / side of the box; a little of the
    surroundings helps CLIP (docs/demo.md)."""
    fuse_iou: float = 0.6
    """Cloud boxes of one class overlapping more are merged, weighted by score."""
    batch: int = runtime_only(32)
    """Images per block of the stream."""
    labeler_gpus: float = runtime_only(0.0)
    """GPUs per CLIP labeler; a fraction lets several share one."""
    batch_seconds: float = runtime_only(3600.0)
    """Time for one batch after which a labeler counts as hanging and ends itself; 0:
    never."""
    stalled_after: float = runtime_only(90_000.0)
    """Seconds without any result after which collection ends itself; a quota may come
    back after a day. 0: never."""

    def __post_init__(self) -> None:
        check_fraction("collect.fuse_iou", self.fuse_iou)
        check(
            self.crop_context >= 1,
            f"collect.crop_context must be at least 1; got {self.crop_context}",
        )
        check(self.batch > 0, "collect.batch must be positive")


@dataclass(frozen=True)
class Labels:
    """What of the collected results is used in training. Changing it costs no call."""

    score_min: float = 0.25
    """Cloud boxes below this score are not used."""
    probabilities: Literal["background", "published"] = "published"
    """Cloud class vectors with a background column, or normalised to the foreground as
    published."""
    cloud_vectors: Literal["collected", "normalised", "smoothed", "one_hot"] = (
        new_field("collected")
    )
    """In separation the cloud's results are as collected, or in a published form: class
    vector without background and its best entry as the score (Grounding DINO), label
    and score with the rest shared by the other classes (GLIP), or the label alone with
    score 1.
    """
    clip_background: Literal["drop", "keep"] = "drop"
    """Boxes that CLIP calls background: left out of propagation as published, or used
    with CLIP's best class."""
    clip_score_min: float = 0.0
    """CLIP labels below this probability are not used in propagation."""

    def __post_init__(self) -> None:
        check_fraction("labels.score_min", self.score_min)
        check_fraction("labels.clip_score_min", self.clip_score_min)
