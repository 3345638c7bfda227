"""Steps that an earlier version finished still count: their fingerprints stay the same.

``tests/golden/fingerprints.json`` was written by version f5fc1d4.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from coin_ray.config import Cloud, Ensemble, PipelineConfig, detector_presets, presets
from coin_ray.config.detector_training import DetectorConfig, SourceScenes
from coin_ray.runs import detector_graph, graph
from coin_ray.runs.steps import Step

GOLDEN: dict[str, dict[str, str]] = json.loads(
    (Path(__file__).parents[1] / "golden" / "fingerprints.json").read_text()
)
STUDENTS: tuple[str, ...] = ("faster-rcnn", "co-detr")


def _as_before(config: PipelineConfig) -> PipelineConfig:
    """Return the run without what these versions did not have: a choice between
    students, and first weights of a detector."""
    detector = replace(config.detector, weights="")
    return replace(config, strategy="coin", detector=detector)


def _two_clouds() -> PipelineConfig:
    return replace(
        _as_before(presets.demo()),
        cloud=Cloud(url="https://one", label_map="/no/such/file.yaml"),
        more_clouds=(Cloud(url="https://two", views=("plain", "inverted+reduced")),),
        ensemble=Ensemble(reliability=(1.0, 2.0, 3.0)),
    )


def _from_clip_detector() -> PipelineConfig:
    demo = _as_before(presets.demo())
    distill = replace(demo.distill, start_from="clip_detector", fusion_share=0.5)
    labels = replace(demo.labels, cloud_vectors="one_hot")
    return replace(demo, distill=distill, labels=labels)


def _adaptations() -> Iterator[tuple[str, Mapping[str, Step]]]:
    for name, preset in presets.PRESETS.items():
        for student in STUDENTS:
            config = presets.with_student(_as_before(preset()), student)
            yield f"{name} {student}", graph.build_steps(config, baselines=True)
    yield "demo without baselines", graph.build_steps(_as_before(presets.demo()))
    yield "demo two clouds", graph.build_steps(_two_clouds())
    yield (
        "demo from the CLIP detector",
        graph.build_steps(_from_clip_detector(), baselines=True),
    )


def _with_heads(config: DetectorConfig) -> DetectorConfig:
    return replace(config, ship="heads", data="demo-source")


def _detector_trainings() -> Iterator[tuple[str, Mapping[str, Step]]]:
    for name, preset in detector_presets.DETECTOR_PRESETS.items():
        yield f"detector {name}", detector_graph.build_detector_steps(preset())
        yield (
            f"detector {name} heads demo-source",
            detector_graph.build_detector_steps(
                _with_heads(preset()), SourceScenes(train=7)
            ),
        )
    d_fine = detector_presets.real_time_detector("d-fine", "some/network")
    d_fine = replace(d_fine, data="coco:/no/such", val="/no/val")
    yield "detector d-fine", detector_graph.build_detector_steps(d_fine)


RUNS = {**dict(_adaptations()), **dict(_detector_trainings())}


def test_every_run_of_the_golden_file_is_checked() -> None:
    assert RUNS.keys() == GOLDEN.keys()


@pytest.mark.parametrize("run", RUNS)
def test_fingerprints_are_those_of_the_earlier_version(run: str) -> None:
    fingerprints = {name: step.fingerprint for name, step in RUNS[run].items()}
    assert fingerprints == GOLDEN[run]


@pytest.mark.parametrize("name", ["folder", "laptop"])
def test_choosing_keeps_results_of_all_trainings(name: str) -> None:
    config = presets.PRESETS[name]()
    assert config.strategy == "auto"
    alone = graph.build_steps(replace(config, strategy="coin"), baselines=True)
    steps = graph.build_steps(config)
    assert [step for step in steps if step not in alone] == ["choose"]
    for step in ("images", "collect", "propagate", "separate", "distill"):
        assert steps[step].fingerprint == alone[step].fingerprint
    assert steps["pseudo_label"].fingerprint == alone["pseudo_label"].fingerprint
    assert steps["export"].inputs == (steps["choose"],)
    assert graph.delivered_step(steps).name == "choose"
    assert graph.delivered_step(alone).name == "distill"
