"""Hooks of mkdocs: links from a page to the sources (``../coin_ray/...``) lead to copies
of those files on the site.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
OUTWARD_LINK = re.compile(r"\]\(((?:\.\./)+)([^)#\s]+)")


def on_files(files: Files, config: Any) -> Files:
    """Add every file outside docs/ that a page links to."""
    pages = [file for file in files if file.is_documentation_page()]
    for page in pages:
        for up, name in OUTWARD_LINK.findall(page.content_string):
            path = _path_from_root(page.src_uri, up, name)
            if path is None or files.get_file_from_path(_copy_path(path)) is not None:
                continue
            source = str(ROOT / path)
            copy = File.generated(config, _copy_path(path), abs_src_path=source)
            files.append(copy)
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Return the page with its outward links replaced by links to the copies."""
    folder = os.path.dirname(page.file.src_uri) or "."

    def link_to_copy(match: re.Match[str]) -> str:
        path = _path_from_root(page.file.src_uri, match[1], match[2])
        if path is None:
            return match[0]
        return f"]({os.path.relpath(_copy_path(path), folder)}"

    return OUTWARD_LINK.sub(link_to_copy, markdown)


def _copy_path(path: str) -> str:
    """Return the path on the site of the copy of a file."""
    return f"source/{path}.txt"


def _path_from_root(src_uri: str, up: str, name: str) -> str | None:
    """Return the path of a link's target from the top of the repository, or None for a
    target within docs/.
    """
    folder = os.path.join("docs", os.path.dirname(src_uri))
    path = os.path.normpath(os.path.join(folder, up, name))
    return None if path.startswith(("docs/", "..")) else path
