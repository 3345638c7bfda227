from __future__ import annotations

from typing import Any

import pytest
import torch
from builders import CLASSES, tiny_clip
from torch.nn import functional as F

from coin_ray.clip.encoder import BACKGROUND, ClipModel
from coin_ray.clip.prompts import LEAD, LearnedPrompts


@pytest.fixture(scope="module")
def clip() -> ClipModel:
    return tiny_clip()


def test_without_new_vectors_it_is_clips_own_encoding(clip: ClipModel) -> None:
    """One prompt ends at another token than the next: each end must be read at its own
    place."""
    names = ("cat", "traffic light", "a very long name of seven words", "x")
    expected = clip.network.encode_text(
        clip.tokenize([f"{LEAD} {n}." for n in (*names, BACKGROUND)])
    )  # type: ignore[operator]
    torch.testing.assert_close(
        LearnedPrompts(clip, names, 0)(), F.normalize(expected, dim=-1)
    )


def test_names_are_tokenised_whole(clip: ClipModel) -> None:
    prompts = LearnedPrompts(clip, CLASSES, 3)
    tokens = clip.tokenize([f"{LEAD} x x x {n}." for n in (*CLASSES, BACKGROUND)])
    ends = [int((row != 0).sum()) - 1 for row in tokens]
    assert prompts.ends.tolist() == ends == [10, 11, 11, 10]
    token = clip.network.token_embedding  # type: ignore[union-attr]
    for row, end in enumerate(ends):
        assert torch.equal(
            prompts.embedded[row, 8 : end + 1], token(tokens[row, 8 : end + 1])
        )  # type: ignore[operator]


def test_every_token_of_a_name_counts(clip: ClipModel) -> None:
    torch.manual_seed(0)
    embeddings = LearnedPrompts(
        clip, ("traffic light", "traffic sign", "traffic"), 2
    )().detach()
    assert float((embeddings[0] - embeddings[1]).abs().max()) > 1e-3
    assert float((embeddings[0] - embeddings[2]).abs().max()) > 1e-3


def test_lead_and_new_vectors_are_learned_and_nothing_else(clip: ClipModel) -> None:
    prompts = LearnedPrompts(clip, CLASSES, 2)
    assert list(prompts.state_dict()) == ["context"]
    assert [n for n, p in prompts.named_parameters() if p.requires_grad] == ["context"]
    network: Any = clip.network
    lead = network.token_embedding(clip.tokenize([LEAD])[0, 1:5])
    assert torch.equal(prompts.context[:4].detach(), lead)
    prompts()[1].sum().backward()
    assert prompts.context.grad is not None
    assert bool((prompts.context.grad.abs().sum(1) > 0).all())
    assert all(p.grad is None for p in clip.network.parameters())


def test_unit_length_and_background_last(clip: ClipModel) -> None:
    embeddings = LearnedPrompts(clip, CLASSES, 0)()
    assert embeddings.shape == (len(CLASSES) + 1, clip.embedding_size)
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(len(CLASSES) + 1))
    torch.testing.assert_close(
        embeddings[-1], LearnedPrompts(clip, (BACKGROUND,), 0)()[0]
    )


def test_order_of_classes_only_orders_the_rows(clip: ClipModel) -> None:
    """The published code uses the suffix of class 0 for all."""
    forward, backward = (
        LearnedPrompts(clip, CLASSES, 0)(),
        LearnedPrompts(clip, CLASSES[::-1], 0)(),
    )
    torch.testing.assert_close(forward[:-1], backward[:-1].flip(0))
