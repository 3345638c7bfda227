"""What the steps of a run hold in the memory of the job's own process, by the number of
images: the ``--memory`` part of ``bench_data.py``.

Synthetic tables: 22 boxes of 8 classes an image, parts of 32 images. Networks are left
out: what they find is made up, and the separation of an image is a constant. Each step
runs in a process of its own; what counts is the most of its own memory (not what is
mapped from files) above what a run of 100 images needed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

REPOSITORY = Path(__file__).resolve().parents[2]
BOXES, CLASSES, PART = 22, 8, 32
WARM = 100


def own_bytes() -> int:
    """Memory that is this process's own; what is mapped from files can be dropped at
    any time."""
    status = Path("/proc/self/status").read_text()
    return (
        int(
            next(
                line.split()[1]
                for line in status.splitlines()
                if line.startswith("RssAnon")
            )
        )
        * 1024
    )


class Peak:
    """The most memory while a block runs, looked at every few milliseconds."""

    def __enter__(self) -> Peak:
        self.most, self.done = own_bytes(), threading.Event()
        self.thread = threading.Thread(target=self._look)
        self.thread.start()
        return self

    def _look(self) -> None:
        while not self.done.wait(0.005):
            self.most = max(self.most, own_bytes())

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.thread.join()


# -- synthetic tables


def name_of(number: int) -> str:
    return hashlib.sha256(str(number).encode()).hexdigest()


def nested(values: Any, counts: int) -> pa.ListArray:
    return pa.ListArray.from_arrays(
        np.arange(0, len(values) + 1, counts, dtype=np.int32), pa.array(values)
    )


def rows(first: int, count: int, schema: pa.Schema, source: str) -> pa.Table:
    """Random rows with the columns of ``DETECTIONS``, of parts or of ``SEPARATION``."""
    draw, n = np.random.default_rng(first), count * BOXES
    vectors = [
        nested(nested(draw.random(n * (CLASSES + 1), np.float32), CLASSES + 1), BOXES)
        for _ in range(2)
    ]
    columns = {
        "image_id": pa.array([name_of(i) for i in range(first, first + count)]),
        "boxes": nested(
            pa.FixedSizeListArray.from_arrays(
                pa.array(draw.random(4 * n, np.float32)), 4
            ),
            BOXES,
        ),
        "scores": nested(draw.random(n, np.float32), BOXES),
        "labels": nested(draw.integers(0, CLASSES, n), BOXES),
        "probs": vectors[0],
        "cloud_labels": nested(draw.integers(0, CLASSES, n), BOXES),
        "clip_labels": nested(draw.integers(0, CLASSES, n), BOXES),
        "clip_probs": vectors[1],
        "cloud_probs": vectors[0],
        "prob_source": nested(["native"] * n, BOXES),
        "kind": nested(["consistent", "private"] * (n // 2), BOXES),
        "source": pa.repeat(source, count),
        "status": pa.repeat("ok", count),
        "calls": pa.repeat(1, count),
        "cost_usd": pa.repeat(0.002, count),
    }
    nulls = {f.name: pa.nulls(count, f.type) for f in schema if f.name not in columns}
    return pa.table({f.name: (columns | nulls)[f.name].cast(f.type) for f in schema})


def image_rows(count: int) -> Iterator[dict[str, Any]]:
    for number in range(count):
        uri = f"s3://bucket/photos/of/a/user/{number:08d}.jpg"
        yield {
            "image_id": name_of(number),
            "uri": uri,
            "width": 1200,
            "height": 900,
            "split": "train",
        }


def write_inputs(folder: str, count: int) -> None:
    """What the steps read: images, parts, and what collect and separate make of them."""
    from coin_ray import storage, tables
    from coin_ray.stages.collecting import parts

    images = storage.join(folder, "images")
    with storage.table_writer(
        storage.join(images, "images.parquet"), tables.IMAGES
    ) as writer:
        for block in tables.iterate_tables(image_rows(count), tables.IMAGES):
            writer.write(block)
    storage.write_table(
        storage.join(images, "annotations.parquet"), tables.ANNOTATIONS.empty_table()
    )
    order = np.random.default_rng(0).permutation(-(-count // PART))
    for place, part in enumerate(order.tolist()):
        table = rows(PART * part, min(PART, count - PART * part), parts.PART_SCHEMA, "cloud")
        storage.write_table(
            storage.join(folder, "collect", "parts", f"{place:08d}.parquet"), table
        )
    finished = {
        "collect/cloud": "cloud",
        "collect/clip_labels": "clip_labels",
        "separate/clip_detector": "clip_detector",
        "separate/separation": "",
    }
    for name, source in finished.items():
        schema = tables.DETECTIONS if source else tables.SEPARATION
        with storage.table_writer(
            storage.join(folder, f"{name}.parquet"), schema
        ) as writer:
            for start in range(0, count, storage.BLOCK_ROWS):
                writer.write(
                    rows(start, min(storage.BLOCK_ROWS, count - start), schema, source)
                )


# -- the steps


def context_of(folder: str) -> Any:
    from coin_ray.config.presets import demo
    from coin_ray.runs.steps import Context

    inputs = {
        name: f"{folder}/{name}"
        for name in ("images", "collect", "propagate", "separate")
    }
    return Context(
        replace(demo(), collect=replace(demo().collect, labeler="roi")),
        folder,
        f"{folder}/out",
        inputs,
        {},
        "memory",
    )


def images(folder: str, count: int) -> None:
    """Files looked at one by one; what is found in them is made up."""
    from coin_ray.config import Folder
    from coin_ray.data.formats import Dataset, ImageRecord
    from coin_ray.stages import images as stage

    listed = Dataset(
        "plain",
        tuple(
            ImageRecord.from_annotations(r["uri"], r["uri"], (0, 0), (), annotated=False)
            for r in image_rows(count)
        ),
    )
    found = (
        {name: row[name] for name in ("image_id", "uri", "width", "height")}
        for row in image_rows(count)
    )
    context = context_of(folder)
    stage.formats = type("formats", (), {"read_dataset": lambda *_: listed})  # type: ignore[assignment]
    stage.inspect_images = lambda *_: found  # type: ignore[assignment]
    stage.run(
        replace(context, config=replace(context.config, data=Folder("somewhere")))
    )


def collect(folder: str, count: int) -> None:
    from coin_ray import storage
    from coin_ray.stages import collect as stage

    (Path(folder) / "out").mkdir(exist_ok=True)
    if not (Path(folder) / "out" / "parts").exists():
        (Path(folder) / "out" / "parts").symlink_to(Path(folder) / "collect" / "parts")
    listed = storage.read_table(f"{folder}/images/images.parquet")
    stage._merge(context_of(folder), stage._first_rows(listed)["image_id"])


def separate(folder: str, count: int) -> None:
    from coin_ray import tables
    from coin_ray.stages import separate as stage
    from coin_ray.stages.common import prediction as predicting
    from coin_ray.structures import Detections, Separation

    def found(_: object, given: pa.Table, __: object) -> Iterator[pa.Table]:
        for start in range(0, len(given), predicting.BLOCK):
            yield rows(
                start,
                min(predicting.BLOCK, len(given) - start),
                tables.DETECTIONS,
                "clip_detector",
            )

    predicting._predict_in_process = found  # type: ignore[assignment]
    one = Separation.from_labels(Detections.empty(CLASSES), reviewed=False)
    stage.separate_knowledge = lambda *_, **__: one  # type: ignore[assignment]
    # not the folder of collect: its parts would count as finished predictions
    stage.run(replace(context_of(folder), folder=f"{folder}/separated"))


def propagate(folder: str, count: int) -> None:
    from coin_ray.stages.common.training_labels import (
        build_training_examples,
        count_labels,
        open_training_labels,
    )

    context = context_of(folder)
    examples = build_training_examples(
        context.inputs["images"], open_training_labels("clip", context.inputs, context.config)
    )
    count_labels("clip", context.inputs, context.config)
    assert len(examples) == count


def report(folder: str, count: int) -> None:
    """With evaluate, as far as both look at training images."""
    from coin_ray.stages import evaluate
    from coin_ray.stages import report as stage
    from coin_ray.stages.reporting import measurements as measures
    from coin_ray.stages.reporting import pictures

    context = context_of(folder)
    evaluate._measure_separation(context)
    stage._count_kept(context)
    measures.count_teacher_confusion(context)
    measures.read_test_annotations(context)
    pictures._select_training_images(context, 24)


STEPS: dict[str, Callable[[str, int], None]] = {
    "images": images,
    "collect": collect,
    "propagate": propagate,
    "separate": separate,
    "report": report,
}


def inside(step: str, warm: str, folder: str, count: int) -> dict[str, float]:
    """Of one step, in this process."""
    with contextlib.redirect_stdout(sys.stderr):
        STEPS[step](warm, WARM)
        pa.default_memory_pool().release_unused()
        before, start = own_bytes(), time.process_time()
        with Peak() as peak:
            STEPS[step](folder, count)
    return {"bytes": peak.most - before, "seconds": time.process_time() - start}


def measured(sizes: Sequence[int]) -> Iterator[dict[str, Any]]:
    """By size and step: MiB above what 100 images take, and CPU seconds."""
    with tempfile.TemporaryDirectory(prefix="bench_memory-") as place:
        for count in (WARM, *sizes):
            write_inputs(f"{place}/{count}", count)
        for count in sizes:
            for step in STEPS:
                command = [
                    sys.executable,
                    __file__,
                    step,
                    f"{place}/{WARM}",
                    f"{place}/{count}",
                    str(count),
                ]
                paths = os.pathsep.join(
                    [str(REPOSITORY), os.environ.get("PYTHONPATH", "")]
                )
                done = subprocess.run(
                    command,
                    stdout=subprocess.PIPE,
                    text=True,
                    check=True,
                    env={**os.environ, "PYTHONPATH": paths},
                )
                found = json.loads(done.stdout)
                yield {
                    "images": count,
                    "step": step,
                    "MiB": found["bytes"] / 2**20,
                    "CPU s": found["seconds"],
                }


def summary(found: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Bytes an image of each step, between the two largest sizes."""
    sizes = sorted({row["images"] for row in found})[-2:]
    mib = {(row["step"], row["images"]): row["MiB"] for row in found}
    apart = max(sizes[-1] - sizes[0], 1)
    return {
        step: round((mib[step, sizes[-1]] - mib[step, sizes[0]]) * 2**20 / apart)
        for step in STEPS
    }


def show(sizes: Sequence[int]) -> dict[str, Any]:
    """Measures, prints a table, and returns all figures."""
    found = []
    print(f"{'images':>9} {'step':<10} {'MiB':>8} {'CPU s':>8}")
    for row in measured(sizes):
        found.append(row)
        print(
            f"{row['images']:>9,} {row['step']:<10} {row['MiB']:>8.1f}"
            f" {row['CPU s']:>8.1f}",
            flush=True,
        )
    print(
        "bytes an image: "
        + "  ".join(f"{step} {number}" for step, number in summary(found).items()),
        flush=True,
    )
    return {"rows": found, "bytes per image": summary(found)}


if __name__ == "__main__":
    print(json.dumps(inside(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))))
