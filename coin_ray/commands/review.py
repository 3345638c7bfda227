"""Labels of a run to people and back: ``pipelines/review.py``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import pyarrow.compute as pc

from coin_ray import storage
from coin_ray.commands.arguments import reported
from coin_ray.config.files import from_yaml
from coin_ray.data.formats import IMAGE_FOLDERS, write
from coin_ray.data.review import corrections, cvat, fiftyone, label_studio
from coin_ray.data.review.record import Review, reviews
from coin_ray.errors import InputError, StepError
from coin_ray.runs.graph import graph

TOOLS = ("label-studio", "cvat", "fiftyone")


def main(arguments: Sequence[str], description: str) -> int:
    """The command; returns its exit code."""
    given = _parser(description).parse_args(arguments)
    return reported(
        lambda: print(_out(given) if given.command == "out" else _back(given))
    )


def _parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="review.py",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    out = commands.add_parser("out", help="write what a review tool imports")
    out.add_argument("tool", choices=TOOLS)
    out.add_argument(
        "--root",
        required=True,
        help="folder or URI of a run whose step separate is finished",
    )
    out.add_argument(
        "--most", type=int, metavar="N", help="only the N images in most dispute"
    )
    out.add_argument(
        "--url",
        default="{uri}",
        help="label-studio: where it finds an image, from its {uri} (default: the URI)",
    )
    back = commands.add_parser(
        "back",
        help="write the reviewed images as a data set, for example to measure on",
    )
    back.add_argument("export", help="what the tool exported")
    back.add_argument("--format", default="coco", choices=sorted(IMAGE_FOLDERS))
    for command in (out, back):
        command.add_argument("--out", required=True, metavar="FOLDER")
    return parser


def _out(given: argparse.Namespace) -> str:
    root, folder = storage.absolute(given.root), storage.absolute(given.out)
    chosen, total, classes = _disputed(root, given.most)
    if given.tool == "label-studio":
        label_studio.write(chosen, folder, classes, given.url)
    elif given.tool == "cvat":
        cvat.write(chosen, folder, classes)
    else:
        fiftyone.write(chosen, folder)
    return (
        f"{len(chosen)} of {total} training images, those in most dispute first:"
        f" {folder}"
    )


def _disputed(root: str, most: int | None) -> tuple[list[Review], int, tuple[str, ...]]:
    """Images of the run's step separate, those in most dispute first; how many there
    are in all; and its classes.
    """
    config = from_yaml(storage.join(root, "config.yaml"))
    steps = graph(config)
    if steps["separate"].manifest(root) is None:
        raise StepError(
            f"a review needs the finished step separate below {root}: run"
            f" pipelines/separate.py --config {root}/config.yaml first"
        )
    images = storage.read_table(
        storage.join(steps["images"].folder(root), "images.parquet")
    )
    if "corrections" in steps:
        done = storage.read_table(
            storage.join(steps["corrections"].folder(root), "corrections.parquet")
        )["image_id"]
        images = images.filter(pc.invert(pc.is_in(images["image_id"], value_set=done)))
    separation = storage.join(steps["separate"].folder(root), "separation.parquet")
    return *reviews(images, separation, config.classes, most), config.classes


def _back(given: argparse.Namespace) -> str:
    found = [
        review.record() for review in corrections.read(given.export) if review.reviewed
    ]
    if not found:
        raise InputError(
            f"{given.export}: no image in it is marked as reviewed (docs/own-data.md"
            " says how)"
        )
    write(found, given.out, given.format)
    return f"{len(found)} reviewed images: {storage.absolute(given.out)}"
