"""A detector behind HTTP (docs/serving.md): ``serve run coin_ray.serving:app``, or
``coin_ray.serving:build`` with arguments.
"""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    """Make ``app`` and ``build`` when Ray Serve asks for them: no other module of this
    package needs Ray.
    """
    if name not in ("app", "build"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import os

    from coin_ray.serving.application import build, settings_from_environment

    if name == "build":
        return build
    return build(settings_from_environment(os.environ))
