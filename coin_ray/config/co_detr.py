"""Settings of Co-DETR. Defaults are the published ones for ResNet-50 (arXiv
2211.12860). Symbols in brackets are the paper's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from coin_ray.errors import ConfigError

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
REGION_COUNTS = ("roi_samples", "roi_size", "roi_width")


@dataclass(frozen=True)
class Backbone:
    """The visual tower, its weights, and what of it stays as it is."""

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
    -1: all is trained. Statistics of norms stay fixed."""


@dataclass(frozen=True)
class CoDetr:
    """The base detector, its auxiliary heads and how much each part of the objective
    counts.
    """

    width: int = 256
    """Channels of tokens and queries [d]."""
    heads: int = 8
    levels: int = 4
    """Maps the encoder works on, strides 8, 16, 32, ...; those beyond the backbone's
    are made by strided convolutions."""
    points: int = 4
    """Sampling points per head and level."""
    feedforward: int = 2048
    encoder_layers: int = 6
    decoder_layers: int = 6
    queries: int = 300
    mixed_selection: bool = True
    """Queries start from a learned content; otherwise from the embedding of their
    proposal."""
    look_forward_twice: bool = True
    """A layer's box loss also trains the box branch of the layer before."""
    auxiliary: tuple[AuxiliaryHead, ...] = ("rcnn", "atss")
    """Auxiliary heads on the encoder's pyramid [K of them]. Empty: the base alone."""
    auxiliary_losses: bool = True
    """Train the auxiliary heads, and through them the encoder."""
    positive_queries: bool = True
    """Replay the auxiliary heads' positives as extra queries of the decoder."""
    denoising: int = 0
    """Objects with noise, replayed as queries that must find them and as queries that
    must not (contrastive denoising, DINO): about so many of each per image. 0: none, as
    in Co-Deformable-DETR; Co-DINO: 100.
    """
    denoising_labels: float = 0.5
    """Half of this share of the noisy objects gets a class drawn at random."""
    denoising_boxes: float = 1.0
    """Corners move by up to this many half sides; those of queries that must not find
    the object by one to two times as much."""
    query_weight: float = 1.0
    """[lambda 1]"""
    auxiliary_weight: float = 2.0
    """[lambda 2]"""
    max_positives: int = 300
    """Positive queries per image and head; more are sampled down."""
    atss_candidates: int = 9
    """Closest anchors per level and object among which ATSS chooses."""
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
    """Compute the encoder's layers again in the backward pass instead of keeping what
    they hold: less memory, more time."""
    detections: int = 100
    score_min: float = 0.0
    """Queries below this score are no detections."""

    def __post_init__(self) -> None:
        for name in BASE_COUNTS + PROPOSAL_COUNTS + REGION_COUNTS:
            _check(
                getattr(self, name) > 0,
                f"co_detr.{name} must be positive; got {getattr(self, name)}",
            )
        _check(
            self.width % 4 == 0,
            f"co_detr.width must be a multiple of 4 (sine positions); got {self.width}",
        )
        _check(
            self.width % self.heads == 0,
            f"co_detr.width {self.width} must be a multiple of co_detr.heads"
            f" {self.heads}",
        )
        _check(
            3 <= self.levels <= 5,
            "co_detr.levels must lie in 3..5: proposals double in size with each"
            f" level; got {self.levels}",
        )
        known = get_args(AuxiliaryHead)
        _check(
            set(self.auxiliary) <= set(known),
            f"co_detr.auxiliary can hold {', '.join(known)}; got"
            f" {', '.join(self.auxiliary)}",
        )
        _check(
            len(set(self.auxiliary)) == len(self.auxiliary),
            f"co_detr.auxiliary names a head twice: {', '.join(self.auxiliary)}",
        )
        weights = (
            self.query_weight,
            self.auxiliary_weight,
            self.denoising,
            self.denoising_boxes,
        )
        names = "query_weight, auxiliary_weight, denoising and denoising_boxes"
        _check(
            all(0 <= w < float("inf") for w in weights),
            f"co_detr.{names} must be finite and not negative; got {weights}",
        )
        for name in ("rpn_nms", "roi_positive", "score_min", "denoising_labels"):
            _check(
                0 <= getattr(self, name) <= 1,
                f"co_detr.{name} must lie in 0..1; got {getattr(self, name)}",
            )


def tiny(**changes: Any) -> CoDetr:
    """Small enough to train on a CPU, for images of about 128 pixels."""
    small = CoDetr(
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
    return replace(small, **changes)


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)
