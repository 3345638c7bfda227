"""Train a tiny CLIP with a vision transformer for the demo's classes, as another second
opinion: ``python -m coin_ray.demo.build.vit_clip FOLDER`` (minutes on one core).

FOLDER is then a model of open_clip: ``coin-ray adapt demo --labeler crop
--labeler.model local-dir:FOLDER``. The text tower is that of the demo's CLIP. The image
tower learns crops of the package's drawings by their words, and to embed them as the
demo's CLIP does, so that minutes are enough.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import Tensor
from torch.nn import functional as F

from coin_ray.clip.encoder import BACKGROUND, ClipModel, class_embeddings, load_clip
from coin_ray.config.data import DEMO_CLASSES
from coin_ray.config.presets import DEMO_CLIP
from coin_ray.demo.build.clip import SIDE, Crops, training_drawings
from coin_ray.demo.drawings import load_drawings
from coin_ray.storage import write_bytes

VISION = {
    "image_size": SIDE,
    "layers": 3,
    "width": 96,
    "head_width": 32,
    "patch_size": 8,
}
BATCH, LEARNING_RATE = 96, 2e-3
SCALE = 16.0
"""Factor of the cosines of crops and words; the demo's CLIP was trained with it."""


def train(crops: int, steps: int, seed: int = 0) -> tuple[open_clip.CLIP, float]:
    """Return the trained CLIP, and its accuracy on a fifth of the crops, which are kept
    from training, among the demo's classes and the background.
    """
    torch.manual_seed(seed)
    teacher = load_clip(DEMO_CLIP)
    images, targets, labels = draw_crops(teacher, crops)
    words = class_embeddings(teacher, DEMO_CLASSES, DEMO_CLIP)
    student = open_clip.CLIP(**describe_model())
    student.load_state_dict(_text_weights(teacher), strict=False)
    tower = student.visual.train()
    optimizer = torch.optim.AdamW(tower.parameters(), weight_decay=0.05)
    num_training = len(images) * 4 // 5
    for step in range(steps):
        progress = step / steps
        warm_up = min(1, (step + 1) / 20)
        decay = 0.5 + 0.5 * math.cos(math.pi * progress)
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * warm_up * decay
        rows = torch.randint(num_training, (BATCH,))
        embeddings = F.normalize(tower(images[rows]), dim=-1)
        word_loss = F.cross_entropy(SCALE * embeddings @ words.T, labels[rows])
        imitation_loss = 1 - (embeddings * targets[rows]).sum(1).mean()
        optimizer.zero_grad()
        (word_loss + 4 * imitation_loss).backward()
        torch.nn.utils.clip_grad_norm_(tower.parameters(), 1.0)
        optimizer.step()
    student.eval()
    unseen = slice(num_training, None)
    with torch.no_grad():
        scores = F.normalize(tower(images[unseen]), dim=-1) @ words.T
    return student, float((scores.argmax(1) == labels[unseen]).float().mean())


@torch.no_grad()
def draw_crops(teacher: ClipModel, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return crops [N, 3, 64, 64] of the demo's classes and of background, the
    teacher's embeddings [N, D] of unit length, and their labels [N].
    """
    names = [*DEMO_CLASSES, BACKGROUND]
    images, targets, labels = [], [], []
    network: Any = teacher.network
    for batch, words, _ in Crops(training_drawings(load_drawings())):
        rows = [row for row, word in enumerate(words) if word in names]
        images.append(batch[rows])
        targets.append(network.encode_image(batch[rows], normalize=True))
        labels += [names.index(words[row]) for row in rows]
        if len(labels) >= count:
            break
    return torch.cat(images), torch.cat(targets), torch.tensor(labels)


def describe_model() -> dict[str, Any]:
    """Return the arguments of ``open_clip.CLIP``: the demo's text tower and a vision
    transformer.
    """
    architecture: dict[str, Any] = json.loads(Path(DEMO_CLIP.model).read_text())
    return architecture | {"vision_cfg": VISION}


def _text_weights(teacher: ClipModel) -> dict[str, Tensor]:
    return {
        name: weights
        for name, weights in teacher.network.state_dict().items()
        if not name.startswith("visual.")
    }


def save(student: open_clip.CLIP, folder: Path) -> None:
    """Write the model as a folder that open_clip loads by ``local-dir:``."""
    preprocessing = {
        "mean": open_clip.OPENAI_DATASET_MEAN,
        "std": open_clip.OPENAI_DATASET_STD,
        "interpolation": "bilinear",
        "resize_mode": "squash",
    }
    description = {"model_cfg": describe_model(), "preprocess_cfg": preprocessing}
    text = json.dumps(description, indent=1)
    write_bytes(str(folder / "open_clip_config.json"), text.encode())
    torch.save(student.state_dict(), folder / "open_clip_pytorch_model.bin")


def main(arguments: Sequence[str] | None = None) -> None:
    """Train and write the model; print its accuracy."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--crops", type=int, default=12_000)
    parser.add_argument("--steps", type=int, default=1500)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    student, accuracy = train(options.crops, options.steps)
    save(student, options.folder)
    print(f"{options.folder}: accuracy on unseen crops {accuracy:.3f}")


if __name__ == "__main__":
    main()
