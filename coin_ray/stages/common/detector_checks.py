"""Checks before a supervised detector training: its images, its network and its GPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from coin_ray.cloud.label_map import LabelMap
from coin_ray.config.detector_training import (
    DEMO,
    DEMO_SOURCE,
    LABEL_FORMATS,
    DetectorConfig,
    dataset_folder,
)
from coin_ray.data.formats import Dataset, read_dataset
from coin_ray.errors import ConfigError, InputError

BoxCounts = dict[str, Counter[str]]
"""By split ("train", "val", "test"): annotated ``images``, and boxes by class."""


def check_labelled_images(config: DetectorConfig) -> BoxCounts:
    """Count annotated images and boxes by class of each split, from the labels alone.
    Raise InputError for what can't be trained on. Nothing is counted for the demo.
    """
    if config.data in (DEMO, DEMO_SOURCE):
        return {}
    counts: BoxCounts = {}
    for split, location in (
        ("train", config.data),
        ("val", config.val),
        ("test", config.test),
    ):
        if location:
            dataset = _read_in_format(location)
            counts[split] = _count_boxes(dataset, split, location, config.classes)
    return counts


def check_network(config: DetectorConfig) -> None:
    """Check that the backbone (or the whole network), its weights and the GPU are
    available. Raise ConfigError or InputError.
    """
    import torch

    if config.model == "co-detr":
        from coin_ray.models.co_detr.towers import build_backbone

        build_backbone(config.backbone)
    else:
        from coin_ray.models.co_detr.transformers_detr import load_transformers_detr

        load_transformers_detr(config.network, config.model, config.classes)
    if config.fit.gpu and config.fit.workers == 1 and not torch.cuda.is_available():
        from coin_ray.stages.common.cluster import on_cluster

        if not on_cluster():
            raise ConfigError(
                "fit.gpu is on, but there is no CUDA device: leave it off, or run on a"
                " machine with a GPU"
            )


def _read_in_format(location: str) -> Dataset:
    """Read ``FORMAT:FOLDER`` or ``FOLDER``. Raise InputError for another format."""
    dataset = read_dataset(dataset_folder(location))
    expected_format = location.partition(":")[0]
    names_format = (
        expected_format in LABEL_FORMATS and dataset_folder(location) != location
    )
    if names_format and dataset.format != expected_format:
        raise InputError(
            f"--data {location}: the folder is in the format {dataset.format}, not"
            f" {expected_format} (docs/formats.md)"
        )
    return dataset


def _count_boxes(
    dataset: Dataset, split: str, location: str, classes: Sequence[str]
) -> Counter[str]:
    label_map = LabelMap.of_classes(classes)
    class_by_label = {}
    for label in dataset.names:
        match = label_map.find([label])
        if match is not None:
            class_by_label[label] = classes[match[0]]
    annotated = [record for record in dataset.records if record.annotated]
    boxes = Counter(
        class_by_label[label]
        for record in annotated
        for label in record.labels
        if label in class_by_label
    )
    absent_classes = [name for name in classes if not boxes[name]]
    if split == "train" and absent_classes:
        label_names = ", ".join(sorted(dataset.names))[:300] or "no names"
        raise InputError(
            f"--data {location}: no box of {', '.join(absent_classes)} in"
            f" {len(annotated)} annotated images; its classes are {label_names}"
        )
    if not boxes:
        raise InputError(
            f"--{split} {location}: no box of {', '.join(classes)} in"
            f" {len(annotated)} annotated images"
        )
    return Counter({"images": len(annotated), **boxes})
