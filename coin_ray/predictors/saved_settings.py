"""Settings read back from a file that knows lists but no tuples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def tuples_from_lists(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a config dataclass, with each list as a tuple."""
    return {
        name: tuple(setting) if isinstance(setting, list) else setting
        for name, setting in settings.items()
    }
