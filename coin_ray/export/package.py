"""The export folder: ONNX, TorchScript, safetensors, a model card and an example. Needs
the extra ``export``.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np
import torch
from PIL import Image

from coin_ray import storage
from coin_ray.config import Cloud, PipelineConfig
from coin_ray.config.students import HUB_PREFIX
from coin_ray.data.pixels import IntensityRange, upright_rgb
from coin_ray.errors import ConfigError
from coin_ray.export.equality import (
    ExportComparison,
    Predict,
    compare_predictions,
    require_equal,
)
from coin_ray.export.int8_loss import Int8Loss, ModelPair, int8_loss
from coin_ray.models.faster_rcnn_clip.model import ClipDetector
from coin_ray.models.students.base import DetectorStudent
from coin_ray.models.students.building import is_detector_student
from coin_ray.predictors.onnx_student import OnnxStudent
from coin_ray.predictors.student import StudentPredictor, write_exported_student
from coin_ray.structures import Detections
from coin_ray.tables import Truth

if TYPE_CHECKING:
    from onnx import ModelProto

CARD = "README.md"
INT8_FILE = "model.int8.onnx"
PIXELS_FILE = "pixels.py"
"""Turns image files into pixels as training does; ``detect.py`` imports it."""
PIXELS_IMPORT = "from coin_ray.data.pixels import"
IMPORT_BESIDE = "sys.path.insert(0, str(Path(__file__).parent))\nfrom pixels import"
ExportedDetector = ClipDetector | DetectorStudent
OnnxExporter = Callable[
    [ExportedDetector, Sequence[str], IntensityRange | None], "ModelProto"
]
INSTALL_EXPORT = "pip install 'coin-ray[export]'"


@dataclass(frozen=True, eq=False)
class TrainedStudent:
    """The student to export. ``added``: the last of ``classes``, known by their text
    alone. ``summary``: the run's summary.json, for the card.
    """

    detector: ExportedDetector
    classes: tuple[str, ...]
    added: tuple[str, ...]
    config: PipelineConfig
    summary: Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Int8Images:
    """``training`` images fix the scales of 8-bit numbers; on ``labelled`` test images
    mAP50 is measured. Each is iterated once.
    """

    training: Iterable[Image.Image]
    labelled: Iterable[tuple[Image.Image, Truth]]


@dataclass(frozen=True)
class ExportMeasurements:
    """``equality`` of each file with the model; ``int8``: what ``model.int8.onnx``
    loses, None if it was not written.
    """

    equality: dict[str, ExportComparison]
    int8: Int8Loss | None


def write_package(
    student: TrainedStudent,
    images: Sequence[Image.Image],
    folder: str,
    int8: Int8Images | None = None,
) -> ExportMeasurements:
    """Write all files below ``folder`` (a URI), with ``model.int8.onnx`` if ``int8``;
    return how they compare with the model on ``images``.

    Raises ConfigError if the extra is missing, InputError if a file differs from the
    model; the card is written last, so a folder without one is not finished.
    """
    export_to_onnx = _onnx_exporter()
    storage.make_folder(folder)
    _remove_earlier(folder)
    intensity_range = student.config.intensity_range
    detector = student.detector
    detector.eval()
    write_exported_student(
        detector, student.classes, folder, intensity_range=intensity_range
    )
    onnx_model = export_to_onnx(detector, student.classes, intensity_range)
    onnx_bytes = onnx_model.SerializeToString()
    storage.write_bytes(storage.join(folder, "model.onnx"), onnx_bytes)
    script = _write_torchscript(detector, folder)
    _write_example(folder)
    settings = student.config.detector
    if isinstance(detector, ClipDetector):
        settings = detector.config
    model = StudentPredictor(student.classes, detector, settings, intensity_range)
    score_min = input_settings(detector).score_min
    exported: dict[str, Predict] = {
        "model.onnx": OnnxStudent(onnx_bytes),
        "model.pt": _TorchScriptPredictor(script, intensity_range),
    }
    equality = {
        name: compare_predictions(model, predictor, images, score_min)
        for name, predictor in exported.items()
    }
    for name, comparison in equality.items():
        require_equal(name, comparison)
    loss: Int8Loss | None = None
    if int8 is not None:
        loss = _write_int8(student, onnx_model, images, folder, int8)
    measurements = ExportMeasurements(equality, loss)
    card = render_card(student, measurements)
    storage.write_bytes(storage.join(folder, CARD), card.encode())
    return measurements


def _write_example(folder: str) -> None:
    """Write ``detect.py``, and the module of this package that it needs beside it."""
    example = (files("coin_ray.export") / "detect.py").read_text(encoding="utf-8")
    assert PIXELS_IMPORT in example, f"detect.py does not hold {PIXELS_IMPORT!r}"
    alone = example.replace(PIXELS_IMPORT, IMPORT_BESIDE)
    storage.write_bytes(storage.join(folder, "detect.py"), alone.encode())
    pixels = (files("coin_ray.data") / PIXELS_FILE).read_bytes()
    storage.write_bytes(storage.join(folder, PIXELS_FILE), pixels)


def _remove_earlier(folder: str) -> None:
    """Remove the card, which says that the folder is complete, and a quantized file."""
    for name in (CARD, INT8_FILE):
        uri = storage.join(folder, name)
        if storage.exists(uri):
            storage.remove(uri)


def _write_torchscript(
    detector: ExportedDetector, folder: str
) -> torch.jit.ScriptModule:
    from coin_ray.export.student_torchscript import student_torchscript
    from coin_ray.export.torchscript import torchscript

    if is_detector_student(detector):
        script = student_torchscript(detector)
    else:
        script = torchscript(detector)
    buffer = io.BytesIO()
    torch.jit.save(script, buffer)  # type: ignore[no-untyped-call]
    storage.write_bytes(storage.join(folder, "model.pt"), buffer.getvalue())
    return script


def _write_int8(
    student: TrainedStudent,
    onnx_model: ModelProto,
    images: Sequence[Image.Image],
    folder: str,
    int8_images: Int8Images,
) -> Int8Loss:
    from coin_ray.export.int8 import int8_model

    int8_bytes = int8_model(onnx_model, int8_images.training)
    exact = OnnxStudent(onnx_model.SerializeToString())
    loss = int8_loss(
        ModelPair(exact, OnnxStudent(int8_bytes)),
        images,
        int8_images.labelled,
        len(student.classes),
        student.config.evaluate.plus_one,
    )
    storage.write_bytes(storage.join(folder, INT8_FILE), int8_bytes)
    return loss


def require_extra() -> None:
    """Raise ConfigError if what writes ONNX is not installed."""
    _onnx_exporter()


def _onnx_exporter() -> OnnxExporter:
    try:
        import onnxruntime.quantization  # noqa: F401
        import onnxscript  # noqa: F401

        from coin_ray.export.onnx_model import onnx_model
        from coin_ray.export.student_onnx import student_onnx_model
    except ImportError as error:
        raise ConfigError(
            "writing ONNX needs onnx, onnxscript and onnxruntime"
            f" ({error}): {INSTALL_EXPORT}"
        ) from None

    def export_to_onnx(
        detector: ExportedDetector,
        classes: Sequence[str],
        intensity_range: IntensityRange | None,
    ) -> ModelProto:
        if is_detector_student(detector):
            return student_onnx_model(detector, classes, intensity_range)
        return onnx_model(detector, classes, intensity_range)

    return export_to_onnx


@dataclass(frozen=True)
class InputSettings:
    """Sizes that images are resized to, and limits of the detections: those of the
    files' own pre- and post-processing.
    """

    short_side: int
    long_side: int
    score_min: float
    detections: int


def input_settings(detector: ExportedDetector) -> InputSettings:
    """Return the settings that the card and the comparison name."""
    if is_detector_student(detector):
        side, settings = detector.input_format.side, detector.post_process
        return InputSettings(side, side, settings.score_min, settings.detections)
    config = detector.config
    return InputSettings(
        config.short_side, config.long_side, config.score_min, config.detections
    )


@dataclass(frozen=True, eq=False)
class _TorchScriptPredictor:
    module: torch.jit.ScriptModule
    intensity_range: IntensityRange | None

    @torch.no_grad()
    def __call__(self, image: Image.Image) -> Detections:
        upright = upright_rgb(image, self.intensity_range)
        pixels = torch.from_numpy(np.array(upright))
        return Detections(*self.module(pixels))


def render_card(student: TrainedStudent, measurements: ExportMeasurements) -> str:
    """Return the model card in Markdown: teachers, classes, measured figures with their
    seed, signature, limits, licences.
    """
    config, summary = student.config, student.summary
    settings, int8 = input_settings(student.detector), measurements.int8
    template = (files("coin_ray.export") / "card.md.jinja").read_text()
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    equality = {
        name: comparison.as_json() for name, comparison in measurements.equality.items()
    }
    return environment.from_string(template).render(
        name=f"{config.preset} student",
        licence="apache-2.0" if config.preset == "demo" else "other",
        network=_network_name(student),
        first_weights=_first_weights(student),
        classes=student.classes,
        added=student.added,
        teachers=_teachers_sentence(config),
        preset=config.preset,
        seed=config.seed,
        images=summary.get("images", {}),
        map50=summary.get("map50", {}),
        equality=equality,
        int8=None if int8 is None else int8.as_json(),
        score_min=settings.score_min,
        short=settings.short_side,
        long=settings.long_side,
        detections=settings.detections,
        intensity_range=config.intensity_range,
    )


def _network_name(student: TrainedStudent) -> str:
    """Return the student's network in words: "A Faster R-CNN on ..."."""
    if is_detector_student(student.detector):
        name = _student_name(student.config.distill.student)
        return f"A {name} that was pretrained as a detector"
    return f"A Faster R-CNN on {_backbone_name(student.config)}"


def _first_weights(student: TrainedStudent) -> str:
    """Return in words where the student's first weights are from; of a file its name,
    not its folder.
    """
    distill = student.config.distill
    if not is_detector_student(student.detector):
        return _backbone_name(student.config)
    if distill.student_weights:
        return PurePath(distill.student_weights).name
    return f"the published weights of {_student_name(distill.student)}"


def _student_name(student: str) -> str:
    """Return the name of a student; for a folder its name, not its path."""
    if student.startswith(HUB_PREFIX):
        return student.removeprefix(HUB_PREFIX)
    return PurePath(student).name


def _backbone_name(config: PipelineConfig) -> str:
    if config.detector.backbone == "clip":
        return f"the visual tower of {_clip_name(config)}"
    return f"MobileNetV2 ({config.mobilenet.weights})"


def _clip_name(config: PipelineConfig) -> str:
    """Return CLIP with its architecture; for a file its name, not its folder."""
    return f"CLIP {PurePath(config.clip.model).stem}"


def _teachers_sentence(config: PipelineConfig) -> str:
    """Return one sentence that names the clouds and who gave the second opinion."""
    clouds = ", ".join(_cloud_name(cloud) for cloud in config.clouds)
    return f"Cloud detectors: {clouds}{_second_opinion(config)}."


def _second_opinion(config: PipelineConfig) -> str:
    if config.collect.labeler == "none":
        return ""
    model = PurePath(config.labeler.model or config.clip.model).stem
    kind = "the classifier" if config.collect.labeler == "classifier" else "CLIP"
    return f" and {kind} {model}"


def _cloud_name(cloud: Cloud) -> str:
    is_remote = cloud.serve == "none"
    service = cloud.service if is_remote else "a local server"
    model: str = cloud.serve
    if is_remote and cloud.model != "default":
        model = cloud.model
    return f"{service} ({model})"
