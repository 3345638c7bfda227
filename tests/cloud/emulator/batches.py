"""Batch endpoints before the providers of single requests: each request of a job is
answered, and billed, by the provider when the job ends.

``state["polls"]``: how often a job is "running" before it ends (default 1);
``state["end"]``: ``completed``, ``expired`` (the second half of the requests is not
processed) or ``failed``; ``state["edit"]``: changes the custom ids of the results.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
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
            jobs = [_openai_job(call, job_id) for job_id in _store(call, "jobs")]
            return Reply(200, {"data": jobs, "has_more": False}, billed=False)
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


def _openai_job(call: Call, job_id: str) -> dict[str, Any]:
    job = _store(call, "jobs")[job_id]
    number = job_id.rpartition("/")[2]
    status = job["end"] or "in_progress"
    errors = {"data": [{"code": "invalid", "message": "the file is not valid"}]}
    return {
        "id": job_id,
        "status": status,
        "created_at": CREATED,
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
            jobs = [_router_job(call, job_id) for job_id in _store(call, "jobs")]
            return Reply(200, {"data": jobs}, billed=False)
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
    described["results"] = [
        json.loads(line)
        for errors in (False, True)
        for line in _openai_lines(job["results"], errors).splitlines()
    ]
    return described


def anthropic(provider: Provider) -> Provider:
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
            names = [name.replace("/", "_") for name in _store(call, "jobs")]
            jobs = [_anthropic_job(call, name) for name in names]
            return Reply(200, {"data": jobs}, billed=False)
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
        "created_at": "2030-03-17T17:46:40Z",
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


def gemini(provider: Provider) -> Provider:
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
            jobs = [_gemini_job(call, job_id) for job_id in _store(call, "jobs")]
            return Reply(200, {"operations": jobs}, billed=False)
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
            "createTime": "2030-03-17T17:46:40Z",
            "output": {"inlinedResponses": {"inlinedResponses": responses}},
        },
    }
