"""Class embeddings without a text encoder, instead of learned prompts
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
    """Class vectors [K+1, D], background last: ``learned``, or fixed and of unit length,
    such as text embeddings encoded elsewhere, or those of an export.
    """

    def __init__(self, values: Tensor, *, learned: bool) -> None:
        super().__init__()
        self.learned = learned
        self.values = nn.Parameter(values.clone(), requires_grad=learned)

    def forward(self) -> Tensor:
        """Return class embeddings [K+1, D], unit length, background last."""
        return F.normalize(self.values, dim=-1) if self.learned else self.values


def initial_vectors(config: MobileNet, classes: Sequence[str], *, seed: int) -> Tensor:
    """Return vectors [K+1, D], unit length: the text vectors of the config, or random
    ones; background, last, is always random.
    """
    generator = torch.Generator().manual_seed(seed)
    if config.text_vectors is None:
        vectors = torch.randn(len(classes) + 1, config.vector_size, generator=generator)
        return F.normalize(vectors, dim=-1)
    text_vectors = load_coco_text_vectors(config.text_vectors, classes)
    background = torch.randn(1, text_vectors.shape[1], generator=generator)
    return torch.cat(
        [F.normalize(text_vectors, dim=-1), F.normalize(background, dim=-1)]
    )


def load_coco_text_vectors(uri: str, classes: Sequence[str]) -> Tensor:
    """Load the rows [K, D] of ``classes`` from a .npy matrix with one embedding per COCO
    class. Raises InputError if it is no such matrix or a class is not COCO's.
    """
    if not exists(uri):
        raise InputError(f"mobilenet.text_vectors: no such file {uri}")
    try:
        matrix = np.load(io.BytesIO(read_bytes(uri)), allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise InputError(
            f"mobilenet.text_vectors: {uri} is not a .npy file: {error}"
        ) from error
    if matrix.ndim != 2 or len(matrix) != len(COCO_CLASSES):
        raise InputError(
            f"mobilenet.text_vectors: {uri} must have shape [{len(COCO_CLASSES)}, D],"
            f" one row per COCO class; got {list(matrix.shape)}"
        )
    unknown = [name for name in classes if name.lower() not in COCO_CLASSES]
    if unknown:
        raise InputError(
            "mobilenet.text_vectors: only COCO classes have a vector, not"
            f" {', '.join(unknown)}; leave the setting out to learn the vectors"
        )
    rows = [COCO_CLASSES.index(name.lower()) for name in classes]
    return torch.from_numpy(matrix[rows].astype(np.float32))
