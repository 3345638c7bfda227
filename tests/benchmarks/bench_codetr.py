"""Measure the accuracy and the cost of Co-DETR's auxiliary heads and positive queries:
``make bench-codetr``.

    # seeds 0 1 2; writes docs/results/co-detr.md
    make bench-codetr
    # two minutes: few steps, one seed; writes nothing into docs/results
    make bench-codetr ARGS="--quick"
    # only the ratios of times; --only table: only the table
    make bench-codetr ARGS="--only speed"

The table: the tiny preset on the demo's labelled source scenes, the same number of
steps for every arm, AP50 on held-out scenes. Finished arms are kept in --root, and a
killed arm resumes from its last checkpoint with the same command. Prints the tables
and, last, one line of JSON.
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
from coin_ray.models.co_detr.targets import DetrTargets
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
"""Upper bounds of the ratios of times."""


def build_demo_trials(
    seeds: Sequence[int], *, quick: bool
) -> tuple[ComponentTrial, ...]:
    config = replace(
        small(), data=DEMO_SOURCE, classes=CLASSES, tracking=Tracking(enabled=False)
    )
    config = replace(
        config, fit=replace(config.fit, steps=QUICK_STEPS if quick else STEPS)
    )
    return build_component_trials(config, seeds, QUICK_SCENES if quick else SCENES)


def time_ratio(
    first: Callable[[], object], second: Callable[[], object], seconds: float
) -> float:
    """Return the median of time(first) / time(second), measured in turn, in CPU time of
    this process, which a busy machine disturbs less."""
    ratios: list[float] = []
    for work in (first, second, first, second):
        work()
    end = time.monotonic() + seconds
    while time.monotonic() < end or len(ratios) < 5:
        ratios.append(_seconds(first) / _seconds(second))
    return round(median(ratios), 3)


def _seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def compare_with_transformers(seconds: float) -> dict[str, Any]:
    """Time attention and an encoder layer (forward and backward) in turn with those of
    Deformable DETR in transformers, with the same weights."""
    from transformers import DeformableDetrConfig
    from transformers.models.deformable_detr import modeling_deformable_detr as hf

    torch.manual_seed(0)
    config, shapes = CoDetr(feedforward=1024), ((32, 32), (16, 16), (8, 8), (4, 4))
    transformers_config = DeformableDetrConfig(
        d_model=256,
        encoder_attention_heads=8,
        encoder_ffn_dim=1024,
        num_feature_levels=4,
        disable_custom_kernels=True,
        dropout=0.0,
        activation_dropout=0.0,
        attention_dropout=0.0,
    )
    layer = EncoderLayer(config)
    transformers_layer = hf.DeformableDetrEncoderLayer(transformers_config)
    copy_layer(layer, transformers_layer)
    count = sum(h * w for h, w in shapes)
    tokens, positions = torch.randn(2, count, 256), torch.randn(2, count, 256)
    padding = torch.zeros(2, count, dtype=torch.bool)
    centres = cell_centres(shapes, torch.ones(2, 4, 2))
    references = centres[:, :, None].expand(-1, -1, 4, -1).contiguous()
    levels = {
        "spatial_shapes": torch.tensor(shapes),
        "spatial_shapes_list": list(shapes),
        "level_start_index": None,
    }

    def attention(leaf: Tensor) -> Tensor:
        attended: Tensor = layer.attention(
            leaf + positions, references, leaf, shapes, padding
        )
        return attended

    def transformers_attention(leaf: Tensor) -> Tensor:
        layer_outputs = transformers_layer.self_attn(
            leaf,
            attention_mask=~padding,
            encoder_hidden_states=leaf,
            position_embeddings=positions,
            reference_points=references,
            **levels,
        )
        return layer_outputs[0]  # type: ignore[no-any-return]

    def encoder(leaf: Tensor) -> Tensor:
        encoded: Tensor = layer(leaf, positions, references, shapes, padding)
        return encoded

    def transformers_encoder(leaf: Tensor) -> Tensor:
        layer_outputs = transformers_layer(
            leaf,
            attention_mask=~padding,
            spatial_position_embeddings=positions,
            reference_points=references,
            **levels,
        )
        return layer_outputs if isinstance(layer_outputs, Tensor) else layer_outputs[0]

    figures: dict[str, Any] = {}
    for name, run_layer, run_transformers in (
        ("attention", attention, transformers_attention),
        ("encoder", encoder, transformers_encoder),
    ):
        difference = run_layer(tokens) - run_transformers(tokens)
        largest_difference = float(difference.detach().abs().max())
        ratio = time_ratio(
            _forward_and_backward(run_layer, tokens),
            _forward_and_backward(run_transformers, tokens),
            seconds,
        )
        figures[name] = {"ratio": ratio, "difference": largest_difference}
        if largest_difference > 1e-5:
            raise SystemExit(
                f"{name}: differs from transformers by {largest_difference}"
            )
    return figures


def copy_layer(layer: EncoderLayer, transformers_layer: nn.Module) -> None:
    """Copy the weights into an encoder layer of transformers, after drawing random sampling
    offsets so that the sampled places differ between cells."""
    for linear_layer in (layer.attention.offsets, layer.attention.weights):
        nn.init.normal_(linear_layer.weight, std=0.02)
    copy_attention(layer.attention, transformers_layer.self_attn)  # type: ignore[arg-type]
    parts = {
        "self_attn_layer_norm": layer.attention_norm,
        "final_layer_norm": layer.feedforward_norm,
    }
    for name, source in parts.items():
        transformers_layer.get_submodule(name).load_state_dict(source.state_dict())
    transformers_linear = [
        module
        for name, module in transformers_layer.named_modules()
        if isinstance(module, nn.Linear) and "self_attn" not in name
    ]
    linear = (layer.feedforward[0], layer.feedforward[2])
    for copy, original in zip(transformers_linear, linear, strict=True):
        copy.load_state_dict(original.state_dict())


def copy_attention(
    attention: DeformableAttention, transformers_attention: nn.Module
) -> None:
    names = {
        "sampling_offsets": "offsets",
        "attention_weights": "weights",
        "value_proj": "value",
        "output_proj": "output",
    }
    for name, module_name in names.items():
        weights = attention.get_submodule(module_name).state_dict()
        transformers_attention.get_submodule(name).load_state_dict(weights)


def _forward_and_backward(
    work: Callable[[Tensor], Tensor], tokens: Tensor
) -> Callable[[], None]:
    def once() -> None:
        leaf = tokens.clone().requires_grad_()
        work(leaf).square().mean().backward()  # type: ignore[no-untyped-call]

    return once


def compare_with_base(seconds: float) -> dict[str, Any]:
    """Time a training step with one and with two heads, and inference, against the base
    model: the tiny preset, a batch of 8 scenes."""
    base = replace(small(), classes=CLASSES)
    models = {
        name: new_co_detr(replace(base, co_detr=VARIANTS[arm].change(base.co_detr)))
        for name, arm in (
            ("base", "none"),
            ("step K=1", "both"),
            ("step K=2", "both, two heads"),
        )
    }
    images, targets = build_source_batch(base)

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

    base_step = step("base")
    figures: dict[str, Any] = {
        name: {"ratio": time_ratio(step(name), base_step, seconds)}
        for name in ("step K=1", "step K=2")
    }
    prepared = models["base"].base.prepare(images)
    for model in models.values():
        model.eval()
    figures["inference"] = {
        "ratio": time_ratio(
            lambda: models["step K=2"].predict(prepared),
            lambda: models["base"].predict(prepared),
            seconds,
        ),
        "same operations": (
            tensor_operations(models["step K=2"], prepared)
            == tensor_operations(models["base"], prepared)
        ),
    }
    return figures


def tensor_operations(model: Any, images: Any) -> list[str]:
    """Return the names of all tensor operations of one prediction, in order."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU]
    ) as recorded:
        model.predict(images)
    return [
        event.name
        for event in recorded.events()
        if event.name.startswith(("aten::", "torchvision::"))
    ]


def build_source_batch(
    config: DetectorConfig,
) -> tuple[list[Tensor], list[DetrTargets]]:
    artwork = Artwork.from_drawings([d for d in load_drawings() if d.known_to_cloud])
    scenes = [
        compose(artwork, "source", seed, (2, 5)) for seed in range(config.fit.batch)
    ]
    side = config.short_side
    images = [
        resize_to_fit(pil_to_tensor(s.image), side, config.long_side) for s in scenes
    ]
    return images, [
        DetrTargets(torch.from_numpy(s.boxes) * side / SIZE, torch.from_numpy(s.labels))
        for s in scenes
    ]


def format_tables(rows: dict[str, dict[str, Any]], speed: dict[str, Any]) -> str:
    parts = []
    if rows:
        parts.append(components.format_component_table(rows))
    if speed:
        parts += ["| time of | ratio | at most | |", "|---|---|---|---|"]
        for name, figures in speed.items():
            details = ", ".join(
                f"{key} {figure:.1g}"
                if isinstance(figure, float)
                else f"{key}: {figure}"
                for key, figure in figures.items()
                if key != "ratio"
            )
            parts.append(
                f"| {name} | {figures['ratio']:.2f} | {LIMITS[name]:.2f} | {details} |"
            )
        parts.append("")
    return "\n".join(parts)


def format_results_page(
    rows: dict[str, dict[str, Any]],
    speed: dict[str, Any],
    command: str,
    seeds: Sequence[int],
) -> str:
    versions = ", ".join(
        f"{name} {number}" for name, number in package_versions().items()
    )
    return "\n".join(
        [
            "# Co-DETR: measured results\n",
            (
                "The tiny preset, trained on the demo's labelled source scenes, AP on"
                " held-out plain ones (docs/co-detr.md). Attention and encoder are"
                " compared with Deformable DETR's modules in transformers, forward and"
                " backward, with the same weights; steps with the base model's.\n"
            ),
            format_tables(rows, speed),
            "## How it was made\n",
            f"    {command}\n",
            (
                f"Seeds {', '.join(map(str, seeds))}; {STEPS} steps of"
                f" {small().fit.batch} images, {SCENES.train} training scenes,"
                f" {SCENES.val} held out; AP in points, mean ± sample standard"
                " deviation over seeds; times are CPU times in one thread, medians of"
                f" ratios taken in turn. {datetime.now(UTC):%Y-%m-%d}, {os.cpu_count()}"
                f" CPU cores, {platform.machine()}, {versions}.\n"
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
        "--quick",
        action="store_true",
        help="use few steps to test that the benchmark runs; the figures mean nothing",
    )
    parser.add_argument(
        "--only",
        choices=("table", "speed"),
        help="run only this part, and write nothing into docs/results",
    )
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    seeds = options.seeds[:1] if options.quick else options.seeds
    rows: dict[str, dict[str, Any]] = {}
    if options.only != "speed":
        rows = components.run_component_trials(
            build_demo_trials(seeds, quick=options.quick),
            storage.absolute_uri(options.root),
        )
    seconds = 2.0 if options.quick else 20.0
    speed = {}
    if options.only != "table":
        speed = compare_with_transformers(seconds) | compare_with_base(seconds)
    print(format_tables(rows, speed))
    if not options.quick and options.only is None:
        command = (
            f'make bench-codetr ARGS="{shlex.join(arguments)}"'
            if arguments
            else "make bench-codetr"
        )
        PAGE.write_text(format_results_page(rows, speed, command, seeds))
    print(json.dumps({"table": rows, "speed": speed}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
