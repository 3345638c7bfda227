"""An open_clip model, loaded by tag or from local files, and its text embeddings."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import open_clip
import torch
from open_clip.modified_resnet import ModifiedResNet
from torch import Tensor, nn
from torch.nn import functional as F

from coin_ray.clip.weights import (
    OPENAI_SIZES,
    has_schema,
    is_torchscript,
    preprocessing_of_file,
    uses_quick_gelu,
)
from coin_ray.config import Clip
from coin_ray.errors import InputError

BACKGROUND = "background"
NEAREST_NAMES = 5
Tokenize = Callable[[Sequence[str]], Tensor]
"""A tokenizer of open_clip: texts to token ids [N, context length]."""
Setting = Literal["clip", "labeler"]
"""The section of the config that a model comes from."""
LOADING_ERRORS = (
    RuntimeError,
    OSError,
    ValueError,
    KeyError,
    TypeError,
    pickle.UnpicklingError,
)
"""What open_clip raises if weights or a tokenizer can't be had."""


@dataclass(frozen=True, eq=False)
class ClipModel:
    """``network``: open_clip's CLIP. ``mean`` and ``std`` [3]: its pixel normalisation of
    RGB in 0..1. ``interpolation``: how its images are resized.
    """

    network: nn.Module
    tokenize: Tokenize
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str = "bicubic"

    @property
    def device(self) -> torch.device:
        return self.network.logit_scale.device  # type: ignore[union-attr,return-value]

    @property
    def has_resnet_tower(self) -> bool:
        """Whether the visual tower is one that the detector and RoI labels can use."""
        return isinstance(self.network.visual, ModifiedResNet)

    @property
    def embedding_size(self) -> int:
        return int(self.network.text_projection.shape[1])  # type: ignore[union-attr,index]

    @property
    def image_size(self) -> tuple[int, int]:
        """Return height and width of the images that the visual tower was trained on."""
        size: Any = self.network.visual.image_size  # type: ignore[union-attr]
        if isinstance(size, int):
            return size, size
        height, width = size
        return int(height), int(width)

    @property
    def roi_size(self) -> int:
        """Return the side of the pooled map before the last stage with which attention
        pooling has the grid it was trained on.
        """
        return self.image_size[0] // 16


def load_clip(config: Clip, setting: Setting = "clip") -> ClipModel:
    """Load an open_clip model with a tower that a detector can use, for inference.

    Raises InputError as ``load_open_clip``, or if the visual tower is not a
    ModifiedResNet (RN50, RN101, ...).
    """
    clip = load_open_clip(config, setting)
    if not clip.has_resnet_tower:
        raise InputError(
            f"{setting}.model {config.model}: the detector and labeler roi need a"
            " ModifiedResNet tower (RN50, RN101, ...), not"
            f" {type(clip.network.visual).__name__}; labeler crop takes any:"
            f" --labeler crop --labeler.model {config.model}"
        )
    return clip


def load_open_clip(config: Clip, setting: Setting = "clip") -> ClipModel:
    """Load any open_clip model for inference.

    Warns where nothing tells the activation that weights from a file were trained
    with. Raises InputError if the name, the tag or a file is unknown, with the nearest
    names, or if weights or tokenizer can't be downloaded. ``setting``: the section of
    the config, for messages.
    """
    name = _register_architecture(config.model, setting)
    pretrained = config.pretrained
    if not has_schema(name):
        pretrained = _check_weights(name, config.pretrained, setting)
    try:
        network = _create_network(name, pretrained, config, setting)
        tokenize = open_clip.get_tokenizer(name)
    except LOADING_ERRORS as error:
        raise InputError(_loading_error(name, pretrained, setting, error)) from error
    preprocessing = open_clip.get_model_preprocess_cfg(network)
    return ClipModel(
        network.eval().requires_grad_(False),
        tokenize,
        preprocessing.get("mean", open_clip.OPENAI_DATASET_MEAN),
        preprocessing.get("std", open_clip.OPENAI_DATASET_STD),
        preprocessing.get("interpolation", "bicubic"),
    )


def _create_network(name: str, pretrained: str, config: Clip, setting: str) -> Any:
    quick_gelu = uses_quick_gelu(name, config, setting)
    if has_schema(name):
        # without it open_clip starts from random weights where the folder has none
        return open_clip.create_model(
            name, force_quick_gelu=quick_gelu, require_pretrained=True
        )
    if is_torchscript(pretrained):
        return _load_openai_archive(name, pretrained, quick_gelu)
    preprocessing: dict[str, Any] = {}
    if os.path.isfile(pretrained):
        preprocessing = preprocessing_of_file(name, pretrained)
    return open_clip.create_model(
        name,
        pretrained=pretrained,
        force_quick_gelu=quick_gelu,
        force_preprocess_cfg=preprocessing,
    )


def _load_openai_archive(name: str, path: str, quick_gelu: bool) -> Any:
    network = open_clip.create_model(name, force_quick_gelu=quick_gelu)
    archive = torch.jit.load(path, map_location="cpu")  # type: ignore[no-untyped-call]
    weights = archive.state_dict()
    for key in (*OPENAI_SIZES, "attn_mask"):
        weights.pop(key, None)
    network.load_state_dict(weights)
    return network.float()


def _loading_error(name: str, pretrained: str, setting: str, error: Exception) -> str:
    description = "weights" if has_schema(name) else f"weights {pretrained!r}"
    return (
        f"{setting}: {description} of {name} could not be loaded"
        f" ({type(error).__name__}: {str(error)[:200]}). Offline? {_advice(setting)}"
    )


def _advice(setting: str) -> str:
    if setting == "clip":
        return (
            "Give --clip.pretrained the path of a weights file, or train on ImageNet"
            " weights without CLIP: --collect.labeler none --detector.backbone"
            " mobilenet_v2 --detector.background learned --mobilenet.weights FILE"
        )
    return (
        "Give --labeler.pretrained the path of a weights file, or --labeler.model"
        " local-dir:FOLDER with the weights and the tokenizer"
    )


def _register_architecture(model: str, setting: str) -> str:
    """Return the name under which open_clip knows ``model``; a JSON description is
    registered first. Raises InputError if there is no such file or architecture.
    """
    name = model
    if has_schema(model):
        return model
    if model.endswith(".json"):
        if not os.path.exists(model):
            raise InputError(
                f"{setting}.model: no such file {model}; give an open_clip architecture"
                " name or the path of its JSON description"
            )
        open_clip.add_model_config(Path(model))
        name = Path(model).stem
    if name not in open_clip.list_models():
        raise InputError(
            f"{setting}.model: open_clip has no architecture {name!r}; nearest:"
            f" {_nearest(name, open_clip.list_models())}. Give one of"
            " open_clip.list_models(), or local-dir:FOLDER or hf-hub:REPOSITORY"
        )
    return name


def _check_weights(name: str, pretrained: str, setting: str) -> str:
    """Return the tag or file of the weights; without one, the only tag there is. Raises
    InputError, with the nearest tags, if open_clip knows none of that name.
    """
    if os.path.isfile(pretrained):
        return pretrained
    tags = open_clip.list_pretrained_tags_by_model(name)
    if pretrained and open_clip.get_pretrained_cfg(name, pretrained):
        return pretrained
    if not pretrained and len(tags) == 1:
        return str(tags[0])
    available = (
        f"its tags are {_nearest(pretrained, tags)}" if tags else "it has no tag"
    )
    problem = "no weights are given"
    if pretrained:
        problem = f"{pretrained!r} is neither a file nor a tag of {name}"
    raise InputError(
        f"{setting}.pretrained: {problem} ({setting}.model {name}); {available}."
        f" {_advice(setting)}"
    )


def _nearest(name: str, names: Sequence[str]) -> str:
    """List the names that are most like ``name``, or the first ones."""
    by_lower_case = {other.lower(): other for other in names}
    similar = get_close_matches(
        name.lower(), list(by_lower_case), n=NEAREST_NAMES, cutoff=0.4
    )
    nearest = [by_lower_case[other] for other in similar] or list(names)[:NEAREST_NAMES]
    return ", ".join(nearest)


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


def count_tokens(tokenize: Any, text: str) -> int:
    """Count the tokens of a text with those of its start and end, without truncation.

    ``tokenize``: open_clip's tokenizer, its own or the one around transformers'.
    """
    if hasattr(tokenize, "tokenizer"):
        clean = getattr(tokenize, "clean_fn", str)
        return len(tokenize.tokenizer(clean(text)).input_ids)
    return len(tokenize.encode(text)) + 2


def check_context(tokenize: Any, texts: Sequence[str]) -> None:
    """Check that the text tower reads each text to its end: open_clip cuts off the rest
    and says nothing. Raises InputError naming the longest text.
    """
    limit = int(tokenize.context_length)
    # a token has at least one byte, so short texts need no count
    candidates = [text for text in texts if len(text.encode()) + 2 > limit]
    if not candidates:
        return
    longest = max(candidates, key=lambda text: count_tokens(tokenize, text))
    count = count_tokens(tokenize, longest)
    if count > limit:
        raise InputError(
            f"the text {longest!r} has {count} tokens, but CLIP's text tower reads"
            f" {limit}: give a shorter class name, --clip.style or --clip.templates"
        )


@torch.no_grad()
def class_embeddings(
    clip: ClipModel,
    classes: Sequence[str],
    config: Clip,
    phrases: Sequence[Sequence[str]] | None = None,
) -> Tensor:
    """Return e_c [K+1, D], unit length, background last: the mean over prompts, each
    normalised first (paper section 3.2).

    ``phrases``: for each class the texts that mean it, all of which are used; None: its
    name. Raises InputError if a prompt is longer than the text tower's context.
    """
    network: Any = clip.network
    texts_by_class = phrases or [(name,) for name in classes]
    prompts_by_class = []
    for texts in (*texts_by_class, (BACKGROUND,)):
        prompts_by_class.append(
            [p for text in texts for p in make_prompts(text, config)]
        )
    for prompts in prompts_by_class:
        check_context(clip.tokenize, prompts)
    rows = []
    for prompts in prompts_by_class:
        tokens = clip.tokenize(prompts).to(clip.device)
        embedded = network.encode_text(tokens).float()
        mean = F.normalize(embedded, dim=-1).mean(0)
        rows.append(F.normalize(mean, dim=0))
    return torch.stack(rows)
