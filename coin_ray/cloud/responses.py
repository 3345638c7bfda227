"""A service's replies in the journal: durable before they are read, tasks beside the
answers, unreadable bodies in quarantine.

All methods wait for a disk or an object store: an event loop calls them in a thread.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace

from coin_ray.cloud.call import Call, TaskLost
from coin_ray.cloud.http.connections import Reply
from coin_ray.cloud.journal.base import AnswerRecord, Journal
from coin_ray.cloud.journal.keys import BATCH, TASK, answer_key_parts
from coin_ray.cloud.model_version import VersionWatch
from coin_ray.cloud.protocol import (
    Adapter,
    Pending,
    PreparedRequest,
    Query,
    RawDetections,
)
from coin_ray.cloud.services import longest_side, shrink_to_limits
from coin_ray.config import Cloud
from coin_ray.data.canonical import CanonicalImage
from coin_ray.errors import (
    AuthError,
    CloudError,
    ImageRejected,
    ProtocolError,
    Throttled,
    Transient,
    UnusableBoxes,
)

QUICK_BYTES = 262_144
"""Images and replies of up to this size are processed between two turns of the event
loop; a thread costs more."""


class ReplyJournal:
    """Decodes a service's replies by its adapter and keeps them in the journal.
    ``endpoint``: as in ``answer_key``.
    """

    def __init__(
        self,
        config: Cloud,
        adapter: Adapter,
        query: Query,
        journal: Journal,
        endpoint: str,
        wall_clock: Callable[[], float],
    ) -> None:
        self._config = config
        self._adapter = adapter
        self._query = query
        self._capabilities = adapter.capabilities
        self._max_side = longest_side(config, self._capabilities)
        self._journal = journal
        self._endpoint = endpoint
        self._wall_clock = wall_clock
        self._key_parts = answer_key_parts(
            self._capabilities.name, endpoint, query, self._max_side
        )
        self.versions = VersionWatch(
            self._capabilities.name,
            journal.latest_version(self._capabilities.name, query.model),
            config.on_version_change,
        )

    def key(self, image: CanonicalImage) -> str:
        """Return the journal's key."""
        return self.key_of_unchanged_file(self.sent_digest(image))

    def sent_digest(self, image: CanonicalImage) -> str:
        """Return the hexadecimal sha256 of the image file that is sent."""
        with suppress(ImageRejected):
            image = shrink_to_limits(image, self._capabilities, self._max_side)
        return hashlib.sha256(image.data).hexdigest()

    def key_of_unchanged_file(self, image_id: str) -> str:
        """Return the journal's key of a file that is sent as it is, by the sha256 of
        its bytes, without reading it.
        """
        before, after = self._key_parts
        return hashlib.sha256(f"{before}{image_id}{after}".encode()).hexdigest()

    def is_quick(self, image: CanonicalImage) -> bool:
        """Return whether ``start_call`` and ``encode_request`` take less time for this
        image than a thread costs: nothing has to be made smaller.
        """
        limits = self._capabilities
        is_small = len(image.data) <= min(QUICK_BYTES, limits.max_bytes)
        return is_small and max(image.width, image.height) <= self._max_side

    def may_have_recorded(self, call: Call) -> bool:
        """Return whether ``find_recorded`` has to read the journal."""
        if self._config.batch or self._journal.has(call.key + BATCH):
            return True
        return self._journal.has(call.key) or self._journal.has(_task_key(call.key))

    def start_call(self, image: CanonicalImage, wait_for_breaker: bool = True) -> Call:
        """Return a call for the image as it is sent. Raises ``ImageRejected``."""
        sent = shrink_to_limits(image, self._capabilities, self._max_side)
        key = self._key_of_sent(sent)
        return Call(key, sent, self._config.deadline, wait_for_breaker)

    def encode_request(self, call: Call) -> PreparedRequest:
        """Return the request for the image, without the fields that were refused."""
        query = self._query
        call.refused_fields = query.refused_fields
        return self._adapter.encode(call.image, query)

    def is_in_batch(self, key: str) -> bool:
        """Return whether an image is in a job of a batch endpoint that is not settled."""
        record = self._journal.get(key + BATCH)
        return record is not None and json.loads(record.body)["state"] == "submitted"

    def check_not_in_batch(self, call: Call) -> None:
        """Raise ``Transient`` for an image that may not be asked singly: it is in a job,
        or the run asks by jobs alone.
        """
        record = self._journal.get(call.key + BATCH)
        job = json.loads(record.body) if record is not None else {}
        if job.get("state") == "submitted":
            raise Transient(
                f"the image is in the job {job['job']}, which has not ended: run the same"
                " command again to wait for it"
            )
        if self._config.batch:
            reason = job.get("reason", "it was in no job")
            raise Transient(
                f"no answer by cloud.batch: {reason}; the same command asks again,"
                " without --cloud.batch singly"
            )

    @property
    def refused_fields(self) -> frozenset[str]:
        """Return the fields that the service has refused in this run."""
        return self._query.refused_fields

    def leave_out_field(self, field_name: str) -> None:
        """Leave a field that the service refuses out of all further requests."""
        refused_fields = self._query.refused_fields | {field_name}
        self._query = replace(self._query, refused_fields=refused_fields)

    def find_recorded(self, call: Call) -> RawDetections | None:
        """Return the answer in the journal. A task there that has no answer yet is
        noted in ``call``. Raises ``UnusableBoxes`` for an answer that is not asked for
        again, as it would be the same.
        """
        for key in (call.key, _task_key(call.key)):
            record = self._journal.get(key)
            if record is None:
                continue
            headers = {"content-type": record.content_type}
            try:
                decoded = self._decode(call, key, record.body, headers)
            except UnusableBoxes:
                raise
            except CloudError:
                continue
            if not isinstance(decoded, Pending):
                run = self._journal.run
                call.paid_by_this_run = bool(run) and record.run == run
                if key != call.key:
                    self._journal.put(call.key, record)
                return decoded
            self._move_task(call, key, record)
            call.task = decoded
            call.task_time = record.time
        return None

    def receive_stored(
        self, call: Call, reply: Reply, record: AnswerRecord
    ) -> RawDetections | Pending:
        """Decode a 2xx reply that was stored under ``storage_key``. A task is stored
        beside the answers, not among them.
        """
        key = self.storage_key(call)
        decoded = self._decode(call, key, reply.body, reply.headers)
        if isinstance(decoded, Pending):
            self._move_task(call, key, record)
            call.task = decoded
        elif key != call.key:
            self._journal.put(call.key, record)
        return decoded

    def decode_answer(self, call: Call, reply: Reply) -> RawDetections | None:
        """Decode a 2xx reply without a wait; None if it is no answer that can be used
        at once: ``receive_stored`` is for those.
        """
        if self._capabilities.asynchronous or len(reply.body) > QUICK_BYTES:
            return None
        try:
            decoded = self._adapter.decode(
                reply.headers, reply.body, self._query, call.frame
            )
        except CloudError:
            return None
        return None if isinstance(decoded, Pending) else decoded

    def storage_key(self, call: Call) -> str:
        """Return the key under which a reply is stored before it is decoded."""
        if self._capabilities.asynchronous:
            return _task_key(call.key)
        return call.key

    def receive_poll(
        self, call: Call, reply: Reply, latency_ms: float
    ) -> RawDetections | Pending:
        """Decode a 2xx reply to a poll and store it if it is an answer. It is decoded
        first: most say "not yet", and one that is lost here can be polled again.
        """
        try:
            decoded = self._adapter.decode(
                reply.headers, reply.body, self._query, call.frame
            )
        except UnusableBoxes:
            self._journal.put(call.key, self.new_record(call, reply))
            raise
        except ProtocolError as error:
            self._journal.quarantine(call.key, reply.body, str(error))
            raise
        except (Throttled, AuthError):
            raise  # about the poll, not about the task
        except CloudError as error:
            self.forget_task(call, str(error))
            if error.retryable:
                raise TaskLost(
                    f"the service's task failed: {error}", may_have_billed=True
                ) from None
            raise
        if not isinstance(decoded, Pending):
            call.latency_ms = latency_ms
            self._journal.put(call.key, self.new_record(call, reply))
        return decoded

    def forget_task(self, call: Call, reason: str) -> None:
        """Quarantine the task on record, which will give no result."""
        task_key = _task_key(call.key)
        record = self._journal.get(task_key)
        if record is not None:
            self._journal.quarantine(task_key, record.body, reason)
        call.task = None
        call.lost_tasks += 1

    def _key_of_sent(self, sent: CanonicalImage) -> str:
        digest = hashlib.sha256(sent.data).hexdigest()
        return self.key_of_unchanged_file(digest)

    def _decode(
        self, call: Call, key: str, body: bytes, headers: Mapping[str, str]
    ) -> RawDetections | Pending:
        """Decode a 2xx body in the journal; an error in it is quarantined, so that it
        is never read as an answer again. A whole answer with unusable boxes stays: it can
        be read by another label map.
        """
        try:
            decoded = self._adapter.decode(headers, body, self._query, call.frame)
            if isinstance(decoded, Pending) and decoded.request is None:
                raise ProtocolError(
                    "the service accepted the image as a task that it does not name",
                    may_have_billed=True,
                )
            return decoded
        except UnusableBoxes:
            raise
        except CloudError as error:
            self._journal.quarantine(key, body, str(error))
            raise

    def _move_task(self, call: Call, key: str, record: AnswerRecord) -> None:
        """Move a task that was stored under the answer's key to a key of its own, for
        services that answer at once sometimes and sometimes with a task.
        """
        if key == call.key:
            self._journal.put(_task_key(call.key), record)
            self._journal.quarantine(key, record.body, "a task, not an answer")

    def new_record(self, call: Call, reply: Reply) -> AnswerRecord:
        """Return the journal's record of a 2xx reply."""
        return AnswerRecord(
            reply.body,
            reply.headers["content-type"],
            call.attempts,
            call.latency_ms,
            call.calls * self._config.usd_per_call,
            self._wall_clock(),
            self._capabilities.name,
            self._query.model,
            version=self.versions.note(reply.body),
        )


def _task_key(key: str) -> str:
    return key + TASK
