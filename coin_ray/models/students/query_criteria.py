"""The training objectives of transformers' detectors for soft targets: the arguments and
the return value are those of a model's ``loss_function``.

RT-DETR, RT-DETRv2, D-FINE and DEIMv2 sum over decoder layers, encoder and denoising
queries; LW-DETR and RF-DETR over decoder layers and encoder, in groups of queries.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from coin_ray.models.students.query_losses import (
    BoxDistributions,
    QueryAssignment,
    QueryPredictions,
    assign_targets,
    box_losses,
    count_over_workers,
    fine_grained_loss,
    matchability_loss,
    quality_loss,
    self_distillation_loss,
    varifocal_loss,
)
from coin_ray.models.students.query_matching import (
    Matches,
    MatchingCosts,
    WeightedQueryTargets,
    assign_queries,
    unite_matches,
)

LossOutputs = tuple[Tensor, dict[str, Tensor], None]
TARGETS = "coin_ray_targets"
"""Key of an image's ``WeightedQueryTargets`` in its labels."""


def make_labels(targets: Sequence[WeightedQueryTargets]) -> list[dict[str, Any]]:
    """Return the labels of a batch as transformers' models take them: the most probable
    class of each box, for denoising queries, and the targets themselves.
    """
    return [
        {"class_labels": t.probs.argmax(1), "boxes": t.boxes, TARGETS: t}
        for t in targets
    ]


def real_time_loss(
    _logits: Tensor,
    labels: Sequence[Mapping[str, Any]],
    _device: torch.device,
    _pred_boxes: Tensor,
    config: Any,
    outputs_class: Tensor,
    outputs_coord: Tensor,
    *,
    enc_topk_logits: Tensor,
    enc_topk_bboxes: Tensor,
    denoising_meta_values: Mapping[str, Any] | None = None,
    predicted_corners: Tensor | None = None,
    initial_reference_points: Tensor | None = None,
    **_unused: object,
) -> LossOutputs:
    """Return the loss and its parts ``class``, ``l1``, ``giou``, ``denoising`` and, for
    D-FINE and DEIMv2, ``fine_grained`` and ``self_distillation``.
    """
    distributions: tuple[Tensor, Tensor] | None = None
    if predicted_corners is not None and initial_reference_points is not None:
        distributions = predicted_corners, initial_reference_points
        # D-FINE predicts boxes beyond the image; its losses clip centres and sizes
        outputs_coord = outputs_coord.clamp(0, 1)
        enc_topk_bboxes = enc_topk_bboxes.clamp(0, 1)
    denoising_count = 0
    if denoising_meta_values is not None:
        denoising_count = int(denoising_meta_values["dn_num_split"][0])
    decoder = _Decoder(outputs_class, outputs_coord, distributions)
    layers = decoder.split_layers(slice(denoising_count, None))
    # the last layer teaches distributions and learns none
    last = QueryPredictions(
        outputs_class[:, -1, denoising_count:], outputs_coord[:, -1, denoising_count:]
    )
    encoder = QueryPredictions(enc_topk_logits, enc_topk_bboxes)
    objective = _RealTimeObjective(config, [label[TARGETS] for label in labels])
    parts = objective.sum_layers([last, *layers[:-1], encoder])
    if denoising_meta_values is not None:
        denoising_layers = decoder.split_layers(slice(0, denoising_count))
        parts["denoising"] = objective.denoising_loss(
            denoising_layers, denoising_meta_values
        )
    return torch.stack(list(parts.values())).sum(), parts, None


@dataclass(frozen=True, slots=True, eq=False)
class _Decoder:
    """Outputs of all layers and queries: ``logits`` [B, L, Q, K], ``boxes``
    [B, L, Q, 4]; ``distributions``: corners and references [B, M, Q, ...].

    In training D-FINE has one more layer of logits and boxes than of distributions:
    those before the first refinement. The library pairs both from the first on, so that
    the distributions are those of the following layer and the last pair is left out.
    """

    logits: Tensor
    boxes: Tensor
    distributions: tuple[Tensor, Tensor] | None

    def split_layers(self, queries: slice) -> list[QueryPredictions]:
        """Return the outputs of each layer for some of the queries."""
        logits, boxes = self.logits[:, :, queries], self.boxes[:, :, queries]
        if self.distributions is None:
            layers = zip(logits.unbind(1), boxes.unbind(1), strict=True)
            return [QueryPredictions(*layer) for layer in layers]
        corners, references = (tensor[:, :, queries] for tensor in self.distributions)
        return [
            QueryPredictions(
                logits[:, layer],
                boxes[:, layer],
                BoxDistributions(
                    corners[:, layer],
                    references[:, layer],
                    corners[:, -1],
                    logits[:, -1],
                ),
            )
            for layer in range(corners.shape[1])
        ]


@dataclass(frozen=True)
class _RealTimeObjective:
    """The losses of one batch; ``config`` is the model's."""

    config: Any
    targets: Sequence[WeightedQueryTargets]

    def sum_layers(self, layers: Sequence[QueryPredictions]) -> dict[str, Tensor]:
        """Return the sums of weighted losses over layers, each matched by itself."""
        matches = [self.match(layer) for layer in layers]
        count = self.count_targets(layers[0].logits.device)
        united, united_count = None, count
        if getattr(self.config, "use_dense_one_to_one", False):
            united = unite_matches(matches, len(self.targets))
            united_count = count_over_workers(len(united), united.image.device)
        sums: defaultdict[str, Tensor] = defaultdict(lambda: count.new_zeros(()))
        for layer, layer_matches in zip(layers, matches, strict=True):
            assignment = assign_targets(layer, layer_matches, self.targets)
            sums["class"] += self.class_loss(layer, assignment) / count
            if united is not None:
                assignment = assign_targets(layer, united, self.targets)
            for name, loss in self.localization(
                layer, assignment, united_count
            ).items():
                sums[name] += loss
        return dict(sums)

    def denoising_loss(
        self, layers: Sequence[QueryPredictions], meta: Mapping[str, Any]
    ) -> Tensor:
        """Return the weighted losses of the denoising queries, whose targets are known:
        query ``dn_positive_idx`` of each image and group is made of one box.
        """
        device = layers[0].logits.device
        matches = _denoising_matches(self.targets, meta, device)
        count = self.count_targets(device) * meta["dn_num_group"]
        total: Tensor = count.new_zeros(())
        for layer in layers:
            assignment = assign_targets(layer, matches, self.targets)
            localization = self.localization(layer, assignment, count)
            total = total + self.class_loss(layer, assignment) / count
            total = total + torch.stack(list(localization.values())).sum()
        return total

    def count_targets(self, device: torch.device) -> Tensor:
        return count_over_workers(sum(map(len, self.targets)), device)

    def match(self, layer: QueryPredictions) -> Matches:
        config = self.config
        costs = MatchingCosts(
            config.matcher_class_cost,
            config.matcher_bbox_cost,
            config.matcher_giou_cost,
            config.matcher_alpha,
            config.matcher_gamma,
        )
        return assign_queries(layer.logits, layer.boxes, self.targets, costs)

    def class_loss(
        self, layer: QueryPredictions, assignment: QueryAssignment
    ) -> Tensor:
        config = self.config
        gamma = config.focal_loss_gamma
        if config.model_type == "deimv2":
            return float(config.weight_loss_mal) * matchability_loss(
                layer, assignment, config.mal_alpha, gamma
            )
        alpha = config.focal_loss_alpha
        return float(config.weight_loss_vfl) * varifocal_loss(
            layer, assignment, alpha, gamma
        )

    def localization(
        self, layer: QueryPredictions, assignment: QueryAssignment, count: Tensor
    ) -> dict[str, Tensor]:
        config = self.config
        l1, giou = box_losses(layer, assignment)
        losses = {
            "l1": config.weight_loss_bbox * l1 / count,
            "giou": config.weight_loss_giou * giou / count,
        }
        if layer.distributions is None:
            return losses
        bins = config.max_num_bins
        fine_grained = fine_grained_loss(
            layer, assignment, bins, config.reg_scale, config.up
        )
        distillation = self_distillation_loss(layer, assignment, bins)
        losses["fine_grained"] = config.weight_loss_fgl * fine_grained / count
        losses["self_distillation"] = config.weight_loss_ddf * distillation
        return losses


def _denoising_matches(
    targets: Sequence[WeightedQueryTargets],
    meta: Mapping[str, Any],
    device: torch.device,
) -> Matches:
    images, queries, numbers = [], [], []
    first_target = 0
    for image, image_targets in enumerate(targets):
        positives = meta["dn_positive_idx"][image].to(device)
        target = torch.arange(len(image_targets), device=device)
        images.append(torch.full_like(positives, image))
        queries.append(positives)
        numbers.append(target.tile(meta["dn_num_group"]) + first_target)
        first_target += len(image_targets)
    return Matches(torch.cat(images), torch.cat(queries), torch.cat(numbers))


def grouped_loss(
    logits: Tensor,
    labels: Sequence[Mapping[str, Any]],
    _device: torch.device,
    pred_boxes: Tensor,
    config: Any,
    outputs_class: Tensor,
    outputs_coord: Tensor,
    enc_outputs_class: Tensor,
    enc_outputs_coord: Tensor,
    **_unused: object,
) -> LossOutputs:
    """Return the loss and its parts ``class``, ``l1`` and ``giou``."""
    targets = [label[TARGETS] for label in labels]
    layers = [QueryPredictions(logits, pred_boxes)]
    # the last of the layers is the one above
    for layer in range(len(outputs_class) - 1):
        layers.append(QueryPredictions(outputs_class[layer], outputs_coord[layer]))
    layers.append(QueryPredictions(enc_outputs_class, enc_outputs_coord))
    # in evaluation mode there is one group
    group_count = logits.shape[1] // config.num_queries
    costs = MatchingCosts(
        config.class_cost, config.bbox_cost, config.giou_cost, alpha=0.25, gamma=2.0
    )
    count = count_over_workers(group_count * sum(map(len, targets)), logits.device)
    class_sum = l1_sum = giou_sum = count.new_zeros(())
    for outputs in layers:
        matches = assign_queries(
            outputs.logits, outputs.boxes, targets, costs, group_count
        )
        assignment = assign_targets(outputs, matches, targets)
        l1, giou = box_losses(outputs, assignment)
        class_loss = quality_loss(outputs, assignment, config.focal_alpha)
        class_sum, l1_sum, giou_sum = (
            class_sum + class_loss,
            l1_sum + l1,
            giou_sum + giou,
        )
    parts = {
        "class": config.class_loss_coefficient * class_sum / count,
        "l1": config.bbox_loss_coefficient * l1_sum / count,
        "giou": config.giou_loss_coefficient * giou_sum / count,
    }
    return torch.stack(list(parts.values())).sum(), parts, None
