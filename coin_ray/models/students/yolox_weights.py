"""Pretrained weights of YOLOX: the official release by name, a checkpoint, or an ONNX
file as the official export writes it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.error import URLError

import numpy as np
import torch
from torch import Tensor, nn

from coin_ray import storage
from coin_ray.data.coco_classes import COCO_CLASSES
from coin_ray.errors import ConfigError, InputError
from coin_ray.models.students.class_rows import match_class_rows, take_over_class_rows
from coin_ray.models.students.yolox import YoloxStudent
from coin_ray.models.students.yolox_network import (
    NORM_EPSILON,
    YOLOX_SIZES,
    ConvNorm,
    YoloxNetwork,
)
from coin_ray.models.weight_files import read_tensors

RELEASE = "https://github.com/Megvii-BaseDetection/YOLOX/releases/download/0.1.1rc0"
CLASS_WEIGHTS = "head.cls_preds."
CHECKED_SIDE = 64
MAX_DIFFERENCE = 1e-3
"""Most that scores may differ from those of the ONNX file, relative to their range."""
INSTALL_EXPORT = "pip install 'coin-ray[export]'"
SETTING = "distill.student_weights"
StateDict = dict[str, Tensor]


def load_yolox_student(
    name: str,
    weights: str,
    classes: Sequence[str],
    weight_classes: Sequence[str] = (),
    side: int = 0,
    seed: int = 0,
) -> YoloxStudent:
    """Return the released model ``name`` for the run's ``classes``, in training mode.

    ``weights``: "" for the official release, which is downloaded once, or the path or
    URI of a checkpoint (.pth) or of an ONNX file. ``weight_classes``: their classes,
    COCO's by default. Rows of the class head are taken over by name; those without a
    counterpart are drawn from ``seed``. Raises InputError or ConfigError that names the
    file, what was expected and what to do.
    """
    source_classes = tuple(weight_classes) or COCO_CLASSES
    pretrained = read_yolox_weights(name, weights, len(source_classes))
    torch.manual_seed(seed)
    student = YoloxStudent(name, len(classes), side)
    rows = match_class_rows(classes, source_classes)
    initial = student.network.state_dict()
    state = {
        key: take_over_class_rows(tensor, initial[key], rows)
        if key.startswith(CLASS_WEIGHTS)
        else tensor
        for key, tensor in pretrained.items()
    }
    student.network.load_state_dict(state)
    return student


def read_yolox_weights(name: str, weights: str, num_classes: int) -> StateDict:
    """Return the state of ``YoloxNetwork`` in a file, or in the release if ``weights``
    is empty. Raises InputError if it is of another size or another number of classes.
    """
    path = weights or download_release(name)
    if not storage.exists(path):
        raise InputError(
            f"{SETTING}: no such file {path}; give a checkpoint (.pth), an ONNX file, or"
            f" leave it out for the official release of {name}"
        )
    file_bytes = storage.read_bytes(path)
    if path.endswith(".onnx"):
        return _read_onnx(file_bytes, path, name, num_classes)
    state = _read_checkpoint(file_bytes, path, is_release=not weights)
    _check_state(state, path, name, num_classes)
    return state


def download_release(name: str) -> str:
    """Return the path of the official weights, downloaded into torch.hub's folder if
    they are not there. Raises InputError if they can't be reached.
    """
    file_name = f"{name.replace('-', '_')}.pth"
    folder = os.path.join(torch.hub.get_dir(), "checkpoints")
    path = os.path.join(folder, file_name)
    if os.path.exists(path):
        return path
    os.makedirs(folder, exist_ok=True)
    url = f"{RELEASE}/{file_name}"
    try:
        torch.hub.download_url_to_file(url, path)
    except (URLError, OSError) as error:
        raise InputError(
            f"the official weights of {name} could not be downloaded from {url}"
            f" ({error}). Offline? Copy them to {path}, or give a file:"
            f" --{SETTING.replace('_', '-')} PATH"
        ) from error
    return path


def _read_checkpoint(file_bytes: bytes, path: str, *, is_release: bool) -> StateDict:
    """Return the tensors under ``model``, or of a plain state dict: a ``YoloxNetwork``'s,
    or a ``YoloxStudent``'s.
    """
    try:
        checkpoint = read_tensors(file_bytes, f"{SETTING}: {path}")
    except InputError as error:
        advice = "save its tensors alone, or copy it again"
        if is_release:
            advice = "delete it, so that it is downloaded again"
        raise InputError(f"{error}; {advice}") from error
    state = checkpoint
    if isinstance(checkpoint, Mapping) and "model" in checkpoint:
        state = checkpoint["model"]
    is_state = isinstance(state, Mapping) and all(
        isinstance(tensor, Tensor) for tensor in state.values()
    )
    if not is_state or not state:
        raise InputError(
            f"{SETTING}: {path} holds no weights: expected tensors by name, or those"
            " under 'model'"
        )
    return {
        name.removeprefix("network."): tensor.float()
        if tensor.is_floating_point()
        else tensor
        for name, tensor in state.items()
    }


def _check_state(state: StateDict, path: str, name: str, num_classes: int) -> None:
    """Raise InputError if the tensors are not those of the model ``name``."""
    expected = YoloxNetwork(num_classes, YOLOX_SIZES[name]).state_dict()
    missing = [key for key in expected if key not in state]
    unexpected = [key for key in state if key not in expected]
    if missing or unexpected:
        raise InputError(
            f"{SETTING}: {path} is of another architecture than {name}:"
            f" {len(missing)} of its {len(expected)} tensors are missing (the first:"
            f" {', '.join(missing[:2]) or 'none'}), {len(unexpected)} are unknown (the"
            f" first: {', '.join(unexpected[:2]) or 'none'})"
        )
    differing = [key for key in expected if expected[key].shape != state[key].shape]
    others = [key for key in differing if not key.startswith(CLASS_WEIGHTS)]
    if others:
        raise InputError(
            f"{SETTING}: {path} is not of {name}: {others[0]} has shape"
            f" {tuple(state[others[0]].shape)}, expected"
            f" {tuple(expected[others[0]].shape)}; choose the student whose size it has:"
            f" {', '.join(YOLOX_SIZES)}"
        )
    if differing:
        raise _class_count_error(path, len(state[differing[0]]), num_classes)


def _class_count_error(path: str, count: int, expected: int) -> ConfigError:
    return ConfigError(
        f"{SETTING}: {path} has {count} classes, expected {expected}; give the names of"
        " its classes in their order: --distill.student-weight-classes a b c"
    )


def _read_onnx(file_bytes: bytes, path: str, name: str, num_classes: int) -> StateDict:
    """Return the weights of an ONNX file whose batch norms are folded. Its convolutions
    are those of the network in the order in which they run; that they belong together
    is checked with onnxruntime.
    """
    try:
        import onnx
        import onnxruntime
    except ImportError as error:
        raise ConfigError(
            f"{SETTING}: reading {path} needs onnx and onnxruntime ({error}):"
            f" {INSTALL_EXPORT}"
        ) from error
    try:
        model = onnx.load_from_string(file_bytes)
        session = onnxruntime.InferenceSession(
            file_bytes, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # protobuf's and onnxruntime's have no common base
        raise InputError(
            f"{SETTING}: {path} ({len(file_bytes):,} bytes) is no readable ONNX file, or"
            f" truncated: {str(error).splitlines()[0][:200]}"
        ) from error
    network = YoloxNetwork(num_classes, YOLOX_SIZES[name]).eval()
    _fill_convolutions(network, _onnx_convolutions(model.graph), path, name)
    _compare_with_onnx(network, session, path, name)
    return network.state_dict()


def _onnx_convolutions(graph: Any) -> list[tuple[Tensor, Tensor | None]]:
    """Return weight and bias of each convolution, in the order of the graph."""
    from onnx import numpy_helper

    tensors = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            tensors[node.output[0]] = node.attribute[0].t
        elif node.op_type == "Identity" and node.input[0] in tensors:
            tensors[node.output[0]] = tensors[node.input[0]]  # equal tensors, once
    convolutions: list[tuple[Tensor, Tensor | None]] = []
    for node in graph.node:
        if node.op_type != "Conv" or node.input[1] not in tensors:
            continue
        weight, *bias = (
            torch.from_numpy(np.array(numpy_helper.to_array(tensors[input_name])))
            for input_name in node.input[1:]
            if input_name in tensors
        )
        convolutions.append((weight, bias[0] if bias else None))
    return convolutions


@torch.no_grad()
def _fill_convolutions(
    network: YoloxNetwork,
    convolutions: Sequence[tuple[Tensor, Tensor | None]],
    path: str,
    name: str,
) -> None:
    """Copy the weights, convolution by convolution in the order in which they run.
    Batch norms are left with nothing but the bias.
    """
    layers = _layers_as_run(network)
    if len(layers) != len(convolutions):
        raise InputError(
            f"{SETTING}: {path} is of another architecture than {name}: it has"
            f" {len(convolutions)} convolutions, expected {len(layers)}"
        )
    for (layer, norm), (weight, bias) in zip(layers, convolutions, strict=True):
        if layer.weight.shape != weight.shape:
            is_class_head = norm is None and layer.weight.shape[1:] == weight.shape[1:]
            if is_class_head and layer.out_channels == network.head.num_classes:
                count = network.head.num_classes
                raise _class_count_error(path, len(weight), count)
            raise InputError(
                f"{SETTING}: {path} is not of {name}: a convolution has shape"
                f" {tuple(weight.shape)}, expected {tuple(layer.weight.shape)}; choose"
                f" the student whose size it has: {', '.join(YOLOX_SIZES)}"
            )
        if bias is None:
            raise InputError(
                f"{SETTING}: {path} has a convolution without bias; expected an export"
                " whose batch norms are folded into the convolutions"
            )
        layer.weight.copy_(weight)
        if norm is None:
            assert layer.bias is not None
            layer.bias.copy_(bias)
        else:
            norm.reset_running_stats()
            norm.weight.fill_((1 + NORM_EPSILON) ** 0.5)
            norm.bias.copy_(bias)


def _layers_as_run(
    network: YoloxNetwork,
) -> list[tuple[nn.Conv2d, nn.BatchNorm2d | None]]:
    """Return the convolutions, each with the norm after it, in the order in which they
    run.
    """
    norms = {
        module.conv: module.bn
        for module in network.modules()
        if isinstance(module, ConvNorm)
    }
    layers: list[tuple[nn.Conv2d, nn.BatchNorm2d | None]] = []

    def add_layer(layer: nn.Module, *_: object) -> None:
        assert isinstance(layer, nn.Conv2d)
        layers.append((layer, norms.get(layer)))

    hooks = [
        module.register_forward_hook(add_layer)
        for module in network.modules()
        if isinstance(module, nn.Conv2d)
    ]
    network(torch.zeros(1, 3, CHECKED_SIDE, CHECKED_SIDE))
    for hook in hooks:
        hook.remove()
    return layers


@torch.no_grad()
def _compare_with_onnx(
    network: YoloxNetwork, session: Any, path: str, name: str
) -> None:
    """Raise InputError if the network's outputs are not those of the ONNX file."""
    network_input = session.get_inputs()[0]
    sides = [
        side if isinstance(side, int) else CHECKED_SIDE
        for side in network_input.shape[2:]
    ]
    draw = torch.Generator().manual_seed(0)
    pixels = torch.rand(1, 3, *sides, generator=draw) * 255
    expected = session.run(None, {network_input.name: pixels.numpy()})[0]
    predictions = network(pixels)
    raw = torch.cat([predictions[..., :4], predictions[..., 4:].sigmoid()], -1)
    if expected.shape != tuple(raw.shape):
        raise InputError(
            f"{SETTING}: {path} returns shape {expected.shape}, expected"
            f" {tuple(raw.shape)} as {name} does"
        )
    # an export may decode boxes; objectness and classes come from all convolutions
    scores, expected_scores = raw[..., 4:].numpy(), expected[..., 4:]
    difference = float(np.abs(expected_scores - scores).max())
    limit = MAX_DIFFERENCE * float(np.ptp(expected_scores))
    if not difference <= limit:
        raise InputError(
            f"{SETTING}: {path} is no {name} as officially exported: with its weights"
            f" the scores differ by {difference:.2g}, expected at most {limit:.2g}"
        )
