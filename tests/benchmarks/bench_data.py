"""What training data costs: ``python tests/benchmarks/bench_data.py [--sizes 1000
10000] [--steps N] [--memory 1000 10000]``, or ``make bench-data``.

First the demo's training, fed from tables and files against the same from memory, in
turns: the ratio of their CPU seconds. Then memory and seconds by the number of images
(22 boxes of 8 classes, three opinions, a batch of 8), tables on the disk against
tensors in memory. Then what each step holds in the memory of the job's own process, by
the number of images (``--memory 1000 10000 100000``). Prints tables, and all figures as
JSON last. The defaults take some minutes; 100000 and 1000000 images as --sizes much
longer.
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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import driver_memory
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

REPOSITORY = Path(__file__).resolve().parents[2]
BOXES, CLASSES, BATCH, BLOCK = 22, 8, 8, 20_000
NAMES = ("cloud", "clip", "clip_labels")
DEMO_IMAGES, ROUNDS = 500, 6
HELD_UP_TO = 100_000
"""Images of which tensors are held for comparison: 12 kB each."""


# -- synthetic tables


def lists(values: np.ndarray, counts: int) -> pa.ListArray:
    offsets = np.arange(0, len(values) + 1, counts, dtype=np.int32)
    return pa.ListArray.from_arrays(
        offsets, values if isinstance(values, pa.Array) else pa.array(values)
    )


def opinions(ids: Sequence[str], draw: np.random.Generator) -> pa.Table:
    n = len(ids) * BOXES
    boxes = pa.FixedSizeListArray.from_arrays(
        pa.array(draw.random(4 * n, np.float32)), 4
    )
    scores, labels = draw.random(n, np.float32), draw.integers(0, CLASSES, n)
    probs = lists(draw.random(n * (CLASSES + 1), np.float32), CLASSES + 1)
    columns = [
        pa.array(ids),
        lists(boxes, BOXES),
        lists(scores, BOXES),
        lists(labels, BOXES),
        lists(probs, BOXES),
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
        places = [uris[i % len(uris)] for i in range(len(ids))]
        size = pa.array(np.full(len(ids), 192, np.int32))
        images = pa.table(
            [pa.array(ids), pa.array(places), size, size],
            names=["image_id", "uri", "width", "height"],
        )
        for name, table in [
            ("images", images),
            *((name, opinions(ids, draw)) for name in NAMES),
        ]:
            if name not in writers:
                writers[name] = pq.ParquetWriter(
                    folder / f"{name}.parquet", table.schema
                )
            writers[name].write_table(table, row_group_size=1 << 14)
    for writer in writers.values():
        writer.close()


# -- one size, in a process of its own


def known(found: dict[str, object], image_id: str) -> dict[str, object]:
    return {name: table[image_id] for name, table in found.items()}  # type: ignore[index]


def table_examples(folder: Path, count: int) -> object:
    from coin_ray.data.examples import TableExamples
    from coin_ray.tables import open_detections

    found = {
        name: open_detections(str(folder / f"{name}.parquet"), CLASSES)
        for name in NAMES
    }
    return TableExamples(
        str(folder / "images.parquet"), np.arange(count), partial(known, found)
    )


def measure_size(folder: Path, count: int, held: bool) -> dict[str, float]:
    from coin_ray.data.order import BatchOrder

    # what importing and opening cost once is not the images'
    first = table_examples(folder, min(count, 10))
    list(first[:2])  # type: ignore[index]
    del first
    before, start = driver_memory.own_bytes(), time.process_time()
    examples = table_examples(folder, count)
    if held:
        examples = list(examples)  # type: ignore[call-overload]
    opened, bytes_held = time.process_time() - start, driver_memory.own_bytes() - before
    order = BatchOrder(count, BATCH, 0)
    order.rows_of_step(0)
    steps, start = 200, time.process_time()
    for step in range(1, steps + 1):
        for row in order.rows_of_step(step % max(1, count // BATCH)):
            examples[row].detections  # type: ignore[index]  # noqa: B018
    seconds = (time.process_time() - start) / steps
    return {
        "bytes per image": bytes_held / count,
        "seconds to open": opened,
        "ms per batch": 1000 * seconds,
    }


# -- the demo's training


FILES, CACHED, MEMORY = "tables and files", "tables, images kept", "memory"
"""A first epoch; a later one, or a small set; a loader that has everything in memory,
images decoded."""


def demo_seconds(folder: Path, steps: int, seconds: float) -> dict[str, float]:
    """CPU seconds of a step of propagation by what feeds it, in turns, for so many
    ``seconds`` at most but at least two rounds."""
    import torch

    from coin_ray.config.presets import PRESETS
    from coin_ray.data import examples as data
    from coin_ray.stages.propagate import build_propagation

    torch.set_num_threads(1)
    config = PRESETS["demo"]()
    fit = replace(config.propagate.fit, steps=steps)
    task = build_propagation(config, config.propagate, "clip")
    from_tables = table_examples(folder, DEMO_IMAGES)
    labels = [
        data.Example(e.image_id, e.uri, {"labels": e.detections["cloud"]})
        for e in from_tables
    ]  # type: ignore[attr-defined]
    from_tables.lookup_labels = only_labels(from_tables.lookup_labels)  # type: ignore[attr-defined]
    kept, new_cache = data.ImageCache(), data.ImageCache
    for example in labels:
        kept[example.uri]
    feeds = [
        (FILES, from_tables, new_cache),
        (CACHED, from_tables, lambda: kept),
        (MEMORY, labels, lambda: kept),
    ]
    found: dict[str, list[float]] = {name: [] for name, _, _ in feeds}
    give_up_at = time.monotonic() + seconds
    for round_ in range(-1, ROUNDS):  # the first one warms up and does not count
        for name, source, cache in feeds[round_ % 3 :] + feeds[: round_ % 3]:
            data.ImageCache = cache  # type: ignore[misc,assignment]
            load = data.iterate_batches(
                source,
                fit,
                config.detector,
                seed=max(round_, 0),
                first=0,
                rank=0,
                workers=1,
            )  # type: ignore[arg-type]
            taken = (
                timed(
                    lambda load=load: [
                        task.train_step(b, s) for s, b in enumerate(load)
                    ]
                )
                / steps
            )  # type: ignore[misc]
            if round_ >= 0:
                found[name].append(taken)
        if round_ >= 0:
            print(
                f"round {round_ + 1}: "
                + "  ".join(
                    f"{name} {values[-1]:.4f}" for name, values in found.items()
                ),
                flush=True,
            )
        if round_ >= 1 and time.monotonic() > give_up_at:
            break
    data.ImageCache = new_cache  # type: ignore[misc]
    ratios = {
        f"{name} / {MEMORY}": ratio(found[name], found[MEMORY])
        for name in (FILES, CACHED)
    }
    return (
        {name: float(np.median(values)) for name, values in found.items()}
        | ratios
        | {"rounds": len(found[MEMORY])}
    )


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Median of the rounds' own ratios: what is slow for a while is slow for both."""
    return float(np.median(np.divide(ours, theirs)))


def only_labels(
    know: Callable[[str], dict[str, object]],
) -> Callable[[str], dict[str, object]]:
    return lambda image_id: {"labels": know(image_id)["cloud"]}


def timed(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def write_images(folder: Path) -> list[str]:
    from PIL import Image

    draw, uris = np.random.default_rng(1), []
    for number in range(DEMO_IMAGES):
        uris.append(str(folder / f"{number}.jpg"))
        small = Image.fromarray(draw.integers(0, 255, (24, 24, 3), np.uint8))
        small.resize((192, 192)).save(uris[-1], quality=90, subsampling=0)
    return uris


def sizes_measured(sizes: Sequence[int], folder: Path) -> Iterator[dict[str, object]]:
    for count in sizes:
        write_tables(folder, count, ["a.jpg"])
        for held in (False, True):
            if held and count > HELD_UP_TO:
                continue
            command = [
                sys.executable,
                __file__,
                "--inside",
                str(folder),
                str(count),
                str(int(held)),
            ]
            done = subprocess.run(
                command,
                capture_output=True,
                text=True,
                check=True,
                env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
            )
            yield {
                "images": count,
                "held": "memory" if held else "tables",
                **json.loads(done.stdout),
            }


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
    parser.add_argument("--inside", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.inside:
        print(
            json.dumps(
                measure_size(
                    Path(given.inside[0]), int(given.inside[1]), given.inside[2] == "1"
                )
            )
        )
        return
    found: dict[str, object] = {}
    with tempfile.TemporaryDirectory(prefix="bench_data-") as place:
        if given.steps:
            write_tables(Path(place), DEMO_IMAGES, write_images(Path(place)))
            found["demo"] = demo = demo_seconds(Path(place), given.steps, given.seconds)
            print(
                "demo, CPU seconds per step: "
                + "  ".join(f"{k} {v:.4g}" for k, v in demo.items()),
                flush=True,
            )
        found["sizes"] = rows = []
        for row in sizes_measured(given.sizes, Path(place)):
            rows.append(row)
            print(
                "  ".join(
                    f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}"
                    for k, v in row.items()
                ),
                flush=True,
            )
    if given.memory:
        found["memory"] = driver_memory.show(given.memory)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
