from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from builders import tiny_clip
from torch import nn
from torchvision.models import mobilenet_v2

from coin_ray.models.faster_rcnn_clip.tower import (
    BatchNorm,
    ClipTower,
    MobileNetTower,
    Tower,
    freeze_batch_norm,
)

NAMES = ["clip", "mobilenet_v2"]


def _tower(name: str, batch_norm: BatchNorm = "frozen") -> Tower:
    torch.manual_seed(0)
    if name == "clip":
        return ClipTower(tiny_clip().network.visual, batch_norm)  # type: ignore[arg-type]
    return MobileNetTower(mobilenet_v2(), batch_norm)


@pytest.mark.parametrize("name", NAMES)
def test_shapes_at_stride_16_and_of_regions(name: str) -> None:
    new_tower = _tower(name).eval()
    shared = new_tower.shared(torch.randn(2, 3, 64, 96))
    assert shared.shape == (2, new_tower.shared_channels, 4, 6)
    assert new_tower.regional(
        torch.randn(5, new_tower.shared_channels, 4, 4)
    ).shape == (
        5,
        new_tower.regional_channels,
    )


def test_mobilenet_is_the_whole_network_when_one_region_is_the_whole_map() -> None:
    network = mobilenet_v2().eval()
    new_tower = MobileNetTower(network, "frozen").eval()
    pixels = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(
        new_tower.regional(new_tower.shared(pixels)),
        network.features(pixels).mean((2, 3)),
        rtol=1e-4,
        atol=1e-5,
    )


@pytest.mark.parametrize("name", NAMES)
def test_maps_of_a_whole_tower_hold_the_shared_one(name: str) -> None:
    new_tower = _tower(name).train()
    pixels = torch.randn(2, 3, 64, 96)
    eighth, sixteenth, last = new_tower.maps(pixels)
    assert [tuple(m.shape[1:]) for m in (eighth, sixteenth, last)] == [
        (channels, 64 // stride, 96 // stride)
        for channels, stride in zip(new_tower.map_channels, (8, 16, 32), strict=True)
    ]
    torch.testing.assert_close(sixteenth, new_tower.shared(pixels))
    (eighth.sum() + sixteenth.sum() + last.sum()).backward()
    frozen = {id(p) for layer in new_tower.frozen for p in layer.parameters()}
    assert all((p.grad is None) == (id(p) in frozen) for p in new_tower.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_first_layers_get_no_gradient_and_later_ones_do(name: str) -> None:
    new_tower = _tower(name).train()
    new_tower.regional(new_tower.shared(torch.randn(1, 3, 64, 64))).sum().backward()
    frozen = {id(p) for layer in new_tower.frozen for p in layer.parameters()}
    assert frozen
    for parameter in new_tower.parameters():
        assert (
            parameter.requires_grad
            == (parameter.grad is not None)
            == (id(parameter) not in frozen)
        )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("batch_norm", ["frozen", "live"])
def test_batch_norm_is_live_only_where_asked_and_trained(
    name: str, batch_norm: BatchNorm
) -> None:
    new_tower = _tower(name, batch_norm).train()
    norms = [m for m in new_tower.modules() if isinstance(m, nn.BatchNorm2d)]
    assert bool(norms) == (batch_norm == "live")
    assert not any(m.training for layer in new_tower.frozen for m in layer.modules())


@pytest.mark.parametrize("name", NAMES)
def test_the_given_network_is_copied(name: str) -> None:
    source: Any = tiny_clip().network.visual if name == "clip" else mobilenet_v2()
    before = {key: tensor.clone() for key, tensor in source.state_dict().items()}
    new_tower: Tower = (
        ClipTower(source, "frozen")
        if name == "clip"
        else MobileNetTower(source, "frozen")
    )
    with torch.no_grad():
        for parameter in new_tower.parameters():
            parameter.add_(1)
    assert all(
        torch.equal(tensor, before[key]) for key, tensor in source.state_dict().items()
    )


def test_a_norm_in_the_convolution_is_the_norm_behind_it_gradients_included() -> None:
    torch.manual_seed(0)
    plain = (
        nn.Sequential(nn.Conv2d(4, 6, 3, 2, 1, bias=False, groups=2), nn.BatchNorm2d(6))
        .double()
        .eval()
    )
    norm = plain[1]
    for parameter in (norm.weight, norm.bias, norm.running_mean):
        parameter.data.normal_()  # type: ignore[union-attr,operator]
    norm.running_var.uniform_(0.5, 2)  # type: ignore[union-attr,operator]
    folded = copy.deepcopy(plain)
    freeze_batch_norm(folded)
    maps = torch.randn(2, 4, 9, 7, dtype=torch.float64, requires_grad=True)
    direction = torch.randn(2, 6, 5, 4, dtype=torch.float64)
    tensors = []
    for network in (plain, folded):
        normalised = network(maps)
        tensors.append(
            [
                normalised,
                *torch.autograd.grad(
                    (normalised * direction).sum(),
                    [maps, next(network[0].parameters())],
                ),
            ]
        )
    for expected, actual in zip(*tensors, strict=True):
        torch.testing.assert_close(actual, expected)
    assert not isinstance(folded[1], nn.BatchNorm2d)
    assert [name for name, _ in folded.named_parameters()] == ["0.convolution.weight"]
