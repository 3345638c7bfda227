"""Write labels with scores as a data set, block by block: what is in memory does not
grow with the number of boxes.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import IO, Protocol

import numpy as np
import yaml
from numpy.typing import NDArray

from coin_ray.data.formats.coco import WRITTEN_BY
from coin_ray.data.formats.folder import strip_suffix
from coin_ray.data.formats.ragged import (
    Integers,
    count_boxes,
    image_of_boxes,
    rows_of_images,
    starts_of,
)
from coin_ray.data.formats.record import Dataset, ImageRecord
from coin_ray.data.formats.voc import voc_xml
from coin_ray.data.formats.yolo import yolo_text
from coin_ray.errors import InputError

Floats = NDArray[np.float32]
HUNDREDTHS = 100
"""Edges are written in hundredths of a pixel."""
PROBABILITY_MIN = 0.001
"""Smallest probability of a class that is written."""
COPIED_CHARACTERS = 1 << 20
RECORDS_AT_ONCE = 1 << 12
DETAILS_FILE = "details.jsonl"
"""What YOLO and VOC have no room for, one line an image."""


@dataclass(frozen=True, slots=True, eq=False)
class LabelledImages:
    """Images and their boxes: those of image i are the rows ``starts[i]`` up to
    ``starts[i + 1]`` of ``edges`` [M, 4] xyxy in hundredths of a pixel, within the
    image; ``labels``, ``scores``, ``kinds`` [M]; ``probs`` [M, K+1], background last;
    ``ignored`` [M] bool: neither an object nor background.

    ``image_ids``, ``files``: N texts; ``sizes`` [N, 2]: width, height.
    """

    image_ids: Sequence[str]
    files: Sequence[str]
    sizes: Integers
    starts: Integers
    edges: Integers
    labels: Integers
    scores: Floats
    probs: Floats
    kinds: NDArray[np.object_]
    ignored: NDArray[np.bool_]

    def select(self, images: Integers) -> LabelledImages:
        """Return the images at these positions."""
        rows = rows_of_images(self.starts, images)
        positions = images.tolist()
        return LabelledImages(
            [self.image_ids[position] for position in positions],
            [self.files[position] for position in positions],
            self.sizes[images],
            starts_of(np.diff(self.starts)[images]),
            self.edges[rows],
            self.labels[rows],
            self.scores[rows],
            self.probs[rows],
            self.kinds[rows],
            self.ignored[rows],
        )


class LabelWriter(Protocol):
    """Writes the images of a data set."""

    holds_ignored: bool
    """Whether ignored boxes are among those that are read back."""

    def image_path(self, split: str, file: str) -> Path:
        """Return where the image file of a split belongs."""

    def write(self, split: str, images: LabelledImages) -> None:
        """Write the labels of images."""

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

    def write(self, split: str, images: LabelledImages) -> None:
        first_image, first_box = self.images[split] + 1, self.annotations[split] + 1
        self.images[split] += len(images.files)
        self.annotations[split] += len(images.labels)
        image_lines = _coco_image_lines(images, first_image)
        _append_lines(self.image_parts[split], image_lines, first_image)
        box_lines = _coco_box_lines(images, first_image, first_box)
        _append_lines(self.annotation_parts[split], box_lines, first_box)

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


def _append_lines(stream: IO[str], lines: Sequence[str], first: int) -> None:
    """Write entries of a JSON list, the first of which is number ``first``."""
    if lines:
        stream.write(",\n" if first > 1 else "\n")
        stream.write(",\n".join(lines))


def _coco_image_lines(images: LabelledImages, first_image: int) -> list[str]:
    rows = zip(images.files, images.sizes.tolist(), images.image_ids, strict=True)
    return [
        f'{{"id":{number},"file_name":{json.dumps(file)},'
        f'"width":{width},"height":{height},"source_id":{json.dumps(image_id)}}}'
        for number, (file, (width, height), image_id) in enumerate(rows, first_image)
    ]


def _coco_box_lines(
    images: LabelledImages, first_image: int, first_box: int
) -> list[str]:
    edges = images.edges
    sizes = edges[:, 2:] - edges[:, :2]
    boxes = np.concatenate([edges[:, :2], sizes], axis=1) / HUNDREDTHS
    areas = np.rint(boxes[:, 2] * boxes[:, 3] * HUNDREDTHS) / HUNDREDTHS
    rows = zip(
        (image_of_boxes(images.starts) + first_image).tolist(),
        boxes.tolist(),
        areas.tolist(),
        (images.labels + 1).tolist(),
        images.scores.tolist(),
        format_probabilities(images.probs, first_id=1),
        images.kinds.tolist(),
        images.ignored.astype(int).tolist(),
        strict=True,
    )
    lines = []
    for number, row in enumerate(rows, first_box):
        image, (left, top, width, height), area, label, score, probs, kind, crowd = row
        lines.append(
            f'{{"id":{number},"image_id":{image},"category_id":{label},'
            f'"bbox":[{left},{top},{width},{height}],'
            f'"area":{area},"iscrowd":{crowd},"segmentation":[],'
            f'"score":{score:.4f},"kind":"{kind}","probs":{probs}}}'
        )
    return lines


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

    def write(self, split: str, images: LabelledImages) -> None:
        folder = f"{self.folder}/labels/{split}"
        for record in _object_records(images, self.names):
            text = yolo_text(record, self.names)
            with open(f"{folder}/{strip_suffix(record.file)}.txt", "wb") as stream:
                stream.write(text.encode())
        self.details.write(split, images)

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

    def write(self, split: str, images: LabelledImages) -> None:
        for record in _object_records(images, self.names):
            stem = strip_suffix(record.file)
            with open(f"{self.folder}/Annotations/{stem}.xml", "wb") as stream:
                stream.write(voc_xml(record))
            self.lists[split].write(f"{stem}\n")
        self.details.write(split, images)

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

    def write(self, split: str, images: LabelledImages) -> None:
        rows = zip(
            (images.edges / HUNDREDTHS).tolist(),
            images.labels.tolist(),
            images.scores.tolist(),
            format_probabilities(images.probs, first_id=0),
            images.kinds.tolist(),
            images.ignored.tolist(),
            strict=True,
        )
        objects = [
            f'{{"xyxy":{xyxy},"class":{label},"score":{score:.4f},"kind":"{kind}",'
            f'"ignored":{"true" if ignored else "false"},"probs":{probs}}}'
            for xyxy, label, score, probs, kind, ignored in rows
        ]
        starts = images.starts.tolist()
        for number, file in enumerate(images.files):
            listed = ",".join(objects[starts[number] : starts[number + 1]])
            image_id = json.dumps(images.image_ids[number])
            self.file.write(
                f'{{"file":{json.dumps(file)},"split":"{split}","id":{image_id},'
                f'"labels":[{listed}]}}\n'
            )

    def close(self) -> None:
        self.file.close()


def format_probabilities(probs: Floats, first_id: int) -> list[str]:
    """Return a JSON object for each row [N, K+1]: the probability of each class from
    ``PROBABILITY_MIN`` on, by its id; the rest is background.
    """
    is_written = probs[:, :-1] >= PROBABILITY_MIN
    rows, columns = np.nonzero(is_written)
    keys = [f'"{number + first_id}":' for number in range(probs.shape[1] - 1)]
    entries = [
        f"{keys[column]}{value:.3f}"
        for column, value in zip(
            columns.tolist(), probs[rows, columns].tolist(), strict=True
        )
    ]
    ends = np.cumsum(is_written.sum(1)).tolist()
    texts, start = [], 0
    for end in ends:
        texts.append(f"{{{','.join(entries[start:end])}}}")
        start = end
    return texts


def _object_records(
    images: LabelledImages, names: Sequence[str]
) -> Iterator[ImageRecord]:
    """Yield each image with the boxes that are objects."""
    is_object = ~images.ignored
    starts = starts_of(count_boxes(images.starts, is_object)).tolist()
    boxes = images.edges[is_object] / HUNDREDTHS
    labels = [names[label] for label in images.labels[is_object].tolist()]
    difficult = np.zeros(len(labels), np.bool_)
    for number, (width, height) in enumerate(images.sizes.tolist()):
        rows = slice(starts[number], starts[number + 1])
        file, object_labels = images.files[number], tuple(labels[rows])
        yield ImageRecord(
            file, file, width, height, boxes[rows], object_labels, difficult[rows]
        )


class LabelDigest:
    """A digest of which boxes each image has, whatever the order of both."""

    def __init__(self) -> None:
        self.images = self.boxes = self.digest = 0

    def add(
        self,
        files: Sequence[str],
        starts: Integers,
        edges: Integers,
        labels: Integers,
        difficult: NDArray[np.bool_],
    ) -> None:
        """Add images: their ``files``; the boxes of image i are the rows ``starts[i]``
        up to ``starts[i + 1]`` of ``edges`` [M, 4] in hundredths, ``labels`` and
        ``difficult`` [M].
        """
        columns = (edges, labels[:, None], difficult[:, None])
        rows = np.concatenate(columns, axis=1).astype(np.int64)
        order = np.lexsort((*rows.T, image_of_boxes(starts)))
        sorted_bytes = memoryview(rows[order].tobytes())
        row_bytes = rows.itemsize * rows.shape[1]
        ends = (starts * row_bytes).tolist()
        for number, file in enumerate(files):
            digest = hashlib.blake2b(file.encode(), digest_size=16)
            digest.update(sorted_bytes[ends[number] : ends[number + 1]])
            self.digest += int.from_bytes(digest.digest())
        self.digest %= 1 << 128
        self.images += len(files)
        self.boxes += len(labels)

    def add_dataset(self, dataset: Dataset, names: Sequence[str]) -> None:
        """Add the annotated images of a data set that was read. Raises InputError for
        one without annotations.
        """
        label_by_name = {name: label for label, name in enumerate(names)}
        for first in range(0, len(dataset.records), RECORDS_AT_ONCE):
            records = dataset.records[first : first + RECORDS_AT_ONCE]
            self._add_records(records, label_by_name)

    def _add_records(
        self, records: Sequence[ImageRecord], label_by_name: Mapping[str, int]
    ) -> None:
        for record in records:
            if not record.annotated:
                raise InputError(f"{record.uri} reads back as not annotated")
        boxes = np.concatenate([record.boxes for record in records])
        box_labels = chain.from_iterable(record.labels for record in records)
        labels = [label_by_name[name] for name in box_labels]
        self.add(
            [record.file for record in records],
            starts_of(np.array([len(record.labels) for record in records])),
            np.rint(boxes * HUNDREDTHS).astype(np.int64),
            np.array(labels, np.int64),
            np.concatenate([record.difficult for record in records]),
        )

    def state(self) -> Mapping[str, int]:
        """Return the number of images, of boxes, and the digest."""
        return {"images": self.images, "boxes": self.boxes, "digest": self.digest}
