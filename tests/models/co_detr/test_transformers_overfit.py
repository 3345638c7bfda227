from __future__ import annotations

from pathlib import Path

import pytest
import torch

from coin_ray.config import TrainingConfig
from coin_ray.config.co_detr import tiny
from coin_ray.demo.drawings import CLASSES
from coin_ray.models.co_detr.transformers_detr import (
    CollaborativeTransformersDetr,
    load_transformers_detr,
)
from coin_ray.training.supervised import parameter_groups
from models.co_detr.overfitting import SIDE, ap50, small_scenes
from models.co_detr.transformers_networks import save_network

pytest.importorskip("transformers")


@pytest.mark.slow
@pytest.mark.parametrize(("model", "steps"), [("rt-detr-v2", 300), ("d-fine", 150)])
def test_two_scenes_are_learned_by_heart(
    model: str, steps: int, tmp_path: Path
) -> None:
    size = {"height": SIDE, "width": SIDE}
    folder = save_network(tmp_path, model, len(CLASSES), size=size)
    torch.manual_seed(0)
    base = load_transformers_detr(folder, model, CLASSES)
    detector = CollaborativeTransformersDetr(base, tiny(auxiliary=("atss",)))
    images, targets = small_scenes(2)
    config = TrainingConfig(lr=2e-3, visual_lr_factor=1.0, weight_decay=1e-4)
    optimizer = torch.optim.AdamW(parameter_groups(detector, config))
    learning_rates = [group["lr"] for group in optimizer.param_groups]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rates, steps)
    assert ap50(detector, images, targets) < 0.2
    batch = detector.base.prepare(images)
    reached = 0.0
    for step in range(steps):
        detector.train()
        optimizer.zero_grad()
        detector.objective(batch, targets).total.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(detector.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 25 == 24 and step > 25:
            reached = ap50(detector, images, targets)
        if reached > 0.9:
            break
    assert reached > 0.9
