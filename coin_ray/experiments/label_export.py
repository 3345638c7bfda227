"""Write the labels of a finished run as a data set for other trainers."""

from __future__ import annotations

import csv
import hashlib
import os
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from coin_ray import storage
from coin_ray.config import PipelineConfig
from coin_ray.data.formats import read_dataset
from coin_ray.data.formats.folder import strip_suffix
from coin_ray.data.formats.ragged import Integers, count_boxes, starts_of
from coin_ray.data.formats.streamed import (
    DETAILS_FILE,
    HUNDREDTHS,
    WRITERS,
    LabelDigest,
    LabelledImages,
    LabelWriter,
)
from coin_ray.data.threads import map_in_threads
from coin_ray.errors import ConfigError, InputError
from coin_ray.evaluation.operating import best_f1
from coin_ray.evaluation.voc import match_detections
from coin_ray.experiments.image_rows import RowsById
from coin_ray.experiments.label_sources import (
    FinishedRun,
    ScoredLabels,
    undisputed_detections,
)
from coin_ray.stages.common.image_tables import open_annotations

TRAIN, VAL = "train", "val"
DEFAULT_SCORE_MIN = {"fused": 0.35, "student": 0.6, "cloud": 0.55, "consistent": 0.6}
"""Thresholds with the best F1 on the demo's training images (docs/labels-out.md)."""
IGNORED_SHARE = 0.5
"""Boxes from this share of the threshold on are ignored regions."""
MIN_TRUTH_BOXES = 10
"""Labelled boxes of a class from which on its threshold is chosen by them."""
LEFT_OUT_FILE = "left_out.csv"
README_FILE = "README.md"
UNANSWERED = "the run has no answer for it"
UNSURE = "nobody is sure: no box reaches its threshold, some reach half of it"
ID_DIGITS = 12
PLAIN_STEM = re.compile(r"[A-Za-z0-9_\-.]+")
"""Names that need no other look, for speed."""


@dataclass(frozen=True)
class ExportSettings:
    """``score_min`` None: chosen by class; ``val_share``: share of the images for
    validation.
    """

    source: str
    format: str
    folder: str
    score_min: float | None = None
    val_share: float = 0.1
    copy_images: bool = False


@dataclass(frozen=True)
class Thresholds:
    """A threshold for each class, and how each was chosen."""

    values: tuple[float, ...]
    reasons: tuple[str, ...]


@dataclass
class ExportCounts:
    """What was written: ``images`` and ``reviewed`` images by split, boxes by
    ``classes``, ``ignored`` boxes, and images ``left_out`` by reason. ``thin``: boxes
    without area inside their image, which are left out.
    """

    images: Counter[str] = field(default_factory=Counter)
    classes: Counter[int] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)
    empty: int = 0
    reviewed: int = 0
    ignored: int = 0
    thin: int = 0


def export_labels(
    root: str,
    config: PipelineConfig,
    settings: ExportSettings,
    tell: Callable[[str], object] = print,
) -> ExportCounts:
    """Write the labels of the run's training images to the folder and read it back.

    The folder appears under its name once it reads back to the same boxes. Raises
    ConfigError for impossible settings, StepError for a step that is not finished, and
    InputError if nothing can be written or something else reads back.
    """
    target = _check_settings(settings)
    run = FinishedRun(root, config, settings.source)
    thresholds = choose_thresholds(run, settings.score_min)
    for line in _describe_thresholds(config.classes, thresholds):
        tell(line)
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f"{target.name}-", dir=target.parent))
    try:
        counts = _write(run, settings, thresholds, unfinished)
        _write_readme(unfinished / README_FILE, run, settings, thresholds, counts)
        unfinished.chmod(0o755)
        unfinished.rename(target)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return counts


def _check_settings(settings: ExportSettings) -> Path:
    """Return the local folder to write to."""
    uri = storage.absolute_uri(settings.folder)
    if "://" in uri:
        raise ConfigError(f"--out must be a local folder, got {settings.folder}")
    target = Path(uri)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{target} is not empty: give --out a new or empty folder")
    if settings.score_min is not None and not 0 <= settings.score_min <= 1:
        raise ConfigError(
            f"--score-min must be auto or from 0 to 1, got {settings.score_min}"
        )
    if not 0 <= settings.val_share < 1:
        raise ConfigError(f"--val must be from 0 to below 1, got {settings.val_share}")
    if settings.format == "yolo" and settings.val_share == 0:
        raise ConfigError(
            "--val 0 leaves YOLO without the split val, which Ultralytics requires"
        )
    return target


def choose_thresholds(run: FinishedRun, score_min: float | None) -> Thresholds:
    """Return the given threshold for every class; without one the score with the best
    F1 on labelled validation images that the source has labels for, else one number.
    """
    classes = run.config.classes
    if score_min is not None:
        return Thresholds((score_min,) * len(classes), ("given",) * len(classes))
    default = DEFAULT_SCORE_MIN[run.source]
    images = run.images(VAL)
    truth = open_annotations(run.folder("images")).select(images["image_id"])
    predictions = {}
    if truth and run.source != "consistent":
        for labels in run.labels(VAL):
            for position, image_id in enumerate(labels.image_ids):
                if image_id in truth:
                    image = labels.select(np.array([position]))
                    predictions[image_id] = undisputed_detections(image)
    truth = {image_id: truth[image_id] for image_id in predictions}
    if not truth:
        reason = "the default: no labelled validation image has such labels"
        return Thresholds((default,) * len(classes), (reason,) * len(classes))
    values, reasons = [], []
    for matched in match_detections(predictions, truth, len(classes)):
        required = int(matched.required.sum())
        point = best_f1([matched])
        if point is None or required < MIN_TRUTH_BOXES:
            values.append(default)
            reasons.append(f"the default: {required} labelled validation boxes")
        else:
            values.append(point.score)
            reasons.append(
                f"best F1 {point.f1:.2f} on {required} boxes of {len(truth)}"
                " labelled validation images"
            )
    return Thresholds(tuple(values), tuple(reasons))


def _describe_thresholds(
    classes: Sequence[str], thresholds: Thresholds
) -> Iterator[str]:
    """Yield a line for each class, or one for all if they are the same."""
    choices = list(zip(thresholds.values, thresholds.reasons, strict=True))
    names = ["all classes"] if len(set(choices)) == 1 else classes
    for name, (value, reason) in zip(names, choices, strict=False):
        yield f"{name}: score at least {value:.3f} ({reason})"


class _ImageIndex:
    """The run's training images by id: their size, URI and name in the data set."""

    def __init__(self, images: pa.Table) -> None:
        self.ids = images["image_id"]
        self.rows = RowsById(self.ids)
        self.seen = np.zeros(len(images), np.bool_)
        sides = (images[side].to_numpy() for side in ("width", "height"))
        self.sizes = np.stack(list(sides), axis=1).astype(np.int64)
        self.uris = images["uri"].combine_chunks()
        names = pc.replace_substring_regex(self.uris, "^.*/", "")
        stems = pc.utf8_lower(pc.replace_substring_regex(names, r"\.[^.]*$", ""))
        counts = pc.value_counts(stems)
        repeated = counts.field("values").filter(pc.greater(counts.field("counts"), 1))
        self.repeated_stems = frozenset(repeated.to_pylist())

    def take_unseen(self, image_ids: Sequence[str]) -> tuple[Integers, Integers]:
        """Return the positions of training images that were not taken before, and
        their rows.
        """
        rows = self.rows.find(image_ids)
        positions = np.sort(np.unique(rows, return_index=True)[1])
        is_new = (rows[positions] >= 0) & ~self.seen[rows[positions]]
        positions = positions[is_new]
        self.seen[rows[positions]] = True
        return positions, rows[positions]

    def list_uris(self, rows: Integers) -> list[str]:
        """Return the URIs of the images in these rows."""
        uris: list[str] = self.uris.take(pa.array(rows)).to_pylist()
        return uris

    def list_unseen(self) -> Iterator[tuple[str, str]]:
        """Yield id and URI of each image that was not taken."""
        for row in np.flatnonzero(~self.seen).tolist():
            image_id = self.ids[row].as_py()
            if self.rows.find([image_id])[0] == row:
                yield image_id, self.uris[row].as_py()

    def file_name(self, uri: str, image_id: str) -> str:
        """Return the file name of the image; with its id if several share the name."""
        name = uri.rpartition("/")[2]
        stem = strip_suffix(name)
        suffix = name[len(stem) :]
        if stem.lower() in self.repeated_stems or not _is_plain_name(name):
            return f"{_plain_stem(stem)}-{image_id[:ID_DIGITS]}{suffix}"
        return name


def _is_plain_name(name: str) -> bool:
    """Tell whether all formats and their readers take the name as it stands."""
    stem = strip_suffix(name)
    return PLAIN_STEM.fullmatch(stem) is not None or stem == _plain_stem(stem)


def _plain_stem(stem: str) -> str:
    kept = [c if c.isalnum() or c in "-_. ()+,@=" else "_" for c in stem.strip()]
    return "".join(kept) or "image"


def _write(
    run: FinishedRun, settings: ExportSettings, thresholds: Thresholds, folder: Path
) -> ExportCounts:
    """Write all images and check that the folder reads back to the same boxes."""
    splits = [TRAIN, VAL] if settings.val_share else [TRAIN]
    writer = WRITERS[settings.format](folder, splits, run.config.classes)
    index, counts = _ImageIndex(run.images(TRAIN)), ExportCounts()
    digests = {split: LabelDigest() for split in splits}
    for split in splits:
        writer.image_path(split, "image").parent.mkdir(parents=True, exist_ok=True)
    with (folder / LEFT_OUT_FILE).open("w", newline="", encoding="utf-8") as stream:
        left_out = csv.writer(stream)
        left_out.writerow(["image_id", "uri", "reason"])
        for rows, scored in _iterate_once(run, index):
            uris = index.list_uris(rows)
            images = _apply_thresholds(
                scored, index.sizes[rows], index, uris, thresholds, counts
            )
            is_sure = _is_sure(images)
            for position in np.flatnonzero(~is_sure).tolist():
                counts.left_out[UNSURE] += 1
                left_out.writerow([images.image_ids[position], uris[position], UNSURE])
            for split, positions in _positions_by_split(images, is_sure, settings):
                chosen = images.select(positions)
                writer.write(split, chosen)
                _add_written(digests[split], chosen, writer)
                _count(counts, split, chosen, scored.reviewed)
                paths = [str(writer.image_path(split, file)) for file in chosen.files]
                sources = [uris[position] for position in positions.tolist()]
                _place_images(sources, paths, settings.copy_images)
        for image_id, uri in index.list_unseen():
            counts.left_out[UNANSWERED] += 1
            left_out.writerow([image_id, uri, UNANSWERED])
    writer.close()
    _check_splits(counts, splits, settings)
    _check_read_back(folder, digests, run.config.classes)
    return counts


def _iterate_once(
    run: FinishedRun, index: _ImageIndex
) -> Iterator[tuple[Integers, ScoredLabels]]:
    """Yield the labels of each training image with its row, in blocks; a person's, if
    there are any.
    """
    for labels in run.labels(TRAIN):
        if run.corrections:
            is_unreviewed = [name not in run.corrections for name in labels.image_ids]
            labels = labels.select(np.flatnonzero(is_unreviewed))
        positions, rows = index.take_unseen(labels.image_ids)
        yield rows, labels.select(positions)
    for labels in run.reviewed_labels():
        positions, rows = index.take_unseen(labels.image_ids)
        yield rows, labels.select(positions)


def _apply_thresholds(
    scored: ScoredLabels,
    sizes: Integers,
    index: _ImageIndex,
    uris: Sequence[str],
    thresholds: Thresholds,
    counts: ExportCounts,
) -> LabelledImages:
    """Return the images, whose ``sizes`` [N, 2] and ``uris`` these are, with the boxes
    from half their threshold on, cut at the border.
    """
    box_counts = np.diff(scored.starts)
    limits = np.repeat(np.tile(sizes, 2) * HUNDREDTHS, box_counts, axis=0)
    is_class = scored.labels < len(thresholds.values)
    limit = np.full(len(scored.labels), np.inf)
    limit[is_class] = np.array(thresholds.values)[scored.labels[is_class]]
    is_object = (scored.scores >= limit) & ~scored.disputed
    is_used = scored.scores >= limit * IGNORED_SHARE
    if scored.reviewed:
        is_object = is_used = is_class
    edges = np.rint(scored.boxes.astype(np.float64) * HUNDREDTHS)
    edges = np.minimum(np.maximum(edges, 0), limits).astype(np.int64)
    has_area = (edges[:, 2:] > edges[:, :2]).all(1)
    counts.thin += int((is_used & ~has_area).sum())
    is_used = is_used & has_area
    names = [
        index.file_name(uri, image_id)
        for uri, image_id in zip(uris, scored.image_ids, strict=True)
    ]
    return LabelledImages(
        scored.image_ids,
        names,
        sizes,
        starts_of(count_boxes(scored.starts, is_used)),
        edges[is_used],
        scored.labels[is_used],
        scored.scores[is_used],
        scored.probs[is_used],
        scored.kinds[is_used],
        ~is_object[is_used],
    )


def _is_sure(images: LabelledImages) -> NDArray[np.bool_]:
    """Return a mask of the images that have an object, or no box at all."""
    object_counts = count_boxes(images.starts, ~images.ignored)
    is_sure: NDArray[np.bool_] = (object_counts > 0) | (np.diff(images.starts) == 0)
    return is_sure


def _positions_by_split(
    images: LabelledImages, is_sure: NDArray[np.bool_], settings: ExportSettings
) -> list[tuple[str, Integers]]:
    """Return the splits that have images, and the positions of their images."""
    is_val = np.array(
        [_split_of(name, settings.val_share) == VAL for name in images.image_ids],
        np.bool_,
    )
    positions_by_split = [
        (TRAIN, np.flatnonzero(is_sure & ~is_val)),
        (VAL, np.flatnonzero(is_sure & is_val)),
    ]
    return [pair for pair in positions_by_split if len(pair[1])]


def _split_of(image_id: str, val_share: float) -> str:
    """Return the split of an image: the hash of its id decides, nothing else."""
    digest = hashlib.sha256(image_id.encode()).digest()
    is_val = int.from_bytes(digest[:8]) < val_share * (1 << 64)
    return VAL if is_val else TRAIN


def _add_written(
    digest: LabelDigest, images: LabelledImages, writer: LabelWriter
) -> None:
    rows = ~images.ignored
    if writer.holds_ignored:
        rows = np.ones(len(rows), np.bool_)
    digest.add(
        images.files,
        starts_of(count_boxes(images.starts, rows)),
        images.edges[rows],
        images.labels[rows],
        images.ignored[rows],
    )


def _count(
    counts: ExportCounts, split: str, images: LabelledImages, reviewed: bool
) -> None:
    is_object = ~images.ignored
    counts.images[split] += len(images.files)
    counts.classes.update(images.labels[is_object].tolist())
    counts.empty += int((count_boxes(images.starts, is_object) == 0).sum())
    counts.reviewed += len(images.files) if reviewed else 0
    counts.ignored += int(images.ignored.sum())


def _place_images(uris: Sequence[str], paths: Sequence[str], copy: bool) -> None:
    """Copy or link images to new paths; copies several at once."""
    if copy:
        map_in_threads(_copy_image, zip(uris, paths, strict=True))
        return
    for uri, path in zip(uris, paths, strict=True):
        _link_image(uri, path)


def _copy_image(uri_and_path: tuple[str, str]) -> None:
    uri, path = uri_and_path
    Path(path).write_bytes(storage.read_bytes(uri))


def _link_image(uri: str, path: str) -> None:
    """Link an image: hard where the disk is the same, since supervision refuses
    symbolic links to other folders.
    """
    if "://" in uri:
        raise ConfigError(f"{uri} can't be linked: give --copy-images")
    source = os.path.realpath(uri) if os.path.islink(uri) else uri
    try:
        os.link(source, path)
    except OSError:
        os.symlink(os.path.realpath(source), path)


def _check_splits(
    counts: ExportCounts, splits: Sequence[str], settings: ExportSettings
) -> None:
    total = sum(counts.images.values())
    if not total:
        reasons = _join_counts(counts.left_out)
        raise InputError(f"no image can be labelled; left out: {reasons or 'none'}")
    for split in splits:
        if not counts.images[split]:
            raise InputError(
                f"none of {total} images is in the split {split} with --val"
                f" {settings.val_share}: give another share"
            )


def _check_read_back(
    folder: Path, digests: Mapping[str, LabelDigest], classes: Sequence[str]
) -> None:
    """Raise InputError if the folder reads back to other images or boxes."""
    for split, written in digests.items():
        dataset = read_dataset(f"{folder}#{split}")
        read = LabelDigest()
        read.add_dataset(dataset, classes)
        if dataset.missing or read.state() != written.state():
            raise InputError(
                f"the split {split} reads back to {read.images} images and"
                f" {read.boxes} boxes, written were {written.images} and"
                f" {written.boxes}; missing: {list(dataset.missing[:3])}. Please report"
                " this with the names of your images"
            )


def _join_counts(counts: Mapping[str, int]) -> str:
    return "; ".join(f"{count} images: {reason}" for reason, count in counts.items())


def describe_counts(counts: ExportCounts) -> str:
    """Return one line for people."""
    images = ", ".join(f"{counts.images[split]} {split}" for split in counts.images)
    parts = [
        f"{images} images, {counts.empty} of them without objects",
        f"{counts.classes.total()} boxes, {counts.ignored} ignored regions",
    ]
    if counts.reviewed:
        parts.append(f"{counts.reviewed} images reviewed by a person")
    if counts.thin:
        parts.append(f"{counts.thin} boxes without area left out")
    if counts.left_out:
        parts.append(f"left out: {_join_counts(counts.left_out)} ({LEFT_OUT_FILE})")
    return "; ".join(parts)


def _write_readme(
    path: Path,
    run: FinishedRun,
    settings: ExportSettings,
    thresholds: Thresholds,
    counts: ExportCounts,
) -> None:
    scores = (
        "Each COCO annotation has `score`, `kind` and `probs` (probability by category"
        " id, the rest is background). Ignored regions are annotations with `iscrowd` 1."
        if settings.format == "coco"
        else f"`{DETAILS_FILE}` has one line an image: every box with score, kind and"
        " probabilities by class (the rest is background), and the ignored regions,"
        " which the label files leave out."
    )
    rows = [
        f"| {number} | {name} | {value:.4f} | {reason} | {counts.classes[number]} |"
        for number, (name, value, reason) in enumerate(
            zip(run.config.classes, thresholds.values, thresholds.reasons, strict=True)
        )
    ]
    first_id = 1 if settings.format == "coco" else 0
    lines = [
        f"# Labels of {settings.source}",
        "",
        "Made by a machine: `coin-ray labels export`, coin-ray"
        f" {version('coin-ray')}. Nobody has checked them, except reviewed images.",
        "",
        f"- Run: `{run.root}`, seed {run.config.seed}, steps"
        f" {', '.join(run.fingerprints())}",
        f"- Format: {settings.format}; class ids begin at {first_id}",
        f"- {describe_counts(counts)}",
        f"- Split val: a share of {settings.val_share} of the images, by the SHA-256 of"
        " their ids. Its labels are of the same kind: it is no ground truth.",
        f"- Images are {'copies' if settings.copy_images else 'links to the originals'}.",
        f"- {scores}",
        "- Boxes from half the threshold up to it are ignored regions: neither object"
        " nor background. So are boxes on which the teachers disagree (consistent).",
        "",
        "| class | name | score at least | chosen by | boxes |",
        "|---|---|---|---|---|",
        *rows,
        "",
    ]
    path.write_text("\n".join(lines), encoding="utf-8")
