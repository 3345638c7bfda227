"""Co-DETR as COIN trains it: a DETR whose Faster R-CNN auxiliary head describes any
box, as the CLIP detector's RoI head does.

The head has the CLIP detector's own layers after the RoI features of the encoder's
maps: transformation, embedding, cosine to the class embeddings. So RoI losses,
prototypes and the gradient alignment of CKG are those of the Faster R-CNN student.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from coin_ray import boxes as box_ops
from coin_ray.config import Detector
from coin_ray.config.co_detr import CoDetr
from coin_ray.models.base import Images, RegionOutputs, RpnOutputs
from coin_ray.models.co_detr.atss import Atss
from coin_ray.models.co_detr.decoder import Queries
from coin_ray.models.co_detr.encoder import Memory
from coin_ray.models.co_detr.positions import EPSILON
from coin_ray.models.co_detr.pyramid import Maps, Pyramid
from coin_ray.models.co_detr.rcnn import RegionProposals, pool_levels
from coin_ray.models.co_detr.targets import DetrTargets, denormalise, normalise
from coin_ray.models.co_detr.text import TextDetr
from coin_ray.models.co_detr.two_stage import BoxEmbedding
from coin_ray.models.faster_rcnn_clip.model import EmbeddingHead, postprocess_detections
from coin_ray.structures import Detections, Separation


@dataclass(frozen=True, slots=True, eq=False)
class EncodedImages:
    """Features computed once per image: the encoder's tokens, and the same as maps with
    a coarser one after them.
    """

    memory: Memory
    maps: Maps


class RegionQueries(nn.Module):
    """Makes decoder queries of sampled RoIs: of their box, and of the mean of the maps
    there (arXiv 2211.12860, eq. 4).
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding = BoxEmbedding(width)
        self.feature, self.feature_norm = nn.Linear(width, width), nn.LayerNorm(width)

    def forward(
        self,
        boxes: Sequence[Tensor],
        features: Sequence[Tensor],
        sizes: Sequence[tuple[int, int]],
    ) -> tuple[Queries, Tensor]:
        """Return queries [B, M, .] for ``boxes`` [P, 4] in pixels and ``features`` [P,
        width] per image, and which of them are real [B, M].
        """
        normalised = [normalise(b, size) for b, size in zip(boxes, sizes, strict=True)]
        references = pad_sequence(normalised, batch_first=True, padding_value=0.5)
        references = references.clamp(EPSILON, 1 - EPSILON)
        ones = [torch.ones_like(b[:, 0], dtype=torch.bool) for b in boxes]
        is_real = pad_sequence(ones, batch_first=True)
        position, content = self.embedding(references)
        padded_features = pad_sequence(list(features), batch_first=True)
        content = content + self.feature_norm(self.feature(padded_features))
        return Queries(content, position, references), is_real


class RegionalDetr(nn.Module):
    """``base`` is the detector; everything beside it is dropped after training."""

    def __init__(self, base: TextDetr, embedding_size: int, config: Detector) -> None:
        super().__init__()
        self.base, self.num_classes = base, base.num_classes
        network = base.config
        self.config = with_network_sampling(config, network)
        self.pyramid = Pyramid(network.width)
        self.proposals = RegionProposals(network)
        pooled_size = network.width * network.roi_size**2
        self.reduce = nn.Sequential(
            nn.Flatten(), nn.Linear(pooled_size, network.roi_width), nn.ReLU()
        )
        self.head = EmbeddingHead(network.roi_width, embedding_size, self.config)
        self.queries = (
            RegionQueries(network.width) if network.positive_queries else None
        )
        has_atss = "atss" in network.auxiliary
        self.atss = Atss(network, base.num_classes) if has_atss else None
        self.background = nn.Parameter(
            torch.zeros(embedding_size), requires_grad=config.background == "learned"
        )

    @property
    def auxiliary_weight(self) -> float:
        """Weight of the auxiliary head's losses: lambda 2 for every layer of the
        decoder (eq. 6).
        """
        return self.base.config.auxiliary_weight * self.base.config.decoder_layers

    def class_embeddings(self) -> Tensor:
        """Return class embeddings [K+1, D], unit length, background last."""
        embeddings = self.base.class_embeddings()
        if self.config.background == "learned":
            background = F.normalize(embeddings[-1] + self.background, dim=0)
            embeddings = torch.cat([embeddings[:-1], background[None]])
        return embeddings

    def prepare(
        self, images: Sequence[Tensor], at_least: tuple[int, int] = (0, 0)
    ) -> Images:
        return self.base.prepare(images, at_least)

    def propose(self, images: Images) -> tuple[EncodedImages, RpnOutputs]:
        memory = self.base.encode(images)
        maps = self.pyramid(memory, images.sizes)
        return EncodedImages(memory, maps), self.proposals.propose(maps)

    def pool(self, shared: EncodedImages, boxes: Sequence[Tensor]) -> Tensor:
        """Pool RoI features [R, d, side, side] from the encoder's maps."""
        network = self.base.config
        return pool_levels(shared.maps, boxes, network.roi_size, network.roi_sampling)

    def describe(self, shared: EncodedImages, boxes: Sequence[Tensor]) -> RegionOutputs:
        features = self.reduce(self.pool(shared, boxes))
        regions: RegionOutputs = self.head(features, self.class_embeddings())
        return regions.float()

    def region_queries(
        self, shared: EncodedImages, boxes: Sequence[Tensor]
    ) -> tuple[Queries, Tensor] | None:
        """Return queries at given boxes and which of them are real, or None where the
        network trains without.
        """
        if self.queries is None:
            return None
        counts = [len(image_boxes) for image_boxes in boxes]
        features = self.pool(shared, boxes).mean((2, 3)).split(counts)
        queries: tuple[Queries, Tensor] = self.queries(
            boxes, features, shared.maps.sizes
        )
        return queries

    def dense_losses(
        self, shared: EncodedImages, separations: Sequence[Separation]
    ) -> dict[str, Tensor]:
        """Return the weighted losses of the ATSS head; none where the network trains
        without it.

        Consistent pairs are objects. Anchors on private boxes and on inconsistent pairs
        are neither objects nor background.
        """
        if self.atss is None:
            return {}
        targets = [_consistent_targets(separation) for separation in separations]
        losses: dict[str, Tensor] = self.atss(shared.maps, targets).losses
        return {
            f"atss_{part}": self.auxiliary_weight * Atss.weights[part] * loss
            for part, loss in losses.items()
        }

    def predict(self, images: Images) -> list[Detections]:
        return self.base.predict(images)

    @torch.no_grad()
    def predict_regions(self, images: Images) -> list[Detections]:
        """Return the auxiliary head's detections on the decoder's boxes and its own
        proposals: every class of a box, class-wise suppression.
        """
        shared, proposals = self.propose(images)
        queries = self.base.two_stage(shared.memory).queries
        decoded = self.base.decode(queries, shared.memory)
        boxes = []
        for decoded_boxes, proposed_boxes, size in zip(
            decoded.boxes[-1], proposals.boxes, images.sizes, strict=True
        ):
            boxes.append(torch.cat([denormalise(decoded_boxes, size), proposed_boxes]))
        counts = [len(image_boxes) for image_boxes in boxes]
        regions = self.describe(shared, boxes)
        deltas = regions.deltas.split(counts)
        probs = regions.logits.softmax(-1).split(counts)
        detections = []
        for image, size in enumerate(images.sizes):
            refined = box_ops.decode_boxes(deltas[image], boxes[image])
            detections.append(
                postprocess_detections(refined, probs[image], size, self.config)
            )
        return detections


class DetrWithRegionHead(nn.Module):
    """A student that is deployed together with its auxiliary head, which classifies the
    boxes (``RegionalDetr.predict_regions``).
    """

    def __init__(self, student: RegionalDetr) -> None:
        super().__init__()
        self.student = student

    def prepare(
        self, images: Sequence[Tensor], at_least: tuple[int, int] = (0, 0)
    ) -> Images:
        return self.student.prepare(images, at_least)

    def predict(self, images: Images) -> list[Detections]:
        return self.student.predict_regions(images)


def _consistent_targets(separation: Separation) -> DetrTargets:
    """Return all boxes as targets; those that are not consistent have weight 0."""
    consistent = separation.consistent
    others = torch.cat([separation.inconsistent.boxes, separation.private.boxes])
    boxes = torch.cat([consistent.boxes, others])
    # labels of boxes with weight 0 are not used
    other_labels = torch.zeros_like(others[:, 0], dtype=torch.int64)
    labels = torch.cat([consistent.cloud.labels, other_labels])
    is_consistent = torch.arange(len(boxes), device=boxes.device) < len(consistent)
    return DetrTargets(boxes, labels, is_consistent.float())


def with_network_sampling(config: Detector, network: CoDetr) -> Detector:
    """Return the CLIP detector's settings with the sampling and the box losses of the
    auxiliary head.
    """
    return replace(
        config,
        rpn_batch=network.rpn_samples,
        roi_batch=network.roi_samples,
        roi_positive=network.roi_positive,
        anchor_weights=(1.0, 1.0, 1.0, 1.0),
        box_loss="giou",
    )


def load_clip_detector_weights(
    student: RegionalDetr, clip_detector: Mapping[str, Tensor]
) -> RegionalDetr:
    """Set the weights that ``student`` has in common with the CLIP detector: visual
    tower, prompts, and the background's embedding. Return ``student``.
    """
    weights = {"background": clip_detector["background"]}
    for name, tensor in clip_detector.items():
        if name.startswith("tower."):
            weights[f"base.backbone.{name}"] = tensor
        elif name.startswith("prompts."):
            weights[f"base.{name}"] = tensor
    mismatch = student.load_state_dict(weights, strict=False)
    assert not mismatch.unexpected_keys, (
        "the student's tower or prompts have no weights"
        f" {mismatch.unexpected_keys[:3]} of the CLIP detector"
    )
    return student
