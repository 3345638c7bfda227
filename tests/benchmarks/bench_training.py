"""Measure the CPU time of COIN's own parts on one core: ``make bench-training``.

    # five minutes
    make bench-training
    # seconds of each comparison; fewer are less exact
    make bench-training ARGS="--seconds 10"

1. CLIP's labels of boxes, in boxes per second. RoI features of the whole image against
   open_clip on one crop per box (RN50, 20 boxes in an image of 960 x 720 pixels, random
   weights: time does not depend on them), by the length of the image's shorter side.
   Crops of a batch of 16 images, 20 boxes each, with the demo's CLIP against the same
   loop of one image at a time, as version f5fc1d4 had it; and the most memory that
   2,000 boxes in one image take over what 200 take.
2. A distillation step of the demo with CKG and gradient alignment against the same step
   with the mean of both teachers.
3. The number of runs of the text encoder in training steps and in evaluation of a
   detector with learned prompts.

Both sides of a ratio take turns and are measured in CPU time of this process, which a
busy machine disturbs less; the ratio is the median. Prints a table and, last, the
figures as one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any

import open_clip
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torchvision.transforms.functional import pil_to_tensor
from torchvision.transforms.v2.functional import normalize, resized_crop

from coin_ray.clip.crops import pixel_boxes
from coin_ray.clip.encoder import ClipModel, class_embeddings, load_clip
from coin_ray.clip.labeler import CropLabeler, RoiLabeler
from coin_ray.config import Clip, Distill, PipelineConfig
from coin_ray.config.presets import demo
from coin_ray.data.examples import Batch
from coin_ray.demo.drawings import load_drawings
from coin_ray.demo.scenes import Artwork, compose
from coin_ray.models.faster_rcnn_clip.backbone import load_backbone, starting_embeddings
from coin_ray.models.faster_rcnn_clip.model import ClipDetector
from coin_ray.stages.common.students import new_clip_detector, new_student
from coin_ray.structures import Detections
from coin_ray.training.distill import Distillation
from coin_ray.training.propagate import Propagation

BOXES, HEIGHT, WIDTH = 20, 720, 960
SHORT_SIDES = (600, 384, 256)
"""Lengths of the whole image's shorter side, for RoI features; 600 is published."""
CROP_IMAGES = 16
SCENE_HEIGHT, SCENE_WIDTH = 192, 256
"""Pixels of the demo's scenes."""
AT_LEAST = {"RoI labels, short side 600": 5.0, "crop labels of the demo's CLIP": 2.0}
AT_MOST = {
    "step with CKG": 1.15,
    "MB more for 2,000 boxes than for 200": 1.0,
    "largest difference of crop probabilities": 1e-5,
}
Work = Callable[[], object]


def time_in_turn(first: Work, second: Work, seconds: float) -> float:
    """Return the median CPU seconds of the first over those of the second, from at least
    five turns each after one to warm up."""
    first()
    second()
    turns: list[tuple[float, float]] = []
    end = time.monotonic() + seconds
    while time.monotonic() < end or len(turns) < 5:
        turns.append((cpu_seconds(first), cpu_seconds(second)))
    first_median = median(first_seconds for first_seconds, _ in turns)
    second_median = median(second_seconds for _, second_seconds in turns)
    return round(first_median / second_median, 3)


def cpu_seconds(work: Work) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def compare_labelling(seconds: float) -> dict[str, float]:
    """Return boxes per second of RoI features over those of crops, by short side."""
    torch.manual_seed(0)
    network = (
        open_clip.create_model("RN50", pretrained=None).eval().requires_grad_(False)
    )
    clip = ClipModel(
        network,
        open_clip.get_tokenizer("RN50"),
        open_clip.OPENAI_DATASET_MEAN,
        open_clip.OPENAI_DATASET_STD,
    )
    classes, config = ("person", "car"), Clip(templates=("a photo of a {}.",))
    image, boxes = draw_boxes(HEIGHT, WIDTH, BOXES)
    crops = partial(label_by_open_clip, clip, class_embeddings(clip, classes, config))
    figures = {}
    for side in SHORT_SIDES:
        regions = RoiLabeler(clip, classes, config, side, 10_000)
        figures[f"RoI labels, short side {side}"] = time_in_turn(
            partial(crops, image, boxes), partial(regions, image, boxes), seconds
        )
    return figures


def draw_boxes(height: int, width: int, count: int) -> tuple[Tensor, Tensor]:
    """Return random pixels [3, H, W], and boxes [count, 4] of a quarter of each side."""
    image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
    corners = torch.rand(count, 2) * torch.tensor([width / 2, height / 2])
    sides = torch.tensor([width / 4, height / 4])
    return image, torch.cat([corners, corners + sides], 1)


@torch.no_grad()
def label_by_open_clip(
    clip: ClipModel,
    embeddings: Tensor,
    image: Tensor,
    boxes: Tensor,
    context: float = 1.0,
) -> Tensor:
    """Return probabilities [N, K+1] by open_clip's own encoder on the crops of one image."""
    network: Any = clip.network
    side = clip.roi_size * 16
    crops = [
        resized_crop(image, y1, x1, y2 - y1, x2 - x1, [side, side], antialias=True)
        for x1, y1, x2, y2 in pixel_boxes(image, boxes, context)
    ]
    pixels = torch.stack(crops).float() / 255
    encoded = network.encode_image(normalize(pixels, list(clip.mean), list(clip.std)))
    scale = network.logit_scale.exp().clamp(max=100)
    logits = scale * F.normalize(encoded, dim=-1) @ embeddings.T
    return logits.softmax(-1)


def compare_crop_labelling(seconds: float) -> dict[str, float]:
    """Return boxes per second of the crop labeler over those of ``label_by_open_clip``
    on one image after another, how far their probabilities differ, and how much memory
    grows with the boxes of an image."""
    torch.manual_seed(0)
    config = demo()
    clip = load_clip(config.clip)
    context = config.collect.crop_context
    labeler = CropLabeler(
        clip, config.classes, config.clip, context, fuse_batch_norms=True
    )
    images = [draw_boxes(SCENE_HEIGHT, SCENE_WIDTH, BOXES) for _ in range(CROP_IMAGES)]

    def one_by_one() -> list[Tensor]:
        return [
            label_by_open_clip(clip, labeler.embeddings, image, boxes, context)
            for image, boxes in images
        ]

    pairs = zip(labeler.label(images), one_by_one(), strict=True)
    difference = max(float((ours - theirs).abs().max()) for ours, theirs in pairs)
    memory_of_200 = peak_memory(labeler, 200)
    return {
        "crop labels of the demo's CLIP": time_in_turn(
            one_by_one, partial(labeler.label, images), seconds
        ),
        "largest difference of crop probabilities": difference,
        "MB more for 2,000 boxes than for 200": peak_memory(labeler, 2000)
        - memory_of_200,
    }


def peak_memory(labeler: CropLabeler, boxes: int) -> float:
    """Return the most MB that torch holds at once while it labels one image."""
    image = draw_boxes(SCENE_HEIGHT, SCENE_WIDTH, boxes)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        labeler.label([image])
    held = most = 0
    for event in record.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return round(most / 1e6, 1)


def build_distillation(config: PipelineConfig, changed: Distill) -> Distillation:
    backbone = load_backbone(config)
    student, teacher = (
        new_student(backbone, config, seed=1),
        new_student(backbone, config, seed=0),
    )
    return Distillation(
        student,
        teacher,
        starting_embeddings(backbone, config),
        changed,
        config.separate,
    )


def build_demo_batch(config: PipelineConfig, step: int) -> Batch:
    """Return a batch of demo scenes; both teachers have the true boxes, and CLIP gives every
    second one another label."""
    artwork = Artwork.from_drawings(load_drawings())
    scenes = [
        compose(artwork, "target", step * 100 + i, (3, 4))
        for i in range(config.distill.fit.batch)
    ]
    images = [pil_to_tensor(scene.image) for scene in scenes]
    truth = [
        (torch.from_numpy(scene.boxes), torch.from_numpy(scene.labels))
        for scene in scenes
    ]
    classes = len(config.classes)
    cloud = [score_true_boxes(boxes, labels, classes) for boxes, labels in truth]
    clip = [
        score_true_boxes(
            boxes, (labels + torch.arange(len(labels)) % 2) % classes, classes
        )
        for boxes, labels in truth
    ]
    none = [Detections.empty(classes) for _ in truth]
    generators = [torch.Generator().manual_seed(i) for i in range(len(images))]
    return Batch(
        images,
        images,
        {"cloud": cloud, "clip": clip, "clip_labels": none, "labels": cloud},
        generators,
        [False] * len(images),
    )


def score_true_boxes(
    boxes: Tensor, labels: Tensor, classes: int, score: float = 0.7
) -> Detections:
    probs = torch.full((len(labels), classes + 1), (1 - score) / classes).scatter(
        1, labels[:, None], score
    )
    return Detections(boxes, torch.full((len(labels),), score), labels, probs)


def compare_distillation_steps(seconds: float) -> dict[str, float]:
    """Return the time of a step with CKG and gradient alignment over that with the mean of
    both teachers, before and after the end of burn-up."""
    config = demo()
    batch = build_demo_batch(config, 0)
    figures = {}
    for name, burn_up in (
        ("step with CKG", 1000),
        ("step with CKG, teacher follows", 0),
    ):
        settings = replace(config.distill, burn_up=burn_up)
        full, plain = (
            build_distillation(config, settings),
            build_distillation(config, replace(settings, fusion="average")),
        )
        figures[name] = time_in_turn(
            partial(full.train_step, batch, 1),
            partial(plain.train_step, batch, 1),
            seconds,
        )
    return figures


class ForwardCounter:
    """Counts how often a module's forward runs."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.calls = 0
        module.register_forward_hook(self.count)

    def count(self, *_: Any) -> None:
        self.calls += 1


def count_text_encoder_runs(steps: int = 3, images: int = 6) -> dict[str, float]:
    """Count runs of the text encoder for each training step, and for several evaluated
    batches together."""
    config = demo()
    backbone, batch = load_backbone(config), build_demo_batch(config, 0)
    detector = new_clip_detector(backbone, config, seed=0)
    assert isinstance(detector, ClipDetector)
    encoder_calls = ForwardCounter(detector.prompts)
    task = Propagation(
        detector, starting_embeddings(backbone, config), config.propagate
    )
    for step in range(steps):
        task.train_step(batch, step)
    training_runs, encoder_calls.calls = encoder_calls.calls, 0
    detector.eval()
    for image in batch.weak[:images]:
        detector.predict(detector.prepare([image]))
    return {
        "text encoder runs a training step": training_runs / steps,
        f"text encoder runs, {images} evaluated images": float(encoder_calls.calls),
    }


def compare_with_bound(name: str, figure: float) -> str:
    if name in AT_LEAST:
        return f">= {AT_LEAST[name]}: {'yes' if figure >= AT_LEAST[name] else 'NO'}"
    if name in AT_MOST:
        return f"<= {AT_MOST[name]}: {'yes' if figure <= AT_MOST[name] else 'NO'}"
    return ""


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=40, help="for each comparison")
    parser.add_argument(
        "--only",
        choices=("labels", "steps", "text"),
        nargs="+",
        default=("labels", "steps", "text"),
    )
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    figures: dict[str, float] = {}
    if "labels" in options.only:
        figures |= compare_crop_labelling(options.seconds)
        figures |= compare_labelling(options.seconds)
    if "steps" in options.only:
        figures |= compare_distillation_steps(options.seconds)
    if "text" in options.only:
        figures |= count_text_encoder_runs()
    print("| | ratio or count | goal |\n|---|---|---|")
    for name, figure in figures.items():
        print(f"| {name} | {figure:g} | {compare_with_bound(name, figure)} |")
    print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
