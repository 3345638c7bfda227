"""Train the first weights of the demo's detectors: ``python -m
coin_ray.demo.build.first_weights`` (ten minutes on one core).

They stand for the public weights of a detector. It starts from the demo's CLIP and sees
labelled scenes of the drawings of the *source* share alone, one in seven of them
cluttered and hazy, as any public data set has some. It never sees a drawing of the
target's share, which the cloud and CLIP each know in part.
"""

from __future__ import annotations

import argparse
import io
import lzma
from collections.abc import Iterator
from dataclasses import replace

import torch
from torchvision.transforms import v2
from torchvision.transforms.functional import pil_to_tensor

from coin_ray.boxes import mirror_boxes
from coin_ray.config.presets import DEMO_FIRST_WEIGHTS, demo
from coin_ray.data.examples import Batch
from coin_ray.demo.drawings import CLASSES, load_drawings
from coin_ray.demo.scenes import SIZE, Artwork, Style, compose
from coin_ray.models.faster_rcnn_clip.backbone import load_backbone, starting_embeddings
from coin_ray.models.faster_rcnn_clip.model import ClipDetector, build_detector
from coin_ray.structures import Detections, Targets
from coin_ray.training.propagate import Propagation

CLUTTERED_SHARE = 1 / 7
FIRST_SEED = 50_000_000
"""The seeds of target scenes, and of the cloud's training scenes, are smaller."""
BATCH = 8
STEPS = 3000
LEARNING_RATE = 2e-3
DETECTOR_SEED = 12345
"""Draws what is not CLIP's; no run of the demo has this seed."""
FROZEN_LAYERS = ("conv1", "conv2", "conv3", "bn1", "bn2", "bn3", "layer1", "layer2")
"""Of CLIP's tower. They, and batch norms, are as in CLIP, so they are not written."""
FROZEN_TENSORS = (".scale", ".shift")


def draw_batches() -> Iterator[Batch]:
    """Yield batches of fresh scenes with their truth, without end."""
    drawings = [drawing for drawing in load_drawings() if drawing.share == "source"]
    artwork = Artwork.from_drawings(drawings)
    change_colours = v2.ColorJitter(0.4, 0.4, 0.4, 0.05)
    seed = FIRST_SEED
    while True:
        images, labels, generators = [], [], []
        for _ in range(BATCH):
            image, truth = _labelled_scene(artwork, seed)
            images.append(change_colours(image))
            labels.append(truth)
            generators.append(torch.Generator().manual_seed(seed - FIRST_SEED))
            seed += 1
        reviewed = [False] * BATCH
        yield Batch(images, images, {"labels": labels}, generators, reviewed)


def _labelled_scene(artwork: Artwork, seed: int) -> tuple[torch.Tensor, Detections]:
    # multiples of the golden ratio spread the cluttered scenes evenly
    is_cluttered = (seed * 0.6180339887) % 1 < CLUTTERED_SHARE
    style: Style = "target" if is_cluttered else "source"
    scene = compose(artwork, style, seed, objects=(1, 5))
    image = pil_to_tensor(scene.image)
    boxes = torch.from_numpy(scene.boxes)
    if seed % 2:
        image, boxes = image.flip(2), mirror_boxes(boxes, SIZE)
    labels = torch.from_numpy(scene.labels)
    truth = Targets.from_labels(boxes, labels, len(CLASSES))
    return image, Detections(truth.boxes, truth.weights, labels, truth.probs)


def write_weights(detector: ClipDetector) -> None:
    """Write what is not CLIP's in half precision, compressed: under 4 MB."""
    frozen = tuple(f"tower.visual.{layer}." for layer in FROZEN_LAYERS)
    halves = {
        name: tensor.half() if tensor.is_floating_point() else tensor
        for name, tensor in detector.state_dict().items()
        if not name.startswith(frozen) and not name.endswith(FROZEN_TENSORS)
    }
    file = io.BytesIO()
    torch.save(halves, file)
    DEMO_FIRST_WEIGHTS.write_bytes(lzma.compress(file.getvalue(), preset=9))


def main() -> None:
    """Train the detector and write its weights."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=STEPS)
    steps = parser.parse_args().steps
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = demo()
    backbone = load_backbone(config)
    detector = build_detector(
        backbone, config.classes, config.detector, seed=DETECTOR_SEED
    )
    training = replace(
        config.propagate.fit, steps=steps, lr=LEARNING_RATE, schedule="cosine"
    )
    task = Propagation(
        detector,
        starting_embeddings(backbone, config),
        replace(config.propagate, fit=training),
    )
    for step, batch in zip(range(steps), draw_batches(), strict=False):
        losses = task.train_step(batch, step)
        if (step + 1) % 100 == 0:
            parts = {name: round(float(loss), 2) for name, loss in losses.items()}
            print(f"step {step + 1}, {parts}", flush=True)
    write_weights(detector)
    size = DEMO_FIRST_WEIGHTS.stat().st_size
    print(f"{DEMO_FIRST_WEIGHTS}: {size / 1e6:.1f} MB after {steps} steps")


if __name__ == "__main__":
    main()
