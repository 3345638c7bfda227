"""Finds a job that a killed run created and did not note, in all pages of the service's
listing.

What is not found counts as never created, and is asked again: a listing that could not be
read to its end is therefore an error, never "not found".
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

from coin_ray.cloud.batch.formats import BatchFormat, BatchJob, JobPage, Send
from coin_ray.errors import CloudError, ProtocolError, Throttled

CLOCK_DIFFERENCE = 120.0
"""Seconds that a service's clock may be behind."""
PAGES_MAX = 2000
LISTING_ATTEMPTS = 5
LISTING_PAUSE = 5.0
"""Seconds before a page that failed is read again; they double each time."""

Sleep = Callable[[float], Awaitable[None]]


async def search_jobs(
    endpoint: BatchFormat,
    send: Send,
    sleep: Sleep,
    label: str,
    count: int,
    since: float,
    known: Sequence[str],
) -> list[BatchJob]:
    """Return the jobs that ``find_jobs`` matches, from as many pages as it takes: to the
    labelled job, to jobs created before ``since``, or to the end.

    Raises ``Transient`` if a page can't be read, and ``ProtocolError`` if the pages have
    no end.
    """
    jobs: list[BatchJob] = []
    cursors = {""}
    cursor = ""
    while True:
        page = await _read_page(endpoint, send, sleep, cursor)
        jobs += page.jobs
        matches = find_jobs(jobs, label, count, since, known)
        is_labelled = any(job.label == label for job in matches)
        if is_labelled or not page.next_cursor:
            return matches
        if endpoint.newest_first and _is_older(page.jobs, since):
            return matches
        cursor = page.next_cursor
        if cursor in cursors or len(cursors) >= PAGES_MAX:
            raise ProtocolError(
                f"the service's listing of jobs has no end: page {len(cursors) + 1} is"
                f" named {cursor[:40]!r}. Whether a killed run created a job with"
                f" {count} images is unknown, so nothing is asked again"
            )
        cursors.add(cursor)


def find_jobs(
    jobs: Sequence[BatchJob], label: str, count: int, since: float, known: Sequence[str]
) -> list[BatchJob]:
    """Return the job with this label or, where the service keeps no labels, all with so
    many requests that were created after ``since`` and whose id is not ``known``.
    """
    for job in jobs:
        if job.label and job.label == label:
            return [job]
    return [
        job
        for job in jobs
        if not job.label
        and job.job_id not in known
        and job.count in (count, -1)
        and (not job.created or job.created >= since - CLOCK_DIFFERENCE)
    ]


def _is_older(jobs: Sequence[BatchJob], since: float) -> bool:
    """Return whether all jobs of a page were created before ``since``."""
    before = since - CLOCK_DIFFERENCE
    return bool(jobs) and all(0 < job.created < before for job in jobs)


async def _read_page(
    endpoint: BatchFormat, send: Send, sleep: Sleep, cursor: str
) -> JobPage:
    """Return one page of the listing, read again after an error that may pass."""
    pause = LISTING_PAUSE
    for attempt in range(1, LISTING_ATTEMPTS + 1):
        try:
            return await endpoint.list_jobs(send, cursor)
        except CloudError as failure:
            error = failure
        if not error.retryable or attempt == LISTING_ATTEMPTS:
            break
        seconds = error.retry_after if isinstance(error, Throttled) else None
        await sleep(max(pause, seconds or 0.0))
        pause *= 2
    raise type(error)(
        "the service's jobs can't be listed, so whether a killed run created one is"
        f" unknown and nothing is asked again: {error}"
    ) from None
