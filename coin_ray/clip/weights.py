"""What open_clip needs to know of weights beside their numbers: the activation they were
trained with, and how pixels are prepared. A tag says both; of a file, only what lies
beside it or in it does.
"""

from __future__ import annotations

import json
import os
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import open_clip
import torch

from coin_ray.config import Clip
from coin_ray.errors import InputError

SCHEMAS = ("local-dir:", "hf-hub:")
"""Beginnings of names that open_clip resolves to an architecture with its weights."""
OPENAI_SIZES = ("input_resolution", "context_length", "vocab_size")
"""Numbers that OpenAI's archives hold beside the weights."""
DESCRIPTION_FILE = "open_clip_config.json"
"""Description of a model in the folder of its weights, as on the hub."""
PREPROCESSING_KEYS = ("mean", "std", "interpolation", "resize_mode")
QUICK_GELU_NAME = "quickgelu"
"""In the names of files that open_clip publishes, with or without a hyphen."""


def has_schema(name: str) -> bool:
    """Tell whether the name is that of a folder or repository for open_clip."""
    return name.startswith(SCHEMAS)


def is_torchscript(path: str) -> bool:
    """Tell whether a file is a TorchScript archive, as OpenAI publishes its weights."""
    if not os.path.isfile(path) or not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any("/code/" in entry for entry in archive.namelist())


def uses_quick_gelu(name: str, config: Clip, setting: str) -> bool:
    """Return whether to force QuickGELU: the weights were trained with it, as OpenAI's
    were, and the architecture's name alone does not say so.

    Warns where nothing tells the activation of weights from a file. Raises InputError if
    the ``activation`` contradicts the architecture. ``setting``: the config's name, for
    messages.
    """
    described = _architecture_activation(name)
    if config.activation == "gelu" and described:
        raise InputError(
            f"{setting}.activation is gelu, but the architecture {name} has QuickGELU:"
            f" give the architecture without it, or --{setting}.activation auto"
        )
    if config.activation != "auto":
        return config.activation == "quick_gelu"
    if has_schema(name):
        return False
    tag = open_clip.get_pretrained_cfg(name, config.pretrained)
    if tag:
        return bool(tag.get("quick_gelu"))
    if not os.path.isfile(config.pretrained):
        return False
    from_file = _activation_of_file(config.pretrained)
    if from_file is None and described is None:
        warnings.warn(
            f"{setting}.pretrained {config.pretrained}: nothing tells whether these"
            " weights were trained with GELU or QuickGELU; GELU is used. OpenAI's need"
            f" --{setting}.activation quick_gelu; --{setting}.activation gelu ends this"
            " warning",
            stacklevel=2,
        )
    return bool(from_file)


def _architecture_activation(name: str) -> bool | None:
    """Return ``quick_gelu`` of an architecture's description; None: it is not there."""
    if has_schema(name):
        return None
    architecture = open_clip.get_model_config(name) or {}
    quick_gelu: bool | None = architecture.get("quick_gelu")
    return quick_gelu


def _activation_of_file(path: str) -> bool | None:
    """Return whether the weights were trained with QuickGELU; None: nothing tells it."""
    if is_torchscript(path):
        return True
    quick_gelu = _description_beside(path).get("model_cfg", {}).get("quick_gelu")
    if quick_gelu is not None:
        return bool(quick_gelu)
    if QUICK_GELU_NAME in Path(path).name.lower().replace("-", "").replace("_", ""):
        return True
    return True if _has_openai_sizes(path) else None


def _has_openai_sizes(path: str) -> bool:
    """Tell whether a state dict is OpenAI's, saved again: it holds three sizes that no
    other one does.
    """
    if not zipfile.is_zipfile(path):
        return False
    weights = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    return isinstance(weights, Mapping) and all(key in weights for key in OPENAI_SIZES)


def _description_beside(path: str) -> dict[str, Any]:
    """Read the description in the folder of a weights file; empty if there is none."""
    description = Path(path).parent / DESCRIPTION_FILE
    if not description.is_file():
        return {}
    try:
        content = json.loads(description.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{description} is not JSON: {error}") from error
    return content if isinstance(content, dict) else {}


def preprocessing_of_file(name: str, path: str) -> dict[str, Any]:
    """Return mean, std, interpolation and resize mode of weights from a file: as
    described beside it, else as all tags of the architecture agree; empty if neither
    tells.

    open_clip itself prepares pixels for such weights as OpenAI's, also those of SigLIP.
    """
    described: Mapping[str, Any] = _description_beside(path).get("preprocess_cfg", {})
    if described:
        return {key: described[key] for key in PREPROCESSING_KEYS if key in described}
    tags = open_clip.list_pretrained_tags_by_model(name)
    by_tag = [open_clip.get_pretrained_cfg(name, tag) for tag in tags]
    preprocessing = {}
    for key in PREPROCESSING_KEYS:
        choices = {cfg.get(key) for cfg in by_tag}
        if len(choices) == 1:
            preprocessing[key] = choices.pop()
    return preprocessing
