"""``pipelines/export.py``: run what the student needs, then write the folder to take home."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from coin_ray import runner, storage
from coin_ray.cli import Options, parse
from coin_ray.config import PipelineConfig
from coin_ray.data.canonical import decode_rgb
from coin_ray.errors import CoinError, ConfigError
from coin_ray.export.package import Student, require_extra, write_package
from coin_ray.models.faster_rcnn_clip.backbone import load_backbone
from coin_ray.models.faster_rcnn_clip.model import build_detector
from coin_ray.pipeline import graph
from coin_ray.stages.fitting import load_weights
from coin_ray.stages.knowledge import image_rows
from coin_ray.stages.propagate import WEIGHTS
from coin_ray.steps import Step

COMPARED = 100
"""Images on which the exported files are compared with the model."""


@dataclass(frozen=True)
class Request:
    config: PipelineConfig
    options: Options
    out: str
    added: tuple[str, ...]


def main(description: str) -> int:
    """Read the command line and export; returns the exit code. User errors are one message, no traceback."""
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
    """The export's own options, and the preset's settings as for ``full.py``. Raises ConfigError with what to change."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, usage=argparse.SUPPRESS)
    own = parser.add_argument_group("options of the export")
    own.add_argument("--out", help="folder or URI to write (default: ROOT/export)")
    own.add_argument("--add-classes", default="", help='further classes by their text, "truck,fire hydrant": never trained, never measured')
    known, rest = parser.parse_known_args(list(arguments))
    config, options = parse(rest, "export.py", f"{description}\n\n{parser.format_help()}")
    added = tuple(name.strip() for name in known.add_classes.split(",") if name.strip())
    if config.distill.student == "co-detr":
        raise ConfigError(
            "ONNX is written of the Faster R-CNN student only. A Co-DETR's weights and description are in ROOT/steps/export-*, and "
            "coin_ray.serving.exported.load_exported reads them"
        )
    check_added(config, added)
    return Request(config, options, storage.absolute(known.out or storage.join(options.root, "export")), added)


def check_added(config: PipelineConfig, added: Sequence[str]) -> None:
    """Raises ConfigError if the student has no text encoder, or a name is no new class."""
    if added and config.detector.backbone != "clip":
        raise ConfigError(f"--add-classes needs CLIP's text encoder; detector.backbone {config.detector.backbone} has none")
    names = [" ".join(name.lower().split()) for name in (*config.classes, *added)]
    doubles = sorted({name for name in names if names.count(name) > 1 or name == "background"})
    if doubles:
        raise ConfigError(f"--add-classes: {', '.join(doubles)} is a class already; name only new ones")


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
    print(f"comparing the exported files with the model on {len(images)} images", flush=True)
    for name, found in write_package(student, images, asked.out).items():
        print(
            f"{name}: {found.detections} detections, {found.unmatched} without counterpart, IoU >= {found.iou_min}, "
            f"scores differ by {found.score_difference_max} at most"
        )
    print(f"{asked.out}: model.onnx model.pt model.safetensors model.json detect.py README.md")


def _summary(root: str) -> dict[str, Any]:
    place = storage.join(root, "summary.json")
    summary: dict[str, Any] = storage.read_json(place) if storage.exists(place) else {}
    return summary


def load_student(asked: Request, steps: dict[str, Step], summary: dict[str, Any]) -> Student:
    """The distilled student; added names go through the prompts that it learned."""
    config, classes = asked.config, (*asked.config.classes, *asked.added)
    detector = build_detector(load_backbone(config), classes, config.detector, seed=config.seed)
    detector.load_state_dict(load_weights(storage.join(steps["distill"].folder(asked.options.root), WEIGHTS)))
    return Student(detector.eval(), classes, asked.added, config, summary)


def compared_images(step: Step, root: str) -> list[Image.Image]:
    """The first hundred: of the test images, then of the others."""
    rows = [row for split in ("test", "val", "train") for row in image_rows(step.folder(root), split)]
    return [decode_rgb(storage.read_bytes(str(row["uri"]))) for row in rows[:COMPARED]]
