"""Measure the memory that the steps of a run hold in the job's own process, by the number
of images: the ``--memory`` part of ``bench_data.py``.

Synthetic tables: 22 boxes of 8 classes an image, parts of 32 images. No network runs:
predictions are random, and the separation of an image is a constant. Each step runs in a
new process; the figure is the peak of its anonymous memory (without pages mapped from
files) above that of a run of 100 images.
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
    """Return the anonymous memory of this process: pages mapped from files can be dropped
    at any time."""
    status = Path("/proc/self/status").read_text()
    (line,) = [line for line in status.splitlines() if line.startswith("RssAnon")]
    return int(line.split()[1]) * 1024


class Peak:
    """Record the peak of ``own_bytes`` while a block runs, sampled every few milliseconds."""

    def __enter__(self) -> Peak:
        self.peak_bytes = own_bytes()
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._sample)
        self.thread.start()
        return self

    def _sample(self) -> None:
        while not self.ended.wait(0.005):
            self.peak_bytes = max(self.peak_bytes, own_bytes())

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.thread.join()


# -- synthetic tables


def image_id_of(number: int) -> str:
    return hashlib.sha256(str(number).encode()).hexdigest()


def nested_lists(array: Any, counts: int) -> pa.ListArray:
    return pa.ListArray.from_arrays(
        np.arange(0, len(array) + 1, counts, dtype=np.int32), pa.array(array)
    )


def random_rows(first: int, count: int, schema: pa.Schema, source: str) -> pa.Table:
    """Return random rows with the columns of ``DETECTIONS``, of parts or of
    ``SEPARATION``."""
    draw, n = np.random.default_rng(first), count * BOXES
    vectors = [
        nested_lists(
            nested_lists(draw.random(n * (CLASSES + 1), np.float32), CLASSES + 1), BOXES
        )
        for _ in range(2)
    ]
    columns = {
        "image_id": pa.array([image_id_of(i) for i in range(first, first + count)]),
        "boxes": nested_lists(
            pa.FixedSizeListArray.from_arrays(
                pa.array(draw.random(4 * n, np.float32)), 4
            ),
            BOXES,
        ),
        "scores": nested_lists(draw.random(n, np.float32), BOXES),
        "labels": nested_lists(draw.integers(0, CLASSES, n), BOXES),
        "probs": vectors[0],
        "cloud_labels": nested_lists(draw.integers(0, CLASSES, n), BOXES),
        "clip_labels": nested_lists(draw.integers(0, CLASSES, n), BOXES),
        "clip_probs": vectors[1],
        "cloud_probs": vectors[0],
        "prob_source": nested_lists(["native"] * n, BOXES),
        "kind": nested_lists(["consistent", "private"] * (n // 2), BOXES),
        "source": pa.repeat(source, count),
        "status": pa.repeat("ok", count),
        "calls": pa.repeat(1, count),
        "cost_usd": pa.repeat(0.002, count),
    }
    nulls = {f.name: pa.nulls(count, f.type) for f in schema if f.name not in columns}
    return pa.table({f.name: (columns | nulls)[f.name].cast(f.type) for f in schema})


def numbered_image_rows(count: int) -> Iterator[dict[str, Any]]:
    for number in range(count):
        uri = f"s3://bucket/photos/of/a/user/{number:08d}.jpg"
        yield {
            "image_id": image_id_of(number),
            "uri": uri,
            "width": 1200,
            "height": 900,
            "split": "train",
        }


def write_inputs(folder: str, count: int) -> None:
    """Write the tables that the steps read: images, parts, and the tables of collect and
    separate."""
    from coin_ray import storage, tables
    from coin_ray.stages.collecting import parts

    images = storage.join(folder, "images")
    with storage.table_writer(
        storage.join(images, "images.parquet"), tables.IMAGES
    ) as writer:
        for block in tables.iterate_tables(numbered_image_rows(count), tables.IMAGES):
            writer.write(block)
    storage.write_table(
        storage.join(images, "annotations.parquet"), tables.ANNOTATIONS.empty_table()
    )
    order = np.random.default_rng(0).permutation(-(-count // PART))
    for position, part in enumerate(order.tolist()):
        table = random_rows(
            PART * part, min(PART, count - PART * part), parts.PART_SCHEMA, "cloud"
        )
        storage.write_table(
            storage.join(folder, "collect", "parts", f"{position:08d}.parquet"), table
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
                    random_rows(
                        start, min(storage.BLOCK_ROWS, count - start), schema, source
                    )
                )


# -- the steps


def build_context(folder: str) -> Any:
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


def run_images(folder: str, count: int) -> None:
    """Run the images stage with a fixed inspection of each file."""
    from coin_ray.config import Folder
    from coin_ray.data.formats import Dataset, ImageRecord
    from coin_ray.stages import images as images_stage

    records = []
    for row in numbered_image_rows(count):
        record = ImageRecord.from_annotations(
            row["uri"], row["uri"], (0, 0), (), annotated=False
        )
        records.append(record)
    dataset = Dataset("plain", tuple(records))
    inspected = (
        {name: row[name] for name in ("image_id", "uri", "width", "height")}
        for row in numbered_image_rows(count)
    )
    context = build_context(folder)
    formats = type("formats", (), {"read_dataset": lambda *_: dataset})
    images_stage.formats = formats  # type: ignore[assignment,attr-defined]
    images_stage.inspect_images = lambda *_: inspected  # type: ignore[attr-defined]
    images_stage.run(
        replace(context, config=replace(context.config, data=Folder("somewhere")))
    )


def merge_parts(folder: str, count: int) -> None:
    from coin_ray import storage
    from coin_ray.stages import collect as collect_stage

    (Path(folder) / "out").mkdir(exist_ok=True)
    if not (Path(folder) / "out" / "parts").exists():
        (Path(folder) / "out" / "parts").symlink_to(Path(folder) / "collect" / "parts")
    image_table = storage.read_table(f"{folder}/images/images.parquet")
    first_rows = collect_stage._first_rows(image_table)
    collect_stage._merge(build_context(folder), first_rows)


def run_separate(folder: str, count: int) -> None:
    from coin_ray import tables
    from coin_ray.stages import separate as separate_stage
    from coin_ray.stages.common import prediction as prediction
    from coin_ray.structures import Detections, Separation

    def predict_blocks(
        _: object, image_table: pa.Table, __: object
    ) -> Iterator[pa.Table]:
        for start in range(0, len(image_table), prediction.BLOCK):
            yield random_rows(
                start,
                min(prediction.BLOCK, len(image_table) - start),
                tables.DETECTIONS,
                "clip_detector",
            )

    prediction._predict_in_process = predict_blocks  # type: ignore[assignment]
    separation = Separation.from_labels(Detections.empty(CLASSES), reviewed=False)
    separate_stage.separate_knowledge = lambda *_, **__: separation  # type: ignore[attr-defined]
    # not the folder of collect: its parts would count as finished predictions
    separate_stage.run(replace(build_context(folder), folder=f"{folder}/separated"))


def open_propagation_labels(folder: str, count: int) -> None:
    from coin_ray.stages.common.training_labels import (
        build_training_examples,
        count_labels,
        open_training_labels,
    )

    context = build_context(folder)
    examples = build_training_examples(
        context.inputs["images"],
        open_training_labels("clip", context.inputs, context.config),
    )
    count_labels("clip", context.inputs, context.config)
    assert len(examples) == count


def read_for_report(folder: str, count: int) -> None:
    """Run the parts of report and evaluate that read training images."""
    from coin_ray.stages import evaluate
    from coin_ray.stages import report as report_stage
    from coin_ray.stages.reporting import measurements as measurements
    from coin_ray.stages.reporting import pictures

    context = build_context(folder)
    evaluate._measure_separation(context)
    report_stage._count_kept(context)
    measurements.count_teacher_confusion(context)
    measurements.read_test_annotations(context)
    pictures._select_training_images(context, 24)


STEPS: dict[str, Callable[[str, int], None]] = {
    "images": run_images,
    "collect": merge_parts,
    "propagate": open_propagation_labels,
    "separate": run_separate,
    "report": read_for_report,
}


def measure_step(step: str, warm: str, folder: str, count: int) -> dict[str, float]:
    """Measure peak memory and CPU seconds of one step in this process."""
    with contextlib.redirect_stdout(sys.stderr):
        STEPS[step](warm, WARM)
        pa.default_memory_pool().release_unused()
        before, start = own_bytes(), time.process_time()
        with Peak() as peak:
            STEPS[step](folder, count)
    return {"bytes": peak.peak_bytes - before, "seconds": time.process_time() - start}


def measure_steps(sizes: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Yield a row by size and step: MiB above those of 100 images, and CPU seconds."""
    with tempfile.TemporaryDirectory(prefix="bench_memory-") as folder:
        for count in (WARM, *sizes):
            write_inputs(f"{folder}/{count}", count)
        for count in sizes:
            for step in STEPS:
                command = [
                    sys.executable,
                    __file__,
                    step,
                    f"{folder}/{WARM}",
                    f"{folder}/{count}",
                    str(count),
                ]
                paths = os.pathsep.join(
                    [str(REPOSITORY), os.environ.get("PYTHONPATH", "")]
                )
                completed = subprocess.run(
                    command,
                    stdout=subprocess.PIPE,
                    text=True,
                    check=True,
                    env={**os.environ, "PYTHONPATH": paths},
                )
                measurement = json.loads(completed.stdout)
                yield {
                    "images": count,
                    "step": step,
                    "MiB": measurement["bytes"] / 2**20,
                    "CPU s": measurement["seconds"],
                }


def bytes_per_image(measurements: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return the bytes per image of each step, between the two largest sizes."""
    sizes = sorted({row["images"] for row in measurements})[-2:]
    mib = {(row["step"], row["images"]): row["MiB"] for row in measurements}
    more_images = max(sizes[-1] - sizes[0], 1)
    return {
        step: round((mib[step, sizes[-1]] - mib[step, sizes[0]]) * 2**20 / more_images)
        for step in STEPS
    }


def measure_and_print(sizes: Sequence[int]) -> dict[str, Any]:
    """Measure all steps, print a table, and return all figures."""
    measurements = []
    print(f"{'images':>9} {'step':<10} {'MiB':>8} {'CPU s':>8}")
    for row in measure_steps(sizes):
        measurements.append(row)
        print(
            f"{row['images']:>9,} {row['step']:<10} {row['MiB']:>8.1f}"
            f" {row['CPU s']:>8.1f}",
            flush=True,
        )
    print(
        "bytes an image: "
        + "  ".join(
            f"{step} {number}" for step, number in bytes_per_image(measurements).items()
        ),
        flush=True,
    )
    return {"rows": measurements, "bytes per image": bytes_per_image(measurements)}


if __name__ == "__main__":
    print(
        json.dumps(
            measure_step(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))
        )
    )
