"""Pretrained transformers detectors by name, from the hub or from a folder."""

from __future__ import annotations

import copy
import os
import pickle
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from safetensors import SafetensorError

from coin_ray.config.students import HUB_PREFIX
from coin_ray.errors import ConfigError, InputError
from coin_ray.models.students.base import InputFormat, PostProcess
from coin_ray.models.students.class_rows import match_class_rows, take_over_class_rows
from coin_ray.models.students.transformers_student import (
    LOSS_FUNCTIONS,
    TransformersStudent,
)

PRETRAINED = {
    "d-fine-n": ("d_fine", "ustc-community/dfine-nano-coco"),
    "d-fine-s": ("d_fine", "ustc-community/dfine-small-coco"),
    "rt-detr-v2": ("rt_detr_v2", "PekingU/rtdetr_v2_r18vd"),
    "rf-detr-nano": ("rf_detr", "Roboflow/rf-detr-nano"),
    "deimv2-n": ("deimv2", "harshaljanjani/DEIMv2_HGNetv2_N_COCO_Transformers"),
    "lw-detr-tiny": ("lw_detr", "AnnaZhang/lwdetr_tiny_60e_coco"),
}
"""transformers' ``model_type`` and the hub's name of each student."""
CLASS_HEAD = re.compile(
    r"(^|\.)(class_embed|enc_score_head|enc_out_class_embed)\.([0-9]+\.)?(weight|bias)$"
)
"""Tensors with a row for each class."""
DENOISING_CLASSES = "model.denoising_class_embed.weight"
"""Has one more row, for denoising queries without a box."""
BILINEAR = 2
"""Pillow's number, as in ``preprocessor_config.json``."""
LOADING_ERRORS = (
    OSError,
    ValueError,
    RuntimeError,
    KeyError,
    EOFError,
    SafetensorError,
    pickle.UnpicklingError,
)


@dataclass(frozen=True, eq=False)
class PretrainedDetector:
    """``network``: transformers' model in float32, with the classes it was trained on."""

    network: Any
    input_format: InputFormat

    @property
    def classes(self) -> tuple[str, ...]:
        names = self.network.config.id2label
        return tuple(names[number] for number in sorted(names))


def is_transformers_student(name: str) -> bool:
    """Tell whether ``distill.student`` names a transformers detector: one of
    ``PRETRAINED``, ``hf:OWNER/NAME`` or a folder with ``config.json``.
    """
    if name in PRETRAINED or name.startswith(HUB_PREFIX):
        return True
    return os.path.isfile(os.path.join(name, "config.json"))


def load_transformers_student(
    name: str, classes: Sequence[str], *, seed: int
) -> TransformersStudent:
    """Load a pretrained student for ``classes``. Rows of its class heads are taken over
    by name; those of other classes are drawn from ``seed``.

    Raises ConfigError without transformers, or with a version that lacks the model;
    InputError for weights that can't be loaded or belong to something else.
    """
    pretrained = load_pretrained_detector(name)
    network = with_student_classes(pretrained, classes, seed=seed)
    return TransformersStudent(network, pretrained.input_format)


def check_transformers_student(name: str, classes: Sequence[str]) -> None:
    """Load the student and run it once, so that nothing can fail for its weights, its
    input size or its classes later. Raises as ``load_transformers_student`` does.
    """
    student = load_transformers_student(name, classes, seed=0).eval()
    image = torch.zeros(3, 64, 64, dtype=torch.uint8)
    try:
        student.predict([image])
    except (RuntimeError, ValueError, IndexError) as error:
        side = student.input_format.side
        raise InputError(
            f"{name} fails on images of its own input size {side} x {side}:"
            f" {_first_line(error)}. Check size in preprocessor_config.json"
        ) from error


def describe_transformers_student(student: TransformersStudent) -> dict[str, Any]:
    """Return what ``student_from_transformers_config`` needs, as plain data for a JSON
    file. The classes are in it.
    """
    return {
        "transformers": student.network.config.to_dict(),
        "input": asdict(student.input_format),
        "post_process": asdict(student.post_process),
    }


def student_from_transformers_config(
    description: Mapping[str, Any],
) -> TransformersStudent:
    """Build the described student with random weights; nothing is downloaded. Raises
    ConfigError without transformers or with a version that lacks the model.
    """
    settings = dict(description["transformers"])
    model_type = settings.pop("model_type")
    transformers = _import_transformers(model_type)
    _require_supported(transformers, "the student", model_type)
    config = transformers.AutoConfig.for_model(model_type, **settings)
    names = config.id2label
    classes = [names[number] for number in sorted(names)]
    network = new_network(config, classes, seed=0)
    channels = {name: tuple(description["input"][name]) for name in ("mean", "std")}
    input_format = InputFormat(**{**description["input"], **channels})
    student = TransformersStudent(network, input_format)
    student.post_process = PostProcess(**description["post_process"])
    return student


def empty_transformers_student(
    name: str, classes: Sequence[str]
) -> TransformersStudent:
    """Build the student with random weights, from its configuration alone. Raises as
    ``load_transformers_student`` does.
    """
    source = _open_source(name)
    network = new_network(source.config, classes, seed=0)
    return TransformersStudent(network, source.input_format)


def load_pretrained_detector(name: str) -> PretrainedDetector:
    """Load the detector with its own classes. Raises as ``load_transformers_student``
    does.
    """
    source = _open_source(name)
    transformers = _import_transformers(name)
    try:
        network, report = transformers.AutoModelForObjectDetection.from_pretrained(
            source.location,
            config=source.config,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    except LOADING_ERRORS as error:
        raise InputError(_unavailable_message(name, source.location, error)) from error
    _require_all_weights(name, source.config, report)
    return PretrainedDetector(network, source.input_format)


@dataclass(frozen=True, eq=False)
class _Source:
    """``location``: the folder or the name on the hub; ``config``: transformers'."""

    location: str
    config: Any
    input_format: InputFormat


def _open_source(name: str) -> _Source:
    transformers = _import_transformers(name)
    expected_type, location = _find_location(name)
    if expected_type:
        _require_supported(transformers, name, expected_type)
    try:
        config = transformers.AutoConfig.from_pretrained(location)
        _require_model_type(name, config.model_type, expected_type)
        processor = transformers.AutoImageProcessor.from_pretrained(location)
    except (ConfigError, InputError):
        raise
    except LOADING_ERRORS as error:
        raise InputError(_unavailable_message(name, location, error)) from error
    return _Source(location, config, read_input_format(processor, name))


def with_student_classes(
    pretrained: PretrainedDetector, classes: Sequence[str], *, seed: int
) -> Any:
    """Return a network for ``classes`` with all pretrained weights; class rows by name,
    the rest drawn from ``seed``.
    """
    network = new_network(pretrained.network.config, classes, seed=seed)
    rows = match_class_rows(classes, pretrained.classes)
    weights = pretrained.network.state_dict()
    padding_row = len(pretrained.classes)
    for tensor_name, initial in network.state_dict().items():
        if CLASS_HEAD.search(tensor_name):
            weights[tensor_name] = take_over_class_rows(
                weights[tensor_name], initial, rows
            )
        elif tensor_name == DENOISING_CLASSES:
            weights[tensor_name] = take_over_class_rows(
                weights[tensor_name], initial, [*rows, padding_row]
            )
    network.load_state_dict(weights)
    return network


def new_network(config: Any, classes: Sequence[str], *, seed: int) -> Any:
    """Return a network like ``config`` with random weights, for ``classes``."""
    import transformers

    own_config = copy.deepcopy(config)
    own_config.id2label = dict(enumerate(classes))
    own_config.label2id = {label: number for number, label in enumerate(classes)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = transformers.AutoModelForObjectDetection.from_config(own_config)
    return network.float()


def read_input_format(processor: Any, name: str) -> InputFormat:
    """Read the pixels that a network takes from its image processor. Raises InputError
    for one that keeps the aspect ratio, or interpolates in another way.

    RF-DETR's processor resizes without antialiasing; a student of this package always
    sees antialiased pixels, in training and after it.
    """
    size = dict(processor.size)
    side, width = size.get("height"), size.get("width")
    resample = int(getattr(processor, "resample", BILINEAR))
    if not (processor.do_resize and side and side == width) or resample != BILINEAR:
        raise InputError(
            f"{name}: the image processor must stretch images to a square with bilinear"
            f" interpolation (resample {BILINEAR}); got size {size}, do_resize"
            f" {processor.do_resize}, resample {resample}. Change"
            " preprocessor_config.json"
        )
    levels = 1.0 / float(processor.rescale_factor) if processor.do_rescale else 1.0
    mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    if processor.do_normalize:
        mean, std = tuple(processor.image_mean), tuple(processor.image_std)
    return InputFormat(
        int(side),
        keep_ratio=False,
        multiple=1,
        mean=_scale_channels(mean, levels),
        std=_scale_channels(std, levels),
    )


def _scale_channels(
    numbers: tuple[float, float, float], factor: float
) -> tuple[float, float, float]:
    red, green, blue = numbers
    return red * factor, green * factor, blue * factor


def _import_transformers(name: str) -> Any:
    try:
        import transformers
    except ImportError:
        raise ConfigError(
            f"the student {name} needs transformers: pip install 'coin-ray[teachers]'"
        ) from None
    return transformers


def _find_location(name: str) -> tuple[str, str]:
    """Return the expected model type ("" for any), and the folder or the name on the
    hub. Raises InputError for a name that is neither.
    """
    if name in PRETRAINED:
        return PRETRAINED[name]
    if name.startswith(HUB_PREFIX):
        repository = name.removeprefix(HUB_PREFIX)
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
            raise InputError(
                f"{name}: expected {HUB_PREFIX}OWNER/NAME, as"
                f" {HUB_PREFIX}{PRETRAINED['d-fine-n'][1]}"
            )
        return "", repository
    if not os.path.isdir(name):
        raise InputError(
            f"{name} is no student and no folder; give one of"
            f" {', '.join(PRETRAINED)}, {HUB_PREFIX}OWNER/NAME or a folder as"
            " save_pretrained writes it"
        )
    return "", name


def _require_supported(transformers: Any, name: str, model_type: str) -> None:
    """Raise ConfigError if the installed version lacks the model."""
    if model_type not in transformers.models.auto.configuration_auto.CONFIG_MAPPING:
        raise ConfigError(
            f"transformers {transformers.__version__} has no {model_type}, which"
            f" {name} is: pip install -U 'transformers<6'"
        )


def _require_model_type(name: str, model_type: str, expected_type: str) -> None:
    if expected_type and model_type != expected_type:
        raise InputError(
            f"{name}: expected a {expected_type} model, got a {model_type} model"
        )
    if model_type not in LOSS_FUNCTIONS:
        raise InputError(
            f"{name} is a {model_type} model; a student is one of"
            f" {', '.join(LOSS_FUNCTIONS)}"
        )


def _require_all_weights(name: str, config: Any, report: Mapping[str, Any]) -> None:
    """Raise InputError for weights of other shapes, or ones that are missing:
    transformers would draw them at random.
    """
    mismatches = sorted(report["mismatched_keys"])
    if mismatches and all(_has_class_rows(mismatch[0]) for mismatch in mismatches):
        tensor_name, actual, _ = mismatches[0]
        extra_rows = 1 if tensor_name == DENOISING_CLASSES else 0
        raise InputError(
            f"{name}: the weights are of {actual[0] - extra_rows} classes, but id2label"
            f" in config.json names {config.num_labels}. Use the config.json that was"
            " saved with the weights"
        )
    if mismatches:
        tensor_name, actual, expected = mismatches[0]
        raise InputError(
            f"{name}: the weights belong to another network: expected {tensor_name} of"
            f" shape {list(expected)}, got {list(actual)}"
            f"{_others(len(mismatches))}. Use the config.json that was saved with them"
        )
    missing = sorted(report["missing_keys"])
    if missing:
        raise InputError(
            f"{name}: the weights belong to another network: {missing[0]} is missing"
            f"{_others(len(missing))}. Use the config.json that was saved with them"
        )


def _has_class_rows(tensor_name: str) -> bool:
    return tensor_name == DENOISING_CLASSES or bool(CLASS_HEAD.search(tensor_name))


def _others(count: int) -> str:
    return f" (and {count - 1} more)" if count > 1 else ""


def _unavailable_message(name: str, location: str, error: BaseException) -> str:
    reason = _first_line(error)
    if os.path.isdir(location):
        return (
            f"{name} can't be loaded: {reason}. Expected config.json,"
            " model.safetensors and preprocessor_config.json, complete, as"
            " save_pretrained writes them"
        )
    return (
        f"{name} ({location} on the hub) is not in the cache and can't be downloaded:"
        f" {reason}. Without network give the folder of a copy as the student"
    )


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0][:200] or type(error).__name__
