"""An open_clip model, loaded by tag or from local files, and its text embeddings."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import open_clip
import torch
from open_clip.modified_resnet import ModifiedResNet
from torch import Tensor, nn
from torch.nn import functional as F

from coin_ray.config import Clip
from coin_ray.errors import InputError

BACKGROUND = "background"


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
        """Side of the pooled map before the last stage, so that attention pooling sees
        the grid it was trained on.
        """
        side = self.network.visual.image_size  # type: ignore[union-attr]
        return (side if isinstance(side, int) else side[0]) // 16  # type: ignore[index,operator,return-value]


def load_clip(config: Clip) -> ClipModel:
    """Load an open_clip model for inference.

    Raises InputError if the name, the tag or a file is unknown, if weights would have
    to be downloaded and can't be, or if the visual tower is not a ModifiedResNet (RN50,
    RN101, ...).
    """
    name = config.model
    if name.endswith(".json"):
        if not os.path.exists(name):
            raise InputError(
                f"clip.model: no such file {name}; give an open_clip architecture name"
                " or the path of its JSON description"
            )
        open_clip.add_model_config(Path(name))
        name = Path(name).stem
    if name not in open_clip.list_models():
        raise InputError(
            f"clip.model: open_clip has no architecture {name!r}; see"
            " open_clip.list_models()"
        )
    try:
        network = open_clip.create_model(
            name,
            pretrained=config.pretrained,
            force_quick_gelu=_quick_gelu(name, config.pretrained),
        )
    except (RuntimeError, OSError, ValueError, pickle.UnpicklingError) as error:
        raise InputError(
            f"clip: weights {config.pretrained!r} of {name} could not be loaded"
            f" ({type(error).__name__}: {str(error)[:200]}). Offline? Give"
            " --clip.pretrained the path of a weights file, or train on ImageNet"
            " weights without CLIP: --collect.labeler none --detector.backbone"
            " mobilenet_v2"
        ) from error
    if not isinstance(network.visual, ModifiedResNet):
        raise InputError(
            f"clip.model {name}: the detector needs a ModifiedResNet tower (RN50,"
            f" RN101, ...), not {type(network.visual).__name__}"
        )
    mean = getattr(network.visual, "image_mean", None) or open_clip.OPENAI_DATASET_MEAN
    std = getattr(network.visual, "image_std", None) or open_clip.OPENAI_DATASET_STD
    return ClipModel(
        network.eval().requires_grad_(False), open_clip.get_tokenizer(name), mean, std
    )


def _quick_gelu(name: str, tag: str) -> bool:
    """Whether weights known by ``tag`` were trained with QuickGELU, as OpenAI's were.
    The architecture's name alone does not say so.
    """
    return bool((open_clip.get_pretrained_cfg(name, tag) or {}).get("quick_gelu"))


def prompts_for(name: str, config: Clip) -> list[str]:
    """All prompts of one class name: the configured templates, or the style prompt and
    OpenAI's 80 with the style put in.

    As published, the style stands behind the first article, or in front where there is
    none: "a STYLE bad photo of a {}.", "STYLE graffiti of a {}.".
    """
    if config.templates:
        return [template.format(name) for template in config.templates]
    plain = [
        f"{name}.",
        *(template(name) for template in open_clip.OPENAI_IMAGENET_TEMPLATES),
    ]
    if not config.style:
        return plain
    return [
        f"{config.style} {plain[0]}",
        *(_styled(prompt, config.style) for prompt in plain[1:]),
    ]


def _styled(prompt: str, style: str) -> str:
    first, rest = prompt.split(" ", 1)
    return f"{first} {style} {rest}" if first in ("a", "the") else f"{style} {prompt}"


@torch.no_grad()
def class_embeddings(clip: ClipModel, classes: Sequence[str], config: Clip) -> Tensor:
    """e_c [K+1, D], unit length, background last: the mean over prompts, each
    normalised first (paper section 3.2).
    """
    rows = []
    for name in (*classes, BACKGROUND):
        tokens = clip.tokenize(prompts_for(name, config)).to(clip.device)
        embedded = F.normalize(clip.network.encode_text(tokens).float(), dim=-1)  # type: ignore[operator]
        rows.append(F.normalize(embedded.mean(0), dim=0))
    return torch.stack(rows)
