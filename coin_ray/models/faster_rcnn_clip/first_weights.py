"""First weights of a Faster R-CNN: those of one that was trained before."""

from __future__ import annotations

import lzma

from torch import Tensor

from coin_ray.errors import InputError
from coin_ray.models.faster_rcnn_clip.model import ClipDetector
from coin_ray.models.weight_files import read_tensors
from coin_ray.storage import exists, read_bytes

SETTING = "detector.weights"
OWN_TENSORS = ("prompts.values", "mean", "std")
"""Class vectors without a text are those of the run's own classes; the rest is the
backbone's."""


def load_first_weights(detector: ClipDetector, uri: str) -> ClipDetector:
    """Set the weights of ``detector`` that the file at ``uri`` has, and return it.

    The file is the ``detector.pt`` of a step, or the same without tensors of the
    backbone, in half precision, compressed by xz. Raises InputError if it is no such
    file, or of a network of another shape.
    """
    state = _read_state(uri)
    expected = detector.state_dict()
    weights = {
        name: tensor.float() if tensor.is_floating_point() else tensor
        for name, tensor in state.items()
        if name not in OWN_TENSORS
    }
    _check_state(weights, expected, uri)
    detector.load_state_dict(weights, strict=False)
    return detector


def _read_state(uri: str) -> dict[str, Tensor]:
    if not exists(uri):
        raise InputError(f"{SETTING}: no such file {uri}")
    content = read_bytes(uri)
    if uri.endswith(".xz"):
        try:
            content = lzma.decompress(content)
        except lzma.LZMAError as error:
            raise InputError(
                f"{SETTING}: {uri} is no whole .xz file: {error}"
            ) from error
    state = read_tensors(content, f"{SETTING}: {uri}")
    is_state = isinstance(state, dict) and all(
        isinstance(name, str) and isinstance(tensor, Tensor)
        for name, tensor in state.items()
    )
    if not is_state:
        raise InputError(
            f"{SETTING}: {uri} holds no tensors by name; expected the detector.pt of a"
            " Faster R-CNN in the folder of a propagate or distill step"
        )
    tensors: dict[str, Tensor] = state
    return tensors


def _check_state(
    weights: dict[str, Tensor], expected: dict[str, Tensor], uri: str
) -> None:
    """Raise InputError if the weights are not those of a detector of this shape, or lack
    any that the backbone does not have.
    """
    unknown = [name for name in weights if name not in expected]
    if unknown:
        raise InputError(
            f"{SETTING}: {uri} is of another network: {len(unknown)} of its"
            f" {len(weights)} tensors are unknown (the first: {unknown[0]}); expected the"
            " detector.pt of a Faster R-CNN with the same backbone"
        )
    differing = [n for n in weights if weights[n].shape != expected[n].shape]
    if differing:
        name = differing[0]
        raise InputError(
            f"{SETTING}: {uri}: {name} has shape {tuple(weights[name].shape)}, expected"
            f" {tuple(expected[name].shape)}: it was trained with other settings of"
            " detector or clip"
        )
    missing = [
        name
        for name in expected
        if name not in weights
        and name not in OWN_TENSORS
        and not name.startswith("tower.")
    ]
    if missing:
        raise InputError(
            f"{SETTING}: {uri} lacks {len(missing)} of the detector's tensors (the first:"
            f" {missing[0]}); expected the detector.pt of a Faster R-CNN"
        )
