"""Collaborative hybrid assignment training: the shipped detector with the auxiliary
heads that only training sees.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from coin_ray.config.co_detr import CoDetr
from coin_ray.models.base import Images
from coin_ray.models.co_detr.atss import Atss
from coin_ray.models.co_detr.auxiliary import Outcome
from coin_ray.models.co_detr.criterion import Assigned, Doubt, hungarian, set_losses
from coin_ray.models.co_detr.decoder import Decoded, NewClassifier, linear_classifier
from coin_ray.models.co_detr.denoising import Denoising
from coin_ray.models.co_detr.model import IMAGENET_MEAN, IMAGENET_STD, DeformableDetr
from coin_ray.models.co_detr.pyramid import Pyramid
from coin_ray.models.co_detr.queries import Group, PositiveQueries, joined
from coin_ray.models.co_detr.rcnn import Rcnn
from coin_ray.models.co_detr.targets import Size, Targets, checked, normalise
from coin_ray.models.co_detr.two_stage import Proposals
from coin_ray.structures import Detections

HEADS: dict[str, type[Rcnn] | type[Atss]] = {"rcnn": Rcnn, "atss": Atss}
SHIPPED, DECODER, AGREEMENT = "base.", "decoder", "agreement"


@dataclass(frozen=True, slots=True, eq=False)
class Objective:
    """``losses``: every part, weighted, so that their sum is what is minimised.
    ``positives``: how many each auxiliary head assigned.
    """

    losses: dict[str, Tensor]
    positives: dict[str, int]

    @property
    def total(self) -> Tensor:
        return torch.stack(list(self.losses.values())).sum()


class CollaborativeDetr(nn.Module):
    """``base`` is the detector; everything beside it is left behind after training."""

    def __init__(
        self,
        backbone: nn.Module,
        classes: int,
        config: CoDetr,
        new_classifier: NewClassifier = linear_classifier,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
    ) -> None:
        super().__init__()
        self.config = config
        self.base = DeformableDetr(backbone, classes, config, new_classifier, mean, std)
        used = (
            config.auxiliary
            if config.auxiliary_losses or config.positive_queries
            else ()
        )
        self.pyramid = Pyramid(config.width) if used else None
        self.heads = nn.ModuleDict(
            {name: HEADS[name](config, classes) for name in used}
        )
        self.queries = nn.ModuleDict(
            {
                name: PositiveQueries(config, classes)
                for name in used
                if config.positive_queries
            }
        )
        self.denoising = Denoising(config, classes) if config.denoising else None

    def predict(self, images: Images) -> list[Detections]:
        return self.base.predict(images)

    @torch.no_grad()
    def opinions(self, images: Images) -> dict[str, list[Detections]]:
        """What each head finds: ``decoder``, bit for bit ``predict``'s, and the
        auxiliary heads by name.
        """
        memory = self.base.encode(images)
        found = {DECODER: self.base.detections(memory, images.sizes)}
        if self.pyramid is not None:
            maps = self.pyramid(memory, images.sizes)
            found |= {name: head.predict(maps) for name, head in self.heads.items()}  # type: ignore[operator]
        return found

    def objective(
        self,
        images: Images,
        targets: Sequence[Targets],
        generator: torch.Generator | None = None,
    ) -> Objective:
        """Losses of a batch against its objects. Raises InputError for labels or boxes
        that can't be.

        sum over layers of [decoder + lambda 1 * positive queries + denoising] +
        proposals + layers * lambda 2 * auxiliary heads (eq. 6). ``generator`` (on the
        CPU) draws the samples of the auxiliary heads.
        """
        device = images.pixels.device
        targets = [
            t.to(device) for t in checked(targets, images.sizes, self.base.num_classes)
        ]
        memory = self.base.encode(images)
        proposals: Proposals = self.base.two_stage(memory)
        outcomes: dict[str, Outcome] = {}
        if self.pyramid is not None:
            maps = self.pyramid(memory, images.sizes)
            outcomes = {
                name: head(maps, targets, generator)
                for name, head in self.heads.items()
            }
        groups = {
            f"{name}_queries": make(outcomes[name].positives, images.sizes, generator)
            for name, make in self.queries.items()
        }
        if self.denoising is not None:
            groups["denoising"] = self.denoising(
                targets, images.sizes, self.base.two_stage.embedding, generator
            )
        queries, mask = joined(proposals.queries, list(groups.values()))
        decoded: Decoded = self.base.decoder(queries, memory, mask)
        losses = _main_losses(
            decoded.columns(0, proposals.queries.content.shape[1]),
            proposals,
            targets,
            images.sizes,
        )
        losses |= self._query_losses(
            decoded, groups, proposals.queries.content.shape[1]
        )
        losses |= self._head_losses(outcomes)
        return Objective(
            losses,
            {
                name: sum(len(p) for p in outcome.positives)
                for name, outcome in outcomes.items()
            },
        )

    def _query_losses(
        self, decoded: Decoded, groups: Mapping[str, Group], start: int
    ) -> dict[str, Tensor]:
        losses: dict[str, Tensor] = {}
        for name, group in groups.items():
            stop = start + group.queries.content.shape[1]
            assigned = [group.assigned] * len(decoded.logits)
            own = _layer_losses(decoded.columns(start, stop), assigned, name)
            weight = 1.0 if name == "denoising" else self.config.query_weight
            losses |= {part: weight * value for part, value in own.items()}
            start = stop
        return losses

    def _head_losses(self, outcomes: Mapping[str, Outcome]) -> dict[str, Tensor]:
        if not self.config.auxiliary_losses:
            return {}
        factor = self.config.auxiliary_weight * self.config.decoder_layers
        return {
            f"{name}_{part}": factor * HEADS[name].weights[part] * value
            for name, outcome in outcomes.items()
            for part, value in outcome.losses.items()
        }


def shipped(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of a CollaborativeDetr's weights those of its base, named as DeformableDetr does."""
    return {
        name.removeprefix(SHIPPED): value
        for name, value in weights.items()
        if name.startswith(SHIPPED)
    }


def _main_losses(
    decoded: Decoded,
    proposals: Proposals,
    targets: Sequence[Targets],
    sizes: Sequence[Size],
) -> dict[str, Tensor]:
    labels, truth = (
        [t.labels for t in targets],
        [t.normalised(size) for t, size in zip(targets, sizes, strict=True)],
    )
    doubts = [
        Doubt(t.certainty, normalise(t.left_out, size))
        for t, size in zip(targets, sizes, strict=True)
    ]
    assigned = [
        hungarian(logits, boxes, labels, truth, doubts=doubts)
        for logits, boxes in zip(decoded.logits, decoded.boxes, strict=True)
    ]
    objects = [torch.zeros_like(own) for own in labels]
    first = hungarian(
        proposals.objectness, proposals.boxes, objects, truth, proposals.usable, doubts
    )
    losses = {
        f"proposals_{part}": value
        for part, value in set_losses(
            proposals.objectness, proposals.boxes, first
        ).items()
    }
    return losses | _layer_losses(decoded, assigned, "decoder")


def _layer_losses(
    decoded: Decoded, assigned: Sequence[Assigned], name: str
) -> dict[str, Tensor]:
    return {
        f"{name}_{number}_{part}": value
        for number, (logits, boxes, own) in enumerate(
            zip(decoded.logits, decoded.boxes, assigned, strict=True)
        )
        for part, value in set_losses(logits, boxes, own).items()
    }
