"""The second half of collection: actors that give the second opinion on the clouds'
boxes and write the parts.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from coin_ray import storage
from coin_ray.clip.crops import ImageBoxes
from coin_ray.cloud.detections import vectors_column
from coin_ray.config import PipelineConfig
from coin_ray.data.canonical import decode_rgb
from coin_ray.runs.failed_images import LABELER_DEATH
from coin_ray.stages.collecting.attempts import Attempts
from coin_ray.stages.collecting.cloud_actor import ANSWER_SCHEMA, STOPPED
from coin_ray.stages.collecting.labelers import create_labeler
from coin_ray.stages.collecting.parts import PART_SCHEMA, box_counts_metadata
from coin_ray.stages.common.cluster import count_torch_threads
from coin_ray.stages.common.watchdog import Watchdog

MAX_DEATHS = 2
"""Labelers that one image may cost, beside the first, of which only the batch is known."""
PROGRESS_COLUMNS = ("image_id", "status", "calls", "cost_usd", "error")


class LabelerActor:
    """Adds the labeler's probabilities for the clouds' boxes and writes each batch as a
    part.
    """

    def __init__(self, config: PipelineConfig, parts_folder: str) -> None:
        self.config = config
        storage.set_patience(config.storage.patience)
        self.parts_folder = parts_folder
        self.attempts = Attempts(f"{parts_folder}_begun")
        torch.set_num_threads(count_torch_threads())
        self.labeler = create_labeler(config, text_cache(parts_folder))

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Write the answers of ``ANSWER_SCHEMA`` as a part; return the columns that
        show progress.
        """
        answers = batch.filter(pc.not_equal(batch["status"], STOPPED))
        if answers.num_rows:
            self._write_part(answers)
        return batch.select(PROGRESS_COLUMNS)

    def _write_part(self, answers: pa.Table) -> None:
        image_ids = "".join(answers["image_id"].to_pylist())
        key = hashlib.sha256(image_ids.encode()).hexdigest()[:16]
        with (
            self.attempts.begin(key) as deaths,
            Watchdog("a labeler", self.config.collect.batch_seconds),
        ):
            label = self._label_one_by_one if deaths else self._label
            uri = storage.join(self.parts_folder, f"{uuid.uuid4().hex}.parquet")
            part = label(answers).replace_schema_metadata(box_counts_metadata(answers))
            storage.write_table(uri, part)

    def _label_one_by_one(self, answers: pa.Table) -> pa.Table:
        """Label a batch that killed a labeler: an image that does so again is recorded
        as an error, the others are kept.
        """
        rows = []
        for number in range(answers.num_rows):
            answer = answers.slice(number, 1)
            with self.attempts.begin(answer["image_id"][0].as_py()) as deaths:
                if deaths >= MAX_DEATHS:
                    answer = _as_error(
                        answer,
                        f"{LABELER_DEATH} {deaths} times with it",
                    )
                rows.append(self._label(answer))
        return pa.concat_tables(rows)

    def _label(self, answers: pa.Table) -> pa.Table:
        """Return the answers as rows of ``PART_SCHEMA``."""
        boxes = _split_boxes(answers["boxes"])
        clip_probs = self._classify(answers["bytes"], boxes)
        columns = {name: answers[name] for name in answers.column_names}
        columns["clip_probs"] = vectors_column(
            [probs.cpu().numpy() for probs in clip_probs]
        )
        part_columns = {name: columns[name] for name in PART_SCHEMA.names}
        return pa.table(part_columns, schema=PART_SCHEMA)

    def _classify(
        self, files: pa.ChunkedArray, boxes: Sequence[Tensor]
    ) -> Sequence[Tensor]:
        """Return the labeler's probabilities [N, K+1] of each image's boxes [N, 4]; none
        without a labeler.
        """
        nothing = torch.zeros(0, len(self.config.classes) + 1)
        if self.labeler is None:
            return [nothing] * len(boxes)
        rows = [row for row, image_boxes in enumerate(boxes) if len(image_boxes)]
        labelled = self.labeler.label(self._decode_images(files, boxes, rows))
        by_row = dict(zip(rows, labelled, strict=True))
        return [by_row.get(row, nothing) for row in range(len(boxes))]

    def _decode_images(
        self, files: pa.ChunkedArray, boxes: Sequence[Tensor], rows: Sequence[int]
    ) -> Iterator[ImageBoxes]:
        """Decode one image after another: a batch of them may not fit into memory."""
        for row in rows:
            pixels = decode_rgb(files[row].as_py(), self.config.intensity_range)
            yield pil_to_tensor(pixels), boxes[row]


def text_cache(parts_folder: str) -> str:
    """Return the folder of the text embeddings that all labelers of these parts use."""
    return f"{parts_folder}_texts"


def _split_boxes(column: pa.ChunkedArray) -> tuple[Tensor, ...]:
    """Return the boxes [N, 4] of each image of a column of type ``tables.BOXES``."""
    boxes = column.combine_chunks()
    counts = pc.list_value_length(boxes).to_pylist()
    coordinates = boxes.flatten().flatten().to_numpy()
    all_boxes = torch.tensor(coordinates, dtype=torch.float32).reshape(-1, 4)
    by_image: tuple[Tensor, ...] = torch.split(all_boxes, counts)
    return by_image


def _as_error(answer: pa.Table, reason: str) -> pa.Table:
    """Return the row with an error in place of its detections."""
    (row,) = answer.to_pylist()
    row |= {"status": "error", "error": reason}
    row |= {"boxes": [], "scores": [], "labels": [], "probs": [], "prob_source": []}
    return pa.Table.from_pylist([row], schema=ANSWER_SCHEMA)
