"""RT-DETRv2 and D-FINE with random weights, small enough for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

SIDE = 96


def new_network(model: str, classes: int) -> Any:
    import transformers

    sizes = {
        "encoder_hidden_dim": 32,
        "d_model": 32,
        "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 64,
        "encoder_attention_heads": 4,
    }
    sizes |= {
        "decoder_attention_heads": 4,
        "decoder_layers": 2,
        "num_queries": 20,
        "num_denoising": 10,
        "num_labels": classes,
    }
    lists = {"encoder_in_channels": [32, 48, 64], "decoder_in_channels": [32, 32, 32]}
    stage_names = ["stage2", "stage3", "stage4"]
    torch.manual_seed(0)
    if model == "rt-detr-v2":
        shape = {
            "embedding_size": 16,
            "hidden_sizes": [16, 32, 48, 64],
            "depths": [1, 1, 1, 1],
            "layer_type": "basic",
        }
        resnet = transformers.RTDetrResNetConfig(**shape, out_features=stage_names)
        config = transformers.RTDetrV2Config(
            backbone_config=resnet, freeze_backbone_batch_norms=False, **sizes, **lists
        )
        return transformers.RTDetrV2ForObjectDetection(config)
    stages = {
        "stage_in_channels": [16, 24, 32, 48],
        "stage_mid_channels": [8, 8, 16, 16],
        "stage_out_channels": [24, 32, 48, 64],
    }
    hgnet = transformers.HGNetV2Config(
        stem_channels=[3, 8, 16],
        hidden_sizes=[24, 32, 48, 64],
        embedding_size=16,
        **stages,
        stage_num_blocks=[1] * 4,
        stage_numb_of_layers=[1] * 4,
        out_features=stage_names,
    )
    config = transformers.DFineConfig(
        backbone_config=hgnet, freeze_backbone_batch_norms=False, **sizes, **lists
    )
    return transformers.DFineForObjectDetection(config)


def save_network(folder: Path, model: str, classes: int, **processing: Any) -> str:
    """Save a model and its image processor in a folder, as on the hub."""
    import transformers

    new_network(model, classes).save_pretrained(folder)
    transformers.RTDetrImageProcessor(
        **{"size": {"height": SIDE, "width": SIDE}, **processing}
    ).save_pretrained(folder)
    return str(folder)
