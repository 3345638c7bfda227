"""``coin-ray report``: the page of a run, of several runs, or of a search."""

from __future__ import annotations

from collections.abc import Sequence

from coin_ray import storage
from coin_ray.commands.steps import run_single_step
from coin_ray.errors import InputError
from coin_ray.report.compare import COMPARISON_PAGE, write_comparison

DESCRIPTION = """\
Write the page with figures, curves and pictures; or compare finished runs, or list the
trials of a search.

    coin-ray report demo [--dry-run]
    coin-ray report runs/A runs/B ... [--out comparison.html]
    coin-ray report runs/A/search/SEARCH    write a search's page anew, with newer reports
"""


def report(arguments: Sequence[str]) -> None:
    """Write the page that the arguments ask for, and print where it is."""
    if len(arguments) == 1 and "/" in arguments[0]:
        from coin_ray.search.page import write_page

        print(write_page(storage.absolute_uri(arguments[0])))
        return
    roots = select_run_roots(arguments)
    if roots:
        print(write_comparison(roots, _parse_out(arguments[len(roots) :])))
    else:
        run_single_step("report", DESCRIPTION, arguments)


def select_run_roots(arguments: Sequence[str]) -> list[str]:
    """Return the folders in ``A B ... [--out FILE]``; none if the arguments are those of
    a single run (``demo --seed 1``).
    """
    roots = []
    for argument in arguments:
        if argument.startswith("--"):
            break
        roots.append(argument)
    return roots if len(roots) > 1 else []


def _parse_out(options: Sequence[str]) -> str:
    if not options:
        return COMPARISON_PAGE
    if len(options) == 1 and options[0].startswith("--out="):
        return options[0].removeprefix("--out=")
    if len(options) == 2 and options[0] == "--out":
        return options[1]
    raise InputError(
        f"a comparison takes folders of runs and --out FILE; got {' '.join(options)}"
    )
