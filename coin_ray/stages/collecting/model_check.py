"""Whether later steps will find their models: before a call is paid.

Run as a module, reads a config from the standard input, pickled, and writes the error, or
None, to the standard output.
"""

from __future__ import annotations

import pickle
import subprocess
import sys
from contextlib import redirect_stdout

from coin_ray.config import PipelineConfig
from coin_ray.errors import CoinError, StepError


def check_models(config: PipelineConfig, cache: str) -> None:
    """Load the detectors' backbone and first weights, and the labeler with a name or
    text for every class, whose embeddings go to the folder ``cache``. Raises InputError
    or ConfigError.

    A collection without a labeler needs no torch. So that it does not keep half a
    gigabyte of libraries, the models are then loaded in a process that ends.
    """
    if config.collect.labeler == "none":
        _load_backbone_elsewhere(config)
        return
    from coin_ray.stages.collecting.labelers import create_labeler

    _load_backbone(config)
    create_labeler(config, cache)


def _load_backbone(config: PipelineConfig) -> None:
    if not config.has_backbone:
        return
    from coin_ray.models.faster_rcnn_clip.backbone import load_backbone

    backbone = load_backbone(config)
    if config.detector.weights:
        from coin_ray.stages.common.students import new_clip_detector

        new_clip_detector(backbone, config, seed=config.seed)


def _load_backbone_elsewhere(config: PipelineConfig) -> None:
    """Load the backbone in a process of its own, and raise its error here."""
    if not config.has_backbone:
        return
    check = subprocess.run(
        [sys.executable, "-m", "coin_ray.stages.collecting.model_check"],
        input=pickle.dumps(config),
        stdout=subprocess.PIPE,
        check=False,
    )
    if check.returncode:
        raise StepError(
            "the process that loads the backbone, to see whether it can be loaded,"
            f" ended with exit code {check.returncode}; what it wrote is above"
        )
    error: CoinError | None = pickle.loads(check.stdout)
    if error is not None:
        raise error


def _main() -> None:
    config: PipelineConfig = pickle.load(sys.stdin.buffer)
    caught: CoinError | None = None
    with redirect_stdout(sys.stderr):
        try:
            _load_backbone(config)
        except CoinError as error:
            caught = error
    sys.stdout.buffer.write(pickle.dumps(caught))


if __name__ == "__main__":
    _main()
