from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import (
    assert_finite_step,
    detections,
    detr_distillation,
    loss_values,
    pairs,
    separation,
    tiny_co_detr,
    tiny_fit,
    tiny_network,
    training_batches,
)
from torch import Tensor

from coin_ray.models.co_detr.regional import RegionalDetr
from coin_ray.structures import Detections, Separation
from coin_ray.training import diagnosis
from coin_ray.training.queries import (
    BACKGROUND,
    CONSISTENT,
    INCONSISTENT,
    NO_OBJECT,
    PRIVATE,
    UNCONFIDENT,
    DetrStudentOutputs,
    Objects,
    QueryOutputs,
    forward_detr_student,
    list_objects,
    match_queries,
)
from coin_ray.training.student_outputs import common_size

REGIONAL = {"anchor_objectness", "anchor_boxes", "consistent", "boxes"}
PARTS = ("class", "l1", "giou")
QUERIES = {
    f"{name}_{part}" for name in ("proposals", "decoder", "replayed") for part in PARTS
}
ALWAYS = (
    REGIONAL
    | QUERIES
    | {"private_regions", "private_anchors", "private_queries", "alignment"}
)
CKG = {"ckg_consistent", "ckg_gradient"}
NAMED = {"inconsistent", "inconsistent_queries"}
A, B, C = (
    ((4.0, 4, 30, 28), 0, 0.9),
    ((34.0, 8, 58, 34), 1, 0.8),
    ((36.0, 36, 58, 58), 2, 0.7),
)
B_OTHER = (B[0], 2, 0.6)
SIZE = (64, 64)


def _forward(student: RegionalDetr, *separations: Separation) -> DetrStudentOutputs:
    images = []
    for seed in range(len(separations)):
        draw = torch.Generator().manual_seed(seed)
        image = torch.randint(0, 255, (3, *SIZE), dtype=torch.uint8, generator=draw)
        images.append(image)
    generators = [torch.Generator().manual_seed(i) for i in range(len(separations))]
    return forward_detr_student(
        student.train(), images, common_size(images), separations, generators
    )


@pytest.mark.parametrize("has_text_classes", [True, False])
def test_every_named_loss_is_active_before_and_after_the_burn_up(
    has_text_classes: bool, tmp_path: Path
) -> None:
    fit = tiny_fit(steps=3)
    task = detr_distillation(fit, named=has_text_classes)
    for step, batch in enumerate(training_batches(tmp_path, fit)):
        parts = task.train_step(batch, step)
        assert set(parts) - diagnosis.NAMES == ALWAYS | CKG | (NAMED if step else set())
        assert_finite_step(task, parts)
        assert all(
            abs(v) > 1e-9
            for name, v in loss_values(parts).items()
            if name not in diagnosis.NAMES
        ), loss_values(parts)


@pytest.mark.parametrize("step", [0, 5])
@pytest.mark.parametrize(
    ("cloud", "clip"),
    [
        pytest.param([], [], id="nothing at all"),
        pytest.param([A, C], [A], id="no inconsistent"),
        pytest.param([B, C], [B_OTHER], id="no consistent"),
        pytest.param([], [C], id="all private"),
        pytest.param([A, B], [A, B_OTHER], id="no private"),
    ],
)
def test_every_step_of_queries_is_finite(
    cloud: list[Any],
    clip: list[Any],
    step: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fit = tiny_fit(steps=1)
    task = detr_distillation(fit, burn_up=5)
    (batch,) = training_batches(tmp_path, fit)
    count = len(batch.weak)
    clip_detections = [detections(*clip)] * count
    batch.detections["cloud"] = [detections(*cloud)] * count
    batch.detections["clip"] = clip_detections
    monkeypatch.setattr(
        task, "predict_with_teacher", lambda images, size: clip_detections
    )
    parts = task.train_step(batch, step)
    assert_finite_step(task, parts)
    assert (set(parts) >= CKG) == (clip == [A, B_OTHER])
    assert (set(parts) >= NAMED) == (step >= 5)


def test_objects_are_listed_image_by_image_and_kind_by_kind() -> None:
    all_kinds = separation(consistent=[A], inconsistent=[B], private=[C])
    objects = list_objects(
        [all_kinds, separation(), separation(private=[A])], [SIZE, SIZE, SIZE], 3
    )
    assert objects.starts == (0, 3, 3, 4)
    assert objects.kinds.tolist() == [CONSISTENT, INCONSISTENT, PRIVATE, PRIVATE]
    torch.testing.assert_close(objects.boxes[0], torch.tensor([17.0, 16, 26, 24]) / 64)
    assert objects.targets[0].tolist() == [1, 0, 0]
    torch.testing.assert_close(
        objects.targets[1],
        (all_kinds.inconsistent.cloud.probs + all_kinds.inconsistent.clip.probs)[0, :-1]
        / 2,
    )
    torch.testing.assert_close(objects.targets[2], all_kinds.private.probs[0, :-1])


def test_fused_classes_are_given_to_inconsistent_pairs_above_the_threshold() -> None:
    objects = list_objects([separation(consistent=[A], inconsistent=[B, C])], [SIZE], 3)
    fused = torch.tensor([[0.1, 0.8, 0.05, 0.05], [0.3, 0.3, 0.2, 0.2]])
    fused_objects = objects.with_fused_classes(fused, 0.5)
    assert fused_objects.kinds.tolist() == [CONSISTENT, INCONSISTENT, UNCONFIDENT]
    torch.testing.assert_close(fused_objects.targets[1:], fused[:, :-1])
    assert torch.equal(fused_objects.targets[0], objects.targets[0])


def test_class_agnostic_targets_are_one_for_pairs_and_the_foreground_for_private_boxes() -> (
    None
):
    all_kinds = separation(consistent=[A], inconsistent=[B], private=[C])
    agnostic = list_objects([all_kinds], [SIZE], 3).class_agnostic()
    assert agnostic.kinds.tolist() == [CONSISTENT, CONSISTENT, PRIVATE]
    assert agnostic.targets[:2, 0].tolist() == [1, 1]
    torch.testing.assert_close(
        agnostic.targets[2, 0], all_kinds.private.probs[0, :-1].sum()
    )


def _outputs_by_hand(kinds: list[int], logits: Tensor) -> tuple[QueryOutputs, Objects]:
    """Return the outputs of one image and layer: query i is matched to object i, the last
    one to none. Each predicted box is .1 too far right."""
    count = len(kinds)
    boxes = torch.tensor([[0.5, 0.5, 0.2, 0.2]]).repeat(count, 1)
    objects = Objects(boxes, torch.eye(3)[:count], torch.tensor(kinds), (0, count))
    predicted = torch.cat([boxes, boxes[:1]]) + torch.tensor([0.1, 0, 0, 0])
    rows = torch.tensor([[[*range(count), NO_OBJECT]]])
    return (
        QueryOutputs(
            logits,
            predicted[None, None],
            rows,
            torch.ones(1, count + 1, dtype=torch.bool),
        ),
        objects,
    )


def test_each_kind_of_object_has_its_own_losses() -> None:
    logits = torch.zeros(1, 1, 4, 3, requires_grad=True)
    outputs, objects = _outputs_by_hand([CONSISTENT, INCONSISTENT, PRIVATE], logits)
    for kinds, rows_with_gradient in [
        ((BACKGROUND, CONSISTENT), [0, 3]),
        ((INCONSISTENT,), [1]),
        ((PRIVATE,), [2]),
        ((UNCONFIDENT,), []),
    ]:
        (gradient,) = torch.autograd.grad(outputs.class_loss(objects, *kinds), logits)
        assert (
            gradient[0, 0].abs().sum(1).nonzero()[:, 0].tolist() == rows_with_gradient
        ), kinds
    boxes = outputs.box_losses(objects, CONSISTENT, INCONSISTENT)
    assert float(boxes["l1"]) == pytest.approx(5 * (0.1 + 0.1) / 3, rel=1e-5)
    assert float(outputs.box_losses(objects, UNCONFIDENT)["giou"]) == 0


def test_matching_takes_the_closest_query_for_each_object_whatever_its_kind() -> None:
    objects = list_objects([separation(consistent=[A], private=[C])], [SIZE], 3)
    boxes = torch.cat([objects.boxes.flip(0), torch.tensor([[0.1, 0.9, 0.1, 0.1]])])[
        None, None
    ]
    outputs = match_queries(torch.zeros(1, 1, 3, 3), boxes, objects)
    assert outputs.rows[0, 0].tolist() == [1, 0, NO_OBJECT]
    usable = torch.tensor([[False, True, True]])
    assert match_queries(torch.zeros(1, 1, 3, 3), boxes, objects, usable).rows[
        0, 0
    ].tolist() == [NO_OBJECT, 0, 1]


def test_main_queries_do_not_see_the_replayed_ones() -> None:
    kinds = separation(consistent=[A], inconsistent=[B], private=[C])
    alone = tiny_co_detr(network=tiny_network(positive_queries=False))
    beside = tiny_co_detr()
    missing = beside.load_state_dict(alone.state_dict(), strict=False)
    assert all(name.startswith("queries.") for name in missing.missing_keys)
    outputs_alone, outputs_beside = (
        _forward(alone, kinds, separation()),
        _forward(beside, kinds, separation()),
    )
    assert outputs_alone.replayed is None
    assert outputs_beside.replayed is not None
    torch.testing.assert_close(
        outputs_alone.decoder.logits, outputs_beside.decoder.logits
    )
    torch.testing.assert_close(
        outputs_alone.decoder.boxes, outputs_beside.decoder.boxes
    )
    assert not [
        name
        for name in outputs_alone.supervised_losses(alone.config)
        if name.startswith("replayed")
    ]


def test_replayed_rois_are_matched_to_the_pair_they_were_sampled_on() -> None:
    kinds = separation(consistent=[A], inconsistent=[B], private=[C])
    outputs = _forward(tiny_co_detr(), separation(private=[A]), kinds)
    assert outputs.replayed is not None
    rows, real = outputs.replayed.rows[0], outputs.replayed.is_real
    assert not real[0].any()
    target = outputs.region_targets[1]
    assert rows[1][real[1]].tolist() == [1] * len(target.consistent) + [2] * len(
        target.inconsistent
    )
    assert len(target.consistent) > 0
    assert len(target.inconsistent) > 0
    boxes = outputs.objects.boxes[rows[1][real[1]]] * 64
    torch.testing.assert_close(
        torch.cat(
            [boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2], 1
        ),
        target.boxes,
    )


@pytest.mark.parametrize(
    ("kind", "losses"),
    [
        ("consistent", REGIONAL | QUERIES),
        ("private", {"private_regions", "private_anchors", "private_queries"}),
        ("inconsistent", NAMED),
        ("alignment", {"alignment"}),
    ],
)
def test_a_weight_of_zero_removes_its_kind(
    kind: str, losses: set[str], tmp_path: Path
) -> None:
    fit = tiny_fit(steps=1)
    (batch,) = training_batches(tmp_path, fit)
    task = detr_distillation(fit, burn_up=5, inconsistent_from=0, **{kind: 0.0})
    parts = loss_values(task.train_step(batch, 0))
    zeros = {name for name, loss in parts.items() if loss == 0}
    assert zeros - diagnosis.NAMES == losses


def test_each_kind_trains_the_decoder_and_the_auxiliary_head() -> None:
    student = tiny_co_detr()
    outputs = _forward(
        student, separation(consistent=[A], inconsistent=[B], private=[C])
    )
    confident = torch.tensor([[0.1, 0.1, 0.7, 0.1]])
    groups = {
        "consistent": outputs.supervised_losses(student.config),
        "private": outputs.private_losses(),
        "inconsistent": outputs.inconsistent_losses(
            lambda embedded, pairs: (confident.expand(len(embedded), -1), 0.5),
            per_region=True,
        ),
    }
    parameters = [
        student.base.decoder.layers[0].attention.value.weight,
        student.head.transformation.layers[0].weight,
    ]
    for kind, losses in groups.items():
        gradients = torch.autograd.grad(
            torch.stack(list(losses.values())).sum(), parameters, retain_graph=True
        )
        assert all(bool(g.any()) for g in gradients), kind
    unconfident = outputs.inconsistent_losses(
        lambda embedded, pairs: (confident.expand(len(embedded), -1), 0.9),
        per_region=True,
    )
    assert loss_values(unconfident) == {
        "inconsistent": 0.0,
        "inconsistent_queries": 0.0,
    }


def test_ckg_aligns_gradients_of_the_auxiliary_heads_transformation(
    tmp_path: Path,
) -> None:
    fit = tiny_fit(steps=1)
    (batch,) = training_batches(tmp_path, fit)
    task = detr_distillation(fit)
    size = common_size(batch.weak)
    outputs = forward_detr_student(
        task.student,
        batch.strong,
        size,
        task.separate(batch, False, size),
        batch.generators,
    )  # type: ignore[arg-type]
    before = [p.detach().clone() for p in task.fusion.ckg.parameters()]
    assert (
        set(task.fusion.train(outputs, task.student.head, 5)) - diagnosis.NAMES == CKG
    )
    assert any(
        not torch.equal(a, b)
        for a, b in zip(before, task.fusion.ckg.parameters(), strict=True)
    )
    assert all(p.grad is None for p in task.student.parameters())


def test_the_teacher_is_the_student_at_the_end_of_the_burn_up_then_an_average(
    tmp_path: Path,
) -> None:
    fit = tiny_fit(steps=3)
    task = detr_distillation(fit, burn_up=1, teacher_rate=0.25)
    for step, batch in enumerate(training_batches(tmp_path, fit)):
        teacher, student = (
            {n: t.clone() for n, t in m.state_dict().items()}
            for m in (task.teacher, task.student)
        )
        task.train_step(batch, step)
        rate = {0: 0.0, 1: 1.0, 2: 0.25}[step]
        for name, tensor in task.teacher.state_dict().items():
            torch.testing.assert_close(tensor, teacher[name].lerp(student[name], rate))


def test_detections_of_the_teacher_and_the_clip_detector_are_merged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit = tiny_fit(steps=1)
    (batch,) = training_batches(tmp_path, fit)
    task = detr_distillation(fit)
    collected, predicted = (
        detections((A[0], 0, 0.4), (B[0], 1, 0.9)),
        detections((A[0], 0, 0.6), (B[0], 1, 0.5), (C[0], 2, 0.3)),
    )
    batch.detections["clip"] = [collected] * len(batch.weak)
    monkeypatch.setattr(
        task, "predict_with_teacher", lambda images, size: [predicted] * len(images)
    )
    merged, *_ = task.predict_second_teacher(batch, common_size(batch.weak))
    assert sorted(zip(merged.labels.tolist(), merged.scores.tolist(), strict=True)) == [
        (0, pytest.approx(0.6)),
        (1, pytest.approx(0.9)),
        (2, pytest.approx(0.3)),
    ]


def test_bfloat16_queries_leave_losses_and_weights_in_float32(tmp_path: Path) -> None:
    fit = replace(tiny_fit(steps=2), amp=True)
    task = detr_distillation(fit, burn_up=1)
    for step, batch in enumerate(training_batches(tmp_path, fit)):
        parts = task.train_step(batch, step)
        assert {v.dtype for v in parts.values()} == {torch.float32}
        assert_finite_step(task, parts)
    assert {p.dtype for p in task.student.parameters()} == {torch.float32}


def test_without_pairs_everything_is_private() -> None:
    """There is nothing to replay without a pair, and no box to learn."""
    alone = Separation(
        pairs(Detections.empty(3), Detections.empty(3)),
        pairs(Detections.empty(3), Detections.empty(3)),
        detections(A, C),
    )
    student = tiny_co_detr()
    outputs = _forward(student, alone, alone)
    parts = loss_values(outputs.supervised_losses(student.config))
    assert {
        parts[name] for name in parts if name.endswith(("_l1", "_giou", "boxes"))
    } == {0.0}
    assert parts["decoder_class"] > 0
    assert loss_values(outputs.private_losses())["private_queries"] > 0


def test_with_two_heads_the_atss_head_trains_the_encoder_as_well() -> None:
    student = tiny_co_detr(network=tiny_network(auxiliary=("rcnn", "atss")))
    alone = separation(consistent=[A])
    losses = _forward(student, alone).supervised_losses(student.config)
    parts = {"atss_class", "atss_giou", "atss_centerness"}
    assert set(losses) == REGIONAL | QUERIES | parts
    assert (
        set(_forward(tiny_co_detr(), alone).supervised_losses(student.config))
        == REGIONAL | QUERIES
    )
    torch.stack([losses[name] for name in parts]).sum().backward()  # type: ignore[no-untyped-call]
    reached = {
        n
        for n, p in student.named_parameters()
        if p.grad is not None and bool(p.grad.any())
    }
    assert any(n.startswith("base.encoder.") for n in reached)
    assert not any(
        n.startswith(("base.decoder.", "head.", "proposals.")) for n in reached
    )


def test_the_atss_head_ignores_inconsistent_and_private_boxes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    student = tiny_co_detr(network=tiny_network(auxiliary=("rcnn", "atss")))
    head_targets: list[Any] = []
    head = student.atss
    assert head is not None
    original = head.forward
    monkeypatch.setattr(
        head,
        "forward",
        lambda maps, targets: head_targets.extend(targets) or original(maps, targets),
    )
    outputs = _forward(
        student, separation([A], inconsistent=[B], private=[C]), separation()
    )
    assert all(bool(v.isfinite()) for v in outputs.dense.values())
    first_image, second_image = head_targets
    assert first_image.boxes.tolist() == [list(row[0]) for row in (A, B, C)]
    assert first_image.labels[:1].tolist() == [A[1]]
    assert first_image.weights.tolist() == [1, 0, 0]
    assert len(second_image.boxes) == 0
