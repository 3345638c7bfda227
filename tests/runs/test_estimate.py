from __future__ import annotations

import asyncio
import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pyarrow as pa
import pytest
from PIL import Image

from coin_ray import storage
from coin_ray.cloud.accounts import governor_limits
from coin_ray.cloud.client import CloudClient
from coin_ray.cloud.governor import Governor, LocalGovernor
from coin_ray.cloud.journal.opening import open_journal
from coin_ray.config import Cloud, Ensemble, Folder, PipelineConfig
from coin_ray.config.presets import folder
from coin_ray.data.canonical import canonical_image
from coin_ray.runs.estimate import (
    Estimate,
    estimate_cost,
    print_estimate,
    seconds_needed,
)
from coin_ray.runs.graph import build_steps
from coin_ray.tables import IMAGES

DAY = 86_400
ONE, TWO = (
    Cloud(url="https://one.example.com", usd_per_call=0.01, rate=2.0),
    Cloud(url="https://two.example.com", usd_per_call=1.0),
)

NEEDED = [
    (0, 10.0, None, 0, 0),
    (100, 10.0, None, 0, 10),
    (100, 10.0, 100, 0, 10),
    (100, 10.0, 60, 0, DAY + 4),
    (100, 10.0, 60, 20, DAY + 6),
    (100, 10.0, 60, 60, DAY + DAY + 4),
    (100, 10.0, 60, 90, DAY + DAY + 4),
    (100, 10.0, 50, 0, DAY + 5),
    (100, 0.0001, 100, 0, 1_000_000),
    (100, 0.0001, 50, 0, 1_000_000),
]


@pytest.mark.parametrize(("calls", "rate", "per_day", "today", "seconds"), NEEDED)
def test_time(
    calls: int, rate: float, per_day: int | None, today: int, seconds: float
) -> None:
    assert seconds_needed(calls, rate, per_day, today) == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("cloud", "rate"),
    [(Cloud(serve="demo"), 2.0), (Cloud(serve="transformers", model="tiny"), 50.0)],
)
def test_only_an_emulated_cloud_has_an_emulated_latency(
    images: list[Path], tmp_path: Path, cloud: Cloud, rate: float
) -> None:
    config = configuration(tmp_path, replace(cloud, in_flight=4, serve_latency=2.0))
    assert estimate_cost(config, build_steps(config), str(tmp_path / "root"))[
        0
    ].rate == pytest.approx(rate)


def configuration(tmp_path: Path, *clouds: Cloud, mode: str = "fuse") -> PipelineConfig:
    data = Folder(str(tmp_path / "images"))
    ensemble = Ensemble(mode)  # type: ignore[arg-type]
    return replace(
        folder(),
        classes=("car",),
        data=data,
        cloud=clouds[0],
        more_clouds=clouds[1:],
        ensemble=ensemble,
    )


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / "images" / f"{i}.png" for i in range(5)]
    paths[0].parent.mkdir()
    for i, path in enumerate(paths):
        Image.new("RGB", (60, 40), (50 * i, 0, 0)).save(path)
    return paths


def answered(
    config: PipelineConfig, cloud: Cloud, root: Path, paths: list[Path]
) -> None:
    """The run has listed its images, and ``cloud`` was asked about some of them."""

    def reply(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, json={"image": {"w": 60, "h": 40}, "detections": []})

    async def ask() -> None:
        governor = LocalGovernor(Governor(governor_limits(cloud)))
        journal = open_journal(str(root / "journal"))
        client = CloudClient(
            cloud,
            config.classes,
            cloud.url,
            journal,
            governor,
            transport=httpx.MockTransport(reply),
        )
        for path in paths:
            await client.answer(canonical_image(path.read_bytes(), client.max_side))

    asyncio.run(ask())
    step = build_steps(config)["images"]
    every = sorted((root / "images").iterdir())
    rows = [
        {"image_id": p.name, "uri": str(p), "width": 60, "height": 40, "split": "train"}
        for p in every
    ]
    storage.write_table(
        storage.join(step.folder(str(root)), "images.parquet"),
        pa.Table.from_pylist(rows, schema=IMAGES),
    )


def figures(config: PipelineConfig, root: Path) -> list[Estimate]:
    return estimate_cost(config, build_steps(config), str(root))


def test_before_anything_was_asked(tmp_path: Path, images: list[Path]) -> None:
    (found,) = figures(configuration(tmp_path, ONE), tmp_path)
    assert (
        found.cloud,
        found.images,
        found.answered,
        found.calls,
        found.rate,
        found.at_most,
    ) == ("http", 5, 0, 5, 2.0, False)
    assert (found.usd, found.minutes) == pytest.approx((0.05, 5 / 2 / 60))
    assert not (tmp_path / "journal").exists()


@pytest.mark.parametrize(
    ("settings", "minutes"),
    [
        ({"per_minute": 6.0}, 5 / 6),
        ({"rate": 0.01}, 5 / 0.6),
        ({"per_minute": 600.0}, 5 / 120),
    ],
)
def test_limits_of_a_minute(
    tmp_path: Path, images: list[Path], settings: dict[str, Any], minutes: float
) -> None:
    (found,) = figures(configuration(tmp_path, replace(ONE, **settings)), tmp_path)
    assert found.minutes == pytest.approx(minutes)


def test_today_s_calls_count(
    tmp_path: Path, images: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    config = configuration(tmp_path, replace(ONE, per_day=2))
    answered(config, config.cloud, tmp_path, images[:2])
    (found,) = figures(config, tmp_path)
    assert (found.answered, found.calls) == (2, 3)
    assert found.minutes == pytest.approx((2 * DAY + 0.5) / 60)
    print_estimate(config.cloud, found)
    said = capsys.readouterr().out
    assert "5 images, 2 answered already, 3 calls to make, $0.03" in said
    assert "2.0 days at 2 calls/s" in said
    assert "cloud.per_day = 2" in said


def test_each_cloud_has_a_line_of_its_own(
    tmp_path: Path, images: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    config = configuration(tmp_path, ONE, TWO)
    answered(config, ONE, tmp_path, images[:2])
    answered(config, TWO, tmp_path, images[:4])
    found = figures(config, tmp_path)
    assert [(f.cloud, f.answered, f.calls, f.usd, f.at_most) for f in found] == [
        ("http 1", 2, 3, pytest.approx(0.03), False),
        ("http 2", 4, 1, 1.0, False),
    ]
    cascade = figures(configuration(tmp_path, ONE, TWO, mode="cascade"), tmp_path)
    assert [(f.calls, f.at_most) for f in cascade] == [(3, False), (1, True)]
    over = figures(configuration(tmp_path, ONE, TWO, mode="failover"), tmp_path)
    assert [(f.calls, f.at_most) for f in over] == [(1, False), (1, True)]
    print_estimate(TWO, cascade[1])
    assert (
        "http 2: 5 images, 4 answered already, at most 1 calls"
        in capsys.readouterr().out
    )


def test_files_that_are_sent_as_they_are_are_known_without_opening_them(
    tmp_path: Path, images: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the sha256 of their bytes. Where answers are left that no file is known to,
    the others are made ready; here none are."""
    config = configuration(tmp_path, ONE)
    for path in images:
        with Image.open(path) as image:
            image.save(path.with_suffix(".jpg"), subsampling=0)
        path.unlink()
    files = [path.with_suffix(".jpg") for path in images]
    answered(config, config.cloud, tmp_path, files[:3])
    listed = storage.join(
        build_steps(config)["images"].folder(str(tmp_path)), "images.parquet"
    )
    rows = storage.read_table(listed).to_pylist()
    ids = {str(f): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}
    storage.write_table(
        listed,
        pa.Table.from_pylist(
            [r | {"image_id": ids[r["uri"]]} for r in rows], schema=IMAGES
        ),
    )
    monkeypatch.setattr(
        "coin_ray.data.canonical.canonical_image",
        lambda *_: pytest.fail("an image was decoded"),
    )
    (found,) = figures(config, tmp_path)
    assert (found.answered, found.calls) == (3, 2)
