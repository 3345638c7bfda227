"""Links from a page to the sources (``../coin_ray/...``) lead to copies of those files on the site."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
OUTWARD = re.compile(r"\]\(((?:\.\./)+)([^)#\s]+)")


def on_files(files: Files, config: Any) -> Files:
    """Add every file outside docs/ that a page names."""
    for page in [f for f in files if f.is_documentation_page()]:
        for up, name in OUTWARD.findall(page.content_string):
            place = _inside(page.src_uri, up, name)
            if (
                place is not None
                and files.get_file_from_path(f"source/{place}.txt") is None
            ):
                files.append(
                    File.generated(
                        config, f"source/{place}.txt", abs_src_path=str(ROOT / place)
                    )
                )
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    def moved(found: re.Match[str]) -> str:
        place = _inside(page.file.src_uri, *found.groups())
        return (
            found.group()
            if place is None
            else f"]({os.path.relpath(f'source/{place}.txt', os.path.dirname(page.file.src_uri) or '.')}"
        )

    return OUTWARD.sub(moved, markdown)


def _inside(src_uri: str, up: str, name: str) -> str | None:
    """The path of a link's target from the top of the repository, or None for one within docs/."""
    place = os.path.normpath(os.path.join("docs", os.path.dirname(src_uri), up, name))
    return None if place.startswith(("docs/", "..")) else place
