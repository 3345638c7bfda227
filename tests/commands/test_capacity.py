from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from coin_ray.cloud.journal.base import AnswerRecord
from coin_ray.cloud.journal.opening import open_journal
from coin_ray.commands.capacity import parse_capacity
from coin_ray.commands.main import main
from coin_ray.config import Cloud, Folder
from coin_ray.config.presets import DEMO_ASSETS, PRESETS, folder
from coin_ray.data import examples
from coin_ray.errors import ConfigError
from coin_ray.runs import capacity
from coin_ray.runs.capacity import CapacityInputs, plan_capacity
from coin_ray.runs.estimate import estimate_cost
from coin_ray.runs.graph import build_steps
from coin_ray.stages.collecting import parts
from coin_ray.stages.collecting.parts import PART_SCHEMA

SCALE_PAGE = Path(__file__).parents[2] / "docs" / "scale.md"


def _stage(inputs: CapacityInputs, name: str) -> capacity.StageCapacity:
    return next(s for s in plan_capacity(inputs).stages if s.name == name)


# -- more of one thing is never less of another

INPUTS = st.builds(
    CapacityInputs,
    images=st.floats(100, 1e8),
    preset=st.sampled_from(["demo", "folder"]),
    rate=st.floats(0.1, 500),
    in_flight=st.integers(1, 256),
    latency=st.floats(0.01, 30),
    per_day=st.none() | st.integers(100, 10**7),
    boxes=st.integers(0, 100),
    classes=st.integers(1, 100),
    gpus=st.integers(0, 8),
    cpus=st.integers(1, 64),
    store=st.sampled_from(["object", "disk"]),
)
MORE_IS_NOT_LESS = ("hours", "usd_calls", "gpu_hours", "calls")


def _amounts(inputs: CapacityInputs) -> list[float]:
    plan = plan_capacity(inputs)
    stored = plan.storage
    memory = [s.gib for s in plan.stages]
    return [
        *(getattr(plan, n) for n in MORE_IS_NOT_LESS),
        stored.images_gb,
        stored.journal_gb,
        stored.tables_gb,
        stored.objects,
        *memory,
    ]


@given(INPUTS, st.floats(1, 100))
def test_more_images_take_no_less_of_anything(
    inputs: CapacityInputs, times: float
) -> None:
    more_inputs = replace(inputs, images=inputs.images * times)
    assert all(
        a <= b * (1 + 1e-9)
        for a, b in zip(_amounts(inputs), _amounts(more_inputs), strict=True)
    )
    assert len(plan_capacity(inputs).exceeded_limits) <= len(
        plan_capacity(more_inputs).exceeded_limits
    )


LESS_COLLECTING = [
    ("rate", 2.0),
    ("in_flight", 2),
    ("latency", 0.5),
    ("cpus", 2),
    ("megapixels", 0.5),
]


@given(INPUTS, st.sampled_from(LESS_COLLECTING))
def test_a_better_limit_never_slows_a_collection(
    inputs: CapacityInputs, change: tuple[str, float]
) -> None:
    name, factor = change
    limit_setting = getattr(inputs, name) * factor
    changed: dict[str, Any] = {
        name: int(limit_setting)
        if isinstance(getattr(inputs, name), int)
        else limit_setting
    }
    better = replace(inputs, **changed)
    assert _stage(better, "collect").hours <= _stage(inputs, "collect").hours * (
        1 + 1e-9
    )


@given(INPUTS)
def test_one_more_gpu_never_slows_a_training(inputs: CapacityInputs) -> None:
    inputs = replace(inputs, gpus=max(inputs.gpus, 1))
    for name in ("propagate", "distill"):
        assert _stage(replace(inputs, gpus=inputs.gpus + 1), name).hours <= _stage(
            inputs, name
        ).hours * (1 + 1e-9)


# -- what limits a collection

FAST = CapacityInputs(
    images=1e5, preset="demo", megapixels=0.04, gpus=1, gpu_tflops=1000
)


@pytest.mark.parametrize(
    ("rate", "in_flight", "latency", "limit", "pace"),
    [
        (20.0, 64, 0.5, "rate", 20.0),
        (20.0, 64, 3.1, "rate", 20.0),
        (20.0, 64, 3.3, "latency", 64 / 3.3),
        (20.0, 9, 0.5, "latency", 18.0),
        (20.0, 11, 0.5, "rate", 20.0),
        (1000.0, 1000, 0.5, "cloud actors", 1 / (0.001 + 0.0014 * 0.04)),
    ],
)
def test_a_collection_is_as_fast_as_its_slowest_part(
    rate: float, in_flight: int, latency: float, limit: str, pace: float
) -> None:
    inputs = replace(
        FAST,
        rate=rate,
        in_flight=in_flight,
        latency=latency,
        store="disk",
        gpus=0,
        cpus=4000,
    )
    collect = _stage(inputs, "collect")
    assert collect.limit == limit
    assert collect.hours == pytest.approx(
        (1e5 / pace + capacity.compile_seconds(inputs)) / 3600
    )


def test_the_labelers_limit_where_the_network_is_large_and_the_machine_small() -> None:
    inputs = CapacityInputs(rate=1000.0, in_flight=1000, latency=0.1, gpus=0, cpus=4)
    assert _stage(inputs, "collect").limit == "labelers"
    assert _stage(replace(inputs, cpus=4000), "collect").limit == "cloud actors"


def test_a_daily_quota_takes_days() -> None:
    collect = _stage(replace(FAST, per_day=10_000, store="disk"), "collect")
    assert collect.limit == "calls per day"
    assert collect.hours == pytest.approx(9 * 24, rel=0.01)
    assert _stage(replace(FAST, per_day=10_000_000), "collect").limit == "rate"


@pytest.mark.parametrize("per_day", [None, 15])
@pytest.mark.parametrize("rate", [0.5, 2.0])
@pytest.mark.parametrize("views", [("plain",), ("plain", "inverted", "grey")])
def test_it_agrees_with_the_estimate_of_a_dry_run(
    tmp_path: Path, rate: float, per_day: int | None, views: tuple[str, ...]
) -> None:
    """Both estimate the same calls, cost and time within
    the service's limits."""
    (tmp_path / "images").mkdir()
    for number in range(40):
        (tmp_path / "images" / f"{number}.jpg").touch()
    cloud = Cloud(
        url="https://one.example.com",
        rate=rate,
        usd_per_call=0.01,
        per_day=per_day,
        views=views,
    )
    config = replace(
        folder(), classes=("car",), data=Folder(str(tmp_path / "images")), cloud=cloud
    )
    (dry,) = estimate_cost(config, build_steps(config), str(tmp_path))
    inputs = CapacityInputs(
        images=40,
        views=len(views),
        rate=rate,
        usd_per_call=0.01,
        per_day=per_day,
        latency=0.1,
        store="disk",
    )
    plan = plan_capacity(inputs)
    assert plan.calls == dry.calls
    assert plan.usd_calls == pytest.approx(dry.usd)
    query_minutes = (
        _stage(inputs, "collect").hours * 60 - capacity.compile_seconds(inputs) / 60
    )
    assert query_minutes == pytest.approx(dry.minutes)


# -- constants against the code they speak of

SIZES = [(10, 8), (22, 8), (22, 80)]


@pytest.mark.parametrize(("boxes", "classes"), SIZES)
def test_an_answer_takes_as_many_bytes_in_a_journal(
    tmp_path: Path, boxes: int, classes: int
) -> None:
    draw = np.random.default_rng(0)
    names = [f"class{k}" for k in range(classes)]
    journal = open_journal(str(tmp_path))
    count = 50
    for number in range(count):
        detections = [
            {
                "box": [round(v * 600, 2) for v in draw.random(4).tolist()],
                "label": names[0],
                "score": round(draw.random(), 4),
                "scores": {name: round(draw.random(), 4) for name in names},
            }
            for _ in range(boxes)
        ]
        body = json.dumps(
            {"image": {"w": 640, "h": 480}, "detections": detections}
        ).encode()
        key = f"{number:064x}"
        journal.attempt(key, 0.002, "0" * 12)
        journal.put(
            key, AnswerRecord(body, latency_ms=150.0, service="http", model="default")
        )
    journal.close()
    size = sum(file.stat().st_size for file in tmp_path.iterdir()) / count
    inputs = CapacityInputs(images=1e9, boxes=boxes, classes=classes, store="disk")
    assert capacity.estimate_storage(inputs).journal_gb == pytest.approx(size, rel=0.15)


@pytest.mark.parametrize(("boxes", "classes"), SIZES)
def test_a_row_takes_as_many_bytes_in_a_table(boxes: int, classes: int) -> None:
    draw = np.random.default_rng(0)

    def numbers(*shape: int) -> Any:
        return draw.random(shape, dtype=np.float32).tolist()

    rows = [
        {
            "image_id": f"{number:064x}",
            "boxes": numbers(boxes, 4),
            "scores": numbers(boxes),
            "labels": [0] * boxes,
            "probs": numbers(boxes, classes + 1),
            "prob_source": ["native"] * boxes,
            "source": "cloud",
            "status": "ok",
            "clip_probs": numbers(boxes, classes + 1),
        }
        for number in range(100)
    ]
    table = pa.Table.from_pylist(rows, schema=PART_SCHEMA)
    assert capacity.arrow_bytes(
        CapacityInputs(boxes=boxes, classes=classes)
    ) == pytest.approx(table.nbytes / 100, rel=0.2)


def test_numbers_that_are_written_twice_are_the_same() -> None:
    assert (capacity.DRIVER_ROWS, capacity.READ_THREADS) == (
        4 * parts.MERGE_BLOCK_ROWS,
        examples.READ_THREADS,
    )


@pytest.mark.parametrize("store", ["object", "disk"])
def test_a_million_images_fit_a_small_head(store: str) -> None:
    """No step holds what the teachers said of all images."""
    inputs = CapacityInputs(images=1e6, store=store, head_gib=16.0)  # type: ignore[arg-type]
    assert all(s.gib < 0.5 * 16 for s in plan_capacity(inputs).stages)
    assert not [
        limit
        for limit in plan_capacity(inputs).exceeded_limits
        if "memory" in limit.name or "merge" in limit.name
    ]


def test_operations_are_those_that_torch_counts() -> None:
    described = json.loads((DEMO_ASSETS / "coin_tiny.json").read_text())
    with torch.device("meta"):
        visual: Any = open_clip.CLIP(
            **{
                name: described[name]
                for name in ("embed_dim", "vision_cfg", "text_cfg")
            }
        ).visual.eval()
    tower = capacity.TOWERS["coin_tiny"]
    pixels, cells = (
        torch.zeros(1, 3, 256, 256, device="meta"),
        torch.zeros(1, tower.channels, 4, 4, device="meta"),
    )
    with FlopCounterMode(display=False) as shared, torch.no_grad():
        visual.layer3(visual.layer2(visual.layer1(visual.stem(pixels))))
    with FlopCounterMode(display=False) as regional, torch.no_grad():
        visual.layer4(cells)
    with FlopCounterMode(display=False) as crop, torch.no_grad():
        visual(torch.zeros(1, 3, 64, 64, device="meta"))
    by_parts = (
        tower.shared_per_pixel * 64**2 + tower.regional_per_cell * 4**2 + tower.pooling
    )
    assert by_parts == pytest.approx(crop.get_total_flops(), rel=0.02)
    assert tower.shared_per_pixel == pytest.approx(
        shared.get_total_flops() / 256**2, rel=0.01
    )
    assert tower.regional_per_cell == pytest.approx(
        regional.get_total_flops() / 16, rel=0.02
    )


def test_what_was_measured_on_the_demo_comes_out_for_the_demo() -> None:
    """A labeler's 18 ms by RoIs and 47 by crops, and steps of 0.25 and 0.33 s, from
    which everything else is scaled."""
    inputs = CapacityInputs(
        preset="demo",
        images=500,
        megapixels=192 * 192 / 1e6,
        gpus=0,
        cpus=1,
        store="disk",
    )
    assert capacity.label_seconds(inputs) == pytest.approx(0.047, rel=0.25)
    assert capacity.label_seconds(inputs, "roi") == pytest.approx(0.018, rel=0.25)
    config = inputs.config
    assert _stage(
        inputs, "propagate"
    ).hours * 3600 / config.propagate.fit.steps == pytest.approx(0.25, rel=0.3)
    assert _stage(
        inputs, "distill"
    ).hours * 3600 / config.distill.fit.steps == pytest.approx(0.33, rel=0.4)


# -- machines


@pytest.mark.parametrize(
    ("batch", "gpus", "workers"),
    [(3, 0, 1), (3, 1, 1), (3, 2, 1), (3, 4, 3), (8, 4, 4), (8, 6, 4), (8, 16, 8)],
)
def test_a_batch_is_shared_among_as_many_gpus_as_divide_it(
    batch: int, gpus: int, workers: int
) -> None:
    fit = replace(PRESETS["folder"]().distill.fit, batch=batch)
    assert capacity.count_workers(CapacityInputs(gpus=gpus), fit) == workers
    replace(fit, workers=workers)  # which the settings accept


def test_a_gpu_that_waits_is_paid_too() -> None:
    slow = CapacityInputs(rate=1.0, gpus=1, usd_per_gpu_hour=2.0)
    assert _stage(slow, "collect").gpu_hours == pytest.approx(
        _stage(slow, "collect").hours
    )
    assert plan_capacity(slow).usd_gpus == pytest.approx(
        2 * plan_capacity(slow).gpu_hours
    )
    assert plan_capacity(replace(slow, gpus=0)).gpu_hours == 0


def test_an_object_store_has_an_object_for_each_attempt_and_each_answer() -> None:
    at_rest = capacity.estimate_storage(CapacityInputs(images=1e6))
    assert at_rest.objects == pytest.approx(2e6 + 1e6 / 32)
    assert at_rest.usd_writes == pytest.approx(10.2, rel=0.01)
    assert (
        capacity.estimate_storage(CapacityInputs(images=1e6, store="disk")).objects == 0
    )


# -- what breaks first


def test_limits_are_sorted_by_images() -> None:
    limits = capacity.find_scaling_limits(CapacityInputs())
    assert [w.images for w in limits] == sorted(w.images for w in limits)
    assert len({w.name for w in limits}) == len(limits)
    assert all(w.mitigation for w in limits)


CONSTANT = capacity.constant_bytes(CapacityInputs())
MITIGATIONS = [
    (
        "the driver's tables",
        {"head_gib": 64.0},
        (0.8 * 64 * capacity.GIB - CONSTANT) / (0.8 * 16 * capacity.GIB - CONSTANT),
    ),
    ("collect takes", {"rate": 40.0}, 2.0),
    ("separate takes", {"patience_days": 14.0}, 2.0),
    ("the journal's index", {"node_gib": 64.0}, 2.0),
    (
        "an hour to merge",
        {"store": "disk"},
        1 + 2 * capacity.OBJECT_SECONDS / 16 / 32 / capacity.MERGE_SECONDS,
    ),
]


@pytest.mark.parametrize(("name", "change", "factor"), MITIGATIONS)
def test_a_mitigation_moves_its_limit(
    name: str, change: dict[str, Any], factor: float
) -> None:
    inputs = CapacityInputs(rate=20.0, head_gib=16.0, node_gib=32.0)
    before, after = (
        next(
            w.images for w in capacity.find_scaling_limits(q) if w.name.startswith(name)
        )
        for q in (inputs, replace(inputs, **change))
    )
    assert after == pytest.approx(before * factor)


def test_a_limit_is_where_its_step_takes_as_long() -> None:
    inputs = CapacityInputs(patience_days=3.0)
    for name in ("collect", "separate"):
        limit = next(
            w
            for w in capacity.find_scaling_limits(inputs)
            if w.name.startswith(f"{name} takes")
        )
        there = replace(inputs, images=limit.images)
        reading = capacity.compile_seconds(there) / 3600 if name == "collect" else 0.0
        assert _stage(there, name).hours - reading == pytest.approx(72, rel=0.01)


def test_images_beyond_the_training_are_named() -> None:
    config = PRESETS["folder"]()
    images_seen = config.distill.fit.steps * config.distill.fit.batch
    assert plan_capacity(CapacityInputs(images=images_seen)).epochs == pytest.approx(1)
    larger_plan = plan_capacity(CapacityInputs(images=2 * images_seen))
    assert any(
        "never trained on" in limit.name for limit in larger_plan.exceeded_limits
    )
    assert not any(
        "never trained on" in limit.name
        for limit in plan_capacity(
            CapacityInputs(images=images_seen / 2)
        ).exceeded_limits
    )


# -- the command


@pytest.mark.parametrize(
    "wrong",
    [
        {"images": 0},
        {"rate": -1.0},
        {"latency": 0.0},
        {"boxes": -1},
        {"per_day": 0},
        {"images": float("inf")},
        {"head_gib": 0.0},
    ],
)
def test_impossible_numbers_are_refused_by_name(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        CapacityInputs(**wrong)


def test_a_network_whose_operations_nobody_counted_is_refused() -> None:
    with pytest.raises(ConfigError, match="mobilenet_v2"):
        capacity.forward_flops(PRESETS["thermal"](), 10)


def test_the_command_prints_tables(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--images", "1e6", "--rate", "20", "--in-flight", "64", "--gpus", "4"]
    assert main(["capacity", *arguments]) == 0
    printed = capsys.readouterr().out
    assert "1,000,000" in printed
    assert "what breaks first" in printed


def test_the_command_speaks_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["capacity", "--images", "1e5", "--preset", "demo", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["calls"] == 100_000
    assert {s["name"] for s in plan["stages"]} == {
        "images",
        "collect",
        "propagate",
        "separate",
        "distill",
    }
    fields = {field.name for field in dataclasses.fields(capacity.CapacityPlan)}
    assert set(plan) == fields - {"limits"} | {"walls", "reached"}
    assert set(plan["walls"][0]) == {"name", "images", "knob"}
    assert main(["capacity", "--scale", "--json"]) == 0
    assert [p["images"] for p in json.loads(capsys.readouterr().out)] == [
        10**n for n in range(4, 9)
    ]


def test_the_command_says_what_is_impossible(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as end:
        main(["capacity", "--rate", "0"])
    assert end.value.code == 2
    assert "rate must be positive" in capsys.readouterr().err


# -- the page


def test_the_page_shows_what_the_command_says() -> None:
    """The row of each size: images, USD, hours, GPU hours; after a change of a preset
    or a constant the table is to be made again."""
    rows = re.findall(r"^\| 10\^(\d) \|(.*)\|$", SCALE_PAGE.read_text(), re.M)
    assert [int(power) for power, _ in rows] == [4, 5, 6, 7, 8]
    (command,) = re.findall(
        r"^    coin-ray capacity (--scale.*)$", SCALE_PAGE.read_text(), re.M
    )
    inputs = parse_capacity(command.split())
    assert inputs.scale
    for power, cells in rows:
        plan = plan_capacity(replace(inputs, images=10.0 ** int(power)))
        written = [float(cell.strip().replace(",", "")) for cell in cells.split("|")]
        stored = plan.storage
        computed = [
            plan.usd_calls,
            *(s.hours for s in plan.stages),
            plan.gpu_hours,
            plan.epochs,
            stored.images_gb,
            stored.journal_gb,
            stored.tables_gb,
            max(s.gib for s in plan.stages),
        ]
        assert written == pytest.approx(computed, rel=0.06)


def test_commands_on_the_page_are_understood() -> None:
    commands = re.findall(r"^    coin-ray capacity (.*)$", SCALE_PAGE.read_text(), re.M)
    assert len(commands) >= 3
    for command in commands:
        parse_capacity(command.split("#")[0].split())
