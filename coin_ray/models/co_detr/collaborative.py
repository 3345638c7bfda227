"""Collaborative hybrid assignment training: the base detector, which is exported, with
auxiliary heads that only training uses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from coin_ray.config.co_detr import CoDetr
from coin_ray.models.base import Images
from coin_ray.models.co_detr.atss import Atss
from coin_ray.models.co_detr.auxiliary import HeadOutputs
from coin_ray.models.co_detr.criterion import (
    ObjectWeights,
    QueryTargets,
    match_hungarian,
    set_losses,
)
from coin_ray.models.co_detr.decoder import (
    ClassifierFactory,
    DecoderOutputs,
    new_linear_classifier,
)
from coin_ray.models.co_detr.denoising import Denoising
from coin_ray.models.co_detr.encoder import Memory
from coin_ray.models.co_detr.model import IMAGENET_MEAN, IMAGENET_STD, DeformableDetr
from coin_ray.models.co_detr.pyramid import Pyramid
from coin_ray.models.co_detr.queries import (
    PositiveQueries,
    QueryGroup,
    concatenate_queries,
)
from coin_ray.models.co_detr.rcnn import Rcnn
from coin_ray.models.co_detr.targets import (
    DetrTargets,
    Size,
    normalise,
    validate_targets,
)
from coin_ray.models.co_detr.two_stage import Proposals
from coin_ray.structures import Detections

HEADS: dict[str, type[Rcnn] | type[Atss]] = {"rcnn": Rcnn, "atss": Atss}
BASE_PREFIX, DECODER, AGREEMENT = "base.", "decoder", "agreement"


@dataclass(frozen=True, slots=True, eq=False)
class Objective:
    """``losses``: every part, weighted; their sum is minimised. ``positives``: how many
    each auxiliary head assigned.
    """

    losses: dict[str, Tensor]
    positives: dict[str, int]

    @property
    def total(self) -> Tensor:
        return torch.stack(list(self.losses.values())).sum()


class CollaborativeDetr(nn.Module):
    """``base`` is the detector; everything beside it is dropped after training."""

    def __init__(
        self,
        backbone: nn.Module,
        classes: int,
        config: CoDetr,
        new_classifier: ClassifierFactory = new_linear_classifier,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
    ) -> None:
        super().__init__()
        self.config = config
        self.base = DeformableDetr(backbone, classes, config, new_classifier, mean, std)
        uses_heads = config.auxiliary_losses or config.positive_queries
        names = config.auxiliary if uses_heads else ()
        names_with_queries = names if config.positive_queries else ()
        self.pyramid = Pyramid(config.width) if names else None
        self.heads = nn.ModuleDict(
            {name: HEADS[name](config, classes) for name in names}
        )
        self.queries = nn.ModuleDict(
            {name: PositiveQueries(config, classes) for name in names_with_queries}
        )
        self.denoising = Denoising(config, classes) if config.denoising else None

    def predict(self, images: Images) -> list[Detections]:
        return self.base.predict(images)

    @torch.no_grad()
    def predict_by_head(self, images: Images) -> dict[str, list[Detections]]:
        """Return the detections of each head: ``decoder``, bit for bit ``predict``'s,
        and the auxiliary heads by name.
        """
        memory = self.base.encode(images)
        detections = {DECODER: self.base.predict_from_memory(memory, images.sizes)}
        if self.pyramid is not None:
            maps = self.pyramid(memory, images.sizes)
            for name, head in self.heads.items():
                detections[name] = head.predict(maps)  # type: ignore[operator]
        return detections

    def objective(
        self,
        images: Images,
        targets: Sequence[DetrTargets],
        generator: torch.Generator | None = None,
    ) -> Objective:
        """Return the losses of a batch against its objects. Raises InputError for
        impossible labels or boxes.

        sum over layers of [decoder + lambda 1 * positive queries + denoising] +
        proposals + layers * lambda 2 * auxiliary heads (eq. 6). ``generator`` (on the
        CPU) draws the samples of the auxiliary heads.
        """
        valid_targets = validate_targets(targets, images.sizes, self.base.num_classes)
        targets = [t.to(images.pixels.device) for t in valid_targets]
        memory = self.base.encode(images)
        proposals: Proposals = self.base.two_stage(memory)
        main_count = proposals.queries.content.shape[1]
        head_outputs = self._run_heads(memory, images.sizes, targets, generator)
        groups = self._query_groups(head_outputs, images.sizes, targets, generator)
        queries, mask = concatenate_queries(proposals.queries, list(groups.values()))
        decoded: DecoderOutputs = self.base.decoder(queries, memory, mask)
        main_outputs = decoded.select_queries(0, main_count)
        losses = _main_losses(main_outputs, proposals, targets, images.sizes)
        losses |= self._query_losses(decoded, groups, main_count)
        losses |= self._head_losses(head_outputs)
        positives = {
            name: sum(len(p) for p in outputs.positives)
            for name, outputs in head_outputs.items()
        }
        return Objective(losses, positives)

    def _run_heads(
        self,
        memory: Memory,
        sizes: tuple[Size, ...],
        targets: Sequence[DetrTargets],
        generator: torch.Generator | None,
    ) -> dict[str, HeadOutputs]:
        if self.pyramid is None:
            return {}
        maps = self.pyramid(memory, sizes)
        return {
            name: head(maps, targets, generator) for name, head in self.heads.items()
        }

    def _query_groups(
        self,
        head_outputs: Mapping[str, HeadOutputs],
        sizes: Sequence[Size],
        targets: Sequence[DetrTargets],
        generator: torch.Generator | None,
    ) -> dict[str, QueryGroup]:
        groups: dict[str, QueryGroup] = {}
        for name, make_queries in self.queries.items():
            positives = head_outputs[name].positives
            groups[f"{name}_queries"] = make_queries(positives, sizes, generator)
        if self.denoising is not None:
            embedding = self.base.two_stage.embedding
            groups["denoising"] = self.denoising(targets, sizes, embedding, generator)
        return groups

    def _query_losses(
        self, decoded: DecoderOutputs, groups: Mapping[str, QueryGroup], start: int
    ) -> dict[str, Tensor]:
        losses: dict[str, Tensor] = {}
        for name, group in groups.items():
            stop = start + group.queries.content.shape[1]
            layer_targets = [group.targets] * len(decoded.logits)
            group_outputs = decoded.select_queries(start, stop)
            weight = 1.0 if name == "denoising" else self.config.query_weight
            for part, loss in _layer_losses(group_outputs, layer_targets, name).items():
                losses[part] = weight * loss
            start = stop
        return losses

    def _head_losses(
        self, head_outputs: Mapping[str, HeadOutputs]
    ) -> dict[str, Tensor]:
        if not self.config.auxiliary_losses:
            return {}
        factor = self.config.auxiliary_weight * self.config.decoder_layers
        return {
            f"{name}_{part}": factor * HEADS[name].weights[part] * loss
            for name, outputs in head_outputs.items()
            for part, loss in outputs.losses.items()
        }


def base_state_dict(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Select the base detector's weights among those of a model around it, named as the
    base names them.
    """
    return {
        name.removeprefix(BASE_PREFIX): tensor
        for name, tensor in weights.items()
        if name.startswith(BASE_PREFIX)
    }


def _main_losses(
    decoded: DecoderOutputs,
    proposals: Proposals,
    targets: Sequence[DetrTargets],
    sizes: Sequence[Size],
) -> dict[str, Tensor]:
    labels = [t.labels for t in targets]
    truth = [t.normalised_boxes(size) for t, size in zip(targets, sizes, strict=True)]
    object_weights = [
        ObjectWeights(t.object_weights, normalise(t.ignored_boxes, size))
        for t, size in zip(targets, sizes, strict=True)
    ]
    layer_targets = [
        match_hungarian(logits, boxes, labels, truth, object_weights=object_weights)
        for logits, boxes in zip(decoded.logits, decoded.boxes, strict=True)
    ]
    proposal_targets = match_hungarian(
        proposals.objectness,
        proposals.boxes,
        [torch.zeros_like(image_labels) for image_labels in labels],
        truth,
        proposals.usable,
        object_weights,
    )
    proposal_losses = set_losses(
        proposals.objectness, proposals.boxes, proposal_targets
    )
    losses = {f"proposals_{part}": loss for part, loss in proposal_losses.items()}
    return losses | _layer_losses(decoded, layer_targets, "decoder")


def _layer_losses(
    decoded: DecoderOutputs, layer_targets: Sequence[QueryTargets], name: str
) -> dict[str, Tensor]:
    losses = {}
    layers = zip(decoded.logits, decoded.boxes, layer_targets, strict=True)
    for number, (logits, boxes, targets) in enumerate(layers):
        for part, loss in set_losses(logits, boxes, targets).items():
            losses[f"{name}_{number}_{part}"] = loss
    return losses
