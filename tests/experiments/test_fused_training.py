"""What the settings that the grids vary do in a training step."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest
import torch
from builders import (
    distillation,
    examples,
    tiny_config,
    tiny_detector,
    tiny_embeddings,
    tiny_fit,
)

from coin_ray import storage, tables
from coin_ray.config import Distill, Separate
from coin_ray.data.examples import iterate_batches
from coin_ray.errors import ConfigError
from coin_ray.fusion.rules import RULES, dawid_skene
from coin_ray.stages.distill import read_paired_probabilities
from coin_ray.training import diagnosis
from coin_ray.training.distill import Distillation

SUPERVISED = {"anchor_objectness", "anchor_boxes", "consistent", "boxes"}


def _opinions(rows: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(3)
    probabilities = (2 * torch.randn(2, rows, 4, generator=draw)).softmax(-1)
    return probabilities[0], probabilities[1]


@pytest.mark.parametrize("rule", list(RULES))
def test_training_fuses_by_the_named_rule(rule: str) -> None:
    cloud, clip = _opinions()
    torch.testing.assert_close(
        distillation(tiny_fit(), fusion=rule).fusion.fuse(
            torch.zeros(40, 8), cloud, clip
        ),
        RULES[rule](cloud, clip),
    )


def test_training_fuses_by_the_annotators_it_is_given(tmp_path: Path) -> None:
    cloud, clip = _opinions()
    annotators = dawid_skene(cloud, clip)
    config = Distill(
        fit=tiny_fit(steps=1),
        fusion="dawid_skene",
        prototypes_from=0,
        burn_up=0,
        fusion_score_min=0.0,
    )
    task = Distillation(
        tiny_detector(seed=1),
        tiny_detector(),
        tiny_embeddings(),
        config,
        Separate(iou_min=0.2),
        annotators,
    )
    torch.testing.assert_close(
        task.fusion.fuse(torch.zeros(40, 8), cloud, clip),
        annotators.posterior(cloud, clip),
    )
    (batch,) = iterate_batches(
        examples(tmp_path),
        config.fit,
        tiny_config(),
        seed=2,
        first=0,
        rank=0,
        workers=1,
    )
    parts = task.train_step(batch, 0)
    assert bool(torch.isfinite(parts["inconsistent"]))


@pytest.mark.parametrize(
    ("fusion", "with_annotators"), [("dawid_skene", False), ("ckg", True)]
)
def test_annotators_without_their_fusion_and_the_other_way_round_are_an_error(
    fusion: str, with_annotators: bool
) -> None:
    annotators = dawid_skene(*_opinions()) if with_annotators else None
    with pytest.raises(ValueError, match="dawid_skene"):
        Distillation(
            tiny_detector(),
            tiny_detector(),
            tiny_embeddings(),
            Distill(fusion=fusion),
            Separate(),
            annotators,
        )  # type: ignore[arg-type]


@pytest.mark.parametrize("rule", list(RULES))
@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
def test_a_fair_threshold_lets_the_same_share_pass_whatever_the_rule(
    rule: str, share: float
) -> None:
    task = distillation(tiny_fit(), fusion=rule, fusion_share=share)
    fused = RULES[rule](*_opinions())
    passed = fused.max(-1).values >= task.fusion.confidence_threshold(fused)
    assert abs(int(passed.sum()) - 40 * share) <= 1


def test_the_published_threshold_is_the_same_for_all() -> None:
    fused = RULES["average"](*_opinions())
    published = distillation(tiny_fit(), fusion_score_min=0.7).fusion
    assert published.confidence_threshold(fused) == 0.7
    by_share = distillation(tiny_fit(), fusion_score_min=0.7, fusion_share=0.5).fusion
    assert by_share.confidence_threshold(fused[:0]) == 0.7


def test_without_consistent_knowledge_nothing_is_learned_as_ground_truth(
    tmp_path: Path,
) -> None:
    fit = tiny_fit(steps=1)
    (batch,) = iterate_batches(
        examples(tmp_path), fit, tiny_config(), seed=2, first=0, rank=0, workers=1
    )
    parts = distillation(fit, burn_up=0, consistent=0.0).train_step(batch, 0)
    assert {
        name for name, loss in parts.items() if float(loss.detach()) == 0
    } - diagnosis.NAMES == SUPERVISED


@pytest.mark.parametrize(
    "wrong", [{"fusion": "mean"}, {"fusion_share": 0.0}, {"fusion_share": 1.5}]
)
def test_impossible_fusions_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=r"distill\.fusion"):
        Distill(**wrong)  # type: ignore[arg-type]


def test_opinions_are_paired_by_kind(tmp_path: Path) -> None:
    def row(name: str, kinds: list[str]) -> dict[str, object]:
        probs = [[0.1 * (i + 1), 1 - 0.1 * (i + 1)] for i in range(len(kinds))]
        return {
            "image_id": name,
            "boxes": [[0.0] * 4] * len(kinds),
            "kind": kinds,
            "cloud_labels": [0] * len(kinds),
            "clip_labels": [0] * len(kinds),
            "cloud_probs": probs,
            "clip_probs": [p[::-1] for p in probs],
        }

    rows = [
        row("a", ["consistent", "inconsistent", "private"]),
        row("b", []),
        row("c", ["private", "inconsistent"]),
    ]
    for name, some in (("all", rows), ("nothing", rows[1:2])):
        storage.write_table(
            str(tmp_path / name / "separation.parquet"),
            pa.Table.from_pylist(some, schema=tables.SEPARATION),
        )
    cloud, clip = read_paired_probabilities(str(tmp_path / "all"), 1)
    torch.testing.assert_close(cloud[:, 0], torch.tensor([0.1, 0.2, 0.2]))
    torch.testing.assert_close(clip[:, 1], cloud[:, 0])
    assert [
        len(part)
        for part in read_paired_probabilities(
            str(tmp_path / "all"), 1, ("inconsistent",)
        )
    ] == [2, 2]
    assert read_paired_probabilities(str(tmp_path / "nothing"), 1)[0].shape == (0, 2)
