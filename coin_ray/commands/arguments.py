"""The command line: ``SCRIPT PRESET [settings by dotted name]``, and where to put
things.

Nothing heavy is imported before the arguments are understood, so ``--help`` answers at
once.
"""

from __future__ import annotations

import argparse
import errno
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import cast, get_args

import tyro

from coin_ray.config import (
    Cloud,
    PipelineConfig,
    ServiceName,
    StudentKind,
    check_runnable,
)
from coin_ray.config.files import MOVED, from_yaml
from coin_ray.config.presets import PRESETS, thermal, with_student
from coin_ray.config.published import SETS, CloudKind, published
from coin_ray.errors import CoinError, ConfigError
from coin_ray.runs.graph import ORDER, graph
from coin_ray.storage import absolute, join

SHORT = {
    "--images": "--data.images",
    "--val": "--data.val",
    "--test": "--data.test",
    "--labeler": "--collect.labeler",
}
"""Short names of the settings a first-time user needs, beside ``--cloud``."""
MOVED_OPTIONS = {
    f"--{old}".replace("_", "-"): f"--{new}".replace("_", "-")
    for old, new in MOVED.items()
}


@dataclass(frozen=True)
class Options:
    """How to run, beside the preset's settings."""

    root: str
    until: str | None
    dry_run: bool
    baselines: bool


def main(script: str, description: str, *, only: str | None = None) -> int:
    """Run the pipeline, or ``only`` one of its steps and what it needs; returns the
    exit code. User errors are one message, no traceback.
    """

    def work() -> None:
        config, options = parse(sys.argv[1:], script, description)
        _run(config, options, only)

    return reported(work)


def reported(
    work: Callable[[], None], again: str = "the same command goes on from here"
) -> int:
    """Do ``work``; returns the exit code, 0 if it raised nothing. What a user can
    change is told in one message; ``again``: how to go on.
    """
    try:
        work()
    except CoinError as error:
        print(f"\n{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        print(
            f"\nno space left on the device: {error.filename or 'the root of the run'}."
            f" Free some; {again}",
            file=sys.stderr,
        )
        return 3
    except KeyboardInterrupt:
        print(f"\nstopped; {again}", file=sys.stderr)
        return 130
    return 0


def _run(config: PipelineConfig, options: Options, only: str | None) -> None:
    from coin_ray.runs import runner

    steps = graph(config, baselines=options.baselines)
    until = only or options.until
    if until is not None and until not in steps:
        raise ConfigError(
            f"step {until} is part of the run only with"
            f" --{'corrections' if until == 'corrections' else 'baselines'}"
        )
    if options.dry_run:
        runner.plan(config, steps, options.root, until)
    else:
        runner.run(config, steps, options.root, until)


def parse(
    arguments: Sequence[str], script: str = "full.py", description: str = ""
) -> tuple[PipelineConfig, Options]:
    """The config and the options of a command line. Raises ConfigError with what to
    change.
    """
    parser = argparse.ArgumentParser(
        prog=script,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "preset",
        choices=sorted(PRESETS),
        nargs="?",
        help="; ".join(f"{n}: {_first_line(n)}" for n in PRESETS),
    )
    parser.add_argument(
        "--root",
        help="folder or URI of everything the run writes (default: runs/PRESET)",
    )
    parser.add_argument("--until", choices=ORDER, help="stop after this step")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the steps, calls, cost and time, and stop",
    )
    parser.add_argument(
        "--baselines",
        action="store_true",
        help=(
            "also train the student on plain cloud labels and on the truth (the oracle)"
        ),
    )
    parser.add_argument(
        "--config",
        help=(
            "YAML file with a whole config (ROOT/config.yaml of another run) instead of"
            " a preset"
        ),
    )
    parser.epilog = (
        "All settings of a preset: PRESET --settings. Most used: --images DIR --classes"
        " a,b --cloud URL|SERVICE --labeler none --seed N. Several clouds: --cloud A"
        " --more-clouds B,C --ensemble.mode fuse|failover|cascade; settings of B are"
        " --more-clouds.0.NAME"
    )
    parser.add_argument(
        "--assets", help="thermal: folder with data/thermal, models and clip_text"
    )
    parser.add_argument(
        "--published-cloud",
        choices=get_args(CloudKind),
        help=f"{', '.join(SETS)}: the kind of cloud (default: gdino)",
    )
    parser.add_argument(
        "--student",
        choices=get_args(StudentKind),
        help="network of the student (default: faster-rcnn), trained as it needs",
    )
    parser.add_argument(
        "--settings", action="store_true", help="list all settings of the preset"
    )
    known, rest = parser.parse_known_args(list(arguments))
    if known.config is not None:
        if rest or known.preset or known.published_cloud or known.student:
            given = [
                known.preset,
                known.published_cloud and "--published-cloud",
                known.student and "--student",
                *rest,
            ]
            raise ConfigError(
                "--config holds the whole configuration; remove"
                f" {' '.join(g for g in given if g)}"
            )
        config = from_yaml(known.config)
    elif known.preset is None:
        parser.error(
            f"name a preset ({', '.join(sorted(PRESETS))}) or give --config FILE"
        )
    else:
        preset = _preset(known.preset, known.assets, known.published_cloud)
        preset = with_student(preset, known.student) if known.student else preset
        config = _settings(preset, ["--help"] if known.settings else rest)
    check(config)
    root = absolute(known.root or join("runs", config.preset))
    return config, Options(root, known.until, known.dry_run, known.baselines)


def _preset(name: str, assets: str | None, cloud: CloudKind | None) -> PipelineConfig:
    if cloud is not None:
        if name not in SETS:
            raise ConfigError(
                f"--published-cloud chooses between settings of the paper; {name} has"
                f" none. It is for {', '.join(SETS)}"
            )
        return published(name, cloud)
    if (name == "thermal") != (assets is not None):
        raise ConfigError(
            "thermal reads images, detectors and text embeddings from one folder, and"
            " only thermal does: thermal --assets DIR"
        )
    return PRESETS[name]() if assets is None else thermal(absolute(assets))


def _settings(preset: PipelineConfig, arguments: Sequence[str]) -> PipelineConfig:
    arguments, more_clouds = _more_clouds(arguments)
    preset = replace(preset, more_clouds=more_clouds or preset.more_clouds)
    expanded = [
        _long_name(argument) for argument in _name_cloud(split_classes(arguments))
    ]
    return tyro.cli(
        PipelineConfig,
        prog=preset.preset,
        default=preset,
        args=expanded,
        config=(tyro.conf.AvoidSubcommands,),
        add_help=True,
    )


def _long_name(argument: str) -> str:
    name, equals, value = argument.partition("=")
    return (SHORT | MOVED_OPTIONS).get(name, name) + equals + value


def check(config: PipelineConfig) -> None:
    """Whether a run can begin. Raises ConfigError with the option to give."""
    from coin_ray.cloud.services import check_clouds

    check_runnable(config)
    check_clouds(config.clouds, config.classes)


def _more_clouds(arguments: Sequence[str]) -> tuple[list[str], tuple[Cloud, ...]]:
    """``--more-clouds X,Y`` (or X Y) taken out of the arguments; their other settings
    go by number: ``--more-clouds.0.max-usd 5``.
    """
    rest: list[str] = []
    clouds: list[Cloud] = []
    taking = False
    for argument in arguments:
        name, _, value = argument.partition("=")
        if name == "--more-clouds":
            taking, argument = True, value
        elif argument.startswith("--"):
            taking = False
        if taking:
            clouds += [named_cloud(value) for value in _names(argument)]
        else:
            rest.append(argument)
    return rest, tuple(clouds)


def named_cloud(value: str) -> Cloud:
    """A service by its name, or an address. Raises ConfigError with the names."""
    return (
        Cloud(url=value)
        if _cloud_setting(value) == "--cloud.url"
        else Cloud(service=cast("Service", value))
    )


def _name_cloud(arguments: Sequence[str]) -> list[str]:
    """``--cloud X``: an address if it holds ://, else the name of a service."""
    named: list[str] = []
    for argument, following in zip(arguments, [*arguments, ""][1:], strict=True):
        if argument.startswith("--cloud="):
            value = argument.removeprefix("--cloud=")
            named.append(f"{_cloud_setting(value)}={value}")
        else:
            named.append(
                _cloud_setting(following) if argument == "--cloud" else argument
            )
    return named


def _cloud_setting(value: str) -> str:
    if "://" in value:
        return "--cloud.url"
    if value in get_args(ServiceName):
        return "--cloud.service"
    raise ConfigError(
        f"the cloud {value!r} is neither an address like https://detector.example.com"
        f" nor a service; the services are {', '.join(get_args(ServiceName))}"
    )


def split_classes(arguments: Sequence[str]) -> list[str]:
    """``--classes a,b`` as ``--classes a b``; names may hold spaces."""
    spread: list[str] = []
    for before, argument in zip(["", *arguments], arguments, strict=False):
        if argument.startswith("--classes="):
            spread += ["--classes", *_names(argument.removeprefix("--classes="))]
        elif before == "--classes":
            spread += _names(argument)
        else:
            spread.append(argument)
    return spread


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _first_line(preset: str) -> str:
    first_paragraph = (PRESETS[preset].__doc__ or "").partition("\n\n")[0]
    return " ".join(first_paragraph.split()).rstrip(".")
