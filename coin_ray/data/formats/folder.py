"""The folder that a data set is read from: its files by path, split lists and images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

from coin_ray import storage
from coin_ray.data.file_kinds import IMAGE_SUFFIXES, is_hidden
from coin_ray.errors import InputError

SHOWN_PATHS = 3

T = TypeVar("T")


@dataclass(frozen=True)
class DatasetFolder:
    """A folder and one of its splits ("": all); ``uris`` maps each path below the
    folder to its URI.
    """

    root: str
    split: str
    uris: Mapping[str, str]

    @classmethod
    def open(cls, address: str) -> DatasetFolder:
        """List the files of ``FOLDER`` or ``FOLDER#SPLIT``, without hidden ones and
        previews. Raises InputError if there is no such folder.
        """
        address = storage.absolute_uri(address)
        root, mark, split = address.rpartition("#")
        if not mark or storage.exists(address):
            root, split = address, ""
        root = root.rstrip("/") or "/"
        if not storage.exists(root):
            raise InputError(f"no such folder: {root}")
        bare_root = _without_scheme(root)
        start = len(bare_root) + 1 if bare_root else 0
        uris = {_without_scheme(uri)[start:]: uri for uri in storage.list_files(root)}
        visible = {path: uri for path, uri in uris.items() if not is_hidden(path)}
        return cls(root, split, visible)

    def list_paths(self, folder: str, *suffixes: str) -> list[str]:
        """List the paths below ``folder`` ("": all) that end in one of ``suffixes``
        (none: any), in upper or lower case, sorted.
        """
        prefix = folder and f"{folder}/"
        paths = [path for path in self.uris if path.startswith(prefix)]
        if suffixes:
            paths = [path for path in paths if path.lower().endswith(suffixes)]
        return sorted(paths)

    def paths_by_stem(self, folder: str, *suffixes: str) -> dict[str, str]:
        """Return the paths below ``folder`` by their part between folder and suffix:
        ``a/1`` of ``JPEGImages/a/1.jpg``.
        """
        start = len(folder) + 1
        paths = self.list_paths(folder, *suffixes)
        return {strip_suffix(path[start:]): path for path in paths}

    def first_folder(self, *candidates: str) -> str:
        """Return the first of the folders that holds a file; "" if none does."""
        return next((name for name in candidates if name in self._folders), "")

    @cached_property
    def _folders(self) -> set[str]:
        folders: set[str] = set()
        for path in self.uris:
            parent = path.rpartition("/")[0]
            while parent and parent not in folders:
                folders.add(parent)
                parent = parent.rpartition("/")[0]
        return folders

    @cached_property
    def _images_by_name(self) -> dict[str, list[str]]:
        paths_by_name: dict[str, list[str]] = {}
        for path in self.list_paths("", *IMAGE_SUFFIXES):
            paths_by_name.setdefault(path.rpartition("/")[2], []).append(path)
        return paths_by_name

    def find_image(self, name: str, *folders: str) -> str | None:
        """Return the path of the image that labels call ``name``: in one of
        ``folders``, or the only image with this file name; None if there is none.

        Raises InputError if several images have the name.
        """
        for folder in folders:
            path = f"{folder}/{name}" if folder else name
            if path in self.uris:
                return path
        candidates = self._images_by_name.get(name.rpartition("/")[2], [])
        if len(candidates) > 1:
            candidates = [path for path in candidates if path.endswith(f"/{name}")]
        if len(candidates) > 1:
            raise InputError(
                f"{self.root}: labels name the image {name}, which may be any of"
                f" {', '.join(candidates[:SHOWN_PATHS])}"
            )
        return candidates[0] if candidates else None

    def select_split(self, splits: Mapping[str, T], description: str) -> list[T]:
        """Return what belongs to the folder's split, or to every split if it has none.
        Raises InputError listing the existing splits.
        """
        if not self.split:
            return list(splits.values())
        if self.split not in splits:
            raise InputError(
                f"{self.root} has no {description} for {self.split!r}; it has"
                f" {', '.join(sorted(splits)) or 'none'}"
            )
        return [splits[self.split]]

    def read_lines(self, path: str) -> list[str]:
        """Read the lines of a UTF-8 text. Raises InputError for other bytes."""
        try:
            text = storage.read_bytes(self.uris[path]).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            uri = self.uris[path]
            raise InputError(f"{uri} is not text in UTF-8: {error}") from None
        return text.splitlines()

    def read_image_list(self, path: str, images: Mapping[str, str]) -> list[str]:
        """Read the names in an image list; a line that is a key of ``images`` is a
        name as it stands.

        In the list of one class, 1, 0 or -1 follows each name; -1 means that the class
        is not in the image, which is left out.
        """
        names = []
        for line in self.read_lines(path):
            name, words = line.strip(), line.split()
            if not words:
                continue
            if name in images:
                names.append(name)
            elif words[-1] in ("0", "1"):
                names.append(" ".join(words[:-1]) or name)
            elif words[-1] != "-1":
                names.append(name)
        return names


def strip_suffix(path: str) -> str:
    """Return the path without the suffix of its file name."""
    folder, slash, name = path.rpartition("/")
    return folder + slash + (name.rpartition(".")[0] or name)


def _without_scheme(uri: str) -> str:
    return (uri.partition("://")[2] or uri).strip("/")
