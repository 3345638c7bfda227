from __future__ import annotations

import asyncio
import base64
import io
import json
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from coin_ray.cloud.accounts import governor_limits
from coin_ray.cloud.adapters.parsing import to_original_frame
from coin_ray.cloud.answer import Answer
from coin_ray.cloud.client import CloudClient
from coin_ray.cloud.ensemble import EnsembleClient, cloud_names, render_for_clouds
from coin_ray.cloud.governor import Governor, LocalGovernor
from coin_ray.cloud.journal.opening import open_journal
from coin_ray.cloud.protocol import Capabilities, Frame
from coin_ray.cloud.renderings import MARGIN, REDUCED, render_image
from coin_ray.cloud.services import shrink_to_limits
from coin_ray.config import (
    RENDERING_OPERATIONS,
    Cloud,
    Ensemble,
    PipelineConfig,
    check_runnable,
)
from coin_ray.config.presets import folder
from coin_ray.data.canonical import CanonicalImage, canonical_image
from coin_ray.errors import BudgetExhausted, ConfigError
from coin_ray.runs.estimate import estimate_cost
from coin_ray.runs.graph import build_steps
from coin_ray.stages.collecting.governors import governors_for

from .conftest import CLASSES, detection_json, response_json

RENDERINGS = st.lists(st.sampled_from(RENDERING_OPERATIONS), unique=True).map(
    lambda names: "+".join(names) or "plain"
)
SMALL = Capabilities(
    "small", open_vocabulary=True, per_class_scores=True, idempotent=True
)
CONFIGURED_RENDERINGS = ("plain", "inverted", "mirrored+reduced")
OBJECT = (6, 10, 26, 30)


def _png(pixels: np.ndarray) -> bytes:
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, "PNG")
    return sink.getvalue()


def _image_with_object(
    width: int = 60, height: int = 40, box: tuple[int, int, int, int] = OBJECT
) -> bytes:
    """Return a grey image with a white object."""
    x0, y0, x1, y1 = box
    pixels = np.full((height, width, 3), 60, np.uint8)
    pixels[y0:y1, x0:x1] = 255
    return _png(pixels)


def _pixels(image: CanonicalImage) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(image.data)).convert("RGB")).astype(int)


def _frame(image: CanonicalImage) -> Frame:
    return Frame(
        (image.width, image.height), image.original, image.visible_size, image.mirrored
    )


def _visible_size(image: CanonicalImage) -> tuple[float, float]:
    return image.visible_size or (image.width, image.height)


def _object_box(pixels: np.ndarray) -> list[int]:
    """Return the box of the pixels much brighter or darker than the upper left corner."""
    brightness = pixels.mean(2)
    rows, columns = np.nonzero(np.abs(brightness - brightness[0, 0]) > 70)
    return [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


@given(RENDERINGS, st.integers(40, 120), st.integers(40, 120), st.data())
def test_a_box_in_a_rendering_maps_to_the_object_in_the_original(
    rendering: str, width: int, height: int, draws: st.DataObject
) -> None:
    """Draw an object, render the image, and search the sent pixels for the object."""
    x = draws.draw(st.integers(4, width - 24))
    y = draws.draw(st.integers(4, height - 24))
    box = (x, y, x + draws.draw(st.integers(8, 20)), y + draws.draw(st.integers(8, 20)))
    image = render_image(_image_with_object(width, height, box), 4096, rendering)
    visible_width, visible_height = map(int, _visible_size(image))
    sent_box = _object_box(_pixels(image)[:visible_height, :visible_width])
    sides = (image.width, image.height) * 2
    ratios = [edge / side for edge, side in zip(sent_box, sides, strict=True)]
    expected = pytest.approx(np.array(box), abs=1.5)
    assert to_original_frame([sent_box], "xyxy", _frame(image))[0] == expected
    assert to_original_frame([ratios], "xyxy_ratio", _frame(image))[0] == expected


@given(RENDERINGS, st.integers(40, 300), st.integers(40, 300), st.integers(100, 200))
def test_no_rendering_is_larger_than_the_service_takes(
    rendering: str, width: int, height: int, max_side: int
) -> None:
    image_file = _image_with_object(width, height, (5, 5, 20, 20))
    image = render_image(image_file, max_side, rendering)
    assert max(image.width, image.height) <= max_side
    assert image.original == (width, height)
    whole = [0, 0, *_visible_size(image)]
    xyxy = to_original_frame([whole], "xyxy", _frame(image))[0]
    assert xyxy == pytest.approx(np.array([0, 0, width, height]), abs=1e-3)


def test_what_the_operations_do() -> None:
    image_file = _image_with_object()
    plain = _pixels(render_image(image_file, 4096, "plain"))
    inverted = _pixels(render_image(image_file, 4096, "inverted"))
    assert plain + inverted == pytest.approx(255, abs=3)
    mirrored = _pixels(render_image(image_file, 4096, "mirrored"))
    assert mirrored[:, ::-1] == pytest.approx(plain, abs=4)
    reduced = render_image(image_file, 4096, "reduced")
    assert (reduced.width, reduced.height) == (90, 60)
    assert reduced.visible_size == (60, 40)
    # a JPEG's blocks lie across the edge
    assert _pixels(reduced)[:40, :60] == pytest.approx(plain, abs=12)
    assert np.abs(_pixels(reduced)[50:, 70:] - MARGIN).max() <= 3
    coloured = np.zeros((40, 60, 3), np.uint8)
    coloured[:, :30, 0] = 200
    grey = _pixels(render_image(_png(coloured), 4096, "grey"))
    assert np.ptp(grey, axis=2).max() == 0
    assert grey[20, 10, 0] == pytest.approx(0.299 * 200, abs=2)


def test_the_plain_rendering_is_the_canonical_image() -> None:
    image_file = _image_with_object(300, 200)
    assert render_image(image_file, 128, "plain") == canonical_image(image_file, 128)


def test_a_file_made_smaller_for_a_service_keeps_its_frame() -> None:
    generator = np.random.default_rng(0)
    image_file = _png(generator.integers(0, 255, (200, 300, 3), np.uint8))
    image = render_image(image_file, 4096, "mirrored+reduced")
    capabilities = replace(SMALL, max_bytes=len(image.data) // 3)
    sent = shrink_to_limits(image, capabilities, 4096)
    assert sent.width < image.width
    assert sent.visible_size is not None
    whole = [0, 0, *sent.visible_size]
    xyxy = to_original_frame([whole], "xyxy", _frame(sent))[0]
    assert xyxy == pytest.approx([0, 0, 300, 200], abs=1e-3)
    assert sent.visible_size[0] * REDUCED == pytest.approx(sent.width, abs=1)


def test_boxes_in_the_margin_are_dropped_and_those_across_it_end_at_the_image() -> None:
    frame = _frame(render_image(_image_with_object(), 4096, "reduced"))
    boxes = to_original_frame([[70, 45, 88, 58], [40, 20, 80, 55]], "xyxy", frame)
    # thinner than a pixel: no detection
    assert (boxes[0, 2:] - boxes[0, :2]).min() == 0
    assert boxes[1].tolist() == [40, 20, 60, 40]


@pytest.mark.parametrize(
    ("views", "message"),
    [
        ((), "at least one"),
        (("upside-down",), "mirrored, grey"),
        (("plain", "plain"), "once"),
        (("plain+grey",), "joined"),
    ],
)
def test_renderings_that_cannot_be(views: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Cloud(url="https://a", views=views)


@pytest.mark.parametrize(
    "twice", [("grey+mirrored", "mirrored+grey"), ("inverted", "inverted")]
)
def test_the_same_rendering_in_other_words_is_not_paid_twice(
    twice: tuple[str, ...],
) -> None:
    with pytest.raises(ConfigError, match="once"):
        Cloud(url="https://a", views=twice)


@pytest.mark.parametrize("mode", ["failover", "cascade"])
def test_renderings_are_fused_or_the_run_does_not_begin(
    tmp_path: Path, mode: str
) -> None:
    config = replace(_config(tmp_path), ensemble=Ensemble(mode=mode))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="views of a cloud are fused"):
        check_runnable(config)


def _config(images: Path, **settings: object) -> PipelineConfig:
    image_settings = replace(folder().data, images=str(images))
    cloud = Cloud(
        url="https://detector.example.com",
        views=CONFIGURED_RENDERINGS,
        **settings,  # type: ignore[arg-type]
    )
    return replace(folder(), classes=CLASSES, data=image_settings, cloud=cloud)


def test_each_rendering_counts_as_a_cloud(tmp_path: Path) -> None:
    config = _config(tmp_path)
    check_runnable(config)
    renderings = [cloud.views for cloud in config.clouds]
    assert renderings == [(rendering,) for rendering in CONFIGURED_RENDERINGS]
    names = cloud_names(config.clouds)
    assert names == ("http", "http inverted", "http mirrored+reduced")


def test_renderings_count_in_the_fingerprint_unless_plain(tmp_path: Path) -> None:
    config = _config(tmp_path)
    plain = replace(config, cloud=replace(config.cloud, views=("plain",)))
    default = replace(config, cloud=Cloud(url="https://detector.example.com"))
    other_iou = replace(config, ensemble=Ensemble(iou=0.4))
    # answers that older versions paid for, before there were renderings, still count
    assert _collect_fingerprint(plain) == _collect_fingerprint(default)
    fingerprints = {_collect_fingerprint(c) for c in (config, plain, other_iou)}
    assert len(fingerprints) == 3


def _collect_fingerprint(config: PipelineConfig) -> str:
    return build_steps(config)["collect"].fingerprint


def test_renderings_share_one_limit_and_one_budget(tmp_path: Path) -> None:
    config = _config(tmp_path, max_calls=5)
    journal = open_journal(str(tmp_path / "journal"))
    governors = governors_for(config, [config.cloud.url] * 3, journal)
    assert len(set(map(id, governors))) == 1


def test_clouds_that_differ_in_more_than_the_rendering_keep_their_own_limits(
    tmp_path: Path,
) -> None:
    config = _config(tmp_path, max_calls=5)
    other = replace(config.cloud, views=("grey",), max_calls=1)
    two_clouds = replace(config, more_clouds=(other,))
    journal = open_journal(str(tmp_path / "journal"))
    governors = governors_for(two_clouds, [config.cloud.url] * 4, journal)
    assert [governors.index(governor) for governor in governors] == [0, 0, 0, 3]


def _detect_dark_object(request: httpx.Request) -> httpx.Response:
    """Answer as a detector of dark objects on light ground; only the inverted rendering
    shows the object so.
    """
    sent = base64.b64decode(json.loads(request.content)["image"]["b64"])
    pixels = np.asarray(Image.open(io.BytesIO(sent)).convert("L")).astype(int)
    height, width = pixels.shape
    box = [int(edge) for edge in _object_box(np.repeat(pixels[:40, :60, None], 3, 2))]
    is_dark = pixels[box[1] + 3, box[0] + 3] < pixels[0, 0]
    detections = [detection_json(CLASSES[0], 0.9, box)] if is_dark else []
    return httpx.Response(
        200, json=response_json(*detections, width=width, height=height)
    )


def _query(config: PipelineConfig, image_file: bytes, tmp_path: Path) -> Answer:
    async def query() -> Answer:
        journal = open_journal(str(tmp_path / "journal"))
        limits = governor_limits(config.cloud)
        governor = LocalGovernor(Governor(limits, journal.spent()))
        transport = httpx.MockTransport(_detect_dark_object)
        clients = [
            CloudClient(
                cloud, CLASSES, cloud.url, journal, governor, transport=transport
            )
            for cloud in config.clouds
        ]
        client = EnsembleClient(clients, cloud_names(config.clouds), config.ensemble)
        return await client.answer(*render_for_clouds(client, image_file))

    return asyncio.run(query())


def test_an_object_that_one_rendering_shows_is_detected(tmp_path: Path) -> None:
    image_file = _image_with_object()
    first = _query(_config(tmp_path), image_file, tmp_path)
    repeated = _query(_config(tmp_path), image_file, tmp_path)
    assert (first.status, first.calls) == ("ok", 3)
    assert (repeated.status, repeated.calls) == ("cached", 0)
    assert first.raw is not None
    assert first.raw.boxes == pytest.approx(np.array([OBJECT]), abs=1.5)
    # one rendering of three showed it
    assert first.raw.class_scores[0, 0] == pytest.approx(0.3)


def test_a_budget_ends_within_an_image_and_nothing_paid_is_lost(tmp_path: Path) -> None:
    image_file = _image_with_object()
    with pytest.raises(BudgetExhausted):
        _query(_config(tmp_path, max_calls=2), image_file, tmp_path)
    assert open_journal(str(tmp_path / "journal")).spent()[0] == 2
    assert _query(_config(tmp_path, max_calls=3), image_file, tmp_path).calls == 1


def test_an_estimate_counts_every_rendering(tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for i in range(4):
        image_file = _image_with_object(box=(6, 10, 26 + i, 30))
        (images / f"{i}.png").write_bytes(image_file)
    config = _config(images, usd_per_call=0.5)
    steps = build_steps(config)
    (estimate,) = estimate_cost(config, steps, str(tmp_path / "root"))
    assert (estimate.cloud, estimate.images, estimate.views) == ("http", 4, 3)
    assert (estimate.calls, estimate.usd) == (12, 6.0)
