"""The model that gives the second opinion on the clouds' boxes."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from coin_ray import storage
from coin_ray.clip.crops import ImageBoxes
from coin_ray.clip.encoder import (
    BACKGROUND,
    ClipModel,
    Setting,
    class_embeddings,
    load_clip,
    load_open_clip,
    make_prompts,
)
from coin_ray.clip.labeler import CropLabeler, Labeler, RoiLabeler
from coin_ray.config import PipelineConfig
from coin_ray.data.canonical import decode_rgb
from coin_ray.predictors.classifier_labeler import ClassifierLabeler, map_classes
from coin_ray.predictors.image_classifiers import load_image_classifier
from coin_ray.stages.common.cluster import count_torch_threads


class AnswerLabeler:
    """Labels the boxes of tables of answers (``ANSWER_SCHEMA``) with the labeler that
    the config names.
    """

    def __init__(self, config: PipelineConfig, cache: str) -> None:
        self.config = config
        torch.set_num_threads(count_torch_threads())
        self.labeler = create_labeler(config, cache)

    def __call__(self, answers: pa.Table) -> list[NDArray[np.float32]]:
        """Return the labeler's probabilities [N, K+1] of each answer's boxes [N, 4]."""
        assert self.labeler is not None
        boxes = _split_boxes(answers["boxes"])
        rows = [row for row, image_boxes in enumerate(boxes) if len(image_boxes)]
        labelled = self.labeler.label(self._decode(answers["bytes"], boxes, rows))
        by_row = dict(zip(rows, labelled, strict=True))
        nothing = torch.zeros(0, len(self.config.classes) + 1)
        return [by_row.get(row, nothing).cpu().numpy() for row in range(len(boxes))]

    def _decode(
        self, files: pa.ChunkedArray, boxes: Sequence[Tensor], rows: Sequence[int]
    ) -> Iterator[ImageBoxes]:
        """Decode one image after another: a batch of them may not fit into memory."""
        for row in rows:
            pixels = decode_rgb(files[row].as_py(), self.config.intensity_range)
            yield pil_to_tensor(pixels), boxes[row]


def _split_boxes(column: pa.ChunkedArray) -> tuple[Tensor, ...]:
    """Return the boxes [N, 4] of each image of a column of type ``tables.BOXES``."""
    boxes = column.combine_chunks()
    counts = pc.list_value_length(boxes).to_pylist()
    coordinates = boxes.flatten().flatten().to_numpy()
    all_boxes = torch.tensor(coordinates, dtype=torch.float32).reshape(-1, 4)
    by_image: tuple[Tensor, ...] = torch.split(all_boxes, counts)
    return by_image


def create_labeler(config: PipelineConfig, cache: str | None = None) -> Labeler | None:
    """Load the labeler that the config names; None if there is to be no second opinion.

    ``cache``: folder (a URI) of text embeddings, which are computed once. Raises
    InputError or ConfigError if a file is missing, a class has no name, or a text is
    longer than the model reads.
    """
    labeler = config.collect.labeler
    if labeler == "none":
        return None
    device = "cuda" if config.collect.labeler_gpus else "cpu"
    if labeler == "classifier":
        return _create_classifier_labeler(config, device)
    clip = _load_labeler_clip(config)
    clip.network.to(device)
    embeddings = _cached_embeddings(clip, config, cache)
    if labeler == "crop":
        has_own_model = config.labeler.model is not None
        return CropLabeler(
            clip,
            config.classes,
            config.labeler_clip,
            config.collect.crop_context,
            own_preprocessing=has_own_model or not clip.has_resnet_tower,
            sigmoid_prior=config.labeler.sigmoid_prior,
            embeddings=embeddings,
            fuse_batch_norms=config.collect.fuse_batch_norms,
        )
    detector = config.detector
    return RoiLabeler(
        clip,
        config.classes,
        config.labeler_clip,
        detector.short_side,
        detector.long_side,
        embeddings,
    )


def _create_classifier_labeler(
    config: PipelineConfig, device: str
) -> ClassifierLabeler:
    settings = config.labeler
    assert settings.model is not None, "check_runnable asks for it"
    classifier = load_image_classifier(settings.model, settings.pretrained, device)
    weights = map_classes(classifier, config.classes, settings.label_map)
    return ClassifierLabeler(classifier, weights, config.collect.crop_context)


def _load_labeler_clip(config: PipelineConfig) -> ClipModel:
    setting: Setting = "clip" if config.labeler.model is None else "labeler"
    load = load_open_clip if config.collect.labeler == "crop" else load_clip
    return load(config.labeler_clip, setting)


def _cached_embeddings(
    clip: ClipModel, config: PipelineConfig, cache: str | None
) -> Tensor:
    """Return the class embeddings [K+1, D] from the cache, or compute and store them."""
    if cache is None:
        return _compute_embeddings(clip, config)
    uri = storage.join(cache, f"{_text_digest(clip, config)}.npy")
    if storage.exists(uri):
        array = np.load(io.BytesIO(storage.read_bytes(uri)), allow_pickle=False)
        return torch.from_numpy(array).to(clip.device)
    embeddings = _compute_embeddings(clip, config)
    buffer = io.BytesIO()
    np.save(buffer, embeddings.cpu().numpy())
    storage.write_bytes(uri, buffer.getvalue())
    return embeddings


def _compute_embeddings(clip: ClipModel, config: PipelineConfig) -> Tensor:
    """Compute the class embeddings [K+1, D] with as many threads as a labeler has:
    rounding depends on their number, and whoever comes first fills the cache.
    """
    threads_before = torch.get_num_threads()
    torch.set_num_threads(count_torch_threads())
    try:
        return class_embeddings(
            clip, config.classes, config.labeler_clip, config.class_phrases
        )
    finally:
        torch.set_num_threads(threads_before)


def _text_digest(clip: ClipModel, config: PipelineConfig) -> str:
    """Return a hash of all that text embeddings depend on: the prompts, and the text
    tower with its weights.
    """
    digest = hashlib.sha256()
    for phrases in (*config.class_phrases, (BACKGROUND,)):
        for phrase in phrases:
            for prompt in make_prompts(phrase, config.labeler_clip):
                digest.update(prompt.encode() + b"\n")
        digest.update(b"\0")  # the end of a class
    network: Any = clip.network
    for name, child in network.named_children():
        if name != "visual":
            digest.update(f"{name} {child}".encode())
    for name, weights in network.state_dict().items():
        if not name.startswith("visual."):
            digest.update(name.encode())
            digest.update(weights.detach().cpu().float().numpy().tobytes())
    return digest.hexdigest()[:32]
