from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from coin_ray.config import TrainingConfig
from coin_ray.config.co_detr import CoDetr, tiny
from coin_ray.errors import ConfigError, InputError
from coin_ray.models.co_detr.backbone import TinyBackbone
from coin_ray.models.co_detr.collaborative import (
    CollaborativeDetr,
    Objective,
    base_state_dict,
)
from coin_ray.models.co_detr.model import (
    DeformableDetr,
    append_background,
    load_detector_weights,
)
from coin_ray.models.co_detr.targets import DetrTargets
from coin_ray.training.supervised import parameter_groups
from models.co_detr.scenes import (
    CLASSES,
    TWO_IMAGES,
    have_same_fields,
    make_crowd,
    make_targets,
    new_collaborative,
    new_detr,
    noise_batch,
    seeded,
)

PARTS = ("class", "l1", "giou")
HEAD_LOSSES = {
    "rcnn_proposal_class",
    "rcnn_proposal_l1",
    "rcnn_class",
    "rcnn_giou",
    "atss_class",
    "atss_giou",
    "atss_centerness",
}
EMPTY = [make_targets(), make_targets()]


def _objective(targets: list[DetrTargets] = TWO_IMAGES, **changes: Any) -> Objective:
    return new_collaborative(tiny(**changes)).objective(
        noise_batch(), targets, seeded()
    )


def _layer_losses(name: str, count: int = 2) -> set[str]:
    return {f"{name}_{layer}_{part}" for layer in range(count) for part in PARTS}


BASE = _layer_losses("decoder") | {f"proposals_{part}" for part in PARTS}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"auxiliary": ()}, BASE),
        ({"auxiliary_losses": False, "positive_queries": False}, BASE),
        ({"positive_queries": False}, BASE | HEAD_LOSSES),
        (
            {"auxiliary_losses": False},
            BASE | _layer_losses("rcnn_queries") | _layer_losses("atss_queries"),
        ),
        (
            {},
            BASE
            | HEAD_LOSSES
            | _layer_losses("rcnn_queries")
            | _layer_losses("atss_queries"),
        ),
        (
            {"auxiliary": ("atss",)},
            BASE
            | {n for n in HEAD_LOSSES if n.startswith("atss")}
            | _layer_losses("atss_queries"),
        ),
        (
            {"decoder_layers": 1, "auxiliary": ()},
            _layer_losses("decoder", 1) | {f"proposals_{part}" for part in PARTS},
        ),
    ],
)
def test_every_part_of_the_objective_has_a_name(
    changes: dict[str, Any], expected: set[str]
) -> None:
    objective = _objective(**changes)
    assert set(objective.losses) == expected
    assert all(float(v.detach()) > 0 for v in objective.losses.values())
    torch.testing.assert_close(
        objective.total, torch.stack([*objective.losses.values()]).sum()
    )


def test_final_weights_of_the_heads_are_the_published_ones() -> None:
    """Six layers, lambda 2 = 2, against the plain losses of the heads."""
    model, images = new_collaborative(tiny(decoder_layers=6)), noise_batch()
    objective = model.objective(images, TWO_IMAGES, seeded())
    maps = model.pyramid(model.base.encode(images), images.sizes)  # type: ignore[misc]
    generator = seeded()
    plain = {
        f"{name}_{part}": loss
        for name, head in model.heads.items()
        for part, loss in head(maps, TWO_IMAGES, generator).losses.items()
    }
    table = dict.fromkeys(HEAD_LOSSES, 12.0) | {"rcnn_giou": 120.0, "atss_giou": 24.0}
    for name, factor in table.items():
        torch.testing.assert_close(
            objective.losses[name], factor * plain[name], rtol=1e-5, atol=1e-7
        )


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("auxiliary_weight", HEAD_LOSSES),
        ("query_weight", _layer_losses("rcnn_queries") | _layer_losses("atss_queries")),
    ],
)
def test_doubling_a_weight_doubles_its_parts_and_nothing_else(
    name: str, changed: set[str]
) -> None:
    before, after = _objective(**{name: 1.0}).losses, _objective(**{name: 2.0}).losses
    for part, loss in before.items():
        torch.testing.assert_close(
            after[part], 2 * loss if part in changed else loss, rtol=1e-5, atol=1e-7
        )


def test_the_main_losses_are_the_same_with_and_without_positive_queries() -> None:
    with_queries, without = _objective(), _objective(positive_queries=False)
    for part in BASE:
        torch.testing.assert_close(
            with_queries.losses[part], without.losses[part], atol=1e-6, rtol=1e-6
        )


def _finite_gradients(model: nn.Module, objective: Objective) -> dict[str, bool]:
    objective.total.backward()  # type: ignore[no-untyped-call]
    for name, weight in model.named_parameters():
        assert weight.grad is None or bool(torch.isfinite(weight.grad).all()), name
    return {name: weight.grad is not None for name, weight in model.named_parameters()}


def test_every_weight_learns_also_where_one_image_has_no_object() -> None:
    model = new_collaborative()
    targets = [TWO_IMAGES[0], make_targets()]
    objective = model.objective(noise_batch(), targets, seeded())
    assert all(_finite_gradients(model, objective).values())


@pytest.mark.parametrize("name", ["rcnn", "atss"])
def test_an_auxiliary_head_trains_the_encoder_and_the_backbone(name: str) -> None:
    model = new_collaborative()
    losses = model.objective(noise_batch(), TWO_IMAGES, seeded()).losses
    head_losses = [
        loss
        for part, loss in losses.items()
        if part in HEAD_LOSSES and part.startswith(name)
    ]
    torch.stack(head_losses).sum().backward()  # type: ignore[no-untyped-call]
    trained_names = [
        weight_name
        for weight_name, weight in model.base.named_parameters()
        if weight.grad is not None and bool(weight.grad.any())
    ]
    assert any(n.startswith("backbone.stages.0") for n in trained_names)
    assert any(n.startswith("encoder.layers.0") for n in trained_names)
    assert not any(n.startswith(("decoder", "two_stage")) for n in trained_names)


EXTREMES = {
    "no object": EMPTY,
    "one pixel": [make_targets((10, 10, 11, 11, 0)), make_targets((3, 3, 3.2, 3.2, 1))],
    "whole image": [
        make_targets((0, 0, 96, 64, 0)),
        make_targets((-9, -9, 200, 200, 1)),
    ],
    "eighty objects": [make_crowd(), make_targets()],
    "the same object twice": [
        make_targets((5, 5, 40, 40, 0), (5, 5, 40, 40, 0)),
        make_targets((5, 5, 40, 40, 0), (5, 5, 40, 40, 1)),
    ],
}


@pytest.mark.parametrize("targets", EXTREMES.values(), ids=EXTREMES.keys())
def test_losses_and_gradients_are_finite(targets: list[DetrTargets]) -> None:
    model = new_collaborative()
    objective = model.objective(noise_batch(), targets, seeded())
    assert bool(torch.isfinite(objective.total))
    assert float(objective.total.detach()) > 0
    _finite_gradients(model, objective)


def test_losses_are_single_precision_and_finite_in_a_half_precision_network() -> None:
    model = new_collaborative()
    with torch.autocast("cpu", torch.bfloat16):
        objective = model.objective(noise_batch(), TWO_IMAGES, seeded())
    assert {v.dtype for v in objective.losses.values()} == {torch.float32}
    assert bool(torch.isfinite(objective.total))
    _finite_gradients(model, objective)
    exact = new_collaborative().objective(noise_batch(), TWO_IMAGES, seeded()).losses
    assert float(objective.losses["proposals_class"].detach()) == pytest.approx(
        float(exact["proposals_class"].detach()), rel=0.05
    )


def test_without_objects_box_losses_are_zero_and_class_losses_are_not() -> None:
    objective = _objective(EMPTY)
    assert objective.positives == {"rcnn": 0, "atss": 0}
    for name, loss in objective.losses.items():
        expects_boxes = "queries" in name or name.endswith(("l1", "giou", "centerness"))
        assert (float(loss.detach()) == 0.0) is expects_boxes, name


def test_positives_of_each_head_are_counted() -> None:
    objective = _objective()
    assert objective.positives["rcnn"] >= 3
    assert objective.positives["atss"] >= 3


def test_only_the_base_is_exported() -> None:
    model = new_collaborative().eval()
    all_weights, base_weights = model.state_dict(), base_state_dict(model.state_dict())
    alone = DeformableDetr(TinyBackbone((16, 16, 32)), CLASSES, model.config).eval()
    load_detector_weights(alone, base_weights)
    assert 0 < len(base_weights) < len(all_weights)
    assert all(
        torch.equal(all_weights[f"base.{name}"], tensor)
        for name, tensor in base_weights.items()
    )
    whole, base = model.predict(noise_batch()), alone.predict(noise_batch())
    assert all(have_same_fields(a, b) for a, b in zip(whole, base, strict=True))


def test_weights_of_another_detector_are_refused() -> None:
    other = DeformableDetr(TinyBackbone((16, 16, 32)), CLASSES + 2, tiny())
    with pytest.raises(
        InputError,
        match=(
            r"expected decoder.classify.0.bias of shape \[3\], got \[5\] \(and 3"
            r" more\).*Give the classes"
        ),
    ):
        load_detector_weights(new_detr(), other.state_dict())
    with pytest.raises(InputError, match="got absent"):
        load_detector_weights(new_detr(), new_collaborative().state_dict())


def test_heads_that_nothing_uses_are_not_built() -> None:
    for model in (
        new_collaborative(tiny(auxiliary=())),
        new_collaborative(tiny(auxiliary_losses=False, positive_queries=False)),
    ):
        assert all(name.startswith("base.") for name in model.state_dict())


@pytest.mark.parametrize("label", [-1, CLASSES])
def test_labels_of_other_classes_are_refused(label: int) -> None:
    with pytest.raises(InputError, match="labels must lie in"):
        _objective([make_targets((1, 1, 20, 20, label)), make_targets()])


def test_detections_lie_in_their_image_best_first() -> None:
    for detections, (height, width) in zip(
        new_detr().eval().predict(noise_batch()), noise_batch().sizes, strict=True
    ):
        assert 0 < len(detections) <= 100
        assert detections.num_classes == CLASSES
        assert bool(
            (detections.boxes >= 0).all()
            and (detections.boxes[:, 2:] <= torch.tensor([width, height])).all()
        )
        assert detections.scores.tolist() == sorted(
            detections.scores.tolist(), reverse=True
        )
        torch.testing.assert_close(detections.probs.sum(1), torch.ones(len(detections)))


def test_only_the_best_and_only_above_the_threshold_are_detected() -> None:
    all_pairs = new_detr(tiny(detections=1000)).eval().predict(noise_batch())[0]
    assert len(all_pairs) == 30 * CLASSES
    limit = float(all_pairs.scores[20])
    few = new_detr(tiny(score_min=limit)).eval().predict(noise_batch())[0]
    assert len(few) == int((all_pairs.scores > limit).sum())
    assert len(new_detr(tiny(detections=7)).eval().predict(noise_batch())[0]) == 7


def test_background_takes_what_the_classes_leave() -> None:
    vectors = append_background(torch.tensor([[0.2, 0.3], [0.9, 0.9]]))
    torch.testing.assert_close(
        vectors, torch.tensor([[0.2, 0.3, 0.5], [0.5, 0.5, 0.0]])
    )


class _VectorClassifier(nn.Module):
    """Classifies by one vector per class."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.vectors = nn.Parameter(torch.randn(classes, width))

    def forward(self, queries: Tensor) -> Tensor:
        return queries @ self.vectors.T


def test_the_classifier_can_be_replaced() -> None:
    torch.manual_seed(0)
    model = CollaborativeDetr(
        TinyBackbone((16, 16, 32)),
        CLASSES,
        tiny(auxiliary=("atss",)),
        _VectorClassifier,
    )
    assert all(
        isinstance(layer, _VectorClassifier) for layer in model.base.decoder.classify
    )
    assert all(
        _finite_gradients(model, model.objective(noise_batch(), TWO_IMAGES)).values()
    )
    assert model.eval().predict(noise_batch())[0].num_classes == CLASSES


def test_images_are_padded_to_a_multiple_that_holds_all() -> None:
    images = new_detr().prepare(
        [
            torch.full((3, 40, 70), 255, dtype=torch.uint8),
            torch.zeros(3, 64, 33, dtype=torch.uint8),
        ]
    )
    assert tuple(images.pixels.shape) == (2, 3, 64, 96)
    assert images.sizes == ((40, 70), (64, 33))
    assert not bool(images.pixels[0, :, 40:].any())
    assert bool((images.pixels[0, :, :40, :70] > 2).all())


def test_an_image_smaller_than_a_cell_is_seen() -> None:
    model = new_collaborative()
    images = model.base.prepare(
        [
            torch.zeros(3, 1, 1, dtype=torch.uint8),
            torch.zeros(3, 5, 300, dtype=torch.uint8),
        ]
    )
    objective = model.objective(
        images,
        [make_targets((0, 0, 1, 1, 0)), make_targets((0, 0, 300, 5, 1))],
        seeded(),
    )
    _finite_gradients(model, objective)
    assert all(
        bool(torch.isfinite(d.boxes).all()) for d in model.eval().predict(images)
    )


def test_the_backbone_and_the_offsets_learn_slowly() -> None:
    model = new_collaborative()
    *slow, fast = parameter_groups(model, TrainingConfig(lr=1e-3, visual_lr_factor=0.1))
    assert [g["lr"] for g in (*slow, fast)] == [
        pytest.approx(1e-4),
        pytest.approx(1e-4),
        1e-3,
    ]
    names = {p: name for name, p in model.named_parameters()}
    slow_names = {names[p] for g in slow for p in g["params"]}  # type: ignore[attr-defined]
    assert len(slow_names) + len(fast["params"]) == len(names)  # type: ignore[arg-type]
    assert {
        n for n in names.values() if "backbone" in n or "offsets" in n
    } == slow_names
    assert len(slow_names) == 5 * 3 + 4 * 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 66}, "width must be a multiple of 4"),
        ({"width": 68, "heads": 8}, "width 68 must be a multiple of co_detr.heads 8"),
        ({"auxiliary": ("fcos",)}, "auxiliary can hold rcnn, atss; got fcos"),
        ({"auxiliary": ("atss", "atss")}, "names a head twice"),
        ({"queries": 0}, "queries must be positive; got 0"),
        ({"levels": 6}, r"levels must lie in 3\.\.5"),
        ({"auxiliary_weight": -1.0}, "must be finite and not negative"),
        ({"roi_positive": 1.5}, r"roi_positive must lie in 0\.\.1"),
    ],
)
def test_impossible_settings_are_reported(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(CoDetr(), **changes)


def test_checkpointed_layers_give_the_same_losses_and_gradients() -> None:
    totals, gradients = [], []
    for config in (tiny(), tiny(checkpoint_layers=True)):
        model = new_collaborative(config)
        total = model.objective(noise_batch(), TWO_IMAGES, seeded()).total
        total.backward()  # type: ignore[no-untyped-call]
        totals.append(float(total.detach()))
        gradients.append(
            [p.grad.clone() for p in model.parameters() if p.grad is not None]
        )
    assert totals[0] == totals[1]
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(checkpointed, plain, atol=1e-5, rtol=1e-4)
