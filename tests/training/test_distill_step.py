from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import (
    TEMPLATES,
    assert_finite_step,
    detections,
    distillation,
    loss_values,
    pairs,
    tiny_clip,
    tiny_config,
    tiny_fit,
    training_batches,
)
from torch import Tensor

from coin_ray.clip.encoder import class_embeddings
from coin_ray.config import Distill, Separate
from coin_ray.data.examples import Batch
from coin_ray.fusion.vectors import normalised
from coin_ray.models.faster_rcnn_clip.model import build_detector
from coin_ray.structures import Detections
from coin_ray.training import diagnosis
from coin_ray.training.distill import Distillation
from coin_ray.training.student_outputs import common_size, forward_student

GOLDEN = Path(__file__).parents[1] / "golden" / "distill_losses.json"
SUPERVISED = {"anchor_objectness", "anchor_boxes", "consistent", "boxes"}
ALWAYS = (
    SUPERVISED | {"private_regions", "private_anchors", "alignment"} | diagnosis.COUNTS
)
CKG = {"ckg_consistent", "ckg_gradient"} | (diagnosis.NAMES - diagnosis.COUNTS)


def _copy_weights(module: torch.nn.Module) -> dict[str, Tensor]:
    return {n: t.detach().clone() for n, t in module.state_dict().items()}


def _has_moved(before: dict[str, Tensor], module: torch.nn.Module) -> bool:
    return any(not torch.equal(t, before[n]) for n, t in module.state_dict().items())


def test_golden_losses_of_training_batches(tmp_path: Path) -> None:
    """Compare a fixed run on one thread with the stored losses. After an intended change
    of the method, delete the file, run this test twice and inspect the difference."""
    torch.set_num_threads(1)
    fit = tiny_fit(steps=3)
    task = distillation(fit, burn_up=1)
    losses = []
    for step, batch in enumerate(training_batches(tmp_path, fit)):
        losses.append(loss_values(task.train_step(batch, step)))
    if not GOLDEN.exists():
        GOLDEN.write_text(json.dumps(losses, indent=1, sort_keys=True))
        pytest.fail(f"wrote {GOLDEN}")
    expected = json.loads(GOLDEN.read_text())
    assert [sorted(names) for names in losses] == [sorted(names) for names in expected]
    for step_losses, expected_losses in zip(losses, expected, strict=True):
        assert step_losses == pytest.approx(expected_losses, rel=1e-4)


def test_named_parts_before_and_after_the_burn_up(tmp_path: Path) -> None:
    fit = tiny_fit(steps=3)
    task = distillation(fit, burn_up=1)
    batches = training_batches(tmp_path, fit)
    names = [set(task.train_step(batch, step)) for step, batch in enumerate(batches)]
    assert names == [
        ALWAYS | CKG,
        ALWAYS | CKG | {"inconsistent"},
        ALWAYS | CKG | {"inconsistent"},
    ]


def test_every_loss_is_active(tmp_path: Path) -> None:
    fit = tiny_fit(steps=3)
    task = distillation(fit, burn_up=1)
    for step, batch in enumerate(training_batches(tmp_path, fit)):
        parts = loss_values(task.train_step(batch, step))
    assert all(
        abs(v) > 1e-9 for name, v in parts.items() if name not in diagnosis.NAMES
    ), parts


def test_teacher_and_ckg_and_prototypes_move_when_they_should(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit = tiny_fit(steps=4)
    task = distillation(fit, burn_up=3, prototypes_from=2)
    prototypes = (
        task.fusion.consistent_prototypes,
        task.fusion.cloud_prototypes,
        task.fusion.clip_prototypes,
    )
    for step, batch in enumerate(training_batches(tmp_path, fit)):
        modules = (task.student, task.teacher, task.fusion.ckg, *prototypes)
        # these have pairs of both kinds, unlike a random teacher's
        clip = batch.detections["clip"]
        monkeypatch.setattr(
            task, "predict_with_teacher", lambda images, size, clip=clip: clip
        )
        before = [_copy_weights(p) for p in modules]
        task.train_step(batch, step)
        has_moved = [_has_moved(b, p) for b, p in zip(before, modules, strict=True)]
        assert has_moved == [True, step >= 3, *[step >= 2] * 4]


def test_the_teachers_prompts_are_updated_too(tmp_path: Path) -> None:
    """The teacher's class embeddings are recomputed after each update, not cached."""
    fit = tiny_fit(steps=3, lr=0.1)
    task = distillation(fit, burn_up=1, teacher_rate=0.5)
    embeddings = []
    for step, batch in enumerate(training_batches(tmp_path, fit)):
        task.train_step(batch, step)
        if step:
            embeddings.append(task.teacher.class_embeddings().clone())
            torch.testing.assert_close(
                embeddings[-1], task.teacher.train().eval().class_embeddings()
            )
    assert not torch.allclose(embeddings[0], embeddings[1])


A, B, C = (
    ((4.0, 4, 30, 28), 0, 0.9),
    ((34.0, 8, 58, 34), 1, 0.8),
    ((36.0, 36, 58, 58), 2, 0.7),
)
B_OTHER = (B[0], 2, 0.6)


@pytest.mark.parametrize("step", [0, 5])
@pytest.mark.parametrize(
    ("cloud", "clip"),
    [
        pytest.param([], [], id="nothing at all"),
        pytest.param([A, C], [A], id="no inconsistent"),
        pytest.param([B, C], [B_OTHER], id="no consistent"),
        pytest.param([], [C], id="no cloud"),
        pytest.param([A, B], [A, B_OTHER], id="no private"),
        pytest.param([A], [], id="no clip"),
    ],
)
def test_every_step_is_finite(
    cloud: list[Any],
    clip: list[Any],
    step: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Train before and after the burn-up; after it the teacher predicts the same boxes."""
    fit = tiny_fit(steps=1)
    task = distillation(fit, burn_up=5)
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
    has_both_kinds = clip == [A, B_OTHER]
    assert (set(parts) >= CKG) == has_both_kinds
    assert ("inconsistent" in parts) == (step >= 5)


def test_without_both_kinds_ckg_does_not_move(tmp_path: Path) -> None:
    fit = tiny_fit(steps=1)
    task = distillation(fit)
    (batch,) = training_batches(tmp_path, fit)
    batch.detections.update(
        {name: [detections(A)] * len(batch.weak) for name in ("cloud", "clip")}
    )
    before, prototypes = (
        _copy_weights(task.fusion.ckg),
        _copy_weights(task.fusion.cloud_prototypes),
    )
    task.train_step(batch, 0)
    assert not _has_moved(before, task.fusion.ckg)
    assert not _has_moved(prototypes, task.fusion.cloud_prototypes)


@pytest.mark.parametrize("fusion", ["average", "cloud", "clip"])
def test_rules_instead_of_ckg(fusion: str, tmp_path: Path) -> None:
    fit = tiny_fit(steps=1)
    task = distillation(fit, fusion=fusion)
    (batch,) = training_batches(tmp_path, fit)
    before = _copy_weights(task.fusion.ckg)
    parts = task.train_step(batch, 1)
    assert not CKG & set(parts)
    assert "inconsistent" in parts
    assert not _has_moved(before, task.fusion.ckg)


@pytest.mark.parametrize(("ckg_lr", "same"), [(0.0, True), (0.1, False)])
def test_ckg_may_teach_before_or_after_its_own_step(
    ckg_lr: float, same: bool, tmp_path: Path
) -> None:
    """CKG's step is first in the paper and last in the published code; the first losses
    differ by that step alone."""
    fit = tiny_fit(steps=1, warmup=0)
    losses = []
    for ckg_first in (True, False):
        (batch,) = training_batches(tmp_path, fit)
        task = distillation(
            fit, ckg_first=ckg_first, ckg_lr=ckg_lr, burn_up=5, inconsistent_from=0
        )
        losses.append(loss_values(task.train_step(batch, 0)))
    before, after = (parts.pop("inconsistent") for parts in losses)
    assert losses[0] == losses[1]
    assert (before == after) == same


def test_the_teacher_is_updated_with_the_student_before_the_step(
    tmp_path: Path,
) -> None:
    fit = tiny_fit(steps=1)
    (batch,) = training_batches(tmp_path, fit)
    task = distillation(fit, burn_up=0, teacher_rate=0.25)
    teacher, student = _copy_weights(task.teacher), _copy_weights(task.student)
    task.train_step(batch, 0)
    for name, tensor in task.teacher.state_dict().items():
        torch.testing.assert_close(tensor, teacher[name].lerp(student[name], 0.25))


@pytest.mark.parametrize("burnt_up", [False, True])
def test_a_review_replaces_both_teachers(burnt_up: bool, tmp_path: Path) -> None:
    """Two images are reviewed, one of them as empty; the third is labelled by the
    teachers, before and after the burn-up."""
    fit = tiny_fit(steps=1, batch=3)
    (batch,) = training_batches(tmp_path, fit)
    unreviewed = distillation(fit).separate(batch, burnt_up, common_size(batch.weak))
    review = detections(((2, 2, 20, 30), 1, 1.0), ((30, 4, 50, 40), 2, 1.0))
    batch.detections["cloud"][:2] = [review, review[:0]]
    batch.reviewed[:2] = [True, True]
    first, empty, third = distillation(fit).separate(
        batch, burnt_up, common_size(batch.weak)
    )
    assert torch.equal(first.consistent.boxes, review.boxes)
    assert torch.equal(first.consistent.cloud.labels, review.labels)
    assert torch.equal(first.consistent.clip.probs, review.probs)
    assert [
        len(parts)
        for parts in (
            first.inconsistent,
            first.private,
            empty.consistent,
            empty.inconsistent,
            empty.private,
        )
    ] == [0] * 5
    assert (first.reviewed, empty.reviewed, third.reviewed) == (True, True, False)
    assert torch.equal(third.consistent.boxes, unreviewed[2].consistent.boxes)
    assert torch.equal(third.private.boxes, unreviewed[2].private.boxes)


def test_order_of_images_in_the_batch_does_not_matter(tmp_path: Path) -> None:
    fit = tiny_fit(steps=1)
    losses = []
    for direction in (1, -1):
        (batch,) = training_batches(tmp_path, fit)
        by_name = {name: rows[::direction] for name, rows in batch.detections.items()}
        reordered = Batch(
            batch.weak[::direction],
            batch.strong[::direction],
            by_name,
            batch.generators[::direction],
            batch.reviewed[::direction],
        )
        task = distillation(fit, burn_up=5, inconsistent_from=0)
        losses.append(loss_values(task.train_step(reordered, 0)))
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def _as_one_class(rows: Detections) -> Detections:
    """Return the published vectors of one class: all mass is on it; scores stay."""
    labels = torch.zeros_like(rows.labels)
    probs = torch.tensor([[1.0, 0.0]]).repeat(len(rows), 1)
    return Detections(rows.boxes, rows.scores, labels, probs)


@pytest.mark.parametrize("step", [0, 5])
def test_one_class_has_no_inconsistent_pairs(step: int, tmp_path: Path) -> None:
    """Nothing is inconsistent, so CKG never moves; everything else does."""
    fit = tiny_fit(steps=1)
    student, teacher = (
        build_detector(tiny_clip(), ("car",), tiny_config(), seed=s) for s in (1, 0)
    )
    embeddings = class_embeddings(tiny_clip(), ("car",), TEMPLATES)
    config = Distill(fit=fit, prototypes_from=0, burn_up=5, teacher_rate=0.1)
    task = Distillation(
        student, teacher, embeddings, config, Separate(iou_min=0.2, clip_score_min=0.0)
    )
    (batch,) = training_batches(tmp_path, fit)
    batch.detections.update(
        {
            name: [_as_one_class(d) for d in rows]
            for name, rows in batch.detections.items()
        }
    )
    batch.detections["cloud"] = [normalised(d) for d in batch.detections["cloud"]]
    before = _copy_weights(task.fusion.ckg), _copy_weights(task.student)
    parts = task.train_step(batch, step)
    assert_finite_step(task, parts)
    assert not CKG & set(parts)
    assert ("inconsistent" in parts) == (step >= 5)
    assert float(parts.get("inconsistent", torch.zeros(())).detach()) == 0
    assert (
        _has_moved(before[0], task.fusion.ckg),
        _has_moved(before[1], task.student),
    ) == (
        False,
        True,
    )


def test_rules_by_hand() -> None:
    opinions = pairs(detections(B), detections(B_OTHER))
    embedded = torch.zeros(1, 64)
    expected = {
        "cloud": opinions.cloud.probs,
        "clip": opinions.clip.probs,
        "average": (opinions.cloud.probs + opinions.clip.probs) / 2,
    }
    for rule, expected_probs in expected.items():
        task = distillation(tiny_fit(), fusion=rule)
        fused = task.fusion.fuse(embedded, opinions.cloud.probs, opinions.clip.probs)
        torch.testing.assert_close(fused, expected_probs)


@pytest.mark.parametrize(
    ("rule", "burnt_up", "is_fused"),
    [
        ("always", False, True),
        ("always", True, True),
        ("after_burn_up", False, False),
        ("after_burn_up", True, True),
        ("never", True, False),
    ],
)
def test_boxes_of_pairs(
    rule: Any,
    burnt_up: bool,
    is_fused: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fit = tiny_fit(steps=1)
    task = distillation(fit)
    task.separation = replace(task.separation, fused_boxes=rule)
    (batch,) = training_batches(tmp_path, fit)
    clip: list[Detections] = [detections(((4.0, 4, 30, 20), 0, 0.9))] * len(batch.weak)
    batch.detections.update({"cloud": [detections(A)] * len(batch.weak), "clip": clip})
    monkeypatch.setattr(task, "predict_with_teacher", lambda images, size: clip)
    first, *_ = task.separate(batch, burnt_up, common_size(batch.weak))
    bottom = float(first.consistent.boxes[0, 3])
    assert bottom == pytest.approx(24 if is_fused else 28)


@pytest.mark.parametrize("background", [False, True])
def test_ckg_predicts_background_only_if_trained_on_it(
    background: bool, tmp_path: Path
) -> None:
    fit = tiny_fit(steps=1, lr=1e-2)
    task = distillation(fit, ckg_background=background, ckg_lr=1e-2)
    (batch,) = training_batches(tmp_path, fit)
    size = common_size(batch.weak)
    outputs = forward_student(
        task.student,
        batch.strong,
        size,
        task.separate(batch, False, size),
        batch.generators,
    )
    for _ in range(60):
        task.fusion.train(outputs, task.student.head, 5)
    embedded = outputs.regions.embedded[outputs.background_rows]
    background_vectors = torch.nn.functional.one_hot(
        torch.full_like(outputs.background_rows, task.student.num_classes)
    ).float()
    fused = task.fusion.fuse(embedded, background_vectors, background_vectors)
    background_probs = fused[:, -1]
    assert len(background_probs) > 0
    assert bool((background_probs > 0.5).all()) == background


def test_bfloat16_forward_leaves_losses_and_weights_in_float32(tmp_path: Path) -> None:
    fit = tiny_fit(steps=3)
    batch = training_batches(tmp_path, fit)[0]
    full = loss_values(distillation(fit).train_step(batch, 0))
    mixed_fit = replace(fit, amp=True)
    task = distillation(mixed_fit)
    for step, step_batch in enumerate(training_batches(tmp_path, mixed_fit)):
        parts = task.train_step(step_batch, step)
        if step == 0:
            assert loss_values(parts)["consistent"] == pytest.approx(
                full["consistent"], rel=0.1
            )
            assert loss_values(parts) != full
        assert {v.dtype for v in parts.values()} == {torch.float32}
        assert_finite_step(task, parts)
    assert {p.dtype for p in task.student.parameters()} == {torch.float32}
