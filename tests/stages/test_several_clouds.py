"""From image files through the cloud actor and the labeler to the tables, with several
clouds; without a cluster."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pyarrow as pa
import pytest
import torch
from PIL import Image
from torch import Tensor

from coin_ray import storage
from coin_ray.clip.crops import ImageBoxes
from coin_ray.cloud import question_client
from coin_ray.cloud.client import CloudClient
from coin_ray.config import Cloud, Ensemble, PipelineConfig
from coin_ray.config.presets import folder
from coin_ray.runs.steps import Context
from coin_ray.stages.collect import _contradicted_images, _merge, _parts_folder
from coin_ray.stages.collecting import labelers
from coin_ray.stages.collecting.labeler_actor import LabelerActor
from coin_ray.stages.collecting.parts import CollectedParts
from tests.cloud_actors import ACTORS, ask_cloud_actors

CLASSES = ("car", "bus", "dog")
CHEAP, DEAR = (
    Cloud(url="https://cheap.example.com", usd_per_call=0.01),
    Cloud(url="https://dear.example.com", usd_per_call=1.0),
)
BOX = [4.0, 4.0, 30.0, 24.0]


@pytest.fixture
def request_counts(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Requests by host. The cheap cloud says "car", the dear one "bus"; both report a
    width of 60, that of the images."""
    counts = {"cheap.example.com": 0, "dear.example.com": 0}

    def reply(request: httpx.Request) -> httpx.Response:
        counts[request.url.host] += 1
        label = "car" if request.url.host.startswith("cheap") else "bus"
        return httpx.Response(
            200,
            json={
                "image": {"w": 60, "h": 40},
                "detections": [{"box": BOX, "label": label, "score": 0.8}],
            },
        )

    monkeypatch.setattr(
        question_client,
        "CloudClient",
        functools.partial(CloudClient, transport=httpx.MockTransport(reply)),
    )
    return counts


def _config(mode: str) -> PipelineConfig:
    return replace(
        folder(),
        classes=CLASSES,
        cloud=CHEAP,
        more_clouds=(DEAR,),
        ensemble=Ensemble(mode),  # type: ignore[arg-type]
    )


class _ColourLabeler:
    """Sees a dog where the image is green, a car elsewhere."""

    def label(self, images: Iterable[ImageBoxes]) -> list[Tensor]:
        by_image = []
        for image, boxes in images:
            is_green = image[1].float().mean() > image[0].float().mean()
            probs = [0.1, 0.1, 0.7, 0.1] if is_green else [0.7, 0.1, 0.1, 0.1]
            by_image.append(torch.tensor([probs]).repeat(len(boxes), 1))
        return by_image


@pytest.fixture
def image_rows(tmp_path: Path) -> list[dict[str, str]]:
    """Eight images, three of them green."""
    rows = []
    for i in range(8):
        path = tmp_path / f"{i}.png"
        colour = (10 * i, 200, 0) if i % 3 == 1 else (200, 10 * i, 0)
        Image.new("RGB", (60, 40), colour).save(path)
        rows.append({"image_id": str(i), "uri": str(path)})
    return rows


Collect = Callable[..., tuple[list[dict[str, Any]], dict[str, Any]]]


@pytest.fixture(params=[1, ACTORS], ids=["one actor", "three actors"])
def collect(
    tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Collect:
    """``collect.run`` without its stream: rows of ``cloud.parquet`` and the metrics."""
    journal = str(tmp_path / "journal")

    def ask_and_label(
        config: PipelineConfig,
        images: Sequence[dict[str, str]],
        parts_folder: str,
        second: bool,
    ) -> None:
        answered_ids = CollectedParts(parts_folder).answered_ids.to_pylist()
        remaining = [row for row in images if row["image_id"] not in answered_ids]
        urls = [cloud.url for cloud in config.clouds]
        answers = ask_cloud_actors(
            request.param, remaining, config, urls, journal, second
        )
        LabelerActor(config, parts_folder)(answers)

    def collect(
        config: PipelineConfig, images: list[dict[str, str]], name: str = "collect"
    ) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        monkeypatch.setattr(labelers, "create_labeler", lambda *_: _ColourLabeler())
        step_folder = storage.join(str(tmp_path), name)
        context = Context(config, str(tmp_path), step_folder, {}, {}, "collect")
        parts_folder = _parts_folder(step_folder)
        ask_and_label(config, images, parts_folder, second=False)
        if config.ensemble.mode == "cascade":
            parts = CollectedParts(parts_folder)
            contradicted = _contradicted_images(config, parts).to_pylist()
            ask_and_label(
                config,
                [row for row in images if row["image_id"] in contradicted],
                _parts_folder(step_folder, second=True),
                second=True,
            )
        metrics = _merge(context, pa.array([row["image_id"] for row in images]))
        table = storage.read_table(storage.join(step_folder, "cloud.parquet"))
        return table.to_pylist(), metrics

    return collect


def test_a_cascade_asks_twice_where_clip_contradicts(
    collect: Collect, request_counts: dict[str, int], image_rows: list[dict[str, str]]
) -> None:
    rows, metrics = collect(_config("cascade"), image_rows)
    assert request_counts == {"cheap.example.com": 8, "dear.example.com": 3}
    assert [r["source"] for r in rows] == [
        "cloud: http 1, http 2" if i % 3 == 1 else "cloud: http 1" for i in range(8)
    ]
    assert [r["scores"] for r in rows] == [
        pytest.approx([0.4 if i % 3 == 1 else 0.8]) for i in range(8)
    ]
    assert metrics["calls"] == {
        "made": 11,
        "cached": 0,
        "failed": 0,
        "maybe_billed": 0,
        "cost_usd": pytest.approx(3.08),
        "root_calls": 11,
        "root_usd": pytest.approx(3.08),
    }
    assert metrics["answered_by"] == {"http 1": 8, "http 2": 3}
    assert metrics["second_opinions"] == 3


@pytest.mark.parametrize("mode", ["fuse", "failover", "cascade"])
def test_the_same_from_the_journal(
    collect: Collect,
    request_counts: dict[str, int],
    image_rows: list[dict[str, str]],
    mode: str,
) -> None:
    rows, metrics = collect(_config(mode), image_rows)
    counts_before = dict(request_counts)
    cached_rows, cached_metrics = collect(_config(mode), image_rows, "another")
    assert request_counts == counts_before
    assert cached_metrics["calls"] == {
        "made": 0,
        "cached": 8,
        "failed": 0,
        "maybe_billed": 0,
        "cost_usd": 0,
        "root_calls": 0,
        "root_usd": 0,
    }
    assert cached_metrics["boxes"] == metrics["boxes"]
    for column in ("boxes", "scores", "labels", "probs", "prob_source", "source"):
        assert [r[column] for r in cached_rows] == [r[column] for r in rows]


def test_fused_rows(
    collect: Collect, request_counts: dict[str, int], image_rows: list[dict[str, str]]
) -> None:
    config = replace(_config("fuse"), ensemble=Ensemble("fuse", (1.0, 3.0)))
    rows, metrics = collect(config, image_rows)
    assert request_counts == {"cheap.example.com": 8, "dear.example.com": 8}
    assert metrics["calls"]["cost_usd"] == pytest.approx(8.08)
    assert {tuple(r["labels"]) for r in rows} == {(1,)}
    assert all(
        r["probs"][0][:2]
        == pytest.approx([1 / 3 * r["probs"][0][1], r["probs"][0][1]], rel=0.05)
        for r in rows
    )
    assert {r["prob_source"][0] for r in rows} == {"grouped"}


def test_another_weight_costs_no_call(
    collect: Collect, request_counts: dict[str, int], image_rows: list[dict[str, str]]
) -> None:
    collect(_config("fuse"), image_rows)
    counts_before = dict(request_counts)
    rows, _ = collect(
        replace(_config("fuse"), ensemble=Ensemble("fuse", (1.0, 3.0), iou=0.9)),
        image_rows,
        "another",
    )
    assert request_counts == counts_before
    assert rows[0]["scores"] == [pytest.approx(0.6)]


def test_one_cloud_has_no_teachers(
    collect: Collect, request_counts: dict[str, int], image_rows: list[dict[str, str]]
) -> None:
    rows, metrics = collect(replace(_config("fuse"), more_clouds=()), image_rows)
    assert request_counts == {"cheap.example.com": 8, "dear.example.com": 0}
    assert {r["source"] for r in rows} == {"cloud"}
    assert set(metrics) == {"calls", "empty", "boxes", "errors"}
