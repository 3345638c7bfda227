"""Settings of Co-DETR. Defaults are the published ones for ResNet-50 (arXiv
2211.12860). Symbols in brackets are the paper's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from coin_ray.config.fields import require

AuxiliaryHead = Literal["rcnn", "atss"]
BASE_COUNTS = (
    "width",
    "heads",
    "levels",
    "points",
    "feedforward",
    "encoder_layers",
    "decoder_layers",
    "queries",
    "detections",
)
PROPOSAL_COUNTS = (
    "max_positives",
    "atss_candidates",
    "rpn_samples",
    "proposals_per_level",
    "proposals",
)
WEIGHTS = ("query_weight", "auxiliary_weight", "denoising", "denoising_boxes")
REGION_COUNTS = ("roi_samples", "roi_size", "roi_width")


@dataclass(frozen=True)
class Backbone:
    """The visual tower, its weights, and the stages that are not trained."""

    name: str = "resnet50"
    """``tiny``, a ResNet or Swin of torchvision (``resnet50``, ``swin_t``),
    ``open_clip:RN50`` (or the path of a model's JSON), or ``transformers:NAME`` for a
    backbone on the Hugging Face hub, or its folder.
    """
    weights: str = ""
    """torchvision's or open_clip's name (downloaded), or the path of a file;
    transformers: the name or folder again. Empty: random."""
    frozen_stages: int = 1
    """ResNet and open_clip: stages after the stem that are not trained, and the stem;
    -1: all stages are trained. Statistics of norms are always fixed."""


@dataclass(frozen=True)
class CoDetr:
    """The base detector, its auxiliary heads, and the weight of each part of the
    objective.
    """

    width: int = 256
    """Channels of tokens and queries [d]."""
    heads: int = 8
    levels: int = 4
    """Maps the encoder works on, strides 8, 16, 32, ...; those beyond the backbone's
    come from strided convolutions."""
    points: int = 4
    """Sampling points per head and level."""
    feedforward: int = 2048
    encoder_layers: int = 6
    decoder_layers: int = 6
    queries: int = 300
    mixed_selection: bool = True
    """Queries have a learned content; otherwise the embedding of their proposal."""
    look_forward_twice: bool = True
    """A layer's box loss also trains the box branch of the layer before."""
    auxiliary: tuple[AuxiliaryHead, ...] = ("rcnn", "atss")
    """Auxiliary heads on the encoder's pyramid [K of them]. Empty: the base alone."""
    auxiliary_losses: bool = True
    """Train the auxiliary heads, and through them the encoder."""
    positive_queries: bool = True
    """Add the auxiliary heads' positives as extra queries of the decoder."""
    denoising: int = 0
    """Positive and negative queries per image from noisy objects, about this many of
    each (contrastive denoising, DINO). 0: none, as in Co-Deformable-DETR; Co-DINO: 100.
    """
    denoising_labels: float = 0.5
    """Half of this share of the noisy objects gets a random class."""
    denoising_boxes: float = 1.0
    """Corners move by up to this many half sides; those of negative queries by one to
    two times as much."""
    query_weight: float = 1.0
    """[lambda 1]"""
    auxiliary_weight: float = 2.0
    """[lambda 2]"""
    max_positives: int = 300
    """Positive queries per image and head; more are subsampled."""
    atss_candidates: int = 9
    """Closest anchors per level and object that ATSS considers."""
    rpn_samples: int = 256
    proposals_per_level: int = 4000
    proposals: int = 1000
    rpn_nms: float = 0.7
    roi_samples: int = 512
    roi_positive: float = 0.25
    roi_size: int = 7
    roi_sampling: int = 0
    """Samples per side of a RoIAlign bin; 0: as many as the box has pixels."""
    roi_width: int = 1024
    roi_boxes: Literal["per_class", "agnostic"] = "per_class"
    checkpoint_layers: bool = False
    """Recompute the encoder's layers in the backward pass (gradient checkpointing): less
    memory, more time."""
    detections: int = 100
    score_min: float = 0.0
    """Queries with lower scores are not detections."""

    def __post_init__(self) -> None:
        for name in BASE_COUNTS + PROPOSAL_COUNTS + REGION_COUNTS:
            require(
                getattr(self, name) > 0,
                f"co_detr.{name} must be positive; got {getattr(self, name)}",
            )
        require(
            self.width % 4 == 0,
            f"co_detr.width must be a multiple of 4 (sine positions); got {self.width}",
        )
        require(
            self.width % self.heads == 0,
            f"co_detr.width {self.width} must be a multiple of co_detr.heads"
            f" {self.heads}",
        )
        require(
            3 <= self.levels <= 5,
            "co_detr.levels must lie in 3..5, since proposals double in size with each"
            f" level; got {self.levels}",
        )
        heads = get_args(AuxiliaryHead)
        require(
            set(self.auxiliary) <= set(heads),
            f"co_detr.auxiliary can hold {', '.join(heads)}; got"
            f" {', '.join(self.auxiliary)}",
        )
        require(
            len(set(self.auxiliary)) == len(self.auxiliary),
            f"co_detr.auxiliary names a head twice: {', '.join(self.auxiliary)}",
        )
        for name in WEIGHTS:
            weight = getattr(self, name)
            require(
                0 <= weight < float("inf"),
                f"co_detr.{name} must be finite and not negative; got {weight}",
            )
        for name in ("rpn_nms", "roi_positive", "score_min", "denoising_labels"):
            require(
                0 <= getattr(self, name) <= 1,
                f"co_detr.{name} must lie in 0..1; got {getattr(self, name)}",
            )


def tiny(**changes: Any) -> CoDetr:
    """Return a network that trains on a CPU, for images of about 128 pixels.

    ``changes``: other settings by name.
    """
    tiny_network = CoDetr(
        width=64,
        heads=4,
        points=2,
        feedforward=128,
        encoder_layers=2,
        decoder_layers=2,
        queries=30,
        max_positives=24,
        rpn_samples=64,
        proposals_per_level=100,
        proposals=50,
        roi_samples=32,
        roi_size=5,
        roi_sampling=1,
        roi_width=128,
    )
    return replace(tiny_network, **changes)
