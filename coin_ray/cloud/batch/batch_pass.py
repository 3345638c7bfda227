"""Answers images by a service's batch endpoint, before a collection asks singly.

The journal knows at any time which images are in a job: each has a record beside its
answer, written before the job is created, and replaced by the answer. A killed run finds
its jobs again and pays for no image twice. An image that is in a job is not asked singly;
one whose job gave no answer is named, and asked again by the next run.
"""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import time
import uuid
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from coin_ray.cloud.batch.formats import (
    BatchFormat,
    BatchJob,
    Entry,
    ItemOutcome,
    batch_format,
)
from coin_ray.cloud.batch.job_search import search_jobs
from coin_ray.cloud.client import CloudClient
from coin_ray.cloud.governor import DAY
from coin_ray.cloud.http.connections import NotConnected, Reply
from coin_ray.cloud.journal.base import AnswerRecord
from coin_ray.cloud.journal.keys import BATCH
from coin_ray.cloud.protocol import FieldRefused, PreparedRequest
from coin_ray.cloud.services import BATCH_PRICE_SHARE
from coin_ray.data.canonical import CanonicalImage
from coin_ray.errors import (
    BadRequest,
    BudgetExhausted,
    CloudError,
    ImageRejected,
    Transient,
    UnusableBoxes,
)

POLL_FIRST, POLL_LAST, POLL_GROWTH = 2.0, 60.0, 1.5
"""Seconds between two looks at the jobs, first and later."""
FAILED_POLLS_MAX = 10
CREATION_SECONDS = 120.0
"""Seconds after which a job that is not listed was never created: longer than a gateway
waits for the service that creates it."""
NOT_PROCESSED = ("expired", "cancelled")
"""How a job ends in which requests without an outcome were not processed."""
CREATE_SECONDS = 600.0
"""Longest time of one request."""

logger = logging.getLogger(__name__)


@dataclass
class BatchCounts:
    """What a pass did: images by what became of them."""

    submitted: int = 0
    answered: int = 0
    failed: int = 0
    jobs: int = 0
    reasons: dict[str, int] = field(default_factory=dict)


class BatchPass:
    """Answers images by jobs of one service. ``stop``: set from another thread to end the
    wait; with ``cloud.batch_on_stop cancel`` the jobs are cancelled then.
    """

    def __init__(
        self,
        client: CloudClient,
        stop: threading.Event | None = None,
        *,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        endpoint: BatchFormat | None = None,
    ) -> None:
        self._client = client
        self._config = client.config
        self._journal = client.journal
        self._replies = client.replies
        self._connections = client.connections
        self._account = client.account
        self._stop = stop or threading.Event()
        self._sleep = sleep
        self._format = endpoint or batch_format(
            self._config.service, self._connections.host
        )
        self._usd = self._config.usd_per_call * BATCH_PRICE_SHARE
        self.counts = BatchCounts()

    async def run(self, images: Iterable[CanonicalImage]) -> BatchCounts:
        """Wait for the jobs of earlier runs and, with ``cloud.batch``, for new ones with
        the images that have no answer. ``images`` may be read more than once.

        Raises the ``CloudError`` that stops a run; jobs under way stay on record. Answers
        of another model than before are such an error with ``cloud.on_version_change
        stop``; they stay on record too.
        """
        await self._recover()
        await self._wait()
        self._replies.versions.check()
        if not self._config.batch:
            return self.counts
        while not self._stop.is_set():
            refused_fields = self._replies.refused_fields
            over_budget = await self._submit_all(images)
            await self._wait()
            self._replies.versions.check()
            if over_budget is not None:
                raise over_budget
            if self._replies.refused_fields == refused_fields:
                break
        return self.counts

    async def _send(self, request: PreparedRequest) -> Reply:
        try:
            sending = self._connections.send(request)
            reply = await asyncio.wait_for(sending, CREATE_SECONDS)
        except TimeoutError:
            raise Transient(
                f"no answer in {CREATE_SECONDS:g} s", may_have_billed=True
            ) from None
        if not 200 <= reply.status < 300:
            error = self._client.adapter.classify_error(
                reply.status, reply.headers, reply.body
            )
            self._connections.explain_refusal(error)
            raise error
        return reply

    def _records(self) -> dict[str, dict[str, Any]]:
        """Return the records of images in jobs of this account, by the answer's key."""
        records = {}
        for key in self._journal.keys():  # noqa: SIM118
            if not key.endswith(BATCH):
                continue
            record = self._journal.get(key)
            description = json.loads(record.body) if record is not None else {}
            if description.get("account") == self._account:
                records[key.removesuffix(BATCH)] = description
        return records

    def _jobs_under_way(self) -> dict[str, list[str]]:
        """Return the keys of the images in each job that has an id and is not settled."""
        jobs = defaultdict(list)
        for key, record in self._records().items():
            if record["state"] == "submitted" and record["job"]:
                jobs[record["job"]].append(key)
        return jobs

    async def _recover(self) -> None:
        """Find the jobs that a killed run created without noting their ids. Raises
        ``Transient`` if several may be one of them, or the jobs can't be listed: its
        images stay paid, and are not asked again.
        """
        unnamed = defaultdict(list)
        records = self._records()
        for key, record in records.items():
            if record["state"] == "submitted" and not record["job"]:
                unnamed[record["label"]].append(key)
        known = [record["job"] for record in records.values() if record["job"]]
        for label, keys in unnamed.items():
            since = float(records[keys[0]]["time"])
            candidates = await self._search(label, len(keys), since, known)
            if not candidates:
                if not await self._wait_for_creation(since, len(keys)):
                    return
                candidates = await self._search(label, len(keys), since, known)
            if len(candidates) > 1:
                raise _ambiguous_job(candidates, len(keys))
            if not candidates:
                # it was never created: nothing was billed
                self._forget(keys)
                continue
            job = candidates[0]
            known.append(job.job_id)
            self._write_records(keys, label, job.job_id, since)

    async def _search(
        self, label: str, count: int, since: float, known: Sequence[str]
    ) -> list[BatchJob]:
        return await search_jobs(
            self._format, self._send, self._sleep, label, count, since, known
        )

    async def _wait_for_creation(self, since: float, count: int) -> bool:
        """Wait until a job that was sent at ``since`` would be listed; return False if
        the run is stopped before.
        """
        now = time.time()
        # the file of requests, then the job: each may have taken CREATE_SECONDS
        sent = min(now, since + 2 * CREATE_SECONDS)
        seconds = sent + CREATION_SECONDS - now
        if seconds > 1:
            logger.warning(
                "a job with %d images was sent and is not listed yet: it is searched for"
                " again in %.0f s",
                count,
                seconds,
            )
        while seconds > 0 and not self._stop.is_set():
            await self._sleep(min(1.0, seconds))
            seconds -= 1.0
        return not self._stop.is_set()

    def _write_records(
        self, keys: Sequence[str], label: str, job: str, moment: float
    ) -> None:
        description = {
            "account": self._account,
            "label": label,
            "job": job,
            "time": moment,
            "state": "submitted",
        }
        body = json.dumps(description).encode()
        self._journal.put_all([(key + BATCH, AnswerRecord(body)) for key in keys])

    def _forget(self, keys: Sequence[str]) -> None:
        """Remove the records of images in a job that was not billed."""
        for key in keys:
            self._journal.refund(key, self._usd, self._account)
        self._journal.drop_all([key + BATCH for key in keys])

    async def _submit_all(
        self, images: Iterable[CanonicalImage]
    ) -> BudgetExhausted | None:
        """Create jobs with the images that have no answer; return the error if the budget
        does not reach for all.
        """
        entries: list[tuple[Entry, str]] = []
        size = 0
        over_budget: BudgetExhausted | None = None
        calls, usd = self._spent()
        async for entry, image_id in self._entries(images):
            over_budget = self._over_budget(calls + 1, usd + self._usd)
            if over_budget is not None or self._stop.is_set():
                break
            calls, usd = calls + 1, usd + self._usd
            entry_size = len(entry[1].body) + 200
            is_full = (
                len(entries) >= self._format.max_requests
                or size + entry_size > self._format.max_bytes
            )
            if entries and is_full:
                await self._submit(entries)
                entries, size = [], 0
            entries.append((entry, image_id))
            size += entry_size
        if entries:
            await self._submit(entries)
        return over_budget

    async def _entries(
        self, images: Iterable[CanonicalImage]
    ) -> AsyncIterator[tuple[Entry, str]]:
        """Yield the requests about images that have no answer and are in no job; each
        question once.
        """
        keys = set()
        for image in images:
            try:
                call = await asyncio.to_thread(self._replies.start_call, image)
                if call.key in keys or self._replies.is_in_batch(call.key):
                    continue
                recorded = await asyncio.to_thread(self._replies.find_recorded, call)
            except (ImageRejected, UnusableBoxes):
                continue  # the collection names it
            if recorded is not None or call.task is not None:
                continue
            keys.add(call.key)
            request = await asyncio.to_thread(self._replies.encode_request, call)
            yield (call.key, request), image.image_id

    def _spent(self) -> tuple[int, float]:
        return self._journal.spent(self._account)

    def _over_budget(self, calls: int, usd: float) -> BudgetExhausted | None:
        config = self._config
        reason = ""
        if config.max_calls is not None and calls > config.max_calls:
            reason = f"cloud.max_calls={config.max_calls}"
        elif config.max_usd is not None and usd > config.max_usd + 1e-9:
            reason = f"cloud.max_usd={config.max_usd}"
        elif config.per_day is not None:
            today = self._journal.call_starts(self._account, time.time() - DAY)
            if len(today) + 1 > config.per_day:
                reason = f"cloud.per_day={config.per_day}"
        if not reason:
            return None
        return BudgetExhausted(
            f"{reason} does not reach for all images; raise it and run again, answers so"
            " far are kept"
        )

    async def _submit(self, entries: Sequence[tuple[Entry, str]]) -> None:
        """Create one job. Its images are on record, and count as paid, before."""
        label = uuid.uuid4().hex
        moment = time.time()
        keys = [entry[0] for entry, _ in entries]
        for (key, _), image_id in entries:
            self._journal.attempt(key, self._usd, self._account, moment, image_id)
        self._write_records(keys, label, "", moment)
        try:
            job_id = await self._format.create(
                self._send, [entry for entry, _ in entries], label
            )
        except NotConnected:
            self._forget(keys)
            raise
        except CloudError as error:
            if not error.may_have_billed:
                self._forget(keys)
            if isinstance(error, FieldRefused):
                self._replies.leave_out_field(error.field)
                return
            hint = "; the same command looks whether the service has it"
            raise type(error)(
                f"a batch of {len(keys)} images: {error}"
                f"{hint if error.may_have_billed else ''}"
            ) from None
        self._write_records(keys, label, job_id, moment)
        self.counts.submitted += len(keys)
        self.counts.jobs += 1

    async def _wait(self) -> None:
        """Wait until the jobs on record have ended, and store their answers."""
        interval = POLL_FIRST
        failures = 0
        while jobs := self._jobs_under_way():
            if self._stop.is_set() and self._config.batch_on_stop == "cancel":
                await self._cancel(jobs)
            elif self._stop.is_set():
                return
            try:
                for job_id, keys in jobs.items():
                    job = await self._read_job(job_id, len(keys))
                    if job.state != "running":
                        await self._settle(job, keys)
                        interval = POLL_FIRST
                failures = 0
            except CloudError as error:
                failures += 1
                if error.stops_run or failures >= FAILED_POLLS_MAX:
                    raise
            if not self._jobs_under_way():
                return
            await self._pause(interval)
            interval = min(POLL_LAST, interval * POLL_GROWTH)

    async def _read_job(self, job_id: str, count: int) -> BatchJob:
        """Return a job on record. Raises the ``CloudError`` of one that the service does
        not show, with what to do: its images stay paid.
        """
        try:
            return await self._format.read(self._send, job_id)
        except BadRequest as error:
            raise BadRequest(
                f"the job {job_id} with {count} images can't be read: {error}. Its"
                " images count as paid and are not asked again. If the key is of another"
                " account or project than the one that created it, give that one's; if"
                f" the job is gone, coin-ray journal drop --root ROOT {job_id} gives it"
                " up, and the next run asks, and pays, again"
            ) from None

    async def _pause(self, seconds: float) -> None:
        while seconds > 0 and not self._stop.is_set():
            await self._sleep(min(1.0, seconds))
            seconds -= 1.0
        if self._stop.is_set():
            await self._sleep(POLL_FIRST)

    async def _cancel(self, jobs: Iterable[str]) -> None:
        for job_id in jobs:
            try:
                await self._format.cancel(self._send, job_id)
            except CloudError as error:
                logger.warning("job %s can't be cancelled: %s", job_id, error)

    async def _settle(self, job: BatchJob, keys: Sequence[str]) -> None:
        """Store what became of a job's images. Answers are durable before the records go;
        ids that were not sent are named.
        """
        if job.state == "refused":
            for key in keys:
                self._fail(
                    key, f"the job {job.job_id} was refused: {job.detail}", False
                )
            return
        outcomes = await self._format.outcomes(self._send, job)
        own_keys = set(keys)
        by_key: dict[str, ItemOutcome] = {}
        strangers = []
        for outcome in outcomes:
            if outcome.custom_id in own_keys and outcome.custom_id not in by_key:
                by_key[outcome.custom_id] = outcome
            else:
                strangers.append(outcome.custom_id)
        if strangers:
            logger.warning(
                "job %s returned %d answers with ids that were not sent, or twice, which"
                " are not used: %s",
                job.job_id,
                len(strangers),
                ", ".join(strangers[:3])[:120],
            )
        self._store_answers([o for o in by_key.values() if not o.error])
        for key in keys:
            settled = by_key.get(key)
            if settled is None:
                reason = f"the job {job.job_id} ended ({job.detail}) without it"
                self._fail(key, reason, billed=job.detail not in NOT_PROCESSED)
            elif settled.error:
                self._fail_item(job, settled)

    def _store_answers(self, outcomes: Sequence[ItemOutcome]) -> None:
        records = []
        for outcome in outcomes:
            record = AnswerRecord(
                outcome.body,
                cost_usd=self._usd,
                time=time.time(),
                service=self._client.adapter.capabilities.name,
                model=self._config.model,
                version=self._replies.versions.note(outcome.body),
            )
            records.append((outcome.custom_id, record))
        self._journal.put_all(records)
        self._journal.drop_all([key + BATCH for key, _ in records])
        self.counts.answered += len(records)

    def _fail_item(self, job: BatchJob, outcome: ItemOutcome) -> None:
        """Note an image that the job has no answer for. A field that the model refuses is
        left out of the next job.
        """
        if outcome.status:
            error = self._client.adapter.classify_error(
                outcome.status, {}, outcome.body
            )
            if isinstance(error, FieldRefused):
                self._replies.leave_out_field(error.field)
                self._forget([outcome.custom_id])
                return
        reason = f"in the job {job.job_id}: {outcome.error}"
        self._fail(outcome.custom_id, reason, billed=False)

    def _fail(self, key: str, reason: str, billed: bool) -> None:
        if not billed:
            self._journal.refund(key, self._usd, self._account)
        description = {
            "account": self._account,
            "label": "",
            "job": "",
            "time": time.time(),
            "state": "failed",
            "reason": reason,
        }
        self._journal.put(key + BATCH, AnswerRecord(json.dumps(description).encode()))
        self.counts.failed += 1
        shown = reason.partition(": ")[2] or reason
        self.counts.reasons[shown] = self.counts.reasons.get(shown, 0) + 1


def _ambiguous_job(candidates: Sequence[BatchJob], count: int) -> Transient:
    ids = ", ".join(job.job_id for job in candidates[:5])
    return Transient(
        f"a killed run may have created a job with {count} images, and the service has"
        f" {len(candidates)} that may be it: {ids}. Nothing is asked again, so nothing"
        " is paid twice: end the others' jobs or wait until the service lists them no"
        " longer, then run the same command"
    )


def with_batch(client: CloudClient) -> bool:
    """Return whether images of this client may be in jobs."""
    return client.config.batch or any(
        key.endswith(BATCH)
        for key in client.journal.keys()  # noqa: SIM118
    )
