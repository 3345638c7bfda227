"""Adapt a cloud object detector to your own unlabelled images. ``adapt`` runs
everything; ``plan`` says what it would ask and cost.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from coin_ray.commands.library import Adaptation, adapt, plan

__all__ = ["Adaptation", "adapt", "plan"]


def __getattr__(name: str) -> Any:
    """Imported when first used, so that ``import coin_ray`` costs nothing."""
    if name not in __all__:
        raise AttributeError(f"module 'coin_ray' has no attribute {name!r}")
    from coin_ray.commands import library

    return getattr(library, name)
