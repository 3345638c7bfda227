"""What a service replied about an image, on record: durable before it is read, tasks
beside the answers, unreadable bodies set apart.

All of this waits for a disk or an object store: an event loop calls it in a thread.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from coin_ray.cloud.http.connections import Reply
from coin_ray.cloud.journal.base import AnswerRecord, Journal
from coin_ray.cloud.journal.keys import TASK, answer_key, answer_key_from_digest
from coin_ray.cloud.protocol import (
    Adapter,
    Frame,
    Pending,
    PreparedRequest,
    Query,
    RawDetections,
)
from coin_ray.cloud.services import fitted, side_max
from coin_ray.config import Cloud
from coin_ray.data.canonical import CanonicalImage
from coin_ray.errors import (
    AuthError,
    CloudError,
    ImageRejected,
    ProtocolError,
    Throttled,
    Transient,
)


class TaskLost(Transient):
    """The service no longer knows the task, or the task failed for no lasting reason:
    only asking anew helps.
    """


@dataclass(slots=True)
class Call:
    """One image under way, and what it has cost so far."""

    key: str
    image: CanonicalImage
    """As it is sent."""
    seconds: float
    """What is left of the deadline, once no wait for the first place counts any more.
    """
    patient: bool = True
    give_up_at: float = 0.0
    started: float = 0.0
    task: Pending | None = None
    """A task of the service's that is under way and on record: then nothing is asked
    anew."""
    task_time: float = 0.0
    """Seconds since 1970."""
    lost: int = 0
    attempts: int = 0
    calls: int = 0
    latency_ms: float = 0.0

    @property
    def frame(self) -> Frame:
        return Frame(
            (self.image.width, self.image.height),
            self.image.original,
            self.image.visible_size,
            self.image.mirrored,
        )

    @property
    def idempotency_key(self) -> str:
        """Another one after a lost task, or a service that remembers keys would name
        the same task again.
        """
        return f"{self.key}-{self.lost}" if self.lost else self.key


class Replies:
    """Reads a service's replies by its adapter and keeps them in the journal.
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
        self._config, self._adapter, self._query = config, adapter, query
        self._capabilities = adapter.capabilities
        self._max_side = side_max(config, self._capabilities)
        self._journal, self._endpoint, self._wall_clock = journal, endpoint, wall_clock

    def key(self, image: CanonicalImage) -> str:
        """The journal's key."""
        try:
            return self._key(fitted(image, self._capabilities, self._max_side))
        except ImageRejected:
            return self._key(image)

    def key_of_file(self, image_id: str) -> str:
        """The journal's key of a file that is sent as it is, by the sha256 of its
        bytes; nothing needs to be read.
        """
        return answer_key_from_digest(
            self._capabilities.name,
            self._endpoint,
            self._query,
            self._max_side,
            image_id,
        )

    def begun(self, image: CanonicalImage, patient: bool = True) -> Call:
        """Raises ``ImageRejected``."""
        sent = fitted(image, self._capabilities, self._max_side)
        return Call(self._key(sent), sent, self._config.deadline, patient)

    def request(self, call: Call) -> PreparedRequest:
        """How to ask about the image."""
        return self._adapter.encode(call.image, self._query)

    def on_record(self, call: Call) -> RawDetections | None:
        """The answer in the journal. A task there that has no answer yet is noted in
        ``call``.
        """
        for place in (call.key, _task_key(call.key)):
            record = self._journal.get(place)
            if record is None:
                continue
            try:
                found = self._decode(
                    call, place, record.body, {"content-type": record.content_type}
                )
            except CloudError:
                continue
            if not isinstance(found, Pending):
                if place != call.key:
                    self._journal.put(call.key, record)
                return found
            self._set_aside(call, place, record)
            call.task, call.task_time = found, record.time
        return None

    def received(self, call: Call, reply: Reply) -> RawDetections | Pending:
        """What a 2xx reply says; kept before anything reads it. What names a task is
        kept beside the answers, not among them.
        """
        task = _task_key(call.key)
        place = task if self._capabilities.asynchronous else call.key
        record = self._record(call, reply)
        self._journal.put(place, record)
        found = self._decode(call, place, reply.body, reply.headers)
        if isinstance(found, Pending):
            self._set_aside(call, place, record)
            call.task = found
        elif place == task:
            self._journal.put(call.key, record)
        return found

    def polled(
        self, call: Call, reply: Reply, latency_ms: float
    ) -> RawDetections | Pending:
        """What a 2xx reply to a poll says. Read before it is kept: most say "not yet",
        and one that is lost here can be polled again.
        """
        try:
            found = self._adapter.decode(
                reply.headers, reply.body, self._query, call.frame
            )
        except ProtocolError as error:
            self._journal.quarantine(call.key, reply.body, str(error))
            raise
        except (Throttled, AuthError):
            raise  # said of the poll, not of the task
        except CloudError as error:
            self.forget_task(call, str(error))
            if error.retryable:
                raise TaskLost(
                    f"the service's task failed: {error}", may_have_billed=True
                ) from None
            raise
        if not isinstance(found, Pending):
            call.latency_ms = latency_ms
            self._journal.put(call.key, self._record(call, reply))
        return found

    def forget_task(self, call: Call, reason: str) -> None:
        """The task on record will give no result."""
        record = self._journal.get(_task_key(call.key))
        if record is not None:
            self._journal.quarantine(_task_key(call.key), record.body, reason)
        call.task = None
        call.lost += 1

    def _key(self, sent: CanonicalImage) -> str:
        return answer_key(
            self._capabilities.name,
            self._endpoint,
            self._query,
            self._max_side,
            sent.data,
        )

    def _decode(
        self, call: Call, place: str, body: bytes, headers: Mapping[str, str]
    ) -> RawDetections | Pending:
        """What a 2xx body in the journal says; if that is an error, it is no answer and
        never found there again.
        """
        try:
            found = self._adapter.decode(headers, body, self._query, call.frame)
            if isinstance(found, Pending) and found.request is None:
                raise ProtocolError(
                    "the service took the image on as a task that it does not name",
                    may_have_billed=True,
                )
            return found
        except CloudError as error:
            self._journal.quarantine(place, body, str(error))
            raise

    def _set_aside(self, call: Call, place: str, record: AnswerRecord) -> None:
        """A service that answers at once sometimes, and sometimes with a task: the task
        leaves the answer's place.
        """
        if place == call.key:
            self._journal.put(_task_key(call.key), record)
            self._journal.quarantine(place, record.body, "a task, not an answer")

    def _record(self, call: Call, reply: Reply) -> AnswerRecord:
        cost = call.calls * self._config.usd_per_call
        return AnswerRecord(
            reply.body,
            reply.headers["content-type"],
            call.attempts,
            call.latency_ms,
            cost,
            self._wall_clock(),
            self._capabilities.name,
            self._query.model,
        )


def _task_key(key: str) -> str:
    return key + TASK
