"""Co-DETR as COIN trains it: a DETR whose Faster R-CNN auxiliary head describes any
box, as the CLIP detector's RoI head does.

The head has the CLIP detector's own layers behind the RoI features of the encoder's
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
from coin_ray.models.co_detr import rcnn
from coin_ray.models.co_detr.atss import Atss
from coin_ray.models.co_detr.decoder import Queries
from coin_ray.models.co_detr.encoder import Memory
from coin_ray.models.co_detr.positions import EPSILON
from coin_ray.models.co_detr.pyramid import Maps, Pyramid
from coin_ray.models.co_detr.targets import Targets, normalise, pixels
from coin_ray.models.co_detr.text import TextDetr
from coin_ray.models.co_detr.two_stage import BoxEmbedding
from coin_ray.models.faster_rcnn_clip.model import EmbeddingHead, postprocess_detections
from coin_ray.structures import Detections, Separation


@dataclass(frozen=True, slots=True, eq=False)
class Encoded:
    """What is computed once per image: the encoder's tokens, and the same as maps with
    one more below them.
    """

    memory: Memory
    maps: Maps


class RegionQueries(nn.Module):
    """Sampled RoIs as queries of the decoder: their box, and the mean of the maps there
    (arXiv 2211.12860, eq. 4).
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
        """``boxes`` [P, 4] in pixels and ``features`` [P, width] per image -> queries
        [B, M, .], and which of them are real [B, M].
        """
        placed = [normalise(own, size) for own, size in zip(boxes, sizes, strict=True)]
        references = pad_sequence(placed, batch_first=True, padding_value=0.5).clamp(
            EPSILON, 1 - EPSILON
        )
        real = pad_sequence(
            [torch.ones_like(b[:, 0], dtype=torch.bool) for b in boxes],
            batch_first=True,
        )
        position, content = self.embedding(references)
        content = content + self.feature_norm(
            self.feature(pad_sequence(list(features), batch_first=True))
        )
        return Queries(content, position, references), real


class RegionalDetr(nn.Module):
    """``base`` is the detector; everything beside it is left behind after training."""

    def __init__(self, base: TextDetr, embedding_size: int, config: Detector) -> None:
        super().__init__()
        self.base, self.num_classes = base, base.num_classes
        network = base.config
        self.config = sampling(config, network)
        self.pyramid = Pyramid(network.width)
        self.proposals = rcnn.RegionProposals(network)
        pooled = network.width * network.roi_size**2
        self.reduce = nn.Sequential(
            nn.Flatten(), nn.Linear(pooled, network.roi_width), nn.ReLU()
        )
        self.head = EmbeddingHead(network.roi_width, embedding_size, self.config)
        self.queries = (
            RegionQueries(network.width) if network.positive_queries else None
        )
        self.atss = (
            Atss(network, base.num_classes) if "atss" in network.auxiliary else None
        )
        self.background = nn.Parameter(
            torch.zeros(embedding_size), requires_grad=config.background == "learned"
        )

    @property
    def auxiliary_weight(self) -> float:
        """Of the auxiliary head's losses: lambda 2 for every layer of the decoder (eq.
        6).
        """
        return self.base.config.auxiliary_weight * self.base.config.decoder_layers

    def class_embeddings(self) -> Tensor:
        """[K+1, D] unit length, background last."""
        embeddings = self.base.class_embeddings()
        if self.config.background == "learned":
            embeddings = torch.cat(
                [
                    embeddings[:-1],
                    F.normalize(embeddings[-1] + self.background, dim=0)[None],
                ]
            )
        return embeddings

    def prepare(
        self, images: Sequence[Tensor], at_least: tuple[int, int] = (0, 0)
    ) -> Images:
        return self.base.prepare(images, at_least)

    def propose(self, images: Images) -> tuple[Encoded, RpnOutputs]:
        memory = self.base.encode(images)
        maps = self.pyramid(memory, images.sizes)
        return Encoded(memory, maps), self.proposals.propose(maps)

    def pool(self, shared: Encoded, boxes: Sequence[Tensor]) -> Tensor:
        """RoI features [R, d, side, side] of the encoder's maps."""
        return rcnn.pool(
            shared.maps, boxes, self.base.config.roi_size, self.base.config.roi_sampling
        )

    def describe(self, shared: Encoded, boxes: Sequence[Tensor]) -> RegionOutputs:
        regions: RegionOutputs = self.head(
            self.reduce(self.pool(shared, boxes)), self.class_embeddings()
        )
        return regions.float()

    def region_queries(
        self, shared: Encoded, boxes: Sequence[Tensor]
    ) -> tuple[Queries, Tensor] | None:
        """Queries at given boxes and which of them are real, or None where the network
        trains without.
        """
        if self.queries is None:
            return None
        features = self.pool(shared, boxes).mean((2, 3)).split([len(b) for b in boxes])
        queries: tuple[Queries, Tensor] = self.queries(
            boxes, features, shared.maps.sizes
        )
        return queries

    def dense_losses(
        self, shared: Encoded, separations: Sequence[Separation]
    ) -> dict[str, Tensor]:
        """Of the ATSS head, weighted; none where the network trains without it.

        Consistent pairs are objects. Anchors on what one teacher alone saw, or both
        name differently, are neither objects nor background.
        """
        if self.atss is None:
            return {}
        losses: dict[str, Tensor] = self.atss(
            shared.maps, [_sure(s) for s in separations]
        ).losses
        return {
            f"atss_{part}": self.auxiliary_weight * Atss.weights[part] * value
            for part, value in losses.items()
        }

    def predict(self, images: Images) -> list[Detections]:
        return self.base.predict(images)

    @torch.no_grad()
    def predict_regions(self, images: Images) -> list[Detections]:
        """What the auxiliary head makes of the decoder's boxes and of its own
        proposals: every class of a box, class-wise suppression.
        """
        shared, proposed = self.propose(images)
        decoded = self.base.decode(
            self.base.two_stage(shared.memory).queries, shared.memory
        )
        placed = [
            pixels(queries, size)
            for queries, size in zip(decoded.boxes[-1], images.sizes, strict=True)
        ]
        boxes = [torch.cat(both) for both in zip(placed, proposed.boxes, strict=True)]
        counts = [len(b) for b in boxes]
        regions = self.describe(shared, boxes)
        parts = zip(
            regions.deltas.split(counts),
            boxes,
            regions.logits.softmax(-1).split(counts),
            images.sizes,
            strict=True,
        )
        return [
            postprocess_detections(
                box_ops.decode_boxes(deltas, own), vectors, size, self.config
            )
            for deltas, own, vectors, size in parts
        ]


class ByRegions(nn.Module):
    """A student that is deployed together with its auxiliary head, which names the
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


def _sure(separation: Separation) -> Targets:
    """All boxes, those that are not consistent without any weight."""
    agreed, others = (
        separation.consistent,
        torch.cat([separation.inconsistent.boxes, separation.private.boxes]),
    )
    boxes = torch.cat([agreed.boxes, others])
    labels = torch.cat(
        [agreed.cloud.labels, torch.zeros_like(others[:, 0], dtype=torch.int64)]
    )
    return Targets(
        boxes,
        labels,
        (torch.arange(len(boxes), device=boxes.device) < len(agreed)).float(),
    )


def sampling(config: Detector, network: CoDetr) -> Detector:
    """The CLIP detector's settings with the auxiliary head's sampling and box losses in
    them.
    """
    return replace(
        config,
        rpn_batch=network.rpn_samples,
        roi_batch=network.roi_samples,
        roi_positive=network.roi_positive,
        anchor_weights=(1.0, 1.0, 1.0, 1.0),
        box_loss="giou",
    )


def started_from(
    student: RegionalDetr, clip_detector: Mapping[str, Tensor]
) -> RegionalDetr:
    """``student`` with what it has in common with the CLIP detector: visual tower,
    prompts, and the background's embedding.
    """
    tower = {
        f"base.backbone.{name}": value
        for name, value in clip_detector.items()
        if name.startswith("tower.")
    }
    prompts = {
        f"base.{name}": value
        for name, value in clip_detector.items()
        if name.startswith("prompts.")
    }
    found = student.load_state_dict(
        tower | prompts | {"background": clip_detector["background"]}, strict=False
    )
    assert not found.unexpected_keys, (
        f"not of the student's tower or prompts: {found.unexpected_keys[:3]}"
    )
    return student
