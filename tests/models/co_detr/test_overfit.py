from __future__ import annotations

import pytest
import torch

from coin_ray.config import TrainingConfig
from coin_ray.config.co_detr import tiny
from coin_ray.demo.drawings import CLASSES
from coin_ray.models.co_detr.backbone import TinyBackbone
from coin_ray.models.co_detr.collaborative import CollaborativeDetr
from coin_ray.training.supervised import parameter_groups
from models.co_detr.overfitting import ap50, small_scenes

STEPS = 120


@pytest.mark.slow
def test_eight_scenes_are_learned_by_heart() -> None:
    torch.manual_seed(0)
    images, targets = small_scenes(8)
    model = CollaborativeDetr(TinyBackbone(), len(CLASSES), tiny(auxiliary=("atss",)))
    config = TrainingConfig(lr=1e-3, visual_lr_factor=0.1, weight_decay=1e-4)
    optimizer = torch.optim.AdamW(parameter_groups(model, config))
    learning_rates = [group["lr"] for group in optimizer.param_groups]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rates, STEPS)
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
