"""Opening of the journal below a URI: files on a disk, or objects in an object store."""

from __future__ import annotations

from coin_ray import storage
from coin_ray.cloud.journal.base import Journal
from coin_ray.cloud.journal.object_store import ObjectJournal
from coin_ray.cloud.journal.segments import SegmentJournal


def open_journal(uri: str, run: str = "") -> Journal:
    """Open the journal at ``uri``, created if it is absent. Reads what all writers have
    stored there.

    ``run``: name of the run whose calls it will record: letters, digits and hyphens.
    """
    uri = storage.absolute_uri(uri)
    if "://" in uri and not uri.startswith("file://"):
        return ObjectJournal(uri, run)
    folder = uri.removeprefix("file://")
    return storage.wait_for_storage(lambda: SegmentJournal(folder, run), folder)
