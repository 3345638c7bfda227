"""The three studies: what each loss and stage is worth, how opinions are best fused,
and COIN beside its baselines.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from coin_ray import storage
from coin_ray.commands.grid import Request
from coin_ray.experiments import disputes, grid
from coin_ray.experiments.grid import Host, Trial
from coin_ray.experiments.outcome import (
    Row,
    figure,
    markdown,
    method_rows,
    print_rows,
    variant_rows,
)
from coin_ray.experiments.tracked import Runs
from coin_ray.experiments.variants import ABLATION, fusions, trials

Study = Callable[[Request, Host], list[Row]]


def ablation(request: Request, host: Host) -> list[Row]:
    """Each loss and each stage left out."""
    chosen = trials(request.config, ABLATION, request.seeds)
    return _study(
        "ablation",
        "Ablation",
        chosen,
        request,
        host,
        lambda records: variant_rows(records),
    )


def fusion(request: Request, host: Host) -> list[Row]:
    """Each decision-level fusion with the published threshold and with one of its own."""
    groups = fusions(request.share)
    chosen = trials(request.config, groups, request.seeds)
    reference = [trial for trial in chosen if not trial.group]
    return _study(
        "fusion",
        "Fusion of inconsistent boxes",
        chosen,
        request,
        host,
        lambda records: variant_rows(
            records,
            disputes.notes(reference, list(groups), request.share, request.root),
        ),
    )


def baselines(request: Request, host: Host) -> list[Row]:
    """Teachers, COIN, and the same network on plain pseudo-labels and on the truth."""
    chosen = trials(request.config, {}, request.seeds, baselines=True)
    return _study("baselines", "Baselines", chosen, request, host, method_rows)


def _study(
    name: str,
    title: str,
    chosen: Sequence[Trial],
    request: Request,
    host: Host,
    rows_of: Callable[[list[dict[str, object]]], list[Row]],
) -> list[Row]:
    """Run, print and leave NAME.json, NAME.md and NAME.svg at the root. With
    ``dry_run`` only say what is to do.
    """
    if request.dry_run:
        for number, wave in enumerate(grid.waves(chosen, request.root), start=1):
            for job in wave:
                print(
                    f"wave {number}  {job.title}:"
                    f" {', '.join(step.name for step in job.steps)}"
                )
        return []
    rows = rows_of(
        grid.run(
            name, chosen, request.root, host, Runs(name, request.config, request.root)
        )
    )
    heading = f"{title}: {request.config.preset}"
    print_rows(heading, rows)
    storage.write_bytes(
        storage.join(request.root, f"{name}.md"), markdown(rows).encode()
    )
    storage.write_bytes(
        storage.join(request.root, f"{name}.svg"), figure(heading, rows).encode()
    )
    return rows
