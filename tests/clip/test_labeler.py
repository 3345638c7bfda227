from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from builders import CLASSES, TEMPLATES, tiny_clip
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2.functional import normalize, resize, resized_crop

from coin_ray.clip.crops import BATCH_PIXELS, batch_size, enlarge_boxes, pixel_boxes
from coin_ray.clip.encoder import load_clip
from coin_ray.clip.fused_resnet import FusedResNet, attention_pool
from coin_ray.clip.labeler import CropLabeler, RoiLabeler
from coin_ray.config.data import DEMO_CLASSES
from coin_ray.config.presets import DEMO_CLIP


@pytest.fixture(scope="module", params=["roi", "crop"])
def labeler(request: pytest.FixtureRequest) -> RoiLabeler | CropLabeler:
    clip = tiny_clip()
    return (
        RoiLabeler(clip, CLASSES, TEMPLATES, 64, 128)
        if request.param == "roi"
        else CropLabeler(clip, CLASSES, TEMPLATES)
    )


def _picture(height: int = 90, width: int = 120) -> Tensor:
    return torch.randint(
        0,
        256,
        (3, height, width),
        generator=torch.Generator().manual_seed(0),
        dtype=torch.uint8,
    )


BOXES = torch.tensor([[10.0, 10, 60, 50], [50, 30, 110, 80], [0, 0, 120, 90]])


def test_rows_are_probabilities(labeler: RoiLabeler | CropLabeler) -> None:
    probs = labeler(_picture(), BOXES)
    assert probs.shape == (3, len(CLASSES) + 1)
    torch.testing.assert_close(probs.sum(1), torch.ones(3))
    assert float((probs[0] - probs[1]).abs().max()) > 1e-4


def test_each_box_is_classified_independently(
    labeler: RoiLabeler | CropLabeler,
) -> None:
    together, alone = labeler(_picture(), BOXES), labeler(_picture(), BOXES[1:2])
    torch.testing.assert_close(together[1:2], alone, atol=1e-5, rtol=1e-4)


def test_no_boxes(labeler: RoiLabeler | CropLabeler) -> None:
    assert labeler(_picture(), torch.zeros(0, 4)).shape == (0, len(CLASSES) + 1)


@pytest.mark.parametrize(
    "box",
    [
        [119.6, 89.7, 119.9, 89.9],
        [5.0, 5, 5, 5],
        [-10.0, -10, 20, 20],
        [100.0, 60, 200, 200],
    ],
)
def test_boxes_at_the_edge(labeler: RoiLabeler | CropLabeler, box: list[float]) -> None:
    assert bool(torch.isfinite(labeler(_picture(), torch.tensor([box]))).all())


def test_boxes_are_scaled_with_the_image() -> None:
    """Twice the picture, twice the boxes: the same resized image and labels."""
    labeler = RoiLabeler(tiny_clip(), CLASSES, TEMPLATES, 64, 128)
    large = _picture(128, 192)
    small = resize(large, [64, 96])
    box = torch.tensor([[16.0, 8, 64, 56]])
    torch.testing.assert_close(labeler(small, box), labeler(large, 2 * box))


def test_a_crop_of_everything_is_clip_on_the_image() -> None:
    clip, image = tiny_clip(), _picture(80, 80)
    labeler = CropLabeler(clip, CLASSES, TEMPLATES)
    pixels = normalize(
        resize(image, [64, 64], antialias=True)[None].float() / 255,
        list(clip.mean),
        list(clip.std),
    )
    encoded = clip.network.encode_image(pixels, normalize=True)  # type: ignore[operator]
    expected = (
        clip.network.logit_scale.exp() * encoded @ labeler.embeddings.T
    ).softmax(-1)  # type: ignore[operator,union-attr]
    torch.testing.assert_close(
        labeler(image, torch.tensor([[0.0, 0, 80, 80]])), expected, atol=1e-4, rtol=1e-3
    )


def test_attention_pooling_is_open_clips() -> None:
    visual: Any = tiny_clip().network.visual
    pool = visual.attnpool
    token_count, channels = pool.positional_embedding.shape
    side = round((token_count - 1) ** 0.5)
    torch.manual_seed(0)
    for projection in (pool.q_proj, pool.k_proj, pool.v_proj, pool.c_proj):
        projection.bias.data.normal_()
    maps = torch.randn(5, channels, side, side)
    torch.testing.assert_close(
        attention_pool(pool, maps), pool(maps), rtol=1e-4, atol=1e-5
    )


def test_attention_pooling_is_as_exact_as_open_clips() -> None:
    """Demo maps are positive: large scores with small differences."""
    clip = load_clip(DEMO_CLIP)
    network: Any = clip.network
    pool = network.visual.attnpool
    maps = torch.rand(16, 768, 2, 2, generator=torch.Generator().manual_seed(0))
    exact = copy.deepcopy(pool).double()(maps.double())
    with torch.no_grad():
        error = float((attention_pool(pool, maps) - exact).abs().max())
        error_of_open_clip = float((pool(maps) - exact).abs().max())
    assert error <= error_of_open_clip


@pytest.mark.parametrize(
    ("factor", "expected"),
    [(1.0, [20, 20, 40, 60]), (1.5, [15, 10, 45, 70]), (3.0, [0, 0, 60, 80])],
)
def test_context_grows_boxes_about_their_centres_and_stops_at_the_border(
    factor: float, expected: list[int]
) -> None:
    box = torch.tensor([[20.0, 20, 40, 60]])
    assert enlarge_boxes(box, factor, 80, 90)[0].tolist() == expected


def test_crops_see_what_surrounds_the_box() -> None:
    clip, image, box = (
        tiny_clip(),
        torch.zeros(3, 80, 80, dtype=torch.uint8),
        torch.tensor([[20.0, 20, 60, 60]]),
    )
    image[:, :18] = 255
    alone, around = (
        CropLabeler(clip, CLASSES, TEMPLATES, context)(image, box)
        for context in (1.0, 1.5)
    )
    grown = CropLabeler(clip, CLASSES, TEMPLATES, 1.0)(
        image, torch.tensor([[10.0, 10, 70, 70]])
    )
    torch.testing.assert_close(around, grown)
    assert not torch.allclose(alone, around)


@pytest.mark.parametrize("fuse_batch_norms", [False, True])
def test_crops_of_many_images_are_labelled_as_each_alone_to_the_bit(
    fuse_batch_norms: bool,
) -> None:
    """A resumed run batches other images together, and must give the same table."""
    labeler = CropLabeler(
        load_clip(DEMO_CLIP), CLASSES, DEMO_CLIP, 1.2, fuse_batch_norms=fuse_batch_norms
    )
    pictures = [_picture(90, 120).roll(shift, 2) for shift in range(0, 60, 2)]
    images = [(picture, BOXES[: 1 + row % 3]) for row, picture in enumerate(pictures)]
    together = labeler.label(images)
    for (picture, boxes), probabilities in zip(images, together, strict=True):
        assert torch.equal(probabilities, labeler(picture, boxes))


def test_the_fused_tower_is_open_clips() -> None:
    network: Any = tiny_clip().network
    torch.manual_seed(0)
    for module in network.visual.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.weight)
            torch.nn.init.normal_(module.bias)
            module.running_var.uniform_(0.5, 2)  # type: ignore[union-attr,operator]
    pixels = torch.randn(40, 3, 64, 64)
    with torch.no_grad():
        expected = network.encode_image(pixels)
        features = FusedResNet(network.visual)(pixels)
    scale = float(expected.abs().max())
    torch.testing.assert_close(features / scale, expected / scale, rtol=0, atol=3e-6)
    assert not any(
        isinstance(module, torch.nn.BatchNorm2d)
        for module in FusedResNet(network.visual).modules()
    )


@pytest.mark.parametrize(
    ("fuse_batch_norms", "tolerance"),
    [pytest.param(False, 0, id="to the bit"), pytest.param(True, 1e-5, id="fused")],
)
@pytest.mark.parametrize("num_boxes", [3, 33])
def test_crop_labels_are_those_of_open_clip(
    fuse_batch_norms: bool, tolerance: float, num_boxes: int
) -> None:
    """The demo's published table depends on the last bit: the crops of one image are
    one batch of open_clip's encoder, however many they are.
    """
    clip = load_clip(DEMO_CLIP)
    labeler = CropLabeler(
        clip, DEMO_CLASSES, DEMO_CLIP, 1.2, fuse_batch_norms=fuse_batch_norms
    )
    image, boxes = _picture(), BOXES.repeat(11, 1)[:num_boxes]
    crops = torch.stack(
        [
            resized_crop(image, y1, x1, y2 - y1, x2 - x1, [64, 64], antialias=True)
            for x1, y1, x2, y2 in pixel_boxes(image, boxes, 1.2)
        ]
    )
    pixels = normalize(crops.float() / 255, list(clip.mean), list(clip.std))
    network: Any = clip.network
    encoded = F.normalize(network.encode_image(pixels), dim=-1)
    scale = network.logit_scale.exp().clamp(max=100)
    expected = (scale * encoded @ labeler.embeddings.T).softmax(-1)
    labels = labeler(image, boxes)
    torch.testing.assert_close(labels, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("fuse_batch_norms", [False, True])
def test_memory_does_not_grow_with_the_boxes_of_an_image(
    fuse_batch_norms: bool,
) -> None:
    labeler = CropLabeler(
        tiny_clip(), CLASSES, TEMPLATES, fuse_batch_norms=fuse_batch_norms
    )
    sizes: list[int] = []
    classify = labeler._classify

    def record(crops: Tensor) -> Tensor:
        sizes.append(len(crops))
        return classify(crops)

    labeler._classify = record  # type: ignore[method-assign]
    labeler(_picture(), BOXES.repeat(200, 1))
    pixels = batch_size((64, 64)) * 64**2 if fuse_batch_norms else BATCH_PIXELS
    assert max(sizes) == pixels // 64**2
    assert sum(sizes) < 600 + 16
    assert batch_size((64, 64)) == 64
    assert batch_size((224, 224)) == 32
    assert batch_size((2000, 2000)) == 1
