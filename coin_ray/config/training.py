"""Settings of the trainings, of the separation and of the evaluation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from coin_ray.config.co_detr import CoDetr
from coin_ray.config.fields import check_fraction, new_field, require, runtime_only
from coin_ray.config.students import (
    YOLOX_STUDENTS,
    TargetSettings,
    check_student_name,
    is_region_student,
)


@dataclass(frozen=True)
class TrainingConfig:
    """One training: steps, batch and learning rates."""

    steps: int = 50_000
    batch: int = 3
    """Global batch: images per step over all workers."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: float = 1e-3
    visual_lr_factor: float = 0.1
    """Learning-rate factor of the visual tower."""
    weight_decay: float = 1e-4
    warmup: int = 400
    schedule: Literal["piecewise", "cosine"] = "piecewise"
    milestones: tuple[int, ...] = (40_000,)
    factors: tuple[float, ...] = (0.1,)
    """Learning-rate factor from each milestone on, absolute: it may rise again."""
    clip_gradient: float | None = None
    """Maximum norm of the gradient. None: not clipped."""
    augmentation: float = 1.0
    """Strength of the strong augmentation's colour changes; 1: as published, 0: only
    mirroring."""
    group_aspects: bool = False
    """Batches of images of one orientation, wide or high, which saves padding in mixed
    sets. It changes the order of the images."""
    checkpoint_every: int = runtime_only(1000)
    """Steps between checkpoints."""
    validate_every: int = runtime_only(0)
    """Steps between validations (mAP50 of a checkpoint on the labelled validation
    images, in a task beside the training); 0: none."""
    stalled_after: float = runtime_only(3600.0)
    """Seconds without a logged step or a checkpoint after which a worker counts as
    hanging and exits; 0: never."""
    workers: int = runtime_only(1)
    max_workers: int | None = runtime_only(None)
    """On a cluster, the most workers: as many as it has resources for, at least
    ``workers``. None: always ``workers``."""
    gpu: bool = runtime_only(False)
    """One GPU per worker. Written for CUDA and NCCL, not yet run on either."""
    amp: bool = False
    """Forward passes in bfloat16; losses and box arithmetic stay in float32."""

    def __post_init__(self) -> None:
        for setting in ("steps", "batch", "checkpoint_every"):
            number = getattr(self, setting)
            require(number > 0, f"fit.{setting} must be positive; got {number}")
        require(
            self.validate_every >= 0,
            "fit.validate_every must be a number of steps, or 0 for no validation; got"
            f" {self.validate_every}",
        )
        require(
            self.batch % max(self.workers, 1) == 0,
            f"fit.batch {self.batch} must be a multiple of fit.workers {self.workers}",
        )
        require(
            self.max_workers is None or self.workers <= self.max_workers <= self.batch,
            f"fit.max_workers must lie between fit.workers ({self.workers}) and"
            f" fit.batch ({self.batch}), since each worker needs an image; got"
            f" {self.max_workers}",
        )
        require(
            len(self.milestones) == len(self.factors),
            f"fit.milestones {self.milestones} and fit.factors {self.factors} must have"
            " the same length",
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
    """Step from which prototypes are updated."""
    views: Literal["strong", "both"] = "both"
    """Augmentations that are trained on. Published: the weak one too."""
    soft_labels: bool = False
    """Learn CLIP's probabilities, "background" included (with ``labels.clip_background:
    keep``), instead of its best class as published."""


@dataclass(frozen=True)
class Separate:
    """Matching of the detections of cloud and CLIP detector (paper section 3.3)."""

    iou_min: float = 0.5
    """[kappa]"""
    clip_score_min: float = 0.05
    """CLIP-detector boxes with lower scores are not used."""
    fused_boxes: Literal["always", "after_burn_up", "never"] = "after_burn_up"
    """When the box of a matched pair is the score-weighted mean; otherwise it is the
    cloud's. Published code: after the burn-up."""
    clip_labels: bool = False
    """Use CLIP's labels of the cloud's boxes, "background" included, in addition to the
    CLIP detector's boxes. Published: only to train the CLIP detector.
    """
    lone_clip_score: float = 0.8
    """If the cloud found nothing in an image, CLIP-detector boxes with higher scores
    count as consistent."""
    lone_cloud_consistent: bool = True
    """If the CLIP detector found nothing in an image, all cloud boxes count as
    consistent."""
    second_teacher: Literal["clip_detector", "student"] = new_field("clip_detector")
    """student: in the place of the CLIP detector, which is then not trained, a YOLOX
    student as it starts, in the rendering and at the sizes in which it is most
    confident. ``--student`` chooses it."""

    def __post_init__(self) -> None:
        check_fraction("separate.iou_min", self.iou_min)


FusionRule = Literal[
    "ckg", "average", "score_weighted", "product", "dawid_skene", "cloud", "clip"
]


@dataclass(frozen=True)
class Distill:
    """Knowledge separation and distillation into the target detector (paper sections
    3.3, 3.4).
    """

    student: str = "faster-rcnn"
    """Network of the target detector, and of the baselines. Published: the CLIP
    detector's, a Faster R-CNN. Or co-detr; or one that was a detector before and learns
    from ``targets`` (docs/students.md): yolox-nano, d-fine-n, hf:OWNER/NAME, ...
    ``--student`` also chooses matching training settings.
    """
    student_weights: str = new_field("")
    """First weights of a YOLOX student: a checkpoint (.pth) or an ONNX file. Empty: the
    official release, downloaded once."""
    student_weight_classes: tuple[str, ...] = new_field(())
    """Class names of ``student_weights`` in their order. Empty: COCO's 80."""
    student_side: int = new_field(0)
    """Longest side in pixels of the input of such a student; 0: as released."""
    student_rendering: Literal["plain", "grey", "inverted", "auto"] = new_field("plain")
    """How a YOLOX student sees images, in training and in use. auto: the rendering in
    which its first weights are most confident on training images; needs
    ``separate.second_teacher`` student."""
    student_batch_norm: Literal["frozen", "live"] = new_field("frozen")
    """Statistics of its batch norms in training; frozen: as pretrained."""
    student_zoom: tuple[float, float] = new_field((1.0, 1.0))
    """Range of factors by which its training images are scaled at random: smaller ones
    lie on grey, larger ones are cropped."""
    region_head_weight: float = new_field(1.0)
    """Weight of the losses of the auxiliary region head by which a YOLOX student learns
    with ``fusion`` ckg. The student is delivered without that head."""
    targets: TargetSettings = field(
        default=TargetSettings(), metadata={"identity": "if changed"}
    )
    """What a separation teaches such a student."""
    co_detr: CoDetr = field(
        default_factory=lambda: CoDetr(auxiliary=("rcnn",), roi_boxes="agnostic")
    )
    """Size and loss weights of a Co-DETR student; its backbone, image size, temperature
    and background are those of ``detector``. ``auxiliary``: rcnn [K = 1], or rcnn and
    atss [K = 2], which learns consistent boxes only.
    """
    co_detr_classes: Literal["text", "linear"] = "text"
    """The decoder compares queries with the class embeddings, or has a linear
    classifier. The auxiliary head always compares."""
    co_detr_detects: Literal["decoder", "regions"] = field(
        default="decoder", metadata={"identity": False}
    )
    """How a Co-DETR student is deployed. decoder: the base alone, as published.
    regions: with its auxiliary head, which classifies the decoder's boxes and its own
    proposals; after a short training the decoder still has several queries for one
    object.
    """
    fit: TrainingConfig = field(
        default_factory=lambda: TrainingConfig(
            steps=65_000, milestones=(40_000, 45_000, 60_000), factors=(0.1, 0.5, 0.1)
        )
    )
    start_from: Literal["clip", "clip_detector"] = "clip"
    """Initial weights of the student. Published: CLIP, everything else random."""
    alignment: float = 10.0
    """[lambda]"""
    consistent: float = 1.0
    """Weight of the loss on consistent boxes and background. Published: 1."""
    inconsistent: float = 0.1
    """[gamma 1]"""
    inconsistent_mean: Literal["elements", "regions"] = "elements"
    """Divergence of inconsistent boxes averaged over all R x (K+1) elements as
    published, or over RoIs, so that each counts as much as a consistent one."""
    private: float = 0.1
    """[gamma 2]"""
    fusion_score_min: float = 0.7
    """Lowest best probability of a fused inconsistent box that is learned [pi]."""
    fusion_share: float | None = None
    """If given, pi is a quantile of each step: this share of its inconsistent boxes, the
    most confident ones, is learned, whatever the fusion's scale."""
    prototype_rate: float = 0.0004
    """Share of the new batch mean in a prototype [1 - eta]."""
    prototypes_from: int = 5000
    """Step from which prototypes are updated and CKG is trained."""
    burn_up: int = 45_000
    """Step from which the teacher is updated from the student and inconsistent boxes
    are learned."""
    inconsistent_from: int | None = None
    """Step from which the classes of inconsistent boxes are learned. None: the burn-up,
    as published."""
    teacher_rate: float = 0.0004
    """Share of the student in the teacher per step [1 - eta]."""
    ckg_first: bool = True
    """The student learns the output of CKG after its optimizer step, as in the paper.
    Published code: its output before the step."""
    ckg_heads: int = 8
    ckg_lr: float = 1e-3
    ckg_background: bool = False
    """Train CKG on background RoIs too, where both teachers found nothing. Published:
    on consistent ones only, so it never predicts background."""
    fusion: FusionRule = "ckg"
    """Labels of inconsistent boxes: CKG, one teacher alone, or a rule
    (coin_ray/fusion/rules.py)."""

    def __post_init__(self) -> None:
        rules = get_args(FusionRule)
        require(
            self.fusion in rules,
            f"distill.fusion must be one of {', '.join(rules)}; got {self.fusion!r}",
        )
        require(
            self.student != "co-detr" or self._describes_boxes(),
            "distill.student co-detr needs a Faster R-CNN head, and no denoising:"
            " distill.co_detr.auxiliary with rcnn, distill.co_detr.auxiliary_losses on,"
            " distill.co_detr.roi_boxes agnostic and distill.co_detr.denoising 0",
        )
        self._check_detector_student()
        share = self.fusion_share
        require(
            share is None or 0 < share <= 1,
            f"distill.fusion_share must lie in 0..1, and above 0; got {share}",
        )

    def _check_detector_student(self) -> None:
        """Check the settings of a student that learns from ``targets``."""
        check_student_name(self.student)
        if is_region_student(self.student):
            require(
                not self.student_weights,
                f"distill.student_weights is for YOLOX students; {self.student} starts"
                " from CLIP or the CLIP detector",
            )
            require(
                self.student_zoom == (1.0, 1.0),
                "distill.student_zoom is for students that were detectors before;"
                f" {self.student} sees images in one size",
            )
            return
        require(
            self.fusion != "ckg" or self.student in YOLOX_STUDENTS,
            f"distill.student {self.student} describes no given boxes, which CKG needs:"
            " give --distill.fusion average, or another rule, or a YOLOX student",
        )
        require(
            self.fusion != "ckg" or self.prototypes_from < self.fit.steps,
            "with distill.fusion ckg, distill.prototypes_from must be below"
            f" distill.fit.steps ({self.fit.steps}), or CKG is never trained; got"
            f" {self.prototypes_from}",
        )
        side = self.student_side
        require(
            side >= 0 and side % 32 == 0,
            f"distill.student_side must be a multiple of 32, or 0; got {side}",
        )
        lowest, highest = self.student_zoom
        require(
            0 < lowest <= highest <= 4,
            "distill.student_zoom must be the smallest and the largest factor, above 0"
            f" and at most 4; got {lowest} {highest}",
        )
        require(
            not self.student_weights.endswith(".onnx")
            or self.student_batch_norm == "frozen",
            "distill.student_weights of an ONNX file hold no statistics of batch norms:"
            " give --distill.student-batch-norm frozen, or a checkpoint (.pth)",
        )

    def _describes_boxes(self) -> bool:
        """Return whether the Co-DETR has a trained head that gives boxes class vectors."""
        network = self.co_detr
        has_head = "rcnn" in network.auxiliary and network.auxiliary_losses
        return has_head and network.roi_boxes == "agnostic" and not network.denoising


@dataclass(frozen=True)
class Evaluate:
    """The evaluation: VOC average precision, area under the curve, IoU above 0.5."""

    plus_one: bool = False
    """A box is ``right - left + 1`` pixels wide, as in the paper's evaluation. It
    matters for small boxes only."""
