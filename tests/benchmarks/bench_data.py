"""Measure what feeding training data costs: ``python tests/benchmarks/bench_data.py
[--sizes 1000 10000] [--steps N] [--memory 1000 10000]``, or ``make bench-data``.

1. The demo's training, fed from tables and files against the same from memory, in
   turns: the ratio of their CPU seconds.
2. Memory and seconds by the number of images (22 boxes of 8 classes, detections of three
   sources, a batch of 8), tables on disk against tensors in memory.
3. Memory that each step holds in the job's own process, by the number of images
   (``--memory 1000 10000 100000``).
4. Reading and checking a COCO set against pycocotools' ``COCO(file)``, if that is
   installed: seconds and peak memory (``--coco 100000 1000000`` images and boxes).

Prints tables, and all figures as JSON last. The defaults take some minutes; 100000 and
1000000 images as --sizes much longer.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import coco_reading
import driver_memory
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

if TYPE_CHECKING:
    from coin_ray.data.examples import Example, TableExamples
    from coin_ray.structures import Detections
    from coin_ray.tables import DetectionsTable

REPOSITORY = Path(__file__).resolve().parents[2]
BOXES, CLASSES, BATCH, BLOCK = 22, 8, 8, 20_000
NAMES = ("cloud", "clip", "clip_labels")
DEMO_IMAGES, ROUNDS = 500, 6
HELD_UP_TO = 100_000
"""Images of which tensors are held for comparison: 12 kB each."""


# -- synthetic tables


def random_detections(ids: Sequence[str], draw: np.random.Generator) -> pa.Table:
    n = len(ids) * BOXES
    boxes = pa.FixedSizeListArray.from_arrays(
        pa.array(draw.random(4 * n, np.float32)), 4
    )
    scores, labels = draw.random(n, np.float32), draw.integers(0, CLASSES, n)
    probs = driver_memory.nested_lists(
        draw.random(n * (CLASSES + 1), np.float32), CLASSES + 1
    )
    columns = [
        pa.array(ids),
        driver_memory.nested_lists(boxes, BOXES),
        driver_memory.nested_lists(scores, BOXES),
        driver_memory.nested_lists(labels, BOXES),
        driver_memory.nested_lists(probs, BOXES),
        pa.repeat("ok", len(ids)),
    ]
    return pa.table(
        columns, names=["image_id", "boxes", "scores", "labels", "probs", "status"]
    )


def write_tables(folder: Path, count: int, uris: Sequence[str]) -> None:
    draw, writers = np.random.default_rng(0), {}
    for start in range(0, count, BLOCK):
        ids = [
            hashlib.sha256(str(i).encode()).hexdigest()
            for i in range(start, min(start + BLOCK, count))
        ]
        image_uris = [uris[i % len(uris)] for i in range(len(ids))]
        size = pa.array(np.full(len(ids), 192, np.int32))
        images = pa.table(
            [pa.array(ids), pa.array(image_uris), size, size],
            names=["image_id", "uri", "width", "height"],
        )
        for name, table in [
            ("images", images),
            *((name, random_detections(ids, draw)) for name in NAMES),
        ]:
            if name not in writers:
                writers[name] = pq.ParquetWriter(
                    folder / f"{name}.parquet", table.schema
                )
            writers[name].write_table(table, row_group_size=1 << 14)
    for writer in writers.values():
        writer.close()


# -- one size, in a process of its own


def image_detections(
    tables: Mapping[str, DetectionsTable], image_id: str
) -> dict[str, Detections]:
    return {name: table[image_id] for name, table in tables.items()}


def open_table_examples(folder: Path, count: int) -> TableExamples:
    from coin_ray.data.examples import TableExamples
    from coin_ray.tables import open_detections

    tables = {
        name: open_detections(str(folder / f"{name}.parquet"), CLASSES)
        for name in NAMES
    }
    look_up = partial(image_detections, tables)
    return TableExamples(str(folder / "images.parquet"), np.arange(count), look_up)


def measure_size(folder: Path, count: int, in_memory: bool) -> dict[str, float]:
    from coin_ray.data.order import BatchOrder

    # importing and opening have a first cost that is not the images'
    first = open_table_examples(folder, min(count, 10))
    list(first[:2])
    del first
    bytes_before, start = driver_memory.own_bytes(), time.process_time()
    examples: Sequence[Example] = open_table_examples(folder, count)
    if in_memory:
        examples = list(examples)
    open_seconds = time.process_time() - start
    bytes_held = driver_memory.own_bytes() - bytes_before
    order = BatchOrder(count, BATCH, 0)
    order.rows_of_step(0)
    steps, start = 200, time.process_time()
    for step in range(1, steps + 1):
        for row in order.rows_of_step(step % max(1, count // BATCH)):
            examples[row].detections  # noqa: B018
    seconds = (time.process_time() - start) / steps
    return {
        "bytes per image": bytes_held / count,
        "seconds to open": open_seconds,
        "ms per batch": 1000 * seconds,
    }


# -- the demo's training


FILES, CACHED, MEMORY = "tables and files", "tables, images kept", "memory"
"""Names of what feeds the training: the first epoch; a later one, or a small set; a
loader that has everything in memory, images decoded."""


def measure_demo(folder: Path, steps: int, seconds: float) -> dict[str, float]:
    """Return the CPU seconds of a step of propagation by what feeds it. The feeds take
    turns for at most so many ``seconds``, but for at least two rounds.
    """
    import torch

    from coin_ray.config.presets import PRESETS
    from coin_ray.data import examples as data
    from coin_ray.stages.propagate import build_propagation

    torch.set_num_threads(1)
    config = PRESETS["demo"]()
    fit = replace(config.propagate.fit, steps=steps)
    task = build_propagation(config, config.propagate, "clip")
    from_tables = open_table_examples(folder, DEMO_IMAGES)
    labels = [
        data.Example(e.image_id, e.uri, {"labels": e.detections["cloud"]})
        for e in from_tables
    ]
    from_tables.lookup_labels = with_cloud_labels_only(from_tables.lookup_labels)
    warm_cache, new_cache = data.ImageCache(), data.ImageCache
    for example in labels:
        warm_cache[example.uri]
    feeds: list[tuple[str, Sequence[Example], Callable[[], data.ImageCache]]] = [
        (FILES, from_tables, new_cache),
        (CACHED, from_tables, lambda: warm_cache),
        (MEMORY, labels, lambda: warm_cache),
    ]

    def step_seconds(source: Sequence[Example], seed: int) -> float:
        batches = data.iterate_batches(
            source, fit, config.detector, seed=seed, first=0, rank=0, workers=1
        )
        start = time.process_time()
        for step, batch in enumerate(batches):
            task.train_step(batch, step)
        return (time.process_time() - start) / steps

    seconds_by_feed: dict[str, list[float]] = {name: [] for name, _, _ in feeds}
    give_up_at = time.monotonic() + seconds
    for round_number in range(-1, ROUNDS):  # the first one warms up and does not count
        turn = round_number % len(feeds)
        for name, source, cache in feeds[turn:] + feeds[:turn]:
            data.ImageCache = cache  # type: ignore[misc,assignment]
            measured_seconds = step_seconds(source, max(round_number, 0))
            if round_number >= 0:
                seconds_by_feed[name].append(measured_seconds)
        if round_number >= 0:
            _print_round(round_number, seconds_by_feed)
        if round_number >= 1 and time.monotonic() > give_up_at:
            break
    data.ImageCache = new_cache  # type: ignore[misc]
    return _summarize_demo(seconds_by_feed)


def _print_round(round_number: int, seconds_by_feed: dict[str, list[float]]) -> None:
    last_seconds = [
        f"{name} {round_seconds[-1]:.4f}"
        for name, round_seconds in seconds_by_feed.items()
    ]
    print(f"round {round_number + 1}: " + "  ".join(last_seconds), flush=True)


def _summarize_demo(seconds_by_feed: dict[str, list[float]]) -> dict[str, float]:
    medians = {
        name: float(np.median(round_seconds))
        for name, round_seconds in seconds_by_feed.items()
    }
    ratios = {
        f"{name} / {MEMORY}": median_ratio(
            seconds_by_feed[name], seconds_by_feed[MEMORY]
        )
        for name in (FILES, CACHED)
    }
    return medians | ratios | {"rounds": len(seconds_by_feed[MEMORY])}


def median_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """Return the median over the rounds of the ratio within each: a slow moment slows down
    both."""
    return float(np.median(np.divide(numerators, denominators)))


def with_cloud_labels_only(
    lookup: Callable[[str], Mapping[str, Detections]],
) -> Callable[[str], dict[str, Detections]]:
    return lambda image_id: {"labels": lookup(image_id)["cloud"]}


def write_demo_images(folder: Path) -> list[str]:
    from PIL import Image

    draw, uris = np.random.default_rng(1), []
    for number in range(DEMO_IMAGES):
        uris.append(str(folder / f"{number}.jpg"))
        small = Image.fromarray(draw.integers(0, 255, (24, 24, 3), np.uint8))
        small.resize((192, 192)).save(uris[-1], quality=90, subsampling=0)
    return uris


def measure_sizes(sizes: Sequence[int], folder: Path) -> Iterator[dict[str, object]]:
    """Yield a row for each size, tables and tensors; each is measured in a new process."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    for count in sizes:
        write_tables(folder, count, ["a.jpg"])
        for in_memory in (False, True):
            if in_memory and count > HELD_UP_TO:
                continue
            command = [sys.executable, __file__, "--inside", str(folder), str(count)]
            completed = subprocess.run(
                [*command, str(int(in_memory))],
                capture_output=True,
                text=True,
                check=True,
                env=environment,
            )
            yield {
                "images": count,
                "held": "memory" if in_memory else "tables",
                **json.loads(completed.stdout),
            }


def _print_row(row: Mapping[str, object]) -> None:
    cells = [
        f"{name} {figure:.4g}" if isinstance(figure, float) else f"{name} {figure}"
        for name, figure in row.items()
    ]
    print("  ".join(cells), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", type=int, nargs="*", default=[1000, 10_000])
    parser.add_argument(
        "--steps",
        type=int,
        default=20,
        help="training steps of each of the demo's rounds; 0 leaves them out",
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=180,
        help="of the demo's rounds; at least two are made",
    )
    parser.add_argument(
        "--memory",
        type=int,
        nargs="*",
        default=[],
        metavar="N",
        help="images for which the steps' memory is measured",
    )
    parser.add_argument(
        "--coco",
        type=int,
        nargs=2,
        default=[100_000, 1_000_000],
        metavar=("IMAGES", "BOXES"),
        help="size of the COCO set that is read; 0 0 leaves it out",
    )
    parser.add_argument("--inside", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        folder, count, in_memory = options.inside
        print(json.dumps(measure_size(Path(folder), int(count), in_memory == "1")))
        return
    figures: dict[str, object] = {}
    with tempfile.TemporaryDirectory(prefix="bench_data-") as name:
        folder = Path(name)
        if options.steps:
            write_tables(folder, DEMO_IMAGES, write_demo_images(folder))
            demo_figures = measure_demo(folder, options.steps, options.seconds)
            figures["demo"] = demo_figures
            cells = [f"{name} {figure:.4g}" for name, figure in demo_figures.items()]
            print("demo, CPU seconds per step: " + "  ".join(cells), flush=True)
        rows = []
        for row in measure_sizes(options.sizes, folder):
            rows.append(row)
            _print_row(row)
        figures["sizes"] = rows
    if options.coco[0] and find_spec("pycocotools") is not None:
        with tempfile.TemporaryDirectory(prefix="bench_data-") as name:
            coco_figures = coco_reading.measure_coco(Path(name) / "set", *options.coco)
        figures["coco"] = coco_figures
        _print_row(coco_figures)
    if options.memory:
        figures["memory"] = driver_memory.measure_and_print(options.memory)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
