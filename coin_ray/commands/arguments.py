"""The arguments of a run: ``PRESET [settings by dotted name]``, and where to put things.

Nothing heavy is imported before the arguments are parsed, so ``--help`` answers at once.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import cast, get_args

from coin_ray.config import (
    Cloud,
    PipelineConfig,
    ServiceName,
    check_runnable,
)
from coin_ray.config.presets import PRESETS, thermal, with_student
from coin_ray.config.published import SETS, CloudKind, published
from coin_ray.config.students import STUDENTS
from coin_ray.config.yaml_files import (
    RENAMED_SETTINGS,
    is_class_file,
    read_config,
    with_class_file,
)
from coin_ray.errors import ConfigError
from coin_ray.runs.graph import ORDER
from coin_ray.storage import absolute_uri, join

SHORT_OPTIONS = {
    "--images": "--data.images",
    "--val": "--data.val",
    "--test": "--data.test",
    "--labeler": "--collect.labeler",
}
"""Short names of the settings a first-time user needs, beside ``--cloud``."""
LONG_OPTIONS = SHORT_OPTIONS | {
    f"--{old}".replace("_", "-"): f"--{new}".replace("_", "-")
    for old, new in RENAMED_SETTINGS.items()
}
"""Short and former names of settings, and their names in the config."""
SETTINGS_HELP = (
    "All settings of a preset: PRESET --settings. Most used: --images DIR --classes a,b"
    " --cloud URL|SERVICE --labeler none --seed N. Several clouds: --cloud A"
    " --more-clouds B,C --ensemble.mode fuse|failover|cascade; settings of B are"
    " --more-clouds.0.NAME"
)


@dataclass(frozen=True)
class RunOptions:
    """How to run, beside the preset's settings."""

    root: str
    until: str | None
    dry_run: bool
    baselines: bool


class ExtraOptions:
    """Options that a subcommand has beside those of a run, as a group of its help."""

    def __init__(self, title: str) -> None:
        self.parser = argparse.ArgumentParser(
            add_help=False, allow_abbrev=False, usage=argparse.SUPPRESS
        )
        self.group = self.parser.add_argument_group(title)

    def parse(
        self, arguments: Sequence[str], program: str, description: str
    ) -> tuple[argparse.Namespace, PipelineConfig, RunOptions]:
        """Return the extra options, the config and the options of the run. Raise
        ConfigError with what to change.
        """
        extra_options, run_arguments = self.parser.parse_known_args(list(arguments))
        config, options = parse_run_arguments(
            run_arguments, program, self.describe(description)
        )
        return extra_options, config, options

    def describe(self, description: str) -> str:
        return f"{description}\n{self.parser.format_help()}"


def parse_run_arguments(
    arguments: Sequence[str], program: str = "coin-ray adapt", description: str = ""
) -> tuple[PipelineConfig, RunOptions]:
    """Return the config and the options of a command line. Raise ConfigError with what
    to change.
    """
    parser = build_run_parser(program, description)
    options, setting_arguments = parser.parse_known_args(list(arguments))
    if options.config is not None:
        _check_config_alone(options, setting_arguments)
        config = read_config(options.config)
    elif options.preset is None:
        presets = ", ".join(sorted(PRESETS))
        parser.error(f"name a preset ({presets}) or give --config FILE")
    else:
        preset = _build_preset(options.preset, options.assets, options.published_cloud)
        if options.student:
            preset = with_student(preset, options.student)
        if options.settings:
            setting_arguments = ["--help"]
        config = _apply_settings(preset, setting_arguments, program)
    check_config(config)
    root = absolute_uri(options.root or join("runs", config.preset))
    return config, RunOptions(root, options.until, options.dry_run, options.baselines)


def build_run_parser(program: str, description: str) -> argparse.ArgumentParser:
    """Return the parser of all options that are no settings of the preset."""
    parser = argparse.ArgumentParser(
        prog=program,
        description=description,
        epilog=SETTINGS_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "preset",
        choices=sorted(PRESETS),
        nargs="?",
        help="; ".join(f"{name}: {_describe_preset(name)}" for name in PRESETS),
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
        help=(
            f"network of the student, trained as it needs: {', '.join(STUDENTS)},"
            " hf:OWNER/NAME or a transformers folder (default: faster-rcnn)"
        ),
    )
    parser.add_argument(
        "--settings", action="store_true", help="list all settings of the preset"
    )
    return parser


def check_config(config: PipelineConfig) -> None:
    """Check that a run can begin. Raise ConfigError with the option to give."""
    from coin_ray.cloud.question_client import questions_for
    from coin_ray.cloud.services import check_clouds

    check_runnable(config)
    check_clouds(config.clouds, config.classes)
    for cloud in config.clouds:
        questions_for(config, cloud)
    by_batches = [cloud.service for cloud in config.services if cloud.batch]
    if by_batches and config.more_clouds and config.ensemble.mode == "failover":
        raise ConfigError(
            f"cloud.batch of {by_batches[0]} and ensemble.mode failover exclude each"
            " other: whether a service can be reached is known at once"
        )


def parse_cloud(text: str) -> Cloud:
    """Return the cloud that an address or the name of a service means. Raise ConfigError
    with the names.
    """
    if _cloud_setting(text) == "--cloud.url":
        return Cloud(url=text)
    return Cloud(service=cast("ServiceName", text))


def split_class_names(arguments: Sequence[str]) -> list[str]:
    """Return the arguments with ``--classes a,b`` as ``--classes a b``; names may hold
    spaces.
    """
    split_arguments: list[str] = []
    for previous, argument in pairwise(["", *arguments]):
        if argument.startswith("--classes="):
            names = parse_names(argument.removeprefix("--classes="))
            split_arguments += ["--classes", *names]
        elif previous == "--classes":
            split_arguments += parse_names(argument)
        else:
            split_arguments.append(argument)
    return split_arguments


def parse_names(text: str) -> list[str]:
    """Return the names in ``a,b``."""
    return [name.strip() for name in text.split(",") if name.strip()]


def _check_config_alone(
    options: argparse.Namespace, setting_arguments: Sequence[str]
) -> None:
    superfluous = [options.preset] if options.preset else []
    if options.published_cloud:
        superfluous.append("--published-cloud")
    if options.student:
        superfluous.append("--student")
    superfluous += setting_arguments
    if superfluous:
        raise ConfigError(
            f"--config holds the whole configuration; remove {' '.join(superfluous)}"
        )


def _build_preset(
    name: str, assets: str | None, cloud: CloudKind | None
) -> PipelineConfig:
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
    return PRESETS[name]() if assets is None else thermal(absolute_uri(assets))


def _apply_settings(
    preset: PipelineConfig, arguments: Sequence[str], program: str
) -> PipelineConfig:
    """Return the preset with the settings that the arguments name."""
    import tyro

    arguments, more_clouds = _take_more_clouds(arguments)
    if more_clouds:
        preset = replace(preset, more_clouds=more_clouds)
    arguments, class_file = _take_class_file(arguments)
    if class_file:
        preset = with_class_file(preset, class_file)
    arguments = _expand_cloud(split_class_names(arguments))
    return tyro.cli(
        PipelineConfig,
        prog=f"{program} {preset.preset}",
        default=preset,
        args=[_expand_option(argument) for argument in arguments],
        config=(tyro.conf.AvoidSubcommands,),
        add_help=True,
    )


def _expand_option(argument: str) -> str:
    """Return an argument with the option's name in the config."""
    name, equals, text = argument.partition("=")
    return LONG_OPTIONS.get(name, name) + equals + text


def _take_more_clouds(arguments: Sequence[str]) -> tuple[list[str], tuple[Cloud, ...]]:
    """Return the arguments without ``--more-clouds X,Y`` (or X Y), and those clouds;
    their other settings go by number: ``--more-clouds.0.max-usd 5``.
    """
    other_arguments: list[str] = []
    clouds: list[Cloud] = []
    names_clouds = False
    for argument in arguments:
        name, _, text = argument.partition("=")
        if name == "--more-clouds":
            names_clouds = True
            clouds += [parse_cloud(cloud) for cloud in parse_names(text)]
            continue
        if argument.startswith("--"):
            names_clouds = False
        if names_clouds:
            clouds += [parse_cloud(cloud) for cloud in parse_names(argument)]
        else:
            other_arguments.append(argument)
    return other_arguments, tuple(clouds)


def _take_class_file(arguments: Sequence[str]) -> tuple[list[str], str]:
    """Return the arguments without ``--classes FILE.yaml``, and that file; empty if the
    classes are named.
    """
    other_arguments: list[str] = []
    class_file = ""
    previous = ""
    for argument in arguments:
        name, equals, text = argument.partition("=")
        if name == "--classes" and equals and is_class_file(text):
            class_file = text
        elif previous == "--classes" and is_class_file(argument):
            class_file = argument
            other_arguments.pop()
        else:
            other_arguments.append(argument)
        previous = argument
    return other_arguments, class_file


def _expand_cloud(arguments: Sequence[str]) -> list[str]:
    """Return the arguments with ``--cloud X`` as ``--cloud.url X`` or ``--cloud.service
    X``.
    """
    expanded_arguments: list[str] = []
    for argument, following in pairwise([*arguments, ""]):
        if argument == "--cloud":
            expanded_arguments.append(_cloud_setting(following))
        elif argument.startswith("--cloud="):
            cloud = argument.removeprefix("--cloud=")
            expanded_arguments.append(f"{_cloud_setting(cloud)}={cloud}")
        else:
            expanded_arguments.append(argument)
    return expanded_arguments


def _cloud_setting(text: str) -> str:
    """Return the setting that an address (it holds ://) or a service's name is for."""
    if "://" in text:
        return "--cloud.url"
    if text in get_args(ServiceName):
        return "--cloud.service"
    raise ConfigError(
        f"the cloud {text!r} is neither an address like https://detector.example.com"
        f" nor a service; the services are {', '.join(get_args(ServiceName))}"
    )


def _describe_preset(name: str) -> str:
    first_paragraph = (PRESETS[name].__doc__ or "").partition("\n\n")[0]
    return " ".join(first_paragraph.split()).rstrip(".").removeprefix("Return ")
