"""Measure the accuracy of COIN and of its parts: ``make bench-coin`` or ``python
tests/benchmarks/bench_coin.py``.

    # the demo, seeds 0 1 2 (baselines: 0 to 4)
    make bench-coin
    # the demo, thermal, and thermal with plain renderings for the cloud only
    make bench-coin ARGS="--assets DIR"
    # a tenth of the steps, two seeds; writes nothing into docs/results
    make bench-coin ARGS="--quick"

Three studies per preset (baselines, ablation, fusion; of thermal-plain only the
baselines) on one root each, so that they share images, answers and teachers. A killed
run resumes with the same command. Prints the tables, writes them as Markdown with
figures and package versions, and prints all figures as one line of JSON last. Other
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
    "baselines": ("COIN beside its teachers and baselines", studies.run_baselines),
    "ablation": ("What each loss and each stage is worth", studies.run_ablation),
    "fusion": ("What supervises inconsistent boxes", studies.run_fusion_study),
}

PLAIN_RENDERING = "thermal-plain"
SEEDS, BASELINE_SEEDS = (0, 1, 2), (0, 1, 2, 3, 4)
"""Seeds of all studies, and of the baselines of demo and thermal, without ``--seeds`` and
``--quick``."""


def study_names(preset: str) -> list[str]:
    return ["baselines"] if preset == PLAIN_RENDERING else list(STUDIES)


def with_seeds(study: str, preset: str, request: StudyRequest) -> StudyRequest:
    has_default_seeds = tuple(request.seeds) == SEEDS
    if study == "baselines" and preset != PLAIN_RENDERING and has_default_seeds:
        return replace(request, seeds=BASELINE_SEEDS)
    return request


def parse_requests(
    arguments: Sequence[str],
) -> tuple[dict[str, StudyRequest], Path | None]:
    """Return a request for each preset, and the folder of the pages (None: write no pages).
    Raises ConfigError."""
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
    benchmark_options, study_arguments = parser.parse_known_args(list(arguments))
    presets = {"demo": ["demo"]}
    if benchmark_options.assets:
        presets["thermal"] = ["thermal", "--assets", str(benchmark_options.assets)]
        presets[PLAIN_RENDERING] = [*presets["thermal"], "--cloud.views", "plain"]
    requests_by_preset = {}
    for name, preset_arguments in presets.items():
        root = f"{benchmark_options.root}/{name}"
        arguments_of_study = [*preset_arguments, "--root", root, *study_arguments]
        requests_by_preset[name] = parse_study(arguments_of_study, "bench_coin.py", "")
    is_shortened = any(
        argument.startswith(("--quick", "--steps-share"))
        for argument in study_arguments
    )
    default_out = None if is_shortened else REPOSITORY / "docs" / "results"
    return requests_by_preset, benchmark_options.out or default_out


def run_studies(
    preset: str, request: StudyRequest, host: RunJobs, out: Path | None, command: str
) -> dict[str, list[StudyRow]]:
    """Run the studies one after the other, and write the page after each."""
    rows_by_study: dict[str, list[StudyRow]] = {}
    for name in study_names(preset):
        rows_by_study[name] = STUDIES[name][1](with_seeds(name, preset, request), host)
        if out is not None and not request.dry_run:
            write_page(out, preset, request, rows_by_study, command)
    return rows_by_study


def summarize_rows(rows: Sequence[StudyRow]) -> dict[str, Any]:
    """Return mean, deviation and values of each row, as shares."""
    figures = {}
    for row in rows:
        name = f"{row.name}, {row.group}" if row.group else row.name
        figures[name] = {
            "mean": None if row.mean is None else round(row.mean, 4),
            "std": None if row.std is None else round(row.std, 4),
            "values": list(row.by_seed),
        }
    return figures


def join_numbers(seeds: Sequence[int]) -> str:
    return ", ".join(map(str, seeds))


def format_page(
    preset: str,
    request: StudyRequest,
    rows_by_study: dict[str, list[StudyRow]],
    command: str,
) -> str:
    """Return Markdown with all tables, links to their figures, and how they were made."""
    parts = [f"# {preset}: measured results\n"]
    for name in study_names(preset):
        title = STUDIES[name][0]
        if name in rows_by_study:
            parts += [
                f"## {title}\n",
                format_markdown(rows_by_study[name]),
                f"![{title}]({preset}-{name}.svg)\n",
            ]
        else:
            parts += [f"## {title}\n", "Not finished when this page was written.\n"]
    packages = ", ".join(f"{package} {version(package)}" for package in PACKAGES)
    parts += [
        "## How it was made\n",
        f"    {command}\n",
        (
            f"Seeds {join_numbers(request.seeds)} (baselines:"
            f" {join_numbers(with_seeds('baselines', preset, request).seeds)}); mAP50 in points,"
            " mean ± sample standard deviation over seeds; last checkpoint,"
            f" {request.config.propagate.fit.steps} steps of propagation and"
            f" {request.config.distill.fit.steps} of distillation."
            f" {datetime.now(UTC):%Y-%m-%d}, {os.cpu_count()} CPU cores, Python"
            f" {platform.python_version()}, {packages}.\n"
        ),
    ]
    return "\n".join(parts)


def write_page(
    out: Path,
    preset: str,
    request: StudyRequest,
    rows_by_study: dict[str, list[StudyRow]],
    command: str,
) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{preset}.md").write_text(
        format_page(preset, request, rows_by_study, command)
    )
    for name in rows_by_study:
        (out / f"{preset}-{name}.svg").write_bytes(
            (Path(request.root) / f"{name}.svg").read_bytes()
        )


def main(arguments: Sequence[str]) -> int:
    from coin_ray.experiments.tuning import run_jobs_with_tune

    try:
        requests_by_preset, out = parse_requests(arguments)
        command = (
            f'make bench-coin ARGS="{shlex.join(arguments)}"'
            if arguments
            else "make bench-coin"
        )
        rows_by_preset = {
            preset: run_studies(preset, request, run_jobs_with_tune, out, command)
            for preset, request in requests_by_preset.items()
        }
    except CoinError as error:
        print(f"\n{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    if any(request.dry_run for request in requests_by_preset.values()):
        return 0
    figures = {
        preset: {name: summarize_rows(rows) for name, rows in rows_by_study.items()}
        for preset, rows_by_study in rows_by_preset.items()
    }
    print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
