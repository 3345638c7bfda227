"""transformers students learn from ``Targets`` as the library learns from labels."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.ops import box_convert

from coin_ray.models.students.base import InputFormat
from coin_ray.models.students.detection import make_pixels, resize_image
from coin_ray.models.students.query_losses import (
    QueryAssignment,
    QueryPredictions,
    assign_targets,
    matchability_loss,
    quality_loss,
    varifocal_loss,
)
from coin_ray.models.students.query_matching import (
    Matches,
    MatchingCosts,
    WeightedQueryTargets,
    assign_queries,
    find_ignored_queries,
    unite_matches,
)
from coin_ray.models.students.transformers_student import TransformersStudent
from coin_ray.structures import Targets
from tests.models.students.tiny_networks import MODEL_TYPES, SIDE, tiny_network

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()

CLASSES = 3
INPUT = InputFormat(SIDE, keep_ratio=False, multiple=1, std=(255.0,) * 3)
BOXES = torch.tensor([[5.0, 6, 60, 40], [50, 20, 110, 68], [10, 10, 20, 20]])
OTHER_BOXES = torch.tensor([[15.0, 16, 60, 80]])


def _make_images() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8)
        for size in ((70, 120), (SIDE, SIDE))
    ]


def certain_targets() -> list[Targets]:
    return [
        Targets.from_labels(BOXES, torch.tensor([0, 2, 1]), CLASSES),
        Targets.from_labels(OTHER_BOXES, torch.tensor([1]), CLASSES),
    ]


def new_student(model_type: str, seed: int = 0) -> TransformersStudent:
    return TransformersStudent(tiny_network(model_type, CLASSES, seed), INPUT)


def total_loss(
    student: TransformersStudent, targets: Sequence[Targets], noise_seed: int = 3
) -> Tensor:
    torch.manual_seed(noise_seed)
    return torch.stack(list(student.losses(_make_images(), targets).values())).sum()


def library_labels(targets: Sequence[Targets]) -> list[dict[str, Tensor]]:
    labels = []
    for image, image_targets in zip(_make_images(), targets, strict=True):
        size = torch.tensor([image.shape[2], image.shape[1]] * 2)
        boxes = box_convert(image_targets.boxes / size, "xyxy", "cxcywh")
        labels.append({"class_labels": image_targets.labels, "boxes": boxes})
    return labels


def library_loss(network: Any, targets: Sequence[Targets], noise_seed: int = 3) -> Any:
    resized = [resize_image(image, INPUT) for image in _make_images()]
    pixels = make_pixels(resized, (SIDE, SIDE), INPUT)
    torch.manual_seed(noise_seed)
    return network(pixel_values=pixels, labels=library_labels(targets)).loss


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("seed", [0, 1])
def test_certain_targets_have_the_library_s_loss_and_gradient(
    model_type: str, seed: int
) -> None:
    student = new_student(model_type, seed).train()
    network = tiny_network(model_type, CLASSES, seed).train()
    expected = library_loss(network, certain_targets())
    loss = total_loss(student, certain_targets())
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    expected.backward()
    loss.backward()
    gradient, library_gradient = flat_gradient(student.network), flat_gradient(network)
    difference = (gradient - library_gradient).norm()
    assert float(difference) < 1e-4 * float(library_gradient.norm())


def flat_gradient(network: torch.nn.Module) -> Tensor:
    gradients = [p.grad for p in network.parameters() if p.grad is not None]
    return torch.cat([gradient.flatten() for gradient in gradients])


@pytest.mark.parametrize("model_type", ["rt_detr", "rt_detr_v2", "d_fine", "deimv2"])
def test_it_has_the_library_s_loss_in_evaluation_mode(model_type: str) -> None:
    student = new_student(model_type).eval()
    expected = library_loss(tiny_network(model_type).eval(), certain_targets())
    loss = total_loss(student, certain_targets())
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("model_type", ["lw_detr", "rf_detr"])
def test_one_group_of_queries_is_matched_in_evaluation_mode(model_type: str) -> None:
    """The library divides the one group by the number of training's groups."""
    network = tiny_network(model_type).eval()
    network.config.group_detr = 1
    expected = library_loss(network, certain_targets())
    loss = total_loss(new_student(model_type).eval(), certain_targets())
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_more_boxes_than_queries_have_the_library_s_loss(model_type: str) -> None:
    generator = torch.Generator().manual_seed(2)
    corners = torch.rand(30, 2, generator=generator) * 40
    sizes = torch.rand(30, 2, generator=generator) * 20 + 4
    boxes = torch.cat([corners, corners + sizes], 1)
    crowded = Targets.from_labels(boxes, torch.arange(30) % 3, CLASSES)
    targets = [crowded, certain_targets()[1]]
    expected = library_loss(tiny_network(model_type).train(), targets)
    loss = total_loss(new_student(model_type).train(), targets)
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_no_boxes_at_all_have_the_library_s_loss(model_type: str) -> None:
    empty = Targets.from_labels(torch.zeros(0, 4), torch.zeros(0).long(), CLASSES)
    targets = [empty, empty]
    expected = library_loss(tiny_network(model_type).train(), targets)
    loss = total_loss(new_student(model_type).train(), targets)
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    assert float(loss) > 0


def with_probs(probs: Tensor) -> list[Targets]:
    first, second = certain_targets()
    return [Targets(first.boxes, probs, first.weights, first.ignored), second]


@pytest.mark.parametrize("model_type", ["rt_detr_v2", "deimv2", "lw_detr"])
def test_uncertain_classes_cost_their_expectation(
    model_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one assignment for all, the loss is linear in the class distribution."""
    fix_matches(monkeypatch)
    student = new_student(model_type).eval()
    certain = certain_targets()[0].probs
    other = certain[[1, 0, 2]]
    mixture = 0.3 * certain + 0.7 * other
    losses = [class_loss(student, with_probs(p)) for p in (certain, other, mixture)]
    assert losses[0] != pytest.approx(losses[1], rel=1e-3)
    assert losses[2] == pytest.approx(0.3 * losses[0] + 0.7 * losses[1], rel=1e-5)


def class_loss(student: TransformersStudent, targets: Sequence[Targets]) -> float:
    return float(student.losses(_make_images(), targets)["class"].detach())


def fix_matches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Match the first queries to the first targets, whatever they predict."""
    from coin_ray.models.students import query_criteria

    def match_in_order(
        logits: Tensor,
        boxes: Tensor,
        targets: Sequence[WeightedQueryTargets],
        *unused: object,
    ) -> Matches:
        counts = [len(image_targets) for image_targets in targets]
        image = torch.repeat_interleave(torch.tensor(counts))
        query = torch.cat([torch.arange(count) for count in counts])
        return Matches(image, query, torch.arange(sum(counts)))

    monkeypatch.setattr(query_criteria, "assign_queries", match_in_order)


CLASS_LOSSES: dict[str, Callable[[QueryPredictions, QueryAssignment], Tensor]] = {
    "varifocal": lambda outputs, assignment: varifocal_loss(
        outputs, assignment, 0.75, 2.0
    ),
    "matchability": lambda outputs, assignment: matchability_loss(
        outputs, assignment, None, 1.5
    ),
    "quality": lambda outputs, assignment: quality_loss(outputs, assignment, 0.25),
}


@pytest.mark.parametrize("loss", CLASS_LOSSES)
def test_background_probability_lowers_the_score_that_is_learned(loss: str) -> None:
    learned_scores = []
    for background in (0.0, 0.5, 0.9):
        box = torch.tensor([[0.5, 0.5, 0.2, 0.2]])
        probs = torch.tensor([[1 - background, 0.0]])
        targets = [WeightedQueryTargets(box, probs, torch.ones(1), torch.zeros(0, 4))]
        logits = torch.zeros(1, 1, 2, requires_grad=True)
        optimizer = torch.optim.Adam([logits], lr=0.1)
        zero = torch.zeros(1, dtype=torch.int64)
        for _ in range(300):
            optimizer.zero_grad()
            outputs = QueryPredictions(logits, box[None])
            assignment = assign_targets(outputs, Matches(zero, zero, zero), targets)
            CLASS_LOSSES[loss](outputs, assignment).backward()
            optimizer.step()
        scores = logits.detach().sigmoid()[0, 0]
        learned_scores.append(float(scores[0]))
        assert scores[1] < 0.1
    assert learned_scores[0] > 0.95
    assert learned_scores == sorted(learned_scores, reverse=True)
    assert learned_scores[2] < 0.6


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_weights_scale_the_losses_of_their_boxes(
    model_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one assignment for all, the losses are linear in each weight."""
    fix_matches(monkeypatch)
    monkeypatch.setattr(
        "coin_ray.models.students.query_criteria.self_distillation_loss",
        lambda outputs, *unused: outputs.logits.new_zeros(()),
    )
    student = new_student(model_type).train()
    first, second = certain_targets()
    losses = []
    for weight in (1.0, 0.75, 0.5):
        weights = torch.tensor([1.0, weight, 1.0])
        targets = Targets(first.boxes, first.probs, weights, first.ignored)
        losses.append(float(total_loss(student, [targets, second])))
    assert losses[0] > losses[1] > losses[2]
    assert losses[1] == pytest.approx((losses[0] + losses[2]) / 2, rel=1e-5)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_boxes_of_weight_0_are_left_out(model_type: str) -> None:
    first, second = certain_targets()
    weights = torch.tensor([1.0, 1.0, 0.0])
    targets = Targets(first.boxes, first.probs, weights, first.ignored)
    shorter = Targets.from_labels(BOXES[:2], torch.tensor([0, 2]), CLASSES)
    student = new_student(model_type).train()
    loss = total_loss(student, [targets, second])
    assert torch.equal(loss, total_loss(student, [shorter, second]))


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_ignored_images_cost_exactly_nothing(model_type: str) -> None:
    student = new_student(model_type).train()
    ignored = [
        Targets.from_labels(
            torch.zeros(0, 4),
            torch.zeros(0).long(),
            CLASSES,
            ignored=torch.tensor([[0.0, 0, image.shape[2], image.shape[1]]]),
        )
        for image in _make_images()
    ]
    loss = total_loss(student, ignored)
    loss.backward()
    assert float(loss) == 0
    gradients = [p.grad for p in student.parameters() if p.grad is not None]
    assert gradients
    assert all(not bool(gradient.any()) for gradient in gradients)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_an_ignored_image_beside_others_has_no_gradient(model_type: str) -> None:
    """Also of denoising queries, which all images of a batch get."""
    first = certain_targets()[0]
    whole = torch.tensor([[0.0, 0, SIDE, SIDE]])
    ignored = Targets.from_labels(
        torch.zeros(0, 4), torch.zeros(0).long(), CLASSES, ignored=whole
    )
    student = new_student(model_type).train()
    captured: list[Tensor] = []

    def keep_gradients(*arguments: Any, **named: Any) -> Any:
        for tensor in (*arguments, *named.values()):
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                tensor.retain_grad()
                captured.append(tensor)
        return loss_function(*arguments, **named)

    loss_function = student.network.loss_function
    student.network.loss_function = keep_gradients
    total_loss(student, [first, ignored]).backward()
    used = [tensor for tensor in captured if tensor.grad is not None]
    assert len(used) >= 4
    for tensor in used:
        layer_first = tensor.shape[0] != 2 or model_type in ("lw_detr", "rf_detr")
        gradient = tensor.grad
        if layer_first and tensor.dim() == 4:
            gradient = gradient.transpose(0, 1)
        assert bool(gradient[0].any())
        assert not bool(gradient[1].any())


def test_regions_are_ignored_where_queries_lie_half_inside() -> None:
    boxes = torch.tensor(
        [[[0.25, 0.25, 0.2, 0.2], [0.49, 0.5, 0.2, 0.2], [0.51, 0.5, 0.2, 0.2]]]
    )
    region = torch.tensor([[0.0, 0.0, 0.5, 1.0]])
    targets = WeightedQueryTargets(
        torch.zeros(0, 4), torch.zeros(0, CLASSES), torch.zeros(0), region
    )
    assert find_ignored_queries(boxes, [targets]).tolist() == [[True, True, False]]


def test_boxes_without_area_are_ignored_by_their_centre() -> None:
    boxes = torch.tensor([[[0.25, 0.25, 0.0, 0.0], [0.75, 0.25, 0.0, 0.0]]])
    region = torch.tensor([[0.0, 0.0, 0.5, 1.0]])
    targets = WeightedQueryTargets(
        torch.zeros(0, 4), torch.zeros(0, CLASSES), torch.zeros(0), region
    )
    assert find_ignored_queries(boxes, [targets]).tolist() == [[True, False]]


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_matched_query_learns_inside_an_ignored_region(model_type: str) -> None:
    student = new_student(model_type).train()
    whole = torch.tensor([[0.0, 0, 120, 70]])
    first, second = certain_targets()
    targets = Targets(first.boxes, first.probs, first.weights, whole)
    loss = total_loss(student, [targets, second])
    assert 0 < float(loss) < float(total_loss(student, [first, second]))


def test_of_two_targets_for_one_query_the_larger_weight_prevails() -> None:
    boxes = torch.tensor([[[0.5, 0.5, 0.2, 0.2], [0.9, 0.9, 0.1, 0.1]]])
    logits = torch.zeros(1, 2, 1)
    truth = torch.tensor([[0.5, 0.5, 0.2, 0.2], [0.5, 0.5, 0.2, 0.2]])
    costs = MatchingCosts(2.0, 5.0, 2.0, 0.25, 2.0)
    for weights, winner in (([0.3, 0.9], 1), ([0.9, 0.3], 0)):
        targets = WeightedQueryTargets(
            truth, torch.ones(2, 1), torch.tensor(weights), torch.zeros(0, 4)
        )
        matches = assign_queries(logits, boxes, [targets], costs)
        target_of_query = dict(
            zip(matches.query.tolist(), matches.target.tolist(), strict=True)
        )
        assert target_of_query[0] == winner


def test_united_matches_keep_the_most_frequent_target() -> None:
    images = torch.tensor([0, 1])
    layers = [
        Matches(images, torch.tensor([4, 7]), torch.tensor([0, 1])),
        Matches(images, torch.tensor([4, 7]), torch.tensor([2, 1])),
        Matches(images, torch.tensor([4, 9]), torch.tensor([2, 0])),
    ]
    united = unite_matches(layers, image_count=3)
    assert united.image.tolist() == [0, 1, 1]
    assert united.query.tolist() == [4, 7, 9]
    assert united.target.tolist() == [2, 1, 0]


def test_a_step_lowers_the_loss() -> None:
    student = new_student("d_fine").train()
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    before = float(total_loss(student, certain_targets()))
    for _ in range(10):
        optimizer.zero_grad()
        total_loss(student, certain_targets()).backward()
        optimizer.step()
    assert float(total_loss(student, certain_targets())) < 0.8 * before


def test_copies_learn_the_same() -> None:
    """EMA teachers are deep copies."""
    student = new_student("rt_detr_v2").train()
    duplicate = copy.deepcopy(student)
    assert torch.equal(
        total_loss(student, certain_targets()), total_loss(duplicate, certain_targets())
    )


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_it_learns_in_bfloat16(model_type: str) -> None:
    student = new_student(model_type).train()
    expected = float(total_loss(student, certain_targets()).detach())
    with torch.autocast("cpu", torch.bfloat16):
        loss = total_loss(student, certain_targets())
    loss.backward()
    assert loss.dtype == torch.float32
    assert float(loss.detach()) == pytest.approx(expected, rel=0.1)
