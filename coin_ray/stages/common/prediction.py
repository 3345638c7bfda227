"""Detections of trained detectors in many images, as tables: in this process, or by
actors of the cluster. Rows come back in the images' order.
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
from coin_ray.data.augmentation import resize_to_fit
from coin_ray.data.canonical import decode_rgb
from coin_ray.data.pixels import IntensityRange
from coin_ray.models.faster_rcnn_clip.backbone import load_backbone
from coin_ray.models.students.building import is_detector_student
from coin_ray.stages.common.blocks import dataset_from_table
from coin_ray.stages.common.cluster import (
    cluster_cpus,
    count_torch_threads,
    ensure_ray,
    largest_node_cpus,
    on_cluster,
)
from coin_ray.stages.common.progress import show_progress
from coin_ray.stages.common.students import DeployedDetector, load_trained_detector
from coin_ray.structures import Detections
from coin_ray.tables import Provenance, detections_row
from coin_ray.training.own_opinion import OwnOpinion

BATCH = 16
"""Images that a detector gets at once."""
BLOCK = 64
"""Images of one table."""
PART_SECONDS = 300.0
"""How much work a killed prediction loses at most."""


def predict_images(
    weights: dict[str, str], images: pa.Table, config: PipelineConfig, *, first: int = 0
) -> Iterator[pa.Table]:
    """Yield ``DETECTIONS`` of several detectors (URIs of weights by name) in the same
    images, each decoded once, in blocks in the images' order.

    ``images``: columns ``image_id`` and ``uri``; those before row ``first`` are done.
    ``source`` names the detector.
    """
    remaining = images.select(["image_id", "uri"]).slice(first)
    if not len(remaining):
        return
    predict_blocks = _predict_on_cluster if on_cluster() else _predict_in_process
    blocks = predict_blocks(weights, remaining, config)
    count = first
    with show_progress("predict", len(images)) as progress:
        for block in _in_order(blocks, remaining["image_id"], len(weights)):
            count += block.num_rows // len(weights)
            progress.update(count, f"{len(weights)} detectors")
            yield block


def write_predictions(
    weights: dict[str, str], images: pa.Table, config: PipelineConfig, folder: str
) -> None:
    """Write ``predict_images`` as ``NAME.parquet`` below the folder, one for each
    detector.

    Until those are complete there are parts, one for each ``PART_SECONDS``: a run that
    was killed goes on after the last.
    """
    files = {name: storage.join(folder, f"{name}.parquet") for name in weights}
    if all(storage.exists(file) for file in files.values()):
        return
    parts_folder = storage.join(folder, "parts")
    finished_parts = storage.list_files(parts_folder, ".parquet")
    finished_rows = sum(storage.row_count(part) for part in finished_parts)
    first = finished_rows // len(weights)
    blocks = predict_images(weights, images, config, first=first)
    _write_parts(blocks, parts_folder, first, len(weights))
    parts = storage.list_files(parts_folder, ".parquet")
    _split_by_detector(parts, files)
    for part in parts:
        storage.remove(part)


def _write_parts(
    blocks: Iterator[pa.Table], folder: str, first: int, num_detectors: int
) -> None:
    """Write files of ``PART_SECONDS`` of work, each named by the number of its first
    image.
    """
    for first_block in blocks:
        end = time.monotonic() + PART_SECONDS
        uri = storage.join(folder, f"{first:012}.parquet")
        with storage.table_writer(uri, tables.DETECTIONS) as part:
            block: pa.Table | None = first_block
            while block is not None:
                part.write(block)
                first += block.num_rows // num_detectors
                block = next(blocks, None) if time.monotonic() < end else None


def _split_by_detector(parts: Sequence[str], files: dict[str, str]) -> None:
    """Write the rows of each detector from all parts into its file."""
    with ExitStack() as open_files:
        writers = {
            name: open_files.enter_context(
                storage.table_writer(file, tables.DETECTIONS)
            )
            for name, file in files.items()
        }
        blocks = chain.from_iterable(storage.stream_table(part) for part in parts)
        for block in blocks:
            for name, writer in writers.items():
                writer.write(block.filter(pc.equal(block["source"], name)))


def _in_order(
    blocks: Iterable[pa.Table], image_ids: pa.ChunkedArray, num_detectors: int
) -> Iterator[pa.Table]:
    """Yield the blocks in the images' order. On a cluster one block may overtake
    another; it waits here.
    """
    waiting: dict[int, pa.Table] = {}
    next_row = 0
    for block in blocks:
        first_row = pc.index(image_ids, block["image_id"][0], start=next_row).as_py()
        waiting[first_row] = block
        while next_row in waiting:
            ready = waiting.pop(next_row)
            next_row += ready.num_rows // num_detectors
            yield ready


def _predict_in_process(
    weights: dict[str, str], images: pa.Table, config: PipelineConfig
) -> Iterator[pa.Table]:
    """Predict with all cores of this process: on one machine an actor would take time
    to start and gain nothing.
    """
    detectors = DetectorGroup(weights, config)
    for start in range(0, images.num_rows, BLOCK):
        yield detectors(images.slice(start, BLOCK))


def _predict_on_cluster(
    weights: dict[str, str], images: pa.Table, config: PipelineConfig
) -> Iterator[pa.Table]:
    """Predict on as many GPUs as train, or in an actor for each node. Blocks are cut
    here: an actor may hold the only CPU.
    """
    ensure_ray()
    training = config.distill.fit
    if training.gpu:
        cpus = 1
        actors = training.max_workers or training.workers
    else:
        cpus = max(1, largest_node_cpus() - 1)
        actors = max(1, cluster_cpus() // cpus)
    num_blocks = max(1, -(-images.num_rows // BLOCK))
    predictions = dataset_from_table(images, num_blocks).map_batches(
        DetectorGroup,
        fn_constructor_args=(weights, config),
        batch_size=None,
        batch_format="pyarrow",
        num_cpus=cpus,
        num_gpus=1 if training.gpu else 0,
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=actors),
    )
    yield from predictions.iter_batches(batch_size=None, batch_format="pyarrow")


class DetectorGroup:
    """Several detectors that predict blocks of images; an actor on a cluster."""

    def __init__(self, weights: dict[str, str], config: PipelineConfig) -> None:
        self.config = config
        storage.set_patience(config.storage.patience)
        torch.set_num_threads(count_torch_threads())
        backbone = load_backbone(config) if config.has_backbone else None
        device = torch.device("cuda" if config.distill.fit.gpu else "cpu")
        self.detectors = {
            name: load_trained_detector(name, uri, backbone, config).to(device)
            for name, uri in weights.items()
        }

    def __call__(self, images: pa.Table) -> pa.Table:
        """Return ``DETECTIONS`` of all detectors in the images (``image_id``, ``uri``)."""
        rows = []
        image_rows = images.to_pylist()
        for start in range(0, len(image_rows), BATCH):
            batch = image_rows[start : start + BATCH]
            intensity_range = self.config.intensity_range
            originals = [read_image(row["uri"], intensity_range) for row in batch]
            for name, detector in self.detectors.items():
                detections = predict(detector, originals, self.config.detector)
                rows += [
                    detections_row(row["image_id"], in_image, Provenance(name))
                    for row, in_image in zip(batch, detections, strict=True)
                ]
        return tables.detections_table(rows)


def read_image(uri: str, intensity_range: IntensityRange | None) -> torch.Tensor:
    """Return an image as uint8 [3, H, W], upright. ``intensity_range``: of a run's deep
    grey images.
    """
    pixels = decode_rgb(storage.read_bytes(uri), intensity_range)
    image: torch.Tensor = pil_to_tensor(pixels)
    return image


def predict(
    detector: DeployedDetector, originals: Sequence[torch.Tensor], config: Detector
) -> list[Detections]:
    """Return detections, on the CPU, in the frame of the original uint8 images [3, H,
    W].
    """
    cpu = torch.device("cpu")
    if isinstance(detector, OwnOpinion) or is_detector_student(detector):
        return [detections.to(cpu) for detections in detector.predict(originals)]
    resized = [
        resize_to_fit(original, config.short_side, config.long_side)
        for original in originals
    ]
    predictions = detector.predict(detector.prepare(resized))
    in_original_frame = []
    for prediction, original, image in zip(
        predictions, originals, resized, strict=True
    ):
        detections = prediction.to(cpu)
        boxes = box_ops.scale_boxes(
            detections.boxes,
            original.shape[2] / image.shape[2],
            original.shape[1] / image.shape[1],
        )
        in_original_frame.append(detections.with_boxes(boxes))
    return in_original_frame
