"""The command ``coin-ray SUBCOMMAND``. A subcommand is imported when it is called, so
that ``coin-ray --help`` answers at once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version

from coin_ray.commands.exit_codes import RERUN_HINT, run_command

USAGE_ERROR = 2


@dataclass(frozen=True)
class Subcommand:
    """A subcommand: ``module`` in ``coin_ray.commands`` and its ``function``, which
    takes the arguments and may return an exit code.
    """

    module: str
    function: str
    description: str
    resume_hint: str = RERUN_HINT

    def load(self) -> Callable[[Sequence[str]], int | None]:
        module = import_module(f"coin_ray.commands.{self.module}")
        function: Callable[[Sequence[str]], int | None] = getattr(module, self.function)
        return function


SUBCOMMANDS = {
    "adapt": Subcommand("adapt", "adapt_command", "run the whole adaptation"),
    "plan": Subcommand("adapt", "plan_command", "print steps, calls, cost and time"),
    "collect": Subcommand(
        "steps",
        "collect",
        "query the cloud and CLIP; collect views: compare renderings",
    ),
    "propagate": Subcommand("steps", "propagate", "train the CLIP detector"),
    "separate": Subcommand(
        "steps", "separate", "split teacher outputs by their agreement"
    ),
    "distill": Subcommand("steps", "distill", "train the student"),
    "evaluate": Subcommand("steps", "evaluate", "evaluate teachers and student"),
    "export": Subcommand("export", "export", "write the student's files for use"),
    "report": Subcommand(
        "report", "report", "write a run's page, compare runs, or a search's page"
    ),
    "teachers": Subcommand(
        "teachers",
        "teachers",
        "teachers compare: compare clouds and phrases on a few images",
    ),
    "compare": Subcommand("studies", "compare", "compare fusion rules"),
    "ablate": Subcommand("studies", "ablate", "leave out each loss and stage"),
    "search": Subcommand(
        "search",
        "search",
        "search the settings of the distillation",
        "add --resume to the same command to continue",
    ),
    "detector": Subcommand("detector", "detector", "train Co-DETR or another DETR"),
    "review": Subcommand(
        "review", "review", "send labels to a review tool and read them back"
    ),
    "labels": Subcommand(
        "labels", "labels", "check or propose a label map, export a run's labels"
    ),
    "journal": Subcommand(
        "journal", "journal", "show, verify or compact a journal, drop an answer"
    ),
    "check": Subcommand("check", "check", "check annotated images for faults"),
    "serve": Subcommand(
        "serve", "serve", "serve a detector; serve register: add it to MLflow"
    ),
    "capacity": Subcommand(
        "capacity", "capacity", "estimate what 10^4 to 10^8 images take"
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the subcommand that the arguments name and return its exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    name, subcommand_arguments = (words[0], words[1:]) if words else ("", [])
    if name in SUBCOMMANDS:
        subcommand = SUBCOMMANDS[name]
        return run_command(
            lambda: subcommand.load()(subcommand_arguments), subcommand.resume_hint
        )
    return run_command(lambda: _print_about_all(name))


def _print_about_all(name: str) -> int:
    """Print help, version, or what is wrong with the subcommand's name."""
    if not name:
        print(format_usage(), file=sys.stderr)
        return USAGE_ERROR
    if name in ("-h", "--help"):
        print(format_usage())
        return 0
    if name == "--version":
        print(f"coin-ray {version('coin-ray')}")
        return 0
    print(
        f"coin-ray: no subcommand {name!r}; the subcommands are {', '.join(SUBCOMMANDS)}",
        file=sys.stderr,
    )
    return USAGE_ERROR


def format_usage() -> str:
    """Return the list of subcommands."""
    lines = [
        f"  {name:<10} {subcommand.description}"
        for name, subcommand in SUBCOMMANDS.items()
    ]
    return "\n".join(
        [
            "usage: coin-ray SUBCOMMAND [options]",
            "",
            "Adapt a cloud object detector to your own unlabelled images.",
            "",
            *lines,
            "",
            "Options of one: coin-ray SUBCOMMAND --help",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
