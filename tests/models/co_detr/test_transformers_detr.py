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
from coin_ray.models.co_detr.targets import DetrTargets
from coin_ray.models.co_detr.transformers_detr import (
    CollaborativeTransformersDetr,
    load_transformers_detr,
    open_transformers_detr,
    pack_transformers_detr,
)
from coin_ray.training.ema import ema_update
from coin_ray.training.supervised import parameter_groups
from models.co_detr.scenes import (
    TWO_IMAGES,
    have_same_fields,
    make_crowd,
    make_targets,
    seeded,
)
from models.co_detr.transformers_networks import SIDE, save_network

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()

NAMES = ("cat", "dog", "bird")
MODELS = ("rt-detr-v2", "d-fine")
SIZES = ((64, 96), (50, 70))


@pytest.fixture(scope="module")
def network_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {
        model: save_network(tmp_path_factory.mktemp(model), model, classes=5)
        for model in MODELS
    }


def _random_images(sizes: tuple[tuple[int, int], ...] = SIZES) -> list[Tensor]:
    return [
        torch.randint(0, 255, (3, *size), generator=seeded(i), dtype=torch.uint8)
        for i, size in enumerate(sizes)
    ]


def _new_detector(
    folder: str, model: str, **changes: Any
) -> CollaborativeTransformersDetr:
    torch.manual_seed(0)
    return CollaborativeTransformersDetr(
        load_transformers_detr(folder, model, NAMES),
        tiny(**{"auxiliary": ("atss",), **changes}),
    )


def _finite_gradients(model: CollaborativeTransformersDetr, total: Tensor) -> set[str]:
    model.zero_grad()
    total.backward()  # type: ignore[no-untyped-call]
    by_name = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert all(bool(torch.isfinite(g).all()) for g in by_name.values())
    return {n for n, g in by_name.items() if bool(g.any())}


@pytest.mark.parametrize("model", MODELS)
def test_the_head_trains_the_encoder_and_the_backbone_and_no_later_layer(
    model: str, network_folders: dict[str, str]
) -> None:
    detector = _new_detector(network_folders[model], model).train()
    objective = detector.objective(
        detector.base.prepare(_random_images()), TWO_IMAGES, seeded()
    )
    heads = torch.stack(
        [v for name, v in objective.losses.items() if name.startswith("atss")]
    )
    assert len(heads) == 3
    assert objective.positives["atss"] > 0
    trained_names = _finite_gradients(detector, heads.sum())
    encoder = {
        n for n, _ in detector.named_parameters() if "network.model.encoder." in n
    }
    assert len(encoder & trained_names) > 0.9 * len(encoder)
    assert any("network.model.backbone." in n for n in trained_names)
    assert not any(
        part in n
        for n in trained_names
        for part in ("decoder.", "class_embed", "enc_score_head", "decoder_input_proj")
    )


@pytest.mark.parametrize("model", MODELS)
def test_the_detectors_own_losses_are_those_of_transformers(
    model: str, network_folders: dict[str, str]
) -> None:
    detector = _new_detector(network_folders[model], model).train()
    batch = detector.base.prepare(_random_images())
    labels = [
        {"class_labels": t.labels, "boxes": t.normalised_boxes(size)}
        for t, size in zip(TWO_IMAGES, batch.sizes, strict=True)
    ]
    torch.manual_seed(0)
    expected = detector.base.network(pixel_values=batch.pixels, labels=labels).loss
    torch.manual_seed(0)
    losses = detector.objective(batch, TWO_IMAGES).losses
    torch.testing.assert_close(
        torch.stack([v for n, v in losses.items() if n.startswith("decoder")]).sum(),
        expected,
    )
    assert all(n.startswith(("decoder_", "atss_")) for n in losses)


EXTREMES = {
    "no object": [make_targets(), make_targets()],
    "one empty image": [TWO_IMAGES[0], make_targets()],
    "one pixel": [make_targets((10, 10, 11, 11, 0)), make_targets((3, 3, 3.2, 3.2, 1))],
    "whole image and beyond": [
        make_targets((0, 0, 96, 64, 0)),
        make_targets((-9, -9, 200, 200, 1)),
    ],
    "eighty objects": [make_crowd(), make_targets()],
}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("targets", EXTREMES.values(), ids=EXTREMES.keys())
def test_losses_and_gradients_of_a_transformers_detr_are_finite(
    model: str, targets: list[DetrTargets], network_folders: dict[str, str]
) -> None:
    detector = _new_detector(network_folders[model], model).train()
    total = detector.objective(
        detector.base.prepare(_random_images()), targets, seeded()
    ).total
    assert float(total.detach()) > 0
    assert bool(torch.isfinite(total))
    assert _finite_gradients(detector, total)


@pytest.mark.parametrize("model", MODELS)
def test_losses_and_gradients_are_finite_in_half_precision(
    model: str, network_folders: dict[str, str]
) -> None:
    detector = _new_detector(network_folders[model], model).train()
    with torch.autocast("cpu", torch.bfloat16):
        objective = detector.objective(
            detector.base.prepare(_random_images()), TWO_IMAGES, seeded()
        )
    assert all(bool(torch.isfinite(v)) for v in objective.losses.values())
    assert all(
        v.dtype == torch.float32
        for name, v in objective.losses.items()
        if name.startswith("atss")
    )
    assert _finite_gradients(detector, objective.total)


def test_boxes_outside_the_image_and_labels_of_other_classes_are_refused(
    network_folders: dict[str, str],
) -> None:
    detector = _new_detector(network_folders["rt-detr-v2"], "rt-detr-v2")
    for bad, message in (
        (make_targets((120, 5, 140, 9, 0)), "no area inside the image"),
        (make_targets((1, 1, 9, 9, 3)), "labels must lie in 0..2"),
    ):
        with pytest.raises(InputError, match=message):
            detector.objective(
                detector.base.prepare(_random_images()), [bad, TWO_IMAGES[1]]
            )


def test_targets_are_scaled_to_the_stretched_image(
    network_folders: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    detector = _new_detector(network_folders["rt-detr-v2"], "rt-detr-v2").train()
    head_inputs: list[Any] = []
    head = detector.heads["atss"]
    forward = head.forward

    def record(maps: Any, targets: Any, generator: Any) -> Any:
        head_inputs.append((maps, targets))
        return forward(maps, targets, generator)

    monkeypatch.setattr(head, "forward", record)
    crowd = DetrTargets(
        TWO_IMAGES[1].boxes,
        TWO_IMAGES[1].labels,
        None,
        torch.tensor([[0.0, 0, 35, 25]]),
    )
    detector.objective(
        detector.base.prepare(_random_images()), [TWO_IMAGES[0], crowd], seeded()
    )
    ((maps, (first, second)),) = head_inputs
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
def test_the_exported_model_is_transformers_plain_model_with_the_same_outputs(
    model: str, network_folders: dict[str, str], tmp_path: Path
) -> None:
    detector = _new_detector(network_folders[model], model)
    optimizer = torch.optim.AdamW(detector.parameters(), 1e-3)
    detector.train().objective(
        detector.base.prepare(_random_images()), TWO_IMAGES, seeded()
    ).total.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    for name, file_bytes in pack_transformers_detr(detector.eval().base).items():
        (tmp_path / name).write_bytes(file_bytes)
    plain = transformers.AutoModelForObjectDetection.from_pretrained(tmp_path).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    assert plain.config.id2label == dict(enumerate(NAMES))
    pixels = processor(images=_random_images(), return_tensors="pt")["pixel_values"]
    batch = detector.base.prepare(_random_images())
    assert torch.equal(pixels, batch.pixels)
    with torch.no_grad():
        expected = plain(pixel_values=pixels)
        actual = detector.base.network(pixel_values=batch.pixels)
    assert torch.equal(expected.logits, actual.logits)
    assert torch.equal(expected.pred_boxes, actual.pred_boxes)
    opened = open_transformers_detr(str(tmp_path), model).eval()
    assert opened.classes == NAMES
    opened_detections, detections = opened.predict(batch), detector.predict(batch)
    assert all(
        have_same_fields(a, b)
        for a, b in zip(opened_detections, detections, strict=True)
    )


def test_detections_lie_in_the_frame_of_the_image_that_was_given(
    network_folders: dict[str, str],
) -> None:
    detector = _new_detector(network_folders["d-fine"], "d-fine").eval()
    for detections, (height, width) in zip(
        detector.predict(detector.base.prepare(_random_images())), SIZES, strict=True
    ):
        assert len(detections) == 20 * 3
        assert detections.num_classes == 3
        assert bool(
            (detections.boxes >= 0).all()
            and (detections.boxes[:, 2:] <= torch.tensor([width, height])).all()
        )
        assert float(detections.boxes[:, 2].max()) > 0.5 * width


def test_without_the_head_only_the_detectors_own_losses_remain(
    network_folders: dict[str, str],
) -> None:
    detector = _new_detector(
        network_folders["rt-detr-v2"], "rt-detr-v2", auxiliary=()
    ).train()
    objective = detector.objective(detector.base.prepare(_random_images()), TWO_IMAGES)
    assert all(name.startswith("decoder_") for name in objective.losses)
    assert objective.positives == {}
    assert all(name.startswith("base.") for name, _ in detector.named_parameters())


def test_classifiers_of_the_same_classes_are_kept_and_others_initialised(
    network_folders: dict[str, str], tmp_path: Path
) -> None:
    folder = save_network(tmp_path / "three", "rt-detr-v2", classes=3)
    name = "class_embed.0.weight"
    same = load_transformers_detr(folder, "rt-detr-v2", NAMES).network.state_dict()
    model_class = transformers.AutoModelForObjectDetection
    original = model_class.from_pretrained(folder).state_dict()
    assert torch.equal(same[name], original[name])
    other = load_transformers_detr(
        network_folders["rt-detr-v2"], "rt-detr-v2", NAMES
    ).network
    assert tuple(other.state_dict()["class_embed.0.weight"].shape) == (3, 32)
    five = transformers.AutoModelForObjectDetection.from_pretrained(
        network_folders["rt-detr-v2"]
    ).state_dict()
    assert torch.equal(
        other.state_dict()["model.enc_output.0.weight"],
        five["model.enc_output.0.weight"],
    )


def test_an_average_follows_weights_of_several_names_once(
    network_folders: dict[str, str],
) -> None:
    student = _new_detector(network_folders["rt-detr-v2"], "rt-detr-v2")
    teacher = copy.deepcopy(student)
    with torch.no_grad():
        for weight in student.parameters():
            weight.add_(1.0)
    before = {n: p.clone() for n, p in teacher.named_parameters()}
    ema_update(teacher, student, 0.25)
    for name, weight in teacher.named_parameters():
        torch.testing.assert_close(weight.detach(), before[name] + 0.25, msg=name)


def test_the_backbone_learns_slowly(network_folders: dict[str, str]) -> None:
    detector = _new_detector(network_folders["d-fine"], "d-fine")
    slow, fast = parameter_groups(
        detector, TrainingConfig(lr=1e-3, visual_lr_factor=0.1)
    )
    assert (slow["lr"], fast["lr"]) == (pytest.approx(1e-4), 1e-3)
    names = {p: n for n, p in detector.named_parameters()}
    assert {names[p] for p in slow["params"]} == {
        n
        for n, p in detector.named_parameters()
        if ".backbone." in n and p.requires_grad
    }  # type: ignore[attr-defined]


def test_weights_of_objects_are_refused(network_folders: dict[str, str]) -> None:
    detector = _new_detector(network_folders["d-fine"], "d-fine")
    weighted = DetrTargets(
        TWO_IMAGES[0].boxes, TWO_IMAGES[0].labels, torch.tensor([0.5, 1.0])
    )
    with pytest.raises(InputError, match="do not support weights of objects"):
        detector.objective(
            detector.base.prepare(_random_images()), [weighted, TWO_IMAGES[1]]
        )


def test_folders_that_cannot_be_loaded_is_reported(
    network_folders: dict[str, str], tmp_path: Path
) -> None:
    with pytest.raises(
        ConfigError,
        match="is a d_fine model; --model rt-detr-v2 trains rt_detr_v2 models",
    ):
        load_transformers_detr(network_folders["d-fine"], "rt-detr-v2", NAMES)
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
