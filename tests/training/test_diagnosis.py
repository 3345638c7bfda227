from __future__ import annotations

import pytest
import torch
from builders import Row, separation

from coin_ray.fusion.ckg import ConsistentKnowledge
from coin_ray.training import diagnosis

BOX = (0.0, 0.0, 10.0, 10.0)


def _rows(count: int, label: int = 0) -> list[Row]:
    return [(BOX, label, 0.8)] * count


def test_boxes_of_each_kind_are_counted_over_the_batch() -> None:
    batch = [separation(_rows(2), _rows(1), _rows(3)), separation(_rows(1))]
    figures = {
        name: int(figure)
        for name, figure in diagnosis.count_boxes_by_kind(batch).items()
    }
    assert figures == {
        "count_consistent": 3,
        "count_inconsistent": 1,
        "count_private": 3,
    }


def test_inconsistent_agreement_rates() -> None:
    """The cloud labels all four boxes 0, CLIP labels them 1; the fused labels are 0, 1,
    2 and, below the threshold, 0."""
    inconsistent = separation(inconsistent=_rows(4)).inconsistent
    fused = torch.tensor(
        [[0.9, 0.1, 0, 0], [0.1, 0.9, 0, 0], [0.1, 0.1, 0.8, 0], [0.4, 0.3, 0.3, 0]]
    )
    figures = {
        name: float(figure)
        for name, figure in diagnosis.inconsistent_agreement_rates(
            fused, inconsistent, 0.7, len(fused)
        ).items()
    }
    assert figures == {
        "ckg_passing": 0.75,
        "ckg_cloud": 0.5,
        "ckg_clip": 0.25,
        "ckg_neither": 0.25,
    }


def test_spread_is_the_deviation_over_regions() -> None:
    weights = torch.randn(2, 7, 4, generator=torch.Generator().manual_seed(0))
    assert float(diagnosis.ckg_weight_spread(weights)) == pytest.approx(
        float(weights.std(1, correction=0).mean()), rel=1e-5
    )


def test_weights_of_a_new_ckg_hardly_depend_on_its_input() -> None:
    """Attention over nearly orthogonal prototypes starts almost uniform, as published,
    so the weights of all RoIs are almost the same."""
    torch.manual_seed(0)
    ckg, size = ConsistentKnowledge(64, 3, 8), 64
    features, prototypes = (
        torch.nn.functional.normalize(torch.randn(n, size), dim=1) for n in (50, 4)
    )
    weights = ckg.weights(features, (prototypes, prototypes)).detach()
    assert float(diagnosis.ckg_weight_spread(weights)) < 0.1 * float(
        weights.abs().mean()
    )


@pytest.mark.parametrize(
    ("misalignment", "degrees"), [(0.0, 0.0), (1.0, 90.0), (2.0, 180.0)]
)
def test_gradient_angle(misalignment: float, degrees: float) -> None:
    assert float(diagnosis.gradient_angle(torch.tensor(misalignment))) == pytest.approx(
        degrees, abs=1e-3
    )
