"""Batch endpoints: what is asked, billed and on record, whatever happens to jobs and runs."""

from __future__ import annotations

import asyncio
import copy
import json
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from coin_ray.cloud.accounts import governor_limits
from coin_ray.cloud.answer import Answer
from coin_ray.cloud.batch.batch_pass import BatchCounts, BatchPass
from coin_ray.cloud.batch.formats import (
    AnthropicBatch,
    BatchFormat,
    BatchJob,
    GeminiBatch,
    OpenAiBatch,
    OpenRouterBatch,
    batch_format,
)
from coin_ray.cloud.batch.job_search import find_jobs
from coin_ray.cloud.client import CloudClient
from coin_ray.cloud.governor import Governor, LocalGovernor
from coin_ray.cloud.journal.opening import open_journal
from coin_ray.commands.journal import drop_job
from coin_ray.config import Cloud
from coin_ray.data.canonical import CanonicalImage, canonical_image
from coin_ray.errors import (
    BadRequest,
    BudgetExhausted,
    CloudError,
    ConfigError,
    ProtocolError,
    Transient,
)

from .cases import CLASSES
from .conftest import ProcessKilled
from .emulator import PROVIDERS, Emulator, Fault, scene
from .emulator.app import TOKEN
from .emulator.batches import add_other_jobs

PRICE = 0.02


@dataclass(frozen=True)
class Service:
    """A service, its provider in the emulator, and its batch endpoint."""

    name: str
    service: str
    provider: str
    format: BatchFormat


SERVICES = [
    Service("openai", "openai-vlm", "openai-batch", OpenAiBatch()),
    Service("openrouter", "openai-vlm", "openrouter-batch", OpenRouterBatch()),
    Service("anthropic", "anthropic", "anthropic-batch", AnthropicBatch()),
    Service("gemini", "gemini", "gemini-batch", GeminiBatch()),
]
VARIABLES = {
    "openai-vlm": "OPENAI_API_KEY",
    "anthropic": "ANTHROPIC_API_KEY",
    "gemini": "GEMINI_API_KEY",
}
each_service = pytest.mark.parametrize("service", SERVICES, ids=lambda s: s.name)


def _images(count: int) -> list[CanonicalImage]:
    return [
        canonical_image(
            scene([0], [(10, 10, 60 + number, 60)], (200, 80), "JPEG"), 4096
        )
        for number in range(count)
    ]


class Runs:
    """Runs of one service over one journal: each has a client of its own."""

    def __init__(self, service: Service, folder: Path) -> None:
        self.service = service
        self.emulator = Emulator(PROVIDERS)
        self.state = self.emulator.state(service.provider)
        self._folder = str(folder)

    def client(self, **settings: Any) -> CloudClient:
        options: dict[str, Any] = {"usd_per_call": PRICE, "rate": 1e5, "batch": True}
        if self.service.service == "openai-vlm":
            options["coordinates"] = "xyxy_1000"
        cloud = Cloud(service=self.service.service, **(options | settings))  # type: ignore[arg-type]
        return CloudClient(
            cloud,
            CLASSES,
            self.emulator.url(self.service.provider),
            open_journal(self._folder),
            LocalGovernor(Governor(governor_limits(cloud))),
            transport=self.emulator.transport(),
        )

    def batch(
        self,
        images: Sequence[CanonicalImage],
        stop: threading.Event | None = None,
        on_sleep: Callable[[], None] = lambda: None,
        change: Callable[[CloudClient], None] = lambda _: None,
        **settings: Any,
    ) -> BatchCounts:
        async def run() -> BatchCounts:
            async def sleep(_: float) -> None:
                on_sleep()
                await asyncio.sleep(0)

            client = self.client(**settings)
            change(client)
            batch_pass = BatchPass(
                client, stop, sleep=sleep, endpoint=self.service.format
            )
            try:
                return await batch_pass.run(images)
            finally:
                await client.aclose()

        return asyncio.run(run())

    def answers(
        self, images: Sequence[CanonicalImage], **settings: Any
    ) -> list[Answer]:
        async def run() -> list[Answer]:
            client = self.client(**settings)
            answers = [await client.answer(image) for image in images]
            await client.aclose()
            return answers

        return asyncio.run(run())

    @property
    def billed(self) -> int:
        """Return how many images the service billed in jobs."""
        return int(self.state.get("billed", 0))

    @property
    def jobs(self) -> int:
        return len(self.state.get("jobs", {}))

    def spent(self) -> tuple[int, float]:
        journal = open_journal(self._folder)
        calls, usd = journal.spent()
        unanswered = journal.account().unanswered
        journal.close()
        assert unanswered == 0
        return calls, usd


@pytest.fixture
def build_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Service], Runs]:
    for variable in VARIABLES.values():
        monkeypatch.setenv(variable, TOKEN)
    return lambda service: Runs(service, tmp_path)


@each_service
def test_images_are_answered_at_half_the_price(
    service: Service, build_runs: Callable[[Service], Runs]
) -> None:
    runs, images = build_runs(service), _images(7)
    counts = runs.batch(images)
    assert (counts.submitted, counts.answered, counts.failed) == (7, 7, 0)
    assert (runs.billed, runs.jobs) == (7, 1)
    assert runs.spent() == (7, pytest.approx(7 * PRICE / 2))
    single = runs.emulator.billed[service.provider]
    answers = runs.answers(images)
    assert {answer.status for answer in answers} == {"cached"}
    for number, answer in enumerate(answers):
        assert answer.raw is not None
        (box,) = answer.raw.boxes.tolist()
        assert box == pytest.approx([10, 10, 60 + number, 60], abs=0.6)
    assert runs.emulator.billed[service.provider] == single == 0
    again = runs.batch(images)
    assert (again.submitted, runs.jobs) == (0, 1)


def _kill_after_create(client: CloudClient) -> None:
    """Kill the run when it notes the id of its first job."""
    put_all, calls = client.journal.put_all, iter(range(9))

    def put(answers: Any) -> None:
        if next(calls) == 1:
            raise ProcessKilled
        put_all(answers)

    client.journal.put_all = put  # type: ignore[method-assign]


@each_service
def test_a_run_killed_after_a_job_was_created(
    service: Service, build_runs: Callable[[Service], Runs]
) -> None:
    """The job's id was not noted: the next run finds the job."""
    runs, images = build_runs(service), _images(5)

    with pytest.raises(ProcessKilled):
        runs.batch(images, change=_kill_after_create)
    assert (runs.jobs, runs.billed) == (1, 0)
    counts = runs.batch(images)
    assert (counts.submitted, counts.answered) == (0, 5)
    assert (runs.jobs, runs.billed) == (1, 5)
    assert runs.spent() == (5, pytest.approx(5 * PRICE / 2))


def test_another_job_that_may_be_the_lost_one(
    build_runs: Callable[[Service], Runs],
) -> None:
    """Anthropic keeps no labels: what can't be told apart is not asked again."""
    (service,) = [service for service in SERVICES if service.name == "anthropic"]
    runs, images = build_runs(service), _images(5)
    with pytest.raises(ProcessKilled):
        runs.batch(images, change=_kill_after_create)
    (job_id,) = runs.state["jobs"]
    other = copy.deepcopy(runs.state["jobs"][job_id])
    runs.state["jobs"]["msgbatch/other"] = other
    with pytest.raises(Transient, match="2 that may be it"):
        runs.batch(images)
    assert runs.jobs == 2
    assert open_journal(runs._folder).spent() == (5, pytest.approx(5 * PRICE / 2))
    del runs.state["jobs"]["msgbatch/other"]
    assert runs.batch(images).answered == 5
    assert (runs.jobs, runs.billed) == (1, 5)


LISTING_PATHS = ("/batches", "/v1/messages/batches", "/v1beta/batches")


def _listings(runs: Runs) -> int:
    """Return how many pages of the listing were read."""
    calls = runs.emulator.calls
    return sum(call.method == "GET" and call.path in LISTING_PATHS for call in calls)


@each_service
def test_a_lost_job_on_the_third_page_of_the_listing(
    service: Service, build_runs: Callable[[Service], Runs]
) -> None:
    runs, images = build_runs(service), _images(5)
    with pytest.raises(ProcessKilled):
        runs.batch(images, change=_kill_after_create)
    add_other_jobs(runs.state, 250)
    counts = runs.batch(images)
    assert (counts.submitted, counts.answered) == (0, 5)
    assert (runs.jobs, runs.billed) == (251, 5)
    assert runs.spent() == (5, pytest.approx(5 * PRICE / 2))
    assert _listings(runs) == 3


def _kill_before_create(client: CloudClient) -> None:
    async def send(*_: Any) -> Any:
        raise ProcessKilled

    client.connections.send = send  # type: ignore[method-assign]


@each_service
def test_a_search_ends_at_jobs_older_than_the_lost_one(
    service: Service, build_runs: Callable[[Service], Runs]
) -> None:
    """Gemini documents no order: its listing is read to the end."""
    runs, images = build_runs(service), _images(5)
    with pytest.raises(ProcessKilled):
        runs.batch(images, change=_kill_before_create)
    add_other_jobs(runs.state, 450, created=1_000_000_000)
    counts = runs.batch(images)
    assert (counts.submitted, counts.answered) == (5, 5)
    assert runs.billed == 5
    # it is searched for twice before it counts as never created
    assert _listings(runs) == (10 if service.name == "gemini" else 2)


@each_service
def test_a_listing_that_fails_on_its_second_page(
    service: Service, build_runs: Callable[[Service], Runs]
) -> None:
    runs, images = build_runs(service), _images(5)
    with pytest.raises(ProcessKilled):
        runs.batch(images, change=_kill_after_create)
    add_other_jobs(runs.state, 250)
    fault = Fault(500, body={"error": {"message": "oops"}})
    runs.emulator.script([None, *[fault] * 5])
    with pytest.raises(Transient, match=r"unknown and nothing is asked again: .*500"):
        runs.batch(images)
    assert (runs.jobs, runs.billed) == (251, 0)
    runs.emulator.script([None, *[fault] * 4])
    assert runs.batch(images).answered == 5
    assert (runs.jobs, runs.billed) == (251, 5)
    assert runs.spent() == (5, pytest.approx(5 * PRICE / 2))


@each_service
def test_a_listing_without_end(
    service: Service, build_runs: Callable[[Service], Runs]
) -> None:
    runs, images = build_runs(service), _images(5)
    with pytest.raises(ProcessKilled):
        runs.batch(images, change=_kill_before_create)
    add_other_jobs(runs.state, 2)
    listed = (b'"has_more": false', b'"has_more": true')
    if service.name == "gemini":
        listed = (b'"nextPageToken": ""', b'"nextPageToken": "batches/other0"')
    runs.emulator.script([Fault(edit=lambda body: body.replace(*listed))] * 9)
    with pytest.raises(ProtocolError, match="nothing is asked again"):
        runs.batch(images)
    assert (runs.jobs, runs.billed) == (2, 0)


@each_service
def test_a_job_that_is_listed_late(
    service: Service, build_runs: Callable[[Service], Runs]
) -> None:
    """A gateway may answer, or a run be killed, before the service lists the job."""
    runs, images = build_runs(service), _images(5)
    with pytest.raises(ProcessKilled):
        runs.batch(images, change=_kill_after_create)
    hidden = dict(runs.state["jobs"])
    runs.state["jobs"].clear()
    waits = iter(range(1000))

    def list_after_a_minute() -> None:
        if next(waits) == 60:
            runs.state["jobs"].update(hidden)

    counts = runs.batch(images, on_sleep=list_after_a_minute)
    assert (counts.submitted, counts.answered) == (0, 5)
    assert (runs.jobs, runs.billed) == (1, 5)


@each_service
def test_a_job_that_the_service_no_longer_shows(
    service: Service, build_runs: Callable[[Service], Runs]
) -> None:
    runs, images = build_runs(service), _images(5)
    runs.state["polls"] = 3

    def kill() -> None:
        raise ProcessKilled

    with pytest.raises(ProcessKilled):
        runs.batch(images, on_sleep=kill)
    (job_id,) = runs.state["jobs"]
    job_id = job_id.replace("/", "_") if service.name == "anthropic" else job_id
    runs.emulator.script([Fault(404, body={"error": {"message": "no such job"}})])
    message = f"the job {job_id} with 5 images can't be read.*coin-ray journal drop"
    with pytest.raises(BadRequest, match=message):
        runs.batch(images)
    assert runs.jobs == 1
    journal = open_journal(runs._folder)
    assert drop_job(journal, "") == 0
    assert drop_job(journal, job_id) == 5
    assert journal.spent() == (5, pytest.approx(5 * PRICE / 2))
    journal.close()
    assert runs.batch(images).submitted == 5
    assert open_journal(runs._folder).spent() == (10, pytest.approx(5 * PRICE))


def test_results_of_openrouter_on_pages(
    build_runs: Callable[[Service], Runs],
) -> None:
    (service,) = [service for service in SERVICES if service.name == "openrouter"]
    runs, images = build_runs(service), _images(7)
    runs.state.update(results_in_job=False, page_size=3)
    assert runs.batch(images).answered == 7
    assert runs.spent() == (7, pytest.approx(7 * PRICE / 2))


@each_service
def test_an_answer_that_a_complete_job_lacks_counts_as_paid(
    service: Service, build_runs: Callable[[Service], Runs]
) -> None:
    runs, images = build_runs(service), _images(4)
    runs.state["edit"] = lambda results: results[1:]
    counts = runs.batch(images)
    assert (counts.answered, counts.failed) == (3, 1)
    assert open_journal(runs._folder).spent() == (4, pytest.approx(4 * PRICE / 2))


@each_service
def test_a_run_killed_before_a_job_was_created(
    service: Service, build_runs: Callable[[Service], Runs]
) -> None:
    runs, images = build_runs(service), _images(5)

    with pytest.raises(ProcessKilled):
        runs.batch(images, change=_kill_before_create)
    assert runs.jobs == 0
    counts = runs.batch(images)
    assert (counts.submitted, counts.answered, runs.jobs) == (5, 5, 1)
    assert runs.billed == 5
    assert runs.spent() == (5, pytest.approx(5 * PRICE / 2))


@each_service
def test_a_run_killed_while_it_waits(
    service: Service, build_runs: Callable[[Service], Runs]
) -> None:
    runs, images = build_runs(service), _images(5)
    runs.state["polls"] = 3

    def kill() -> None:
        raise ProcessKilled

    with pytest.raises(ProcessKilled):
        runs.batch(images, on_sleep=kill)
    # a run without batches waits for the job too, and asks for nothing singly
    statuses = [answer.status for answer in runs.answers(images, batch=False)]
    assert statuses == ["error"] * 5
    assert runs.emulator.billed[service.provider] == 0
    counts = runs.batch(images, batch=False)
    assert counts.answered == 5
    assert (runs.jobs, runs.billed) == (1, 5)
    answers = runs.answers(images, batch=False)
    assert {answer.status for answer in answers} == {"cached"}
    assert runs.spent() == (5, pytest.approx(5 * PRICE / 2))


@each_service
def test_a_job_that_expires_is_named_and_not_billed(
    service: Service, build_runs: Callable[[Service], Runs]
) -> None:
    runs, images = build_runs(service), _images(6)
    runs.state["end"] = "expired"
    counts = runs.batch(images)
    assert (counts.answered, counts.failed) == (3, 3)
    assert runs.spent() == (3, pytest.approx(3 * PRICE / 2))
    answers = runs.answers(images)
    assert [answer.status for answer in answers] == ["cached"] * 3 + ["error"] * 3
    assert answers[5].error is not None
    assert "no answer by cloud.batch" in answers[5].error
    assert "expired" in answers[5].error or "ended" in answers[5].error
    runs.state["end"] = "completed"
    again = runs.batch(images)
    assert (again.submitted, again.answered) == (3, 3)
    assert (runs.billed, runs.jobs) == (6, 2)
    assert runs.spent() == (6, pytest.approx(6 * PRICE / 2))


def test_a_job_that_is_refused_is_named(
    build_runs: Callable[[Service], Runs],
) -> None:
    runs, images = build_runs(SERVICES[0]), _images(3)
    runs.state["end"] = "failed"
    counts = runs.batch(images)
    assert (counts.answered, counts.failed) == (0, 3)
    assert runs.spent() == (0, 0)
    (error,) = {answer.error for answer in runs.answers(images)}
    assert error is not None
    assert "was refused: invalid, the file is not valid" in error


@each_service
def test_answers_with_other_ids_are_not_used(
    service: Service,
    build_runs: Callable[[Service], Runs],
    caplog: pytest.LogCaptureFixture,
) -> None:
    runs, images = build_runs(service), _images(4)

    def edit(results: Any) -> Any:
        (_, first), second, *others = results
        return [("x" * 64, first), second, second, *others]

    runs.state["edit"] = edit
    counts = runs.batch(images)
    assert (counts.answered, counts.failed) == (3, 1)
    assert "2 answers with ids that were not sent, or twice" in caplog.text
    answers = runs.answers(images)
    assert [answer.status for answer in answers] == ["error"] + ["cached"] * 3


@each_service
def test_a_field_that_the_model_refuses_is_left_out_of_the_next_job(
    service: Service, build_runs: Callable[[Service], Runs]
) -> None:
    runs, images = build_runs(service), _images(4)
    provider = runs.emulator._providers[service.provider]
    name = {"openai-vlm": "response_format", "anthropic": "output_config"}.get(
        service.service, "responseSchema"
    )

    def refuse(results: Any) -> Any:
        from .emulator.app import Reply

        message = f"{name} is not supported with this model"
        error = {"error": {"message": message, "code": 400}}
        if name in json.dumps(next(iter(runs.state["jobs"].values()))["requests"]) and (
            len(runs.state["jobs"]) == 1
        ):
            runs.state["billed"] = 0
            return [(key, Reply(400, error)) for key, _ in results]
        return results

    assert provider is not None
    runs.state["edit"] = refuse
    counts = runs.batch(images)
    assert counts.answered == 4
    assert (runs.jobs, runs.billed) == (2, 4)
    second = list(runs.state["jobs"].values())[1]
    assert name not in json.dumps(second["requests"])
    assert runs.spent() == (4, pytest.approx(4 * PRICE / 2))


@each_service
def test_jobs_are_cancelled_with_the_run_on_request(
    service: Service, build_runs: Callable[[Service], Runs]
) -> None:
    runs, images = build_runs(service), _images(6)
    runs.state["polls"] = 10_000 if service.name != "openrouter" else 3
    stop = threading.Event()
    counts = runs.batch(images, stop, stop.set, batch_on_stop="cancel")
    expected = 6 if service.name == "openrouter" else 3  # which can't be cancelled
    assert (counts.answered, counts.failed) == (expected, 6 - expected)
    assert runs.billed == expected
    assert runs.spent() == (expected, pytest.approx(expected * PRICE / 2))


def test_a_stopped_run_leaves_its_jobs_to_the_next(
    build_runs: Callable[[Service], Runs],
) -> None:
    runs, images = build_runs(SERVICES[0]), _images(6)
    runs.state["polls"] = 2
    stop = threading.Event()
    counts = runs.batch(images, stop, stop.set)
    assert (counts.submitted, counts.answered) == (6, 0)
    assert runs.batch(images).answered == 6
    assert (runs.jobs, runs.billed) == (1, 6)


def test_a_budget_ends_the_run_when_its_jobs_have_ended(
    build_runs: Callable[[Service], Runs],
) -> None:
    runs, images = build_runs(SERVICES[0]), _images(6)
    with pytest.raises(BudgetExhausted, match=r"cloud\.max_usd=0\.04"):
        runs.batch(images, max_usd=2 * PRICE)  # four images at half the price
    assert runs.spent() == (4, pytest.approx(2 * PRICE))
    with pytest.raises(BudgetExhausted, match=r"cloud\.max_calls=5"):
        runs.batch(images, max_calls=5)
    assert runs.spent()[0] == runs.billed == 5
    assert runs.batch(images).answered == 1


@pytest.mark.parametrize("policy", ["stop", "warn"])
def test_another_model_answers_a_job(
    build_runs: Callable[[Service], Runs],
    caplog: pytest.LogCaptureFixture,
    policy: str,
) -> None:
    """The images of the job stay answered, whatever the policy."""
    runs, images = build_runs(SERVICES[0]), _images(4)
    runs.batch(images[:2], on_version_change=policy)

    def name_another_model(results: Any) -> Any:
        return [
            (key, replace(reply, payload={**reply.payload, "model": "another"}))
            for key, reply in results
        ]

    runs.state["edit"] = name_another_model
    message = "answers with another model: 'another'"
    if policy == "stop":
        with pytest.raises(BadRequest, match=message):
            runs.batch(images, on_version_change=policy)
    else:
        runs.batch(images, on_version_change=policy)
        assert message in caplog.text
    assert (runs.jobs, runs.billed) == (2, 4)
    assert runs.spent() == (4, pytest.approx(4 * PRICE / 2))
    answers = runs.answers(images, batch=False)
    assert {answer.status for answer in answers} == {"cached"}


def test_as_many_requests_a_job_as_the_service_takes(
    build_runs: Callable[[Service], Runs],
) -> None:
    small = Service("openai", "openai-vlm", "openai-batch", OpenAiBatch(2))
    runs = build_runs(small)
    assert runs.batch([*_images(5), *_images(5)]).answered == 5
    assert (runs.jobs, runs.billed) == (3, 5)


@pytest.mark.parametrize(
    ("fault", "kind", "calls"),
    [
        (Fault(401, body={"error": {"message": "bad key"}}), CloudError, 0),
        (Fault(400, body={"error": {"message": "no"}}), BadRequest, 0),
        (Fault(429, body={"error": {"message": "slow"}}), CloudError, 0),
        (Fault(500, body={"error": {"message": "oops"}}), CloudError, 3),
    ],
)
def test_a_job_that_is_not_created(
    build_runs: Callable[[Service], Runs], fault: Fault, kind: Any, calls: int
) -> None:
    """Only an answer that leaves it open may have created a job."""
    runs, images = build_runs(SERVICES[0]), _images(3)
    runs.emulator.script([None, fault])
    with pytest.raises(kind, match="a batch of 3 images"):
        runs.batch(images)
    journal_calls = open_journal(runs._folder).spent()[0]
    assert journal_calls == calls
    assert runs.batch(images).answered == 3
    assert runs.billed == 3
    assert runs.spent() == (3, pytest.approx(3 * PRICE / 2))


def test_jobs_without_labels_are_found_by_time_and_number() -> None:
    jobs = [
        BatchJob("a", "running", created=500, count=3),
        BatchJob("b", "running", created=1000, count=4),
        BatchJob("c", "running", created=1000, count=3),
    ]
    assert find_jobs(jobs, "x", 3, 900, []) == [jobs[2]]
    assert find_jobs(jobs, "x", 3, 900, ["c"]) == []
    assert find_jobs([*jobs, jobs[2]], "x", 3, 900, []) == [jobs[2], jobs[2]]
    labelled = BatchJob("d", "running", label="x")
    assert find_jobs([*jobs, labelled], "x", 9, 0, []) == [labelled]


def test_endpoints_by_address() -> None:
    assert isinstance(batch_format("openai-vlm", "api.openai.com"), OpenAiBatch)
    assert isinstance(batch_format("openai-vlm", "openrouter.ai"), OpenRouterBatch)
    assert isinstance(batch_format("gemini", "x"), GeminiBatch)
    assert isinstance(batch_format("anthropic", "x"), AnthropicBatch)
    with pytest.raises(ConfigError, match=r"cloud\.batch is for openai-vlm"):
        Cloud(service="dino-x", batch=True)
