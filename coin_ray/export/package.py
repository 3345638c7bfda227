"""The folder that a user takes home: ONNX, TorchScript, safetensors, a model card and
an example. Needs the extra ``export``.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import PurePath
from typing import Any

import jinja2
import numpy as np
import torch
from PIL import Image

from coin_ray import storage
from coin_ray.config import PipelineConfig
from coin_ray.errors import ConfigError
from coin_ray.export import equality
from coin_ray.export.int8_loss import Int8Loss, Pair, int8_loss
from coin_ray.models.faster_rcnn_clip.model import ClipDetector
from coin_ray.predictors.onnx_student import OnnxStudent
from coin_ray.predictors.student import Predictor, write_exported
from coin_ray.structures import Detections
from coin_ray.tables import Truth

INT8 = "model.int8.onnx"
EXTRA = "pip install 'coin-ray[export]'"


@dataclass(frozen=True, eq=False)
class Student:
    """What is exported. ``added``: the last of ``classes``, known by their text alone.
    ``summary``: of the run, for the card.
    """

    detector: ClipDetector
    classes: tuple[str, ...]
    added: tuple[str, ...]
    config: PipelineConfig
    summary: dict[str, Any]


@dataclass(frozen=True, eq=False)
class Int8Images:
    """``training`` images fix the scales of 8-bit numbers; on ``labelled`` test images
    mAP50 is measured. Each is gone through once.
    """

    training: Iterable[Image.Image]
    labelled: Iterable[tuple[Image.Image, Truth]]


@dataclass(frozen=True)
class Measured:
    """``equality`` of each file with the model; ``int8``: what ``model.int8.onnx``
    loses, None if it was not asked for.
    """

    equality: dict[str, equality.Equality]
    int8: Int8Loss | None


def write_package(
    student: Student,
    images: Sequence[Image.Image],
    folder: str,
    int8: Int8Images | None = None,
) -> Measured:
    """Write all files below ``folder`` (a URI), with ``model.int8.onnx`` if ``int8``;
    returns how they compare with the model on ``images``.

    Raises ConfigError if the extra is missing, InputError if a file differs from the
    model; the card is written last, so a folder without one is not finished.
    """
    onnx_model = _exporter()
    storage.make_folder(folder)
    for old in (storage.join(folder, "README.md"), storage.join(folder, INT8)):
        if storage.exists(old):
            storage.remove(old)
    write_exported(student.detector.eval(), student.classes, folder)
    onnx = onnx_model(student.detector, student.classes)
    data = onnx.SerializeToString()
    storage.write_bytes(storage.join(folder, "model.onnx"), data)
    from coin_ray.export.torchscript import torchscript

    script = torchscript(student.detector)
    buffer = io.BytesIO()
    torch.jit.save(script, buffer)  # type: ignore[no-untyped-call]
    storage.write_bytes(storage.join(folder, "model.pt"), buffer.getvalue())
    storage.write_bytes(
        storage.join(folder, "detect.py"),
        (files("coin_ray.export") / "detect.py").read_bytes(),
    )
    model, score_min = (
        Predictor(student.classes, student.detector, student.detector.config),
        student.detector.config.score_min,
    )
    found = {
        "model.onnx": equality.compare(
            model, OnnxStudent(data).predict, images, score_min
        ),
        "model.pt": equality.compare(model, _Script(script), images, score_min),
    }
    for name, result in found.items():
        equality.require(name, result)
    measured = Measured(
        found,
        None if int8 is None else _write_int8(student, onnx, images, folder, int8),
    )
    storage.write_bytes(
        storage.join(folder, "README.md"), render_card(student, measured).encode()
    )
    return measured


def _write_int8(
    student: Student,
    onnx: Any,
    images: Sequence[Image.Image],
    folder: str,
    given: Int8Images,
) -> Int8Loss:
    from coin_ray.export.int8 import int8_model

    data = int8_model(onnx, given.training)
    pair = Pair(OnnxStudent(onnx.SerializeToString()), OnnxStudent(data))
    loss = int8_loss(
        pair,
        images,
        given.labelled,
        len(student.classes),
        student.config.evaluate.plus_one,
    )
    storage.write_bytes(storage.join(folder, INT8), data)
    return loss


def require_extra() -> None:
    """Raises ConfigError if what writes ONNX is not installed."""
    _exporter()


def _exporter() -> Any:
    try:
        import onnxruntime.quantization  # noqa: F401
        import onnxscript  # noqa: F401

        from coin_ray.export.onnx_model import onnx_model
    except ImportError as error:
        raise ConfigError(
            f"writing ONNX needs onnx, onnxscript and onnxruntime ({error}): {EXTRA}"
        ) from None
    return onnx_model


@dataclass(frozen=True, eq=False)
class _Script:
    module: torch.jit.ScriptModule

    @torch.no_grad()
    def __call__(self, image: Image.Image) -> Detections:
        return Detections(
            *self.module(torch.from_numpy(np.array(image.convert("RGB"))))
        )


def render_card(student: Student, measured: Measured) -> str:
    """The model card in Markdown: teachers, classes, measured figures with their seed,
    signature, limits, licences.
    """
    config, summary, detector = student.config, student.summary, student.detector.config
    text = (files("coin_ray.export") / "card.md.jinja").read_text()
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(text).render(
        name=f"{config.preset} student",
        licence="apache-2.0" if config.preset == "demo" else "other",
        backbone=backbone(config),
        classes=student.classes,
        added=student.added,
        teachers=teachers(config),
        preset=config.preset,
        seed=config.seed,
        images=summary.get("images", {}),
        map50=summary.get("map50", {}),
        equality={name: result.as_json() for name, result in measured.equality.items()},
        int8=None if measured.int8 is None else measured.int8.as_json(),
        score_min=detector.score_min,
        short=detector.short_side,
        long=detector.long_side,
        detections=detector.detections,
    )


def backbone(config: PipelineConfig) -> str:
    if config.detector.backbone == "clip":
        return f"the visual tower of {clip_name(config)}"
    return f"MobileNetV2 ({config.mobilenet.weights})"


def clip_name(config: PipelineConfig) -> str:
    """CLIP with its architecture; of a file its name, not the folder it lay in."""
    return f"CLIP {PurePath(config.clip.model).stem}"


def teachers(config: PipelineConfig) -> str:
    """One sentence: which clouds, and which CLIP."""
    clouds = [
        c.model if c.serve == "none" and c.model != "default" else c.serve
        for c in config.clouds
    ]
    names = [
        f"{c.service if c.serve == 'none' else 'a local server'} ({m})"
        for c, m in zip(config.clouds, clouds, strict=True)
    ]
    clip = "" if config.collect.labeler == "none" else f" and {clip_name(config)}"
    return f"Cloud detectors: {', '.join(names)}{clip}."
