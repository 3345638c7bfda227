"""Write labels with scores as a data set, image by image: what is in memory does not
grow with the number of boxes.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

import numpy as np
import yaml
from numpy.typing import NDArray

from coin_ray.data.formats.coco import WRITTEN_BY
from coin_ray.data.formats.folder import strip_suffix
from coin_ray.data.formats.record import Dataset, ImageRecord
from coin_ray.data.formats.voc import voc_xml
from coin_ray.data.formats.yolo import yolo_text
from coin_ray.errors import InputError

Floats = NDArray[np.float32]
Integers = NDArray[np.int64]
HUNDREDTHS = 100
"""Edges are written in hundredths of a pixel."""
PROBABILITY_MIN = 0.001
"""Smallest probability of a class that is written."""
COPIED_CHARACTERS = 1 << 20
DETAILS_FILE = "details.jsonl"
"""What YOLO and VOC have no room for, one line an image."""


@dataclass(frozen=True, slots=True, eq=False)
class ImageLabels:
    """The boxes of one image: ``edges`` [N, 4] xyxy in hundredths of a pixel, within
    the image; ``labels`` [N]; ``scores`` [N]; ``probs`` [N, K+1], background last;
    ``kinds`` N; ``ignored`` [N] bool: neither an object nor background.
    """

    image_id: str
    file: str
    width: int
    height: int
    edges: Integers
    labels: Integers
    scores: Floats
    probs: Floats
    kinds: Sequence[str]
    ignored: NDArray[np.bool_]


class LabelWriter(Protocol):
    """Writes the images of a data set."""

    holds_ignored: bool
    """Whether ignored boxes are among those that are read back."""

    def image_path(self, split: str, file: str) -> Path:
        """Return where the image file of a split belongs."""

    def write(self, split: str, labels: ImageLabels) -> None:
        """Write the labels of one image."""

    def close(self) -> None:
        """Write what can only be written at the end."""


class CocoWriter:
    """Writes ``annotations/instances_SPLIT.json``; ignored boxes are crowds."""

    holds_ignored = True

    def __init__(
        self, folder: Path, splits: Sequence[str], names: Sequence[str]
    ) -> None:
        self.folder, self.splits = folder, splits
        self.images = dict.fromkeys(splits, 0)
        self.annotations = dict.fromkeys(splits, 0)
        self.open_files = ExitStack()
        self.image_parts: dict[str, IO[str]] = {}
        self.annotation_parts: dict[str, IO[str]] = {}
        (folder / "annotations").mkdir(parents=True)
        categories = [
            {"id": number, "name": name, "supercategory": ""}
            for number, name in enumerate(names, start=1)
        ]
        for split in splits:
            image_part = self._open(self._path(split))
            image_part.write(
                f'{{"info": {json.dumps({"description": WRITTEN_BY})},\n"licenses": [],'
                f'\n"categories": {json.dumps(categories)},\n"images": ['
            )
            self.image_parts[split] = image_part
            self.annotation_parts[split] = self._open(self._part_path(split))

    def _open(self, path: Path) -> IO[str]:
        return self.open_files.enter_context(path.open("w+", encoding="utf-8"))

    def _path(self, split: str) -> Path:
        return self.folder / "annotations" / f"instances_{split}.json"

    def _part_path(self, split: str) -> Path:
        return self._path(split).with_suffix(".part")

    def image_path(self, split: str, file: str) -> Path:
        return self.folder / "images" / split / file

    def write(self, split: str, labels: ImageLabels) -> None:
        self.images[split] += 1
        number = self.images[split]
        separator = ",\n" if number > 1 else "\n"
        self.image_parts[split].write(
            f'{separator}{{"id":{number},"file_name":{json.dumps(labels.file)},'
            f'"width":{labels.width},"height":{labels.height},'
            f'"source_id":{json.dumps(labels.image_id)}}}'
        )
        first = self.annotations[split] + 1
        self.annotations[split] += len(labels.labels)
        lines = ",\n".join(self._annotation_lines(number, first, labels))
        if lines:
            separator = ",\n" if first > 1 else "\n"
            self.annotation_parts[split].write(separator + lines)

    def _annotation_lines(
        self, image: int, first: int, labels: ImageLabels
    ) -> Iterator[str]:
        """Yield the text of each annotation, numbered from ``first``."""
        edges = labels.edges
        sizes = edges[:, 2:] - edges[:, :2]
        boxes = np.concatenate([edges[:, :2], sizes], axis=1) / HUNDREDTHS
        areas = np.rint(boxes[:, 2] * boxes[:, 3] * HUNDREDTHS) / HUNDREDTHS
        rows = zip(
            boxes.tolist(),
            areas.tolist(),
            labels.labels.tolist(),
            labels.scores.tolist(),
            format_probabilities(labels.probs, first_id=1),
            labels.kinds,
            labels.ignored.tolist(),
            strict=True,
        )
        for number, row in enumerate(rows, start=first):
            (left, top, width, height), area, label, score, probs, kind, crowd = row
            yield (
                f'{{"id":{number},"image_id":{image},'
                f'"category_id":{label + 1},"bbox":[{left},{top},{width},{height}],'
                f'"area":{area},"iscrowd":{int(crowd)},"segmentation":[],'
                f'"score":{score:.4f},"kind":"{kind}","probs":{probs}}}'
            )

    def close(self) -> None:
        with self.open_files:
            for split in self.splits:
                target, part = self.image_parts[split], self.annotation_parts[split]
                target.write('],\n"annotations": [')
                part.seek(0)
                shutil.copyfileobj(part, target, COPIED_CHARACTERS)
                target.write("]}\n")
        for split in self.splits:
            self._part_path(split).unlink()


class YoloWriter:
    """Writes text files below ``labels/SPLIT`` and ``data.yaml``; scores and ignored
    boxes are in ``DETAILS_FILE``.
    """

    holds_ignored = False

    def __init__(
        self, folder: Path, splits: Sequence[str], names: Sequence[str]
    ) -> None:
        self.folder, self.names = folder, names
        for split in splits:
            (folder / "labels" / split).mkdir(parents=True)
        settings = {split: f"images/{split}" for split in splits}
        text = yaml.safe_dump(
            {**settings, "names": dict(enumerate(names))},
            allow_unicode=True,
            sort_keys=False,
        )
        (folder / "data.yaml").write_text(text, encoding="utf-8")
        self.details = _DetailsFile(folder, names)

    def image_path(self, split: str, file: str) -> Path:
        return self.folder / "images" / split / file

    def write(self, split: str, labels: ImageLabels) -> None:
        text = yolo_text(_object_record(labels, self.names), self.names)
        path = self.folder / "labels" / split / f"{strip_suffix(labels.file)}.txt"
        path.write_text(text, encoding="utf-8")
        self.details.write(split, labels)

    def close(self) -> None:
        self.details.close()


class VocWriter:
    """Writes ``Annotations/*.xml`` and ``ImageSets/Main/SPLIT.txt``; scores and ignored
    boxes are in ``DETAILS_FILE``.
    """

    holds_ignored = False

    def __init__(
        self, folder: Path, splits: Sequence[str], names: Sequence[str]
    ) -> None:
        self.folder, self.names = folder, names
        list_folder = folder / "ImageSets" / "Main"
        list_folder.mkdir(parents=True)
        (folder / "Annotations").mkdir()
        self.lists = {
            split: (list_folder / f"{split}.txt").open("w", encoding="utf-8")
            for split in splits
        }
        self.details = _DetailsFile(folder, names)

    def image_path(self, split: str, file: str) -> Path:
        return self.folder / "JPEGImages" / file

    def write(self, split: str, labels: ImageLabels) -> None:
        stem = strip_suffix(labels.file)
        record = _object_record(labels, self.names)
        (self.folder / "Annotations" / f"{stem}.xml").write_bytes(voc_xml(record))
        self.lists[split].write(f"{stem}\n")
        self.details.write(split, labels)

    def close(self) -> None:
        for image_list in self.lists.values():
            image_list.close()
        self.details.close()


WRITERS: Mapping[str, Callable[[Path, Sequence[str], Sequence[str]], LabelWriter]] = {
    "coco": CocoWriter,
    "yolo": YoloWriter,
    "voc": VocWriter,
}
"""Makers of a writer from its folder, the splits and the class names."""


class _DetailsFile:
    """One JSON line an image: all its boxes with score, kind and probabilities."""

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self.names = names
        self.file = (folder / DETAILS_FILE).open("w", encoding="utf-8")

    def write(self, split: str, labels: ImageLabels) -> None:
        rows = zip(
            (labels.edges / HUNDREDTHS).tolist(),
            labels.labels.tolist(),
            labels.scores.tolist(),
            format_probabilities(labels.probs, first_id=0),
            labels.kinds,
            labels.ignored.tolist(),
            strict=True,
        )
        objects = ",".join(
            f'{{"xyxy":{xyxy},"class":{label},"score":{score:.4f},"kind":"{kind}",'
            f'"ignored":{json.dumps(ignored)},"probs":{probs}}}'
            for xyxy, label, score, probs, kind, ignored in rows
        )
        self.file.write(
            f'{{"file":{json.dumps(labels.file)},"split":"{split}",'
            f'"id":{json.dumps(labels.image_id)},"labels":[{objects}]}}\n'
        )

    def close(self) -> None:
        self.file.close()


def format_probabilities(probs: Floats, first_id: int) -> list[str]:
    """Return a JSON object for each row [N, K+1]: the probability of each class from
    ``PROBABILITY_MIN`` on, by its id; the rest is background.
    """
    texts: list[list[str]] = [[] for _ in range(len(probs))]
    rows, columns = np.nonzero(probs[:, :-1] >= PROBABILITY_MIN)
    values = probs[rows, columns].tolist()
    ids = (columns + first_id).tolist()
    for row, number, value in zip(rows.tolist(), ids, values, strict=True):
        texts[row].append(f'"{number}":{value:.3f}')
    return [f"{{{','.join(row)}}}" for row in texts]


def _object_record(labels: ImageLabels, names: Sequence[str]) -> ImageRecord:
    """Return the image with the boxes that are objects."""
    is_object = ~labels.ignored
    object_labels = labels.labels[is_object].tolist()
    return ImageRecord(
        labels.file,
        labels.file,
        labels.width,
        labels.height,
        labels.edges[is_object] / HUNDREDTHS,
        tuple(names[label] for label in object_labels),
        np.zeros(len(object_labels), np.bool_),
    )


class LabelDigest:
    """A digest of which boxes each image has, whatever the order of both."""

    def __init__(self) -> None:
        self.images = self.boxes = self.digest = 0

    def add(
        self,
        file: str,
        edges: Integers,
        labels: Integers,
        difficult: NDArray[np.bool_],
    ) -> None:
        """Add an image: ``edges`` [N, 4] in hundredths, ``labels`` [N], ``difficult``
        [N].
        """
        columns = (edges.T, labels[None], difficult[None])
        rows = np.concatenate(columns).astype(np.int64)
        if rows.shape[1] > 1:
            rows = rows[:, np.lexsort(rows)]
        digest = hashlib.blake2b(file.encode(), digest_size=16)
        digest.update(rows.tobytes())
        self.digest += int.from_bytes(digest.digest())
        self.digest %= 1 << 128
        self.images += 1
        self.boxes += len(labels)

    def add_dataset(self, dataset: Dataset, names: Sequence[str]) -> None:
        """Add the annotated images of a data set that was read. Raises InputError for
        one without annotations.
        """
        label_by_name = {name: label for label, name in enumerate(names)}
        for record in dataset.records:
            if not record.annotated:
                raise InputError(f"{record.uri} reads back as not annotated")
            edges = np.rint(record.boxes * HUNDREDTHS).astype(np.int64)
            labels = [label_by_name[name] for name in record.labels]
            label_array = np.array(labels, np.int64)
            self.add(record.file, edges, label_array, record.difficult)

    def state(self) -> Mapping[str, int]:
        """Return the number of images, of boxes, and the digest."""
        return {"images": self.images, "boxes": self.boxes, "digest": self.digest}
