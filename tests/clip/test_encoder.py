from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import open_clip
import pytest
import torch
from builders import CLASSES, TEMPLATES, tiny_clip

from coin_ray.clip.encoder import class_embeddings, load_clip, prompts_for
from coin_ray.config import Clip
from coin_ray.errors import InputError
from coin_ray.presets import DEMO_CLIP


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (Clip(model="RN5000"), "no architecture 'RN5000'"),
        (Clip(model="absent/model.json"), "no such file absent/model.json"),
        (Clip(model="RN50", pretrained="absent_tag"), "--clip.pretrained"),
        (replace(DEMO_CLIP, pretrained="absent/file.pt"), "absent/file.pt"),
        (Clip(model="ViT-B-32", pretrained=""), "needs a ModifiedResNet"),
    ],
)
def test_unusable_models(config: Clip, said: str) -> None:
    with pytest.raises(InputError, match=said):
        load_clip(config)


@pytest.mark.parametrize("error", [RuntimeError("no tag"), OSError("[Errno 101] Network is unreachable"), ValueError("?")])
def test_offline_is_an_input_error_with_advice(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(open_clip, "create_model", fail)
    with pytest.raises(InputError, match=r"Offline\? Give --clip.pretrained .* --collect.labeler none"):
        load_clip(Clip())


def test_a_damaged_weights_file(tmp_path: Path) -> None:
    file = tmp_path / "w.pt"
    file.write_bytes(b"not weights")
    with pytest.raises(InputError, match="could not be loaded"):
        load_clip(replace(DEMO_CLIP, pretrained=str(file)))


def test_the_demos_clip() -> None:
    clip = load_clip(DEMO_CLIP)
    assert clip.roi_size * 16 == 64
    assert not clip.network.training
    assert not any(p.requires_grad for p in clip.network.parameters())
    assert class_embeddings(clip, CLASSES, DEMO_CLIP).shape == (len(CLASSES) + 1, clip.embedding_size)


def test_prompts() -> None:
    assert prompts_for("cat", TEMPLATES) == ["a photo of a cat.", "a drawing of a cat."]
    styled, plain = prompts_for("stop sign", Clip(style="foggy")), prompts_for("stop sign", Clip())
    assert len(styled) == len(plain) == 81
    assert (styled[0], plain[0]) == ("foggy stop sign.", "stop sign.")
    assert "a bad foggy photo of a stop sign." in styled
    assert "a bad photo of a stop sign." in plain


def test_class_embeddings_are_means_of_unit_vectors() -> None:
    clip = tiny_clip()
    found = class_embeddings(clip, ("stop sign",), TEMPLATES)
    texts = [clip.network.encode_text(clip.tokenize([t.format("stop sign")]))[0].double() for t in TEMPLATES.templates]  # type: ignore[operator]
    mean = torch.stack([t / t.norm() for t in texts]).mean(0)
    torch.testing.assert_close(found[0].double(), mean / mean.norm(), rtol=1e-5, atol=1e-6)
    assert found.shape == (2, clip.embedding_size)
