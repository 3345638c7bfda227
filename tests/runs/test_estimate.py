from __future__ import annotations

import asyncio
import hashlib
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pyarrow as pa
import pytest
from PIL import Image

from coin_ray import storage
from coin_ray.cloud import renderings
from coin_ray.cloud.accounts import governor_limits
from coin_ray.cloud.client import CloudClient
from coin_ray.cloud.governor import Governor, LocalGovernor
from coin_ray.cloud.journal.opening import open_journal
from coin_ray.config import Cloud, Ensemble, Folder, PipelineConfig
from coin_ray.config.presets import folder
from coin_ray.data.canonical import CanonicalImage, canonical_image
from coin_ray.runs import estimate as estimate_module
from coin_ray.runs.estimate import (
    Estimate,
    estimate_cost,
    print_estimate,
    seconds_needed,
)
from coin_ray.runs.graph import build_steps
from coin_ray.tables import IMAGES

DAY = 86_400
ONE = Cloud(url="https://one.example.com", usd_per_call=0.01, rate=2.0)
TWO = Cloud(url="https://two.example.com", usd_per_call=1.0)

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
def test_duration_within_the_daily_quota(
    calls: int, rate: float, per_day: int | None, today: int, seconds: float
) -> None:
    assert seconds_needed(calls, rate, per_day, today) == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("cloud", "rate"),
    [(Cloud(serve="demo"), 2.0), (Cloud(serve="transformers", model="tiny"), 50.0)],
)
def test_only_an_emulated_cloud_has_an_emulated_latency(
    photo_files: list[Path], tmp_path: Path, cloud: Cloud, rate: float
) -> None:
    config = _configuration(tmp_path, replace(cloud, in_flight=4, serve_latency=2.0))
    (estimate,) = _estimate(config, tmp_path / "root")
    assert estimate.rate == pytest.approx(rate)


def _configuration(
    tmp_path: Path, *clouds: Cloud, mode: str = "fuse"
) -> PipelineConfig:
    ensemble = Ensemble(mode)  # type: ignore[arg-type]
    return replace(
        folder(),
        classes=("car",),
        data=Folder(str(tmp_path / "images")),
        cloud=clouds[0],
        more_clouds=clouds[1:],
        ensemble=ensemble,
    )


@pytest.fixture
def photo_files(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / "images" / f"{i}.png" for i in range(5)]
    paths[0].parent.mkdir()
    for i, path in enumerate(paths):
        Image.new("RGB", (60, 40), (50 * i, 0, 0)).save(path)
    return paths


def _collect(
    config: PipelineConfig, cloud: Cloud, root: Path, paths: list[Path]
) -> None:
    """Write the run's image table, and the answers of ``cloud`` for some images."""

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
    image_files = sorted(paths[0].parent.iterdir())
    rows = [
        {"image_id": p.name, "uri": str(p), "width": 60, "height": 40, "split": "train"}
        for p in image_files
    ]
    storage.write_table(
        storage.join(step.folder(str(root)), "images.parquet"),
        pa.Table.from_pylist(rows, schema=IMAGES),
    )


def _estimate(config: PipelineConfig, root: Path) -> list[Estimate]:
    return estimate_cost(config, build_steps(config), str(root))


def test_before_any_call(tmp_path: Path, photo_files: list[Path]) -> None:
    (estimate,) = _estimate(_configuration(tmp_path, ONE), tmp_path)
    assert (estimate.cloud, estimate.rate) == ("http", 2.0)
    assert (estimate.images, estimate.answered, estimate.calls) == (5, 0, 5)
    assert not estimate.at_most
    assert (estimate.usd, estimate.minutes) == pytest.approx((0.05, 5 / 2 / 60))
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
    tmp_path: Path, photo_files: list[Path], settings: dict[str, Any], minutes: float
) -> None:
    (estimate,) = _estimate(
        _configuration(tmp_path, replace(ONE, **settings)), tmp_path
    )
    assert estimate.minutes == pytest.approx(minutes)


def test_today_s_calls_count(
    tmp_path: Path, photo_files: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    config = _configuration(tmp_path, replace(ONE, per_day=2))
    _collect(config, config.cloud, tmp_path, photo_files[:2])
    (estimate,) = _estimate(config, tmp_path)
    assert (estimate.answered, estimate.calls) == (2, 3)
    assert estimate.minutes == pytest.approx((2 * DAY + 0.5) / 60)
    print_estimate(config.cloud, estimate)
    printed = capsys.readouterr().out
    assert "5 images, 2 answered already, 3 calls to make, $0.03" in printed
    assert "2.0 days at 2 calls/s" in printed
    assert "cloud.per_day = 2" in printed


def test_batches_cost_half_and_take_a_day(
    tmp_path: Path, photo_files: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    cloud = Cloud(service="gemini", batch=True, usd_per_call=0.02, max_usd=0.03)
    (estimate,) = _estimate(_configuration(tmp_path, cloud), tmp_path)
    assert (estimate.calls, estimate.usd) == (5, pytest.approx(0.05))
    print_estimate(cloud, estimate)
    printed = capsys.readouterr().out
    assert "5 calls to make, $0.05 at $0.01 each, in batches, within a day" in printed
    assert "would stop the run after about 3 calls" in printed


def test_each_cloud_has_a_line_of_its_own(
    tmp_path: Path, photo_files: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    config = _configuration(tmp_path, ONE, TWO)
    _collect(config, ONE, tmp_path, photo_files[:2])
    _collect(config, TWO, tmp_path, photo_files[:4])
    estimates = _estimate(config, tmp_path)
    assert [(f.cloud, f.answered, f.calls, f.usd, f.at_most) for f in estimates] == [
        ("http 1", 2, 3, pytest.approx(0.03), False),
        ("http 2", 4, 1, 1.0, False),
    ]
    cascade = _estimate(_configuration(tmp_path, ONE, TWO, mode="cascade"), tmp_path)
    assert [(f.calls, f.at_most) for f in cascade] == [(3, False), (1, True)]
    failover = _estimate(_configuration(tmp_path, ONE, TWO, mode="failover"), tmp_path)
    assert [(f.calls, f.at_most) for f in failover] == [(1, False), (1, True)]
    print_estimate(TWO, cascade[1])
    assert (
        "http 2: 5 images, 4 answered already, at most 1 calls"
        in capsys.readouterr().out
    )


def test_files_that_are_sent_unchanged_are_matched_without_opening_them(
    tmp_path: Path, photo_files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They match by the sha256 of their bytes. Other files are decoded only while there
    are answers that match no file; here there are none."""
    config = _configuration(tmp_path, ONE)
    for path in photo_files:
        with Image.open(path) as image:
            image.save(path.with_suffix(".jpg"), subsampling=0)
        path.unlink()
    files = [path.with_suffix(".jpg") for path in photo_files]
    _collect(config, config.cloud, tmp_path, files[:3])
    image_table = storage.join(
        build_steps(config)["images"].folder(str(tmp_path)), "images.parquet"
    )
    rows = storage.read_table(image_table).to_pylist()
    ids = {str(f): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}
    storage.write_table(
        image_table,
        pa.Table.from_pylist(
            [r | {"image_id": ids[r["uri"]]} for r in rows], schema=IMAGES
        ),
    )
    monkeypatch.setattr(
        "coin_ray.data.canonical.canonical_image",
        lambda *_: pytest.fail("an image was decoded"),
    )
    (estimate,) = _estimate(config, tmp_path)
    assert (estimate.answered, estimate.calls) == (3, 2)


def test_images_that_were_decoded_once_are_known_from_their_size_and_time(
    tmp_path: Path, photo_files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = _configuration(tmp_path, ONE)
    _collect(config, ONE, tmp_path / "root", photo_files[:3])
    (first,) = _estimate(config, tmp_path / "root")
    rendered: list[str] = []

    def render_image(file: bytes, *options: Any) -> CanonicalImage:
        rendered.append(hashlib.sha256(file).hexdigest())
        return canonical_image(file, options[0])

    monkeypatch.setattr(renderings, "render_image", render_image)
    (second,) = _estimate(config, tmp_path / "root")
    assert (first.answered, second.answered) == (3, 3)
    assert not rendered
    Image.new("RGB", (60, 40), (1, 2, 3)).save(photo_files[0])
    os.utime(photo_files[0], (1, 1))
    (third,) = _estimate(config, tmp_path / "root")
    assert third.answered == 2
    assert hashlib.sha256(photo_files[0].read_bytes()).hexdigest() in rendered


def test_a_wrong_digest_on_record_is_only_a_wrong_estimate(
    tmp_path: Path, photo_files: list[Path]
) -> None:
    """No call follows from the digests: collection computes each from its image."""
    config = _configuration(tmp_path, ONE)
    _collect(config, ONE, tmp_path / "root", photo_files[:2])
    _estimate(config, tmp_path / "root")
    file = str(tmp_path / "root" / "sent_digests.parquet")
    table = storage.read_table(file)
    digest = table["digest"][0].as_py()
    column = pa.array([digest] * len(table))
    storage.write_table(file, table.set_column(3, "digest", column))
    (estimate,) = _estimate(config, tmp_path / "root")
    assert estimate.answered == len(table)
    importers = [
        path.name
        for path in Path(estimate_module.__file__).parents[1].rglob("*.py")
        if "sent_digests" in path.read_text() and path.name != "sent_digests.py"
    ]
    assert importers == ["estimate.py"]


def test_a_broken_file_of_digests_is_no_error(
    tmp_path: Path, photo_files: list[Path]
) -> None:
    config = _configuration(tmp_path, ONE)
    _collect(config, ONE, tmp_path / "root", photo_files[:2])
    (tmp_path / "root" / "sent_digests.parquet").write_bytes(b"no table")
    (estimate,) = _estimate(config, tmp_path / "root")
    assert estimate.answered == 2
