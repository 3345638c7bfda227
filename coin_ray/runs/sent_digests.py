"""Digests of images as they are sent, so that a dry run need not decode and encode every
image again. A hint for estimates: what is paid for is decided by the images themselves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress

import pyarrow as pa
from PIL import __version__ as pillow_version
from PIL import features

from coin_ray import storage

FILE = "sent_digests.parquet"
SCHEMA = pa.schema(
    [
        ("uri", pa.string()),
        ("version", pa.string()),  # size and time of change
        ("rendering", pa.string()),
        ("digest", pa.string()),  # sha256 of the image that is sent
    ]
)
DigestKey = tuple[str, str, str]
"""URI, version and rendering of an image."""


def encoder_name() -> str:
    """Return the versions of the libraries that decode and encode what is sent."""
    return f"Pillow {pillow_version} libjpeg {features.version_codec('jpg')}"


class SentDigests:
    """The digests below a root. ``versions``: size and time of change of the images'
    files by URI; other images are unknown.
    """

    def __init__(self, root: str, versions: Mapping[str, str]) -> None:
        self._uri = storage.join(root, FILE)
        self._versions = versions
        self._digests: dict[DigestKey, str] = {}
        self._is_changed = False
        with suppress(OSError, pa.ArrowInvalid):
            self._read()

    def find(self, uri: str, renderings: Sequence[str]) -> list[str] | None:
        """Return the digest of each rendering of an image; None unless all are known."""
        version = self._versions.get(uri)
        if version is None:
            return None
        digests = [self._digests.get((uri, version, name), "") for name in renderings]
        return digests if all(digests) else None

    def add(self, uri: str, renderings: Sequence[str], digests: Sequence[str]) -> None:
        """Note the digest of each rendering of an image."""
        version = self._versions.get(uri)
        if version is None:
            return
        for rendering, digest in zip(renderings, digests, strict=True):
            self._digests[uri, version, rendering] = digest
        self._is_changed = True

    def save(self) -> None:
        """Write the digests if there are new ones; a root that can't be written has
        none.
        """
        if not self._is_changed:
            return
        keys = list(self._digests)
        columns = {
            "uri": [uri for uri, _, _ in keys],
            "version": [version for _, version, _ in keys],
            "rendering": [rendering for _, _, rendering in keys],
            "digest": list(self._digests.values()),
        }
        with suppress(OSError):
            storage.write_table(self._uri, pa.table(columns, schema=SCHEMA))

    def _read(self) -> None:
        """Read the digests of files that have not changed."""
        if not storage.exists(self._uri):
            return
        table = storage.read_table(self._uri)
        columns = [table[name].to_pylist() for name in SCHEMA.names]
        for uri, version, rendering, digest in zip(*columns, strict=True):
            if self._versions.get(uri) == version:
                self._digests[uri, version, rendering] = digest
