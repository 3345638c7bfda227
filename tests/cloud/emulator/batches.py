"""Batch endpoints before the providers of single requests: each request of a job is
answered, and billed, by the provider when the job ends.

``state["polls"]``: how often a job is "running" before it ends (default 1);
``state["page_size"]``: most jobs of a page of the listing, newest first;
``state["results_in_job"]``: False if OpenRouter's results have pages of their own;
``state["end"]``: ``completed``, ``expired`` (the second half of the requests is not
processed) or ``failed``; ``state["edit"]``: changes the custom ids of the results.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from .app import Call, Provider, Reply

Results = list[tuple[str, Reply | None]]
CREATED = 1_900_000_000


def _store(call: Call, name: str) -> dict[str, Any]:
    store: dict[str, Any] = call.state.setdefault(name, {})
    return store


def _create(call: Call, requests: list[tuple[str, str, Any]], label: str) -> str:
    """Create a job from custom ids, paths and bodies."""
    jobs = _store(call, "jobs")
    job_id = f"batches/{len(jobs) + 1}"
    jobs[job_id] = {
        "requests": requests,
        "label": label,
        "polls": call.state.get("polls", 1),
        "end": "",
        "results": [],
        "cancelled": False,
    }
    return job_id


def add_other_jobs(state: dict[str, Any], count: int, created: int = CREATED) -> None:
    """Add jobs of somebody else, with other labels and numbers of requests."""
    jobs = state.setdefault("jobs", {})
    for number in range(count):
        jobs[f"batches/other{len(jobs)}"] = {
            "requests": [("x", "/", {})] * (50 + number % 7),
            "label": f"other {number}",
            "polls": 1,
            "end": "completed",
            "results": [],
            "cancelled": False,
            "created": created,
        }


def _page(call: Call, limit: str, cursor: str) -> tuple[list[str], bool]:
    """Return the ids of the jobs after the one that the query's ``cursor`` names, newest
    first, and whether there are more.
    """
    names = list(reversed(_store(call, "jobs")))
    after = call.params.get(cursor, "").replace("_", "/")
    start = names.index(after) + 1 if after else 0
    size = min(int(call.params[limit]), call.state.get("page_size", 100))
    return names[start : start + size], start + size < len(names)


def _iso(created: int) -> str:
    return datetime.fromtimestamp(created, UTC).isoformat()


def _advance(call: Call, job: dict[str, Any], provider: Provider) -> None:
    """Process the job's requests once it was looked at often enough."""
    if job["end"]:
        return
    if job["polls"] > 0 and not job["cancelled"]:
        job["polls"] -= 1
        return
    end = "cancelled" if job["cancelled"] else call.state.get("end", "completed")
    job["end"] = end
    if end == "failed":
        return
    requests = job["requests"]
    processed = len(requests) if end == "completed" else len(requests) // 2
    for number, (custom_id, path, body) in enumerate(requests):
        if number >= processed:
            job["results"].append((custom_id, None))
            continue
        single = replace(
            call,
            method="POST",
            path=path,
            query="",
            body=json.dumps(body).encode(),
            headers={**call.headers, "content-type": "application/json"},
        )
        reply = provider(single)
        job["results"].append((custom_id, reply))
        call.state["billed"] = call.state.get("billed", 0) + (reply.status == 200)
    edit: Callable[[Results], Results] = call.state.get("edit", lambda results: results)
    job["results"] = edit(job["results"])


def openai(provider: Provider) -> Provider:
    def answer(call: Call) -> Reply:
        if call.method == "POST" and call.path == "/files":
            files = _store(call, "files")
            lines = call.body.split(b"\r\n\r\n")[2].rpartition(b"\r\n--")[0]
            file_id = f"file-{len(files) + 1}"
            files[file_id] = lines
            return Reply(200, {"id": file_id, "purpose": "batch"}, billed=False)
        if call.method == "POST" and call.path == "/batches":
            job = call.json()
            lines = _store(call, "files")[job["input_file_id"]].splitlines()
            requests = []
            for line in map(json.loads, lines):
                path = line["url"].removeprefix("/v1")
                requests.append((line["custom_id"], path, line["body"]))
            job_id = _create(call, requests, job["metadata"]["label"])
            job = _openai_job(call, job_id)
            return Reply(200, job, billed=False)
        if call.path == "/batches":
            names, has_more = _page(call, "limit", "after")
            jobs = [_openai_job(call, job_id) for job_id in names]
            return Reply(200, _openai_page(jobs, has_more), billed=False)
        if call.path.startswith("/batches/"):
            job_id = call.path.removeprefix("/batches/").removesuffix("/cancel")
            job = _store(call, "jobs").get(job_id)
            if job is None:
                return Reply(404, {"error": {"message": "no such batch"}})
            if call.path.endswith("/cancel"):
                job["cancelled"] = True
            else:
                _advance(call, job, provider)
            return Reply(200, _openai_job(call, job_id), billed=False)
        if call.path.startswith("/files/"):
            kind, _, number = call.path.split("/")[2].partition("-")
            job = _store(call, "jobs")[f"batches/{number}"]
            lines = _openai_lines(job["results"], kind == "errors")
            return Reply(200, lines, content_type="application/jsonl", billed=False)
        return provider(call)

    return answer


def _openai_page(jobs: list[dict[str, Any]], has_more: bool) -> dict[str, Any]:
    last_id = jobs[-1]["id"] if jobs else None
    return {"data": jobs, "has_more": has_more, "last_id": last_id}


def _openai_job(call: Call, job_id: str) -> dict[str, Any]:
    job = _store(call, "jobs")[job_id]
    number = job_id.rpartition("/")[2]
    status = job["end"] or "in_progress"
    errors = {"data": [{"code": "invalid", "message": "the file is not valid"}]}
    return {
        "id": job_id,
        "status": status,
        "created_at": job.get("created", CREATED),
        "metadata": {"label": job["label"]},
        "request_counts": {"total": len(job["requests"])},
        "output_file_id": f"output-{number}" if job["results"] else None,
        "error_file_id": f"errors-{number}" if job["results"] else None,
        "errors": errors if status == "failed" else None,
    }


def _openai_lines(results: Results, errors: bool) -> bytes:
    lines = []
    for custom_id, reply in results:
        if (reply is None or reply.status != 200) != errors:
            continue
        response = None
        if reply is not None:
            response = {"status_code": reply.status, "body": json.loads(reply.body)}
        error = (
            {"code": "batch_expired", "message": "not in time"} if not reply else None
        )
        lines.append({"custom_id": custom_id, "response": response, "error": error})
    return "\n".join(map(json.dumps, lines)).encode()


def openrouter(provider: Provider) -> Provider:
    def answer(call: Call) -> Reply:
        if call.method == "POST" and call.path == "/batches":
            job = call.json()
            requests = []
            for request in job["requests"]:
                requests.append(
                    (request["custom_id"], "/chat/completions", request["body"])
                )
            job_id = _create(call, requests, "")
            return Reply(202, {"id": job_id, "status": "validating"}, billed=False)
        if call.path == "/batches":
            names, has_more = _page(call, "limit", "after")
            jobs = [{**_router_job(call, name), "results": None} for name in names]
            return Reply(200, _openai_page(jobs, has_more), billed=False)
        if call.path.endswith("/results"):
            job_id = call.path.removeprefix("/batches/").removesuffix("/results")
            return Reply(200, _router_results(call, job_id), billed=False)
        if call.path.startswith("/batches/"):
            job_id = call.path.removeprefix("/batches/")
            _advance(call, _store(call, "jobs")[job_id], provider)
            return Reply(200, _router_job(call, job_id), billed=False)
        return provider(call)

    return answer


def _router_job(call: Call, job_id: str) -> dict[str, Any]:
    job = _store(call, "jobs")[job_id]
    described = _openai_job(call, job_id)
    del described["metadata"]
    described["results"] = None
    if call.state.get("results_in_job", True):
        described["results"] = _router_lines(job["results"])
    return described


def _router_lines(results: Results) -> list[Any]:
    lines = []
    for errors in (False, True):
        lines += _openai_lines(results, errors).splitlines()
    return [json.loads(line) for line in lines]


def _router_results(call: Call, job_id: str) -> dict[str, Any]:
    lines = _router_lines(_store(call, "jobs")[job_id]["results"])
    start = int(call.params.get("cursor", "0"))
    end = start + min(int(call.params["limit"]), call.state.get("page_size", 100))
    more = end < len(lines)
    return {
        "data": lines[start:end],
        "has_more": more,
        "next_cursor": str(end) if more else None,
    }


def answer_anthropic_jobs(provider: Provider) -> Provider:
    root = "/v1/messages/batches"

    def answer(call: Call) -> Reply:
        if not call.path.startswith(root):
            return provider(call)
        if call.headers.get("anthropic-version") != "2023-06-01":
            return Reply(400, {"type": "error", "error": {"message": "no version"}})
        job_id = call.path.removeprefix(f"{root}/")
        job_id, _, action = job_id.partition("/") if "/" in job_id else (job_id, "", "")
        if call.method == "POST" and call.path == root:
            requests = [
                (r["custom_id"], "/v1/messages", r["params"])
                for r in call.json()["requests"]
            ]
            job_id = _create(call, requests, "").replace("/", "_")
            return Reply(200, _anthropic_job(call, job_id), billed=False)
        if call.path == root:
            names, has_more = _page(call, "limit", "after_id")
            jobs = [_anthropic_job(call, name.replace("/", "_")) for name in names]
            return Reply(200, _openai_page(jobs, has_more), billed=False)
        job = _store(call, "jobs")[job_id.replace("_", "/")]
        if action == "results":
            lines = [json.dumps(_anthropic_line(*pair)) for pair in job["results"]]
            body = "\n".join(lines).encode()
            return Reply(200, body, content_type="application/x-jsonl", billed=False)
        if action == "cancel":
            job["cancelled"] = True
        else:
            _advance(call, job, provider)
        return Reply(200, _anthropic_job(call, job_id), billed=False)

    return answer


def _anthropic_job(call: Call, job_id: str) -> dict[str, Any]:
    job = _store(call, "jobs")[job_id.replace("_", "/")]
    return {
        "id": job_id,
        "type": "message_batch",
        "processing_status": "ended" if job["end"] else "in_progress",
        "request_counts": {"processing": len(job["requests"]), "succeeded": 0},
        "created_at": _iso(job.get("created", CREATED)),
    }


def _anthropic_line(custom_id: str, reply: Reply | None) -> dict[str, Any]:
    if reply is None:
        return {"custom_id": custom_id, "result": {"type": "expired"}}
    body = json.loads(reply.body)
    if reply.status == 200:
        result = {"type": "succeeded", "message": body}
    else:
        result = {"type": "errored", "error": body}
    return {"custom_id": custom_id, "result": result}


def answer_gemini_jobs(provider: Provider) -> Provider:
    def answer(call: Call) -> Reply:
        if call.path.endswith(":batchGenerateContent"):
            batch = call.json()["batch"]
            path = call.path.replace(":batchGenerateContent", ":generateContent")
            requests = [
                (r["metadata"]["key"], path, r["request"])
                for r in batch["inputConfig"]["requests"]["requests"]
            ]
            job_id = _create(call, requests, batch["displayName"])
            return Reply(200, _gemini_job(call, job_id), billed=False)
        if call.path == "/v1beta/batches":
            names, has_more = _page(call, "pageSize", "pageToken")
            jobs = [_gemini_job(call, job_id) for job_id in names]
            token = names[-1] if has_more else ""
            page = {"operations": jobs, "nextPageToken": token}
            return Reply(200, page, billed=False)
        if call.path.startswith("/v1beta/batches/"):
            job_id = call.path.removeprefix("/v1beta/").removesuffix(":cancel")
            job = _store(call, "jobs")[job_id]
            if call.path.endswith(":cancel"):
                job["cancelled"] = True
            else:
                _advance(call, job, provider)
            return Reply(200, _gemini_job(call, job_id), billed=False)
        return provider(call)

    return answer


GEMINI_ENDS = {"completed": "SUCCEEDED", "": "RUNNING"}


def _gemini_job(call: Call, job_id: str) -> dict[str, Any]:
    job = _store(call, "jobs")[job_id]
    state = GEMINI_ENDS.get(job["end"], job["end"].upper())
    responses = []
    for custom_id, reply in job["results"]:
        if reply is None:
            continue
        body = json.loads(reply.body)
        outcome = (
            {"response": body} if reply.status == 200 else {"error": body["error"]}
        )
        responses.append({"metadata": {"key": custom_id}, **outcome})
    return {
        "name": job_id,
        "metadata": {
            "state": f"BATCH_STATE_{state}",
            "displayName": job["label"],
            "createTime": _iso(job.get("created", CREATED)),
            "output": {"inlinedResponses": {"inlinedResponses": responses}},
        },
    }
