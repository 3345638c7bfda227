"""Class embeddings without a text encoder, in the place of learned prompts
(``coin_ray.clip.prompts``).
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from coin_ray.config import MobileNet
from coin_ray.data.coco_classes import COCO_CLASSES
from coin_ray.errors import InputError
from coin_ray.storage import exists, read_bytes


class ClassVectors(nn.Module):
    """[K+1, D], background last: ``learned``, or fixed and of unit length: text
    embeddings encoded elsewhere, or those of an export.
    """

    def __init__(self, values: Tensor, *, learned: bool) -> None:
        super().__init__()
        self.learned = learned
        self.values = nn.Parameter(values.clone(), requires_grad=learned)

    def forward(self) -> Tensor:
        """Class embeddings [K+1, D], unit length, background last."""
        return F.normalize(self.values, dim=-1) if self.learned else self.values


def first_vectors(config: MobileNet, classes: Sequence[str], *, seed: int) -> Tensor:
    """[K+1, D], unit length: the text vectors of the config, or random ones;
    background, last, is always random.
    """
    generator = torch.Generator().manual_seed(seed)
    if config.text_vectors is None:
        return F.normalize(
            torch.randn(len(classes) + 1, config.vector_size, generator=generator),
            dim=-1,
        )
    known = F.normalize(coco_text_vectors(config.text_vectors, classes), dim=-1)
    background = torch.randn(1, known.shape[1], generator=generator)
    return torch.cat([known, F.normalize(background, dim=-1)])


def coco_text_vectors(uri: str, classes: Sequence[str]) -> Tensor:
    """Rows [K, D] of a .npy matrix that holds one embedding per COCO class. Raises
    InputError if it is none or a class is not COCO's.
    """
    if not exists(uri):
        raise InputError(f"mobilenet.text_vectors: no such file {uri}")
    try:
        matrix = np.load(io.BytesIO(read_bytes(uri)), allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise InputError(
            f"mobilenet.text_vectors: {uri} is no .npy file: {error}"
        ) from error
    if matrix.ndim != 2 or len(matrix) != len(COCO_CLASSES):
        raise InputError(
            f"mobilenet.text_vectors: {uri} should be [{len(COCO_CLASSES)}, D], one row"
            f" per COCO class; it is {matrix.shape}"
        )
    unknown = [name for name in classes if name.lower() not in COCO_CLASSES]
    if unknown:
        raise InputError(
            f"mobilenet.text_vectors knows COCO's classes, not {', '.join(unknown)};"
            " leave it out and vectors are learned"
        )
    return torch.from_numpy(
        matrix[[COCO_CLASSES.index(name.lower()) for name in classes]].astype(
            np.float32
        )
    )
