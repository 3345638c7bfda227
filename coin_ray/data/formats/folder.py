"""The folder that a data set is read from: its files by path, split lists and images."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeVar
from urllib.parse import parse_qs, unquote, urlsplit

from coin_ray import storage
from coin_ray.data.file_kinds import IMAGE_SUFFIXES, is_hidden
from coin_ray.errors import InputError

IMAGE_FOLDERS = frozenset(
    [
        "images",
        "image",
        "imgs",
        "img",
        "data",
        "jpegimages",
        "photos",
        "photo",
        "pictures",
        "leftimg8bit",
    ]
)
"""Folder names that say nothing about which images are inside."""
SPLIT_WORD = re.compile(
    r"(?:(train)(?:ing)?|(val)(?:id(?:ation)?)?|(test)(?:ing)?)[-_]?(\d*)"
)
SHOWN_PATHS = 3

T = TypeVar("T")


@dataclass(frozen=True)
class DatasetFolder:
    """A folder and one of its splits ("": all); ``uris`` maps each path below the
    folder to its URI. Readers add to ``read_paths`` the label files they understand.
    """

    root: str
    split: str
    uris: Mapping[str, str]
    read_paths: set[str] = field(default_factory=set)

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

    @cached_property
    def _sorted_paths(self) -> list[str]:
        return sorted(self.uris)

    def list_paths(self, folder: str, *suffixes: str) -> list[str]:
        """List the paths below ``folder`` ("": all) that end in one of ``suffixes``
        (none: any), in upper or lower case, sorted.
        """
        prefix = folder and f"{folder}/"
        paths = [path for path in self._sorted_paths if path.startswith(prefix)]
        if suffixes:
            paths = [path for path in paths if path.lower().endswith(suffixes)]
        return paths

    def list_images(self, folder: str = "") -> list[str]:
        """List the paths of images below ``folder``."""
        return self.list_paths(folder, *IMAGE_SUFFIXES)

    def first_folder(self, *candidates: str) -> str:
        """Return the first of the folders that holds a file; "" if none does."""
        return next((name for name in candidates if name in self._folders), "")

    @cached_property
    def _folders(self) -> set[str]:
        folders: set[str] = set()
        for path in self._sorted_paths:
            parent = path.rpartition("/")[0]
            while parent and parent not in folders:
                folders.add(parent)
                parent = parent.rpartition("/")[0]
        return folders

    @cached_property
    def _paths_by_key(self) -> dict[str, list[str]]:
        return group_by_key(self._sorted_paths)

    @cached_property
    def _images_by_name(self) -> dict[str, list[str]]:
        paths_by_name: dict[str, list[str]] = {}
        for path in self.list_images():
            name = match_key(path.rpartition("/")[2])
            for key in {name, strip_suffix(name)}:
                paths_by_name.setdefault(key, []).append(path)
        return paths_by_name

    def find_path(self, path: str) -> str | None:
        """Return the file at ``path``, or the only one that differs in case or in how
        its letters are composed; None if there is none. Raises InputError for several.
        """
        if path in self.uris:
            return path
        candidates = self._paths_by_key.get(match_key(path), [])
        if len(candidates) > 1:
            raise self._ambiguous(path, candidates)
        return candidates[0] if candidates else None

    def find_image(self, name: str, *folders: str, split: str = "") -> str | None:
        """Return the path of the image that labels of ``split`` call ``name``: in one
        of ``folders``, or the only image with this file name that is not in the folder
        of another split; None if there is none.

        Case, blanks at the ends, backslashes, percent signs, URLs and composed letters
        need not agree. Raises InputError if several images have the name.
        """
        for folder in folders:
            path = f"{folder}/{name}" if folder else name
            if path in self.uris:
                return path
        plain_name = plain_path(name)
        for folder in folders:
            path = f"{folder}/{plain_name}" if folder else plain_name
            found = self.find_path(path) if plain_name else None
            if found is not None:
                return found
        return self._find_by_file_name(plain_name, split)

    def _find_by_file_name(self, name: str, split: str) -> str | None:
        folder, _, file_name = name.rpartition("/")
        candidates = [
            path
            for path in self._images_by_name.get(match_key(file_name), [])
            if _may_hold(path, folder, split)
        ]
        if len(candidates) > 1:
            endings = (f"/{name}", match_key(f"/{name}"))
            same_case = [path for path in candidates if path.endswith(endings[0])]
            any_case = [p for p in candidates if match_key(p).endswith(endings[1])]
            candidates = same_case or any_case or candidates
        if len(candidates) > 1:
            raise self._ambiguous(name, candidates)
        return candidates[0] if candidates else None

    def _ambiguous(self, name: str, candidates: Sequence[str]) -> InputError:
        return InputError(
            f"{self.root}: labels name the image {name}, which may be any of"
            f" {', '.join(candidates[:SHOWN_PATHS])}"
        )

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

    def match_labels(
        self, images: Iterable[str], labels: Mapping[str, str]
    ) -> tuple[dict[str, str], list[str]]:
        """Return the label file of each image that has one, and the keys of
        ``labels`` without an image. ``labels``: by the path of the image without
        suffix; case and composed letters need not agree.

        Raises InputError if several images would share a label file.
        """
        images_by_stem: dict[str, list[str]] = {}
        for path in images:
            images_by_stem.setdefault(strip_suffix(path), []).append(path)
        stems_by_key = group_by_key(images_by_stem)
        label_of_image: dict[str, str] = {}
        unmatched = []
        # labels that match exactly are paired first
        for stem in sorted(labels, key=lambda stem: stem not in images_by_stem):
            is_exact = stem in images_by_stem
            stems = [stem] if is_exact else stems_by_key.get(match_key(stem), [])
            paths = [path for name in stems for path in images_by_stem[name]]
            if not is_exact:
                paths = [path for path in paths if path not in label_of_image]
            if len(paths) > 1:
                raise InputError(
                    f"{self.uris[labels[stem]]} may be of any of"
                    f" {', '.join(paths[:SHOWN_PATHS])}; rename the others"
                )
            if paths:
                label_of_image[paths[0]] = labels[stem]
            else:
                unmatched.append(stem)
        return label_of_image, unmatched

    def read_lines(self, path: str) -> list[str]:
        """Read the lines of a UTF-8 text. Raises InputError for other bytes."""
        try:
            text = storage.read_bytes(self.uris[path]).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            uri = self.uris[path]
            raise InputError(f"{uri} is not text in UTF-8: {error}") from None
        return text.splitlines()

    def read_image_list(self, path: str, names: Iterable[str]) -> list[str]:
        """Read the names in an image list; a line that is one of ``names`` is a name
        as it stands.

        In the list of one class, 1, 0 or -1 follows each name; -1 means that the class
        is not in the image, which is left out.
        """
        known_names = frozenset(names)
        listed_names = []
        for line in self.read_lines(path):
            name, words = line.strip(), line.split()
            if not words:
                continue
            if name in known_names:
                listed_names.append(name)
            elif words[-1] in ("0", "1"):
                listed_names.append(" ".join(words[:-1]) or name)
            elif words[-1] != "-1":
                listed_names.append(name)
        return list(dict.fromkeys(listed_names))

    def select_listed(
        self, list_folder: str, images: Sequence[str], image_folder: str
    ) -> tuple[list[str], list[str]]:
        """Return the images that the list of the split below ``list_folder`` names, and
        the names without an image; all images without a split.
        """
        lists = {
            strip_suffix(path.removeprefix(f"{list_folder}/")): path
            for path in self.list_paths(list_folder, ".txt")
        }
        self.read_paths.update(lists.values())
        if not self.split:
            return list(images), []
        start = len(image_folder) + 1
        image_of_name = {strip_suffix(path[start:]): path for path in images}
        names_by_key = group_by_key(image_of_name)
        [path] = self.select_split(lists, f"list {list_folder}/*.txt")
        listed_images, missing = [], []
        for name in self.read_image_list(path, image_of_name):
            keys = (match_key(name), match_key(strip_suffix(name.rpartition("/")[2])))
            candidates = [name] if name in image_of_name else names_by_key.get(keys[0])
            candidates = candidates or names_by_key.get(keys[1]) or []
            if len(candidates) > 1:
                raise self._ambiguous(name, candidates)
            if candidates:
                listed_images.append(image_of_name[candidates[0]])
            else:
                missing.append(f"{image_folder}/{name}")
        return list(dict.fromkeys(listed_images)), missing


def strip_suffix(path: str) -> str:
    """Return the path without the suffix of its file name."""
    folder, slash, name = path.rpartition("/")
    return folder + slash + (name.rpartition(".")[0] or name)


def match_key(text: str) -> str:
    """Return the text that is equal for names which differ only in case or in how
    letters are composed.
    """
    return text.lower() if text.isascii() else _unicode_key(text)


def _unicode_key(text: str) -> str:
    folded = unicodedata.normalize("NFC", text).casefold()
    return unicodedata.normalize("NFC", folded)


def group_by_key(names: Iterable[str]) -> dict[str, list[str]]:
    """Group names that have the same ``match_key``."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(match_key(name), []).append(name)
    return groups


def plain_path(name: str) -> str:
    """Return the path in a name as labels write it: a URL, a path of Windows, a link of
    Label Studio.
    """
    text = name.strip().replace("\\", "/")
    if "://" in text or "?d=" in text:
        url = urlsplit(text)
        linked_path = parse_qs(url.query).get("d", [""])[0]
        text = linked_path or unquote(url.path)
    elif "%" in text:
        text = unquote(text)
    text = re.sub(r"^[A-Za-z]:/", "", text)
    return "/".join(part for part in text.split("/") if part not in ("", "."))


def split_of_folder(name: str) -> tuple[str, str] | None:
    """Return which split a folder name means, with its year: train, val or test; None
    for other names.
    """
    match = SPLIT_WORD.fullmatch(name.lower())
    if match is None:
        return None
    return match[1] or match[2] or match[3], match[4]


def is_other_split(folder_name: str, split: str) -> bool:
    """Tell whether the name of a folder means another split than ``split``."""
    expected, actual = split_of_folder(split), split_of_folder(folder_name)
    if expected is None or actual is None:
        return False
    years = {expected[1], actual[1]} - {""}
    return expected[0] != actual[0] or len(years) > 1


def _may_hold(path: str, folder: str, split: str) -> bool:
    """Tell whether the image at ``path`` can be one that labels of ``split`` name with
    this ``folder`` before the file name.
    """
    folders = path.split("/")[:-1]
    named_folders = folder.split("/") if folder else []
    if any(is_other_split(name, split) for name in folders):
        return folders[-len(named_folders) :] == named_folders
    if not named_folders:
        return True
    if folders and match_key(folders[-1]) == match_key(named_folders[-1]):
        return True
    return all(name.lower() in IMAGE_FOLDERS or name == split for name in folders)


def _without_scheme(uri: str) -> str:
    return (uri.partition("://")[2] or uri).strip("/")
