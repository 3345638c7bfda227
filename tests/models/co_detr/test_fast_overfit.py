from __future__ import annotations

from pathlib import Path

import pytest
import torch

from coin_ray.config import TrainingConfig
from coin_ray.config.co_detr import tiny
from coin_ray.demo.drawings import CLASSES, load_drawings
from coin_ray.demo.scenes import Artwork, compose
from coin_ray.models.co_detr.transformers_detr import (
    CollaborativeTransformersDetr,
    load_transformers_detr,
)
from coin_ray.training.supervised import parameter_groups
from models.co_detr.fast_networks import save_network
from models.co_detr.test_overfit import SIDE, ap50, shrink_scene

pytest.importorskip("transformers")


@pytest.mark.parametrize(("model", "steps"), [("rt-detr-v2", 300), ("d-fine", 150)])
def test_two_scenes_are_learned_by_heart(
    model: str, steps: int, tmp_path: Path
) -> None:
    place = save_network(
        tmp_path, model, len(CLASSES), size={"height": SIDE, "width": SIDE}
    )
    torch.manual_seed(0)
    own = CollaborativeTransformersDetr(
        load_transformers_detr(place, model, CLASSES), tiny(auxiliary=("atss",))
    )
    artwork = Artwork.from_drawings(load_drawings())
    images, targets = (
        list(part)
        for part in zip(
            *(shrink_scene(compose(artwork, "source", seed)) for seed in range(2)),
            strict=True,
        )
    )
    optimizer = torch.optim.AdamW(
        parameter_groups(
            own, TrainingConfig(lr=2e-3, visual_lr_factor=1.0, weight_decay=1e-4)
        )
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [g["lr"] for g in optimizer.param_groups], steps
    )
    assert ap50(own, images, targets) < 0.2
    batch, reached = own.base.prepare(images), 0.0
    for step in range(steps):
        own.train()
        optimizer.zero_grad()
        own.objective(batch, targets).total.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(own.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 25 == 24 and step > 25:
            reached = ap50(own, images, targets)
        if reached > 0.9:
            break
    assert reached > 0.9
