"""Crop labels of four families of open_clip models are open_clip's own."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from builders import CLASSES, TEMPLATES
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch import Tensor

from coin_ray.clip.crops import BATCH_MAX, sigmoid_class_probabilities
from coin_ray.clip.encoder import BACKGROUND, ClipModel, load_clip, load_open_clip
from coin_ray.clip.labeler import CropLabeler
from coin_ray.config import Clip
from coin_ray.errors import InputError
from tests.clip.open_clip_families import FAMILIES, save_family

BOXES = torch.tensor([[10.0, 10, 60, 50], [50, 30, 110, 80], [0, 0, 120, 90]])
PRIOR = 1 / 32_768


@pytest.fixture(scope="module", params=FAMILIES)
def model_folder(request: pytest.FixtureRequest, tmp_path_factory: Any) -> str:
    return save_family(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def clip(model_folder: str) -> ClipModel:
    config = Clip(model=model_folder, templates=TEMPLATES.templates)
    return load_open_clip(config, "labeler")


def _picture() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    small = torch.randint(0, 256, (3, 9, 12), generator=generator, dtype=torch.uint8)
    return small.repeat_interleave(10, 1).repeat_interleave(10, 2)


def _labeler(
    clip: ClipModel, prior: float = PRIOR, context: float = 1.0
) -> CropLabeler:
    return CropLabeler(
        clip,
        CLASSES,
        TEMPLATES,
        context,
        own_preprocessing=True,
        sigmoid_prior=prior,
    )


@cache
@torch.no_grad()
def _by_open_clip(model_folder: str) -> tuple[Tensor, bool]:
    """Return open_clip's probabilities of classes and background, and whether they are
    sigmoids, one for each text."""
    image = _picture()
    network, _, _ = open_clip.create_model_and_transforms(model_folder)
    network.eval()
    preprocessing = open_clip.get_model_preprocess_cfg(network)
    transform = image_transform_v2(
        PreprocessCfg(**{**preprocessing, "resize_mode": "squash"}), is_train=False
    )
    pil = Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).numpy()))
    crops = [transform(pil.crop(tuple(box))) for box in BOXES.int().tolist()]
    texts = open_clip.build_zero_shot_classifier(
        network, open_clip.get_tokenizer(model_folder), [*CLASSES, BACKGROUND],
        TEMPLATES.templates,
    )  # fmt: skip
    features = network.encode_image(torch.stack(crops), normalize=True)
    logits = network.logit_scale.exp() * features @ texts
    if network.logit_bias is None:
        return logits.softmax(-1), False
    return (logits + network.logit_bias).double().sigmoid(), True


@pytest.mark.parametrize("prior", [0.5, PRIOR])
def test_probabilities_are_those_of_open_clip(
    model_folder: str, clip: ClipModel, prior: float
) -> None:
    image = _picture()
    expected, is_sigmoid = _by_open_clip(model_folder)
    if is_sigmoid:
        odds = expected / (1 - expected) * (1 - prior) / prior
        total = 1 + odds.sum(1, keepdim=True)
        columns = [odds[:, :-1], 1 + odds[:, -1:]]
        expected = torch.cat(columns, 1) / total
    probabilities = _labeler(clip, prior)(image, BOXES)
    torch.testing.assert_close(
        probabilities.double(), expected.double(), rtol=0, atol=1e-5
    )
    torch.testing.assert_close(probabilities.sum(1), torch.ones(len(BOXES)))
    assert float((probabilities[0] - probabilities[1]).abs().max()) > 1e-5


def test_a_box_does_not_depend_on_its_batch(clip: ClipModel) -> None:
    """Also not in the last bit: a resumed run makes other batches."""
    labeler, image = _labeler(clip, context=1.2), _picture()
    images = [(image, BOXES), (image.flip(2), BOXES[:1]), (image, BOXES[:0])]
    together = labeler.label(images)
    assert [len(rows) for rows in together] == [3, 1, 0]
    assert torch.equal(together[0], labeler(image, BOXES))
    assert torch.equal(together[1], labeler(image.flip(2), BOXES[:1]))


def test_more_boxes_than_a_batch_holds(clip: ClipModel) -> None:
    labeler, image = _labeler(clip), _picture()
    count = BATCH_MAX + 5
    rows = labeler(image, BOXES.repeat(count // 3 + 1, 1)[:count])
    expected = labeler(image, BOXES)
    torch.testing.assert_close(
        rows[-2:],
        expected[[0, 1]]
        if count % 3 == 2
        else expected[[(count - 2) % 3, (count - 1) % 3]],
    )


def test_a_detector_refuses_them(model_folder: str) -> None:
    with pytest.raises(InputError, match=r"needs? a ModifiedResNet.*--labeler crop"):
        load_clip(Clip(model=model_folder))


def test_a_text_longer_than_the_context_is_named(clip: ClipModel) -> None:
    config = Clip(templates=("a photo of a {}.",))
    name = "very " * 60 + "long name"
    with pytest.raises(InputError, match=r"long name.*tokens, but .* reads 40"):
        CropLabeler(clip, ("cat", name), config, own_preprocessing=True)


def test_a_sigmoid_without_correction_and_with_the_prior_of_siglip() -> None:
    logits = torch.tensor([[-1.0, -20.0, -20.0], [-14.0, -15.0, -18.0]])
    plain = sigmoid_class_probabilities(logits, 0.5)
    # odds e^-1 against 1 for nothing
    assert float(plain[0, 0]) == pytest.approx(1 / (1 + np.e), abs=1e-6)
    assert float(plain[1, 2]) == pytest.approx(1, abs=1e-5)
    corrected = sigmoid_class_probabilities(logits, PRIOR)
    odds = np.exp(logits.double().numpy()) * 32_767
    total = 1 + odds.sum(1)
    np.testing.assert_allclose(corrected[:, 0], odds[:, 0] / total, atol=1e-6)
    np.testing.assert_allclose(corrected[:, 2], (1 + odds[:, 2]) / total, atol=1e-6)


@pytest.mark.parametrize(
    ("architecture", "mean", "interpolation"),
    [
        ("ViT-B-16-SigLIP2", (0.5, 0.5, 0.5), "bicubic"),
        ("MobileCLIP2-S0", (0.0, 0.0, 0.0), "bilinear"),
        ("PE-Core-T-16-384", (0.5, 0.5, 0.5), "bilinear"),
        ("ViT-B-32", open_clip.OPENAI_DATASET_MEAN, "bicubic"),
    ],
)
def test_weights_from_a_file_get_the_preparation_of_their_architecture(
    architecture: str,
    mean: tuple[float, ...],
    interpolation: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[dict[str, Any]] = []

    def create(name: str, **options: Any) -> torch.nn.Module:
        calls.append(options)
        raise OSError("no weights")

    monkeypatch.setattr(open_clip, "create_model", create)
    weights = tmp_path / "weights.pt"
    weights.write_bytes(b"")
    with pytest.raises(InputError, match="could not be loaded"):
        load_open_clip(
            Clip(model=architecture, pretrained=str(weights), activation="gelu"),
            "labeler",
        )
    [options] = calls
    assert tuple(options["force_preprocess_cfg"]["mean"]) == mean
    assert options["force_preprocess_cfg"]["interpolation"] == interpolation
