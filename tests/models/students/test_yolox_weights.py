"""Pretrained weights of YOLOX, from checkpoints, ONNX files and the release's cache."""

from __future__ import annotations

import io
import os
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from coin_ray.data.coco_classes import COCO_CLASSES
from coin_ray.errors import ConfigError, InputError
from coin_ray.models.students import yolox_weights
from coin_ray.models.students.yolox_network import YOLOX_SIZES, YoloxNetwork
from coin_ray.models.students.yolox_weights import (
    load_yolox_student,
    read_yolox_weights,
)

NANO = "yolox-nano"
ASSETS = os.environ.get("COIN_RAY_ASSETS", "")


def random_network(num_classes: int = 80, seed: int = 0) -> YoloxNetwork:
    """A network with batch statistics and weights that make outputs differ by place."""
    torch.manual_seed(seed)
    network = YoloxNetwork(num_classes, YOLOX_SIZES[NANO]).eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.8, 1.2)
            nn.init.uniform_(module.bias, -0.2, 0.2)
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.1, 0.3)
    return network


def write_checkpoint(path: Path, network: YoloxNetwork) -> str:
    torch.save({"model": network.state_dict(), "start_epoch": 3}, path)
    return str(path)


class OfficialExport(nn.Module):
    """What the official export writes: boxes as they are, scores after the sigmoid."""

    def __init__(self, network: YoloxNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        outputs = self.network(images)
        return torch.cat([outputs[..., :4], outputs[..., 4:].sigmoid()], -1)


@cache
def random_onnx() -> bytes:
    return onnx_bytes(random_network())


def onnx_bytes(network: YoloxNetwork, side: int = 64) -> bytes:
    buffer = io.BytesIO()
    torch.onnx.export(
        OfficialExport(network).eval(),
        (torch.zeros(1, 3, side, side),),
        buffer,
        dynamo=False,
        input_names=["images"],
    )
    return buffer.getvalue()


def assert_equals_onnx(path: str) -> None:
    student = load_yolox_student(NANO, path, COCO_CLASSES).eval()
    session = onnxruntime.InferenceSession(path)
    network_input = session.get_inputs()[0]
    side = network_input.shape[2]
    draw = torch.Generator().manual_seed(4)
    pixels = torch.rand(1, 3, side, side, generator=draw) * 255
    expected = session.run(None, {network_input.name: pixels.numpy()})[0]
    with torch.no_grad():
        outputs = OfficialExport(student.network)(pixels).numpy()
    assert np.abs(expected[..., 4:] - outputs[..., 4:]).max() < 1e-4
    np.testing.assert_allclose(outputs, expected, rtol=1e-4, atol=1e-4)


def test_onnx_with_folded_norms_gives_the_same_outputs(tmp_path: Path) -> None:
    path = tmp_path / "yolox.onnx"
    path.write_bytes(random_onnx())
    nodes = {node.op_type for node in onnx.load(path).graph.node}
    assert "BatchNormalization" not in nodes
    assert_equals_onnx(str(path))


@pytest.mark.skipif(not ASSETS, reason="COIN_RAY_ASSETS names no folder of detectors")
def test_the_official_onnx_file_gives_the_same_outputs() -> None:
    assert_equals_onnx(os.path.join(ASSETS, "models", "yolox_nano.onnx"))


def test_onnx_of_another_order_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "yolox.onnx"
    path.write_bytes(random_onnx())
    read_convolutions = yolox_weights._onnx_convolutions

    def swap(graph: object) -> list[tuple[Tensor, Tensor | None]]:
        convolutions = read_convolutions(graph)
        shapes = [tuple(weight.shape) for weight, _ in convolutions]
        second = next(i for i, shape in enumerate(shapes) if shape in shapes[:i])
        first = shapes.index(shapes[second])
        swapped = [convolutions[second], convolutions[first]]
        convolutions[first], convolutions[second] = swapped
        return convolutions

    monkeypatch.setattr(yolox_weights, "_onnx_convolutions", swap)
    with pytest.raises(InputError, match="no yolox-nano as officially exported"):
        read_yolox_weights(NANO, str(path), 80)


def test_checkpoint_rows_are_taken_over_by_name(tmp_path: Path) -> None:
    network = random_network()
    path = write_checkpoint(tmp_path / "nano.pth", network)
    classes = ("dogs", "unicorn", "person")
    student = load_yolox_student(NANO, path, classes, seed=1)
    dog, person = COCO_CLASSES.index("dog"), COCO_CLASSES.index("person")
    for ours, theirs in zip(
        student.network.head.cls_preds, network.head.cls_preds, strict=True
    ):
        assert torch.equal(ours.weight[0], theirs.weight[dog])
        assert torch.equal(ours.weight[2], theirs.weight[person])
        assert torch.equal(ours.bias[[0, 2]], theirs.bias[[dog, person]])
        assert not (theirs.weight == ours.weight[1]).flatten(1).all(1).any()
    stem = student.network.backbone.backbone.stem.conv.conv.weight
    assert torch.equal(stem, network.backbone.backbone.stem.conv.conv.weight)
    same = load_yolox_student(NANO, path, classes, seed=1).state_dict()
    other = load_yolox_student(NANO, path, classes, seed=2).state_dict()
    key = "network.head.cls_preds.0.weight"
    assert torch.equal(student.state_dict()[key], same[key])
    assert not torch.equal(same[key][1], other[key][1])


def test_the_release_is_downloaded_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = tmp_path / "release"
    release.mkdir()
    network = random_network()
    write_checkpoint(release / "yolox_nano.pth", network)
    monkeypatch.setattr(yolox_weights, "RELEASE", release.as_uri())
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    load_yolox_student(NANO, "", COCO_CLASSES)
    (release / "yolox_nano.pth").unlink()
    student = load_yolox_student(NANO, "", COCO_CLASSES)
    expected = network.state_dict()
    for key, tensor in student.network.state_dict().items():
        assert torch.equal(tensor, expected[key])


def test_an_unreachable_release_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(yolox_weights, "RELEASE", (tmp_path / "nothing").as_uri())
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    with pytest.raises(InputError, match=r"could not be downloaded.*Copy them to"):
        read_yolox_weights("yolox-s", "", 80)


def test_wrong_files_are_named(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "nano.pth", random_network())
    with pytest.raises(InputError, match="no such file"):
        read_yolox_weights(NANO, str(tmp_path / "none.pth"), 80)
    with pytest.raises(InputError, match="another architecture than yolox-tiny"):
        read_yolox_weights("yolox-tiny", path, 80)
    with pytest.raises(ConfigError, match="80 classes, expected 3"):
        read_yolox_weights(NANO, path, 3)
    content = Path(path).read_bytes()
    truncated = tmp_path / "truncated.pth"
    truncated.write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match="truncated"):
        read_yolox_weights(NANO, str(truncated), 80)
    torch.save({"model": {"conv.weight": torch.zeros(3)}}, tmp_path / "other.pth")
    with pytest.raises(InputError, match="another architecture than yolox-nano"):
        read_yolox_weights(NANO, str(tmp_path / "other.pth"), 80)


def test_wrong_sizes_are_named(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tiny = YoloxNetwork(80, YOLOX_SIZES["yolox-tiny"])
    path = write_checkpoint(tmp_path / "tiny.pth", tiny)
    with pytest.raises(InputError, match=r"not of yolox-s.*choose the student"):
        read_yolox_weights("yolox-s", path, 80)


def test_wrong_onnx_files_are_named(tmp_path: Path) -> None:
    content = onnx_bytes(random_network(num_classes=4))
    path = tmp_path / "four.onnx"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="4 classes, expected 80"):
        read_yolox_weights(NANO, str(path), 80)
    with pytest.raises(InputError, match="another architecture than yolox-tiny"):
        read_yolox_weights("yolox-tiny", str(path), 4)
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match="truncated"):
        read_yolox_weights(NANO, str(path), 4)
