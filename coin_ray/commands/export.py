"""``coin-ray export PRESET``: run what the student needs, then write its files for use."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from coin_ray import storage
from coin_ray.commands.arguments import ExtraOptions, RunOptions, parse_names
from coin_ray.config import PipelineConfig
from coin_ray.config.students import is_region_student
from coin_ray.errors import ConfigError

if TYPE_CHECKING:
    from PIL.Image import Image

    from coin_ray.export.int8_loss import Int8Loss
    from coin_ray.export.package import Int8Images, TrainedStudent
    from coin_ray.runs.steps import Step

DESCRIPTION = """\
Write the student's files for use elsewhere: ONNX, TorchScript, safetensors, a model card
and an example, running first whatever this needs.

    coin-ray export demo [--out DIR] [--add-classes "truck,fire hydrant"] [--int8] [--dry-run]
"""
COMPARED_IMAGES = 100
"""Images on which the exported files are compared with the model."""
CALIBRATION_IMAGES, LABELLED_IMAGES = 100, 1000
"""Training images that fix the 8-bit scales, and annotated test images at most on which
the loss is measured."""


@dataclass(frozen=True)
class ExportRequest:
    """What to export, and to which folder or URI (``out``)."""

    config: PipelineConfig
    options: RunOptions
    out: str
    added_classes: tuple[str, ...]
    int8: bool = False


def export(arguments: Sequence[str]) -> None:
    """Read the command line and export."""
    export_student(parse_export(arguments, DESCRIPTION))


def parse_export(arguments: Sequence[str], description: str = "") -> ExportRequest:
    """Read the export's own options, and the preset's settings as for ``adapt``. Raise
    ConfigError with what to change.
    """
    extra = ExtraOptions("options of the export")
    extra.group.add_argument(
        "--out", help="folder or URI to write (default: ROOT/export)"
    )
    extra.group.add_argument(
        "--add-classes",
        default=[],
        type=parse_names,
        help=(
            'further classes by their text, "truck,fire hydrant": never trained, never'
            " measured"
        ),
    )
    extra.group.add_argument(
        "--int8",
        action="store_true",
        help=(
            "write model.int8.onnx too, quantized to 8 bits, and measure what it loses"
        ),
    )
    export_options, config, options = extra.parse(
        arguments, "coin-ray export", description
    )
    if config.distill.student == "co-detr":
        raise ConfigError(
            "ONNX is not written of a Co-DETR student. Its weights and description are"
            " in ROOT/steps/export-*, and coin_ray.load reads them"
        )
    added_classes = tuple(export_options.add_classes)
    check_added_classes(config, added_classes)
    out = export_options.out or storage.join(options.root, "export")
    return ExportRequest(
        config, options, storage.absolute_uri(out), added_classes, export_options.int8
    )


def check_added_classes(config: PipelineConfig, added_classes: Sequence[str]) -> None:
    """Raise ConfigError if the student has no text encoder, or a name is no new class."""
    if added_classes and not is_region_student(config.distill.student):
        raise ConfigError(
            "--add-classes needs a student that knows classes by their text;"
            f" distill.student {config.distill.student} has learned its own only"
        )
    if added_classes and config.detector.backbone != "clip":
        raise ConfigError(
            "--add-classes needs CLIP's text encoder; detector.backbone"
            f" {config.detector.backbone} has none"
        )
    names = [
        " ".join(name.lower().split()) for name in (*config.classes, *added_classes)
    ]
    duplicates = {
        name for name in names if names.count(name) > 1 or name == "background"
    }
    if duplicates:
        raise ConfigError(
            f"--add-classes: {', '.join(sorted(duplicates))} is a class already; name"
            " only new ones"
        )


def export_student(request: ExportRequest) -> None:
    """Run the steps that are missing, write the files and print how they compare with
    the model; with ``--dry-run`` print the plan.
    """
    from coin_ray.export.package import INT8_FILE, require_extra, write_package
    from coin_ray.runs.graph import build_steps
    from coin_ray.runs.runner import print_plan

    config, options = request.config, request.options
    steps = build_steps(config, baselines=options.baselines)
    if options.dry_run:
        print_plan(config, steps, options.root, "export")
        return
    require_extra()
    _run_steps(config, steps, options.root)
    student = load_student(request, steps, _read_summary(options.root))
    images = read_compared_images(
        steps["images"], options.root, student.config.intensity_range
    )
    print(
        f"comparing the exported files with the model on {len(images)} images",
        flush=True,
    )
    int8_images = (
        read_int8_images(steps["images"], options.root, student.config.intensity_range)
        if request.int8
        else None
    )
    with warnings.catch_warnings():
        # PyTorch's exporters warn about each other.
        warnings.filterwarnings("ignore", module=r"torch\.")
        measured = write_package(student, images, request.out, int8_images)
    for name, equality in measured.equality.items():
        print(
            f"{name}: {equality.detections} detections, {equality.unmatched} without"
            f" counterpart, IoU >= {equality.iou_min}, scores differ by"
            f" {equality.score_difference_max} at most"
        )
    if measured.int8:
        print(format_int8_loss(measured.int8))
    int8_file = f"{INT8_FILE} " if request.int8 else ""
    print(
        f"{request.out}: model.onnx {int8_file}model.pt model.safetensors model.json"
        " detect.py pixels.py README.md"
    )


def _run_steps(config: PipelineConfig, steps: Mapping[str, Step], root: str) -> None:
    """Run the export and what it needs. If all is finished, the summary of the run
    stays, and only what a lost tracking server missed is written.
    """
    from coin_ray.runs.runner import (
        open_tracker,
        run_missing_steps,
        run_pipeline,
        select_steps,
    )

    selected = select_steps(steps, "export").values()
    if not all(step.is_finished(root) for step in selected):
        run_pipeline(config, steps, root, "export", ask_failed=False)
        return
    tracker = open_tracker(selected, config, root)
    run_missing_steps(selected, config, root, tracker=tracker)


def format_int8_loss(loss: Int8Loss) -> str:
    """Return what the quantized file loses, in one line."""
    from coin_ray.export.int8_loss import MAP50_LOSS_MAX
    from coin_ray.export.package import INT8_FILE

    line = f"{INT8_FILE}: "
    if loss.map50 is not None and loss.map50_int8 is not None:
        line += (
            f"mAP50 {100 * loss.map50_int8:.1f} against {100 * loss.map50:.1f} of"
            f" model.onnx on {loss.labelled} annotated test images; "
        )
    if loss.found_again is None:
        line += "model.onnx finds nothing above .3 to compare with"
    else:
        line += (
            f"{100 * loss.found_again:.1f} % of {loss.detections} detections above .3"
            " found again (same class, IoU >= .9)"
        )
        if loss.score_difference is not None:
            line += f", scores {loss.score_difference:.3f} apart on average"
    if loss.too_large:
        line += f". It loses more than {MAP50_LOSS_MAX:g} point: better use model.onnx"
    return line


def _read_summary(root: str) -> dict[str, Any]:
    uri = storage.join(root, "summary.json")
    summary: dict[str, Any] = storage.read_json(uri) if storage.exists(uri) else {}
    return summary


def load_student(
    request: ExportRequest, steps: Mapping[str, Step], summary: dict[str, Any]
) -> TrainedStudent:
    """Return the distilled student; added classes use the prompts that it learned."""
    from coin_ray.export.package import ExportedDetector, TrainedStudent
    from coin_ray.models.faster_rcnn_clip.backbone import load_backbone
    from coin_ray.models.faster_rcnn_clip.model import build_detector
    from coin_ray.models.students.building import empty_student
    from coin_ray.runs.graph import delivered_step
    from coin_ray.runs.steps import with_found_range
    from coin_ray.stages.common.training_job import load_weights
    from coin_ray.stages.propagate import WEIGHTS

    images_folder = steps["images"].folder(request.options.root)
    config = with_found_range(request.config, images_folder)
    classes = (*config.classes, *request.added_classes)
    detector: ExportedDetector
    if is_region_student(config.distill.student):
        detector = build_detector(
            load_backbone(config), classes, config.detector, seed=config.seed
        )
    else:
        detector = empty_student(config.distill, classes)
    folder = delivered_step(steps).folder(request.options.root)
    detector.load_state_dict(load_weights(storage.join(folder, WEIGHTS)))
    return TrainedStudent(detector, classes, request.added_classes, config, summary)


def read_compared_images(
    step: Step, root: str, intensity_range: tuple[float, float] | None = None
) -> list[Image]:
    """Return the first hundred images: test images first, then validation and training
    images.
    """
    import pyarrow as pa

    from coin_ray.stages.common.image_tables import read_images

    images = pa.concat_tables(
        read_images(step.folder(root), split) for split in ("test", "val", "train")
    )
    uris = images["uri"].slice(0, COMPARED_IMAGES).to_pylist()
    return [_read_image(uri, intensity_range) for uri in uris]


def read_int8_images(
    step: Step, root: str, intensity_range: tuple[float, float] | None = None
) -> Int8Images:
    """Return training images spread over the whole list, and the first annotated test
    images; each is decoded when it is used.
    """
    import pyarrow.compute as pc

    from coin_ray.export.package import Int8Images
    from coin_ray.stages.common.image_tables import open_annotations, read_images

    folder = step.folder(root)
    training_images = read_images(folder, "train")
    test_images = read_images(folder, "test")
    annotations = open_annotations(folder)
    interval = max(1, len(training_images) // CALIBRATION_IMAGES)
    indexes = list(range(0, len(training_images), interval))[:CALIBRATION_IMAGES]
    calibration_uris = training_images["uri"].take(indexes).to_pylist()
    is_annotated = pc.is_in(test_images["image_id"], value_set=annotations.ids)
    labelled = test_images.filter(is_annotated).slice(0, LABELLED_IMAGES)
    return Int8Images(
        (_read_image(uri, intensity_range) for uri in calibration_uris),
        (
            (_read_image(row["uri"], intensity_range), annotations[row["image_id"]])
            for row in labelled.to_pylist()
        ),
    )


def _read_image(uri: str, intensity_range: tuple[float, float] | None) -> Image:
    from coin_ray.data.canonical import decode_rgb

    return decode_rgb(storage.read_bytes(uri), intensity_range)
