"""Visual towers by name: each a module with ``channels`` that gives one map for each of
the strides 8, 16, 32.
"""

from __future__ import annotations

import io
import json
import os
import pickle
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.error import URLError

import open_clip
import torch
import torchvision.models
from open_clip.modified_resnet import ModifiedResNet
from torch import Tensor, nn
from torchvision.models import (
    ResNet,
    SwinTransformer,
    get_model,
    get_model_weights,
    list_models,
)
from torchvision.ops import FrozenBatchNorm2d

from coin_ray import storage
from coin_ray.config.co_detr import Backbone
from coin_ray.errors import InputError
from coin_ray.models.co_detr.backbone import TinyBackbone
from coin_ray.models.co_detr.model import IMAGENET_MEAN, IMAGENET_STD

Statistics = tuple[tuple[float, ...], tuple[float, ...]]


def build_backbone(config: Backbone, *, weights: bool = True) -> nn.Module:
    """The tower with its first weights; without ``weights`` random ones, to be loaded.
    Raises InputError with the names there are.
    """
    kind, colon, name = config.name.partition(":")
    if config.name == "tiny":
        return TinyBackbone()
    if colon and kind == "transformers":
        return TransformersBackbone(name, config.weights if weights else "")
    if colon and kind == "open_clip":
        return ClipResNet(
            _clip_visual(name, config.weights if weights else ""), config.frozen_stages
        )
    if config.name not in NAMES:
        raise InputError(
            f"backbone.name: no {config.name!r}; there are tiny, {', '.join(NAMES)},"
            " open_clip:NAME and transformers:NAME"
        )
    if config.name.startswith("swin"):
        return Swin(
            get_model(config.name), _torchvision_weights(config) if weights else {}
        )
    return ResidualNet(
        get_model(config.name, norm_layer=FrozenBatchNorm2d),
        _torchvision_weights(config) if weights else {},
        config.frozen_stages,
    )


def pixel_statistics(config: Backbone) -> Statistics:
    """Mean and deviation of RGB in 0..1 that the tower's weights were trained with."""
    if config.name.startswith("open_clip:"):
        return tuple(open_clip.OPENAI_DATASET_MEAN), tuple(open_clip.OPENAI_DATASET_STD)
    return IMAGENET_MEAN, IMAGENET_STD


def describe(backbone: nn.Module) -> dict[str, Any]:
    """What beside the settings ``rebuild`` needs, as plain data: shapes that the name
    alone doesn't tell where its files are absent.
    """
    if isinstance(backbone, ClipResNet):
        return backbone.shape
    if isinstance(backbone, TransformersBackbone):
        return dict(json.loads(backbone.network.config.to_json_string(use_diff=False)))
    return {}


def rebuild(config: Backbone, description: Mapping[str, Any]) -> nn.Module:
    """A tower of the same shape without any file of its own, its weights still to be
    loaded.
    """
    if config.name.startswith("open_clip:"):
        return ClipResNet(
            ModifiedResNet(output_dim=1, heads=1, **description), config.frozen_stages
        )
    if config.name.startswith("transformers:"):
        return TransformersBackbone("", "", description)
    return build_backbone(config, weights=False)


class ResidualNet(nn.Module):
    """torchvision's ResNet; statistics of batch norms stay as they are, and so do the
    stem and the first ``frozen_stages``.
    """

    def __init__(
        self, network: ResNet, weights: Mapping[str, Tensor], frozen_stages: int
    ) -> None:
        super().__init__()
        _load(network, weights, ("fc.",))
        self.stem = nn.Sequential(
            network.conv1, network.bn1, network.relu, network.maxpool
        )
        self.stages = nn.ModuleList(
            [network.layer1, network.layer2, network.layer3, network.layer4]
        )
        last = [_channels(stage) for stage in self.stages]
        self.channels = tuple(last[1:])
        _freeze([self.stem, *self.stages], frozen_stages)

    def forward(self, pixels: Tensor) -> list[Tensor]:
        return _last_three(self.stem(pixels), self.stages)


class ClipResNet(nn.Module):
    """open_clip's ModifiedResNet without its attention pooling; norms and the first
    ``frozen_stages`` as in ResidualNet.
    """

    def __init__(self, visual: ModifiedResNet, frozen_stages: int) -> None:
        super().__init__()
        self.visual = visual
        visual.attnpool = nn.Identity()
        self.norms = [m for m in visual.modules() if isinstance(m, nn.BatchNorm2d)]
        stages = [visual.layer1, visual.layer2, visual.layer3, visual.layer4]
        self.channels = tuple(int(stage[-1].conv3.out_channels) for stage in stages[1:])
        side = (
            visual.image_size
            if isinstance(visual.image_size, int)
            else visual.image_size[0]
        )
        self.shape = {
            "layers": [len(s) for s in stages],
            "width": int(visual.conv3.out_channels),
            "image_size": int(side),
        }
        visual.requires_grad_(True)
        stem = nn.ModuleList(
            [
                getattr(visual, f"{kind}{i}")
                for kind in ("conv", "bn")
                for i in (1, 2, 3)
            ]
        )
        _freeze([stem, *stages], frozen_stages)
        self.train()

    def train(self, mode: bool = True) -> ClipResNet:
        super().train(mode)
        for norm in self.norms:
            norm.eval()
        return self

    def forward(self, pixels: Tensor) -> list[Tensor]:
        stages = [
            self.visual.layer1,
            self.visual.layer2,
            self.visual.layer3,
            self.visual.layer4,
        ]
        return _last_three(self.visual.stem(pixels), stages)


class Swin(nn.Module):
    """torchvision's Swin, with a layer norm on each map that is given out, as for
    detection.
    """

    def __init__(self, network: SwinTransformer, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        _load(network, weights, ("head.",))
        self.features = network.features
        width = int(network.features[0][0].out_channels)
        self.channels = (2 * width, 4 * width, 8 * width)
        self.norms = nn.ModuleList([nn.LayerNorm(c) for c in self.channels])

    def forward(self, pixels: Tensor) -> list[Tensor]:
        maps, found = pixels, []
        for number, block in enumerate(self.features):
            maps = block(maps)
            if number in (3, 5, 7):
                found.append(maps)
        return [
            norm(m).permute(0, 3, 1, 2)
            for norm, m in zip(self.norms, found, strict=True)
        ]


class TransformersBackbone(nn.Module):
    """A hierarchical backbone of transformers, such as Swin-L: its stages 2, 3 and 4."""

    def __init__(
        self, name: str, weights: str, description: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__()
        try:
            from transformers import AutoBackbone, AutoConfig
            from transformers.models.auto.modeling_auto import (
                MODEL_FOR_BACKBONE_MAPPING,
            )
        except ImportError as error:
            raise InputError(
                "backbone.name transformers:... needs that package: pip install"
                " 'coin-ray[teachers]'"
            ) from error
        stages = ["stage2", "stage3", "stage4"]
        try:
            if description is not None:
                self.network = AutoBackbone.from_config(
                    AutoConfig.for_model(**description)
                )
            elif weights:
                own = AutoConfig.from_pretrained(weights, out_features=stages)
                self.network = MODEL_FOR_BACKBONE_MAPPING[type(own)].from_pretrained(
                    weights, config=own
                )
            else:
                self.network = AutoBackbone.from_config(
                    AutoConfig.from_pretrained(name, out_features=stages)
                )
        except (OSError, ValueError, KeyError) as error:
            raise InputError(
                f"backbone transformers:{name}: {str(error)[:300]}. Offline? Give a"
                " folder"
            ) from error
        self.channels = tuple(self.network.channels)

    def forward(self, pixels: Tensor) -> list[Tensor]:
        return list(self.network(pixels).feature_maps)


NAMES = [
    n
    for n in list_models(module=torchvision.models)
    if n.startswith(("resne", "wide_resnet", "swin_")) and "v2" not in n
]


def _torchvision_weights(config: Backbone) -> Mapping[str, Tensor]:
    if not config.weights:
        return {}
    known = get_model_weights(config.name).__members__
    if config.weights in known:
        try:
            found: Mapping[str, Tensor] = known[config.weights].get_state_dict(
                progress=False, check_hash=True
            )
        except (URLError, OSError) as error:
            raise InputError(
                f"backbone.weights {config.weights} could not be downloaded ({error})."
                " Offline? Give --backbone.weights the path of a file"
            ) from error
        return found
    if not storage.exists(config.weights):
        raise InputError(
            f"backbone.weights: no such file {config.weights}; give a file or one of"
            f" torchvision's {', '.join(known)}"
        )
    try:
        content: Any = torch.load(
            io.BytesIO(storage.read_bytes(config.weights)),
            map_location="cpu",
            weights_only=True,
        )
    except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise InputError(
            f"backbone.weights {config.weights} can't be read: {str(error)[:200]}"
        ) from error
    if not isinstance(content, dict):
        raise InputError(
            f"backbone.weights {config.weights}: expected weights by name, got"
            f" {type(content).__name__}"
        )
    return content


def _load(
    network: nn.Module, weights: Mapping[str, Tensor], unused: tuple[str, ...]
) -> None:
    """Raises InputError for weights of another network; a classifier in them isn't
    needed.
    """
    if not weights:
        return
    own = {
        name: value.shape
        for name, value in network.state_dict().items()
        if not name.startswith(unused)
    }
    wrong = [
        name
        for name, shape in own.items()
        if name not in weights or weights[name].shape != shape
    ]
    if wrong:
        raise InputError(
            f"backbone.weights are of another network: {len(wrong)} of {len(own)}"
            f" tensors are missing or differ, as {wrong[0]}"
        )
    network.load_state_dict({name: weights[name] for name in own}, strict=False)


def _freeze(parts: Sequence[nn.Module], stages: int) -> None:
    for part in parts[: stages + 1]:
        part.requires_grad_(False)


def _last_three(first: Tensor, stages: Iterable[nn.Module]) -> list[Tensor]:
    maps = [first]
    for stage in stages:
        maps.append(stage(maps[-1]))
    return maps[-3:]


def _channels(stage: nn.Module) -> int:
    convolutions = [m for m in stage[-1].modules() if isinstance(m, nn.Conv2d)]  # type: ignore[index]
    return int(convolutions[-1].out_channels)


def _clip_visual(name: str, weights: str) -> ModifiedResNet:
    if name.endswith(".json"):
        if not os.path.exists(name):
            raise InputError(f"backbone.name open_clip:{name}: no such file")
        open_clip.add_model_config(Path(name))
        name = Path(name).stem
    if name not in open_clip.list_models():
        raise InputError(
            f"backbone.name: open_clip has no architecture {name!r}; see"
            " open_clip.list_models()"
        )
    try:
        visual = open_clip.create_model(name, pretrained=weights or None).visual
    except (RuntimeError, OSError, ValueError) as error:
        raise InputError(
            f"backbone.weights {weights!r} of open_clip:{name} could not be loaded:"
            f" {str(error)[:200]}"
        ) from error
    if not isinstance(visual, ModifiedResNet):
        raise InputError(
            f"backbone.name open_clip:{name}: expected a ModifiedResNet (RN50, RN101,"
            f" ...), got {type(visual).__name__}"
        )
    return visual
