"""``coin-ray check DIR...``: faults of annotated images, before money or hours are
spent.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from coin_ray.commands.arguments import parse_names

DESCRIPTION = """\
Check annotated images for faults. Each DIR is a split, in any format of docs/formats.md,
also as FOLDER#SPLIT; several are compared with each other. Prints what was read of each,
then the faults. Exit code 1 if there is a fault.
"""


def check(arguments: Sequence[str]) -> int:
    """Print what was read and the faults of the folders; return 1 if there are any."""
    options = build_check_parser().parse_args(arguments)
    from rich.console import Console

    from coin_ray.data.check import check_datasets, faults_table

    console = Console()

    def print_line(line: str) -> None:
        console.print(line, soft_wrap=True, markup=False)

    faults = check_datasets(options.folders, options.classes, print_line)
    if faults:
        console.print(faults_table(faults), markup=False)
        return 1
    no_faults = f"nothing wrong found in {', '.join(options.folders)}"
    print_line(no_faults)
    return 0


def build_check_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="coin-ray check",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "folders",
        nargs="+",
        metavar="DIR",
        help="a split: a folder, or FOLDER#SPLIT; several are compared with each other",
    )
    parser.add_argument(
        "--classes",
        default=[],
        type=parse_names,
        help="names that an adaptation will ask for: a,b",
    )
    return parser
