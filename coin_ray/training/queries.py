"""A Co-DETR student's look at a batch: beside anchors and RoIs, what the encoder's
proposals and the decoder's queries say of every box.

Each layer's queries are matched one to one to all boxes of the image, whoever saw them.
What a matched query learns depends on the kind of knowledge: of a consistent pair the
class and the box, of an inconsistent pair the box, and the class that CKG gives it, of
a private box the class vector of the one teacher that saw it. Queries without a box
learn that there is nothing.
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
from coin_ray.losses.queries import WEIGHTS, matching_cost, soft_focal
from coin_ray.models.co_detr.decoder import Decoded, Queries
from coin_ray.models.co_detr.queries import group_mask
from coin_ray.models.co_detr.rcnn import Rcnn
from coin_ray.models.co_detr.regional import Encoded, RegionalDetr
from coin_ray.models.co_detr.targets import normalise
from coin_ray.parallel import all_sum
from coin_ray.structures import Pairs, Separation
from coin_ray.training.student_outputs import Fused, Losses, View, sample
from coin_ray.training.targets import RegionTargets

NONE = -1
"""Row of a query that stands for no object."""
NOTHING, CONSISTENT, INCONSISTENT, PRIVATE, UNSURE = range(5)
"""Kinds of what a query stands for; ``UNSURE``: an inconsistent pair of which CKG is
not sure enough."""


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

    def named(self, fused: Tensor, sure: float) -> Objects:
        """With CKG's vectors [M, K+1] for the inconsistent pairs, of which those teach
        whose best probability reaches ``sure``.
        """
        rows = (self.kinds == INCONSISTENT).nonzero()[:, 0]
        targets = self.targets.index_copy(0, rows, fused[:, :-1].detach())
        best = fused.detach().max(-1).values if len(fused) else fused.new_zeros(0)
        unsure = torch.full_like(rows, UNSURE)
        return replace(
            self,
            targets=targets,
            kinds=self.kinds.index_copy(
                0, rows, torch.where(best >= sure, self.kinds[rows], unsure)
            ),
        )

    def without_names(self) -> Objects:
        """One class, "object": certain for pairs, the foreground mass for private
        boxes.
        """
        pair = self.kinds != PRIVATE
        mass = torch.where(pair, 1.0, self.targets.sum(1).clamp(0, 1))
        return replace(
            self, targets=mass[:, None], kinds=torch.where(pair, CONSISTENT, self.kinds)
        )


@dataclass(frozen=True, eq=False)
class Answers:
    """What queries of L layers say: ``logits`` [L, B, Q, C], ``boxes`` [L, B, Q, 4];
    ``rows`` [L, B, Q]: the object each stands for, or NONE; ``real`` [B, Q]: those that
    take part.
    """

    logits: Tensor
    boxes: Tensor
    rows: Tensor
    real: Tensor

    @cached_property
    def count(self) -> Tensor:
        """Queries of a layer that stand for an object, over all workers, at least 1."""
        return all_sum(((self.rows[0] != NONE) & self.real).sum().float()).clamp(min=1)

    def class_loss(self, objects: Objects, *kinds: int) -> Tensor:
        """Of the queries that stand for one of ``kinds``, summed over layers."""
        chosen = self._chosen(objects, kinds)
        targets = torch.cat(
            [objects.targets, objects.targets.new_zeros(1, self.logits.shape[-1])]
        )[self.rows[chosen]]
        return (
            WEIGHTS["class"]
            * soft_focal(self.logits[chosen], targets).sum()
            / self.count
        )

    def box_losses(self, objects: Objects, *kinds: int) -> Losses:
        chosen = self._chosen(objects, kinds)
        found, truth = self.boxes[chosen], objects.boxes[self.rows[chosen]]
        giou = generalized_box_iou_loss(
            box_convert(found, "cxcywh", "xyxy"), box_convert(truth, "cxcywh", "xyxy")
        )
        sums = {"l1": (found - truth).abs().sum(), "giou": giou.sum()}
        return {
            name: WEIGHTS[name] * value / self.count for name, value in sums.items()
        }

    def settled(self, name: str, objects: Objects) -> Losses:
        """What does not wait for CKG: names of consistent pairs, where nothing is, and
        boxes of all pairs.
        """
        parts = {
            "class": self.class_loss(objects, NOTHING, CONSISTENT)
        } | self.box_losses(objects, CONSISTENT, INCONSISTENT)
        return {f"{name}_{part}": value for part, value in parts.items()}

    def _chosen(self, objects: Objects, kinds: Sequence[int]) -> Tensor:
        own = torch.cat([objects.kinds, objects.kinds.new_full((1,), NOTHING)])[
            self.rows
        ]
        return torch.isin(own, own.new_tensor(kinds)) & self.real


@dataclass(frozen=True, eq=False)
class QueryView(View):
    """``pairs``: all inconsistent pairs of the batch with the auxiliary head's
    ``embeddings`` [M, D] of their boxes.

    ``encoder``: proposals against ``objects`` without names; ``decoder``: its queries;
    ``replayed``: sampled RoIs as queries, if there are; ``dense``: weighted losses of
    the ATSS head, if there is one.
    """

    objects: Objects
    pairs: Pairs
    embeddings: Tensor
    encoder: Answers
    decoder: Answers
    replayed: Answers | None
    dense: Losses
    auxiliary_weight: float
    query_weight: float

    def supervised_losses(self, config: Detector) -> Losses:
        parts = {
            "anchor_objectness": "proposal_class",
            "anchor_boxes": "proposal_l1",
            "consistent": "class",
            "boxes": "giou",
        }
        regional = super().supervised_losses(config)
        losses = {
            name: self.auxiliary_weight * Rcnn.weights[parts[name]] * value
            for name, value in regional.items()
        }
        losses |= self.encoder.settled(
            "proposals", self.objects.without_names()
        ) | self.decoder.settled("decoder", self.objects)
        losses |= self.dense
        if self.replayed is not None:
            losses |= {
                name: self.query_weight * value
                for name, value in self.replayed.settled(
                    "replayed", self.objects
                ).items()
            }
        return losses

    def private_losses(self) -> Losses:
        losses = {
            name: self.auxiliary_weight * value
            for name, value in super().private_losses().items()
        }
        seen = self.encoder.class_loss(
            self.objects.without_names(), PRIVATE
        ) + self.decoder.class_loss(self.objects, PRIVATE)
        return losses | {"private_queries": seen}

    def inconsistent_losses(self, fused: Fused, *, per_region: bool) -> Losses:
        losses = {
            name: self.auxiliary_weight * v
            for name, v in (
                super().inconsistent_losses(fused, per_region=per_region).items()
            )
        }
        objects = self.objects.named(*fused(self.embeddings, self.pairs))
        named = self.decoder.class_loss(objects, INCONSISTENT)
        if self.replayed is not None:
            named = named + self.query_weight * self.replayed.class_loss(
                objects, INCONSISTENT
            )
        return losses | {"inconsistent_queries": named}


def look_with_queries(
    student: RegionalDetr,
    images: Sequence[Tensor],
    size: tuple[int, int],
    separations: Sequence[Separation],
    generators: Sequence[torch.Generator],
) -> QueryView:
    """As ``coin_ray.training.student_outputs.look`` for the auxiliary head; and the
    encoder's proposals and the decoder's queries beside it.
    """
    batch = student.prepare(images, size)
    shared, proposed = student.propose(batch)
    view = sample(student, batch, shared, proposed, separations, generators)
    separations = [s.to(batch.pixels.device) for s in separations]
    objects = all_objects(separations, batch.sizes, student.num_classes)
    first = student.base.two_stage(shared.memory)
    replayed = replay(student, shared, view.targets, separations, objects)
    decoded = decode(student, shared, first.queries, replayed)
    queries = first.queries.content.shape[1]
    own = decoded.columns(0, queries)
    with torch.no_grad():
        embeddings = student.describe(
            shared, [s.inconsistent.boxes for s in separations]
        ).embedded
    return QueryView(
        **{f.name: getattr(view, f.name) for f in fields(view)},
        objects=objects,
        pairs=Pairs.joined([s.inconsistent for s in separations]),
        embeddings=embeddings,
        encoder=assigned(
            first.objectness[None],
            first.boxes[None],
            objects.without_names(),
            first.usable,
        ),
        decoder=assigned(own.logits, own.boxes, objects),
        replayed=(
            None
            if replayed is None
            else replayed.answers(decoded.columns(queries, decoded.logits.shape[2]))
        ),
        dense=student.dense_losses(shared, separations),
        auxiliary_weight=student.auxiliary_weight,
        query_weight=student.base.config.query_weight,
    )


def all_objects(
    separations: Sequence[Separation], sizes: Sequence[tuple[int, int]], classes: int
) -> Objects:
    """Until CKG has named them, inconsistent pairs have the mean of both opinions,
    which only counts in matching.
    """
    boxes, targets, kinds, starts = [], [], [], [0]
    for separation, size in zip(separations, sizes, strict=True):
        agreed, disputed, private = (
            separation.consistent,
            separation.inconsistent,
            separation.private,
        )
        boxes.append(
            normalise(torch.cat([agreed.boxes, disputed.boxes, private.boxes]), size)
        )
        both = (disputed.cloud.probs + disputed.clip.probs) / 2
        targets += [
            F.one_hot(agreed.cloud.labels, classes + 1)[:, :-1].float(),
            both[:, :-1],
            private.probs[:, :-1],
        ]
        sizes_of_kinds = {
            CONSISTENT: len(agreed),
            INCONSISTENT: len(disputed),
            PRIVATE: len(private),
        }
        kinds += [kind for kind, count in sizes_of_kinds.items() for _ in range(count)]
        starts.append(len(kinds))
    every = torch.cat(boxes)
    return Objects(
        every,
        torch.cat(targets),
        torch.tensor(kinds, dtype=torch.int64, device=every.device),
        tuple(starts),
    )


def assigned(
    logits: Tensor, boxes: Tensor, objects: Objects, usable: Tensor | None = None
) -> Answers:
    """One-to-one assignment of least cost, layer by layer and image by image, among the
    queries in ``usable`` [B, Q].
    """
    with torch.autocast(logits.device.type, enabled=False):
        return _assigned(logits, boxes, objects, usable)


def _assigned(
    logits: Tensor, boxes: Tensor, objects: Objects, usable: Tensor | None
) -> Answers:
    real = (
        torch.ones(logits.shape[1:3], dtype=torch.bool, device=logits.device)
        if usable is None
        else usable
    )
    rows = torch.full(logits.shape[:3], NONE, device=logits.device)
    for image, (start, stop) in enumerate(pairwise(objects.starts)):
        places = real[image].nonzero()[:, 0]
        for layer in range(len(logits)):
            named, placed = (
                logits[layer, image, places].detach(),
                boxes[layer, image, places].detach(),
            )
            costs = matching_cost(
                named, placed, objects.targets[start:stop], objects.boxes[start:stop]
            )
            query, found = (
                torch.as_tensor(i, device=rows.device)
                for i in linear_sum_assignment(costs.cpu().numpy())
            )
            rows[layer, image, places[query]] = start + found
    return Answers(logits, boxes, rows, real)


@dataclass(frozen=True, slots=True, eq=False)
class Replay:
    """Sampled RoIs on pairs as ``queries``; ``rows`` [B, M]: the objects they lie on,
    and ``real`` [B, M]: those that are no padding.
    """

    queries: Queries
    rows: Tensor
    real: Tensor

    def answers(self, decoded: Decoded) -> Answers:
        return Answers(
            decoded.logits,
            decoded.boxes,
            self.rows.expand(len(decoded.logits), -1, -1),
            self.real,
        )


def replay(
    student: RegionalDetr,
    shared: Encoded,
    targets: Sequence[RegionTargets],
    separations: Sequence[Separation],
    objects: Objects,
) -> Replay | None:
    """The auxiliary head's positives, at most ``max_positives`` of each image."""
    limit = student.base.config.max_positives
    made = student.region_queries(
        shared, [t.proposals[: min(t.positives, limit)] for t in targets]
    )
    if made is None:
        return None
    rows = [
        start + torch.cat([t.consistent, len(s.consistent) + t.inconsistent])[:limit]
        for start, t, s in zip(objects.starts, targets, separations, strict=False)
    ]
    return Replay(
        made[0], pad_sequence(rows, batch_first=True, padding_value=NONE), made[1]
    )


def decode(
    student: RegionalDetr, shared: Encoded, main: Queries, replayed: Replay | None
) -> Decoded:
    """Both groups in one pass, masked from each other."""
    if replayed is None:
        return student.base.decode(main, shared.memory)
    more = replayed.queries
    both = (
        torch.cat(pair, 1)
        for pair in (
            (main.content, more.content),
            (main.positions, more.positions),
            (main.references, more.references),
        )
    )
    mask = group_mask(
        torch.ones_like(main.content[..., 0], dtype=torch.bool), [replayed.real]
    )
    return student.base.decode(Queries(*both), shared.memory, mask)
