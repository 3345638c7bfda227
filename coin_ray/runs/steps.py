"""Steps: a name, inputs, and a folder whose manifest, written last, marks it finished.

The work of a step is the function ``run(context) -> metrics`` of a module in
``coin_ray.stages``. A step's fingerprint is a hash of its name, version, identity,
options and inputs; workers, rates and GPUs are not part of it.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Generic, TypeVar

from coin_ray import storage
from coin_ray.config import PACKAGE, PipelineConfig, relocate_paths
from coin_ray.config.fingerprints import fingerprint, to_identity
from coin_ray.errors import StepError

ConfigT = TypeVar("ConfigT")

Metrics = dict[str, Any]
"""What a stage measured: JSON values by name, recorded in its step's manifest."""

MANIFEST_FILE = "manifest.json"
REOPENED_FILE = "reopened.json"
"""The former manifest of a step that was finished and is run again."""
INPUTS_FILE = "inputs.json"
"""Fingerprints of the inputs by name, written when a step begins."""


@dataclass(frozen=True)
class Manifest:
    """The record of a finished step: ``manifest.json`` in its folder."""

    step: str = ""
    fingerprint: str = ""
    inputs: Mapping[str, str] = field(default_factory=dict)
    """Fingerprints of the step's inputs by name."""
    identity: Any = None
    metrics: Metrics = field(default_factory=dict)
    started: float = 0.0
    """Unix time."""
    seconds: float = 0.0

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Manifest:
        """Read the contents of a ``manifest.json``; unknown keys are ignored."""
        names = [f.name for f in fields(cls) if f.name in values]
        return cls(**{name: values[name] for name in names})

    def to_json(self) -> dict[str, Any]:
        """Return the contents of ``manifest.json``."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


def read_manifest(folder: str) -> Manifest:
    """Read the manifest in the folder of a finished step."""
    return Manifest.from_json(storage.read_json(storage.join(folder, MANIFEST_FILE)))


@dataclass(frozen=True)
class Step:
    """One part of a run: its results lie in a folder named by its fingerprint."""

    name: str
    stage: str
    """Module in ``coin_ray.stages`` that does the work."""
    identity: Any
    """Configs and values that the results depend on."""
    inputs: tuple[Step, ...] = ()
    version: int = 1
    options: Mapping[str, Any] = field(default_factory=dict)
    """Options that tell apart steps of the same stage; part of the fingerprint."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the step with the path of this installation of the package.

        Another process, maybe on another machine, then finds the package's files where
        its own installation has them.
        """
        return _unpickle_step, (
            PACKAGE,
            {f.name: getattr(self, f.name) for f in fields(self)},
        )

    @property
    def fingerprint(self) -> str:
        """Return twelve hex digits that identify the step's results."""
        upstream = [step.fingerprint for step in self.inputs]
        return fingerprint(
            [self.name, self.version, self.identity, dict(self.options), upstream]
        )

    def folder(self, root: str) -> str:
        """Return the folder of the step's results below ``root``."""
        return storage.join(root, "steps", f"{self.name}-{self.fingerprint}")

    def is_finished(self, root: str) -> bool:
        """Return whether the step has a manifest below ``root``."""
        return storage.exists(storage.join(self.folder(root), MANIFEST_FILE))

    def read_manifest(self, root: str) -> Manifest | None:
        """Read the step's manifest; None if the step is not finished."""
        return read_manifest(self.folder(root)) if self.is_finished(root) else None


def _unpickle_step(package: str, fields_by_name: Mapping[str, Any]) -> Step:
    local_identity = relocate_paths(fields_by_name["identity"], package, PACKAGE)
    return Step(**{**fields_by_name, "identity": local_identity})


@dataclass(frozen=True)
class Context(Generic[ConfigT]):
    """Arguments of a stage: its config, its folder and the folders of its inputs."""

    config: ConfigT
    root: str
    """Folder or URI of the whole run."""
    folder: str
    """Folder of the step's results."""
    inputs: Mapping[str, str]
    """Folders of the finished inputs by step name."""
    options: Mapping[str, Any]
    name: str
    """Name of the step."""


Stage = Callable[[Context[Any]], Metrics]
"""The work of a step."""


def make_context(step: Step, config: ConfigT, root: str) -> Context[ConfigT]:
    """Return the arguments of a step's stage."""
    if isinstance(config, PipelineConfig):
        storage.set_patience(config.storage.patience)
    input_folders = {upstream.name: upstream.folder(root) for upstream in step.inputs}
    if "images" in input_folders:
        config = with_found_range(config, input_folders["images"])
    return Context(
        config, root, step.folder(root), input_folders, step.options, step.name
    )


def with_found_range(config: ConfigT, images_folder: str) -> ConfigT:
    """Return the config with the intensity range that the finished images step in this
    folder has found: every stage that reads images sees the same pixels.
    """
    if not storage.exists(storage.join(images_folder, MANIFEST_FILE)):
        return config
    intensity = read_manifest(images_folder).metrics.get("intensity") or {}
    found = intensity.get("range")
    if found is None or not hasattr(config, "with_intensity_range"):
        return config
    low, high = found
    resolved: ConfigT = config.with_intensity_range((low, high))
    return resolved


def run_step(
    step: Step, config: object, root: str, work: Stage | None = None
) -> Manifest:
    """Run one step and write its manifest, which is returned as it is on record.

    ``work`` replaces the stage's own ``run``. Raises StepError if an input is not
    finished.
    """
    unfinished = [s.name for s in step.inputs if not s.is_finished(root)]
    if unfinished:
        raise StepError(
            f"step {step.name} needs finished {', '.join(unfinished)} below {root}; run"
            f" coin-ray adapt with the same settings and --until {unfinished[-1]} first"
        )
    if work is None:
        work = importlib.import_module(f"coin_ray.stages.{step.stage}").run
    assert work is not None
    folder = step.folder(root)
    storage.make_folder(folder)
    inputs = {upstream.name: upstream.fingerprint for upstream in step.inputs}
    storage.write_json(storage.join(folder, INPUTS_FILE), inputs)
    started = time.time()
    metrics = work(make_context(step, config, root))
    manifest = Manifest(
        step=step.name,
        fingerprint=step.fingerprint,
        inputs=inputs,
        identity=to_identity(step.identity),
        metrics=metrics,
        started=started,
        seconds=round(time.time() - started, 3),
    )
    storage.write_json(storage.join(folder, MANIFEST_FILE), manifest.to_json())
    storage.remove(storage.join(folder, REOPENED_FILE))
    # as a later run reads it: metrics in the same order, printed alike
    return read_manifest(folder)


def reopen_step(folder: str, manifest: Manifest) -> None:
    """Make a finished step unfinished, so that it is run again; its files stay.

    ``manifest`` is kept as the former one, which ``read_reopened`` returns until the
    step is finished again.
    """
    storage.write_json(storage.join(folder, REOPENED_FILE), manifest.to_json())
    storage.remove(storage.join(folder, MANIFEST_FILE))


def restore_step(folder: str) -> None:
    """Make a reopened step finished as it was before; without effect on others."""
    manifest = read_reopened(folder)
    if manifest is None:
        return
    if not storage.exists(storage.join(folder, MANIFEST_FILE)):
        storage.write_json(storage.join(folder, MANIFEST_FILE), manifest.to_json())
    storage.remove(storage.join(folder, REOPENED_FILE))


def read_reopened(folder: str) -> Manifest | None:
    """Return the former manifest of a reopened step; None of any other step."""
    uri = storage.join(folder, REOPENED_FILE)
    return Manifest.from_json(storage.read_json(uri)) if storage.exists(uri) else None


def remove_readers(root: str, folder: str, keep: Sequence[str] = ()) -> list[str]:
    """Remove the results of all steps below ``root`` that were made, or begun, from the
    results in a step's folder, directly or through other steps, whichever run made
    them. Return their names, sorted.

    ``keep``: names of folders inside a step's folder that stay.
    """
    inputs_by_folder = {
        other: _read_inputs(other)
        for other in storage.list_folders(storage.join(root, "steps"))
    }
    readers: list[str] = []
    pending = [folder.rstrip("/").rpartition("/")[2]]
    while pending:
        source = pending.pop()
        for other, inputs in inputs_by_folder.items():
            if source in inputs and other not in readers:
                readers.append(other)
                pending.append(other.rpartition("/")[2])
    for reader in readers:
        _remove_results(reader, keep)
    return sorted({reader.rpartition("/")[2].rpartition("-")[0] for reader in readers})


def _read_inputs(folder: str) -> set[str]:
    """Return the names of the folders of a step's inputs; none if it never began."""
    for name in (MANIFEST_FILE, INPUTS_FILE):
        uri = storage.join(folder, name)
        if storage.exists(uri):
            record = storage.read_json(uri)
            inputs = record["inputs"] if name == MANIFEST_FILE else record
            return {f"{name}-{fingerprint}" for name, fingerprint in inputs.items()}
    return set()


def _remove_results(folder: str, keep: Sequence[str]) -> None:
    """Remove all files of a step but those in the folders ``keep``, last those that name
    its inputs: if this process is killed before, the next one finds the step again.
    """
    named_last = [storage.join(folder, name) for name in (MANIFEST_FILE, INPUTS_FILE)]
    kept_folders = tuple(f"{storage.join(folder, name)}/" for name in keep)
    for uri in storage.list_files(folder):
        if uri not in named_last and not uri.startswith(kept_folders):
            storage.remove(uri)
    for uri in named_last:
        storage.remove(uri)


def finished_manifests(steps: Iterable[Step], root: str) -> dict[str, Manifest]:
    """Return the manifests of those steps that are finished, by step name."""
    manifests = {step.name: step.read_manifest(root) for step in steps}
    return {name: manifest for name, manifest in manifests.items() if manifest}
