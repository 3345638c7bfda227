"""What COIN reaches and what its parts are worth: ``make bench-coin`` or ``python
tests/benchmarks/bench_coin.py``.

    make bench-coin                               # the demo, seeds 0 1 2 (baselines: 0
    to 4) make bench-coin ARGS="--assets DIR"           # the demo, thermal, and thermal
    with the cloud asked in the plain view only make bench-coin ARGS="--quick"
    # a tenth of the steps, two seeds; writes nothing into docs/results

Three studies per preset (baselines, ablation, fusion; of thermal-plain only the
baselines) on one root each, so that they share images, answers and teachers. A killed
run goes on by the same command. Prints the tables, writes them as Markdown with figures
and the versions that made them, and prints all figures as one line of JSON last. Other
options are those of pipelines/ablate.py (--seeds, --steps-share, --share, settings by
dotted name).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from coin_ray.commands.studies import parse_study
from coin_ray.errors import CoinError
from coin_ray.experiments import studies
from coin_ray.experiments.grid import RunJobs
from coin_ray.experiments.outcome import StudyRow, format_markdown
from coin_ray.experiments.studies import StudyRequest
from coin_ray.runs.summary import PACKAGES

REPOSITORY = Path(__file__).resolve().parents[2]
STUDIES: dict[str, tuple[str, studies.Study]] = {
    "baselines": ("COIN beside its teachers and baselines", studies.baselines),
    "ablation": ("What each loss and each stage is worth", studies.ablation),
    "fusion": ("What supervises inconsistent boxes", studies.fusion),
}

PLAIN_VIEW = "thermal-plain"
SEEDS, BASELINE_SEEDS = (0, 1, 2), (0, 1, 2, 3, 4)
"""Of all studies, and of the baselines of demo and thermal, unless ``--seeds`` or
``--quick`` chooses others."""


def studies_of(preset: str) -> list[str]:
    return ["baselines"] if preset == PLAIN_VIEW else list(STUDIES)


def asked_of(study: str, preset: str, asked: StudyRequest) -> StudyRequest:
    five = study == "baselines" and preset != PLAIN_VIEW and tuple(asked.seeds) == SEEDS
    return replace(asked, seeds=BASELINE_SEEDS) if five else asked


def requests(arguments: Sequence[str]) -> tuple[dict[str, StudyRequest], Path | None]:
    """A request by preset, and where the results go (None: only the roots). Raises
    ConfigError."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--assets",
        help=(
            "folder of the thermal preset's images and detectors; without it only the"
            " demo is run"
        ),
    )
    parser.add_argument(
        "--root",
        default=str(REPOSITORY / "runs" / "bench-coin"),
        help="folder of the runs",
    )
    parser.add_argument(
        "--out",
        type=Path,
        help=(
            "folder of tables and figures (default: docs/results, none for --quick and"
            " --steps-share)"
        ),
    )
    known, rest = parser.parse_known_args(list(arguments))
    thermal = ["thermal", "--assets", str(known.assets)]
    photos = (
        {"thermal": thermal, PLAIN_VIEW: [*thermal, "--cloud.views", "plain"]}
        if known.assets
        else {}
    )
    presets = {"demo": ["demo"], **photos}
    asked = {
        name: parse_study(
            [*first, "--root", f"{known.root}/{name}", *rest], "bench_coin.py", ""
        )
        for name, first in presets.items()
    }
    real = not any(
        argument.startswith(("--quick", "--steps-share")) for argument in rest
    )
    return asked, known.out or (REPOSITORY / "docs" / "results" if real else None)


def measure(
    preset: str, asked: StudyRequest, host: RunJobs, out: Path | None, command: str
) -> dict[str, list[StudyRow]]:
    """The studies one after the other; what is found so far is written after each."""
    found: dict[str, list[StudyRow]] = {}
    for name in studies_of(preset):
        found[name] = STUDIES[name][1](asked_of(name, preset, asked), host)
        if out is not None and not asked.dry_run:
            write(out, preset, asked, found, command)
    return found


def figures(rows: Sequence[StudyRow]) -> dict[str, Any]:
    """Mean, deviation and values of each row, as shares."""
    return {
        ", ".join(part for part in (row.name, row.group) if part): {
            "mean": None if row.mean is None else round(row.mean, 4),
            "std": None if row.std is None else round(row.std, 4),
            "values": list(row.values),
        }
        for row in rows
    }


def numbers(seeds: Sequence[int]) -> str:
    return ", ".join(map(str, seeds))


def page(preset: str, asked: StudyRequest, found: dict[str, list[StudyRow]], command: str) -> str:
    """Markdown with all tables, figures beside it, and what made them."""
    parts = [f"# {preset}: measured results\n"]
    for name in studies_of(preset):
        title = STUDIES[name][0]
        if name in found:
            parts += [
                f"## {title}\n",
                format_markdown(found[name]),
                f"![{title}]({preset}-{name}.svg)\n",
            ]
        else:
            parts += [f"## {title}\n", "Not finished when this page was written.\n"]
    packages = ", ".join(f"{package} {version(package)}" for package in PACKAGES)
    parts += [
        "## How it was made\n",
        f"    {command}\n",
        (
            f"Seeds {numbers(asked.seeds)} (baselines:"
            f" {numbers(asked_of('baselines', preset, asked).seeds)}); mAP50 in points,"
            " mean ± sample standard deviation over seeds; last checkpoint,"
            f" {asked.config.propagate.fit.steps} steps of propagation and"
            f" {asked.config.distill.fit.steps} of distillation."
            f" {datetime.now(UTC):%Y-%m-%d}, {os.cpu_count()} CPU cores, Python"
            f" {platform.python_version()}, {packages}.\n"
        ),
    ]
    return "\n".join(parts)


def write(
    out: Path, preset: str, asked: StudyRequest, found: dict[str, list[StudyRow]], command: str
) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{preset}.md").write_text(page(preset, asked, found, command))
    for name in found:
        (out / f"{preset}-{name}.svg").write_bytes(
            (Path(asked.root) / f"{name}.svg").read_bytes()
        )


def main(arguments: Sequence[str]) -> int:
    from coin_ray.experiments.tuning import run_jobs_with_tune

    try:
        asked, out = requests(arguments)
        command = (
            f'make bench-coin ARGS="{shlex.join(arguments)}"'
            if arguments
            else "make bench-coin"
        )
        found = {
            preset: measure(preset, one, run_jobs_with_tune, out, command)
            for preset, one in asked.items()
        }
    except CoinError as error:
        print(f"\n{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    if any(one.dry_run for one in asked.values()):
        return 0
    print(
        json.dumps(
            {
                preset: {name: figures(part) for name, part in rows.items()}
                for preset, rows in found.items()
            }
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
