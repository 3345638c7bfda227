from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from coin_ray.config import TrainingConfig
from coin_ray.config.co_detr import tiny
from coin_ray.demo.drawings import CLASSES, load_drawings
from coin_ray.demo.scenes import SIZE, Artwork, Scene, compose
from coin_ray.evaluation.voc import average_precision
from coin_ray.models.co_detr.backbone import TinyBackbone
from coin_ray.models.co_detr.collaborative import CollaborativeDetr
from coin_ray.models.co_detr.targets import Targets
from coin_ray.models.co_detr.transformers_detr import CollaborativeTransformersDetr
from coin_ray.tables import Truth
from coin_ray.training.supervised import parameter_groups

SIDE, STEPS = 128, 120


def shrink_scene(scene: Scene) -> tuple[Tensor, Targets]:
    image = scene.image.resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    pixels = torch.from_numpy(np.asarray(image, np.uint8).copy()).permute(2, 0, 1)
    return pixels, Targets(
        torch.from_numpy(scene.boxes) * SIDE / SIZE, torch.from_numpy(scene.labels)
    )


def ap50(
    model: CollaborativeDetr | CollaborativeTransformersDetr,
    images: list[Tensor],
    targets: list[Targets],
) -> float:
    found = model.eval().predict(model.base.prepare(images))
    truth = {
        str(i): Truth(t.boxes, t.labels, torch.zeros(len(t.labels), dtype=torch.bool))
        for i, t in enumerate(targets)
    }
    return average_precision(
        {str(i): f for i, f in enumerate(found)}, truth, len(CLASSES)
    ).map


def test_eight_scenes_are_learned_by_heart() -> None:
    torch.manual_seed(0)
    artwork = Artwork.from_drawings(load_drawings())
    images, targets = (
        list(part)
        for part in zip(
            *(shrink_scene(compose(artwork, "source", seed)) for seed in range(8)),
            strict=True,
        )
    )
    model = CollaborativeDetr(TinyBackbone(), len(CLASSES), tiny(auxiliary=("atss",)))
    optimizer = torch.optim.AdamW(
        parameter_groups(
            model, TrainingConfig(lr=1e-3, visual_lr_factor=0.1, weight_decay=1e-4)
        )
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [g["lr"] for g in optimizer.param_groups], STEPS
    )
    assert ap50(model, images, targets) < 0.2
    model.train()
    batch = model.base.prepare(images)
    for _ in range(STEPS):
        optimizer.zero_grad()
        model.objective(batch, targets).total.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        schedule.step()
    assert ap50(model, images, targets) > 0.9
