from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from coin_ray.config import TrainingConfig
from coin_ray.config.co_detr import tiny
from coin_ray.errors import ConfigError, InputError
from coin_ray.models.co_detr.targets import Targets
from coin_ray.models.co_detr.transformers_detr import (
    CollaborativeTransformersDetr,
    load_transformers_detr,
    open_transformers_detr,
    pack_transformers_detr,
)
from coin_ray.training.ema import ema_update
from coin_ray.training.supervised import parameter_groups
from models.co_detr.fast_networks import SIDE, save_network
from models.co_detr.scenes import TWO_IMAGES, make_targets, seeded

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()

NAMES = ("cat", "dog", "bird")
MODELS = ("rt-detr-v2", "d-fine")
SIZES = ((64, 96), (50, 70))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {
        model: save_network(tmp_path_factory.mktemp(model), model, classes=5)
        for model in MODELS
    }


def images(sizes: tuple[tuple[int, int], ...] = SIZES) -> list[Tensor]:
    return [
        torch.randint(0, 255, (3, *size), generator=seeded(i), dtype=torch.uint8)
        for i, size in enumerate(sizes)
    ]


def trained(place: str, model: str, **changes: Any) -> CollaborativeTransformersDetr:
    torch.manual_seed(0)
    return CollaborativeTransformersDetr(
        load_transformers_detr(place, model, NAMES),
        tiny(**{"auxiliary": ("atss",), **changes}),
    )


def gradients(model: CollaborativeTransformersDetr, total: Tensor) -> set[str]:
    model.zero_grad()
    total.backward()  # type: ignore[no-untyped-call]
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert all(bool(torch.isfinite(g).all()) for g in found.values())
    return {n for n, g in found.items() if bool(g.any())}


@pytest.mark.parametrize("model", MODELS)
def test_the_head_trains_the_encoder_and_the_backbone_and_nothing_behind_them(
    model: str, folders: dict[str, str]
) -> None:
    own = trained(folders[model], model).train()
    found = own.objective(own.base.prepare(images()), TWO_IMAGES, seeded())
    heads = torch.stack(
        [v for name, v in found.losses.items() if name.startswith("atss")]
    )
    assert len(heads) == 3
    assert found.positives["atss"] > 0
    reached = gradients(own, heads.sum())
    encoder = {n for n, _ in own.named_parameters() if "network.model.encoder." in n}
    assert len(encoder & reached) > 0.9 * len(encoder)
    assert any("network.model.backbone." in n for n in reached)
    assert not any(
        part in n
        for n in reached
        for part in ("decoder.", "class_embed", "enc_score_head", "decoder_input_proj")
    )


@pytest.mark.parametrize("model", MODELS)
def test_its_own_losses_are_transformers_own(
    model: str, folders: dict[str, str]
) -> None:
    own = trained(folders[model], model).train()
    batch = own.base.prepare(images())
    labels = [
        {"class_labels": t.labels, "boxes": t.normalised_boxes(size)}
        for t, size in zip(TWO_IMAGES, batch.sizes, strict=True)
    ]
    torch.manual_seed(0)
    expected = own.base.network(pixel_values=batch.pixels, labels=labels).loss
    torch.manual_seed(0)
    found = own.objective(batch, TWO_IMAGES).losses
    torch.testing.assert_close(
        torch.stack([v for n, v in found.items() if n.startswith("decoder")]).sum(),
        expected,
    )
    assert all(n.startswith(("decoder_", "atss_")) for n in found)


EXTREMES = {
    "no object": [make_targets(), make_targets()],
    "one empty image": [TWO_IMAGES[0], make_targets()],
    "one pixel": [make_targets((10, 10, 11, 11, 0)), make_targets((3, 3, 3.2, 3.2, 1))],
    "whole image and beyond": [
        make_targets((0, 0, 96, 64, 0)),
        make_targets((-9, -9, 200, 200, 1)),
    ],
    "eighty objects": [
        make_targets(
            *(
                (
                    i % 10 * 9.0,
                    i // 10 * 7.0,
                    i % 10 * 9 + 8.0,
                    i // 10 * 7 + 6.0,
                    i % 3,
                )
                for i in range(80)
            )
        ),
        make_targets(),
    ],
}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("targets", EXTREMES.values(), ids=EXTREMES.keys())
def test_losses_and_gradients_are_finite(
    model: str, targets: list[Targets], folders: dict[str, str]
) -> None:
    own = trained(folders[model], model).train()
    total = own.objective(own.base.prepare(images()), targets, seeded()).total
    assert float(total.detach()) > 0
    assert bool(torch.isfinite(total))
    assert gradients(own, total)


@pytest.mark.parametrize("model", MODELS)
def test_losses_and_gradients_are_finite_in_half_precision(
    model: str, folders: dict[str, str]
) -> None:
    own = trained(folders[model], model).train()
    with torch.autocast("cpu", torch.bfloat16):
        found = own.objective(own.base.prepare(images()), TWO_IMAGES, seeded())
    assert all(bool(torch.isfinite(v)) for v in found.losses.values())
    assert all(
        v.dtype == torch.float32
        for name, v in found.losses.items()
        if name.startswith("atss")
    )
    assert gradients(own, found.total)


def test_boxes_outside_the_image_and_labels_of_other_classes_are_refused(
    folders: dict[str, str],
) -> None:
    own = trained(folders["rt-detr-v2"], "rt-detr-v2")
    for bad, message in (
        (make_targets((120, 5, 140, 9, 0)), "no area inside the image"),
        (make_targets((1, 1, 9, 9, 3)), "labels must lie in 0..2"),
    ):
        with pytest.raises(InputError, match=message):
            own.objective(own.base.prepare(images()), [bad, TWO_IMAGES[1]])


def test_objects_are_where_they_are_in_the_stretched_image(
    folders: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    own = trained(folders["rt-detr-v2"], "rt-detr-v2").train()
    asked: list[Any] = []
    head = own.heads["atss"]
    monkeypatch.setattr(
        head,
        "forward",
        lambda maps, targets, draw: (
            asked.append((maps, targets))
            or type(head).forward(head, maps, targets, draw)
        ),
    )
    crowd = Targets(
        TWO_IMAGES[1].boxes,
        TWO_IMAGES[1].labels,
        None,
        torch.tensor([[0.0, 0, 35, 25]]),
    )
    own.objective(own.base.prepare(images()), [TWO_IMAGES[0], crowd], seeded())
    ((maps, (first, second)),) = asked
    assert maps.strides == [8, 16, 32, 64]
    assert maps.sizes == ((SIDE, SIDE),) * 2
    torch.testing.assert_close(
        first.boxes, TWO_IMAGES[0].boxes * torch.tensor([1, 1.5, 1, 1.5])
    )
    torch.testing.assert_close(
        second.boxes,
        TWO_IMAGES[1].boxes * torch.tensor([96 / 70, 96 / 50, 96 / 70, 96 / 50]),
    )
    torch.testing.assert_close(second.ignored_boxes, torch.tensor([[0.0, 0, 48, 48]]))


@pytest.mark.parametrize("model", MODELS)
def test_what_is_shipped_is_transformers_plain_model_with_the_same_outputs(
    model: str, folders: dict[str, str], tmp_path: Path
) -> None:
    own = trained(folders[model], model)
    optimizer = torch.optim.AdamW(own.parameters(), 1e-3)
    own.train().objective(
        own.base.prepare(images()), TWO_IMAGES, seeded()
    ).total.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    for name, data in pack_transformers_detr(own.eval().base).items():
        (tmp_path / name).write_bytes(data)
    plain = transformers.AutoModelForObjectDetection.from_pretrained(tmp_path).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    assert plain.config.id2label == dict(enumerate(NAMES))
    pixels = processor(images=images(), return_tensors="pt")["pixel_values"]
    batch = own.base.prepare(images())
    assert torch.equal(pixels, batch.pixels)
    with torch.no_grad():
        theirs, ours = (
            plain(pixel_values=pixels),
            own.base.network(pixel_values=batch.pixels),
        )
    assert torch.equal(theirs.logits, ours.logits)
    assert torch.equal(theirs.pred_boxes, ours.pred_boxes)
    again = open_transformers_detr(str(tmp_path), model).eval()
    assert again.classes == NAMES
    for one, other in zip(again.predict(batch), own.predict(batch), strict=True):
        assert all(
            torch.equal(getattr(one, part), getattr(other, part))
            for part in ("boxes", "scores", "labels", "probs")
        )


def test_detections_lie_in_the_frame_of_the_image_that_was_given(
    folders: dict[str, str],
) -> None:
    own = trained(folders["d-fine"], "d-fine").eval()
    for found, (height, width) in zip(
        own.predict(own.base.prepare(images())), SIZES, strict=True
    ):
        assert len(found) == 20 * 3
        assert found.num_classes == 3
        assert bool(
            (found.boxes >= 0).all()
            and (found.boxes[:, 2:] <= torch.tensor([width, height])).all()
        )
        assert float(found.boxes[:, 2].max()) > 0.5 * width


def test_without_the_head_it_is_trained_as_it_is(folders: dict[str, str]) -> None:
    own = trained(folders["rt-detr-v2"], "rt-detr-v2", auxiliary=()).train()
    found = own.objective(own.base.prepare(images()), TWO_IMAGES)
    assert all(name.startswith("decoder_") for name in found.losses)
    assert found.positives == {}
    assert all(name.startswith("base.") for name, _ in own.named_parameters())


def test_the_classes_its_weights_know_keep_them_and_others_are_drawn_anew(
    folders: dict[str, str], tmp_path: Path
) -> None:
    place = save_network(tmp_path / "three", "rt-detr-v2", classes=3)
    weights = {
        n: (
            load_transformers_detr(p, "rt-detr-v2", NAMES).network.state_dict()[
                "class_embed.0.weight"
            ]
        )
        for n, p in (("same", place),)
    }
    original = transformers.AutoModelForObjectDetection.from_pretrained(
        place
    ).state_dict()["class_embed.0.weight"]
    assert torch.equal(weights["same"], original)
    other = load_transformers_detr(folders["rt-detr-v2"], "rt-detr-v2", NAMES).network
    assert tuple(other.state_dict()["class_embed.0.weight"].shape) == (3, 32)
    five = transformers.AutoModelForObjectDetection.from_pretrained(
        folders["rt-detr-v2"]
    ).state_dict()
    assert torch.equal(
        other.state_dict()["model.enc_output.0.weight"],
        five["model.enc_output.0.weight"],
    )


def test_an_average_follows_weights_of_several_names_once(
    folders: dict[str, str],
) -> None:
    student = trained(folders["rt-detr-v2"], "rt-detr-v2")
    teacher = copy.deepcopy(student)
    with torch.no_grad():
        for weight in student.parameters():
            weight.add_(1.0)
    before = {n: p.clone() for n, p in teacher.named_parameters()}
    ema_update(teacher, student, 0.25)
    for name, weight in teacher.named_parameters():
        torch.testing.assert_close(weight.detach(), before[name] + 0.25, msg=name)


def test_the_backbone_learns_slowly(folders: dict[str, str]) -> None:
    own = trained(folders["d-fine"], "d-fine")
    slow, fast = parameter_groups(own, TrainingConfig(lr=1e-3, visual_lr_factor=0.1))
    assert (slow["lr"], fast["lr"]) == (pytest.approx(1e-4), 1e-3)
    names = {p: n for n, p in own.named_parameters()}
    assert {names[p] for p in slow["params"]} == {
        n for n, p in own.named_parameters() if ".backbone." in n and p.requires_grad
    }  # type: ignore[attr-defined]


def test_weights_of_objects_are_refused(folders: dict[str, str]) -> None:
    own = trained(folders["d-fine"], "d-fine")
    doubtful = Targets(
        TWO_IMAGES[0].boxes, TWO_IMAGES[0].labels, torch.tensor([0.5, 1.0])
    )
    with pytest.raises(InputError, match="do not support weights of objects"):
        own.objective(own.base.prepare(images()), [doubtful, TWO_IMAGES[1]])


def test_what_cannot_be_loaded_is_told(folders: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError,
        match="is a d_fine model; --model rt-detr-v2 trains rt_detr_v2 models",
    ):
        load_transformers_detr(folders["d-fine"], "rt-detr-v2", NAMES)
    with pytest.raises(InputError, match="is no model folder of transformers"):
        load_transformers_detr(str(tmp_path), "d-fine", NAMES)
    with pytest.raises(
        InputError,
        match=(
            r"must stretch images to one height and width, multiples of 32; got size"
            r" .*100"
        ),
    ):
        load_transformers_detr(
            save_network(
                tmp_path / "odd", "d-fine", 3, size={"height": 100, "width": 96}
            ),
            "d-fine",
            NAMES,
        )
    (tmp_path / "odd" / "model.safetensors").unlink()
    with pytest.raises(InputError, match="is no model folder of transformers"):
        load_transformers_detr(str(tmp_path / "odd"), "d-fine", NAMES)


def test_offline_the_error_names_the_folder_to_give(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        InputError,
        match=r"could not be downloaded \(.*Offline\? Give a folder: --network FOLDER",
    ):
        load_transformers_detr("nobody/no-such-detector", "d-fine", NAMES)
