"""The batch endpoints of language models: many requests in one job, answers within a day
at about half the price.

Each request has a custom id, by which its answer is known: the journal's key. A job has a
label, by which services that keep one find it again after a crash; others are searched by
time and number of requests.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Literal, Protocol
from urllib.parse import quote

from coin_ray.cloud.adapters.anthropic import API_VERSION
from coin_ray.cloud.adapters.parsing import (
    error_object,
    expect_list,
    expect_object,
    expect_text,
    load_json,
    raise_malformed,
    sanitize_text,
)
from coin_ray.cloud.http.connections import Reply
from coin_ray.cloud.protocol import PreparedRequest
from coin_ray.errors import ProtocolError
from coin_ray.storage import JsonObject

Send = Callable[[PreparedRequest], Awaitable[Reply]]
"""Sends a request; raises the ``CloudError`` of any status but 2xx."""
Entry = tuple[str, PreparedRequest]
"""Custom id, and the request as it would be sent alone."""
JOB_ID = re.compile(r"[\w.:/-]{1,200}")
JOBS_PER_PAGE = 100
RESULTS_PER_PAGE = 500


@dataclass(frozen=True, slots=True)
class ItemOutcome:
    """The end of one request of a job: the body of its answer, or why it has none.

    ``status``: HTTP status of the error's body; 0 if the service did not process the
    request (expired, cancelled): then it is not billed.
    """

    custom_id: str
    body: bytes = b""
    error: str = ""
    status: int = 0


@dataclass(frozen=True, slots=True)
class BatchJob:
    """A job as the service describes it. ``created``: seconds since 1970, 0 if unknown;
    ``count``: requests in it, -1 if unknown.
    """

    job_id: str
    state: Literal["running", "ended", "refused"]
    detail: str = ""
    label: str = ""
    created: float = 0.0
    count: int = -1
    description: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class JobPage:
    """One page of the account's jobs. ``next_cursor``: names the next page; empty after
    the last one.
    """

    jobs: tuple[BatchJob, ...]
    next_cursor: str = ""


class BatchFormat(Protocol):
    """One service's batch endpoint. ``newest_first``: its listing begins with the
    latest job.
    """

    @property
    def newest_first(self) -> bool: ...

    @property
    def max_requests(self) -> int: ...

    @property
    def max_bytes(self) -> int: ...

    async def create(self, send: Send, entries: Sequence[Entry], label: str) -> str:
        """Create a job and return its id."""

    async def read(self, send: Send, job_id: str) -> BatchJob:
        """Return the job as it is now."""

    async def outcomes(self, send: Send, job: BatchJob) -> list[ItemOutcome]:
        """Return what became of the requests of a job that has ended."""

    async def list_jobs(self, send: Send, cursor: str = "") -> JobPage:
        """Return one page of the account's jobs; ``cursor``: ``next_cursor`` of the
        page before it.
        """

    async def cancel(self, send: Send, job_id: str) -> None:
        """Ask the service to end the job."""


def _object(reply: Reply) -> JsonObject:
    return expect_object(load_json(reply.headers, reply.body), "the job")


def _job_id(node: Any, field: str) -> str:
    job_id = expect_text(node, field)
    if not JOB_ID.fullmatch(job_id) or ".." in job_id:
        raise_malformed(f"{field} is not an id")
    return job_id


def _cursor_page(
    listed: JsonObject, jobs: Sequence[BatchJob], cursor_field: str
) -> JobPage:
    """Return a page of ``{data, has_more, ...}``. Raises ``ProtocolError`` if there are
    more jobs, and nothing names the next page.
    """
    has_more = listed.get("has_more", False)
    if not isinstance(has_more, bool):
        raise_malformed("has_more is neither true nor false")
    if not has_more:
        return JobPage(tuple(jobs))
    cursor = listed.get(cursor_field) or (jobs[-1].job_id if jobs else None)
    return JobPage(tuple(jobs), _job_id(cursor, cursor_field))


def _json_request(path: str, body: Any) -> PreparedRequest:
    return PreparedRequest(path, json.dumps(body).encode())


def _get(path: str) -> PreparedRequest:
    return PreparedRequest(path, method="GET")


def _json_lines(body: bytes) -> Iterator[JsonObject]:
    for number, line in enumerate(body.splitlines()):
        if line.strip():
            yield expect_object(
                load_json({}, line), f"line {number + 1} of the results"
            )


def _http_outcome(custom_id: str, node: JsonObject) -> ItemOutcome:
    """Return the outcome of ``{response: {status_code, body}, error}``."""
    error = node.get("error")
    response = node.get("response")
    if isinstance(response, dict):
        status = response.get("status_code", 200)
        body = response.get("body", response)
        encoded = json.dumps(body).encode()
        if status == 200 and not error:
            return ItemOutcome(custom_id, encoded)
        text = _error_text(body) or f"status {status}"
        return ItemOutcome(custom_id, encoded, text, int(status))
    return ItemOutcome(custom_id, error=_error_text(error) or "no answer")


def _error_text(error: Any) -> str:
    if not isinstance(error, dict):
        return sanitize_text(error)
    nested = error.get("error", error)
    if not isinstance(nested, dict):
        return sanitize_text(nested)
    return sanitize_text(nested.get("code"), nested.get("type"), nested.get("message"))


@dataclass(frozen=True)
class OpenAiBatch:
    """OpenAI's: a file of requests, a job, and a file of results."""

    max_requests: int = 1000
    max_bytes: int = 90_000_000
    newest_first: bool = True

    async def create(self, send: Send, entries: Sequence[Entry], label: str) -> str:
        lines = []
        for custom_id, request in entries:
            line = {
                "custom_id": custom_id,
                "method": "POST",
                "url": "/v1/chat/completions",
                "body": json.loads(request.body),
            }
            lines.append(json.dumps(line))
        uploaded = _object(await send(_file_request("\n".join(lines).encode())))
        job = {
            "input_file_id": _job_id(uploaded.get("id"), "id of the file"),
            "endpoint": "/v1/chat/completions",
            "completion_window": "24h",
            "metadata": {"label": label},
        }
        created = _object(await send(_json_request("/batches", job)))
        return _job_id(created.get("id"), "id")

    async def read(self, send: Send, job_id: str) -> BatchJob:
        return self._job(_object(await send(_get(f"/batches/{job_id}"))))

    def _job(self, node: JsonObject) -> BatchJob:
        status = expect_text(node.get("status"), "status")
        state: Literal["running", "ended", "refused"] = "running"
        if status in ("completed", "expired", "cancelled"):
            state = "ended"
        elif status == "failed":
            state = "refused"
        errors = node.get("errors")
        details = errors.get("data") if isinstance(errors, dict) else None
        detail = status
        if isinstance(details, list) and details:
            detail = _error_text(details[0]) or status
        metadata = node.get("metadata")
        counts = node.get("request_counts")
        label = metadata.get("label") if isinstance(metadata, dict) else None
        return BatchJob(
            _job_id(node.get("id"), "id"),
            state,
            detail,
            sanitize_text(label),
            _seconds(node.get("created_at")),
            counts.get("total", -1) if isinstance(counts, dict) else -1,
            node,
        )

    async def outcomes(self, send: Send, job: BatchJob) -> list[ItemOutcome]:
        outcomes = []
        for key in ("output_file_id", "error_file_id"):
            file_id = (job.description or {}).get(key)
            if file_id is None:
                continue
            reply = await send(_get(f"/files/{_job_id(file_id, key)}/content"))
            for line in _json_lines(reply.body):
                custom_id = expect_text(line.get("custom_id"), "custom_id")
                outcomes.append(_http_outcome(custom_id, line))
        return outcomes

    async def list_jobs(self, send: Send, cursor: str = "") -> JobPage:
        after = f"&after={quote(cursor, safe='')}" if cursor else ""
        request = _get(f"/batches?limit={JOBS_PER_PAGE}{after}")
        listed = _object(await send(request))
        nodes = expect_list(listed.get("data"), "data")
        jobs = [self._job(expect_object(node, "data")) for node in nodes]
        return _cursor_page(listed, jobs, "last_id")

    async def cancel(self, send: Send, job_id: str) -> None:
        await send(_json_request(f"/batches/{job_id}/cancel", {}))


def _file_request(lines: bytes) -> PreparedRequest:
    """Return the upload of a file of requests."""
    boundary = uuid.uuid4().hex
    head = (
        f'--{boundary}\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
        f'--{boundary}\r\nContent-Disposition: form-data; name="file";'
        ' filename="requests.jsonl"\r\nContent-Type: application/jsonl\r\n\r\n'
    )
    body = head.encode() + lines + f"\r\n--{boundary}--\r\n".encode()
    return PreparedRequest("/files", body, f"multipart/form-data; boundary={boundary}")


def _seconds(node: Any) -> float:
    """Return seconds since 1970 of a number or an ISO date; 0 if it is neither."""
    if isinstance(node, (int, float)) and not isinstance(node, bool):
        return float(node)
    try:
        return datetime.fromisoformat(str(node)).timestamp()
    except ValueError:
        return 0.0


@dataclass(frozen=True)
class OpenRouterBatch:
    """OpenRouter's: requests and results inside the job, no labels."""

    max_requests: int = 1000
    max_bytes: int = 90_000_000
    newest_first: bool = True

    async def create(self, send: Send, entries: Sequence[Entry], label: str) -> str:
        bodies = [json.loads(request.body) for _, request in entries]
        job = {
            "endpoint": "/v1/chat/completions",
            "model": bodies[0].get("model", ""),
            "requests": [
                {"custom_id": custom_id, "body": body}
                for (custom_id, _), body in zip(entries, bodies, strict=True)
            ],
        }
        created = _object(await send(_json_request("/batches", job)))
        return _job_id(created.get("id"), "id")

    async def read(self, send: Send, job_id: str) -> BatchJob:
        return OpenAiBatch()._job(_object(await send(_get(f"/batches/{job_id}"))))

    async def outcomes(self, send: Send, job: BatchJob) -> list[ItemOutcome]:
        results = (job.description or {}).get("results")
        if not isinstance(results, list):
            results = await self._read_results(send, job.job_id)
        outcomes = []
        for node in results:
            result = expect_object(node, "results")
            custom_id = expect_text(result.get("custom_id"), "custom_id")
            outcomes.append(_http_outcome(custom_id, result))
        return outcomes

    async def _read_results(self, send: Send, job_id: str) -> list[Any]:
        """Return the results of a job that does not hold them, from all their pages."""
        results: list[Any] = []
        cursors = {""}
        cursor = ""
        while True:
            after = f"&cursor={quote(cursor, safe='')}" if cursor else ""
            path = f"/batches/{job_id}/results?limit={RESULTS_PER_PAGE}{after}"
            page = _object(await send(_get(path)))
            results += expect_list(page.get("data"), "data")
            if not page.get("has_more"):
                return results
            cursor = expect_text(page.get("next_cursor"), "next_cursor")
            if cursor in cursors:
                raise_malformed("next_cursor names a page that was read")
            cursors.add(cursor)

    async def list_jobs(self, send: Send, cursor: str = "") -> JobPage:
        return await OpenAiBatch().list_jobs(send, cursor)

    async def cancel(self, send: Send, job_id: str) -> None:
        raise ProtocolError("OpenRouter's jobs can't be cancelled by this client")


@dataclass(frozen=True)
class AnthropicBatch:
    """Anthropic's: requests inside the job, results as a file, no labels."""

    max_requests: int = 1000
    max_bytes: int = 90_000_000
    path: str = "/v1/messages/batches"
    newest_first: bool = True

    def _with_version(self, request: PreparedRequest) -> PreparedRequest:
        return replace(request, headers={"anthropic-version": API_VERSION})

    async def create(self, send: Send, entries: Sequence[Entry], label: str) -> str:
        requests = [
            {"custom_id": custom_id, "params": json.loads(request.body)}
            for custom_id, request in entries
        ]
        request = _json_request(self.path, {"requests": requests})
        created = _object(await send(self._with_version(request)))
        return _job_id(created.get("id"), "id")

    async def read(self, send: Send, job_id: str) -> BatchJob:
        request = self._with_version(_get(f"{self.path}/{job_id}"))
        return self._job(_object(await send(request)))

    def _job(self, node: JsonObject) -> BatchJob:
        status = expect_text(node.get("processing_status"), "processing_status")
        counts = node.get("request_counts")
        count = -1
        if isinstance(counts, dict):
            count = sum(n for n in counts.values() if isinstance(n, int))
        return BatchJob(
            _job_id(node.get("id"), "id"),
            "ended" if status == "ended" else "running",
            status,
            created=_seconds(node.get("created_at")),
            count=count,
            description=node,
        )

    async def outcomes(self, send: Send, job: BatchJob) -> list[ItemOutcome]:
        request = self._with_version(_get(f"{self.path}/{job.job_id}/results"))
        outcomes = []
        for line in _json_lines((await send(request)).body):
            custom_id = expect_text(line.get("custom_id"), "custom_id")
            result = expect_object(line.get("result"), "result")
            kind = expect_text(result.get("type"), "result.type")
            if kind == "succeeded":
                answer = json.dumps(expect_object(result.get("message"), "message"))
                outcomes.append(ItemOutcome(custom_id, answer.encode()))
                continue
            error = result.get("error")
            body = json.dumps(error).encode()
            status = 400 if kind == "errored" else 0
            text = _error_text(error) or kind
            outcomes.append(ItemOutcome(custom_id, body, text, status))
        return outcomes

    async def list_jobs(self, send: Send, cursor: str = "") -> JobPage:
        after = f"&after_id={quote(cursor, safe='')}" if cursor else ""
        request = _get(f"{self.path}?limit={JOBS_PER_PAGE}{after}")
        listed = _object(await send(self._with_version(request)))
        nodes = expect_list(listed.get("data"), "data")
        jobs = [self._job(expect_object(node, "data")) for node in nodes]
        return _cursor_page(listed, jobs, "last_id")

    async def cancel(self, send: Send, job_id: str) -> None:
        request = _json_request(f"{self.path}/{job_id}/cancel", {})
        await send(self._with_version(request))


@dataclass(frozen=True)
class GeminiBatch:
    """Gemini's: requests and results inside the job, which has a display name."""

    max_requests: int = 1000
    max_bytes: int = 18_000_000
    newest_first: bool = False  # the order of its listing is not documented

    async def create(self, send: Send, entries: Sequence[Entry], label: str) -> str:
        path = entries[0][1].path.replace(":generateContent", ":batchGenerateContent")
        requests = [
            {"request": json.loads(request.body), "metadata": {"key": custom_id}}
            for custom_id, request in entries
        ]
        batch = {
            "displayName": label,
            "inputConfig": {"requests": {"requests": requests}},
        }
        created = _object(await send(_json_request(path, {"batch": batch})))
        return _job_id(created.get("name"), "name")

    async def read(self, send: Send, job_id: str) -> BatchJob:
        return self._job(_object(await send(_get(f"/v1beta/{job_id}"))))

    def _job(self, node: JsonObject) -> BatchJob:
        metadata = expect_object(node.get("metadata"), "metadata")
        status = expect_text(metadata.get("state"), "metadata.state")
        outcome = status.rpartition("STATE_")[2]
        state: Literal["running", "ended", "refused"] = "running"
        if outcome in ("SUCCEEDED", "PARTIALLY_SUCCEEDED", "CANCELLED", "EXPIRED"):
            state = "ended"
        elif outcome == "FAILED":
            state = "refused"
        return BatchJob(
            _job_id(node.get("name"), "name"),
            state,
            _error_text(node.get("error")) or outcome.lower(),
            sanitize_text(metadata.get("displayName")),
            _seconds(metadata.get("createTime")),
            description=node,
        )

    async def outcomes(self, send: Send, job: BatchJob) -> list[ItemOutcome]:
        description = dict(job.description or {})
        metadata = description.get("metadata")
        output = metadata.get("output") if isinstance(metadata, dict) else None
        responses = (output or description.get("response") or {}).get(
            "inlinedResponses"
        )
        nodes = responses.get("inlinedResponses") if isinstance(responses, dict) else []
        outcomes = []
        for node in expect_list(nodes or [], "inlinedResponses"):
            result = expect_object(node, "inlinedResponses")
            own_metadata = expect_object(result.get("metadata"), "metadata")
            custom_id = expect_text(own_metadata.get("key"), "metadata.key")
            if "response" in result:
                body = json.dumps(result["response"]).encode()
                outcomes.append(ItemOutcome(custom_id, body))
                continue
            error = result.get("error")
            body = json.dumps({"error": error}).encode()
            code = error_object(body, "error").get("code")
            status = code if isinstance(code, int) and code >= 400 else 400
            outcomes.append(ItemOutcome(custom_id, body, _error_text(error), status))
        return outcomes

    async def list_jobs(self, send: Send, cursor: str = "") -> JobPage:
        token = f"&pageToken={quote(cursor, safe='')}" if cursor else ""
        request = _get(f"/v1beta/batches?pageSize={JOBS_PER_PAGE}{token}")
        listed = _object(await send(request))
        nodes = expect_list(listed.get("operations") or [], "operations")
        jobs = [self._job(expect_object(node, "operations")) for node in nodes]
        token = listed.get("nextPageToken") or ""
        return JobPage(tuple(jobs), expect_text(token, "nextPageToken"))

    async def cancel(self, send: Send, job_id: str) -> None:
        await send(_json_request(f"/v1beta/{job_id}:cancel", {}))


def batch_format(service: str, host: str) -> BatchFormat:
    """Return the batch endpoint of a service at an address."""
    if service == "anthropic":
        return AnthropicBatch()
    if service == "gemini":
        return GeminiBatch()
    is_router = host == "openrouter.ai" or host.endswith(".openrouter.ai")
    return OpenRouterBatch() if is_router else OpenAiBatch()
