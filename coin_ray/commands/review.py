"""``coin-ray review out|back``: labels of a run to a review tool and back."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from coin_ray import storage
from coin_ray.errors import InputError, StepError

if TYPE_CHECKING:
    from coin_ray.data.review.reviews import Review

DESCRIPTION = """\
Send the labels of a run to a review tool, those with the highest teacher disagreement
first, and read them back as a data set. Corrections outrank every teacher: coin-ray
adapt --corrections.

    coin-ray review out label-studio|cvat|fiftyone --root ROOT --out FOLDER [--most N]
    coin-ray review back EXPORT --out FOLDER [--format coco]
"""
TOOLS = ("label-studio", "cvat", "fiftyone")


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
    """Write the reviewed images of an export as a data set; return what was written."""
    from coin_ray.data.formats import write_dataset
    from coin_ray.data.review.corrections import read_reviews

    records = [
        review.image_record()
        for review in read_reviews(options.export)
        if review.reviewed
    ]
    if not records:
        raise InputError(
            f"{options.export}: no image in it is marked as reviewed (docs/own-data.md"
            " says how)"
        )
    write_dataset(records, options.out, options.format)
    return f"{len(records)} reviewed images: {storage.absolute_uri(options.out)}"
