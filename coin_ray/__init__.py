"""Adapt a cloud object detector to your own unlabelled images. ``adapt`` runs
everything; ``plan`` tells what it would send and cost; ``load`` opens a trained detector.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from coin_ray.commands.library import Adaptation, adapt, plan
    from coin_ray.predictors.predictor import Predictor

__all__ = ["Adaptation", "adapt", "load", "plan"]


def load(path: str | os.PathLike[str]) -> Predictor:
    """Open a trained detector: the folder of an export, one of its files model.json,
    model.safetensors and model.onnx, a Co-DETR's co_detr.pt or the folder it is in.

    It has ``classes``, and called with a PIL image it returns ``Detections`` in that
    image's pixels. Raises ``coin_ray.errors.InputError`` for anything else.
    """
    from coin_ray.predictors.loading import open_predictor

    return open_predictor(os.fspath(path))


def __getattr__(name: str) -> Any:
    """Import the library when it is first used: ``import coin_ray`` stays fast."""
    if name not in __all__:
        raise AttributeError(f"module 'coin_ray' has no attribute {name!r}")
    from coin_ray.commands import library

    return getattr(library, name)
