"""Settings of the collection, and of the collected labels that training uses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from coin_ray.config.fields import check_fraction, new_field, require, runtime_only


@dataclass(frozen=True)
class Collect:
    """The collection: cloud detections, and the labeler's labels for their boxes."""

    labeler: Literal["roi", "crop", "classifier", "none"] = "roi"
    """CLIP on RoI features of the whole image (one pass) as published, CLIP on crops
    (slower and more accurate), an image classifier on crops, or no second opinion. The
    model: settings ``labeler``."""
    crop_context: float = 1.2
    """labeler crop and classifier: side of the crop / side of the box; a little context
    helps CLIP (docs/demo-trials.md)."""
    fuse_batch_norms: bool = runtime_only(False)
    """labeler crop with a CLIP ResNet: encode the crops of several images at once, with
    batch norms folded into the convolutions. Half the time on a CPU; probabilities
    differ by rounding, at most 2e-5."""
    fuse_iou: float = 0.6
    """Cloud boxes of one class with a higher IoU are merged, weighted by score."""
    batch: int = runtime_only(32)
    """Images per block of the stream."""
    actors: int | Literal["auto"] = runtime_only("auto")
    """Processes that ask the clouds; all share the limits of ``cloud``. auto: one, unless
    the limits and the CPUs keep more of them busy."""
    labelers: int | Literal["auto"] = runtime_only("auto")
    """Processes that give second opinions, at most; on a cluster they follow its nodes.
    auto: one with a GPU, otherwise as many as the CPUs of all nodes without GPUs that
    may join (docs/cluster.md)."""
    labeler_gpus: float = runtime_only(0.0)
    """GPUs per labeler; a fraction lets several share one."""
    batch_seconds: float = runtime_only(3600.0)
    """Seconds for one batch after which a labeler counts as hanging and exits; 0:
    never."""
    retry_refused: bool = runtime_only(False)
    """Ask again also about images that the service refused. Other failed images are
    always asked again by the same command."""
    stalled_after: float = runtime_only(90_000.0)
    """Seconds without any progress after which the collection exits; a quota may take a
    day to renew. 0: never."""

    def __post_init__(self) -> None:
        check_fraction("collect.fuse_iou", self.fuse_iou)
        require(
            self.crop_context >= 1,
            f"collect.crop_context must be at least 1; got {self.crop_context}",
        )
        require(self.batch > 0, f"collect.batch must be positive; got {self.batch}")
        require(
            self.actors == "auto" or self.actors > 0,
            f"collect.actors must be positive, or auto; got {self.actors}",
        )
        require(
            self.labelers == "auto" or self.labelers > 0,
            f"collect.labelers must be positive, or auto; got {self.labelers}",
        )


@dataclass(frozen=True)
class Labels:
    """The collected labels that training uses. Changing these settings costs no call."""

    score_min: float = 0.25
    """Cloud boxes with lower scores are not used."""
    class_score_min: tuple[float | None, ...] = new_field(())
    """The same for each class, in their order; None: ``score_min``. Empty: ``score_min``
    for all. On the command line: in ``--classes FILE.yaml``."""
    probabilities: Literal["background", "published"] = "published"
    """Cloud class vectors with a background column, or normalised to the foreground as
    published."""
    cloud_vectors: Literal["collected", "normalised", "smoothed", "one_hot"] = (
        new_field("collected")
    )
    """Cloud class vectors in the separation: as collected, or in a published form.
    ``normalised``: without background, the largest entry is the score (Grounding DINO).
    ``smoothed``: label and score, the rest spread over the other classes (GLIP).
    ``one_hot``: the label alone with score 1.
    """
    clip_background: Literal["drop", "keep"] = "drop"
    """Boxes that CLIP calls background: dropped from propagation as published, or kept
    with CLIP's best class."""
    clip_score_min: float = 0.0
    """CLIP labels with lower probabilities are not used in propagation."""

    def __post_init__(self) -> None:
        check_fraction("labels.score_min", self.score_min)
        for score_min in self.class_score_min:
            check_fraction("labels.class_score_min", score_min or 0.0)
        check_fraction("labels.clip_score_min", self.clip_score_min)

    def thresholds(self, num_classes: int) -> list[float] | None:
        """Return the least score of each class; None: ``score_min`` for all."""
        if len(self.class_score_min) != num_classes:
            return None
        return [
            self.score_min if score_min is None else score_min
            for score_min in self.class_score_min
        ]
