from __future__ import annotations

import pytest
import torch
from builders import Row, separation

from coin_ray.fusion.ckg import ConsistentKnowledge
from coin_ray.training import diagnosis

BOX = (0.0, 0.0, 10.0, 10.0)


def rows(count: int, label: int = 0) -> list[Row]:
    return [(BOX, label, 0.8)] * count


def test_kinds_are_counted_over_the_batch() -> None:
    batch = [separation(rows(2), rows(1), rows(3)), separation(rows(1))]
    found = {name: int(value) for name, value in diagnosis.count_boxes_by_kind(batch).items()}
    assert found == {"count_consistent": 3, "count_inconsistent": 1, "count_private": 3}


def test_whom_ckg_follows() -> None:
    """The cloud says 0, CLIP says 1 of all four boxes; the fused vectors say 0, 1, 2
    and, too softly to pass, 0."""
    disputed = separation(inconsistent=rows(4)).inconsistent
    fused = torch.tensor(
        [[0.9, 0.1, 0, 0], [0.1, 0.9, 0, 0], [0.1, 0.1, 0.8, 0], [0.4, 0.3, 0.3, 0]]
    )
    found = {
        name: float(value)
        for name, value in diagnosis.ckg_agreement_rates(
            fused, disputed, 0.7, len(fused)
        ).items()
    }
    assert found == {
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


def test_a_new_ckg_hardly_looks_at_its_input() -> None:
    """As published: attention over nearly orthogonal prototypes starts almost uniform,
    so the weights of all RoIs are almost the same."""
    torch.manual_seed(0)
    ckg, size = ConsistentKnowledge(64, 3, 8), 64
    features, bank = (
        torch.nn.functional.normalize(torch.randn(n, size), dim=1) for n in (50, 4)
    )
    weights = ckg.weights(features, (bank, bank)).detach()
    assert float(diagnosis.ckg_weight_spread(weights)) < 0.1 * float(weights.abs().mean())


@pytest.mark.parametrize(
    ("misalignment", "degrees"), [(0.0, 0.0), (1.0, 90.0), (2.0, 180.0)]
)
def test_gradient_angle(misalignment: float, degrees: float) -> None:
    assert float(diagnosis.gradient_angle(torch.tensor(misalignment))) == pytest.approx(
        degrees, abs=1e-3
    )
