"""The pipeline for programs and notebooks: the same presets, settings, steps and
folders as on the command line.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from coin_ray import storage
from coin_ray.commands.arguments import check, named_cloud
from coin_ray.config import Folder, PipelineConfig
from coin_ray.config.files import from_dict
from coin_ray.config.presets import PRESETS
from coin_ray.errors import ConfigError, StepError
from coin_ray.runs.graph import graph

if TYPE_CHECKING:
    from coin_ray.predictors.student import Predictor

EXPORT = ("model.safetensors", "model.json")


@dataclass(frozen=True)
class Adaptation:
    """A finished run. ``summary``: the contents of ROOT/summary.json, ``map50`` among
    them; the same call returns at once.
    """

    config: PipelineConfig
    root: str
    summary: Mapping[str, Any]

    @cached_property
    def student(self) -> Predictor:
        """The adapted detector: called with a PIL image it returns ``Detections`` in
        that image's pixels.
        """
        from coin_ray.predictors.student import Predictor, load_exported

        found = load_exported(self._finished("export"))
        assert isinstance(found, Predictor)  # a pipeline's student
        return found

    def report(self) -> str:
        """Where the page with figures, curves and pictures is."""
        return storage.join(self._finished("report"), "report.html")

    def export(self, folder: str | os.PathLike[str] | None = None) -> str:
        """Where the student's two files are; with ``folder`` they are copied there.
        ``serving.exported.load_exported`` reads them.
        """
        place = self._finished("export")
        if folder is None:
            return place
        target = storage.absolute(os.fspath(folder))
        for name in EXPORT:
            storage.write_bytes(
                storage.join(target, name),
                storage.read_bytes(storage.join(place, name)),
            )
        return target

    def _finished(self, name: str) -> str:
        step = graph(self.config)[name]
        if step.manifest(self.root) is None:
            raise StepError(
                f"{name} has not been made below {self.root}: call adapt again with"
                f" until=None or until={name!r}"
            )
        return step.folder(self.root)


def adapt(
    images: str | os.PathLike[str] | None = None,
    classes: Sequence[str] = (),
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

    ``test``: labelled images to measure on. ``root``: folder or URI of everything
    written (default: runs/PRESET). ``settings``: any others by dotted name, as
    ``{"cloud.max_usd": 20}``. ``until``: the last step to run. Raises a
    ``coin_ray.errors.CoinError`` that says what to change; a killed run goes on by the
    same call.
    """
    from coin_ray.runs import runner

    config = configured(images, classes, cloud, test, preset, settings or {})
    place, steps = _root(root, config), graph(config)
    if until is not None and until not in steps:
        raise ConfigError(f"until must be one of {', '.join(steps)}; got {until!r}")
    return Adaptation(config, place, runner.run(config, steps, place, until))


def plan(
    images: str | os.PathLike[str] | None = None,
    classes: Sequence[str] = (),
    cloud: str = "",
    *,
    test: str | os.PathLike[str] | None = None,
    root: str | os.PathLike[str] | None = None,
    preset: str = "folder",
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Print what ``adapt`` with the same arguments would do, ask and pay. Asks nothing."""
    from coin_ray.runs import runner

    config = configured(images, classes, cloud, test, preset, settings or {})
    runner.plan(config, graph(config), _root(root, config))


def configured(
    images: str | os.PathLike[str] | None,
    classes: Sequence[str],
    cloud: str,
    test: str | os.PathLike[str] | None,
    preset: str,
    settings: Mapping[str, Any],
) -> PipelineConfig:
    """The preset with what was given. Raises ConfigError."""
    if preset not in PRESETS:
        raise ConfigError(f"no preset {preset!r}; the presets are {', '.join(PRESETS)}")
    if isinstance(classes, str):
        raise ConfigError(
            "classes must be a list of names, as"
            f" {[c.strip() for c in classes.split(',')]}; got one text"
        )
    config = PRESETS[preset]()
    if images is not None or test is not None:
        given: dict[str, Any] = {
            name: storage.absolute(os.fspath(v))
            for name, v in (("images", images), ("test", test))
            if v is not None
        }
        config = replace(
            config,
            data=replace(
                config.data if isinstance(config.data, Folder) else Folder(), **given
            ),
        )
    if classes:
        config = replace(config, classes=tuple(classes))
    if cloud:
        config = replace(config, cloud=named_cloud(cloud))
    config = with_settings(config, settings)
    check(config)
    return config


def with_settings(
    config: PipelineConfig, settings: Mapping[str, Any]
) -> PipelineConfig:
    """The config with values replaced by dotted name. Raises ConfigError for a name or
    a value that can't be.
    """
    values = json.loads(json.dumps(dataclasses.asdict(config)))
    for name, value in settings.items():
        *path, last = name.replace("-", "_").split(".")
        inner = values
        for part in path:
            inner = inner.get(part) if isinstance(inner, dict) else None
        if not isinstance(inner, dict) or last not in inner:
            near = difflib.get_close_matches(
                name, list(_names(values)), n=3, cutoff=0.3
            )
            raise ConfigError(
                f"no setting {name!r}; close to it: {', '.join(near)}. All: python"
                f" pipelines/full.py {config.preset} --settings"
            )
        inner[last] = list(value) if isinstance(value, (tuple, set)) else value
    return from_dict(values, "settings") if settings else config


def _names(values: Mapping[str, Any], before: str = "") -> list[str]:
    found = []
    for name, value in values.items():
        found += (
            _names(value, f"{before}{name}.")
            if isinstance(value, dict)
            else [before + name]
        )
    return found


def _root(root: str | os.PathLike[str] | None, config: PipelineConfig) -> str:
    return storage.absolute(
        os.fspath(root) if root is not None else storage.join("runs", config.preset)
    )
