from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from PIL.Image import Image

from coin_ray.config import Folder
from coin_ray.config.presets import demo
from coin_ray.tables import Truth
from tests.builders import CLASSES, tiny_detector
from tests.images import noise_image

if TYPE_CHECKING:
    from coin_ray.export.package import ExportMeasurements

SIZES = ((96, 64), (64, 80), (72, 72), (300, 120), (9, 8), (50, 400), (1, 1))
BOX = torch.tensor([[10.0, 10.0, 60.0, 50.0]])
LABELLED = [
    (
        noise_image(96, 64, seed),
        Truth(BOX, torch.tensor([seed]), torch.tensor([False])),
    )
    for seed in range(3)
]
INTENSITY_RANGE = (20_000.0, 30_000.0)
"""Of the images with 16 bits that the student was trained on."""
SUMMARY = {
    "images": {"train": 500, "test": 300},
    "map50": {"cloud": 0.387, "student": 0.459, "oracle": None},
}


@dataclass(frozen=True)
class Package:
    """An export with its 8-bit file, compared with the model on ``images``."""

    folder: Path
    measurements: ExportMeasurements
    images: list[Image]


@pytest.fixture(scope="session")
def package(tmp_path_factory: pytest.TempPathFactory) -> Package:
    """One for all: PyTorch's exporter takes seconds."""
    pytest.importorskip("onnxscript", reason="needs the extra export")
    from coin_ray.export.package import Int8Images, TrainedStudent, write_package

    folder = tmp_path_factory.mktemp("package")
    config = replace(demo(), data=Folder(intensity_range=INTENSITY_RANGE))
    student = TrainedStudent(
        tiny_detector(score_min=0.02), CLASSES, (), config, SUMMARY
    )
    images = [noise_image(*size, seed) for seed, size in enumerate(SIZES)]
    training = (noise_image(96, 64, seed) for seed in range(20, 28))
    int8_images = Int8Images(training, LABELLED)
    measurements = write_package(student, images, str(folder), int8_images)
    return Package(folder, measurements, images)
