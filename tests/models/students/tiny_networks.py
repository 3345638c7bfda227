"""transformers' detectors with random weights, small enough for tests."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SIDE = 96
MODEL_TYPES = ("rt_detr", "rt_detr_v2", "d_fine", "deimv2", "lw_detr", "rf_detr")

REAL_TIME = {
    "encoder_hidden_dim": 32,
    "d_model": 32,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "decoder_layers": 2,
    "num_queries": 20,
    "num_denoising": 10,
    "encoder_in_channels": [32, 48, 64],
    "decoder_in_channels": [32, 32, 32],
    "freeze_backbone_batch_norms": False,
}
GROUPED = {
    "d_model": 32,
    "decoder_layers": 2,
    "decoder_ffn_dim": 32,
    "decoder_self_attention_heads": 4,
    "decoder_cross_attention_heads": 4,
    "decoder_n_points": 2,
    "num_queries": 12,
    "group_detr": 3,
    "dropout": 0.0,
}
HIDDEN = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2}


def tiny_config(model_type: str, classes: int = 3) -> Any:
    """Return the config of a small network of ``model_type``."""
    import transformers

    if model_type in ("lw_detr", "rf_detr"):
        return _grouped_config(model_type, classes)
    backbone = _resnet() if model_type.startswith("rt_detr") else _hgnet()
    config_class = {
        "rt_detr": transformers.RTDetrConfig,
        "rt_detr_v2": transformers.RTDetrV2Config,
        "d_fine": transformers.DFineConfig,
        "deimv2": transformers.Deimv2Config,
    }[model_type]
    return config_class(backbone_config=backbone, num_labels=classes, **REAL_TIME)


def _grouped_config(model_type: str, classes: int) -> Any:
    import transformers

    if model_type == "lw_detr":
        backbone = transformers.LwDetrViTConfig(
            **HIDDEN,
            image_size=SIDE,
            pretrain_image_size=SIDE,
            window_block_indices=[0, 2],
            num_windows=4,
            out_indices=[2, 4],
        )
        return transformers.LwDetrConfig(
            backbone_config=backbone,
            projector_scale_factors=[1.0],
            num_labels=classes,
            **GROUPED,
        )
    backbone = transformers.RfDetrDinov2Config(
        **HIDDEN, image_size=SIDE, patch_size=16, num_windows=2, out_indices=[2, 4]
    )
    return transformers.RfDetrConfig(
        backbone_config=backbone, num_labels=classes, **GROUPED
    )


def _resnet() -> Any:
    import transformers

    return transformers.RTDetrResNetConfig(
        embedding_size=16,
        hidden_sizes=[16, 32, 48, 64],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )


def _hgnet() -> Any:
    import transformers

    return transformers.HGNetV2Config(
        stem_channels=[3, 8, 16],
        hidden_sizes=[24, 32, 48, 64],
        embedding_size=16,
        stage_in_channels=[16, 24, 32, 48],
        stage_mid_channels=[8, 8, 16, 16],
        stage_out_channels=[24, 32, 48, 64],
        stage_num_blocks=[1] * 4,
        stage_numb_of_layers=[1] * 4,
        out_features=["stage2", "stage3", "stage4"],
    )


def tiny_network(model_type: str, classes: int = 3, seed: int = 0) -> Any:
    """Return a network with weights and statistics spread enough that predictions of
    different queries differ. It seeds torch's generator.
    """
    network, generator_state = _cached_network(model_type, classes, seed)
    torch.set_rng_state(generator_state)
    return copy.deepcopy(network)


@cache
def _cached_network(model_type: str, classes: int, seed: int) -> tuple[Any, Tensor]:
    """Return a network, and the state of torch's generator after it was made."""
    import transformers

    torch.manual_seed(seed)
    network = transformers.AutoModelForObjectDetection.from_config(
        tiny_config(model_type, classes)
    )
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad and parameter.dim() > 1:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    _fit_batch_norms(network)
    return network, torch.get_rng_state()


@torch.no_grad()
def _fit_batch_norms(network: Any) -> None:
    norms = [m for m in network.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    network.train()
    network(pixel_values=torch.rand(4, 3, SIDE, SIDE))
    for norm in norms:
        norm.momentum = 0.1
    network.eval()


def tiny_processor(model_type: str, **settings: Any) -> Any:
    """Return the image processor that the hub has for ``model_type``."""
    import transformers

    size = {"height": SIDE, "width": SIDE}
    if model_type == "lw_detr":
        return transformers.DeformableDetrImageProcessor(**{"size": size} | settings)
    if model_type == "rf_detr":
        return transformers.RfDetrImageProcessor(**{"size": size} | settings)
    return transformers.RTDetrImageProcessor(**{"size": size} | settings)


def save_tiny_network(
    folder: Path, model_type: str, classes: tuple[str, ...], **settings: Any
) -> str:
    """Save a network and its image processor in a folder, as on the hub."""
    network = tiny_network(model_type, len(classes))
    network.config.id2label = dict(enumerate(classes))
    network.config.label2id = {name: k for k, name in enumerate(classes)}
    network.save_pretrained(folder)
    tiny_processor(model_type, **settings).save_pretrained(folder)
    return str(folder)
