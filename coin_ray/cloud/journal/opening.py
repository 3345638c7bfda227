"""Opening of the journal below a URI: files on a disk, or objects in an object store."""

from __future__ import annotations

from coin_ray import storage
from coin_ray.cloud.journal.base import Journal
from coin_ray.cloud.journal.object_store import ObjectJournal
from coin_ray.cloud.journal.segments import SegmentJournal


def open_journal(uri: str) -> Journal:
    """Open the journal at ``uri``, created if it is absent. Reads what all writers have
    stored there.
    """
    uri = storage.absolute_uri(uri)
    if "://" in uri and not uri.startswith("file://"):
        return ObjectJournal(uri)
    return SegmentJournal(uri.removeprefix("file://"))
