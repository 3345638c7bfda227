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
from coin_ray.stages.collecting.cloud_actor import governors_for

from .conftest import CLASSES

VIEWS = st.lists(st.sampled_from(RENDERING_OPERATIONS), unique=True).map(
    lambda names: "+".join(names) or "plain"
)
SMALL = Capabilities(
    "small", open_vocabulary=True, per_class_scores=True, idempotent=True
)
ASKED = ("plain", "inverted", "mirrored+reduced")


def png(pixels: np.ndarray) -> bytes:
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, "PNG")
    return sink.getvalue()


def with_object(
    width: int, height: int, box: tuple[int, int, int, int], background: int = 60
) -> bytes:
    """A grey image with a white object."""
    pixels = np.full((height, width, 3), background, np.uint8)
    pixels[box[1] : box[3], box[0] : box[2]] = 255
    return png(pixels)


def pixels_of(image: CanonicalImage) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(image.data)).convert("RGB")).astype(int)


def frame_of(image: CanonicalImage) -> Frame:
    return Frame(
        (image.width, image.height), image.original, image.visible_size, image.mirrored
    )


def seen(pixels: np.ndarray) -> list[int]:
    """The box of what is much brighter or darker than the upper left corner."""
    brightness = pixels.mean(2)
    rows, columns = np.nonzero(np.abs(brightness - brightness[0, 0]) > 70)
    return [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


@given(VIEWS, st.integers(40, 120), st.integers(40, 120), st.data())
def test_an_object_seen_in_a_view_is_found_where_it_is(
    view: str, width: int, height: int, data: st.DataObject
) -> None:
    """The image is drawn, shown, and the object looked for in the pixels that are sent."""
    x, y = data.draw(st.integers(4, width - 24)), data.draw(st.integers(4, height - 24))
    box = (x, y, x + data.draw(st.integers(8, 20)), y + data.draw(st.integers(8, 20)))
    image = render_image(with_object(width, height, box), 4096, view)
    shown = image.visible_size or (image.width, image.height)
    found = seen(pixels_of(image)[: int(shown[1]), : int(shown[0])])
    assert to_original_frame([found], "xyxy", frame_of(image))[0] == pytest.approx(
        np.array(box), abs=1.5
    )
    ratio = [
        v / side for v, side in zip(found, (image.width, image.height) * 2, strict=True)
    ]
    assert to_original_frame([ratio], "xyxy_ratio", frame_of(image))[
        0
    ] == pytest.approx(np.array(box), abs=1.5)


@given(VIEWS, st.integers(40, 300), st.integers(40, 300), st.integers(100, 200))
def test_no_view_is_larger_than_the_service_takes(
    view: str, width: int, height: int, max_side: int
) -> None:
    image = render_image(with_object(width, height, (5, 5, 20, 20)), max_side, view)
    assert max(image.width, image.height) <= max_side
    assert image.original == (width, height)
    corner = np.array([[0, 0, *(image.visible_size or (image.width, image.height))]])
    assert to_original_frame(corner.tolist(), "xyxy", frame_of(image))[
        0
    ] == pytest.approx(np.array([0, 0, width, height]), abs=1e-3)


def test_what_the_operations_do() -> None:
    raw = with_object(60, 40, (6, 10, 26, 30))
    plain, inverted = (
        pixels_of(render_image(raw, 4096, "plain")),
        pixels_of(render_image(raw, 4096, "inverted")),
    )
    assert plain + inverted == pytest.approx(255, abs=3)
    assert pixels_of(render_image(raw, 4096, "mirrored"))[:, ::-1] == pytest.approx(
        plain, abs=4
    )
    reduced = render_image(raw, 4096, "reduced")
    assert ((reduced.width, reduced.height), reduced.visible_size) == (
        (90, 60),
        (60, 40),
    )
    # a JPEG's blocks lie across the edge
    assert pixels_of(reduced)[:40, :60] == pytest.approx(plain, abs=12)
    assert np.abs(pixels_of(reduced)[50:, 70:] - MARGIN).max() <= 3
    coloured = np.zeros((40, 60, 3), np.uint8)
    coloured[:, :30, 0] = 200
    grey = pixels_of(render_image(png(coloured), 4096, "grey"))
    assert np.ptp(grey, axis=2).max() == 0
    assert grey[20, 10, 0] == pytest.approx(0.299 * 200, abs=2)


def test_the_plain_view_is_the_image_as_ever() -> None:
    raw = with_object(300, 200, (6, 10, 26, 30))
    assert render_image(raw, 128, "plain") == canonical_image(raw, 128)


def test_a_file_made_smaller_for_a_service_keeps_its_frame() -> None:
    raw = png(np.random.default_rng(0).integers(0, 255, (200, 300, 3), np.uint8))
    image = render_image(raw, 4096, "mirrored+reduced")
    sent = shrink_to_limits(image, replace(SMALL, max_bytes=len(image.data) // 3), 4096)
    assert sent.width < image.width
    assert sent.visible_size is not None
    assert to_original_frame([[0, 0, *sent.visible_size]], "xyxy", frame_of(sent))[
        0
    ] == pytest.approx([0, 0, 300, 200], abs=1e-3)
    assert sent.visible_size[0] * REDUCED == pytest.approx(sent.width, abs=1)


def test_boxes_in_the_margin_are_dropped_and_those_across_it_end_at_the_image() -> None:
    frame = frame_of(
        render_image(with_object(60, 40, (6, 10, 26, 30)), 4096, "reduced")
    )
    found = to_original_frame([[70, 45, 88, 58], [40, 20, 80, 55]], "xyxy", frame)
    # thinner than a pixel: no detection
    assert (found[0, 2:] - found[0, :2]).min() == 0
    assert found[1].tolist() == [40, 20, 60, 40]


@pytest.mark.parametrize(
    ("views", "told"),
    [
        ((), "at least one"),
        (("upside-down",), "mirrored, grey"),
        (("plain", "plain"), "once"),
        (("plain+grey",), "joined"),
    ],
)
def test_views_that_cannot_be(views: tuple[str, ...], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        Cloud(url="https://a", views=views)


@pytest.mark.parametrize(
    "twice", [("grey+mirrored", "mirrored+grey"), ("inverted", "inverted")]
)
def test_the_same_view_in_other_words_is_not_paid_twice(twice: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match="once"):
        Cloud(url="https://a", views=twice)


@pytest.mark.parametrize("mode", ["failover", "cascade"])
def test_views_are_fused_or_the_run_does_not_begin(tmp_path: Path, mode: str) -> None:
    config = replace(configured(tmp_path), ensemble=Ensemble(mode=mode))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="views of a cloud are fused"):
        check_runnable(config)


def configured(tmp_path: Path, **cloud: object) -> PipelineConfig:
    data = replace(folder().data, images=str(tmp_path))
    asked = Cloud(url="https://detector.example.com", views=ASKED, **cloud)  # type: ignore[arg-type]
    return replace(folder(), classes=CLASSES, data=data, cloud=asked)


def test_each_view_counts_as_a_cloud(tmp_path: Path) -> None:
    config = configured(tmp_path)
    check_runnable(config)
    assert [cloud.views for cloud in config.clouds] == [(view,) for view in ASKED]
    assert cloud_names(config.clouds) == ("http", "http inverted", "http mirrored+reduced")
    plain = replace(config, cloud=replace(config.cloud, views=("plain",)))
    before = replace(config, cloud=Cloud(url="https://detector.example.com"))
    # answers paid before views were there still count
    assert build_steps(plain)["collect"].fingerprint == build_steps(before)["collect"].fingerprint
    assert (
        len(
            {
                build_steps(c)["collect"].fingerprint
                for c in (config, plain, replace(config, ensemble=Ensemble(iou=0.4)))
            }
        )
        == 3
    )


def test_views_share_one_limit_and_one_budget(tmp_path: Path) -> None:
    config = configured(tmp_path, max_calls=5)
    governors = governors_for(
        config, [config.cloud.url] * 3, open_journal(str(tmp_path / "journal"))
    )
    assert len(set(map(id, governors))) == 1


def test_clouds_that_differ_in_more_than_the_view_keep_their_own_limits(
    tmp_path: Path,
) -> None:
    config = configured(tmp_path, max_calls=5)
    other = replace(config.cloud, views=("grey",), max_calls=1)
    both = replace(config, more_clouds=(other,))
    governors = governors_for(
        both, [config.cloud.url] * 4, open_journal(str(tmp_path / "journal"))
    )
    assert [governors.index(governor) for governor in governors] == [0, 0, 0, 3]


def white_or_black(request: httpx.Request) -> httpx.Response:
    """A detector of dark things on light ground, which is how the object looks in the
    inverted view only."""
    sent = base64.b64decode(json.loads(request.content)["image"]["b64"])
    pixels = np.asarray(Image.open(io.BytesIO(sent)).convert("L")).astype(int)
    box = [int(v) for v in seen(np.repeat(pixels[:40, :60, None], 3, 2))]
    dark = pixels[box[1] + 3, box[0] + 3] < pixels[0, 0]
    found = [{"label": CLASSES[0], "score": 0.9, "box": box}] if dark else []
    return httpx.Response(
        200,
        json={
            "image": {"w": pixels.shape[1], "h": pixels.shape[0]},
            "detections": found,
        },
    )


def ask(config: PipelineConfig, raw: bytes, tmp_path: Path) -> Answer:
    async def answer() -> Answer:
        journal = open_journal(str(tmp_path / "journal"))
        governor = LocalGovernor(Governor(governor_limits(config.cloud), journal.spent()))
        clients = [
            CloudClient(
                one,
                CLASSES,
                one.url,
                journal,
                governor,
                transport=httpx.MockTransport(white_or_black),
            )
            for one in config.clouds
        ]
        client = EnsembleClient(clients, cloud_names(config.clouds), config.ensemble)
        return await client.answer(*render_for_clouds(client, raw))

    return asyncio.run(answer())


def test_what_one_view_shows_is_found(tmp_path: Path) -> None:
    raw = with_object(60, 40, (6, 10, 26, 30))
    first, again = (
        ask(configured(tmp_path), raw, tmp_path),
        ask(configured(tmp_path), raw, tmp_path),
    )
    assert (first.status, first.calls, again.status, again.calls) == (
        "ok",
        3,
        "cached",
        0,
    )
    assert first.raw is not None
    assert first.raw.boxes == pytest.approx(np.array([[6, 10, 26, 30]]), abs=1.5)
    # one view of three saw it
    assert first.raw.class_scores[0, 0] == pytest.approx(0.3)


def test_a_budget_ends_within_an_image_and_nothing_paid_is_lost(tmp_path: Path) -> None:
    raw = with_object(60, 40, (6, 10, 26, 30))
    with pytest.raises(BudgetExhausted):
        ask(configured(tmp_path, max_calls=2), raw, tmp_path)
    assert open_journal(str(tmp_path / "journal")).spent()[0] == 2
    assert ask(configured(tmp_path, max_calls=3), raw, tmp_path).calls == 1


def test_an_estimate_counts_every_view(tmp_path: Path) -> None:
    images, root = tmp_path / "images", tmp_path / "root"
    images.mkdir()
    for i in range(4):
        (images / f"{i}.png").write_bytes(with_object(60, 40, (6, 10, 26 + i, 30)))
    config = configured(images, usd_per_call=0.5)
    (found,) = estimate_cost(config, build_steps(config), str(root))
    assert (found.cloud, found.images, found.views, found.calls, found.usd) == (
        "http",
        4,
        3,
        12,
        6.0,
    )
