"""The commands of docs/cluster.md, word for word."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs/cluster.md"
START_OF_TABLE = "<!-- table of make test-cluster -->"
END_OF_TABLE = "<!-- end of the table -->"


def section(title: str) -> str:
    """Return the text of a section of the page."""
    _, _, rest = PAGE.read_text().partition(f"\n## {title}\n")
    if not rest:
        raise ValueError(f"{PAGE} has no section {title!r}")
    return rest.partition("\n## ")[0]


def commands(title: str) -> list[str]:
    """Return the commands of a section, each with its continued lines and comment."""
    blocks = re.findall(r"```bash\n(.*?)```", section(title), re.DOTALL)
    joined = [re.sub(r"\\\n\s*", "", block) for block in blocks]
    return [line for block in joined for line in block.splitlines() if line.strip()]


def command(title: str, start: str) -> str:
    """Return the one command of a section that starts so."""
    matches = [line for line in commands(title) if line.startswith(start)]
    if len(matches) != 1:
        raise ValueError(
            f"{PAGE}, {title!r}: expected one command that starts with {start!r},"
            f" got {matches}"
        )
    return matches[0]


def write_table(rows: list[str]) -> None:
    """Replace the rows of the page's table. A row begins with ``| scenario |``; rows of
    scenarios that were not run now stay.
    """
    text = PAGE.read_text()
    before, _, rest = text.partition(START_OF_TABLE)
    table, _, after = rest.partition(END_OF_TABLE)
    header, line, *old_rows = table.strip().splitlines()
    merged = {row.split("|")[1].strip(): row for row in [*old_rows, *rows]}
    lines = [START_OF_TABLE, header, line, *merged.values(), END_OF_TABLE]
    PAGE.write_text(before + "\n".join(lines) + after)
