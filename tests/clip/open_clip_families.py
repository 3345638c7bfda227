"""Models of four families of open_clip with random weights, as folders that hold their
preparation of images and their tokenizer.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import torch
from timm.models import eva, register_model
from torch import nn

TEXT = {
    "context_length": 40,
    "vocab_size": 49408,
    "width": 32,
    "heads": 2,
    "layers": 1,
}
OPENAI = {
    "mean": open_clip.OPENAI_DATASET_MEAN,
    "std": open_clip.OPENAI_DATASET_STD,
    "interpolation": "bicubic",
    "resize_mode": "shortest",
}
INCEPTION = {"mean": [0.5] * 3, "std": [0.5] * 3, "resize_mode": "squash"}
FAMILIES: dict[str, dict[str, Any]] = {
    "ViT": {
        "model_cfg": {
            "embed_dim": 32,
            "quick_gelu": True,
            "vision_cfg": {
                "image_size": 48,
                "layers": 2,
                "width": 64,
                "head_width": 32,
                "patch_size": 16,
            },
            "text_cfg": TEXT,
        },
        "preprocess_cfg": OPENAI,
    },
    "SigLIP": {
        "model_cfg": {
            "embed_dim": 64,
            "init_logit_bias": -10,
            "init_logit_scale": 2.5,
            "custom_text": True,
            "vision_cfg": {
                "image_size": 160,
                "timm_model_name": "test_vit3",
                "timm_pool": "map",
                "timm_proj": "linear",
            },
            "text_cfg": {
                **TEXT,
                "vocab_size": 200,
                "hf_tokenizer_name": "in-the-folder",
                "tokenizer_kwargs": {"clean": "canonicalize"},
                "no_causal_mask": True,
                "proj_bias": True,
                "pool_type": "last",
                "norm_kwargs": {"eps": 1e-6},
                "act_kwargs": {"approximate": "tanh"},
            },
        },
        "preprocess_cfg": {**INCEPTION, "interpolation": "bicubic"},
    },
    "PE-Core": {
        "model_cfg": {
            "embed_dim": 32,
            "custom_text": True,
            "vision_cfg": {
                "image_size": 64,
                "timm_model_name": "small_pe_core",
                "timm_pool": "map",
            },
            "text_cfg": TEXT,
        },
        "preprocess_cfg": {**INCEPTION, "interpolation": "bilinear"},
    },
    "MobileCLIP2": {
        "model_cfg": {
            "embed_dim": 32,
            "custom_text": True,
            "vision_cfg": {
                "image_size": 64,
                "timm_model_name": "fastvit_mci0",
                "timm_pool": "avg",
                "timm_proj": None,
            },
            "text_cfg": {**TEXT, "no_causal_mask": True},
        },
        "preprocess_cfg": {
            "mean": [0.0] * 3,
            "std": [1.0] * 3,
            "interpolation": "bilinear",
            "resize_mode": "shortest",
        },
    },
}


@register_model
def small_pe_core(pretrained: bool = False, **options: Any) -> nn.Module:
    """Build PE-Core's tower with two blocks, for images of 64 pixels."""
    return eva.vit_pe_core_tiny_patch16_384(
        pretrained=pretrained, img_size=64, ref_feat_shape=(4, 4), depth=2, **options
    )


def save_family(family: str, folder: Path) -> str:
    """Write a model of the family; return the name that open_clip loads it by."""
    description = FAMILIES[family]
    text = json.dumps(description)
    (folder / "open_clip_config.json").write_text(text)
    if family == "SigLIP":
        _word_tokenizer().save_pretrained(folder)
    torch.manual_seed(0)
    configuration = json.loads(text)["model_cfg"]
    is_custom = configuration.pop("custom_text", False)
    model_class = open_clip.CustomTextCLIP if is_custom else open_clip.CLIP
    network = model_class(**configuration)
    with torch.no_grad():
        for name, weights in network.named_parameters():
            # spread, so that crops and classes differ
            if weights.ndim > 1 and not name.endswith("embedding.weight"):
                weights.mul_(1.5)
    torch.save(network.state_dict(), folder / "open_clip_pytorch_model.bin")
    return f"local-dir:{folder}"


def _word_tokenizer() -> Any:
    transformers = __import__("transformers")
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "photo", "of", "cat"]
    words += [*(f"##{letter}" for letter in letters), *letters[1:]]
    return transformers.BertTokenizerFast(
        vocab={word: number for number, word in enumerate(words)}
    )
