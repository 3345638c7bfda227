from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from builders import CLASSES, TEMPLATES, tiny_clip

from coin_ray.clip.encoder import class_embeddings, load_clip, make_prompts
from coin_ray.config import Clip
from coin_ray.config.presets import DEMO_CLIP
from coin_ray.errors import InputError


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (Clip(model="RN5000"), "no architecture 'RN5000'"),
        (Clip(model="absent/model.json"), "no such file absent/model.json"),
        (Clip(model="RN50", pretrained="absent_tag"), "--clip.pretrained"),
        (replace(DEMO_CLIP, pretrained="absent/file.pt"), "absent/file.pt"),
        (Clip(model="ViT-B23"), "nearest: ViT-B-32"),
        (Clip(model="ViT-B-32", pretrained="openia"), "tags are openai"),
        (Clip(model="ViT-B-32", pretrained=""), "no weights are given"),
    ],
)
def test_unusable_models(config: Clip, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_clip(config)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("no tag"),
        OSError("[Errno 101] Network is unreachable"),
        ValueError("?"),
    ],
)
def test_offline_is_an_input_error_with_advice(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(open_clip, "create_model", fail)
    with pytest.raises(
        InputError, match=r"Offline\? Give --clip.pretrained .* --collect.labeler none"
    ):
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
    assert class_embeddings(clip, CLASSES, DEMO_CLIP).shape == (
        len(CLASSES) + 1,
        clip.embedding_size,
    )


def test_prompts() -> None:
    assert make_prompts("cat", TEMPLATES) == [
        "a photo of a cat.",
        "a drawing of a cat.",
    ]
    styled, plain = (
        make_prompts("stop sign", Clip(style="foggy")),
        make_prompts("stop sign", Clip()),
    )
    assert len(styled) == len(plain) == 81
    assert (styled[0], plain[0]) == ("foggy stop sign.", "stop sign.")
    assert "a bad photo of a stop sign." in plain


@pytest.mark.parametrize(
    ("plain", "styled"),
    [
        ("car.", "foggy style car."),
        ("a photo of a car.", "a foggy style photo of a car."),
        ("a bad photo of a car.", "a foggy style bad photo of a car."),
        ("the plastic car.", "the foggy style plastic car."),
        ("a car in a video game.", "a foggy style car in a video game."),
        ("graffiti of the car.", "foggy style graffiti of the car."),
        ("itap of my car.", "foggy style itap of my car."),
    ],
)
def test_the_style_stands_behind_the_article(plain: str, styled: str) -> None:
    row = make_prompts("car", Clip()).index(plain)
    assert make_prompts("car", Clip(style="foggy style"))[row] == styled


def test_every_prompt_has_the_style_once_and_is_else_the_plain_one() -> None:
    styled, plain = (
        make_prompts("photo", Clip(style="SIM style")),
        make_prompts("photo", Clip()),
    )
    assert [prompt.replace("SIM style ", "") for prompt in styled] == plain
    assert {prompt.count("SIM style") for prompt in styled} == {1}
    assert len(set(styled)) == 81


@pytest.mark.parametrize(
    ("name", "tag", "quick"),
    [
        ("RN50", "openai", True),
        ("RN101", "openai", True),
        ("RN50", "yfcc15m", True),
        ("RN50", "weights.pt", False),
    ],
)
def test_openais_weights_run_with_the_activation_they_were_trained_with(
    name: str,
    tag: str,
    quick: bool,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """open_clip only warns if "RN50" is not told of it."""
    calls: list[object] = []

    def create(
        architecture: str,
        pretrained: str,
        force_quick_gelu: bool,
        force_preprocess_cfg: dict[str, object],
    ) -> torch.nn.Module:
        calls.append((architecture, pretrained, force_quick_gelu))
        return tiny_clip().network

    monkeypatch.setattr(open_clip, "create_model", create)
    monkeypatch.chdir(tmp_path)
    Path("weights.pt").write_bytes(b"")
    load_clip(Clip(model=name, pretrained=tag))
    assert calls == [(name, tag, quick)]


def test_class_embeddings_are_means_of_unit_vectors() -> None:
    clip = tiny_clip()
    embeddings = class_embeddings(clip, ("stop sign",), TEMPLATES)
    texts = [
        clip.network.encode_text(clip.tokenize([t.format("stop sign")]))[0].double()
        for t in TEMPLATES.templates
    ]  # type: ignore[operator]
    mean = torch.stack([t / t.norm() for t in texts]).mean(0)
    torch.testing.assert_close(
        embeddings[0].double(), mean / mean.norm(), rtol=1e-5, atol=1e-6
    )
    assert embeddings.shape == (2, clip.embedding_size)


def test_all_phrases_of_a_class_are_read() -> None:
    clip = tiny_clip()
    names = ("scooter", "car")
    plain = class_embeddings(clip, names, TEMPLATES)
    same = class_embeddings(clip, names, TEMPLATES, [("scooter",), ("car",)])
    assert torch.equal(plain, same)
    phrases = [("electric scooter", "kick scooter"), ("car",)]
    both = class_embeddings(clip, names, TEMPLATES, phrases)
    single = class_embeddings(clip, phrases[0], TEMPLATES)
    tokens = clip.tokenize(
        [t.format(phrase) for phrase in phrases[0] for t in TEMPLATES.templates]
    )
    units = torch.nn.functional.normalize(clip.network.encode_text(tokens), dim=-1)  # type: ignore[operator]
    mean = units.mean(0)
    torch.testing.assert_close(both[0], mean / mean.norm(), rtol=1e-5, atol=1e-6)
    assert torch.equal(both[1:], plain[1:])
    assert not torch.allclose(both[0], single[0])


TINY = {
    "embed_dim": 32,
    "vision_cfg": {
        "image_size": 64,
        "layers": [1, 1, 1, 1],
        "width": 8,
        "head_width": 32,
        "patch_size": None,
    },
    "text_cfg": {
        "context_length": 20,
        "vocab_size": 49408,
        "width": 32,
        "heads": 2,
        "layers": 1,
    },
}


def _activations(network: torch.nn.Module) -> set[str]:
    names = {type(module).__name__ for module in network.modules()}
    return names & {"GELU", "QuickGELU"}


def _tiny_weights(folder: Path, **description: object) -> tuple[str, str]:
    """Write the description of a tiny CLIP and its weights; return their paths."""
    architecture, weights = folder / "tiny_activation.json", folder / "weights.pt"
    architecture.write_text(json.dumps(TINY | description))
    shapes = {name: TINY[name] for name in ("vision_cfg", "text_cfg")}
    network = open_clip.CLIP(32, **shapes)  # type: ignore[arg-type]
    torch.save(network.state_dict(), weights)
    return str(architecture), str(weights)


@pytest.mark.parametrize(
    ("description", "activation", "expected", "warns"),
    [
        ({}, "auto", "GELU", True),
        ({}, "gelu", "GELU", False),
        ({}, "quick_gelu", "QuickGELU", False),
        ({"quick_gelu": True}, "auto", "QuickGELU", False),
        ({"quick_gelu": False}, "auto", "GELU", False),
    ],
)
def test_the_activation_of_weights_from_a_file_is_described_or_asked_for(
    description: dict[str, object],
    activation: Any,
    expected: str,
    warns: bool,
    tmp_path: Path,
) -> None:
    model, weights = _tiny_weights(tmp_path, **description)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        clip = load_clip(Clip(model=model, pretrained=weights, activation=activation))
    assert _activations(clip.network) == {expected}
    texts = [str(warning.message) for warning in caught]
    assert any("--clip.activation quick_gelu" in text for text in texts) == warns


def test_an_activation_that_contradicts_the_architecture_is_an_error(
    tmp_path: Path,
) -> None:
    model, weights = _tiny_weights(tmp_path, quick_gelu=True)
    with pytest.raises(InputError, match=r"clip\.activation is gelu, but"):
        load_clip(Clip(model=model, pretrained=weights, activation="gelu"))


def test_openais_torchscript_archives_are_read_with_their_activation(
    tmp_path: Path,
) -> None:
    model, weights = _tiny_weights(tmp_path)
    network = load_clip(
        Clip(model=model, pretrained=weights, activation="gelu")
    ).network
    tokens = torch.zeros(1, 20, dtype=torch.int64)
    trace = torch.jit.trace(
        network, (torch.zeros(1, 3, 64, 64), tokens), check_trace=False
    )
    archive = str(tmp_path / "RN50.pt")
    trace.save(archive)
    clip = load_clip(Clip(model=model, pretrained=archive))
    assert _activations(clip.network) == {"QuickGELU"}
    for name, weight in network.state_dict().items():
        assert torch.equal(clip.network.state_dict()[name], weight)


@pytest.mark.parametrize("has_weights", [True, False])
def test_a_folder_of_open_clip_brings_its_weights_along(
    has_weights: bool, tmp_path: Path
) -> None:
    description = {"model_cfg": TINY, "preprocess_cfg": {}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(description))
    config = Clip(model=f"local-dir:{tmp_path}")
    if not has_weights:
        with pytest.raises(InputError, match="could not be loaded"):
            load_clip(config)
        return
    _, weights = _tiny_weights(tmp_path)
    Path(weights).rename(tmp_path / "open_clip_pytorch_model.bin")
    assert load_clip(config).embedding_size == 32
