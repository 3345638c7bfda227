"""Write the labels of a finished run as a data set for other trainers."""

from __future__ import annotations

import csv
import hashlib
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from coin_ray import storage
from coin_ray.config import PipelineConfig
from coin_ray.data.formats import read_dataset
from coin_ray.data.formats.folder import strip_suffix
from coin_ray.data.formats.streamed import (
    DETAILS_FILE,
    HUNDREDTHS,
    WRITERS,
    ImageLabels,
    LabelDigest,
    LabelWriter,
)
from coin_ray.data.threads import map_in_threads
from coin_ray.errors import ConfigError, InputError
from coin_ray.evaluation.operating import best_f1
from coin_ray.evaluation.voc import match_detections
from coin_ray.experiments.label_sources import FinishedRun, ScoredLabels, to_detections
from coin_ray.stages.common.image_tables import open_annotations

TRAIN, VAL = "train", "val"
DEFAULT_SCORE_MIN = {"fused": 0.35, "student": 0.6, "cloud": 0.55, "consistent": 0.6}
"""Thresholds with the best F1 on the demo's training images (docs/labels-out.md)."""
IGNORED_SHARE = 0.5
"""Boxes from this share of the threshold on are ignored regions."""
MIN_TRUTH_BOXES = 10
"""Labelled boxes of a class from which on its threshold is chosen by them."""
PLACED_AT_ONCE = 256
"""Images that are copied or linked together."""
LEFT_OUT_FILE = "left_out.csv"
README_FILE = "README.md"
UNANSWERED = "the run has no answer for it"
UNSURE = "nobody is sure: no box reaches its threshold, some reach half of it"
ID_DIGITS = 12


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
            if labels.image_id in truth:
                predictions[labels.image_id] = to_detections(labels)
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
        self.table = images
        ids = images["image_id"].to_pylist()
        # of several rows of an image the first counts
        self.row_of_id = dict(
            zip(reversed(ids), reversed(range(len(ids))), strict=True)
        )
        self.seen = np.zeros(len(ids), np.bool_)
        self.widths = images["width"].to_numpy()
        self.heights = images["height"].to_numpy()
        self.uris = images["uri"]
        names = pc.replace_substring_regex(self.uris, "^.*/", "")
        stems = pc.utf8_lower(pc.replace_substring_regex(names, r"\.[^.]*$", ""))
        counts = pc.value_counts(stems)
        repeated = counts.field("values").filter(pc.greater(counts.field("counts"), 1))
        self.repeated_stems = frozenset(repeated.to_pylist())

    def uri(self, row: int) -> str:
        return str(self.uris[row].as_py())

    def file(self, row: int, image_id: str) -> str:
        """Return the file name of the image; with its id if several share the name."""
        name = self.uri(row).rpartition("/")[2]
        stem, suffix = strip_suffix(name), name[len(strip_suffix(name)) :]
        if stem.lower() in self.repeated_stems or not _is_plain_name(name):
            return f"{_plain_stem(stem)}-{image_id[:ID_DIGITS]}{suffix}"
        return name


def _is_plain_name(name: str) -> bool:
    """Tell whether all formats and their readers take the name as it stands."""
    return name == f"{_plain_stem(strip_suffix(name))}{name[len(strip_suffix(name)) :]}"


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
    placed: list[tuple[str, Path]] = []
    for split in splits:
        writer.image_path(split, "image").parent.mkdir(parents=True, exist_ok=True)
    with (folder / LEFT_OUT_FILE).open("w", newline="", encoding="utf-8") as stream:
        left_out = csv.writer(stream)
        left_out.writerow(["image_id", "uri", "reason"])
        for row, scored in _iterate_once(run, index):
            labels = _apply_thresholds(row, scored, index, thresholds, counts)
            if labels is None:
                counts.left_out[UNSURE] += 1
                left_out.writerow([scored.image_id, index.uri(row), UNSURE])
                continue
            split = _split_of(scored.image_id, settings.val_share)
            writer.write(split, labels)
            _add_written(digests[split], labels, writer)
            _count(counts, split, labels, scored)
            path = writer.image_path(split, labels.file)
            placed.append((index.uri(row), path))
            if len(placed) >= PLACED_AT_ONCE:
                _place_images(placed, settings.copy_images)
        for row in np.flatnonzero(~index.seen).tolist():
            image_id = index.table["image_id"][row].as_py()
            if index.row_of_id[image_id] == row:
                counts.left_out[UNANSWERED] += 1
                left_out.writerow([image_id, index.uri(row), UNANSWERED])
    writer.close()
    _place_images(placed, settings.copy_images)
    _check_splits(counts, splits, settings)
    _check_read_back(folder, digests, run.config.classes)
    return counts


def _iterate_once(
    run: FinishedRun, index: _ImageIndex
) -> Iterator[tuple[int, ScoredLabels]]:
    """Yield the labels of each training image with its row; a person's, if there are
    any.
    """
    unreviewed = (
        labels for labels in run.labels(TRAIN) if labels.image_id not in run.corrections
    )
    for labels in chain(unreviewed, run.reviewed_labels()):
        row = index.row_of_id.get(labels.image_id)
        if row is not None and not index.seen[row]:
            index.seen[row] = True
            yield row, labels


def _apply_thresholds(
    row: int,
    scored: ScoredLabels,
    index: _ImageIndex,
    thresholds: Thresholds,
    counts: ExportCounts,
) -> ImageLabels | None:
    """Return the labels of an image, boxes cut at its border; None if there is no
    object but a box of which nobody is sure.
    """
    width, height = int(index.widths[row]), int(index.heights[row])
    limits = np.array([width, height, width, height]) * HUNDREDTHS
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
    rows = np.flatnonzero(is_used)
    ignored = ~is_object[rows]
    if len(rows) and ignored.all():
        return None
    return ImageLabels(
        scored.image_id,
        index.file(row, scored.image_id),
        width,
        height,
        edges[rows],
        scored.labels[rows],
        scored.scores[rows],
        scored.probs[rows],
        [scored.kinds[row] for row in rows.tolist()],
        ignored,
    )


def _split_of(image_id: str, val_share: float) -> str:
    """Return the split of an image: the hash of its id decides, nothing else."""
    digest = hashlib.sha256(image_id.encode()).digest()
    is_val = int.from_bytes(digest[:8]) < val_share * (1 << 64)
    return VAL if is_val else TRAIN


def _add_written(digest: LabelDigest, labels: ImageLabels, writer: LabelWriter) -> None:
    ignored = labels.ignored
    if writer.holds_ignored:
        digest.add(labels.file, labels.edges, labels.labels, ignored)
        return
    rows = ~ignored
    digest.add(labels.file, labels.edges[rows], labels.labels[rows], ignored[rows])


def _count(
    counts: ExportCounts, split: str, labels: ImageLabels, scored: ScoredLabels
) -> None:
    object_labels = labels.labels[~labels.ignored].tolist()
    counts.images[split] += 1
    counts.classes.update(object_labels)
    counts.empty += not object_labels
    counts.reviewed += scored.reviewed
    counts.ignored += int(labels.ignored.sum())


def _place_image(uri: str, path: Path, copy: bool) -> None:
    """Copy the image, or link it: hard where the disk is the same, since supervision
    refuses symbolic links to other folders.
    """
    if copy:
        path.write_bytes(storage.read_bytes(uri))
    elif "://" in uri:
        raise ConfigError(f"{uri} can't be linked: give --copy-images")
    else:
        source = os.path.realpath(uri)
        try:
            os.link(source, path)
        except OSError:
            os.symlink(source, path)


def _place_images(images: list[tuple[str, Path]], copy: bool) -> None:
    """Copy or link the images (URI and target), several at once."""
    map_in_threads(lambda image: _place_image(*image, copy), images)
    images.clear()


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
