from __future__ import annotations

from pathlib import Path
from urllib.error import URLError

import pytest
import torch
from torch import nn
from torchvision.models import WeightsEnum, resnet18, swin_t

from coin_ray.config.co_detr import Backbone, tiny
from coin_ray.demo.drawings import ASSETS
from coin_ray.errors import InputError
from coin_ray.models.co_detr.model import DeformableDetr
from coin_ray.models.co_detr.towers import (
    build_backbone,
    describe_backbone,
    pixel_statistics,
    rebuild_backbone,
)
from models.co_detr.scenes import noise_batch, randn

CLIP = Backbone(f"open_clip:{ASSETS / 'coin_tiny.json'}", str(ASSETS / "coin_tiny.pt"))


def _save_swin(folder: Path) -> Backbone:
    """Save a Swin of random weights in a folder, as on the hub."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.SwinConfig(
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 2, 2],
        window_size=2,
        image_size=32,
    )
    transformers.SwinModel(config).save_pretrained(folder)
    return Backbone(f"transformers:{folder}", str(folder))


@pytest.mark.parametrize(
    "name", ["tiny", "resnet18", "resnet50", "swin_t", "clip", "transformers"]
)
def test_every_tower_gives_maps_of_strides_8_16_32_and_is_rebuilt_without_its_files(
    name: str, tmp_path: Path
) -> None:
    config = {"clip": CLIP}.get(name) or (
        _save_swin(tmp_path / "swin") if name == "transformers" else Backbone(name)
    )
    torch.manual_seed(0)
    tower = build_backbone(config).eval()
    pixels = randn(1, 3, 64, 96)
    with torch.no_grad():
        maps = tower(pixels)
        assert [tuple(m.shape[1:]) for m in maps] == [
            (c, 64 // s, 96 // s)
            for c, s in zip(tower.channels, (8, 16, 32), strict=True)
        ]  # type: ignore[arg-type]
        rebuilt = rebuild_backbone(
            Backbone(
                config.name.partition(":")[0] + ":absent"
                if ":" in config.name
                else name
            ),
            describe_backbone(tower),
        ).eval()
        rebuilt.load_state_dict(tower.state_dict())
        assert all(
            torch.equal(a, b) for a, b in zip(maps, rebuilt(pixels), strict=True)
        )
    model = DeformableDetr(tower, 3, tiny())
    assert len(model(noise_batch()).logits) == 2


@pytest.mark.parametrize(
    ("name", "network", "frozen"),
    [
        ("resnet18", resnet18, {"stem.0.weight", "stages.0.0.conv1.weight"}),
        ("swin_t", swin_t, set()),
    ],
)
def test_local_weights_are_used_and_the_first_stages_stay(
    name: str, network: type[nn.Module], frozen: set[str], tmp_path: Path
) -> None:
    torch.manual_seed(3)
    original = network()
    torch.save(original.state_dict(), tmp_path / "weights.pt")
    tower = build_backbone(Backbone(name, str(tmp_path / "weights.pt")))
    assert all(
        any(torch.equal(p, v) for v in original.state_dict().values())
        for n, p in tower.named_parameters()
        if "norms" not in n
    )
    fixed = {n for n, p in tower.named_parameters() if not p.requires_grad}
    assert frozen <= fixed
    assert bool(fixed) == bool(frozen)
    assert any(p.requires_grad for p in tower.parameters())


def test_statistics_of_norms_never_move() -> None:
    for config in (CLIP, Backbone("resnet18")):
        tower = build_backbone(config).train()
        before = {n: b.clone() for n, b in tower.named_buffers()}
        tower(randn(2, 3, 64, 64))
        assert all(torch.equal(b, before[n]) for n, b in tower.named_buffers())


def test_pixels_are_normalised_as_the_weights_were_trained() -> None:
    assert pixel_statistics(CLIP)[0][0] == pytest.approx(0.4815, abs=1e-3)
    assert pixel_statistics(Backbone("resnet50"))[0][0] == 0.485


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            Backbone("resnet51"),
            (
                "unknown backbone 'resnet51'; expected tiny, resnet101.*open_clip:NAME"
                " or transformers:NAME"
            ),
        ),
        (
            Backbone("resnet18", "/nowhere.pt"),
            (
                "no such file /nowhere.pt; give a file or one of torchvision's"
                " IMAGENET1K_V1"
            ),
        ),
        (Backbone("open_clip:RN999"), "no architecture 'RN999'"),
        (Backbone("open_clip:ViT-B-32"), "expected a ModifiedResNet"),
        (Backbone("open_clip:/nowhere.json"), "no such file"),
        (Backbone("transformers:/nowhere", "/nowhere"), "Offline"),
    ],
)
def test_unavailable_towers_are_reported(config: Backbone, message: str) -> None:
    if config.name.startswith("transformers"):
        pytest.importorskip("transformers")
    with pytest.raises(InputError, match=message):
        build_backbone(config)


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    torch.save(resnet18().state_dict(), tmp_path / "weights.pt")
    with pytest.raises(InputError, match="of another network"):
        build_backbone(Backbone("resnet50", str(tmp_path / "weights.pt")))


def test_unreadable_or_unavailable_weights_are_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "text.pt").write_text("no weights")
    torch.save([1], tmp_path / "list.pt")
    for file, message in (
        ("text.pt", "can't be read"),
        ("list.pt", "expected weights by name, got list"),
    ):
        with pytest.raises(InputError, match=message):
            build_backbone(Backbone("resnet18", str(tmp_path / file)))

    def offline(self: WeightsEnum, **_: object) -> None:
        raise URLError("no route")

    monkeypatch.setattr(WeightsEnum, "get_state_dict", offline)
    with pytest.raises(
        InputError,
        match=(
            r"could not be downloaded .*Offline\? Give --backbone.weights the path of a"
            r" file"
        ),
    ):
        build_backbone(Backbone("resnet18", "IMAGENET1K_V1"))
