"""Image classifiers of transformers, timm, or an ONNX file, each with the preparation of
images that it was trained with.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from pydantic import ConfigDict, TypeAdapter, ValidationError
from torch import Tensor

from coin_ray import storage
from coin_ray.errors import ConfigError, InputError

Activation = Literal["softmax", "sigmoid", "none"]
TIMM_SCHEMAS = ("hf-hub:", "local-dir:")
PIXEL_MAX = 255.0
SHOWN_CLASSES = 5


@dataclass(frozen=True, eq=False)
class ImageClassifier:
    """``class_names``: every class with its synonyms, the full name first.

    ``prepare`` makes the input [3, h, w] of one image; ``forward`` returns the outputs
    [B, C] of inputs [B, 3, h, w]. ``activation``: what turns outputs into probabilities;
    those of a sigmoid are independent.
    """

    class_names: tuple[tuple[str, ...], ...]
    prepare: Callable[[Image.Image], Tensor]
    forward: Callable[[Tensor], Tensor]
    activation: Activation

    @torch.no_grad()
    def probabilities(self, inputs: Tensor) -> Tensor:
        """Return probabilities [B, C] of inputs [B, 3, h, w], on the CPU."""
        outputs = self.forward(inputs).float().cpu()
        if self.activation == "softmax":
            return outputs.softmax(-1)
        return outputs.sigmoid() if self.activation == "sigmoid" else outputs


@dataclass(frozen=True)
class OnnxClassifierSignature:
    """FILE.onnx.json beside an ONNX classifier. Unknown fields are errors."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    classes: tuple[str, ...]
    """Names of the outputs in their order; synonyms are separated by commas."""
    input_size: tuple[int, int] = (224, 224)
    """Width and height."""
    mean: tuple[float, float, float] = (123.675, 116.28, 103.53)
    std: tuple[float, float, float] = (58.395, 57.12, 57.375)
    """Subtracted from RGB in 0..255, and what it is then divided by: ImageNet's."""
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    activation: Activation = "softmax"
    """What turns the outputs into probabilities; none: they are probabilities."""


SIGNATURE = TypeAdapter(OnnxClassifierSignature)


def load_image_classifier(
    model: str, pretrained: str | None, device: str = "cpu"
) -> ImageClassifier:
    """Load a classifier for inference: an ONNX file, a folder or a name of transformers
    or timm. ``pretrained``: a weights file for a timm model by name.

    Raises InputError if there is no such model or it can't be downloaded, ConfigError if
    its classes have no names.
    """
    if model.endswith(".onnx"):
        return _load_onnx(model)
    try:
        if _is_timm(model):
            return _load_timm(model, pretrained, device)
        return _load_transformers(model, device)
    except ConfigError:
        raise
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        reason = str(error).strip().split("\n")[0][:200]
        raise InputError(
            f"labeler.model {model} could not be loaded as an image classifier"
            f" ({type(error).__name__}: {reason}). Give the folder of a model of"
            " transformers or timm, an ONNX file, or a name that can be downloaded"
        ) from error


def _is_timm(model: str) -> bool:
    import timm

    description = Path(model) / "config.json"
    if description.is_file():
        return "architecture" in json.loads(description.read_text(encoding="utf-8"))
    return model.startswith(TIMM_SCHEMAS) or timm.is_model(model)


def _load_timm(model: str, pretrained: str | None, device: str) -> ImageClassifier:
    import timm
    from timm.data import create_transform, resolve_data_config

    name = f"local-dir:{model}" if os.path.isdir(model) else model
    overlay = None
    if pretrained is not None:
        overlay = {"file": pretrained}
    network = timm.create_model(
        name, pretrained=True, pretrained_cfg_overlay=overlay
    ).eval()
    names = _timm_class_names(model, network)
    transform = create_transform(
        **resolve_data_config({}, model=network), is_training=False
    )
    return ImageClassifier(
        names, transform, _on_device(network, device), activation="softmax"
    )


def _timm_class_names(model: str, network: Any) -> tuple[tuple[str, ...], ...]:
    from timm.data import ImageNetInfo, infer_imagenet_subset

    config = network.pretrained_cfg
    names = config.get("label_names")
    if names is not None:
        descriptions = config.get("label_descriptions") or {}
        if not isinstance(descriptions, Mapping):
            descriptions = {}
        texts = [descriptions.get(name, name) for name in names]
        return tuple(_synonyms(text) for text in texts)
    subset = infer_imagenet_subset(network)
    if not subset:
        raise ConfigError(
            f"labeler.model {model} has {network.num_classes} classes without names;"
            " give a local-dir:FOLDER whose config.json has label_names"
        )
    imagenet = ImageNetInfo(subset)
    return tuple(
        _synonyms(imagenet.index_to_description(number))
        for number in range(network.num_classes)
    )


def _load_transformers(model: str, device: str) -> ImageClassifier:
    try:
        import transformers
    except ImportError:
        raise ConfigError(
            f"labeler.model {model} needs transformers: pip install 'coin-ray[teachers]'"
        ) from None
    processor = transformers.AutoImageProcessor.from_pretrained(model)
    network = transformers.AutoModelForImageClassification.from_pretrained(model).eval()
    config = network.config
    labels = [config.id2label[number] for number in sorted(config.id2label)]
    if all(label == f"LABEL_{number}" for number, label in enumerate(labels)):
        raise ConfigError(
            f"labeler.model {model} has {len(labels)} classes without names; write them"
            " into id2label of its config.json"
        )

    def prepare(image: Image.Image) -> Tensor:
        pixels: Tensor = processor(images=image, return_tensors="pt")["pixel_values"]
        return pixels[0]

    forward = _on_device(network, device)
    is_multi_label = config.problem_type == "multi_label_classification"
    return ImageClassifier(
        tuple(_synonyms(label) for label in labels),
        prepare,
        lambda inputs: forward(inputs).logits,
        activation="sigmoid" if is_multi_label else "softmax",
    )


def _on_device(network: Any, device: str) -> Callable[[Tensor], Any]:
    network = network.to(device).requires_grad_(False)
    return lambda inputs: network(inputs.to(device))


def _load_onnx(path: str) -> ImageClassifier:
    try:
        import onnxruntime
    except ImportError:
        raise ConfigError(
            f"labeler.model {path} needs onnxruntime: pip install 'coin-ray[onnx]'"
        ) from None
    signature = _read_signature(path)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(
            path, options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # onnxruntime's errors have no common base of their own
        raise ConfigError(
            f"{path} is no ONNX model that onnxruntime can load: {str(error)[:200]}"
        ) from error
    [network_input, *_] = session.get_inputs()
    one_by_one = network_input.shape[0] == 1

    def forward(inputs: Tensor) -> Tensor:
        batches = inputs.split(1) if one_by_one else [inputs]
        outputs = [
            session.run(None, {network_input.name: batch.numpy()})[0]
            for batch in batches
        ]
        return torch.from_numpy(np.concatenate(outputs))

    classifier = ImageClassifier(
        tuple(_synonyms(name) for name in signature.classes),
        lambda image: _prepare_for_onnx(image, signature),
        forward,
        signature.activation,
    )
    _try_once(path, classifier, signature)
    return classifier


def _try_once(
    path: str, classifier: ImageClassifier, signature: OnnxClassifierSignature
) -> None:
    """Classify one grey image. Raises ConfigError if the model can't, or if its output
    is not as described.
    """
    image = Image.new("RGB", signature.input_size, (114, 114, 114))
    expected = (1, len(signature.classes))
    try:
        outputs = classifier.probabilities(classifier.prepare(image)[None])
    except Exception as error:  # see above
        raise ConfigError(
            f"{path} can't classify an image of {signature.input_size}:"
            f" {str(error)[:200]}"
        ) from error
    total = float(outputs.sum())
    if tuple(outputs.shape) != expected:
        raise ConfigError(
            f"{path}: expected an output of shape {list(expected)} for one image, as"
            f" {path}.json names {len(signature.classes)} classes; got"
            f" {list(outputs.shape)}"
        )
    if signature.activation == "none" and not 0.99 < total < 1.01:
        raise ConfigError(
            f"{path}: the outputs for one image sum to {total:.3g}, so they are no"
            f' probabilities: write "activation": "softmax" into {path}.json'
        )


def _prepare_for_onnx(image: Image.Image, signature: OnnxClassifierSignature) -> Tensor:
    resampling = Image.Resampling[signature.interpolation.upper()]
    resized = image.convert("RGB").resize(signature.input_size, resampling)
    pixels = torch.from_numpy(np.array(resized)).permute(2, 0, 1).float()
    mean = torch.tensor(signature.mean)[:, None, None]
    return (pixels - mean) / torch.tensor(signature.std)[:, None, None]


def _read_signature(path: str) -> OnnxClassifierSignature:
    """Read the description beside the model. Raises ConfigError if there is none, or it
    can't be read.
    """
    if not storage.exists(path):
        raise InputError(f"labeler.model: no such file {path}")
    description = f"{path}.json"
    if not storage.exists(description):
        raise ConfigError(
            f"{path} needs a description with the names of its classes in {description}"
            " (docs/second-opinions.md)"
        )
    try:
        signature = SIGNATURE.validate_json(storage.read_bytes(description))
    except ValidationError as error:
        problem = error.errors()[0]
        location = ".".join(str(part) for part in problem["loc"])
        raise ConfigError(
            f"{description} is no description of a classifier: {location}:"
            f" {problem['msg']}"
        ) from None
    if not signature.classes or min(signature.std) <= 0:
        raise ConfigError(
            f"{description} needs classes, and std above 0; got"
            f" {len(signature.classes)} classes, std {signature.std}"
        )
    return signature


def _synonyms(text: str) -> tuple[str, ...]:
    """Return a class's full name and, if it lists several, each of them:
    ``tabby, tabby cat`` is both.
    """
    parts = [part.strip() for part in text.split(",") if part.strip()]
    return (text, *parts) if len(parts) > 1 else (text,)


def first_names(class_names: Sequence[Sequence[str]]) -> str:
    """List the first classes for a message."""
    text = ", ".join(repr(names[0]) for names in class_names[:SHOWN_CLASSES])
    return f"{text}, ..." if len(class_names) > SHOWN_CLASSES else text
