"""Turned boxes: the upright box around one."""

from __future__ import annotations

import math

Edges = tuple[float, float, float, float]


def extent_of_turned(edges: Edges, degrees: float, pivot: tuple[float, float]) -> Edges:
    """Return the edges of the upright box around one that is turned clockwise by
    ``degrees`` about ``pivot`` (x, y).
    """
    x1, y1, x2, y2 = edges
    turn = math.radians(degrees)
    cosine, sine = math.cos(turn), math.sin(turn)
    corners = [(x, y) for x in (x1, x2) for y in (y1, y2)]
    offsets = [(x - pivot[0], y - pivot[1]) for x, y in corners]
    xs = [pivot[0] + dx * cosine - dy * sine for dx, dy in offsets]
    ys = [pivot[1] + dx * sine + dy * cosine for dx, dy in offsets]
    return min(xs), min(ys), max(xs), max(ys)
