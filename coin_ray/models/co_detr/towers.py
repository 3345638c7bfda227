"""Backbones by name: each a module with ``channels`` that gives one map for each of the
strides 8, 16, 32.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.error import URLError

import open_clip
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
from coin_ray.models.weight_files import read_tensors

PixelStatistics = tuple[tuple[float, ...], tuple[float, ...]]

TORCHVISION_NAMES = [
    name
    for name in list_models(module=torchvision.models)
    if name.startswith(("resne", "wide_resnet", "swin_")) and "v2" not in name
]


def build_backbone(config: Backbone, *, weights: bool = True) -> nn.Module:
    """Build the backbone with its pretrained weights, or without ``weights`` with
    random ones, to be loaded. Raises InputError with the available names.
    """
    kind, colon, name = config.name.partition(":")
    pretrained = config.weights if weights else ""
    if config.name == "tiny":
        return TinyBackbone()
    if colon and kind == "transformers":
        return TransformersBackbone(name, pretrained)
    if colon and kind == "open_clip":
        return ClipResNet(_clip_visual(name, pretrained), config.frozen_stages)
    if config.name not in TORCHVISION_NAMES:
        raise InputError(
            f"backbone.name: unknown backbone {config.name!r}; expected tiny,"
            f" {', '.join(TORCHVISION_NAMES)}, open_clip:NAME or transformers:NAME"
        )
    if config.name.startswith("swin"):
        swin = get_model(config.name)
        return Swin(swin, _torchvision_weights(config) if weights else {})
    resnet = get_model(config.name, norm_layer=FrozenBatchNorm2d)
    resnet_weights = _torchvision_weights(config) if weights else {}
    return ResidualNet(resnet, resnet_weights, config.frozen_stages)


def pixel_statistics(config: Backbone) -> PixelStatistics:
    """Return mean and deviation of RGB in 0..1 that the backbone's weights were trained
    with.
    """
    if config.name.startswith("open_clip:"):
        return tuple(open_clip.OPENAI_DATASET_MEAN), tuple(open_clip.OPENAI_DATASET_STD)
    return IMAGENET_MEAN, IMAGENET_STD


def describe_backbone(backbone: nn.Module) -> dict[str, Any]:
    """Return what ``rebuild_backbone`` needs beside the settings, as plain data: the
    shapes, where the name alone does not give them without its files.
    """
    if isinstance(backbone, ClipResNet):
        return backbone.shape
    if isinstance(backbone, TransformersBackbone):
        return dict(json.loads(backbone.network.config.to_json_string(use_diff=False)))
    return {}


def rebuild_backbone(config: Backbone, description: Mapping[str, Any]) -> nn.Module:
    """Build a backbone of the same shape without any file of its own; its weights are
    still to be loaded.
    """
    if config.name.startswith("open_clip:"):
        visual = ModifiedResNet(output_dim=1, heads=1, **description)
        return ClipResNet(visual, config.frozen_stages)
    if config.name.startswith("transformers:"):
        return TransformersBackbone("", "", description)
    return build_backbone(config, weights=False)


class ResidualNet(nn.Module):
    """torchvision's ResNet; batch norm statistics, the stem and the first
    ``frozen_stages`` are not trained.
    """

    def __init__(
        self, network: ResNet, weights: Mapping[str, Tensor], frozen_stages: int
    ) -> None:
        super().__init__()
        _load_pretrained(network, weights, ("fc.",))
        self.stem = nn.Sequential(
            network.conv1, network.bn1, network.relu, network.maxpool
        )
        self.stages = nn.ModuleList(
            [network.layer1, network.layer2, network.layer3, network.layer4]
        )
        stage_channels = [_channels(stage) for stage in self.stages]
        self.channels = tuple(stage_channels[1:])
        _freeze([self.stem, *self.stages], frozen_stages)

    def forward(self, pixels: Tensor) -> list[Tensor]:
        return _last_three_maps(self.stem(pixels), self.stages)


class ClipResNet(nn.Module):
    """open_clip's ModifiedResNet without its attention pooling; norms and the first
    ``frozen_stages`` as in ResidualNet.
    """

    def __init__(self, visual: ModifiedResNet, frozen_stages: int) -> None:
        super().__init__()
        self.visual = visual
        visual.attnpool = nn.Identity()
        self.norms = [m for m in visual.modules() if isinstance(m, nn.BatchNorm2d)]
        stages = self._stages()
        self.channels = tuple(int(stage[-1].conv3.out_channels) for stage in stages[1:])
        size = visual.image_size
        self.shape = {
            "layers": [len(stage) for stage in stages],
            "width": int(visual.conv3.out_channels),
            "image_size": int(size if isinstance(size, int) else size[0]),
        }
        visual.requires_grad_(True)
        convolutions = [visual.conv1, visual.conv2, visual.conv3]
        norms = [visual.bn1, visual.bn2, visual.bn3]
        stem = nn.ModuleList(convolutions + norms)
        _freeze([stem, *stages], frozen_stages)
        self.train()

    def train(self, mode: bool = True) -> ClipResNet:
        super().train(mode)
        for norm in self.norms:
            norm.eval()
        return self

    def forward(self, pixels: Tensor) -> list[Tensor]:
        return _last_three_maps(self.visual.stem(pixels), self._stages())

    def _stages(self) -> list[Any]:
        visual = self.visual
        return [visual.layer1, visual.layer2, visual.layer3, visual.layer4]


class Swin(nn.Module):
    """torchvision's Swin, with a layer norm on each map that is returned, as for
    detection.
    """

    def __init__(self, network: SwinTransformer, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        _load_pretrained(network, weights, ("head.",))
        self.features = network.features
        width = int(network.features[0][0].out_channels)
        self.channels = (2 * width, 4 * width, 8 * width)
        self.norms = nn.ModuleList([nn.LayerNorm(c) for c in self.channels])

    def forward(self, pixels: Tensor) -> list[Tensor]:
        features = pixels
        stage_maps = []
        for number, block in enumerate(self.features):
            features = block(features)
            if number in (3, 5, 7):
                stage_maps.append(features)
        return [
            norm(m).permute(0, 3, 1, 2)
            for norm, m in zip(self.norms, stage_maps, strict=True)
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
                "backbone.name transformers:... needs the package transformers: pip"
                " install 'coin-ray[teachers]'"
            ) from error
        stages = ["stage2", "stage3", "stage4"]
        try:
            if description is not None:
                config = AutoConfig.for_model(**description)
                self.network = AutoBackbone.from_config(config)
            elif weights:
                config = AutoConfig.from_pretrained(weights, out_features=stages)
                model_class = MODEL_FOR_BACKBONE_MAPPING[type(config)]
                self.network = model_class.from_pretrained(weights, config=config)
            else:
                config = AutoConfig.from_pretrained(name, out_features=stages)
                self.network = AutoBackbone.from_config(config)
        except (OSError, ValueError, KeyError) as error:
            raise InputError(
                f"backbone transformers:{name}: {str(error)[:300]}. Offline? Give a"
                " folder"
            ) from error
        self.channels = tuple(self.network.channels)

    def forward(self, pixels: Tensor) -> list[Tensor]:
        return list(self.network(pixels).feature_maps)


def _torchvision_weights(config: Backbone) -> Mapping[str, Tensor]:
    """Download or read ``backbone.weights``; no weights if the setting is empty."""
    if not config.weights:
        return {}
    published = get_model_weights(config.name).__members__
    if config.weights in published:
        try:
            weights: Mapping[str, Tensor] = published[config.weights].get_state_dict(
                progress=False, check_hash=True
            )
        except (URLError, OSError) as error:
            raise InputError(
                f"backbone.weights {config.weights} could not be downloaded ({error})."
                " Offline? Give --backbone.weights the path of a file"
            ) from error
        return weights
    if not storage.exists(config.weights):
        raise InputError(
            f"backbone.weights: no such file {config.weights}; give a file or one of"
            f" torchvision's {', '.join(published)}"
        )
    return _read_weights(config.weights)


def _read_weights(uri: str) -> Mapping[str, Tensor]:
    state_dict = read_tensors(storage.read_bytes(uri), f"backbone.weights {uri}")
    if not isinstance(state_dict, dict):
        raise InputError(
            f"backbone.weights {uri}: expected weights by name, got"
            f" {type(state_dict).__name__}"
        )
    return state_dict


def _load_pretrained(
    network: nn.Module, weights: Mapping[str, Tensor], unused: tuple[str, ...]
) -> None:
    """Load ``weights``, if any, except those whose names start with ``unused`` (the
    classifier's). Raises InputError for weights of another network.
    """
    if not weights:
        return
    shapes = {
        name: tensor.shape
        for name, tensor in network.state_dict().items()
        if not name.startswith(unused)
    }
    mismatches = [
        name
        for name, shape in shapes.items()
        if name not in weights or weights[name].shape != shape
    ]
    if mismatches:
        raise InputError(
            f"backbone.weights are of another network: {len(mismatches)} of"
            f" {len(shapes)} tensors are missing or have another shape, for example"
            f" {mismatches[0]}"
        )
    network.load_state_dict({name: weights[name] for name in shapes}, strict=False)


def _freeze(parts: Sequence[nn.Module], stages: int) -> None:
    for part in parts[: stages + 1]:
        part.requires_grad_(False)


def _last_three_maps(stem: Tensor, stages: Iterable[nn.Module]) -> list[Tensor]:
    maps = [stem]
    for stage in stages:
        maps.append(stage(maps[-1]))
    return maps[-3:]


def _channels(stage: nn.Module) -> int:
    last_block = list(stage.children())[-1]
    convolutions = [m for m in last_block.modules() if isinstance(m, nn.Conv2d)]
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
