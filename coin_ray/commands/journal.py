"""``coin-ray journal show|verify|compact``: what a run has been answered and has spent.
Nothing here makes a call.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from coin_ray import storage
from coin_ray.errors import InputError

if TYPE_CHECKING:
    from coin_ray.cloud.journal.base import Journal

DESCRIPTION = """\
Show, verify or compact the journal of the cloud's answers. Makes no call.

    coin-ray journal show|verify|compact --root ROOT
"""


def journal(arguments: Sequence[str]) -> int:
    """Run one of the tools; return 1 if ``verify`` finds damage."""
    options = build_journal_parser().parse_args(arguments)
    tool: Callable[[Journal], int] = options.tool
    return tool(open_run_journal(options.root))


def build_journal_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="coin-ray journal",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    tools = parser.add_subparsers(required=True, metavar="show|verify|compact")
    for name, tool, description in (
        ("show", show_journal, "answers, calls, USD and bytes"),
        (
            "verify",
            verify_journal,
            "read every record again; exit code 1 if any is damaged",
        ),
        (
            "compact",
            compact_journal,
            "rewrite live answers and sums into one file; no run may be using the"
            " journal",
        ),
    ):
        tool_parser = tools.add_parser(name, help=description)
        tool_parser.add_argument("--root", required=True, help="folder or URI of a run")
        tool_parser.set_defaults(tool=tool)
    return parser


def open_run_journal(root: str) -> Journal:
    """Open the journal of the run at ``root``. Raise InputError if it has none."""
    from coin_ray.cloud.journal.opening import open_journal

    uri = storage.join(storage.absolute_uri(root), "journal")
    if not storage.exists(uri):
        raise InputError(
            f"no journal at {uri}; --root must be the folder of a run that queried a"
            " service"
        )
    return open_journal(uri)


def show_journal(journal: Journal) -> int:
    contents = journal.contents()
    print(f"answers      {contents.answers:>9,}")
    for (service, model), count in sorted(contents.services.items()):
        service_name = f"{service or 'service not recorded'} {model}".rstrip()
        print(f"  {count:>18,}  {service_name}")
    print(f"open tasks   {contents.tasks:>9,}")
    print(f"quarantined  {contents.quarantined:>9,}")
    print(f"attempts     {contents.attempts:>9,}")
    print(f"refunds      {contents.refunds:>9,}")
    print(f"spent        {contents.calls:>9,} calls, ${contents.usd:,.4f}")
    print(f"size         {contents.size:>9,} bytes")
    return 0


def verify_journal(journal: Journal) -> int:
    damage_count = 0
    for damage in journal.verify():
        damage_count += 1
        print(f"{damage.path}: offset {damage.offset}: {damage.reason}")
    if damage_count:
        print(f"{damage_count} damaged places")
        return 1
    print(f"no damage; {len(journal.keys()):,} answers and tasks can be read")
    return 0


def compact_journal(journal: Journal) -> int:
    from coin_ray.cloud.journal.segments import SegmentJournal

    if not isinstance(journal, SegmentJournal):
        print("nothing to do: on an object store each answer is an object of its own")
        return 0
    before, after = journal.compact()
    print(f"{before:,} bytes before, {after:,} after")
    return 0
