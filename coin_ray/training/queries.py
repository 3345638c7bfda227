"""Forward pass of a Co-DETR student: beside anchors and RoIs, the encoder's proposals
and the decoder's queries with their targets.

Each layer's queries are matched one to one to all boxes of the image, of whichever
teacher. What a matched query learns depends on the kind of its box: of a consistent pair
the class and the box, of an inconsistent pair the box, and the class that CKG gives it,
of a private box the class vector of the one teacher that detected it. Queries without a
box learn background.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import pairwise

import torch
from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped]
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from torchvision.ops import box_convert, generalized_box_iou_loss

from coin_ray.config import Detector
from coin_ray.losses.queries import WEIGHTS, soft_focal, soft_matching_cost
from coin_ray.models.co_detr.decoder import DecoderOutputs, Queries
from coin_ray.models.co_detr.queries import group_mask
from coin_ray.models.co_detr.rcnn import Rcnn
from coin_ray.models.co_detr.regional import EncodedImages, RegionalDetr
from coin_ray.models.co_detr.targets import normalise
from coin_ray.parallel import all_sum
from coin_ray.structures import Pairs, Separation
from coin_ray.training.student_outputs import (
    FusePairs,
    Losses,
    StudentOutputs,
    sample_anchors_and_regions,
)
from coin_ray.training.targets import RegionTargets

NO_OBJECT = -1
"""Row of a query that is matched to no object."""
BACKGROUND, CONSISTENT, INCONSISTENT, PRIVATE, UNCONFIDENT = range(5)
"""Kinds of what a query is matched to; ``UNCONFIDENT``: an inconsistent pair whose
fused vector does not reach the confidence threshold."""


@dataclass(frozen=True, slots=True, eq=False)
class Objects:
    """All boxes of a batch, image by image consistent, inconsistent, private; those of
    image i from ``starts[i]`` on.

    ``boxes`` [N, 4] cxcywh in 0..1, ``targets`` [N, C] class probabilities, ``kinds``
    [N].
    """

    boxes: Tensor
    targets: Tensor
    kinds: Tensor
    starts: tuple[int, ...]

    def with_fused_classes(self, fused: Tensor, threshold: float) -> Objects:
        """Return a copy with CKG's vectors [M, K+1] for the inconsistent pairs. Those
        whose best probability does not reach ``threshold`` become ``UNCONFIDENT``.
        """
        rows = (self.kinds == INCONSISTENT).nonzero()[:, 0]
        targets = self.targets.index_copy(0, rows, fused[:, :-1].detach())
        scores = fused.detach().max(-1).values if len(fused) else fused.new_zeros(0)
        unconfident = torch.full_like(rows, UNCONFIDENT)
        pair_kinds = torch.where(scores >= threshold, self.kinds[rows], unconfident)
        kinds = self.kinds.index_copy(0, rows, pair_kinds)
        return replace(self, targets=targets, kinds=kinds)

    def class_agnostic(self) -> Objects:
        """Return a copy with one class, "object": 1 for pairs, the foreground mass for
        private boxes.
        """
        is_pair = self.kinds != PRIVATE
        foreground = self.targets.sum(1).clamp(0, 1)
        targets = torch.where(is_pair, 1.0, foreground)[:, None]
        kinds = torch.where(is_pair, CONSISTENT, self.kinds)
        return replace(self, targets=targets, kinds=kinds)


@dataclass(frozen=True, eq=False)
class QueryOutputs:
    """Outputs of the queries of L layers: ``logits`` [L, B, Q, C], ``boxes`` [L, B, Q,
    4]; ``rows`` [L, B, Q]: the object each is matched to, or NO_OBJECT; ``is_real`` [B,
    Q]: False for padding and unusable queries.
    """

    logits: Tensor
    boxes: Tensor
    rows: Tensor
    is_real: Tensor

    @cached_property
    def match_count(self) -> Tensor:
        """Matched queries of a layer over all workers, at least 1."""
        is_matched = (self.rows[0] != NO_OBJECT) & self.is_real
        return all_sum(is_matched.sum().float()).clamp(min=1)

    def class_loss(self, objects: Objects, *kinds: int) -> Tensor:
        """Return the class loss of the queries matched to ``kinds``, summed over
        layers.
        """
        mask = self._kind_mask(objects, kinds)
        background = objects.targets.new_zeros(1, self.logits.shape[-1])
        targets = torch.cat([objects.targets, background])[self.rows[mask]]
        loss = soft_focal(self.logits[mask], targets).sum()
        return WEIGHTS["class"] * loss / self.match_count

    def box_losses(self, objects: Objects, *kinds: int) -> Losses:
        """Return the box losses of the queries matched to ``kinds``, summed over
        layers.
        """
        mask = self._kind_mask(objects, kinds)
        predicted, truth = self.boxes[mask], objects.boxes[self.rows[mask]]
        giou = generalized_box_iou_loss(
            box_convert(predicted, "cxcywh", "xyxy"),
            box_convert(truth, "cxcywh", "xyxy"),
        )
        sums = {"l1": (predicted - truth).abs().sum(), "giou": giou.sum()}
        return {
            name: WEIGHTS[name] * loss / self.match_count for name, loss in sums.items()
        }

    def supervised_losses(self, name: str, objects: Objects) -> Losses:
        """Return the losses that do not need CKG: classes of consistent pairs and of
        background, boxes of all pairs. Keys begin with ``name``.
        """
        losses = {"class": self.class_loss(objects, BACKGROUND, CONSISTENT)}
        losses |= self.box_losses(objects, CONSISTENT, INCONSISTENT)
        return {f"{name}_{part}": loss for part, loss in losses.items()}

    def _kind_mask(self, objects: Objects, kinds: Sequence[int]) -> Tensor:
        """Return a mask [L, B, Q] of the real queries matched to ``kinds``."""
        background = objects.kinds.new_full((1,), BACKGROUND)
        # the last row, -1, is NO_OBJECT's
        query_kinds = torch.cat([objects.kinds, background])[self.rows]
        return torch.isin(query_kinds, query_kinds.new_tensor(kinds)) & self.is_real


@dataclass(frozen=True, eq=False)
class DetrStudentOutputs(StudentOutputs):
    """``pairs``: all inconsistent pairs of the batch with the auxiliary head's
    ``embeddings`` [M, D] of their boxes.

    ``encoder``: proposals against class-agnostic ``objects``; ``decoder``: its queries;
    ``replayed``: sampled RoIs as queries, if there are; ``dense``: weighted losses of
    the ATSS head, if there is one.
    """

    objects: Objects
    pairs: Pairs
    embeddings: Tensor
    encoder: QueryOutputs
    decoder: QueryOutputs
    replayed: QueryOutputs | None
    dense: Losses
    auxiliary_weight: float
    query_weight: float

    def supervised_losses(self, config: Detector) -> Losses:
        weight_names = {
            "anchor_objectness": "proposal_class",
            "anchor_boxes": "proposal_l1",
            "consistent": "class",
            "boxes": "giou",
        }
        losses = {
            name: self.auxiliary_weight * Rcnn.weights[weight_names[name]] * loss
            for name, loss in super().supervised_losses(config).items()
        }
        losses |= self.encoder.supervised_losses(
            "proposals", self.objects.class_agnostic()
        )
        losses |= self.decoder.supervised_losses("decoder", self.objects)
        losses |= self.dense
        if self.replayed is not None:
            replayed = self.replayed.supervised_losses("replayed", self.objects)
            losses |= {
                name: self.query_weight * loss for name, loss in replayed.items()
            }
        return losses

    def private_losses(self) -> Losses:
        losses = {
            name: self.auxiliary_weight * loss
            for name, loss in super().private_losses().items()
        }
        encoder_loss = self.encoder.class_loss(self.objects.class_agnostic(), PRIVATE)
        decoder_loss = self.decoder.class_loss(self.objects, PRIVATE)
        return losses | {"private_queries": encoder_loss + decoder_loss}

    def inconsistent_losses(self, fuse_pairs: FusePairs, *, per_region: bool) -> Losses:
        regional = super().inconsistent_losses(fuse_pairs, per_region=per_region)
        losses = {name: self.auxiliary_weight * v for name, v in regional.items()}
        fused, threshold = fuse_pairs(self.embeddings, self.pairs)
        objects = self.objects.with_fused_classes(fused, threshold)
        loss = self.decoder.class_loss(objects, INCONSISTENT)
        if self.replayed is not None:
            replayed_loss = self.replayed.class_loss(objects, INCONSISTENT)
            loss = loss + self.query_weight * replayed_loss
        return losses | {"inconsistent_queries": loss}


def forward_detr_student(
    student: RegionalDetr,
    images: Sequence[Tensor],
    size: tuple[int, int],
    separations: Sequence[Separation],
    generators: Sequence[torch.Generator],
) -> DetrStudentOutputs:
    """Do what ``coin_ray.training.student_outputs.forward_student`` does with the
    auxiliary head, and add the encoder's proposals and the decoder's queries.
    """
    batch = student.prepare(images, size)
    shared, rpn = student.propose(batch)
    regional = sample_anchors_and_regions(
        student, batch, shared, rpn, separations, generators
    )
    separations = [s.to(batch.pixels.device) for s in separations]
    objects = list_objects(separations, batch.sizes, student.num_classes)
    two_stage = student.base.two_stage(shared.memory)
    replayed = make_replayed_queries(
        student, shared, regional.region_targets, separations, objects
    )
    decoded = decode(student, shared, two_stage.queries, replayed)
    main_count = two_stage.queries.content.shape[1]
    main = decoded.select_queries(0, main_count)
    replayed_outputs = None
    if replayed is not None:
        query_count = decoded.logits.shape[2]
        replayed_outputs = replayed.outputs(
            decoded.select_queries(main_count, query_count)
        )
    with torch.no_grad():
        boxes = [s.inconsistent.boxes for s in separations]
        embeddings = student.describe(shared, boxes).embedded
    return DetrStudentOutputs(
        **{f.name: getattr(regional, f.name) for f in fields(regional)},
        objects=objects,
        pairs=Pairs.cat([s.inconsistent for s in separations]),
        embeddings=embeddings,
        encoder=match_queries(
            two_stage.objectness[None],
            two_stage.boxes[None],
            objects.class_agnostic(),
            two_stage.usable,
        ),
        decoder=match_queries(main.logits, main.boxes, objects),
        replayed=replayed_outputs,
        dense=student.dense_losses(shared, separations),
        auxiliary_weight=student.auxiliary_weight,
        query_weight=student.base.config.query_weight,
    )


def list_objects(
    separations: Sequence[Separation], sizes: Sequence[tuple[int, int]], classes: int
) -> Objects:
    """List all boxes of a batch. Until CKG has fused them, inconsistent pairs have the
    mean of both opinions, which counts in matching only.
    """
    boxes: list[Tensor] = []
    targets: list[Tensor] = []
    kinds: list[int] = []
    starts = [0]
    for separation, size in zip(separations, sizes, strict=True):
        consistent, inconsistent = separation.consistent, separation.inconsistent
        private = separation.private
        image_boxes = torch.cat([consistent.boxes, inconsistent.boxes, private.boxes])
        boxes.append(normalise(image_boxes, size))
        one_hot = F.one_hot(consistent.cloud.labels, classes + 1)[:, :-1].float()
        mean = (inconsistent.cloud.probs + inconsistent.clip.probs) / 2
        targets += [one_hot, mean[:, :-1], private.probs[:, :-1]]
        kinds += [CONSISTENT] * len(consistent)
        kinds += [INCONSISTENT] * len(inconsistent)
        kinds += [PRIVATE] * len(private)
        starts.append(len(kinds))
    all_boxes = torch.cat(boxes)
    return Objects(
        all_boxes,
        torch.cat(targets),
        torch.tensor(kinds, dtype=torch.int64, device=all_boxes.device),
        tuple(starts),
    )


def match_queries(
    logits: Tensor, boxes: Tensor, objects: Objects, usable: Tensor | None = None
) -> QueryOutputs:
    """Match queries to objects one to one with least cost, layer by layer and image by
    image, among the queries in ``usable`` [B, Q] (default: all).
    """
    if usable is None:
        usable = torch.ones(logits.shape[1:3], dtype=torch.bool, device=logits.device)
    rows = torch.full(logits.shape[:3], NO_OBJECT, device=logits.device)
    with torch.autocast(logits.device.type, enabled=False):
        for image, (start, stop) in enumerate(pairwise(objects.starts)):
            queries = usable[image].nonzero()[:, 0]
            for layer in range(len(logits)):
                costs = soft_matching_cost(
                    logits[layer, image, queries].detach(),
                    boxes[layer, image, queries].detach(),
                    objects.targets[start:stop],
                    objects.boxes[start:stop],
                )
                matches = linear_sum_assignment(costs.cpu().numpy())
                matched_queries = torch.as_tensor(matches[0], device=rows.device)
                matched_objects = torch.as_tensor(matches[1], device=rows.device)
                rows[layer, image, queries[matched_queries]] = start + matched_objects
    return QueryOutputs(logits, boxes, rows, usable)


@dataclass(frozen=True, slots=True, eq=False)
class ReplayedQueries:
    """Sampled RoIs on pairs as ``queries``; ``rows`` [B, M]: the objects they overlap;
    ``is_real`` [B, M]: False for padding.
    """

    queries: Queries
    rows: Tensor
    is_real: Tensor

    def outputs(self, decoded: DecoderOutputs) -> QueryOutputs:
        rows = self.rows.expand(len(decoded.logits), -1, -1)
        return QueryOutputs(decoded.logits, decoded.boxes, rows, self.is_real)


def make_replayed_queries(
    student: RegionalDetr,
    shared: EncodedImages,
    targets: Sequence[RegionTargets],
    separations: Sequence[Separation],
    objects: Objects,
) -> ReplayedQueries | None:
    """Make queries of the auxiliary head's positives, at most ``max_positives`` of each
    image. None where the network trains without.
    """
    limit = student.base.config.max_positives
    proposals = [t.proposals[: min(t.positives, limit)] for t in targets]
    region_queries = student.region_queries(shared, proposals)
    if region_queries is None:
        return None
    queries, is_real = region_queries
    rows = []
    for start, target, separation in zip(
        objects.starts, targets, separations, strict=False
    ):
        inconsistent = len(separation.consistent) + target.inconsistent
        image_rows = torch.cat([target.consistent, inconsistent])
        rows.append(start + image_rows[:limit])
    padded_rows = pad_sequence(rows, batch_first=True, padding_value=NO_OBJECT)
    return ReplayedQueries(queries, padded_rows, is_real)


def decode(
    student: RegionalDetr,
    shared: EncodedImages,
    main: Queries,
    replayed: ReplayedQueries | None,
) -> DecoderOutputs:
    """Decode both groups in one pass, masked from each other."""
    if replayed is None:
        return student.base.decode(main, shared.memory)
    extra = replayed.queries
    queries = Queries(
        torch.cat([main.content, extra.content], 1),
        torch.cat([main.positions, extra.positions], 1),
        torch.cat([main.references, extra.references], 1),
    )
    main_is_real = torch.ones_like(main.content[..., 0], dtype=torch.bool)
    mask = group_mask(main_is_real, [replayed.is_real])
    return student.base.decode(queries, shared.memory, mask)
