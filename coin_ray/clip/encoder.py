"""An open_clip model, loaded by tag or from local files, and its text embeddings."""

from __future__ import annotations

import os
import pickle
import warnings
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.modified_resnet import ModifiedResNet
from torch import Tensor, nn
from torch.nn import functional as F

from coin_ray.config import Clip
from coin_ray.errors import InputError

BACKGROUND = "background"
SCHEMAS = ("local-dir:", "hf-hub:")
"""Beginnings of names that open_clip resolves to an architecture with its weights."""
OPENAI_SIZES = ("input_resolution", "context_length", "vocab_size")
"""Numbers that OpenAI's archives hold beside the weights."""


@dataclass(frozen=True, eq=False)
class ClipModel:
    """``network``: open_clip's CLIP with a ModifiedResNet tower. ``mean`` and ``std``
    [3]: its pixel normalisation of RGB in 0..1.
    """

    network: nn.Module
    tokenize: Callable[[Sequence[str]], Tensor]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @property
    def device(self) -> torch.device:
        return self.network.text_projection.device  # type: ignore[union-attr,return-value]

    @property
    def embedding_size(self) -> int:
        return int(self.network.text_projection.shape[1])  # type: ignore[union-attr,index]

    @property
    def roi_size(self) -> int:
        """Return the side of the pooled map before the last stage with which attention
        pooling has the grid it was trained on.
        """
        size: Any = self.network.visual.image_size  # type: ignore[union-attr]
        side: int = size if isinstance(size, int) else size[0]
        return side // 16


def load_clip(config: Clip) -> ClipModel:
    """Load an open_clip model for inference.

    Warns where nothing tells the activation that weights from a file were trained
    with. Raises InputError if the name, the tag or a file is unknown, if weights can't
    be downloaded, or if the visual tower is not a ModifiedResNet (RN50, RN101, ...).
    """
    name = _register_architecture(config.model)
    try:
        network = _create_network(name, config)
    except (
        RuntimeError,
        OSError,
        ValueError,
        KeyError,
        TypeError,
        pickle.UnpicklingError,
    ) as error:
        weights = config.pretrained
        description = "weights" if _has_schema(name) else f"weights {weights!r}"
        raise InputError(
            f"clip: {description} of {name} could not be loaded"
            f" ({type(error).__name__}: {str(error)[:200]}). Offline? Give"
            " --clip.pretrained the path of a weights file, or train on ImageNet"
            " weights without CLIP: --collect.labeler none --detector.backbone"
            " mobilenet_v2 --detector.background learned --mobilenet.weights FILE"
        ) from error
    if not isinstance(network.visual, ModifiedResNet):
        raise InputError(
            f"clip.model {name}: the detector needs a ModifiedResNet tower (RN50,"
            f" RN101, ...), not {type(network.visual).__name__}"
        )
    mean = getattr(network.visual, "image_mean", None) or open_clip.OPENAI_DATASET_MEAN
    std = getattr(network.visual, "image_std", None) or open_clip.OPENAI_DATASET_STD
    network = network.eval().requires_grad_(False)
    return ClipModel(network, open_clip.get_tokenizer(name), mean, std)


def _create_network(name: str, config: Clip) -> Any:
    quick_gelu = _uses_quick_gelu(name, config)
    if _has_schema(name):
        # without it open_clip starts from random weights where the folder has none
        return open_clip.create_model(
            name, force_quick_gelu=quick_gelu, require_pretrained=True
        )
    if not _is_torchscript(config.pretrained):
        return open_clip.create_model(
            name, pretrained=config.pretrained, force_quick_gelu=quick_gelu
        )
    network = open_clip.create_model(name, force_quick_gelu=quick_gelu)
    archive = torch.jit.load(config.pretrained, map_location="cpu")  # type: ignore[no-untyped-call]
    weights = archive.state_dict()
    for key in (*OPENAI_SIZES, "attn_mask"):
        weights.pop(key, None)
    network.load_state_dict(weights)
    return network.float()


def _has_schema(name: str) -> bool:
    """Tell whether the name is that of a folder or repository for open_clip."""
    return name.startswith(SCHEMAS)


def _is_torchscript(path: str) -> bool:
    """Tell whether a file is a TorchScript archive, as OpenAI publishes its weights."""
    if not os.path.isfile(path) or not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any("/code/" in entry for entry in archive.namelist())


def _register_architecture(model: str) -> str:
    """Return the name under which open_clip knows ``model``; a JSON description is
    registered first. Raises InputError if there is no such file or architecture.
    """
    name = model
    if _has_schema(model):
        return model
    if model.endswith(".json"):
        if not os.path.exists(model):
            raise InputError(
                f"clip.model: no such file {model}; give an open_clip architecture name"
                " or the path of its JSON description"
            )
        open_clip.add_model_config(Path(model))
        name = Path(model).stem
    if name not in open_clip.list_models():
        raise InputError(
            f"clip.model: open_clip has no architecture {name!r}; see"
            " open_clip.list_models(), or give local-dir:FOLDER or hf-hub:REPOSITORY"
        )
    return name


def _uses_quick_gelu(name: str, config: Clip) -> bool:
    """Return whether to force QuickGELU: the weights were trained with it, as OpenAI's
    were, and the architecture's name alone does not say so.

    Raises InputError if ``clip.activation`` contradicts the architecture.
    """
    described = None
    if not _has_schema(name):
        architecture = open_clip.get_model_config(name) or {}
        described = architecture.get("quick_gelu")
    if config.activation == "gelu" and described:
        raise InputError(
            f"clip.activation is gelu, but the architecture {name} has QuickGELU: give"
            " the architecture without it, or --clip.activation auto"
        )
    if config.activation != "auto":
        return config.activation == "quick_gelu"
    tag = (
        {}
        if _has_schema(name)
        else open_clip.get_pretrained_cfg(name, config.pretrained)
    )
    if tag:
        return bool(tag.get("quick_gelu"))
    if _is_torchscript(config.pretrained) and not _has_schema(name):
        return True
    if (
        os.path.isfile(config.pretrained)
        and described is None
        and not _has_schema(name)
    ):
        warnings.warn(
            f"clip.pretrained {config.pretrained}: nothing tells whether these weights"
            " were trained with GELU or QuickGELU; GELU is used. OpenAI's need"
            " --clip.activation quick_gelu; --clip.activation gelu ends this warning",
            stacklevel=2,
        )
    return False


def make_prompts(name: str, config: Clip) -> list[str]:
    """Return all prompts of one class name: the configured templates, or the style
    prompt and OpenAI's 80 with the style inserted.

    As published, the style comes after the first article, or first where there is none:
    "a STYLE bad photo of a {}.", "STYLE graffiti of a {}.".
    """
    if config.templates:
        return [template.format(name) for template in config.templates]
    prompts = [template(name) for template in open_clip.OPENAI_IMAGENET_TEMPLATES]
    if not config.style:
        return [f"{name}.", *prompts]
    styled_prompts = [_insert_style(prompt, config.style) for prompt in prompts]
    return [f"{config.style} {name}.", *styled_prompts]


def _insert_style(prompt: str, style: str) -> str:
    first_word, remainder = prompt.split(" ", 1)
    if first_word in ("a", "the"):
        return f"{first_word} {style} {remainder}"
    return f"{style} {prompt}"


@torch.no_grad()
def class_embeddings(clip: ClipModel, classes: Sequence[str], config: Clip) -> Tensor:
    """Return e_c [K+1, D], unit length, background last: the mean over prompts, each
    normalised first (paper section 3.2).
    """
    network: Any = clip.network
    rows = []
    for name in (*classes, BACKGROUND):
        tokens = clip.tokenize(make_prompts(name, config)).to(clip.device)
        embedded = network.encode_text(tokens).float()
        mean = F.normalize(embedded, dim=-1).mean(0)
        rows.append(F.normalize(mean, dim=0))
    return torch.stack(rows)
