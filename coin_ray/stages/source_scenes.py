"""Labelled scenes of the demo's source domain, which its cloud was trained on: plain
scenes of the drawings that the cloud knows.
"""

from __future__ import annotations

from coin_ray.config import PipelineConfig
from coin_ray.config.detector_training import SourceScenes
from coin_ray.demo.drawings import load_drawings
from coin_ray.demo.scenes import Artwork, Scene, compose
from coin_ray.runs.steps import Context, Metrics
from coin_ray.stages.images import write_scenes

FIRST_SEEDS = {"train": 10_000_000, "val": 30_000_000, "test": 40_000_000}
"""The cloud's training counts on from the first; the target's seeds are above all."""
OBJECTS_PER_SCENE = (2, 5)


def run(context: Context[PipelineConfig]) -> Metrics:
    """Write the tables that ``coin_ray.stages.images`` writes."""
    scenes: SourceScenes = context.options["scenes"]
    drawings = [drawing for drawing in load_drawings() if drawing.known_to_cloud]
    artwork = Artwork.from_drawings(drawings)

    def compose_scene(split: str, index: int) -> Scene:
        cluttered = (
            split == "train" and index % scenes.cluttered == scenes.cluttered - 1
        )
        return compose(
            artwork,
            "target" if cluttered else "source",
            FIRST_SEEDS[split] + index,
            OBJECTS_PER_SCENE,
        )

    counts = {"train": scenes.train, "val": scenes.val, "test": scenes.test}
    return write_scenes(context.folder, compose_scene, counts)
