"""What Co-DETR's auxiliary heads and positive queries are worth, and what they cost:
``make bench-codetr``.

    make bench-codetr                             # seeds 0 1 2; writes
    docs/results/co-detr.md make bench-codetr ARGS="--quick"              # two minutes:
    few steps, one seed; writes nothing into docs/results make bench-codetr ARGS="--only
    speed"         # only the ratios of times, or only the table: --only table

The table: the tiny preset on the demo's labelled source scenes, the same number of
steps for every arm, AP50 on held-out scenes. Finished arms are kept in --root, and a
killed arm goes on from its last checkpoint by the same command. Prints the tables and,
last, one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.transforms.functional import pil_to_tensor

from coin_ray import storage
from coin_ray.config import Tracking
from coin_ray.config.co_detr import CoDetr
from coin_ray.config.detector_presets import small
from coin_ray.config.detector_training import DEMO_SOURCE, DetectorConfig, SourceScenes
from coin_ray.data.augmentation import resize_to_fit
from coin_ray.demo.drawings import CLASSES, load_drawings
from coin_ray.demo.scenes import SIZE, Artwork, compose
from coin_ray.experiments import components
from coin_ray.experiments.components import (
    QUICK_SCENES,
    QUICK_STEPS,
    VARIANTS,
    ComponentTrial,
    build_component_trials,
)
from coin_ray.models.co_detr.attention import DeformableAttention
from coin_ray.models.co_detr.encoder import EncoderLayer, cell_centres
from coin_ray.models.co_detr.targets import Targets
from coin_ray.runs.summary import package_versions
from coin_ray.stages.train_detector import new_co_detr

REPOSITORY = Path(__file__).resolve().parents[2]
PAGE = REPOSITORY / "docs" / "results" / "co-detr.md"
STEPS, SCENES = 300, SourceScenes(train=1000, val=200)
LIMITS = {
    "attention": 1.0,
    "encoder": 1.0,
    "step K=1": 1.35,
    "step K=2": 1.8,
    "inference": 1.0,
}
"""What the ratios of times should not exceed."""


def chosen(seeds: Sequence[int], *, quick: bool) -> tuple[ComponentTrial, ...]:
    config = replace(
        small(), data=DEMO_SOURCE, classes=CLASSES, tracking=Tracking(enabled=False)
    )
    config = replace(
        config, fit=replace(config.fit, steps=QUICK_STEPS if quick else STEPS)
    )
    return build_component_trials(config, seeds, QUICK_SCENES if quick else SCENES)


def ratio(
    one: Callable[[], object], other: Callable[[], object], seconds: float
) -> float:
    """Median of time(one) / time(other), measured in turn, in CPU time of this process,
    which a busy machine disturbs less."""
    ratios: list[float] = []
    for work in (one, other, one, other):
        work()
    end = time.monotonic() + seconds
    while time.monotonic() < end or len(ratios) < 5:
        ratios.append(_seconds(one) / _seconds(other))
    return round(median(ratios), 3)


def _seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def against_transformers(seconds: float) -> dict[str, Any]:
    """Attention and an encoder layer (forward and backward) beside Deformable DETR's of
    transformers with the same weights, in turn."""
    from transformers import DeformableDetrConfig
    from transformers.models.deformable_detr import modeling_deformable_detr as hf

    torch.manual_seed(0)
    config, shapes = CoDetr(feedforward=1024), ((32, 32), (16, 16), (8, 8), (4, 4))
    theirs_config = DeformableDetrConfig(
        d_model=256, encoder_attention_heads=8, encoder_ffn_dim=1024, num_feature_levels=4, disable_custom_kernels=True, dropout=0.0,
        activation_dropout=0.0, attention_dropout=0.0,
    )  # fmt: skip
    ours, theirs = EncoderLayer(config), hf.DeformableDetrEncoderLayer(theirs_config)
    copy_layer(ours, theirs)
    count = sum(h * w for h, w in shapes)
    tokens, positions, padding = (
        torch.randn(2, count, 256),
        torch.randn(2, count, 256),
        torch.zeros(2, count, dtype=torch.bool),
    )
    references = (
        cell_centres(shapes, torch.ones(2, 4, 2))[:, :, None]
        .expand(-1, -1, 4, -1)
        .contiguous()
    )
    levels = {
        "spatial_shapes": torch.tensor(shapes),
        "spatial_shapes_list": list(shapes),
        "level_start_index": None,
    }

    def our_attention(leaf: Tensor) -> Tensor:
        return ours.attention(leaf + positions, references, leaf, shapes, padding)  # type: ignore[no-any-return]

    def their_attention(leaf: Tensor) -> Tensor:
        found = theirs.self_attn(
            leaf,
            attention_mask=~padding,
            encoder_hidden_states=leaf,
            position_embeddings=positions,
            reference_points=references,
            **levels,
        )
        return found[0]  # type: ignore[no-any-return]

    def our_layer(leaf: Tensor) -> Tensor:
        return ours(leaf, positions, references, shapes, padding)  # type: ignore[no-any-return]

    def their_layer(leaf: Tensor) -> Tensor:
        found = theirs(
            leaf,
            attention_mask=~padding,
            spatial_position_embeddings=positions,
            reference_points=references,
            **levels,
        )
        return found if isinstance(found, Tensor) else found[0]

    result: dict[str, Any] = {}
    for name, own, other in (
        ("attention", our_attention, their_attention),
        ("encoder", our_layer, their_layer),
    ):
        difference = float((own(tokens) - other(tokens)).detach().abs().max())
        result[name] = {
            "ratio": ratio(_learning(own, tokens), _learning(other, tokens), seconds),
            "difference": difference,
        }
        if difference > 1e-5:
            raise SystemExit(f"{name}: differs from transformers by {difference}")
    return result


def copy_layer(ours: EncoderLayer, theirs: nn.Module) -> None:
    """Our weights into an encoder layer of transformers; sampling offsets made wild
    first, so that places differ between cells."""
    for layer in (ours.attention.offsets, ours.attention.weights):
        nn.init.normal_(layer.weight, std=0.02)
    copy_attention(ours.attention, theirs.self_attn)  # type: ignore[arg-type]
    parts = {
        "self_attn_layer_norm": ours.attention_norm,
        "final_layer_norm": ours.feedforward_norm,
    }
    for name, own in parts.items():
        theirs.get_submodule(name).load_state_dict(own.state_dict())
    linear = [
        m
        for name, m in theirs.named_modules()
        if isinstance(m, nn.Linear) and "self_attn" not in name
    ]
    for other, own in zip(
        linear, (ours.feedforward[0], ours.feedforward[2]), strict=True
    ):
        other.load_state_dict(own.state_dict())


def copy_attention(ours: DeformableAttention, theirs: nn.Module) -> None:
    names = {
        "sampling_offsets": "offsets",
        "attention_weights": "weights",
        "value_proj": "value",
        "output_proj": "output",
    }
    for name, own in names.items():
        theirs.get_submodule(name).load_state_dict(ours.get_submodule(own).state_dict())


def _learning(work: Callable[[Tensor], Tensor], tokens: Tensor) -> Callable[[], None]:
    def once() -> None:
        leaf = tokens.clone().requires_grad_()
        work(leaf).square().mean().backward()  # type: ignore[no-untyped-call]

    return once


def costs(seconds: float) -> dict[str, Any]:
    """A training step with one and two heads, and inference, beside those of the base:
    the tiny preset, a batch of 8 scenes."""
    base = replace(small(), classes=CLASSES)
    models = {
        name: new_co_detr(
            replace(base, co_detr=VARIANTS[arm].change(base.co_detr))
        )
        for name, arm in (
            ("base", "none"),
            ("step K=1", "both"),
            ("step K=2", "both, two heads"),
        )
    }
    images, targets = batch(base)

    def step(name: str) -> Callable[[], None]:
        model = models[name].train()
        optimizer = torch.optim.AdamW(model.parameters(), 1e-4)

        def once() -> None:
            optimizer.zero_grad()
            model.objective(
                model.base.prepare(images), targets, torch.Generator().manual_seed(0)
            ).total.backward()  # type: ignore[no-untyped-call]
            optimizer.step()

        return once

    plain = step("base")
    found: dict[str, Any] = {
        name: {"ratio": ratio(step(name), plain, seconds)}
        for name in ("step K=1", "step K=2")
    }
    prepared = models["base"].base.prepare(images)
    for model in models.values():
        model.eval()
    found["inference"] = {
        "ratio": ratio(
            lambda: models["step K=2"].predict(prepared),
            lambda: models["base"].predict(prepared),
            seconds,
        ),
        "same operations": (
            operations(models["step K=2"], prepared)
            == operations(models["base"], prepared)
        ),
    }
    return found


def operations(model: Any, images: Any) -> list[str]:
    """Names of all tensor operations of one prediction, in order."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU]
    ) as recorded:
        model.predict(images)
    return [
        event.name
        for event in recorded.events()
        if event.name.startswith(("aten::", "torchvision::"))
    ]


def batch(config: DetectorConfig) -> tuple[list[Tensor], list[Targets]]:
    artwork = Artwork.from_drawings([d for d in load_drawings() if d.known_to_cloud])
    scenes = [
        compose(artwork, "source", seed, (2, 5)) for seed in range(config.fit.batch)
    ]
    side = config.short_side
    images = [resize_to_fit(pil_to_tensor(s.image), side, config.long_side) for s in scenes]
    return images, [
        Targets(torch.from_numpy(s.boxes) * side / SIZE, torch.from_numpy(s.labels))
        for s in scenes
    ]


def markdown(rows: dict[str, dict[str, Any]], speed: dict[str, Any]) -> str:
    parts = []
    if rows:
        parts.append(components.format_component_table(rows))
    if speed:
        parts += ["| time of | ratio | at most | |", "|---|---|---|---|"]
        for name, figures in speed.items():
            rest = ", ".join(
                f"{key} {value:.1g}" if isinstance(value, float) else f"{key}: {value}"
                for key, value in figures.items()
                if key != "ratio"
            )
            parts.append(
                f"| {name} | {figures['ratio']:.2f} | {LIMITS[name]:.2f} | {rest} |"
            )
        parts.append("")
    return "\n".join(parts)


def page(
    rows: dict[str, dict[str, Any]],
    speed: dict[str, Any],
    command: str,
    seeds: Sequence[int],
) -> str:
    made = ", ".join(f"{name} {number}" for name, number in package_versions().items())
    return "\n".join(
        [
            "# Co-DETR: measured results\n",
            (
                "The tiny preset, trained on the demo's labelled source scenes, AP on"
                " held-out plain ones (docs/co-detr.md). Attention and encoder beside"
                " Deformable DETR's modules of transformers, forward and backward, the"
                " same weights; steps beside the base's.\n"
            ),
            markdown(rows, speed),
            "## How it was made\n",
            f"    {command}\n",
            (
                f"Seeds {', '.join(map(str, seeds))}; {STEPS} steps of"
                f" {small().fit.batch} images, {SCENES.train} training scenes,"
                f" {SCENES.val} held out; AP in points, mean ± sample standard"
                " deviation over seeds; times are CPU times in one thread, medians of"
                f" ratios taken in turn. {datetime.now(UTC):%Y-%m-%d}, {os.cpu_count()}"
                f" CPU cores, {platform.machine()}, {made}.\n"
            ),
        ]
    )


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--root",
        default=str(REPOSITORY / "runs" / "bench-codetr"),
        help="folder of the runs",
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--quick", action="store_true", help="does it run? The figures mean nothing"
    )
    parser.add_argument(
        "--only",
        choices=("table", "speed"),
        help="one half; nothing is written into docs/results",
    )
    asked = parser.parse_args(arguments)
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    seeds = asked.seeds[:1] if asked.quick else asked.seeds
    rows: dict[str, dict[str, Any]] = {}
    if asked.only != "speed":
        rows = components.run_component_trials(
            chosen(seeds, quick=asked.quick), storage.absolute_uri(asked.root)
        )
    seconds = 2.0 if asked.quick else 20.0
    speed = (
        {} if asked.only == "table" else against_transformers(seconds) | costs(seconds)
    )
    print(markdown(rows, speed))
    if not asked.quick and asked.only is None:
        command = (
            f'make bench-codetr ARGS="{shlex.join(arguments)}"'
            if arguments
            else "make bench-codetr"
        )
        PAGE.write_text(page(rows, speed, command, seeds))
    print(json.dumps({"table": rows, "speed": speed}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
