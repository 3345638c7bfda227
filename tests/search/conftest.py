from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from coin_ray.config import Tracking
from coin_ray.config.presets import demo
from coin_ray.search.plan import Search


@pytest.fixture
def make_search(tmp_path: Path) -> Callable[..., Search]:
    """A search of the demo's loss weights below ``tmp_path``, nothing tracked; changes
    by name."""

    def make(**changes: Any) -> Search:
        config = replace(
            changes.pop("config", demo()), tracking=Tracking(enabled=False)
        )
        defaults: dict[str, Any] = {
            "space_name": "loss-weights",
            "objective": "map50",
            "algorithm": "random",
            "trials": 4,
        }
        return Search(config, str(tmp_path), **(defaults | changes))

    return make
