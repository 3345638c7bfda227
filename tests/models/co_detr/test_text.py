from __future__ import annotations

from pathlib import Path

import pytest
import torch
from builders import CLASSES, tiny_co_detr, tiny_config
from torch import Tensor

from coin_ray.models.base import Images
from coin_ray.models.co_detr.decoder import PRIOR_LOGIT
from coin_ray.models.co_detr.text import TextDetr
from coin_ray.models.faster_rcnn_clip.embeddings import ClassVectors
from coin_ray.predictors.student import load_exported_student, write_exported_student
from coin_ray.structures import Detections
from models.co_detr.scenes import have_same_fields


def _new_deployed(has_text_classes: bool = True) -> TextDetr:
    return tiny_co_detr(named=has_text_classes).base.eval()


def _random_images(*sizes: tuple[int, int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randint(0, 255, (3, *size), dtype=torch.uint8, generator=generator)
        for size in sizes
    ]


def _prepare_images(detector: TextDetr) -> Images:
    return detector.prepare(_random_images((64, 96), (60, 64)))


def _predict(detector: TextDetr) -> list[Detections]:
    return detector.predict(_prepare_images(detector))


def test_columns_follow_their_class_embeddings() -> None:
    """Other names need other embeddings and no other weights."""
    detector = _new_deployed()
    plain = detector(_prepare_images(detector)).logits
    vectors = detector.class_embeddings().detach()
    detector.prompts = ClassVectors(vectors[[2, 0, 1, 3]], learned=False)
    torch.testing.assert_close(
        detector(_prepare_images(detector)).logits, plain[..., [2, 0, 1]]
    )


def test_logits_are_scaled_cosines_with_the_class_embeddings() -> None:
    detector = _new_deployed()
    log_scale = detector.decoder.classify[0].log_scale
    assert float(log_scale.exp().detach()) == pytest.approx(10)
    logits = detector(_prepare_images(detector)).logits
    names = detector.class_embeddings()[:-1]
    assert float(logits.max()) <= 10 + PRIOR_LOGIT + 0.2
    assert logits.shape[-1] == len(names) == len(CLASSES)


def test_linear_classifiers_do_not_read_the_prompts() -> None:
    detector = _new_deployed(has_text_classes=False)
    plain = detector(_prepare_images(detector)).logits
    detector.prompts = ClassVectors(torch.zeros(len(CLASSES) + 1, 64), learned=False)
    assert torch.equal(detector(_prepare_images(detector)).logits, plain)


@pytest.mark.parametrize("has_text_classes", [True, False])
def test_exported_base_predicts_the_same_bits(
    has_text_classes: bool, tmp_path: Path
) -> None:
    detector = _new_deployed(has_text_classes)
    size = write_exported_student(detector, CLASSES, str(tmp_path), tiny_config())
    loaded = load_exported_student(str(tmp_path))
    assert loaded.classes == CLASSES
    assert isinstance(loaded.detector, TextDetr)
    assert size == (tmp_path / "model.safetensors").stat().st_size
    for expected, actual in zip(
        _predict(detector), _predict(loaded.detector), strict=True
    ):
        assert len(expected)
        assert have_same_fields(expected, actual)


def test_an_export_holds_neither_text_nor_auxiliary_head(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    write_exported_student(_new_deployed(), CLASSES, str(tmp_path), tiny_config())
    names = set(load_file(tmp_path / "model.safetensors"))
    assert {n for n in names if n.startswith("prompts")} == {"prompts.values"}
    assert not [
        n
        for n in names
        if n.startswith(("head.", "proposals.", "queries.", "background"))
        or "context" in n
        or "attnpool" in n
    ]
