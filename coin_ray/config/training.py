"""Settings of the trainings, of the separation and of the evaluation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from coin_ray.config.co_detr import CoDetr
from coin_ray.config.fields import check, check_fraction, runtime_only


@dataclass(frozen=True)
class TrainingConfig:
    """One fit: steps, batch and learning rates."""

    steps: int = 50_000
    batch: int = 3
    """Global batch: images per step over all workers."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: float = 1e-3
    visual_lr_factor: float = 0.1
    weight_decay: float = 1e-4
    warmup: int = 400
    schedule: Literal["piecewise", "cosine"] = "piecewise"
    milestones: tuple[int, ...] = (40_000,)
    factors: tuple[float, ...] = (0.1,)
    """Learning-rate factor from each milestone on, absolute: it may rise again."""
    clip_gradient: float | None = None
    augmentation: float = 1.0
    """Strength of the strong view's colour changes; 1 is the published one, 0 leaves
    only the mirror."""
    group_aspects: bool = False
    """Steps see images of one orientation, wide or high, which saves padding in mixed
    sets. Another order of the images."""
    checkpoint_every: int = runtime_only(1000)
    validate_every: int = runtime_only(0)
    """Steps between looks at the labelled validation images (mAP50, at a saved state,
    by a task beside the training); 0: none."""
    stalled_after: float = runtime_only(3600.0)
    """Seconds without a logged or saved step after which a worker counts as hanging and
    ends itself; 0: never."""
    workers: int = runtime_only(1)
    max_workers: int | None = runtime_only(None)
    """On a cluster, the most workers: as many train as it has room for, at least
    ``workers``. None: always ``workers``."""
    gpu: bool = runtime_only(False)
    """One GPU per worker. Written for CUDA and NCCL, not yet run on either."""
    amp: bool = False
    """Forward passes in bfloat16; losses and box arithmetic stay in float32."""

    def __post_init__(self) -> None:
        check(
            self.steps > 0 and self.batch > 0 and self.checkpoint_every > 0,
            "steps, batch and checkpoint_every must be positive",
        )
        check(
            self.validate_every >= 0,
            "validate_every must be a number of steps, or 0 for no look; got"
            f" {self.validate_every}",
        )
        check(
            self.batch % max(self.workers, 1) == 0,
            f"batch {self.batch} must be a multiple of workers {self.workers}",
        )
        check(
            self.max_workers is None or self.workers <= self.max_workers <= self.batch,
            f"max_workers must lie between workers ({self.workers}) and batch"
            f" ({self.batch}): each has an image; got {self.max_workers}",
        )
        check(
            len(self.milestones) == len(self.factors),
            "milestones and factors must have the same length",
        )


@dataclass(frozen=True)
class Propagate:
    """Knowledge dissemination: the CLIP detector learns cloud boxes with CLIP labels
    (paper section 3.2).
    """

    fit: TrainingConfig = field(default_factory=TrainingConfig)
    alignment: float = 10.0
    """Weight of prompt alignment to prototypes [lambda]."""
    prototype_rate: float = 0.0004
    """Share of the new batch mean in a prototype [1 - eta]."""
    prototypes_from: int = 5000
    """Step from which prototypes move."""
    views: Literal["strong", "both"] = "both"
    """Published: the weak view is trained too."""
    soft_labels: bool = False
    """Learn CLIP's probabilities, "background" included (with ``labels.clip_background:
    keep``), instead of its best name as published."""


@dataclass(frozen=True)
class Separate:
    """Matching of cloud and CLIP-detector results (paper section 3.3)."""

    iou_min: float = 0.5
    """[kappa]"""
    clip_score_min: float = 0.05
    """CLIP-detector results below are not used."""
    fused_boxes: Literal["always", "after_burn_up", "never"] = "after_burn_up"
    """Whether a pair's box is the score-weighted mean or the cloud's. Published code:
    after the burn-up."""
    clip_labels: bool = False
    """CLIP's own verdicts on the cloud's boxes, "background" included, stand beside the
    CLIP detector's results. Published: they only teach the CLIP detector.
    """
    lone_clip_score: float = 0.8
    """If the cloud saw nothing in an image, CLIP-detector results above this count as
    consistent."""
    lone_cloud_consistent: bool = True
    """If the CLIP detector saw nothing in an image, all cloud results count as
    consistent."""

    def __post_init__(self) -> None:
        check_fraction("separate.iou_min", self.iou_min)


StudentKind = Literal["faster-rcnn", "co-detr"]


FusionRule = Literal[
    "ckg", "average", "score_weighted", "product", "dawid_skene", "cloud", "clip"
]


@dataclass(frozen=True)
class Distill:
    """Knowledge separation and distillation into the target detector (paper sections
    3.3, 3.4).
    """

    student: StudentKind = "faster-rcnn"
    """Network of the target detector, and of the baselines. Published: the CLIP
    detector's, a Faster R-CNN. ``--student`` also sets a training that fits it.
    """
    co_detr: CoDetr = field(
        default_factory=lambda: CoDetr(auxiliary=("rcnn",), roi_boxes="agnostic")
    )
    """Size and weights of a Co-DETR student; backbone, views, temperature and
    background are those of ``detector``. ``auxiliary``: rcnn [K = 1], or rcnn and atss
    [K = 2], which learns consistent boxes alone.
    """
    co_detr_classes: Literal["text", "linear"] = "text"
    """The decoder compares queries with the class embeddings, or has a linear
    classifier. The auxiliary head always compares."""
    co_detr_detects: Literal["decoder", "regions"] = field(
        default="decoder", metadata={"identity": False}
    )
    """How a Co-DETR student is deployed. decoder: the base alone, as published.
    regions: with its auxiliary head, which names the decoder's boxes and its own
    proposals; after a short training the decoder still puts several queries on one
    object.
    """
    fit: TrainingConfig = field(
        default_factory=lambda: TrainingConfig(
            steps=65_000, milestones=(40_000, 45_000, 60_000), factors=(0.1, 0.5, 0.1)
        )
    )
    start_from: Literal["clip", "clip_detector"] = "clip"
    """Student's first weights. Published: CLIP, everything else random."""
    alignment: float = 10.0
    """[lambda]"""
    consistent: float = 1.0
    """Weight of what is learned as ground truth: consistent boxes and background.
    Published: 1."""
    inconsistent: float = 0.1
    """[gamma 1]"""
    inconsistent_mean: Literal["elements", "regions"] = "elements"
    """Divergence of inconsistent boxes over all R x (K+1) elements as published, or
    over RoIs, so that each counts as much as a consistent one."""
    private: float = 0.1
    """[gamma 2]"""
    fusion_score_min: float = 0.7
    """A fused inconsistent box teaches only if its best probability reaches this [pi].
    """
    fusion_share: float | None = None
    """If given, pi is a quantile of each step: the surest share of its inconsistent
    boxes teaches, whatever the fusion's scale."""
    prototype_rate: float = 0.0004
    prototypes_from: int = 5000
    """Step from which prototypes move and CKG trains."""
    burn_up: int = 45_000
    """Step from which the teacher follows the student and inconsistent boxes teach."""
    inconsistent_from: int | None = None
    """Step from which inconsistent boxes teach their class, if not from the burn-up on,
    as published."""
    teacher_rate: float = 0.0004
    """Share of the student in the teacher per step [1 - eta]."""
    ckg_first: bool = True
    """CKG takes its step before its output teaches, as in the paper. Published code:
    what it said before the step teaches."""
    ckg_heads: int = 8
    ckg_lr: float = 1e-3
    ckg_background: bool = False
    """CKG also learns to name background RoIs, where both teachers see nothing.
    Published: only consistent ones, so it never says background."""
    fusion: FusionRule = "ckg"
    """What supervises inconsistent boxes: CKG, one teacher alone, or a rule
    (coin_ray/fusion/rules.py)."""

    def __post_init__(self) -> None:
        check(
            self.fusion in get_args(FusionRule),
            f"distill.fusion must be one of {', '.join(get_args(FusionRule))}; got"
            f" {self.fusion!r}",
        )
        share = self.fusion_share
        network = self.co_detr
        describes = (
            "rcnn" in network.auxiliary
            and network.auxiliary_losses
            and network.roi_boxes == "agnostic"
        )
        check(
            self.student != "co-detr" or (describes and not network.denoising),
            "a Co-DETR student describes boxes by its Faster R-CNN head, and learns no"
            " noisy objects: distill.co_detr needs auxiliary rcnn, its losses, agnostic"
            " roi_boxes and denoising 0",
        )
        check(
            share is None or 0 < share <= 1,
            f"distill.fusion_share must lie in 0..1, and above 0; got {share}",
        )


@dataclass(frozen=True)
class Evaluate:
    """How detections are judged: VOC average precision, area under the curve, IoU above
    .5.
    """

    plus_one: bool = False
    """A box is ``right - left + 1`` pixels wide, as in the paper's evaluation. It
    matters for small boxes only."""
