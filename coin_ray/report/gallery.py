"""The gallery: pictures with boxes by layer, and what switches and filters them."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field

KINDS = ("consistent", "inconsistent", "private", "reviewed")
"""What boxes of training images are; the last: a person's."""
LAYER_NAMES = {
    "truth": "Truth",
    "cloud": "Cloud",
    "clip_labels": "CLIP labels",
    "clip_detector": "CLIP detector",
    "student": "Student",
}
DISAGREEMENTS = {
    "teachers": "Cloud and CLIP name a box differently",
    "student": "Student differs from the cloud",
    "worse": "Student finds fewer than the cloud",
    "better": "Student finds more than the cloud",
}
GROUPS = {
    "worst": (
        "Worst regressions",
        (
            "Test images on which the student is worst against the cloud: objects it no"
            " longer finds, boxes newly wrong."
        ),
    ),
    "test": ("Further test images", "Evenly spread over the test images."),
    "train": (
        "Training images",
        (
            "What the teachers said, by kind: both agree, both see it but name it"
            " differently, only one sees it; or a person."
        ),
    ),
}
LETTER = 0.78
"""Width of a letter as a share of the font size, about; small screens show text larger.
"""
SHOWN_FIRST = ("truth", "student", *KINDS)
"""Layers that are on when the page opens; the first layer there is if it has neither.
"""


@dataclass(frozen=True, slots=True)
class Box:
    """``xyxy``: pixels of the gallery image. ``score``: None for truth. ``kind``: one
    of KINDS, or empty.
    """

    xyxy: tuple[float, float, float, float]
    label: str
    score: float | None = None
    kind: str = ""


@dataclass(frozen=True, slots=True)
class GalleryImage:
    """A JPEG of an image of ``width`` x ``height`` pixels and its boxes by layer:
    truth, cloud, clip_labels, clip_detector, student, separation.

    A box with a ``kind`` is switched by its kind, whatever its layer. ``group``: one of
    GROUPS; ``note``: what is said below it; ``disagreements``: those of DISAGREEMENTS
    that it shows.
    """

    jpeg: bytes
    width: int
    height: int
    name: str
    layers: dict[str, list[Box]] = field(default_factory=dict)
    group: str = "test"
    note: str = ""
    disagreements: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Mark:
    """A box as drawn, in pixels of its image; ``toggle`` switches it, ``text_y`` and
    ``anchor`` place its name.
    """

    toggle: str
    label: str
    text: str
    x: float
    y: float
    width: float
    height: float
    text_x: float
    text_y: float
    anchor: str


@dataclass(frozen=True, slots=True)
class Frame:
    """``kinds`` and ``disagreements``: what the filters look for, separated by spaces."""

    source: str
    name: str
    width: int
    height: int
    font: float
    marks: tuple[Mark, ...]
    note: str
    kinds: str
    disagreements: str


@dataclass(frozen=True, slots=True)
class Group:
    title: str
    note: str
    frames: tuple[Frame, ...]


@dataclass(frozen=True, slots=True)
class Toggle:
    key: str
    name: str
    on: bool


@dataclass(frozen=True, slots=True)
class Gallery:
    """``classes``, ``kinds``, ``disagreements``: what there is to filter by, the last
    two with their names.
    """

    groups: tuple[Group, ...]
    toggles: tuple[Toggle, ...]
    classes: tuple[str, ...]
    kinds: dict[str, str]
    disagreements: dict[str, str]


def arranged(images: Sequence[GalleryImage], classes: Sequence[str]) -> Gallery | None:
    """The images by group, in the order of GROUPS; None without images."""
    groups = [
        Group(title, note, tuple(_frame(i) for i in images if i.group == key))
        for key, (title, note) in GROUPS.items()
        if any(i.group == key for i in images)
    ]
    every = [
        (layer, box)
        for image in images
        for layer, boxes in image.layers.items()
        for box in boxes
    ]
    labels = {box.label for _, box in every}
    kinds = {k: k.capitalize() for k in KINDS if any(box.kind == k for _, box in every)}
    seen = {
        d: name
        for d, name in DISAGREEMENTS.items()
        if any(d in i.disagreements for i in images)
    }
    ordered = [name for name in classes if name in labels]
    named = (*ordered, *sorted(labels - set(ordered)))
    return (
        Gallery(tuple(groups), tuple(_toggles(images)), named, kinds, seen)
        if groups
        else None
    )


def _toggles(gallery: Sequence[GalleryImage]) -> list[Toggle]:
    present = {
        _toggle_key(layer, box)
        for image in gallery
        for layer, boxes in image.layers.items()
        for box in boxes
    }
    present |= {
        layer for image in gallery for layer in image.layers if layer in LAYER_NAMES
    }
    keys = [key for key in (*LAYER_NAMES, *KINDS) if key in present]
    shown = [key for key in SHOWN_FIRST if key in keys] or keys[:1]
    return [
        Toggle(key, LAYER_NAMES.get(key, key.capitalize()), key in shown)
        for key in keys
    ]


def _toggle_key(layer: str, box: Box) -> str:
    return box.kind if box.kind in KINDS else layer


def _frame(image: GalleryImage) -> Frame:
    """Text is sized to the image's width, because every frame of the gallery is equally
    wide.
    """
    font = image.width / 23
    marks = tuple(
        _mark(_toggle_key(layer, box), box, image, font)
        for layer, boxes in image.layers.items()
        for box in boxes
    )
    source = "data:image/jpeg;base64," + base64.b64encode(image.jpeg).decode("ascii")
    kinds = [kind for kind in KINDS if any(mark.toggle == kind for mark in marks)]
    return Frame(
        source,
        image.name,
        image.width,
        image.height,
        font,
        marks,
        image.note,
        " ".join(kinds),
        " ".join(image.disagreements),
    )


def _mark(toggle: str, box: Box, image: GalleryImage, font: float) -> Mark:
    left, top, right, bottom = box.xyxy
    text = (
        box.label
        if box.score is None
        else box.label + f" {box.score:.2f}".replace(" 0.", " .")
    )
    text_x, text_y, anchor = _text_place(
        toggle, box, image, font, len(text) * LETTER * font
    )
    return Mark(
        toggle,
        box.label,
        text,
        left,
        top,
        max(right - left, 0),
        max(bottom - top, 0),
        text_x,
        text_y,
        anchor,
    )


def _text_place(
    toggle: str, box: Box, image: GalleryImage, font: float, length: float
) -> tuple[float, float, str]:
    """x, y and anchor. Each layer writes at a corner of its own, so that layers shown
    together stay legible; never outside.
    """
    left, top, right, bottom = box.xyxy
    below = toggle in ("student", "clip_detector", "inconsistent", "private")
    at_right = toggle in ("cloud", "clip_detector", "private")
    text_y = (
        min(bottom + font, image.height - font / 4)
        if below
        else max(top - font / 4, font)
    )
    if at_right:
        return min(max(right, length), image.width), text_y, "end"
    return max(min(left, image.width - length), 0), text_y, "start"
