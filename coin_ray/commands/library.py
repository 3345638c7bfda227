"""The pipeline for programs and notebooks: the same presets, settings, steps and
folders as on the command line.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from coin_ray import storage
from coin_ray.commands.arguments import check_config, parse_cloud
from coin_ray.config import Folder, PipelineConfig
from coin_ray.config.presets import PRESETS
from coin_ray.config.yaml_files import (
    is_class_file,
    parse_config,
    with_class_file,
    with_classes,
)
from coin_ray.errors import ConfigError, StepError
from coin_ray.runs.graph import build_steps

if TYPE_CHECKING:
    from coin_ray.predictors.student import StudentPredictor

Classes = Sequence[str] | Mapping[str, Any]
"""Names of classes, or how each is asked for by its name."""
EXPORTED_FILES = ("model.safetensors", "model.json")


@dataclass(frozen=True)
class Adaptation:
    """A finished run. ``summary``: the contents of ROOT/summary.json, ``map50`` among
    them; the same call returns at once.
    """

    config: PipelineConfig
    root: str
    summary: Mapping[str, Any]

    @cached_property
    def student(self) -> StudentPredictor:
        """The adapted detector: called with a PIL image it returns ``Detections`` in
        that image's pixels.
        """
        from coin_ray.predictors.student import StudentPredictor, load_exported_student

        student = load_exported_student(self._finished_folder("export"))
        assert isinstance(student, StudentPredictor)  # a pipeline's student
        return student

    def report(self) -> str:
        """Return the URI of the page with figures, curves and pictures."""
        return storage.join(self._finished_folder("report"), "report.html")

    def export(self, folder: str | os.PathLike[str] | None = None) -> str:
        """Return the folder of the student's two files; with ``folder`` they are copied
        there. ``coin_ray.predictors.student.load_exported_student`` reads them.
        """
        source = self._finished_folder("export")
        if folder is None:
            return source
        target = storage.absolute_uri(os.fspath(folder))
        for name in EXPORTED_FILES:
            content = storage.read_bytes(storage.join(source, name))
            storage.write_bytes(storage.join(target, name), content)
        return target

    def _finished_folder(self, name: str) -> str:
        step = build_steps(self.config)[name]
        if not step.is_finished(self.root):
            raise StepError(
                f"step {name} is not finished below {self.root}: call adapt again with"
                f" until=None or until={name!r}"
            )
        return step.folder(self.root)


def adapt(
    images: str | os.PathLike[str] | None = None,
    classes: Classes = (),
    cloud: str = "",
    *,
    test: str | os.PathLike[str] | None = None,
    root: str | os.PathLike[str] | None = None,
    preset: str = "folder",
    settings: Mapping[str, Any] | None = None,
    until: str | None = None,
) -> Adaptation:
    """Adapt the detector behind ``cloud`` (an address, or a service of docs/cloud.md)
    to a folder of images.

    ``classes``: names, a mapping of them to phrases and negatives, or the YAML file that
    holds such a mapping (docs/classes.md). ``test``: labelled images to evaluate on.
    ``root``: folder or URI of everything written (default: runs/PRESET). ``settings``:
    any others by dotted name, as ``{"cloud.max_usd": 20}``. ``until``: the last step to
    run. Raise a
    ``coin_ray.errors.CoinError`` that says what to change; the same call resumes a
    killed run.
    """
    from coin_ray.runs.runner import run_pipeline

    config = build_config(images, classes, cloud, test, preset, settings or {})
    run_root, steps = _run_root(root, config), build_steps(config)
    if until is not None and until not in steps:
        raise ConfigError(f"until must be one of {', '.join(steps)}; got {until!r}")
    summary = run_pipeline(config, steps, run_root, until)
    return Adaptation(config, run_root, summary.to_json())


def plan(
    images: str | os.PathLike[str] | None = None,
    classes: Classes = (),
    cloud: str = "",
    *,
    test: str | os.PathLike[str] | None = None,
    root: str | os.PathLike[str] | None = None,
    preset: str = "folder",
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Print the steps, calls and cost of ``adapt`` with the same arguments. Makes no
    call.
    """
    from coin_ray.runs.runner import print_plan

    config = build_config(images, classes, cloud, test, preset, settings or {})
    print_plan(config, build_steps(config), _run_root(root, config))


def build_config(
    images: str | os.PathLike[str] | None,
    classes: Classes,
    cloud: str,
    test: str | os.PathLike[str] | None,
    preset: str,
    settings: Mapping[str, Any],
) -> PipelineConfig:
    """Return the preset with these settings. Raise ConfigError."""
    if preset not in PRESETS:
        raise ConfigError(f"no preset {preset!r}; the presets are {', '.join(PRESETS)}")
    is_file = isinstance(classes, str) and is_class_file(classes)
    if isinstance(classes, str) and not is_file:
        names = [name.strip() for name in classes.split(",")]
        raise ConfigError(f"classes must be a list of names, as {names}; got one text")
    config = PRESETS[preset]()
    folder = config.data if isinstance(config.data, Folder) else Folder()
    if images is not None:
        folder = replace(folder, images=storage.absolute_uri(os.fspath(images)))
    if test is not None:
        folder = replace(folder, test=storage.absolute_uri(os.fspath(test)))
    if images is not None or test is not None:
        config = replace(config, data=folder)
    if isinstance(classes, str):
        config = with_class_file(config, classes)
    elif isinstance(classes, Mapping):
        config = with_classes(config, classes, "classes")
    elif classes:
        config = replace(config, classes=tuple(classes))
    if cloud:
        config = replace(config, cloud=parse_cloud(cloud))
    config = replace_settings(config, settings)
    check_config(config)
    return config


def replace_settings(
    config: PipelineConfig, settings: Mapping[str, Any]
) -> PipelineConfig:
    """Return the config with settings replaced by dotted name. Raise ConfigError for a
    name or a value that can't be.
    """
    if not settings:
        return config
    fields = json.loads(json.dumps(dataclasses.asdict(config)))
    for name, setting in settings.items():
        *path, field_name = name.replace("-", "_").split(".")
        section = fields
        for section_name in path:
            section = section.get(section_name) if isinstance(section, dict) else None
        if not isinstance(section, dict) or field_name not in section:
            all_names = list(_setting_names(fields))
            similar = difflib.get_close_matches(name, all_names, n=3, cutoff=0.3)
            raise ConfigError(
                f"no setting {name!r}; close to it: {', '.join(similar)}. All: coin-ray"
                f" adapt {config.preset} --settings"
            )
        is_sequence = isinstance(setting, (tuple, set))
        section[field_name] = list(setting) if is_sequence else setting
    return parse_config(fields, "settings")


def _setting_names(fields: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield the dotted names of all settings."""
    for name, setting in fields.items():
        if isinstance(setting, dict):
            yield from _setting_names(setting, f"{prefix}{name}.")
        else:
            yield prefix + name


def _run_root(root: str | os.PathLike[str] | None, config: PipelineConfig) -> str:
    if root is None:
        root = storage.join("runs", config.preset)
    return storage.absolute_uri(os.fspath(root))
