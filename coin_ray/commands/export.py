"""``pipelines/export.py``: run what the student needs, then write the folder to take
home.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from coin_ray import storage
from coin_ray.commands.arguments import Options, parse
from coin_ray.config import PipelineConfig
from coin_ray.data.canonical import decode_rgb
from coin_ray.errors import CoinError, ConfigError
from coin_ray.export.int8_loss import POINTS_MAX, Int8Loss
from coin_ray.export.package import (
    INT8,
    Int8Images,
    Student,
    require_extra,
    write_package,
)
from coin_ray.models.faster_rcnn_clip.backbone import load_backbone
from coin_ray.models.faster_rcnn_clip.model import build_detector
from coin_ray.runs import runner
from coin_ray.runs.graph import graph
from coin_ray.runs.steps import Step
from coin_ray.stages.common.teacher_outputs import image_table, truth_of
from coin_ray.stages.common.training_job import load_weights
from coin_ray.stages.propagate import WEIGHTS

COMPARED = 100
"""Images on which the exported files are compared with the model."""
CALIBRATED, LABELLED = 100, 1000
"""Training images that fix the 8-bit scales, and annotated test images at most on which
the loss is measured."""


@dataclass(frozen=True)
class Request:
    config: PipelineConfig
    options: Options
    out: str
    added: tuple[str, ...]
    int8: bool = False


def main(description: str) -> int:
    """Read the command line and export; returns the exit code. User errors are one
    message, no traceback.
    """
    try:
        export(request(sys.argv[1:], description))
    except CoinError as error:
        print(f"\n{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


def request(arguments: Sequence[str], description: str = "") -> Request:
    """The export's own options, and the preset's settings as for ``full.py``. Raises
    ConfigError with what to change.
    """
    parser = argparse.ArgumentParser(
        add_help=False, allow_abbrev=False, usage=argparse.SUPPRESS
    )
    own = parser.add_argument_group("options of the export")
    own.add_argument("--out", help="folder or URI to write (default: ROOT/export)")
    own.add_argument(
        "--add-classes",
        default="",
        help=(
            'further classes by their text, "truck,fire hydrant": never trained, never'
            " measured"
        ),
    )
    own.add_argument(
        "--int8",
        action="store_true",
        help=(
            "write model.int8.onnx too, quantized to 8 bits, and measure what it loses"
        ),
    )
    known, rest = parser.parse_known_args(list(arguments))
    config, options = parse(
        rest, "export.py", f"{description}\n\n{parser.format_help()}"
    )
    added = tuple(name.strip() for name in known.add_classes.split(",") if name.strip())
    if config.distill.student == "co-detr":
        raise ConfigError(
            "ONNX is written of the Faster R-CNN student only. A Co-DETR's weights and"
            " description are in ROOT/steps/export-*, and"
            " coin_ray.predictors.student.load_exported reads them"
        )
    check_added(config, added)
    return Request(
        config,
        options,
        storage.absolute(known.out or storage.join(options.root, "export")),
        added,
        known.int8,
    )


def check_added(config: PipelineConfig, added: Sequence[str]) -> None:
    """Raises ConfigError if the student has no text encoder, or a name is no new class."""
    if added and config.detector.backbone != "clip":
        raise ConfigError(
            "--add-classes needs CLIP's text encoder; detector.backbone"
            f" {config.detector.backbone} has none"
        )
    names = [" ".join(name.lower().split()) for name in (*config.classes, *added)]
    doubles = sorted(
        {name for name in names if names.count(name) > 1 or name == "background"}
    )
    if doubles:
        raise ConfigError(
            f"--add-classes: {', '.join(doubles)} is a class already; name only new"
            " ones"
        )


def export(asked: Request) -> None:
    steps = graph(asked.config, baselines=asked.options.baselines)
    if asked.options.dry_run:
        runner.plan(asked.config, steps, asked.options.root, "export")
        return
    require_extra()
    if steps["export"].manifest(asked.options.root) is None:
        runner.run(asked.config, steps, asked.options.root, "export")
    summary = _summary(asked.options.root)
    student = load_student(asked, steps, summary)
    images = compared_images(steps["images"], asked.options.root)
    print(
        f"comparing the exported files with the model on {len(images)} images",
        flush=True,
    )
    with warnings.catch_warnings():
        # of its own exporters, about each other
        warnings.filterwarnings("ignore", module=r"torch\.")
        measured = write_package(
            student,
            images,
            asked.out,
            int8_images(steps["images"], asked.options.root) if asked.int8 else None,
        )
    for name, found in measured.equality.items():
        print(
            f"{name}: {found.detections} detections, {found.unmatched} without"
            f" counterpart, IoU >= {found.iou_min}, scores differ by"
            f" {found.score_difference_max} at most"
        )
    if measured.int8:
        print(told(measured.int8))
    files = " ".join(
        [
            "model.onnx",
            *([INT8] if asked.int8 else []),
            "model.pt",
            "model.safetensors",
            "model.json",
            "detect.py",
            "README.md",
        ]
    )
    print(f"{asked.out}: {files}")


def told(loss: Int8Loss) -> str:
    """What the quantized file loses, in one line."""
    line = f"{INT8}: "
    if loss.map50 is not None and loss.map50_int8 is not None:
        line += (
            f"mAP50 {100 * loss.map50_int8:.1f} against {100 * loss.map50:.1f} of"
            f" model.onnx on {loss.labelled} annotated test images; "
        )
    if loss.found_again is not None:
        line += (
            f"{100 * loss.found_again:.1f} % of {loss.detections} detections above .3"
            " found again (same class, IoU >= .9)"
        )
        if loss.score_difference is not None:
            line += f", scores {loss.score_difference:.3f} apart on average"
    else:
        line += "model.onnx finds nothing above .3 to compare with"
    return line + (
        f". It loses more than {POINTS_MAX:g} point: better use model.onnx"
        if loss.too_large
        else ""
    )


def _summary(root: str) -> dict[str, Any]:
    place = storage.join(root, "summary.json")
    summary: dict[str, Any] = storage.read_json(place) if storage.exists(place) else {}
    return summary


def load_student(
    asked: Request, steps: dict[str, Step], summary: dict[str, Any]
) -> Student:
    """The distilled student; added names go through the prompts that it learned."""
    config, classes = asked.config, (*asked.config.classes, *asked.added)
    detector = build_detector(
        load_backbone(config), classes, config.detector, seed=config.seed
    )
    detector.load_state_dict(
        load_weights(storage.join(steps["distill"].folder(asked.options.root), WEIGHTS))
    )
    return Student(detector.eval(), classes, asked.added, config, summary)


def compared_images(step: Step, root: str) -> list[Image.Image]:
    """The first hundred: of the test images, then of the others."""
    splits = pa.concat_tables(
        image_table(step.folder(root), split) for split in ("test", "val", "train")
    )
    return [_decoded(row) for row in splits.slice(0, COMPARED).to_pylist()]


def int8_images(step: Step, root: str) -> Int8Images:
    """Training images spread over the whole list, and the first annotated test images;
    decoded one at a time.
    """
    folder = step.folder(root)
    train, test, truth = (
        image_table(folder, "train"),
        image_table(folder, "test"),
        truth_of(folder),
    )
    spread = train.take(
        list(range(0, len(train), max(1, len(train) // CALIBRATED)))[:CALIBRATED]
    )
    annotated = test.filter(pc.is_in(test["image_id"], value_set=truth.ids)).slice(
        0, LABELLED
    )
    return Int8Images(
        (_decoded(row) for row in spread.to_pylist()),
        ((_decoded(row), truth[row["image_id"]]) for row in annotated.to_pylist()),
    )


def _decoded(row: dict[str, object]) -> Image.Image:
    return decode_rgb(storage.read_bytes(str(row["uri"])))
