"""Trained detectors' results on many images, as tables: in this process, or by actors
of the cluster. Rows come back in the images' order.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from itertools import chain

import pyarrow as pa
import pyarrow.compute as pc
import ray
import torch
from torchvision.transforms.functional import pil_to_tensor

from coin_ray import boxes as box_ops
from coin_ray import storage, tables
from coin_ray.config import Detector, PipelineConfig
from coin_ray.data.augmentation import fit
from coin_ray.data.canonical import decode_rgb
from coin_ray.models.faster_rcnn_clip.backbone import load_backbone
from coin_ray.stages.common.cluster import (
    cluster_cpus,
    ensure_ray,
    largest_node_cpus,
    on_cluster,
    threads,
)
from coin_ray.stages.common.progress import bar
from coin_ray.stages.common.students import Deployed, load_detector
from coin_ray.structures import Detections
from coin_ray.tables import Provenance, detections_row

BATCH, BLOCK = 16, 64
KEPT_SECONDS = 300.0
"""How much work a killed prediction loses at most."""


def predictions(
    weights: dict[str, str], images: pa.Table, config: PipelineConfig, *, first: int = 0
) -> Iterator[pa.Table]:
    """``DETECTIONS`` of several detectors (weights' URIs by name) over the same images,
    each decoded once, in blocks in the images' order.

    ``images``: columns ``image_id`` and ``uri``; those before row ``first`` are done.
    ``source`` names the detector.
    """
    table = images.select(["image_id", "uri"]).slice(first)
    if not len(table):
        return
    blocks = (
        _on_cluster(weights, table, config)
        if on_cluster()
        else _here(weights, table, config)
    )
    done = first
    with bar("predict", len(images)) as shown:
        for block in _in_order(blocks, table["image_id"], len(weights)):
            done += block.num_rows // len(weights)
            shown.update(done, f"{len(weights)} detectors")
            yield block


def write_predictions(
    weights: dict[str, str], images: pa.Table, config: PipelineConfig, folder: str
) -> None:
    """``predictions`` as ``NAME.parquet`` below the folder, one for each detector.

    Until those are whole there are parts, one for each ``KEPT_SECONDS``: a run that was
    killed goes on after the last.
    """
    files = {name: storage.join(folder, f"{name}.parquet") for name in weights}
    if all(storage.exists(file) for file in files.values()):
        return
    parts = storage.join(folder, "parts")
    first = sum(
        storage.row_count(part) for part in storage.list_files(parts, ".parquet")
    ) // len(weights)
    _keep(predictions(weights, images, config, first=first), parts, first, len(weights))
    kept = storage.list_files(parts, ".parquet")
    with ExitStack() as open_files:
        writers = {
            n: open_files.enter_context(storage.table_writer(file, tables.DETECTIONS))
            for n, file in files.items()
        }
        for block in chain.from_iterable(storage.stream_table(part) for part in kept):
            for name, writer in writers.items():
                writer.write(block.filter(pc.equal(block["source"], name)))
    for part in kept:
        storage.remove(part)


def _keep(blocks: Iterator[pa.Table], folder: str, first: int, detectors: int) -> None:
    """Files of ``KEPT_SECONDS`` of work, each named by the number of its first image."""
    for start in blocks:
        until = time.monotonic() + KEPT_SECONDS
        with storage.table_writer(
            storage.join(folder, f"{first:012}.parquet"), tables.DETECTIONS
        ) as part:
            block: pa.Table | None = start
            while block is not None:
                part.write(block)
                first += block.num_rows // detectors
                block = next(blocks, None) if time.monotonic() < until else None


def _in_order(
    blocks: Iterable[pa.Table], images: pa.ChunkedArray, detectors: int
) -> Iterator[pa.Table]:
    """On a cluster one block may overtake another; it waits here."""
    waiting: dict[int, pa.Table] = {}
    place = 0
    for block in blocks:
        waiting[pc.index(images, block["image_id"][0], start=place).as_py()] = block
        while place in waiting:
            first = waiting.pop(place)
            place += first.num_rows // detectors
            yield first


def _here(
    weights: dict[str, str], table: pa.Table, config: PipelineConfig
) -> Iterator[pa.Table]:
    """In this process, with all its cores: on one machine an actor would only have to
    be started.
    """
    detectors = Detectors(weights, config)
    for start in range(0, table.num_rows, BLOCK):
        yield detectors(table.slice(start, BLOCK))


def _on_cluster(
    weights: dict[str, str], table: pa.Table, config: PipelineConfig
) -> Iterator[pa.Table]:
    """On as many GPUs as train, or in an actor for each node. Blocks are cut here: an
    actor may hold the only CPU.
    """
    ensure_ray()
    fit = config.distill.fit
    cpus = 1 if fit.gpu else max(1, largest_node_cpus() - 1)
    actors = (
        (fit.max_workers or fit.workers) if fit.gpu else max(1, cluster_cpus() // cpus)
    )
    stream = ray.data.from_arrow(
        table, override_num_blocks=max(1, -(-table.num_rows // BLOCK))
    ).map_batches(
        Detectors,
        fn_constructor_args=(weights, config),
        batch_size=None,
        batch_format="pyarrow",
        num_cpus=cpus,
        num_gpus=1 if fit.gpu else 0,
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=actors),
    )
    yield from stream.iter_batches(batch_size=None, batch_format="pyarrow")


class Detectors:
    """Several detectors that look at blocks of images; an actor on a cluster."""

    def __init__(self, weights: dict[str, str], config: PipelineConfig) -> None:
        self.config = config
        torch.set_num_threads(threads())
        backbone = load_backbone(config)
        device = torch.device("cuda" if config.distill.fit.gpu else "cpu")
        self.detectors = {
            name: load_detector(name, uri, backbone, config).to(device)
            for name, uri in weights.items()
        }

    def __call__(self, batch: pa.Table) -> pa.Table:
        rows = []
        sources = batch.to_pylist()
        for start in range(0, len(sources), BATCH):
            chunk = sources[start : start + BATCH]
            originals = [
                pil_to_tensor(decode_rgb(storage.read_bytes(row["uri"])))
                for row in chunk
            ]
            for name, detector in self.detectors.items():
                for row, found in zip(
                    chunk,
                    predict(detector, originals, self.config.detector),
                    strict=True,
                ):
                    rows.append(
                        detections_row(row["image_id"], found, Provenance(name))
                    )
        return tables.detections_table(rows)


def predict(
    detector: Deployed, originals: Sequence[torch.Tensor], config: Detector
) -> list[Detections]:
    """Detections, on the CPU, in the frame of the original uint8 images [3, H, W]."""
    views = [fit(image, config.short_side, config.long_side) for image in originals]
    found = [
        d.to(torch.device("cpu")) for d in detector.predict(detector.prepare(views))
    ]
    return [
        d.with_boxes(
            box_ops.scale(d.boxes, o.shape[2] / v.shape[2], o.shape[1] / v.shape[1])
        )
        for d, o, v in zip(found, originals, views, strict=True)
    ]
