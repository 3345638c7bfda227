"""Steps: a name, what it depends on, and a folder whose manifest, written last, says
that it is finished.

A step is the module of its stage in ``coin_ray.stages`` with a function ``run(context)
-> metrics``. Its fingerprint is a hash of its name, version, identity and inputs;
workers, rates and GPUs are no part of it.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from coin_ray import storage
from coin_ray.config import PACKAGE, PipelineConfig, relocate_paths
from coin_ray.config.files import fingerprint, identity
from coin_ray.errors import StepError


@dataclass(frozen=True)
class Step:
    name: str
    stage: str
    """Module in ``coin_ray.stages``."""
    identity: Any
    """Configs and values that decide what comes out."""
    inputs: tuple[Step, ...] = ()
    version: int = 1
    options: Mapping[str, Any] = field(default_factory=dict)
    """What distinguishes steps that share a stage; part of the identity."""

    def __reduce__(self) -> tuple[Any, ...]:
        """In another process, maybe on another machine, files of the package lie where
        it is installed there.
        """
        return _arrived, (
            PACKAGE,
            {f.name: getattr(self, f.name) for f in fields(self)},
        )

    @property
    def fingerprint(self) -> str:
        return fingerprint(
            [
                self.name,
                self.version,
                self.identity,
                dict(self.options),
                [i.fingerprint for i in self.inputs],
            ]
        )

    def folder(self, root: str) -> str:
        return storage.join(root, "steps", f"{self.name}-{self.fingerprint}")

    def manifest(self, root: str) -> dict[str, Any] | None:
        """What the finished step recorded, or None."""
        path = storage.join(self.folder(root), "manifest.json")
        return storage.read_json(path) if storage.exists(path) else None


def _arrived(package: str, values: dict[str, Any]) -> Step:
    return Step(
        **(values | {"identity": relocate_paths(values["identity"], package, PACKAGE)})
    )


@dataclass(frozen=True)
class Context:
    """What a stage gets: its config, its own folder, the folders of its inputs by name,
    and the root of the run.
    """

    config: PipelineConfig
    root: str
    folder: str
    inputs: Mapping[str, str]
    options: Mapping[str, Any]
    name: str


def context_of(step: Step, config: PipelineConfig, root: str) -> Context:
    inputs = {i.name: i.folder(root) for i in step.inputs}
    return Context(config, root, step.folder(root), inputs, step.options, step.name)


def execute(
    step: Step,
    config: PipelineConfig,
    root: str,
    work: Callable[[Context], dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Run one step whose inputs are finished; returns its manifest. Raises StepError if
    an input is not finished.

    ``work`` stands for the stage's own ``run``: a search looks at what is trained on
    the way.
    """
    missing = [i.name for i in step.inputs if i.manifest(root) is None]
    if missing:
        raise StepError(
            f"{step.name} needs finished {', '.join(missing)} below {root}; run pipelines/full.py, or pipelines/{missing[0]}.py first"
        )
    work = work or importlib.import_module(f"coin_ray.stages.{step.stage}").run
    storage.make_folder(step.folder(root))
    start = time.time()
    metrics = work(context_of(step, config, root))
    manifest = {
        "step": step.name,
        "fingerprint": step.fingerprint,
        "inputs": {i.name: i.fingerprint for i in step.inputs},
        "identity": identity(step.identity),
        "metrics": metrics,
        "started": start,
        "seconds": round(time.time() - start, 3),
    }
    storage.write_json(storage.join(step.folder(root), "manifest.json"), manifest)
    return manifest


def finished(steps: Sequence[Step], root: str) -> dict[str, dict[str, Any]]:
    """Manifests of the steps that are finished, by name."""
    found = {step.name: step.manifest(root) for step in steps}
    return {name: manifest for name, manifest in found.items() if manifest is not None}
