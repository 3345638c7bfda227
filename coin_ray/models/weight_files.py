"""Read PyTorch's files of weights that a user names."""

from __future__ import annotations

import io
import pickle
import zipfile
from typing import Any

import torch

from coin_ray.errors import InputError


def read_tensors(content: bytes, name: str) -> Any:
    """Return what ``torch.save`` wrote, with all tensors on the CPU.

    ``name``: of the file and, if any, its setting, for the error. Raises InputError if
    the content is truncated, or no such file, or holds more than tensors.
    """
    try:
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except (
        RuntimeError,
        EOFError,
        ValueError,
        pickle.UnpicklingError,
        zipfile.BadZipFile,
    ) as error:
        reason = str(error) or type(error).__name__
        raise InputError(
            f"{name} can't be read: its {len(content):,} bytes are truncated, no file of"
            " torch.save, or hold more than tensors"
            f" ({reason.splitlines()[0][:200]})"
        ) from error
