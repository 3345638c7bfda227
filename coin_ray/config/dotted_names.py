"""Nested settings and figures by dotted name, as ``distill.fit.steps``."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

MAX_TEXT = 500
"""Characters of a setting's text that are kept; MLflow takes no longer parameters."""


def flatten(nested: object, prefix: str = "") -> dict[str, Any]:
    """Return the leaves of nested mappings by dotted name.

    A value that is no mapping is a leaf by the name ``prefix``, or "value" without one.
    """
    if not isinstance(nested, Mapping):
        return {prefix or "value": nested}
    leaves: dict[str, Any] = {}
    for name, child in nested.items():
        leaves |= flatten(child, f"{prefix}.{name}" if prefix else str(name))
    return leaves


def flatten_config(config: object) -> dict[str, str]:
    """Return the settings of a config dataclass, or of nested dicts, as texts."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        config = dataclasses.asdict(config)
    return {name: str(leaf)[:MAX_TEXT] for name, leaf in flatten(config).items()}
