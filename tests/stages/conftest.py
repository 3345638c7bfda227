from __future__ import annotations

import pytest

from coin_ray.data.inspect import inspect_image
from coin_ray.stages import images


@pytest.fixture
def inspect_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inspect images without the processes of ``tests/data/test_inspect.py``, which take
    longer to start than all the rest of the step."""
    monkeypatch.setattr(
        images, "inspect_images", lambda uris, _: map(inspect_image, uris)
    )
