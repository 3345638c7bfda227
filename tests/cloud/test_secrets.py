"""Secrets are sent and stay nowhere else: not in logs, errors, variables of tracebacks,
reprs, the journal, dumps of the configuration."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import pickle
import re
import traceback
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any, cast
from urllib.parse import quote, quote_plus

import pytest

from coin_ray.cloud.accounts import governor_limits
from coin_ray.cloud.client import CloudClient
from coin_ray.cloud.governor import Governor, LocalGovernor
from coin_ray.cloud.journal.opening import open_journal
from coin_ray.cloud.journal.record_format import HEADER, MAGIC
from coin_ray.cloud.journal.segments import SegmentJournal
from coin_ray.cloud.services import SERVICES
from coin_ray.config import Cloud, PipelineConfig, ServiceName
from coin_ray.config.presets import folder
from coin_ray.config.yaml_files import to_yaml
from coin_ray.errors import ConfigError
from coin_ray.runs import tracking

from .cases import CASES, CLASSES, SIZE, Case, Truth
from .conftest import journal_text, solid_image

LOGGERS = (
    "httpx",
    "httpcore",
    "httpcore.http11",
    "httpcore.connection",
    "botocore",
    "asyncio",
    "coin_ray",
    "h11",
    "anyio",
    "urllib3",
)
AWS = {
    "AWS_ACCESS_KEY_ID": "QKIA7Z2XW9V4TRLMBN8P",
    "AWS_SECRET_ACCESS_KEY": "q/7Z+x2=W9&kLpRtVbNmQwErTyUiOpAsDfGh",
    "AWS_SESSION_TOKEN": "zS/4+t=J8&sessionsessionsession==",
}
PREFIX_LENGTH = 8
ECHO_MARK = "what the service saw: "


@dataclass(frozen=True)
class ServiceCase:
    """A service and how it is asked."""

    case: Case

    @property
    def name(self) -> str:
        return self.case.name

    @property
    def service(self) -> ServiceName:
        name = self.case.adapter.capabilities.name
        return cast(
            "ServiceName",
            max(
                (offer for offer in SERVICES if name.startswith(offer)),
                key=len,
                default="http",
            ),
        )

    @property
    def token_env(self) -> str | None:
        """The setting; None for services whose variable is known."""
        return "MY_TOKEN" if self.service == "http" else None

    @property
    def secrets(self) -> dict[str, str]:
        """By environment variable."""
        auth = self.case.adapter.capabilities.auth
        if auth is not None and auth.sigv4:
            return AWS
        variable = self.token_env or SERVICES[self.service].token_env
        number = zlib.crc32(str(variable).encode()) % 90 + 10
        return (
            {variable: f"k{number}/Y+4=&w{number}Qz~live-0123456789abcdef"}
            if variable
            else {}
        )

    @property
    def first_replies(self) -> list[Reply]:
        """What comes before the answer: the service's health, or the name of a task."""
        capabilities = self.case.adapter.capabilities
        health = (
            [WireReply(body={"status": "ok"})]
            if capabilities.health_path is not None
            else []
        )
        return [
            *health,
            *(
                [WireReply(body=self.case.further[0])]
                if capabilities.asynchronous
                else []
            ),
        ]

    @property
    def success(self) -> WireReply:
        return WireReply(
            body=self.case.answer(
                [Truth(self.case.names["car"], (10, 10, 90, 80))], SIZE
            )
        )


PICTURE = solid_image(0, *SIZE)
SERVICE_CASES = [ServiceCase(case) for case in CASES]
HTTP = next(s for s in SERVICE_CASES if s.service == "http")


@dataclass(frozen=True)
class WireReply:
    """A reply on the wire. ``after``: how many of its bytes are sent before the
    connection is closed; ``hang``: it is never sent."""

    status: int = 200
    body: Any = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    after: int | None = None
    hang: bool = False

    def encode(self, content_type: str) -> bytes:
        body = (
            self.body
            if isinstance(self.body, bytes)
            else json.dumps(self.body).encode()
        )
        headers = {
            "Content-Type": content_type,
            "Content-Length": str(len(body)),
            **self.headers,
        }
        head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        return f"HTTP/1.1 {self.status} Reason\r\n{head}\r\n".encode() + body


Reply = WireReply | Callable[[dict[str, str]], WireReply]
"""A function gets the request's headers."""


@dataclass
class WireServer:
    """Replies in order over real connections, the last one for ever."""

    replies: Sequence[Reply]
    content_type: str = "application/json"
    requests: list[dict[str, str]] = field(default_factory=list, repr=False)

    @asynccontextmanager
    async def address(self) -> Any:
        server = await asyncio.start_server(self.serve, "127.0.0.1", 0)
        try:
            yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        finally:
            server.close()

    async def serve(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        try:
            while await self.exchange(reader, writer):
                pass
        except (asyncio.IncompleteReadError, asyncio.CancelledError, ConnectionError):
            pass
        finally:
            writer.close()

    async def exchange(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = {
            name.lower(): text
            for name, _, text in (line.partition(": ") for line in head[1:])
        }
        await reader.readexactly(int(headers.get("content-length", 0)))
        reply = self.replies[min(len(self.requests), len(self.replies) - 1)]
        self.requests.append(headers)
        reply = reply if isinstance(reply, WireReply) else reply(headers)
        if reply.hang:
            await reader.read()  # until the client gives up
            return False
        encoded = reply.encode(self.content_type)
        writer.write(encoded[: reply.after])
        await writer.drain()
        return reply.after is None


def _encoded_forms(secret: str) -> dict[str, str]:
    """What a secret may look like, each form's part that any 8 characters of its
    beginning show."""
    plain = {
        "plain": secret,
        "quoted": quote(secret),
        "quoted all": quote(secret, safe=""),
        "plus": quote_plus(secret),
    }
    plain |= {
        f"{name}, lower case": re.sub("%..", lambda m: m.group().lower(), text)
        for name, text in plain.items()
    }
    encoded: dict[str, str] = {}
    for shift in range(3):
        encoded_secret = base64.b64encode(bytes(shift) + secret.encode()).decode()
        text = encoded_secret[-(-shift * 8 // 6) : (shift + len(secret)) * 8 // 6]
        encoded |= {
            f"base64, {shift}": text,
            f"base64 for addresses, {shift}": text.replace("+", "-").replace("/", "_"),
        }
    return {name: text[:PREFIX_LENGTH] for name, text in plain.items()} | {
        name: text[: PREFIX_LENGTH * 4 // 3] for name, text in encoded.items()
    }


def _assert_hidden(secrets: Sequence[str], texts: Mapping[str, str]) -> None:
    for secret in secrets:
        for name, text in _encoded_forms(secret).items():
            for source, text_shown in texts.items():
                position = text_shown.find(text)
                assert position < 0, (
                    f"{name} in {source}: ...{text_shown[max(0, position - 300) : position + 80]}"
                )


def _tracebacks_with_locals(error: BaseException | None) -> Iterator[str]:
    """The tracebacks of an error and of all that led to it, suppressed ones too, with
    the variables of every frame."""
    while error is not None:
        yield "".join(
            traceback.TracebackException.from_exception(
                error, capture_locals=True
            ).format()
        )
        yield repr(error)
        yield from _tracebacks_with_locals(error.__cause__)
        error = error.__context__


@cache
def _settings_text(cloud: Cloud) -> str:
    """What a run writes and sends about its settings: config.yaml, MLflow's parameters,
    the arguments of Ray's actors."""
    config: PipelineConfig = replace(folder(), classes=CLASSES, cloud=cloud)
    arguments = pickle.dumps((config, cloud, governor_limits(cloud)))
    return f"{to_yaml(config)}\n{tracking.flat(config)}\n{config!r}\n{arguments.decode('latin-1')}\n{arguments!r}"


async def _sleep_briefly(seconds: float) -> None:
    await asyncio.sleep(min(seconds, 0.001))


@dataclass
class Observation:
    """One run: what it left to see, and what the service got."""

    texts: dict[str, str]
    server: WireServer
    error: BaseException | None


def _observe(
    service_case: ServiceCase,
    replies: Sequence[Reply],
    folder: Path,
    caplog: pytest.LogCaptureFixture,
    debug: bool = False,
    **settings: Any,
) -> Observation:
    """Ask about one image, twice at once, and gather all that can be seen afterwards.
    ``debug``: asyncio tells more, slowly."""
    server = WireServer(replies, service_case.case.content_type)
    cloud = Cloud(
        service=service_case.service,
        token_env=service_case.token_env,
        **{
            "rate": 1e5,
            "attempts": 2,
            "deadline": 20.0,
            "url": "http://127.0.0.1",
            **settings,
        },
    )
    caplog.clear()
    for name in ("", *LOGGERS):
        caplog.set_level(logging.DEBUG, name)
    objects: list[Any] = []
    error: BaseException | None = None

    async def run() -> None:
        async with server.address() as url:
            journal = open_journal(str(folder / "journal"))
            governor = LocalGovernor(Governor(governor_limits(cloud), journal.spent()))
            client = CloudClient(
                cloud,
                CLASSES,
                url,
                journal,
                governor,
                service_case.case.adapter,
                sleep=_sleep_briefly,
                uniform=lambda low, high: low,
            )
            client._query = client._replies._query = service_case.case.query()
            objects.extend(
                [
                    client,
                    service_case.case.adapter,
                    service_case.case.adapter.capabilities,
                    vars(client),
                ]
            )
            try:
                await client.check()
                objects.append(service_case.case.adapter.encode(PICTURE, client._query))
                objects.extend(
                    await asyncio.gather(client.answer(PICTURE), client.answer(PICTURE))
                )
            finally:
                await client.aclose()

    try:
        asyncio.run(run(), debug=debug)
    except (Exception, asyncio.CancelledError) as caught:
        error = caught
    texts = {
        "log": caplog.text + "".join(f"{r.msg!r} {r.args!r}" for r in caplog.records),
        "errors": "\n".join(_tracebacks_with_locals(error)),
        "reprs": repr(objects),
        "journal": journal_text(folder),
        "settings": _settings_text(cloud),
    }
    return Observation(texts, server, error)


@pytest.fixture(autouse=True)
def set_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    for service_case in SERVICE_CASES:
        for name, secret in service_case.secrets.items():
            monkeypatch.setenv(name, secret)
    for name in (
        "HTTP_PROXY",
        "HTTPS_PROXY",
        "ALL_PROXY",
        "http_proxy",
        "https_proxy",
        "all_proxy",
    ):
        monkeypatch.delenv(name, raising=False)


def _all_secrets(service_case: ServiceCase, server: WireServer) -> list[str]:
    """Those of the environment, and what was made of them: AWS's signatures."""
    signatures = [
        part
        for r in server.requests
        for part in re.findall("Signature=([0-9a-f]+)", r.get("authorization", ""))
    ]
    return [*service_case.secrets.values(), *signatures]


def _check_hidden(service_case: ServiceCase, observation: Observation) -> None:
    sent = str(observation.server.requests)
    auth = service_case.case.adapter.capabilities.auth
    if observation.server.requests and auth is not None and not auth.sigv4:
        assert all(secret in sent for secret in service_case.secrets.values()), (
            "the secret was not even sent"
        )
    _assert_hidden(_all_secrets(service_case, observation.server), observation.texts)


def _replies(service_case: ServiceCase) -> Iterator[tuple[str, list[Reply]]]:
    """Everything a service may do, errors of every kind."""
    success, first, case = (
        service_case.success,
        service_case.first_replies,
        service_case.case,
    )
    yield "success", [*first, success]
    yield "an error, then success", [*first, WireReply(500), success]
    for status in (302, 400, 401, 402, 404, 408, 413, 429, 500, 503):
        yield (
            f"status {status}",
            [
                *first,
                WireReply(status, {}, {"location": "https://elsewhere.example.com/"}),
            ],
        )
    yield "status 403 at once", [WireReply(403, b"<html>")]
    for number, failure in enumerate(case.failures):
        yield (
            f"failure {number}",
            [
                WireReply(
                    failure.status,
                    failure.body,
                    {**failure.headers, "retry-after": "0"},
                )
            ],
        )
    for number, (body, _) in enumerate(case.embedded):
        yield f"embedded {number}", [*first, WireReply(body=body)]
    for name, body in islice(case.broken.items(), 8):
        yield f"broken {name}", [*first, WireReply(body=body)]
    yield "not JSON", [*first, WireReply(body=b"{")]
    yield "closed at once", [*first, WireReply(after=0)]
    yield "closed in the head", [*first, WireReply(body=b"{}", after=20)]
    yield (
        "closed in the body",
        [
            *first,
            replace(success, after=len(success.encode("application/json")) - 5),
        ],
    )
    yield "not HTTP", [*first, WireReply(headers={"Bad Header\x01": "x"})]
    yield (
        "not gzip",
        [
            *first,
            WireReply(body=b"not gzip", headers={"content-encoding": "gzip"}),
        ],
    )


@pytest.mark.parametrize("service_case", SERVICE_CASES, ids=lambda s: s.name)
def test_whatever_the_service_does(
    service_case: ServiceCase, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kinds = set()
    for number, (description, replies) in enumerate(_replies(service_case)):
        observation = _observe(
            service_case,
            replies,
            tmp_path / str(number),
            caplog,
            debug="success" in description,
        )
        try:
            _check_hidden(service_case, observation)
        except AssertionError as error:
            raise AssertionError(f"{description}: {error}") from None
        kinds |= {type(observation.error).__name__} | set(
            re.findall(r"error='(\w+)", observation.texts["reprs"])
        )
        if description == "success":
            assert "status='ok'" in observation.texts["reprs"]
            assert "connected to 127.0.0.1" in observation.texts["log"], (
                "what libraries log is looked at"
            )
    assert {
        "NoneType",
        "AuthError",
        "BadRequest",
        "Throttled",
        "Transient",
        "ProtocolError",
        "ImageRejected",
    } <= kinds


@pytest.mark.parametrize("service_case", SERVICE_CASES, ids=lambda s: s.name)
def test_a_service_that_never_answers(
    service_case: ServiceCase, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    observation = _observe(
        service_case,
        [*service_case.first_replies, WireReply(hang=True)],
        tmp_path,
        caplog,
        deadline=0.4,
    )
    assert "DeadlineExceeded" in observation.texts["reprs"]
    _check_hidden(service_case, observation)


def _echo_reply(status: int, changed: Callable[[str], str]) -> Reply:
    """Tells all the request's headers back, in headers and in the body, which is JSON
    unless the status is 500."""

    def reply(headers: dict[str, str]) -> WireReply:
        told = ECHO_MARK + changed(
            " ".join(
                v
                for n, v in headers.items()
                if n not in ("content-length", "host", "accept-encoding")
            )
        )
        back = dict.fromkeys(
            (
                "x-echo",
                "retry-after",
                "x-amzn-errortype",
                "x-ratelimit-left",
                "set-cookie",
                "content-language",
            ),
            told,
        )
        body = {
            "error": {"message": told, "code": told},
            "msg": told,
            "title": told,
            "code": 1,
        }
        return WireReply(status, told.encode() if status == 500 else body, back)

    return reply


CHANGES: dict[str, Callable[[str], str]] = {
    "as they came": lambda text: text,
    "quoted": lambda text: quote(text, safe=""),
    "base64": lambda text: base64.b64encode(text.encode()).decode(),
    "shortened": lambda text: re.sub(r"(\S{12})\S+", r"\1...", text),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("service_case", SERVICE_CASES, ids=lambda s: s.name)
def test_a_service_that_tells_secrets_back(
    service_case: ServiceCase,
    change: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    redacted = 0
    for status in (200, 401, 500):
        observation = _observe(
            service_case,
            [*service_case.first_replies, _echo_reply(status, CHANGES[change])],
            tmp_path / str(status),
            caplog,
            attempts=1,
        )
        _check_hidden(service_case, observation)
        redacted += "***" in str(observation.texts)
    assert redacted > 0, "nothing was told back: the test sees nothing"


CRASHES: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "disk full": lambda patch: patch.setattr(
        SegmentJournal, "put", _raise(OSError(28, "No space left on device"))
    ),
    "disk full before the call": lambda patch: patch.setattr(
        SegmentJournal, "attempt", _raise(OSError(28, "No space left on device"))
    ),
    "a bug in the HTTP client": lambda patch: patch.setattr(
        "h11.Connection.send", _raise(RuntimeError("a bug"))
    ),
    "a bug below the HTTP client": lambda patch: patch.setattr(
        "h11.Connection.receive_data", _raise(KeyError("a bug"))
    ),
    "a bug while signing": lambda patch: patch.setattr(
        "botocore.auth.SigV4Auth.signature", _raise(ValueError("a bug"))
    ),
    "a bug while cutting": lambda patch: patch.setattr(
        "coin_ray.cloud.http.connections._read_body", _raise(MemoryError("a bug"))
    ),
}


def _raise(error: BaseException) -> Callable[..., Any]:
    def fail(*arguments: Any, **keywords: Any) -> Any:
        raise error

    return fail


@pytest.mark.parametrize("crash", CRASHES)
@pytest.mark.parametrize("service_case", SERVICE_CASES, ids=lambda s: s.name)
def test_crashes(
    service_case: ServiceCase,
    crash: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    CRASHES[crash](monkeypatch)
    observation = _observe(
        service_case,
        [*service_case.first_replies, service_case.success],
        tmp_path,
        caplog,
    )
    signed = service_case.secrets is AWS
    assert (observation.error is not None) == (signed or crash != "a bug while signing")
    if observation.error is not None:
        assert (
            "locals" not in observation.texts["errors"]
            or "self = " in observation.texts["errors"]
        )
    _check_hidden(service_case, observation)


@pytest.mark.parametrize("missing", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
@pytest.mark.parametrize("suffix", [None, "unprintable\x01"])
def test_half_of_the_credentials(
    missing: str,
    suffix: str | None,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if suffix is None:
        monkeypatch.delenv(missing)
    else:
        monkeypatch.setenv(missing, AWS[missing] + suffix)
    service_case = next(s for s in SERVICE_CASES if s.secrets is AWS)
    observation = _observe(service_case, [WireReply()], tmp_path, caplog)
    assert isinstance(observation.error, ConfigError)
    assert missing in str(observation.error)
    _check_hidden(service_case, observation)


def test_an_unusable_token(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_TOKEN", HTTP.secrets["MY_TOKEN"] + "\x01")
    observation = _observe(HTTP, [WireReply()], tmp_path, caplog)
    assert isinstance(observation.error, ConfigError)
    _check_hidden(HTTP, observation)


def test_the_scan_would_see_a_leak() -> None:
    secret = HTTP.secrets["MY_TOKEN"]
    token = secret  # noqa: F841

    def leak() -> str:
        hidden = {"Authorization": secret}
        raise ValueError(f"{len(hidden)} headers")

    with pytest.raises(ValueError, match="headers") as caught:
        leak()
    leaks = [
        "\n".join(_tracebacks_with_locals(caught.value)),
        f"key {secret[:9]}...",
        quote(secret, safe=""),
        base64.b64encode(f"x {secret}".encode()).decode(),
    ]
    for text in leaks:
        with pytest.raises(AssertionError, match="in there"):
            _assert_hidden([secret], {"there": text})
