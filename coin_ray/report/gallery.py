"""The gallery: pictures with boxes by layer, and the controls that switch and filter them."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

BOX_KINDS = ("consistent", "inconsistent", "private", "reviewed")
"""Kinds of boxes on training images; "reviewed": a person's."""
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
            "The teachers' boxes by kind: both agree, both find it but give different"
            " classes, only one finds it; or a person's boxes."
        ),
    ),
}
"""Title and note of each group of pictures, in order."""
LETTER_WIDTH = 0.78
"""Approximate width of a letter as a share of the font size; small screens show text
larger."""
FONT_DIVISOR = 23
"""Image width / font size: every frame is equally wide on the page."""
INITIAL_LAYERS = ("truth", "student", *BOX_KINDS)
"""Layers that are on when the page opens; the first layer if there is none of these."""
TEXT_BELOW = ("student", "clip_detector", "inconsistent", "private")
TEXT_AT_RIGHT = ("cloud", "clip_detector", "private")
"""Each layer writes at a corner of its own, so that layers shown together stay legible."""


@dataclass(frozen=True, slots=True)
class Box:
    """A box of a picture.

    ``xyxy``: pixels of the gallery image. ``score``: None for truth. ``kind``: one of
    BOX_KINDS, or empty.
    """

    xyxy: tuple[float, float, float, float]
    label: str
    score: float | None = None
    kind: str = ""


@dataclass(frozen=True, slots=True)
class GalleryImage:
    """A JPEG of an image of ``width`` x ``height`` pixels and its boxes by layer.

    Layers are truth, cloud, clip_labels, clip_detector, student and separation; a box
    with a ``kind`` is switched by its kind, whatever its layer. ``group``: one of GROUPS.
    ``note``: text below the picture. ``disagreements``: those of DISAGREEMENTS that it
    shows.
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
    """A box as drawn, in pixels of its image.

    ``toggle``: the checkbox that switches it. ``text_x``, ``text_y`` and ``anchor``:
    position of its text.
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
class GalleryFrame:
    """A picture as drawn; filters search ``kinds`` and ``disagreements``, space-separated."""

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
class GalleryGroup:
    """Pictures below one title."""

    title: str
    note: str
    frames: tuple[GalleryFrame, ...]


@dataclass(frozen=True, slots=True)
class Toggle:
    """A checkbox that switches a layer or a kind."""

    key: str
    name: str
    on: bool


@dataclass(frozen=True, slots=True)
class Gallery:
    """The pictures, the checkboxes, and what the filters offer.

    ``kinds`` and ``disagreements``: names by key.
    """

    groups: tuple[GalleryGroup, ...]
    toggles: tuple[Toggle, ...]
    classes: tuple[str, ...]
    kinds: dict[str, str]
    disagreements: dict[str, str]


def build_gallery(
    images: Sequence[GalleryImage], classes: Sequence[str]
) -> Gallery | None:
    """Return the images by group, in the order of GROUPS; None without images."""
    groups = []
    for key, (title, note) in GROUPS.items():
        frames = tuple(_build_frame(image) for image in images if image.group == key)
        if frames:
            groups.append(GalleryGroup(title, note, frames))
    if not groups:
        return None
    boxes = [box for image in images for _, box in _layered_boxes(image)]
    kinds = {box.kind for box in boxes}
    disagreements = {name for image in images for name in image.disagreements}
    return Gallery(
        tuple(groups),
        tuple(_build_toggles(images)),
        classes=_class_options({box.label for box in boxes}, classes),
        kinds={kind: kind.capitalize() for kind in BOX_KINDS if kind in kinds},
        disagreements={
            key: name for key, name in DISAGREEMENTS.items() if key in disagreements
        },
    )


def _layered_boxes(image: GalleryImage) -> Iterator[tuple[str, Box]]:
    for layer, boxes in image.layers.items():
        for box in boxes:
            yield layer, box


def _class_options(labels: set[str], classes: Sequence[str]) -> tuple[str, ...]:
    """Return the labels in the order of the classes, other labels after them."""
    ordered = [name for name in classes if name in labels]
    return (*ordered, *sorted(labels - set(ordered)))


def _build_toggles(images: Sequence[GalleryImage]) -> list[Toggle]:
    present = set()
    for image in images:
        present |= {_toggle_key(layer, box) for layer, box in _layered_boxes(image)}
        present |= {layer for layer in image.layers if layer in LAYER_NAMES}
    keys = [key for key in (*LAYER_NAMES, *BOX_KINDS) if key in present]
    initial = [key for key in INITIAL_LAYERS if key in keys] or keys[:1]
    return [
        Toggle(key, LAYER_NAMES.get(key, key.capitalize()), key in initial)
        for key in keys
    ]


def _toggle_key(layer: str, box: Box) -> str:
    return box.kind if box.kind in BOX_KINDS else layer


def _build_frame(image: GalleryImage) -> GalleryFrame:
    font = image.width / FONT_DIVISOR
    marks = tuple(
        _build_mark(_toggle_key(layer, box), box, image, font)
        for layer, box in _layered_boxes(image)
    )
    jpeg = base64.b64encode(image.jpeg).decode("ascii")
    toggles = {mark.toggle for mark in marks}
    return GalleryFrame(
        source=f"data:image/jpeg;base64,{jpeg}",
        name=image.name,
        width=image.width,
        height=image.height,
        font=font,
        marks=marks,
        note=image.note,
        kinds=" ".join(kind for kind in BOX_KINDS if kind in toggles),
        disagreements=" ".join(image.disagreements),
    )


def _build_mark(toggle: str, box: Box, image: GalleryImage, font: float) -> Mark:
    left, top, right, bottom = box.xyxy
    text = box.label
    if box.score is not None:
        text += f" {box.score:.2f}".replace(" 0.", " .")
    text_width = len(text) * LETTER_WIDTH * font
    text_x, text_y, anchor = _text_position(toggle, box, image, font, text_width)
    return Mark(
        toggle,
        box.label,
        text,
        x=left,
        y=top,
        width=max(right - left, 0),
        height=max(bottom - top, 0),
        text_x=text_x,
        text_y=text_y,
        anchor=anchor,
    )


def _text_position(
    toggle: str, box: Box, image: GalleryImage, font: float, text_width: float
) -> tuple[float, float, str]:
    """Return x, y and anchor of a box's text, which stays within the image."""
    left, top, right, bottom = box.xyxy
    if toggle in TEXT_BELOW:
        y = min(bottom + font, image.height - font / 4)
    else:
        y = max(top - font / 4, font)
    if toggle in TEXT_AT_RIGHT:
        return min(max(right, text_width), image.width), y, "end"
    return max(min(left, image.width - text_width), 0), y, "start"
