from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from coin_ray.config.co_detr import CoDetr, tiny
from coin_ray.models.co_detr.decoder import Decoder, Queries
from coin_ray.models.co_detr.encoder import (
    Encoder,
    Memory,
    cell_centres,
    padding_masks,
    valid_ratios,
)
from coin_ray.models.co_detr.neck import Neck
from coin_ray.models.co_detr.positions import box_positions, map_positions
from coin_ray.models.co_detr.two_stage import TwoStage, prior_boxes
from models.co_detr.scenes import (
    CLASSES,
    fill_zero_weights,
    new_detr,
    noise_batch,
    rand,
    randn,
)

SMALL = tiny(width=16, heads=4, levels=3, feedforward=24, queries=6)
SIZES = ((64, 96), (50, 70))
SHAPES = ((8, 12), (4, 6), (2, 3))
ATTENTION = {
    "offsets": "sampling_offsets",
    "weights": "attention_weights",
    "value": "value_proj",
    "output": "output_proj",
}


def _random_maps(width: int = 16, seed: int = 0) -> list[Tensor]:
    return [
        randn(2, width, *shape, seed=seed + level) for level, shape in enumerate(SHAPES)
    ]


def _new_encoder() -> Encoder:
    torch.manual_seed(0)
    return fill_zero_weights(Encoder(SMALL))


def _new_decoder(config: CoDetr = SMALL) -> Decoder:
    torch.manual_seed(1)
    return fill_zero_weights(Decoder(config, CLASSES))


def _encode_maps() -> Memory:
    with torch.no_grad():
        encoded: Memory = _new_encoder()(_random_maps(), SIZES)
    return encoded


def _random_queries(count: int = 6, seed: int = 0) -> Queries:
    boxes = torch.cat(
        [rand(2, count, 2, seed=seed), rand(2, count, 2, seed=seed + 1) * 0.4 + 0.1], -1
    )
    return Queries(
        randn(2, count, 16, seed=seed + 2), randn(2, count, 16, seed=seed + 3), boxes
    )


def _transformers_reference() -> Any:
    transformers = pytest.importorskip("transformers")
    config = transformers.DeformableDetrConfig(
        d_model=16,
        num_feature_levels=3,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        encoder_n_points=2,
        decoder_n_points=2,
        dropout=0.0,
        disable_custom_kernels=True,
    )
    return (
        pytest.importorskip(
            "transformers.models.deformable_detr.modeling_deformable_detr"
        ),
        config,
    )


def _copy_weights(reference: Any, pairs: dict[str, nn.Module]) -> None:
    for name, module in pairs.items():
        reference.get_submodule(name).load_state_dict(module.state_dict())


def _shared_layers(layer: Any, attention: str) -> dict[str, nn.Module]:
    pairs = {
        f"{attention}.{name}": getattr(layer.attention, layer_name)
        for layer_name, name in ATTENTION.items()
    }
    norms = {
        f"{attention}_layer_norm": layer.attention_norm,
        "final_layer_norm": layer.feedforward_norm,
    }
    return (
        pairs
        | norms
        | {
            "mlp.fc1": layer.feedforward[0],
            "mlp.fc2": layer.feedforward[2],
        }
    )


def test_positions_equal_transformers() -> None:
    modeling, _ = _transformers_reference()
    (padding,) = padding_masks(SHAPES[:1], SIZES, torch.device("cpu"))
    reference = modeling.DeformableDetrSinePositionEmbedding(8, normalize=True)
    expected = reference(
        torch.Size((2, 16, *SHAPES[0])), "cpu", torch.float32, ~padding
    )
    torch.testing.assert_close(
        map_positions(padding, 16), expected.permute(0, 2, 3, 1), atol=1e-5, rtol=0
    )


def test_the_encoder_equals_transformers_with_the_same_weights() -> None:
    modeling, config = _transformers_reference()
    encoder = _new_encoder().eval()
    reference = modeling.DeformableDetrEncoder(config).eval()
    for encoder_layer, reference_layer in zip(
        encoder.layers, reference.layers, strict=True
    ):
        _copy_weights(reference_layer, _shared_layers(encoder_layer, "self_attn"))
    encoded = encoder(_random_maps(), SIZES)
    paddings = padding_masks(SHAPES, SIZES, torch.device("cpu"))
    positions = torch.cat(
        [
            (map_positions(p, 16) + e).flatten(1, 2)
            for p, e in zip(paddings, encoder.level_embeddings, strict=True)
        ],
        1,
    )
    expected = reference(
        inputs_embeds=torch.cat(
            [m.flatten(2).transpose(1, 2) for m in _random_maps()], 1
        ),
        attention_mask=~encoded.padding,
        spatial_position_embeddings=positions,
        spatial_shapes=torch.tensor(SHAPES),
        spatial_shapes_list=list(SHAPES),
        valid_ratios=encoded.valid_ratios,
    ).last_hidden_state
    assert bool(encoded.padding.any())
    torch.testing.assert_close(encoded.tokens, expected, atol=1e-5, rtol=0)


def test_the_decoder_equals_transformers_with_the_same_weights() -> None:
    modeling, config = _transformers_reference()
    decoder = _new_decoder().eval()
    reference = modeling.DeformableDetrDecoder(config).eval()
    memory = _encode_maps()
    queries = _random_queries()
    for decoder_layer, reference_layer in zip(
        decoder.layers, reference.layers, strict=True
    ):
        attention = decoder_layer.self_attention
        attention_layers = {
            "q_proj": attention.query,
            "k_proj": attention.key,
            "v_proj": attention.value,
            "o_proj": attention.output,
        }
        pairs = _shared_layers(decoder_layer, "encoder_attn") | {
            f"self_attn.{name}": module for name, module in attention_layers.items()
        }
        _copy_weights(
            reference_layer,
            pairs | {"self_attn_layer_norm": decoder_layer.self_attention_norm},
        )
    reference.bbox_embed = decoder.regress
    expected = reference(
        inputs_embeds=queries.content,
        encoder_hidden_states=memory.tokens,
        encoder_attention_mask=~memory.padding,
        object_queries_position_embeddings=queries.positions,
        reference_points=queries.references,
        spatial_shapes=torch.tensor(SHAPES),
        spatial_shapes_list=list(SHAPES),
        valid_ratios=memory.valid_ratios,
    )
    decoded = decoder(queries, memory)
    torch.testing.assert_close(
        decoded.boxes,
        expected.intermediate_reference_points.transpose(0, 1),
        atol=1e-5,
        rtol=0,
    )
    logits = torch.stack(
        [
            classify(h)
            for classify, h in zip(
                decoder.classify,
                expected.intermediate_hidden_states.unbind(1),
                strict=True,
            )
        ]
    )
    torch.testing.assert_close(decoded.logits, logits, atol=1e-5, rtol=0)


def test_the_padding_does_not_change_other_tokens() -> None:
    """A second batch whose maps differ in padded cells only."""
    paddings = padding_masks(SHAPES, SIZES, torch.device("cpu"))
    other = [
        torch.where(p[:, None], torch.tensor(50.0), m)
        for p, m in zip(paddings, _random_maps(), strict=True)
    ]
    first, second = _new_encoder()(_random_maps(), SIZES), _new_encoder()(other, SIZES)
    assert torch.equal(first.tokens[~first.padding], second.tokens[~second.padding])
    assert not torch.equal(first.tokens, second.tokens)
    a = _new_decoder()(_random_queries(), first)
    b = _new_decoder()(_random_queries(), second)
    assert torch.equal(a.boxes, b.boxes)
    assert torch.equal(a.logits, b.logits)


def test_cells_are_padding_from_where_their_image_ends() -> None:
    masks = padding_masks(SHAPES, SIZES, torch.device("cpu"))
    assert [(int((~m[1, :, 0]).sum()), int((~m[1, 0]).sum())) for m in masks] == [
        (7, 9),
        (4, 5),
        (2, 3),
    ]
    assert not any(bool(m[0].any()) for m in masks)


def test_a_place_in_an_image_is_the_same_pixel_on_every_level() -> None:
    valid = valid_ratios(SHAPES, SIZES, torch.device("cpu"))
    for level, (height, width) in enumerate(SHAPES):
        stride = 8 * 2**level
        right_bottom = valid[:, level] * torch.tensor([width * stride, height * stride])
        torch.testing.assert_close(
            right_bottom, torch.tensor([[96.0, 64.0], [70.0, 50.0]])
        )


def test_cell_centres_are_shares_of_the_image_not_of_the_padding() -> None:
    centres = cell_centres(((2, 4),), torch.tensor([[[0.5, 1.0]]]))[0]
    torch.testing.assert_close(centres[:2], torch.tensor([[0.25, 0.25], [0.75, 0.25]]))
    torch.testing.assert_close(centres[4], torch.tensor([0.25, 0.75]))


def test_box_positions_tell_their_four_coordinates_apart() -> None:
    boxes = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.1, 0.2, 0.3, 0.5]])
    first, second = box_positions(boxes, 16)
    assert first.shape == (32,)
    assert torch.equal(first[:24], second[:24])
    assert not torch.equal(first[24:], second[24:])
    torch.testing.assert_close(
        first[:2], torch.tensor([math.sin(0.2 * math.pi), math.cos(0.2 * math.pi)])
    )


def test_the_neck_halves_maps_level_by_level() -> None:
    neck = Neck((8, 12, 16), 32, 5)
    backbone_maps = [
        randn(1, c, side, side)
        for c, side in zip((8, 12, 16), (20, 10, 5), strict=True)
    ]
    assert [tuple(m.shape[1:]) for m in neck(backbone_maps)] == [
        (32, s, s) for s in (20, 10, 5, 3, 2)
    ]


def test_queries_are_the_best_usable_tokens() -> None:
    torch.manual_seed(2)
    stage, memory = fill_zero_weights(TwoStage(SMALL)), _encode_maps()
    proposals = stage(memory)
    for image in range(2):
        usable = proposals.usable[image]
        best = proposals.objectness[image, usable, 0].topk(SMALL.queries).indices
        assert torch.equal(
            proposals.queries.references[image], proposals.boxes[image, usable][best]
        )
    assert not bool((proposals.usable & memory.padding).any())
    assert not proposals.queries.references.requires_grad


def test_fewer_tokens_than_queries_are_all_taken() -> None:
    stage = fill_zero_weights(TwoStage(replace(SMALL, queries=500)))
    assert stage(_encode_maps()).queries.content.shape == (
        2,
        sum(h * w for h, w in SHAPES),
        16,
    )


@pytest.mark.parametrize("mixed", [True, False])
def test_with_mixed_selection_the_content_does_not_depend_on_the_proposals(
    mixed: bool,
) -> None:
    torch.manual_seed(2)
    stage = TwoStage(replace(SMALL, mixed_selection=mixed))
    first = stage.queries_at(_random_queries(seed=1).references)
    second = stage.queries_at(_random_queries(seed=5).references)
    assert torch.equal(first.content, second.content) is mixed
    assert not torch.equal(first.positions, second.positions)


def test_priors_grow_with_the_level_and_stay_off_the_border() -> None:
    boxes, usable = prior_boxes(
        SHAPES, torch.ones(1, 3, 2), torch.zeros(1, 126, dtype=torch.bool)
    )
    assert [round(float(boxes[0, i, 2]), 3) for i in (0, 96, 120)] == [0.05, 0.1, 0.2]
    assert bool(usable.all())
    boxes, usable = prior_boxes(
        ((1, 60),), torch.ones(1, 1, 2), torch.zeros(1, 60, dtype=torch.bool)
    )
    assert usable[0].tolist() == [False] + [True] * 58 + [False]


@pytest.mark.parametrize("twice", [True, False])
def test_a_layers_boxes_train_the_branch_before_only_when_looking_forward_twice(
    twice: bool,
) -> None:
    module = _new_decoder(replace(SMALL, look_forward_twice=twice))
    boxes = module(_random_queries(), _encode_maps()).boxes
    boxes[1].sum().backward()
    before = module.regress[0][4].bias.grad  # type: ignore[index, union-attr]
    assert (before is not None and bool(before.any())) is twice


def test_looking_forward_twice_changes_gradients_and_no_value() -> None:
    once = _new_decoder(replace(SMALL, look_forward_twice=False))
    twice = _new_decoder(replace(SMALL, look_forward_twice=True))
    boxes_once = once(_random_queries(), _encode_maps()).boxes
    boxes_twice = twice(_random_queries(), _encode_maps()).boxes
    assert torch.equal(boxes_once, boxes_twice)


def test_the_order_of_queries_does_not_matter() -> None:
    start, order = _random_queries(), torch.tensor([3, 1, 5, 0, 2, 4])
    shuffled = Queries(
        start.content[:, order], start.positions[:, order], start.references[:, order]
    )
    first = _new_decoder()(start, _encode_maps())
    second = _new_decoder()(shuffled, _encode_maps())
    torch.testing.assert_close(
        first.boxes[:, :, order], second.boxes, atol=1e-6, rtol=0
    )
    torch.testing.assert_close(
        first.logits[:, :, order], second.logits, atol=1e-5, rtol=0
    )


def test_groups_of_queries_do_not_see_each_other_behind_a_mask() -> None:
    first, second = _random_queries(seed=0), _random_queries(seed=9)
    together = Queries(
        *(
            torch.cat([getattr(q, name) for q in (first, second)], 1)
            for name in ("content", "positions", "references")
        )
    )
    mask = torch.block_diag(torch.ones(6, 6), torch.ones(6, 6)).bool().expand(2, -1, -1)
    module, memory = _new_decoder(), _encode_maps()
    decoded = module(together, memory, mask)
    for part, alone in (
        (decoded.select_queries(0, 6), module(first, memory)),
        (decoded.select_queries(6, 12), module(second, memory)),
    ):
        torch.testing.assert_close(part.boxes, alone.boxes, atol=1e-6, rtol=0)
        torch.testing.assert_close(part.logits, alone.logits, atol=1e-6, rtol=1e-6)


def test_the_order_of_images_does_not_matter() -> None:
    model, images = new_detr().eval(), noise_batch(((64, 96), (64, 96)))
    forward = model(images)
    images.pixels.copy_(images.pixels.flip(0))
    backward = model(images)
    torch.testing.assert_close(forward.boxes, backward.boxes.flip(1), atol=1e-5, rtol=0)
