"""What people are given to review, and what comes back: an image with its boxes, their kinds and what the teachers said."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from coin_ray.data.formats.record import Annotation, Record

KINDS = ("consistent", "inconsistent", "private")
DIGITS = 4


@dataclass(frozen=True, slots=True)
class Box:
    """``edges``: left, top, right, bottom in pixels. ``kind``: one of KINDS, or empty if a person drew the box; ``said``: by the teachers."""

    edges: tuple[float, float, float, float]
    label: str
    kind: str = ""
    said: str = ""


@dataclass(frozen=True, slots=True)
class Review:
    """One image. ``name``: the path of its file among the reviewed ones; ``reviewed``: a person says that the boxes are right and complete."""

    image_id: str
    uri: str
    name: str
    width: int
    height: int
    boxes: tuple[Box, ...] = ()
    reviewed: bool = False

    @property
    def counts(self) -> dict[str, int]:
        """Boxes of each kind."""
        found = Counter(box.kind for box in self.boxes)
        return {kind: found[kind] for kind in KINDS}

    @property
    def disagreement(self) -> float:
        """Share of the teachers' boxes that are not consistent; 0 without any."""
        total = sum(self.counts.values())
        return round(1 - self.counts["consistent"] / total, DIGITS) if total else 0.0

    def record(self) -> Record:
        """As one image of a data set."""
        found = [Annotation(box.edges, box.label) for box in self.boxes]
        return Record.of(self.name, self.uri, (self.width, self.height), found)


def reviews(images: Sequence[Mapping[str, Any]], separation: Sequence[Mapping[str, Any]], classes: Sequence[str]) -> list[Review]:
    """Of rows of ``tables.IMAGES`` and ``tables.SEPARATION``: the images in most dispute first. Those that people have reviewed are left out."""
    rows = {row["image_id"]: row for row in separation if not set(row["kind"]) - set(KINDS)}
    chosen = [image for image in images if image["image_id"] in rows]
    names = _names([str(image["uri"]) for image in chosen])
    made = [_review(image, name, rows[image["image_id"]], classes) for image, name in zip(chosen, names, strict=True)]
    return sorted(made, key=lambda r: -r.disagreement)


def _review(image: Mapping[str, Any], name: str, row: Mapping[str, Any], classes: Sequence[str]) -> Review:
    boxes = [
        _box(box, kind, _best(cloud, classes), _best(clip, classes))
        for box, kind, cloud, clip in zip(row["boxes"], row["kind"], row["cloud_probs"], row["clip_probs"], strict=True)
    ]
    return Review(image["image_id"], image["uri"], name, image["width"], image["height"], tuple(boxes))


def _box(box: Sequence[float], kind: str, cloud: tuple[str, float], clip: tuple[str, float]) -> Box:
    """``cloud`` and ``clip``: best class and its probability; of a private box only ``cloud`` counts, and may be either teacher's."""
    left, top, right, bottom = (float(edge) for edge in box)
    said = f"{cloud[0]} {cloud[1]:.2f}" if kind == "private" else f"cloud {cloud[0]} {cloud[1]:.2f}, CLIP {clip[0]} {clip[1]:.2f}"
    return Box((left, top, right, bottom), cloud[0], kind, said)


def _best(probs: Sequence[float], classes: Sequence[str]) -> tuple[str, float]:
    """Best class, background left out: ``probs`` [K+1], background last."""
    best = max(range(len(classes)), key=lambda k: probs[k])
    return classes[best], float(probs[best])


def _names(uris: Sequence[str]) -> list[str]:
    """What tells the files apart: their paths below the folder that holds all of them."""
    parts = [uri.split("/") for uri in uris]
    shared = 0
    while parts and all(len(p) > shared + 1 and p[shared] == parts[0][shared] for p in parts):
        shared += 1
    return ["/".join(p[shared:]) for p in parts]
