"""``coin-ray review out|back``: labels of a run to a review tool and back."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from coin_ray import storage
from coin_ray.errors import InputError, StepError

if TYPE_CHECKING:
    from coin_ray.data.formats import ImageRecord
    from coin_ray.data.review.reviews import Review

DESCRIPTION = """\
Send the labels of a run to a review tool, those with the highest teacher disagreement
first, and read them back as a data set. Corrections outrank every teacher: coin-ray
adapt --corrections.

    coin-ray review out label-studio|cvat|fiftyone --root ROOT --out FOLDER [--most N]
    coin-ray review back EXPORT --out FOLDER [--format coco] [--root ROOT]
"""
TOOLS = ("label-studio", "cvat", "fiftyone")
SPLITS = ("train", "val", "test")
"""Splits of a run whose reviewed images are read back; each is written as it is."""
SHA256_DIGITS = 64


def review(arguments: Sequence[str]) -> None:
    """Run one direction and print what was written."""
    options = build_review_parser().parse_args(arguments)
    direction: Callable[[argparse.Namespace], str] = options.direction
    print(direction(options))


def build_review_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    from coin_ray.data.formats import IMAGE_FOLDERS

    parser = argparse.ArgumentParser(
        prog="coin-ray review",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    directions = parser.add_subparsers(required=True, metavar="out|back")
    out = directions.add_parser("out", help="write what a review tool imports")
    out.add_argument("tool", choices=TOOLS)
    out.add_argument(
        "--root",
        required=True,
        help="folder or URI of a run whose step separate is finished",
    )
    out.add_argument(
        "--most",
        type=int,
        metavar="N",
        help="only the N images with the highest teacher disagreement",
    )
    out.add_argument(
        "--url",
        default="{uri}",
        help=(
            "label-studio: address of an image, made from its {uri} (default: the URI)"
        ),
    )
    out.set_defaults(direction=export_reviews)
    back = directions.add_parser(
        "back",
        help="write the reviewed images as a data set, for example to evaluate on",
    )
    back.add_argument("export", help="what the tool exported")
    back.add_argument("--format", default="coco", choices=sorted(IMAGE_FOLDERS))
    back.add_argument(
        "--root",
        help=(
            "the run that the images are of: its classes number the labels, and each"
            " image keeps its split; images of no run are written as train"
        ),
    )
    back.set_defaults(direction=import_reviews)
    for direction in (out, back):
        direction.add_argument("--out", required=True, metavar="FOLDER")
    return parser


def export_reviews(options: argparse.Namespace) -> str:
    """Write the files that a review tool imports; return what was written."""
    from coin_ray.data.review.cvat import write_cvat
    from coin_ray.data.review.fiftyone import write_fiftyone
    from coin_ray.data.review.label_studio import write_label_studio

    root = storage.absolute_uri(options.root)
    folder = storage.absolute_uri(options.out)
    reviews, image_count, classes = _select_reviews(root, options.most)
    if options.tool == "label-studio":
        write_label_studio(reviews, folder, classes, options.url)
    elif options.tool == "cvat":
        write_cvat(reviews, folder, classes)
    else:
        write_fiftyone(reviews, folder)
    return (
        f"{len(reviews)} of {image_count} training images, those with the highest"
        f" teacher disagreement first: {folder}"
    )


def _select_reviews(
    root: str, most: int | None
) -> tuple[list[Review], int, tuple[str, ...]]:
    """Return the images of the run's step separate, those with the highest teacher
    disagreement first; how many there are in all; and the run's classes.
    """
    import pyarrow.compute as pc

    from coin_ray.config.yaml_files import read_config
    from coin_ray.data.review.reviews import reviews_by_disagreement
    from coin_ray.runs.graph import build_steps

    config = read_config(storage.join(root, "config.yaml"))
    steps = build_steps(config)
    if not steps["separate"].is_finished(root):
        raise StepError(
            f"a review needs the finished step separate below {root}: run"
            f" coin-ray separate --config {root}/config.yaml first"
        )
    images = storage.read_table(
        storage.join(steps["images"].folder(root), "images.parquet")
    )
    if "corrections" in steps:
        corrections = storage.read_table(
            storage.join(steps["corrections"].folder(root), "corrections.parquet")
        )
        reviewed = pc.is_in(images["image_id"], value_set=corrections["image_id"])
        images = images.filter(pc.invert(reviewed))
    separation = storage.join(steps["separate"].folder(root), "separation.parquet")
    reviews, image_count = reviews_by_disagreement(
        images, separation, config.classes, most
    )
    return reviews, image_count, config.classes


def import_reviews(options: argparse.Namespace) -> str:
    """Write the reviewed images of an export as a data set; return what was written.

    They pass the checks that ``--corrections`` makes: with ``--root`` against the run,
    else against the image files.
    """
    from coin_ray.data.formats import write_dataset
    from coin_ray.data.review.corrections import correction_rows, read_reviews
    from coin_ray.stages.corrections import class_indexes

    reviews = [review for review in read_reviews(options.export) if review.reviewed]
    if options.root:
        images, classes = _run_images(storage.absolute_uri(options.root))
        indexes = class_indexes(reviews, classes)
    else:
        images = _images_of_files(reviews)
        labels = {box.label for review in reviews for box in review.boxes}
        classes = tuple(sorted(labels))
        indexes = {name: index for index, name in enumerate(classes)}
    rows = correction_rows(reviews, images, indexes, options.export, splits=SPLITS)
    review_by_id = {review.image_id: review for review in reviews}
    records_by_split: dict[str, list[ImageRecord]] = {}
    used_names: set[str] = set()
    for row in rows:
        record = _record(review_by_id[row["image_id"]], row, classes)
        split = images[row["image_id"]]["split"]
        records_by_split.setdefault(split, []).append(record)
        used_names.update(record.labels)
    names = (
        classes if options.root else [name for name in classes if name in used_names]
    )
    for split, records in records_by_split.items():
        write_dataset(records, options.out, options.format, split, names)
    counts = [f"{len(part)} {split}" for split, part in records_by_split.items()]
    written = f"{len(rows)} reviewed images ({', '.join(counts)})"
    return f"{written}: {storage.absolute_uri(options.out)}"


def _run_images(root: str) -> tuple[dict[str, dict[str, Any]], tuple[str, ...]]:
    """Return the images of the run by id, and its classes."""
    from coin_ray.config.yaml_files import read_config
    from coin_ray.runs.graph import build_steps

    config = read_config(storage.join(root, "config.yaml"))
    step = build_steps(config)["images"]
    if not step.is_finished(root):
        raise StepError(
            f"the step images below {root} is not finished: without --root the labels"
            " are checked against the image files"
        )
    table = storage.read_table(storage.join(step.folder(root), "images.parquet"))
    # of several rows of an image the first counts, as in the step corrections
    return {row["image_id"]: row for row in reversed(table.to_pylist())}, config.classes


def _images_of_files(reviews: Sequence[Review]) -> dict[str, dict[str, Any]]:
    """Return rows with the sizes of the image files, by id. Raises InputError for a
    file that is missing, no image, or not the one that was reviewed.
    """
    from coin_ray.data.threads import map_in_threads

    usable = [review for review in reviews if review.image_id and not review.problems]
    return dict(map_in_threads(_image_of_file, usable))


def _image_of_file(review: Review) -> tuple[str, dict[str, Any]]:
    from coin_ray.data.formats.parsing import image_size

    if not review.uri or not storage.exists(review.uri):
        raise InputError(f"{review.name}: there is no image {review.uri or 'URI'} now")
    is_digest = len(review.image_id) == SHA256_DIGITS
    if is_digest and storage.sha256(review.uri) != review.image_id:
        raise InputError(
            f"{review.name}: the file {review.uri} is no longer the one that was"
            " reviewed: expected the bytes that coin-ray review out sent"
        )
    width, height = image_size(review.uri)
    if min(width, height) < 1:
        raise InputError(f"{review.name}: {review.uri} is no image that can be read")
    return review.image_id, {"width": width, "height": height, "split": "train"}


def _record(review: Review, row: dict[str, Any], classes: Sequence[str]) -> ImageRecord:
    """Return the image with its checked boxes and the run's names of the classes."""
    from coin_ray.data.formats import Annotation, ImageRecord

    objects = zip(row["boxes"], row["labels"], strict=True)
    annotations = [Annotation(box, classes[label]) for box, label in objects]
    size = review.width, review.height
    return ImageRecord.from_annotations(review.name, review.uri, size, annotations)
