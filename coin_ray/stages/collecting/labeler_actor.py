"""The second half of collection: actors that give the second opinion on the clouds'
boxes and write the parts.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from coin_ray import storage
from coin_ray.cloud.detections import vectors_column
from coin_ray.config import PipelineConfig
from coin_ray.runs.failed_images import LABELER_DEATH
from coin_ray.stages.collecting.attempts import Attempts
from coin_ray.stages.collecting.cloud_actor import ANSWER_SCHEMA, STOPPED
from coin_ray.stages.collecting.parts import PART_SCHEMA, box_counts_metadata
from coin_ray.stages.common.watchdog import Watchdog

LabelAnswers = Callable[[pa.Table], Sequence[NDArray[np.float32]]]
"""Returns the labeler's probabilities [N, K+1] of each answer's boxes [N, 4]."""

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
        self.label_answers = _load_labeler(config, text_cache(parts_folder))

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
        columns = {name: answers[name] for name in answers.column_names}
        columns["clip_probs"] = vectors_column(self.label_answers(answers))
        part_columns = {name: columns[name] for name in PART_SCHEMA.names}
        return pa.table(part_columns, schema=PART_SCHEMA)


def text_cache(parts_folder: str) -> str:
    """Return the folder of the text embeddings that all labelers of these parts use."""
    return f"{parts_folder}_texts"


def describe_labeler(config: PipelineConfig) -> str:
    """Say in a few words who gives the second opinion, and what happens without one."""
    labeler = config.collect.labeler
    if labeler == "none":
        return (
            "no second opinion on the clouds' boxes; the second teacher is a detector"
            " trained on their labels as they are"
        )
    if labeler == "classifier":
        return f"second opinions by the classifier {config.labeler.model}, on crops"
    model = config.labeler_clip.model.rpartition("/")[2].removesuffix(".json")
    method = "on crops" if labeler == "crop" else "on RoI features"
    return f"second opinions by CLIP {model}, {method}"


def _load_labeler(config: PipelineConfig, cache: str) -> LabelAnswers:
    if config.collect.labeler == "none":
        nothing = np.zeros((0, len(config.classes) + 1), np.float32)
        return lambda answers: [nothing] * answers.num_rows
    # imported only if needed: half a gigabyte of libraries
    from coin_ray.stages.collecting.labelers import AnswerLabeler

    return AnswerLabeler(config, cache)


def _as_error(answer: pa.Table, reason: str) -> pa.Table:
    """Return the row with an error in place of its detections."""
    (row,) = answer.to_pylist()
    row |= {"status": "error", "error": reason}
    row |= {"boxes": [], "scores": [], "labels": [], "probs": [], "prob_source": []}
    return pa.Table.from_pylist([row], schema=ANSWER_SCHEMA)
