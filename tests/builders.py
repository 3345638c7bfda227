"""Build small models, configs, detections and images for tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from PIL import Image
from torch import Tensor

from coin_ray.clip.encoder import ClipModel, class_embeddings
from coin_ray.config import Clip, Detector, Distill, Propagate, Separate, TrainingConfig
from coin_ray.config.co_detr import CoDetr, tiny
from coin_ray.data.examples import Batch, Example, iterate_batches
from coin_ray.models.co_detr.regional import RegionalDetr
from coin_ray.models.co_detr.text import TextDetr
from coin_ray.models.faster_rcnn_clip.backbone import new_embeddings, new_tower
from coin_ray.models.faster_rcnn_clip.model import ClipDetector, build_detector
from coin_ray.structures import Detections, Pairs, Separation
from coin_ray.tables import Truth
from coin_ray.training.distill import Distillation
from coin_ray.training.propagate import Propagation
from coin_ray.training.queries import forward_detr_student

CLASSES = ("cat", "traffic light", "stop sign")
Row = tuple[Sequence[float], int, float]


def detections(*rows: Row, classes: int = 3) -> Detections:
    """Build detections of (box, label, score); the other classes and background share
    the remaining probability."""
    if not rows:
        return Detections.empty(classes)
    probs = torch.tensor(
        [
            [score if k == label else (1 - score) / classes for k in range(classes + 1)]
            for _, label, score in rows
        ]
    )
    return Detections(
        torch.tensor([list(box) for box, _, _ in rows], dtype=torch.float32),
        torch.tensor([score for _, _, score in rows]),
        torch.tensor([label for _, label, _ in rows]),
        probs,
    )


def truth(
    *rows: tuple[Sequence[float], int] | tuple[Sequence[float], int, bool],
) -> Truth:
    """Build annotations of (box, label) or (box, label, difficult)."""
    boxes = [list(row[0]) for row in rows]
    difficult = [len(row) > 2 and row[2] for row in rows]
    return Truth(
        torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        torch.tensor([row[1] for row in rows], dtype=torch.int64),
        torch.tensor(difficult, dtype=torch.bool),
    )


def pairs(cloud: Detections, clip: Detections) -> Pairs:
    return Pairs(cloud.boxes, cloud, clip)


def separation(
    consistent: Sequence[Row] = (),
    inconsistent: Sequence[Row] = (),
    private: Sequence[Row] = (),
    classes: int = 3,
) -> Separation:
    """Both teachers give the same rows; of inconsistent ones CLIP gives the next class."""
    agreed, disputed = (
        detections(*consistent, classes=classes),
        detections(*inconsistent, classes=classes),
    )
    other = detections(
        *[(box, (label + 1) % classes, score) for box, label, score in inconsistent],
        classes=classes,
    )
    return Separation(
        pairs(agreed, agreed),
        pairs(disputed, other),
        detections(*private, classes=classes),
    )


def tiny_clip(seed: int = 0) -> ClipModel:
    """A CLIP with random weights, the same ones for the same seed."""
    torch.manual_seed(seed)
    vision = {
        "image_size": 64,
        "layers": [1, 1, 1, 1],
        "width": 8,
        "head_width": 32,
        "patch_size": None,
    }
    text = {
        "context_length": 20,
        "vocab_size": 49408,
        "width": 32,
        "heads": 2,
        "layers": 2,
    }
    network = open_clip.CLIP(64, vision_cfg=vision, text_cfg=text)
    for name, weight in network.visual.named_parameters():
        # open_clip starts these at zero, which switches the blocks off
        if name.endswith("bn3.weight"):
            torch.nn.init.constant_(weight, 0.5)
    calibrate(network.visual)
    network.eval().requires_grad_(False)
    return ClipModel(
        network,
        _tokenizer(),
        open_clip.OPENAI_DATASET_MEAN,
        open_clip.OPENAI_DATASET_STD,
    )


@cache
def _tokenizer() -> open_clip.SimpleTokenizer:
    """Read the vocabulary once: it takes longer than all the rest of the model."""
    return open_clip.SimpleTokenizer(context_length=20)


@torch.no_grad()
def calibrate(visual: torch.nn.Module) -> None:
    """Batch statistics of noise, so that features of random weights neither vanish nor
    look all alike."""
    norms = [m for m in visual.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    visual.train()(torch.nn.functional.interpolate(torch.randn(8, 3, 16, 16), 64))
    for norm in norms:
        norm.momentum = 0.1


def tiny_config(**changes: Any) -> Detector:
    fields: dict[str, Any] = {
        "short_side": 64,
        "long_side": 96,
        "roi_size": 4,
        "roi_samples": 2,
        "anchor_sizes": (16, 32, 48),
        "rpn_width": 16,
        "proposals_train": 24,
        "proposals_test": 12,
        "rpn_batch": 16,
        "roi_batch": 16,
        "roi_positive": 0.5,
        "temperature": 0.1,
        "context_tokens": 2,
        "background": "learned",
        "score_min": 0.05,
        "detections": 20,
    }
    return Detector(**(fields | changes))


TEMPLATES = Clip(templates=("a photo of a {}.", "a drawing of a {}."))


def tiny_detector(seed: int = 0, **changes: Any) -> ClipDetector:
    """A detector whose RPN and box head are wilder than at the published start, so that
    its boxes differ from the anchors."""
    detector = build_detector(tiny_clip(), CLASSES, tiny_config(**changes), seed=seed)
    with torch.no_grad():
        for layer in (
            detector.rpn.objectness,
            detector.rpn.deltas,
            detector.head.box,
            detector.head.embed,
        ):
            layer.weight.mul_(20)
    return detector


def tiny_embeddings() -> Tensor:
    return class_embeddings(tiny_clip(), CLASSES, TEMPLATES)


def tiny_fit(**changes: Any) -> TrainingConfig:
    fields: dict[str, Any] = {
        "steps": 6,
        "batch": 2,
        "optimizer": "adamw",
        "lr": 1e-3,
        "warmup": 2,
        "milestones": (),
        "factors": (),
        "clip_gradient": 5.0,
        "augmentation": 0.5,
        "checkpoint_every": 3,
    }
    return TrainingConfig(**(fields | changes))


def propagation(fit: TrainingConfig, **changes: Any) -> Propagation:
    config = Propagate(
        fit=fit,
        **(
            {
                "alignment": 1.0,
                "prototype_rate": 0.1,
                "prototypes_from": 1,
                "views": "both",
            }
            | changes
        ),
    )
    return Propagation(tiny_detector(), tiny_embeddings(), config)


def distillation(fit: TrainingConfig, **changes: Any) -> Distillation:
    """Every loss is active: any overlap matches, and every fused vector is trusted."""
    fields = {
        "alignment": 1.0,
        "inconsistent": 1.0,
        "private": 1.0,
        "fusion_score_min": 0.0,
        "prototype_rate": 0.1,
        "prototypes_from": 0,
        "burn_up": 1,
        "teacher_rate": 0.1,
    }
    student, teacher = tiny_detector(seed=1), tiny_detector(seed=0)
    rules = Separate(iou_min=0.2, clip_score_min=0.05, fused_boxes="always")
    return Distillation(
        student,
        teacher,
        tiny_embeddings(),
        Distill(fit=fit, **(fields | changes)),
        rules,
    )


def tiny_network(**changes: Any) -> CoDetr:
    """Two layers of decoder and one of encoder, few queries, and the auxiliary head
    COIN needs."""
    fields: dict[str, Any] = {
        "width": 32,
        "levels": 3,
        "feedforward": 32,
        "encoder_layers": 1,
        "queries": 16,
        "auxiliary": ("rcnn",),
        "rpn_samples": 16,
        "proposals_per_level": 20,
        "proposals": 24,
        "roi_samples": 16,
        "roi_positive": 0.5,
        "roi_size": 4,
        "roi_width": 32,
        "roi_boxes": "agnostic",
        "detections": 20,
    }
    return tiny(**(fields | changes))


def tiny_co_detr(
    seed: int = 0, *, named: bool = True, network: CoDetr | None = None, **changes: Any
) -> RegionalDetr:
    """A Co-DETR student on the tiny CLIP; weights that start at zero have values, so
    that nothing is switched off."""
    clip, config = tiny_clip(), tiny_config(**changes)
    torch.manual_seed(seed)
    prompts, tower = new_embeddings(clip, CLASSES, config), new_tower(clip, config)
    base = TextDetr(
        tower,
        prompts,
        len(CLASSES),
        clip.embedding_size,
        network or tiny_network(),
        has_text_classes=named,
        mean=clip.mean,
        std=clip.std,
    )
    student = RegionalDetr(base, clip.embedding_size, config)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in student.named_parameters():
            if weight.requires_grad and "tower" not in name and not bool(weight.any()):
                weight.normal_(std=0.1, generator=draw)
    return student


def detr_distillation(
    fit: TrainingConfig, *, named: bool = True, **changes: Any
) -> Distillation:
    """Build ``distillation`` with a Co-DETR student."""
    fields = {
        "alignment": 1.0,
        "inconsistent": 1.0,
        "private": 1.0,
        "fusion_score_min": 0.0,
        "prototype_rate": 0.1,
        "prototypes_from": 0,
        "burn_up": 1,
        "teacher_rate": 0.1,
    }
    student, teacher = (
        tiny_co_detr(seed=1, named=named),
        tiny_co_detr(seed=0, named=named),
    )
    rules = Separate(iou_min=0.2, clip_score_min=0.05, fused_boxes="always")
    config = Distill(fit=fit, student="co-detr", **(fields | changes))
    return Distillation(
        student,
        teacher,
        tiny_embeddings(),
        config,
        rules,
        forward_student=forward_detr_student,
    )


def loss_values(losses: Mapping[str, Tensor]) -> dict[str, float]:
    return {name: float(loss.detach()) for name, loss in losses.items()}


def assert_finite_step(task: Distillation, losses: Mapping[str, Tensor]) -> None:
    """Assert that the losses of a step and all weights after it are finite."""
    assert all(bool(torch.isfinite(v)) for v in losses.values()), loss_values(losses)
    for module in (task.student, task.fusion.ckg, task.teacher):
        assert all(bool(torch.isfinite(t).all()) for t in module.state_dict().values())


SIZES = ((96, 64), (64, 80), (72, 72), (64, 96), (90, 60))


def examples(folder: Path) -> list[Example]:
    """Five images of different sizes with coloured blocks, and two teachers' boxes of the
    blocks: equal, different, and unmatched ones."""
    draw = np.random.default_rng(7)
    all_examples = []
    for number, (width, height) in enumerate(SIZES):
        pixels = draw.integers(60, 190, (height, width, 3), np.uint8)
        boxes = [(4, 4, 30, 28), (34, 8, 58, 34), (6, 34, 32, 58), (36, 36, 58, 58)]
        for (x1, y1, x2, y2), colour in zip(
            boxes, draw.integers(0, 255, (4, 3)), strict=True
        ):
            pixels[y1:y2, x1:x2] = colour
        uri = folder / f"{number}.png"
        Image.fromarray(pixels).save(uri)
        moved = [(a + 2.0, b + 1.0, c, d - 1.0) for a, b, c, d in boxes]
        cloud = detections((boxes[0], 0, 0.9), (boxes[1], 1, 0.8), (boxes[2], 2, 0.7))
        clip = detections((moved[0], 0, 0.6), (moved[1], 2, 0.5), (moved[3], 1, 0.4))
        all_examples.append(
            Example(
                str(number),
                str(uri),
                {
                    "cloud": cloud,
                    "clip": clip,
                    "clip_labels": clip[:0],
                    "labels": cloud,
                },
            )
        )
    return all_examples


def training_batches(folder: Path, fit: TrainingConfig) -> list[Batch]:
    """Return the batches of all steps of ``fit`` on ``examples``, for one worker."""
    batches = iterate_batches(
        examples(folder), fit, tiny_config(), seed=2, first=0, rank=0, workers=1
    )
    return list(batches)


def sorted_rows(boxes: Tensor, *columns: Tensor) -> list[tuple[float, ...]]:
    """Return the rows as a sorted list, to compare as sets."""
    table = torch.cat([boxes.double(), *(c.double()[:, None] for c in columns)], 1)
    return sorted(tuple(row) for row in table.tolist())
