"""From image files through the asking and labelling actors to the tables, with several
clouds; without a cluster."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Sequence
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
from coin_ray.cloud import ensemble
from coin_ray.cloud.client import CloudClient
from coin_ray.config import Cloud, Ensemble, PipelineConfig
from coin_ray.config.presets import folder
from coin_ray.runs.steps import Context
from coin_ray.stages import collect
from coin_ray.stages.collect import LabelerActor, _compile, _doubted, _parts
from coin_ray.stages.collecting.cloud_actor import CloudActor
from coin_ray.stages.collecting.parts import CollectedParts

CLASSES = ("car", "bus", "dog")
CHEAP, DEAR = (
    Cloud(url="https://cheap.example.com", usd_per_call=0.01),
    Cloud(url="https://dear.example.com", usd_per_call=1.0),
)
BOX = [4.0, 4.0, 30.0, 24.0]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Requests by host. The cheap cloud says "car", the dear one "bus"; both take the
    width of the image for their own doing."""
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
        ensemble,
        "CloudClient",
        functools.partial(CloudClient, transport=httpx.MockTransport(reply)),
    )
    return counts


def configuration(mode: str) -> PipelineConfig:
    return replace(
        folder(),
        classes=CLASSES,
        cloud=CHEAP,
        more_clouds=(DEAR,),
        ensemble=Ensemble(mode),
    )  # type: ignore[arg-type]


def clip(image: Tensor, boxes: Tensor) -> Tensor:
    """Sees a dog where the image is green, a car elsewhere."""
    green = image[1].float().mean() > image[0].float().mean()
    return torch.tensor(
        [[0.1, 0.1, 0.7, 0.1] if green else [0.7, 0.1, 0.1, 0.1]]
    ).repeat(len(boxes), 1)


@pytest.fixture
def pictures(tmp_path: Path) -> list[dict[str, str]]:
    """Eight images, three of them green."""
    rows = []
    for i in range(8):
        path = tmp_path / f"{i}.png"
        Image.new(
            "RGB", (60, 40), (10 * i, 200, 0) if i % 3 == 1 else (200, 10 * i, 0)
        ).save(path)
        rows.append({"image_id": str(i), "uri": str(path)})
    return rows


Collect = Callable[..., tuple[list[dict[str, Any]], dict[str, Any]]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Collect:
    """``collect.run`` without its stream: rows of ``cloud.parquet`` and the metrics."""

    def one_pass(
        config: PipelineConfig,
        images: Sequence[dict[str, str]],
        parts: str,
        second: bool,
    ) -> None:
        urls = [cloud.url for cloud in config.clouds]
        place = str(tmp_path / "journal")

        async def ask() -> pa.Table:
            actor = CloudActor(config, urls, place, second)
            return await actor(
                pa.Table.from_pylist(
                    [
                        i
                        for i in images
                        if i["image_id"] not in CollectedParts(parts).answered.to_pylist()
                    ]
                )
            )

        table = asyncio.run(ask())
        LabelerActor(config, parts)(table)

    def run(
        config: PipelineConfig, images: list[dict[str, str]], name: str = "collect"
    ) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        monkeypatch.setattr(collect, "make_labeler", lambda _: clip)
        context = Context(
            config, str(tmp_path), storage.join(str(tmp_path), name), {}, {}, "collect"
        )
        one_pass(config, images, _parts(context.folder), second=False)
        if config.ensemble.mode == "cascade":
            doubted = _doubted(config, CollectedParts(_parts(context.folder))).to_pylist()
            one_pass(
                config,
                [i for i in images if i["image_id"] in doubted],
                _parts(context.folder, second=True),
                second=True,
            )
        metrics = _compile(context, pa.array([i["image_id"] for i in images]))
        return (
            storage.read_table(
                storage.join(context.folder, "cloud.parquet")
            ).to_pylist(),
            metrics,
        )

    return run


def test_a_cascade_asks_twice_where_clip_contradicts(
    run: Collect, asked: dict[str, int], pictures: list[dict[str, str]]
) -> None:
    rows, metrics = run(configuration("cascade"), pictures)
    assert asked == {"cheap.example.com": 8, "dear.example.com": 3}
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
        "cost_usd": pytest.approx(3.08),
    }
    assert metrics["answered_by"] == {"http 1": 8, "http 2": 3}
    assert metrics["second_opinions"] == 3


@pytest.mark.parametrize("mode", ["fuse", "failover", "cascade"])
def test_the_same_from_the_journal(
    run: Collect, asked: dict[str, int], pictures: list[dict[str, str]], mode: str
) -> None:
    rows, metrics = run(configuration(mode), pictures)
    before = dict(asked)
    again, after = run(configuration(mode), pictures, "another")
    assert asked == before
    assert after["calls"] == {"made": 0, "cached": 8, "failed": 0, "cost_usd": 0}
    assert after["boxes"] == metrics["boxes"]
    for column in ("boxes", "scores", "labels", "probs", "prob_source", "source"):
        assert [r[column] for r in again] == [r[column] for r in rows]


def test_fused_rows(
    run: Collect, asked: dict[str, int], pictures: list[dict[str, str]]
) -> None:
    config = replace(configuration("fuse"), ensemble=Ensemble("fuse", (1.0, 3.0)))
    rows, metrics = run(config, pictures)
    assert asked == {"cheap.example.com": 8, "dear.example.com": 8}
    assert metrics["calls"]["cost_usd"] == pytest.approx(8.08)
    assert {tuple(r["labels"]) for r in rows} == {(1,)}
    assert all(
        r["probs"][0][:2]
        == pytest.approx([1 / 3 * r["probs"][0][1], r["probs"][0][1]], rel=0.05)
        for r in rows
    )
    assert {r["prob_source"][0] for r in rows} == {"grouped"}


def test_another_weight_costs_no_call(
    run: Collect, asked: dict[str, int], pictures: list[dict[str, str]]
) -> None:
    run(configuration("fuse"), pictures)
    before = dict(asked)
    rows, _ = run(
        replace(configuration("fuse"), ensemble=Ensemble("fuse", (1.0, 3.0), iou=0.9)),
        pictures,
        "another",
    )
    assert asked == before
    assert rows[0]["scores"] == [pytest.approx(0.6)]


def test_one_cloud_has_no_teachers(
    run: Collect, asked: dict[str, int], pictures: list[dict[str, str]]
) -> None:
    rows, metrics = run(replace(configuration("fuse"), more_clouds=()), pictures)
    assert asked == {"cheap.example.com": 8, "dear.example.com": 0}
    assert {r["source"] for r in rows} == {"cloud"}
    assert set(metrics) == {"calls", "empty", "boxes", "errors"}
