"""Notice that the files a finished images step was read from have changed since."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from coin_ray.config import Folder
from coin_ray.data.listing import (
    FileChanges,
    compare_listings,
    list_versions,
    read_listing,
    write_listing,
)
from coin_ray.runs.steps import Step, reopen_step, restore_step


def find_changes(step: Step | None, root: str) -> FileChanges:
    """Return what is new, gone or changed in the folders of a finished images step.

    There are no changes for the demo, for an unfinished step, for one of a version that
    kept no listing, and, with a line that says so, for folders that can't be listed.
    """
    data = step.identity if step is not None else None
    if step is None or not isinstance(data, Folder) or not step.is_finished(root):
        return FileChanges()
    try:
        versions = list_versions(data, root)
    except OSError as error:
        print(f"images: not compared with their files: {error}", flush=True)
        return FileChanges()
    former_versions = read_listing(step.folder(root))
    if former_versions is None:
        return FileChanges()
    return compare_listings(former_versions, versions)


def keep_listing(step: Step | None, root: str) -> None:
    """Write the listing of a finished images step of a version that kept none: its files
    are taken as unchanged.
    """
    data = step.identity if step is not None else None
    if step is None or not isinstance(data, Folder) or not step.is_finished(root):
        return
    folder = step.folder(root)
    if read_listing(folder) is None:
        try:
            write_listing(folder, list_versions(data, root))
        except OSError as error:
            print(f"images: their files are not listed: {error}", flush=True)


def reopen_if_changed(steps: Iterable[Step], root: str) -> None:
    """Print what has changed in the folders of the images step, if it is among the
    steps, and make it unfinished, so that it is run again.
    """
    for step in steps:
        if step.name == "images":
            changes = find_changes(step, root)
            keep_listing(step, root)
            if changes:
                _reopen(step, root, changes)


@contextmanager
def reopened_images(step: Step, root: str, changes: FileChanges) -> Iterator[None]:
    """Reopen a finished images step. If the block raises before the step has ended
    again, it stays finished as it was.
    """
    _reopen(step, root, changes)
    try:
        yield
    except BaseException:
        restore_step(step.folder(root))
        raise


def _reopen(step: Step, root: str, changes: FileChanges) -> None:
    manifest = step.read_manifest(root)
    assert manifest is not None
    print(
        f"images: since they were read: {changes.describe()}; they are read again",
        flush=True,
    )
    reopen_step(step.folder(root), manifest)
