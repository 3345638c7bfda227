"""List the files of a run's folders, to notice what is new, gone or changed since they
were read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import pyarrow as pa

from coin_ray import storage
from coin_ray.config import Folder
from coin_ray.data.file_kinds import LABEL_SUFFIXES, is_hidden
from coin_ray.data.formats import IMAGE_SUFFIXES

LISTING_FILE = "listing.parquet"
"""The listing that the images were read from, in the folder of their step."""
LISTING = pa.schema([("uri", pa.string()), ("version", pa.string())])
SHOWN_FILES = 3


@dataclass(frozen=True)
class FileChanges:
    """URIs of image and label files that differ between two listings."""

    new: tuple[str, ...] = ()
    gone: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.new or self.gone or self.changed)

    def describe(self) -> str:
        """Return counts and examples: ``1 new (/a/b.jpg), 2 gone (...)``."""
        parts = []
        for kind, uris in (
            ("new", self.new),
            ("gone", self.gone),
            ("changed", self.changed),
        ):
            if uris:
                dots = ", ..." if len(uris) > SHOWN_FILES else ""
                parts.append(
                    f"{len(uris)} {kind} ({', '.join(uris[:SHOWN_FILES])}{dots})"
                )
        return ", ".join(parts)


def addresses_by_split(data: Folder) -> dict[str, str]:
    """Return the addresses of a run's labelled and unlabelled images by split."""
    addresses = {"train": data.images, "val": data.val, "test": data.test}
    return {split: address for split, address in addresses.items() if address}


def list_versions(data: Folder, root: str) -> dict[str, str]:
    """Return size and time of change of the image and label files of all folders, by
    URI. Hidden files and those below ``root``, the run's own, are left out.

    Raises OSError if a folder is missing or can't be listed.
    """
    own_files = storage.absolute_uri(root).rstrip("/") + "/"
    versions: dict[str, str] = {}
    folders = {folder_of(address) for address in addresses_by_split(data).values()}
    for folder in sorted(folders):
        if not storage.exists(folder):
            raise FileNotFoundError(f"no such folder: {folder}")
        for uri, version in storage.file_versions(folder).items():
            path = uri.removeprefix(folder).strip("/")
            is_read = path.lower().endswith((*IMAGE_SUFFIXES, *LABEL_SUFFIXES))
            if is_read and not is_hidden(path) and not uri.startswith(own_files):
                versions[uri] = version
    return versions


def folder_of(address: str) -> str:
    """Return the folder of ``FOLDER`` or ``FOLDER#SPLIT``."""
    address = storage.absolute_uri(address)
    folder, mark, _ = address.rpartition("#")
    if not mark or storage.exists(address):
        folder = address
    return folder.rstrip("/") or "/"


def write_listing(step_folder: str, versions: Mapping[str, str]) -> None:
    """Write a listing into the folder of the images step."""
    columns = {"uri": list(versions), "version": list(versions.values())}
    uri = storage.join(step_folder, LISTING_FILE)
    storage.write_table(uri, pa.table(columns, schema=LISTING))


def read_listing(step_folder: str) -> dict[str, str] | None:
    """Read the listing in the folder of the images step; None if there is none."""
    uri = storage.join(step_folder, LISTING_FILE)
    if not storage.exists(uri):
        return None
    table = storage.read_table(uri)
    uris: Iterable[str] = table["uri"].to_pylist()
    return dict(zip(uris, table["version"].to_pylist(), strict=True))


def compare_listings(old: Mapping[str, str], new: Mapping[str, str]) -> FileChanges:
    """Return what is new, gone and changed in ``new``."""
    return FileChanges(
        new=tuple(sorted(new.keys() - old.keys())),
        gone=tuple(sorted(old.keys() - new.keys())),
        changed=tuple(
            sorted(uri for uri in old.keys() & new.keys() if old[uri] != new[uri])
        ),
    )
