"""The pools of a collection follow the nodes of a cluster."""

from __future__ import annotations

import asyncio
import os
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
import ray
import ray.data
from pretended_nodes import PretendedNodes, count_node_types

from coin_ray.config import PipelineConfig
from coin_ray.config.presets import PRESETS
from coin_ray.stages import collect
from coin_ray.stages.collecting import pools
from coin_ray.stages.common.cluster import ensure_ray

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

FAST_BATCHES = 80
BATCHES = 400
LABEL_SECONDS = 1.0


class SlowingCloudActor:
    """Takes the place of the actor that asks: a cloud that answers at once, and then
    keeps its rate."""

    def __init__(self, *_: object) -> None:
        self.batches = 0

    async def __call__(self, batch: pa.Table) -> pa.Table:
        self.batches += 1
        await asyncio.sleep(0 if self.batches <= FAST_BATCHES else 20)
        return batch


class RecordingLabeler:
    """Takes the place of a labeler, and returns where it ran. The first one can't
    start."""

    def __init__(self, _: object, folder: str) -> None:
        if not os.path.exists(f"{folder}/tried"):
            os.mkdir(f"{folder}/tried")
            raise RuntimeError("this node is being ended")
        self.node_id = ray.get_runtime_context().get_node_id()

    def __call__(self, batch: pa.Table) -> pa.Table:
        time.sleep(LABEL_SECONDS)
        return pa.table({"node": [self.node_id], "process": [os.getpid()]})


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[PretendedNodes]:
    with PretendedNodes() as nodes:
        monkeypatch.setenv("RAY_ADDRESS", nodes.address)
        monkeypatch.setattr(pools, "CLUSTER_FILE", nodes.file)
        ensure_ray()
        yield nodes
        ray.shutdown()


def _collect(config: PipelineConfig, folder: Path) -> Iterator[dict[str, Any]]:
    """Yield where each batch of one image was labelled."""
    context: Any = SimpleNamespace(config=config, root="/root", folder="/root/steps/c")
    images = pa.table(
        {"image_id": [str(n) for n in range(BATCHES)], "uri": [""] * BATCHES}
    )
    answers = collect._ask(context, images, ["http://cloud"], False)
    for batch in collect._label_answers(answers, config, str(folder)):
        yield from batch.to_pylist()


@pytest.fixture
def config(monkeypatch: pytest.MonkeyPatch) -> PipelineConfig:
    """Settings of a collection whose cloud and labelers are stand-ins."""
    monkeypatch.setattr(collect, "CloudActor", SlowingCloudActor)
    monkeypatch.setattr(collect, "LabelerActor", RecordingLabeler)
    preset = PRESETS["demo"]()
    return replace(preset, collect=replace(preset.collect, batch=1))


def test_labelers_follow_the_nodes_and_no_gpu_is_started(
    cluster: PretendedNodes, config: PipelineConfig, tmp_path: Path
) -> None:
    """Begins with a head alone. While the labelers are the bound all of ``label``
    starts."""
    assert count_node_types() == {"head": 1}
    most: Counter[str] = Counter()
    rows: list[dict[str, Any]] = []
    for row in _collect(config, tmp_path):
        most |= count_node_types()
        rows.append(row)
        if len(rows) == FAST_BATCHES:
            break
    assert most == {"head": 1, "label": 2}, "no node with a GPU"
    assert len({row["node"] for row in rows}) == 2
    assert len({row["process"] for row in rows}) == 3, "four CPUs less one"


@pytest.mark.soak
def test_a_node_is_let_go_while_the_cloud_is_the_bound(
    cluster: PretendedNodes, config: PipelineConfig, tmp_path: Path
) -> None:
    """It takes Ray between four and thirteen minutes."""
    has_had_both = False
    for number, _ in enumerate(_collect(config, tmp_path)):
        labels = count_node_types()["label"]
        has_had_both |= labels == 2
        if number >= FAST_BATCHES and labels == 1:
            break
    assert has_had_both
    assert number < BATCHES - 1, "the second node was let go during the collection"
