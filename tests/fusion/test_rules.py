from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from coin_ray.fusion.rules import (
    FLOOR,
    RULES,
    Annotators,
    average,
    dawid_skene,
    product,
    score_weighted,
)

CLASSES = 4


def _opinions(
    seed: int, rows: int, sharpness: float = 2.0, count: int = 2
) -> list[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [
        (
            sharpness * torch.randn(rows, CLASSES, generator=draw, dtype=torch.float64)
        ).softmax(-1)
        for _ in range(count)
    ]


def _confusion(accuracy: float) -> Tensor:
    """Right with ``accuracy``; mistakes are one class further, as a rule."""
    wrong = torch.eye(CLASSES).double().roll(1, 1) * 0.8 + (
        1 - torch.eye(CLASSES).double()
    ) * 0.2 / (CLASSES - 1)
    names = torch.eye(CLASSES).double() * accuracy + (1 - accuracy) * wrong
    return names / names.sum(1, keepdim=True)


def _annotated(
    *confusions: Tensor, count: int = 4000, seed: int = 0
) -> tuple[Tensor, list[Tensor]]:
    """Truth [N] and each annotator's sure opinion [N, C]; classes aren't equally
    frequent."""
    torch.manual_seed(seed)
    truth = torch.multinomial(
        torch.tensor([0.4, 0.3, 0.2, 0.1]), count, replacement=True
    )
    return truth, [
        F.one_hot(torch.multinomial(table[truth], 1)[:, 0], CLASSES).double()
        for table in confusions
    ]


def _right(opinion: Tensor, truth: Tensor) -> float:
    return float((opinion.argmax(-1) == truth).double().mean())


rules = pytest.mark.parametrize("rule", [*RULES, "dawid_skene"])


def _fused(rule: str, cloud: Tensor, clip: Tensor) -> Tensor:
    return (
        RULES[rule](cloud, clip)
        if rule in RULES
        else dawid_skene(cloud, clip).posterior(cloud, clip)
    )


@rules
@given(seed=st.integers(0, 10_000), rows=st.integers(0, 6), sharpness=st.floats(0, 30))
def test_fused_rows_are_probabilities(
    rule: str, seed: int, rows: int, sharpness: float
) -> None:
    probs = _fused(rule, *_opinions(seed, rows, sharpness))
    assert probs.shape == (rows, CLASSES)
    assert bool((probs >= 0).all())
    torch.testing.assert_close(probs.sum(-1), torch.ones(rows, dtype=torch.float64))


@rules
@given(seed=st.integers(0, 10_000), order=st.permutations(range(CLASSES)))
def test_no_class_is_special(rule: str, seed: int, order: list[int]) -> None:
    cloud, clip = _opinions(seed, 5)
    torch.testing.assert_close(
        _fused(rule, cloud[:, order], clip[:, order]),
        _fused(rule, cloud, clip)[:, order],
        atol=1e-6,
        rtol=1e-6,
    )


@pytest.mark.parametrize("rule", [average, score_weighted, product])
@given(seed=st.integers(0, 10_000))
def test_neither_teacher_is_special(rule: object, seed: int) -> None:
    cloud, clip = _opinions(seed, 5)
    torch.testing.assert_close(rule(cloud, clip), rule(clip, cloud))  # type: ignore[operator]


@given(seed=st.integers(0, 10_000))
def test_the_surer_teacher_counts_more(seed: int) -> None:
    cloud, clip = _opinions(seed, 20)
    weighted = score_weighted(cloud, clip)
    confident = torch.where(
        (cloud.max(-1).values > clip.max(-1).values)[:, None], cloud, clip
    )
    assert bool(
        (
            (weighted - confident).norm(dim=-1)
            <= (average(cloud, clip) - confident).norm(dim=-1) + 1e-12
        ).all()
    )


@given(seed=st.integers(0, 10_000))
def test_product_is_surer_where_both_agree(seed: int) -> None:
    cloud, clip = _opinions(seed, 20)
    clip = torch.where((clip.argmax(-1) == cloud.argmax(-1))[:, None], clip, cloud)
    joint = product(cloud, clip)
    assert bool((joint.argmax(-1) == cloud.argmax(-1)).all())
    assert bool(
        (
            joint.max(-1).values
            >= average(cloud, clip).max(-1).values - CLASSES * FLOOR
        ).all()
    )


def test_product_has_no_veto() -> None:
    """Sure of different classes: undecided between them, and a class nobody can see
    stays small."""
    joint = product(torch.eye(3)[:1], torch.eye(3)[1:2])
    torch.testing.assert_close(
        joint[0, :2], torch.tensor([0.5, 0.5]), atol=FLOOR, rtol=0
    )
    assert 0 < float(joint[0, 2]) <= FLOOR


def test_average_of_sure_teachers_who_disagree_never_reaches_the_published_pi() -> None:
    cloud, clip = torch.eye(CLASSES)[:2]
    assert float(average(cloud, clip).max()) == 0.5 < 0.7


def test_em_recovers_three_annotators() -> None:
    tables = [_confusion(a) for a in (0.9, 0.75, 0.6)]
    truth, votes = _annotated(*tables)
    annotators = dawid_skene(*votes)
    torch.testing.assert_close(
        annotators.confusion, torch.stack(tables), atol=0.08, rtol=0
    )
    torch.testing.assert_close(
        annotators.prior, F.one_hot(truth, CLASSES).double().mean(0), atol=0.03, rtol=0
    )
    assert _right(annotators.posterior(*votes), truth) > max(
        _right(s, truth) for s in votes
    )


def test_two_annotators_who_agree_are_believed() -> None:
    """Disagreements of two can't be settled from the opinions alone, but what both say
    stands."""
    _, votes = _annotated(_confusion(0.9), _confusion(0.7))
    agreed = votes[0].argmax(-1) == votes[1].argmax(-1)
    posterior = dawid_skene(*votes).posterior(*votes)
    assert bool((posterior[agreed].argmax(-1) == votes[0][agreed].argmax(-1)).all())


def test_sure_opinions_give_the_posterior_by_hand() -> None:
    tables = torch.stack([_confusion(0.9), _confusion(0.6)])
    prior = torch.tensor([0.4, 0.3, 0.2, 0.1]).double()
    by_hand = prior * tables[0][:, 2] * tables[1][:, 0]
    posterior = Annotators(prior, tables).posterior(
        torch.eye(CLASSES).double()[2:3], torch.eye(CLASSES).double()[:1]
    )
    torch.testing.assert_close(posterior[0], by_hand / by_hand.sum())


def test_without_boxes_only_the_prior_is_left() -> None:
    no_opinions = torch.zeros(0, CLASSES)
    annotators = dawid_skene(no_opinions, no_opinions)
    assert bool((annotators.confusion.argmax(-1) == torch.arange(CLASSES)).all())
    assert annotators.posterior(no_opinions, no_opinions).shape == (0, CLASSES)
