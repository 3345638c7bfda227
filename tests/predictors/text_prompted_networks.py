"""Grounding DINO, MM-Grounding DINO, SAM 3 and OmDet-Turbo with random weights, small
enough for tests.
"""

from __future__ import annotations

from typing import Any

import torch

LETTERS = "abcdefghijklmnopqrstuvwxyz.,"
SYMBOLS = (
    "!",
    *LETTERS,
    *(f"{letter}</w>" for letter in LETTERS),
    "<|startoftext|>",
    "<|endoftext|>",
)
SAM3_SIDE, OMDET_SIDE = 112, 96
WORDS = (
    "cat",
    "traffic",
    "light",
    "stop",
    "sign",
    "t",
    "##shirt",
    "-",
    "shirt",
    "st",
    "bernard",
    "a",
    "photo",
    "of",
)


def _bert_tokenizer() -> Any:
    """Return a tokenizer whose special tokens have BERT's own numbers, which Grounding
    DINO's code expects.
    """
    import transformers

    words = {
        0: "[PAD]",
        100: "[UNK]",
        101: "[CLS]",
        102: "[SEP]",
        103: "[MASK]",
        1012: ".",
        1029: "?",
    }
    words |= dict(enumerate(WORDS, 200))
    vocabulary = {
        words.get(number, f"[unused{number}]"): number for number in range(1030)
    }
    return transformers.BertTokenizerFast(vocab=vocabulary)


def grounding_dino() -> tuple[Any, Any]:
    """Return a model that reads 32 tokens, and its processor."""
    import transformers

    config = transformers.GroundingDinoConfig(**_grounding_settings())
    return _with_processor(transformers.GroundingDinoForObjectDetection(config))


def mm_grounding_dino() -> tuple[Any, Any]:
    """Return a model that reads 32 tokens, and its processor."""
    import transformers

    config = transformers.MMGroundingDinoConfig(**_grounding_settings())
    return _with_processor(transformers.MMGroundingDinoForObjectDetection(config))


def _grounding_settings() -> dict[str, Any]:
    import transformers

    torch.manual_seed(0)
    swin = transformers.SwinConfig(
        image_size=64,
        patch_size=4,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 2, 2],
        window_size=4,
        out_indices=[2, 3, 4],
    )
    bert = transformers.BertConfig(
        vocab_size=1030,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=64,
    )
    return {
        "backbone_config": swin,
        "text_config": bert,
        "num_queries": 12,
        "num_feature_levels": 3,
        "max_text_len": 32,
        "disable_custom_kernels": True,
        "d_model": 32,
        "encoder_layers": 1,
        "decoder_layers": 2,
        "encoder_ffn_dim": 16,
        "decoder_ffn_dim": 16,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
    }


def _with_processor(model: Any) -> tuple[Any, Any]:
    import transformers

    add_noise(model.eval(), 0.2)
    for name, parameter in model.named_parameters():
        if "class_embed" in name:  # MM-Grounding DINO's begins with scores near 0
            parameter.data.zero_()
    images = transformers.GroundingDinoImageProcessor(
        size={"shortest_edge": 64, "longest_edge": 96}
    )
    return model, transformers.GroundingDinoProcessor(images, _bert_tokenizer())


def letter_tokenizer() -> Any:
    """Return a CLIP tokenizer that knows letters alone."""
    import transformers

    return transformers.CLIPTokenizerFast(
        vocab={symbol: number for number, symbol in enumerate(SYMBOLS)},
        merges=[],
        pad_token="!",
    )


def _clip_text(**settings: Any) -> Any:
    import transformers

    return transformers.CLIPTextConfig(
        vocab_size=len(SYMBOLS),
        hidden_size=16,
        intermediate_size=16,
        projection_dim=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        bos_token_id=len(SYMBOLS) - 2,
        eos_token_id=len(SYMBOLS) - 1,
        **settings,
    )


def sam3() -> tuple[Any, Any]:
    """Return a model and its processor."""
    import transformers

    sizes = {"hidden_size": 32, "num_attention_heads": 4, "dropout": 0.0}
    layers = sizes | {"num_layers": 1, "intermediate_size": 16}
    config = transformers.Sam3Config(
        vision_config={
            "fpn_hidden_size": 32,
            "backbone_feature_sizes": [[32, 32], [16, 16], [8, 8]],
            "backbone_config": {
                "model_type": "sam3_vit_model",
                "hidden_size": 32,
                "intermediate_size": 16,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "image_size": SAM3_SIDE,
                "patch_size": 14,
                "pretrain_image_size": 56,
                "window_size": 4,
                "global_attn_indexes": [1],
            },
        },
        text_config=_clip_text(max_position_embeddings=32).to_dict(),
        geometry_encoder_config=layers,
        detr_encoder_config=layers,
        detr_decoder_config=layers | {"num_queries": 10},
        mask_decoder_config=sizes,
    )
    torch.manual_seed(0)
    model = transformers.Sam3Model(config).eval()
    add_noise(model, 0.1)
    images = transformers.Sam3ImageProcessor(
        size={"height": SAM3_SIDE, "width": SAM3_SIDE}
    )
    return model, transformers.Sam3Processor(images, letter_tokenizer())


def omdet_turbo() -> tuple[Any, Any]:
    """Return a model and its processor."""
    import transformers

    swin = transformers.SwinConfig(
        image_size=OMDET_SIDE,
        patch_size=4,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 2, 2],
        window_size=3,
        out_indices=[2, 3, 4],
    )
    config = transformers.OmDetTurboConfig(
        text_config=_clip_text(max_position_embeddings=77),
        backbone_config=swin,
        apply_layernorm_after_vision_backbone=False,
        image_size=OMDET_SIDE,
        disable_custom_kernels=True,
        num_queries=12,
        text_projection_in_dim=16,
        text_projection_out_dim=16,
        class_embed_dim=16,
        task_encoder_hidden_dim=16,
        vision_features_channels=[32, 32, 32],
        encoder_in_channels=[16, 32, 64],
        encoder_hidden_dim=32,
        encoder_dim_feedforward=16,
        encoder_attention_heads=2,
        decoder_hidden_dim=32,
        decoder_dim_feedforward=16,
        decoder_num_layers=2,
        decoder_num_heads=2,
        decoder_num_points=2,
        use_timm_backbone=False,
        backbone=None,
    )
    torch.manual_seed(0)
    model = transformers.OmDetTurboForObjectDetection(config).eval()
    add_noise(model, 0.1)
    images = transformers.DetrImageProcessor(
        size={"height": OMDET_SIDE, "width": OMDET_SIDE}, do_pad=False
    )
    return model, transformers.OmDetTurboProcessor(images, letter_tokenizer())


@torch.no_grad()
def add_noise(model: torch.nn.Module, spread: float) -> None:
    """Spread random weights enough that queries and classes differ."""
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * spread)
