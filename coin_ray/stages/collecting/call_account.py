"""The one account of a collection's calls, from the journal: what was made, what was
answered before, and what may be billed without an answer on record.

It covers every process that worked for the run, killed ones too, so it can say more than
the parts of the collection: a part is written after its answers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypedDict

import pyarrow as pa

from coin_ray.cloud.journal.base import IMAGE_ID_DIGITS, CallAccount
from coin_ray.cloud.journal.opening import open_journal

MAX_NAMED_IMAGES = 5
"""Images that the line about unanswered calls names."""


class CallMetrics(TypedDict):
    """Calls of a run, as the metrics of its collection record them."""

    made: int
    """Calls with an answer on record."""
    cached: int
    """Images whose answer was on record before the run began."""
    failed: int
    maybe_billed: int
    """Calls that were sent and have no answer on record."""
    cost_usd: float
    """Of made calls and of those that may be billed."""
    root_calls: int
    """Calls of all runs below the root, those that may be billed included."""
    root_usd: float


@dataclass(frozen=True)
class RunAccount:
    """The calls of one run, and of all runs below its root."""

    run: CallAccount = field(default_factory=CallAccount)
    root: CallAccount = field(default_factory=CallAccount)

    @classmethod
    def read(cls, journal_uri: str, run: str) -> RunAccount:
        """Read the account from the journal; ``run``: name of the collection."""
        journal = open_journal(journal_uri)
        account = cls(journal.account(run), journal.account())
        journal.close()
        return account

    def metrics(
        self, *, calls: int, usd: float, cached: int, failed: int
    ) -> CallMetrics:
        """Return the metrics. ``calls`` and ``usd``: as the collection's parts count
        them, which is more only if an older version, which recorded no runs, made them.
        """
        return CallMetrics(
            made=max(self.run.calls, calls) - self.run.unanswered,
            cached=cached,
            failed=failed,
            maybe_billed=self.run.unanswered,
            cost_usd=round(max(self.run.usd, usd), 6),
            root_calls=max(self.root.calls, calls),
            root_usd=round(max(self.root.usd, usd), 6),
        )

    def describe_unanswered(self, images: pa.Table) -> str:
        """Return which calls may be billed without an answer on record; empty if none.

        ``images``: columns ``image_id`` and ``uri``.
        """
        if not self.run.unanswered:
            return ""
        uri_by_id = {
            image_id[:IMAGE_ID_DIGITS]: uri
            for image_id, uri in zip(
                images["image_id"].to_pylist(), images["uri"].to_pylist(), strict=True
            )
        }
        names = [
            uri_by_id.get(image_id, image_id or "an unknown image").rpartition("/")[2]
            for image_id in self.run.unanswered_images
        ]
        unique_names = list(dict.fromkeys(names))
        more = len(unique_names) - MAX_NAMED_IMAGES
        suffix = f" and {more} more" if more > 0 else ""
        return (
            f"{self.run.unanswered} calls were sent and have no answer on record; they"
            f" count as spent: {', '.join(unique_names[:MAX_NAMED_IMAGES])}{suffix}"
        )


NO_CALLS = RunAccount()


def describe_calls(calls: CallMetrics) -> str:
    """Return the account as one line."""
    own = calls["made"] + calls["maybe_billed"]
    text = (
        f"{calls['made']} calls made, {calls['cached']} images answered before,"
        f" {calls['maybe_billed']} maybe billed, ${calls['cost_usd']:.2f}"
    )
    if calls["root_calls"] == own:
        return text
    return (
        f"{text}; all runs below this root: {calls['root_calls']} calls,"
        f" ${calls['root_usd']:.2f}"
    )
