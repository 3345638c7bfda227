from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import CLASSES, tiny_clip, tiny_detector
from PIL import Image
from torch import Tensor
from torchvision.ops import nms

from coin_ray.config.data import DEMO_CLASSES
from coin_ray.config.presets import DEMO_CLIP, TINY_DETECTOR
from coin_ray.models.faster_rcnn_clip.model import ClipDetector, build_detector
from coin_ray.models.faster_rcnn_clip.rpn import _best_by_nms, inside_image
from coin_ray.predictors.student import load_exported_student, write_exported_student
from coin_ray.structures import Detections


def _images(*sizes: tuple[int, int]) -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    return [
        torch.randint(0, 256, (3, *size), generator=draw, dtype=torch.uint8)
        for size in sizes
    ]


@pytest.fixture(scope="module")
def clip_detector() -> ClipDetector:
    return tiny_detector().eval()


def _predict(clip_detector: ClipDetector, *pixels: Tensor) -> list[Detections]:
    return clip_detector.predict(clip_detector.prepare(pixels))


def test_predictions_lie_in_their_images_best_first(
    clip_detector: ClipDetector,
) -> None:
    sizes = (64, 96), (90, 60), (71, 65)
    for detections, (height, width) in zip(
        _predict(clip_detector, *_images(*sizes)), sizes, strict=True
    ):
        assert 0 < len(detections) <= clip_detector.config.detections
        assert detections.num_classes == len(CLASSES)
        assert bool((detections.boxes >= 0).all())
        assert float(detections.boxes[:, 0::2].max()) <= width
        assert float(detections.boxes[:, 1::2].max()) <= height
        assert detections.scores.tolist() == sorted(
            detections.scores.tolist(), reverse=True
        )
        assert float(detections.scores.min()) > clip_detector.config.score_min
        torch.testing.assert_close(detections.probs.sum(1), torch.ones(len(detections)))
        assert torch.equal(
            detections.probs.gather(1, detections.labels[:, None])[:, 0],
            detections.scores,
        )


def test_classes_of_one_region_share_its_box_bit_for_bit() -> None:
    clip_detector = tiny_detector(score_min=0.0, detections=100).eval()
    detections = _predict(clip_detector, *_images((64, 96)))[0]
    boxes = [tuple(b) for b in detections.boxes.tolist()]
    regions = {tuple(p) for p in detections.probs.tolist()}
    assert len(set(boxes)) == len(regions) < len(boxes)


def test_no_region_above_the_threshold() -> None:
    detections = _predict(tiny_detector(score_min=1.0).eval(), *_images((64, 64)))[0]
    assert (len(detections), detections.num_classes) == (0, len(CLASSES))


def test_order_in_the_batch_does_not_matter(clip_detector: ClipDetector) -> None:
    first, second, third = _images((64, 96), (64, 96), (64, 96))
    forward, backward = (
        _predict(clip_detector, first, second, third),
        _predict(clip_detector, third, second, first)[::-1],
    )
    for a, b in zip(forward, backward, strict=True):
        torch.testing.assert_close(a.boxes, b.boxes, atol=1e-3, rtol=1e-4)
        torch.testing.assert_close(a.scores, b.scores, atol=1e-5, rtol=1e-4)


def test_neighbours_do_not_matter_with_the_same_padding(
    clip_detector: ClipDetector,
) -> None:
    small, large = _images((64, 64), (96, 128))
    together = _predict(clip_detector, small, large)[0]
    alone = clip_detector.predict(clip_detector.prepare([small], (96, 128)))[0]
    torch.testing.assert_close(together.boxes, alone.boxes, atol=1e-3, rtol=1e-4)


def test_padding_reaches_only_features_near_it(clip_detector: ClipDetector) -> None:
    """Convolutions see the padding: features further away are the same, so are RoIs on
    them."""
    (image,) = _images((64, 256))
    plain, padded = (
        clip_detector.prepare([image]),
        clip_detector.prepare([image], (64, 320)),
    )
    assert padded.pixels.shape[-1] == 320
    with torch.no_grad():
        a, b = (
            clip_detector.tower.shared(plain.pixels),
            clip_detector.tower.shared(padded.pixels),
        )
        torch.testing.assert_close(
            a[..., :10],
            b[
                ...,
                :10,
            ][..., :10],
        )
        assert not torch.allclose(a[..., -1], b[..., 15])
        boxes = [torch.tensor([[8.0, 4, 90, 60]])]
        torch.testing.assert_close(
            clip_detector.describe(a, boxes).logits,
            clip_detector.describe(b, boxes).logits,
        )


def test_prepare_normalises_and_pads(clip_detector: ClipDetector) -> None:
    batch = clip_detector.prepare(
        [
            torch.full((3, 40, 70), 255, dtype=torch.uint8),
            torch.zeros(3, 33, 20, dtype=torch.uint8),
        ]
    )
    assert batch.pixels.shape == (2, 3, 64, 96)
    assert batch.sizes == ((40, 70), (33, 20))
    torch.testing.assert_close(
        batch.pixels[0, :, 0, 0],
        (1 - clip_detector.mean[:, 0, 0]) / clip_detector.std[:, 0, 0],
    )
    assert (
        float(batch.pixels[0, :, 40:].abs().max())
        == float(batch.pixels[0, :, :, 70:].abs().max())
        == 0
    )


def test_inside() -> None:
    anchors = torch.tensor(
        [[0.0, 0, 10, 10], [55, 0, 64, 10], [57, 0, 75, 10], [0, 60, 10, 80]]
    )
    assert inside_image(anchors, (64, 64)).tolist() == [True, True, False, False]


def test_anchors_move_alike_in_any_scale_of_their_deltas() -> None:
    """Weights of 1 instead of (10, 10, 5, 5): the same boxes from outputs that are 10
    and 5 times smaller."""
    default, rescaled = (
        tiny_detector().eval(),
        tiny_detector(anchor_weights=(1.0, 1.0, 1.0, 1.0)).eval(),
    )
    scale = torch.tensor([10.0, 10, 5, 5]).repeat(len(rescaled.rpn.deltas.weight) // 4)
    with torch.no_grad():
        rescaled.rpn.deltas.weight.div_(scale[:, None, None, None])
    batch = default.prepare(_images((64, 96)))
    with torch.no_grad():
        first, second = default.propose(batch)[1], rescaled.propose(batch)[1]
    torch.testing.assert_close(first.boxes, second.boxes, atol=1e-3, rtol=1e-4)
    assert not torch.allclose(first.deltas, second.deltas)


def test_same_seed_same_detector_and_background_is_learned_or_not() -> None:
    first, same_seed, other_seed = (
        build_detector(tiny_clip(), CLASSES, tiny_detector().config, seed=s)
        for s in (3, 3, 4)
    )
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            first.state_dict().values(), same_seed.state_dict().values(), strict=True
        )
    )
    assert not torch.equal(first.head.embed.weight, other_seed.head.embed.weight)
    assert torch.equal(
        first.tower.visual.conv1.convolution.weight,
        other_seed.tower.visual.conv1.convolution.weight,
    )  # type: ignore[union-attr,arg-type]
    assert (
        tiny_detector().background.requires_grad,
        tiny_detector(background="prompt").background.requires_grad,
    ) == (True, False)


def test_stem_and_first_stage_are_frozen() -> None:
    clip_detector = tiny_detector().train()
    batch = clip_detector.prepare(_images((64, 64)))
    shared, proposed = clip_detector.propose(batch)
    clip_detector.describe(shared, proposed.boxes).logits.sum().backward()
    moving = {
        n.split(".")[2]
        for n, p in clip_detector.named_parameters()
        if n.startswith("tower.") and p.grad is not None
    }
    assert moving == {"layer2", "layer3", "layer4"}


def test_cached_embeddings_are_forgotten_when_training_goes_on() -> None:
    clip_detector = tiny_detector().eval()
    clip_detector.class_embeddings()
    before = clip_detector.class_embeddings()
    assert clip_detector.class_embeddings() is before
    with torch.no_grad():
        clip_detector.background.add_(1)
    assert not torch.equal(clip_detector.train().class_embeddings(), before)
    assert not torch.equal(clip_detector.eval().class_embeddings(), before)


@pytest.mark.parametrize("live", ["frozen", "live"])
def test_batch_statistics_move_only_when_live(live: Any) -> None:
    clip_detector = tiny_detector(batch_norm=live).train()
    before = {n: b.clone() for n, b in clip_detector.named_buffers() if "running" in n}
    clip_detector.tower.shared(clip_detector.prepare(_images((64, 64))).pixels)
    moved = {
        n.split(".")[2]
        for n, b in clip_detector.named_buffers()
        if "running" in n and not torch.equal(b, before[n])
    }
    assert moved == ({"layer2", "layer3"} if live == "live" else set())


@pytest.mark.parametrize("background", ["learned", "prompt"])
def test_exported_model_predicts_the_same_bits(background: str, tmp_path: Path) -> None:
    clip_detector = tiny_detector(background=background).eval()
    with torch.no_grad():
        clip_detector.background.add_(0.3 if background == "learned" else 0)
    size = write_exported_student(clip_detector, CLASSES, str(tmp_path))
    loaded = load_exported_student(str(tmp_path))
    assert loaded.classes == CLASSES
    assert size == (tmp_path / "model.safetensors").stat().st_size
    for sizes in [((64, 96),), ((64, 64), (96, 60))]:
        for detections, exported_detections in zip(
            _predict(clip_detector, *_images(*sizes)),
            _predict(loaded.detector, *_images(*sizes)),
            strict=True,
        ):
            assert len(detections)
            for name in ("boxes", "scores", "labels", "probs"):
                assert torch.equal(
                    getattr(detections, name), getattr(exported_detections, name)
                ), name


def test_export_holds_no_text(tmp_path: Path) -> None:
    write_exported_student(tiny_detector().eval(), CLASSES, str(tmp_path))
    from safetensors.torch import load_file

    names = set(load_file(tmp_path / "model.safetensors"))
    assert {n for n in names if n.startswith("prompts")} == {"prompts.values"}
    assert not [
        n
        for n in names
        if "text" in n
        or "token" in n
        or "context" in n
        or "attnpool" in n
        or n.startswith("background")
    ]
    assert json.loads((tmp_path / "model.json").read_text())["classes"] == list(CLASSES)


def test_exported_model_answers_in_the_images_own_pixels(tmp_path: Path) -> None:
    write_exported_student(tiny_detector().eval(), CLASSES, str(tmp_path))
    detections = load_exported_student(str(tmp_path))(
        Image.fromarray(
            np.random.default_rng(0).integers(0, 255, (640, 800, 3), np.uint8)
        )
    )
    assert len(detections)
    assert float(detections.boxes.max()) > 200
    assert float(detections.boxes[:, 2].max()) <= 800.01


def test_the_demos_clip_makes_a_detector() -> None:
    from coin_ray.clip.encoder import load_clip

    clip_detector = build_detector(
        load_clip(DEMO_CLIP), DEMO_CLASSES, TINY_DETECTOR, seed=0
    ).eval()
    assert _predict(clip_detector, *_images((96, 96)))[0].num_classes == len(
        DEMO_CLASSES
    )


@pytest.mark.parametrize(("spread", "limit"), [(400.0, 20), (30.0, 20), (1.0, 20)])
def test_the_first_proposals_are_those_of_nms_over_all(
    spread: float, limit: int
) -> None:
    """Also where most of the first boxes overlap, and where there are fewer proposals
    than asked for. Scores tie.
    """
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(300, 2, generator=generator) * spread
    boxes = torch.cat([corners, corners + 30], 1)
    scores = torch.randint(0, 40, (300,), generator=generator).float()
    scores = scores.sort(descending=True).values
    expected = nms(boxes, scores, 0.7)[:limit]
    assert torch.equal(_best_by_nms(boxes, scores, 0.7, limit), expected)
    assert (len(expected) < limit) == (spread < 10)
