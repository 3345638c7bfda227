"""``coin-ray capacity --images 1e6 --rate 20 --gpus 1``: print what an adaptation of so
many images takes.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import tyro
from rich.console import Console
from rich.table import Table

from coin_ray.runs.capacity import CapacityInputs, CapacityPlan, plan_capacity

DESCRIPTION = """\
Estimate what an adaptation of 10^4 to 10^8 images takes.

Calls, cost, hours, storage and memory by stage, and which limit is met first. Constants
measured on two CPU cores are marked so in coin_ray/runs/capacity.py; what is scaled from
them by floating-point operations (another network, another size, a GPU) is extrapolated.
docs/scale.md.
"""
SCALE = (1e4, 1e5, 1e6, 1e7, 1e8)


@dataclass(frozen=True)
class CapacityCommand(CapacityInputs):
    """The inputs, and how the estimate is printed."""

    json: bool = False
    """Print JSON."""
    scale: bool = False
    """For 10^4 to 10^8 images instead of ``--images``."""


def capacity(arguments: Sequence[str]) -> None:
    """Print the estimate."""
    command = parse_capacity(arguments)
    image_counts = SCALE if command.scale else (command.images,)
    plans = [plan_capacity(replace(command, images=count)) for count in image_counts]
    if command.json:
        content = [to_json(plan) for plan in plans]
        print(json.dumps(content if command.scale else content[0], indent=2))
        return
    tables = [_overview_table(plans)]
    if not command.scale:
        tables.append(_stage_table(plans[0]))
    tables.append(_limit_table(plans[-1]))
    console = Console()
    for table in tables:
        console.print(table)


def parse_capacity(arguments: Sequence[str]) -> CapacityCommand:
    """Return the inputs of a command line. Impossible numbers end the program with what
    is wrong and exit code 2.
    """
    return tyro.cli(
        CapacityCommand,
        prog="coin-ray capacity",
        description=DESCRIPTION,
        args=list(arguments),
    )


def to_json(plan: CapacityPlan) -> dict[str, object]:
    """Return a plan as plain values: ``walls`` are its scaling limits, each moved by its
    ``knob``, and ``reached`` names those that are exceeded.
    """
    fields = dataclasses.asdict(plan)
    fields["walls"] = [
        {"name": limit.name, "images": limit.images, "knob": limit.mitigation}
        for limit in plan.limits
    ]
    del fields["limits"]
    return fields | {"reached": [limit.name for limit in plan.exceeded_limits]}


AMOUNTS: dict[str, Callable[[CapacityPlan], float]] = {
    "USD for calls": lambda plan: plan.usd_calls,
    "hours": lambda plan: plan.hours,
    "GPU hours": lambda plan: plan.gpu_hours,
    "USD for GPUs": lambda plan: plan.usd_gpus,
    "epochs": lambda plan: plan.epochs,
    "GB images": lambda plan: plan.storage.images_gb,
    "GB journal": lambda plan: plan.storage.journal_gb,
    "GB tables": lambda plan: plan.storage.tables_gb,
    "objects": lambda plan: plan.storage.objects,
    "USD to write them": lambda plan: plan.storage.usd_writes,
    "GiB of the driver": lambda plan: max(stage.gib for stage in plan.stages),
}


def _overview_table(plans: Sequence[CapacityPlan]) -> Table:
    counts = [
        f"{plan.images:,}" if plan.images < 1e7 else f"{plan.images:.0e}"
        for plan in plans
    ]
    table = Table("images", *counts, title="what it takes")
    for name, amount in AMOUNTS.items():
        table.add_row(name, *(_format_amount(amount(plan)) for plan in plans))
    return table


def _stage_table(plan: CapacityPlan) -> Table:
    table = Table(
        "step", "hours", "limited by", "GPU hours", "GiB of the driver", title="by step"
    )
    for stage in plan.stages:
        table.add_row(
            stage.name,
            _format_amount(stage.hours),
            stage.limit,
            _format_amount(stage.gpu_hours),
            _format_amount(stage.gib),
        )
    return table


def _limit_table(plan: CapacityPlan) -> Table:
    """Return the table of scaling limits; those that are not exceeded are dim."""
    table = Table(
        "from images", "what breaks", "what moves it", title="what breaks first"
    )
    for limit in plan.limits:
        style = None if limit in plan.exceeded_limits else "dim"
        images = _format_amount(limit.images)
        table.add_row(images, limit.name, limit.mitigation, style=style)
    return table


def _format_amount(amount: float) -> str:
    if amount >= 1e7:
        return f"{amount:.1e}"
    if amount >= 100:
        return f"{amount:,.0f}"
    return f"{amount:.3g}"
