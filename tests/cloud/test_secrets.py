"""Secrets are sent and appear nowhere else: not in logs, errors, variables of tracebacks,
reprs, the journal or dumps of the configuration.
"""

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
from coin_ray.cloud.journal.segments import SegmentJournal
from coin_ray.cloud.services import SERVICES
from coin_ray.config import Cloud, PipelineConfig, ServiceName
from coin_ray.config.dotted_names import flatten_config
from coin_ray.config.presets import folder
from coin_ray.config.yaml_files import to_yaml
from coin_ray.errors import ConfigError

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
class _ServiceCase:
    """A service, its secrets, and the replies that belong to a successful call."""

    case: Case

    @property
    def name(self) -> str:
        return self.case.name

    @property
    def service(self) -> ServiceName:
        name = self.case.adapter.capabilities.name
        matches = [service for service in SERVICES if name.startswith(service)]
        return cast("ServiceName", max(matches, key=len, default="http"))

    @property
    def token_env(self) -> str | None:
        """Return the setting; None for services that have a default variable."""
        return "MY_TOKEN" if self.service == "http" else None

    @property
    def secrets(self) -> dict[str, str]:
        """Return the secrets by environment variable."""
        auth = self.case.adapter.capabilities.auth
        if auth is not None and auth.sigv4:
            return AWS
        variable = self.token_env or SERVICES[self.service].token_env
        if not variable:
            return {}
        number = zlib.crc32(variable.encode()) % 90 + 10
        return {variable: f"k{number}/Y+4=&w{number}Qz~live-0123456789abcdef"}

    @property
    def first_replies(self) -> list[Reply]:
        """Return the replies before the answer: the service's health, the task's name."""
        capabilities = self.case.adapter.capabilities
        replies: list[Reply] = []
        if capabilities.health_path is not None:
            replies.append(_WireReply(body={"status": "ok"}))
        if capabilities.asynchronous:
            replies.append(_WireReply(body=self.case.further[0]))
        return replies

    @property
    def success(self) -> _WireReply:
        truth = Truth(self.case.names["car"], (10, 10, 90, 80))
        return _WireReply(body=self.case.answer([truth], SIZE))


PICTURE = solid_image(0, *SIZE)
SERVICE_CASES = [_ServiceCase(case) for case in CASES]
HTTP = next(s for s in SERVICE_CASES if s.service == "http")


@dataclass(frozen=True)
class _WireReply:
    """A reply on the wire. ``after``: number of its bytes that are sent before the
    connection is closed; ``hang``: it is never sent.
    """

    status: int = 200
    body: Any = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    after: int | None = None
    hang: bool = False

    def encode(self, content_type: str) -> bytes:
        body = self.body
        if not isinstance(body, bytes):
            body = json.dumps(body).encode()
        headers = {
            "Content-Type": content_type,
            "Content-Length": str(len(body)),
            **self.headers,
        }
        head = "".join(f"{name}: {text}\r\n" for name, text in headers.items())
        return f"HTTP/1.1 {self.status} Reason\r\n{head}\r\n".encode() + body


Reply = _WireReply | Callable[[dict[str, str]], _WireReply]
"""A function is called with the request's headers."""


@dataclass
class _WireServer:
    """A server that replies in order over real connections and repeats its last reply."""

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
        headers = {}
        for line in head[1:]:
            name, _, text = line.partition(": ")
            headers[name.lower()] = text
        await reader.readexactly(int(headers.get("content-length", 0)))
        reply = self.replies[min(len(self.requests), len(self.replies) - 1)]
        self.requests.append(headers)
        reply = reply if isinstance(reply, _WireReply) else reply(headers)
        if reply.hang:
            await reader.read()  # until the client gives up
            return False
        encoded = reply.encode(self.content_type)
        writer.write(encoded[: reply.after])
        await writer.drain()
        return reply.after is None


def _encoded_forms(secret: str) -> dict[str, str]:
    """Return the encodings of a secret that must not appear, each cut to what the first 8
    characters of the secret determine.
    """
    plain = {
        "plain": secret,
        "quoted": quote(secret),
        "quoted all": quote(secret, safe=""),
        "plus": quote_plus(secret),
    }
    for name, text in list(plain.items()):
        lower_case = re.sub("%..", lambda match: match.group().lower(), text)
        plain[f"{name}, lower case"] = lower_case
    encoded: dict[str, str] = {}
    for shift in range(3):
        encoded_secret = base64.b64encode(bytes(shift) + secret.encode()).decode()
        text = encoded_secret[-(-shift * 8 // 6) : (shift + len(secret)) * 8 // 6]
        encoded |= {
            f"base64, {shift}": text,
            f"base64 for addresses, {shift}": text.replace("+", "-").replace("/", "_"),
        }
    prefixes = {name: text[:PREFIX_LENGTH] for name, text in plain.items()}
    for name, text in encoded.items():
        prefixes[name] = text[: PREFIX_LENGTH * 4 // 3]
    return prefixes


def _assert_hidden(secrets: Sequence[str], texts: Mapping[str, str]) -> None:
    for secret in secrets:
        for name, text in _encoded_forms(secret).items():
            for source, full_text in texts.items():
                position = full_text.find(text)
                context = full_text[max(0, position - 300) : position + 80]
                assert position < 0, f"{name} in {source}: ...{context}"


def _tracebacks_with_locals(error: BaseException | None) -> Iterator[str]:
    """Yield the tracebacks of an error and of all its causes, suppressed ones too, with the
    variables of every frame.
    """
    while error is not None:
        formatted = traceback.TracebackException.from_exception(
            error, capture_locals=True
        )
        yield "".join(formatted.format())
        yield repr(error)
        yield from _tracebacks_with_locals(error.__cause__)
        error = error.__context__


@cache
def _settings_text(cloud: Cloud) -> str:
    """Return what a run writes and sends about its settings: config.yaml, MLflow's
    parameters, the arguments of Ray's actors.
    """
    config: PipelineConfig = replace(folder(), classes=CLASSES, cloud=cloud)
    arguments = pickle.dumps((config, cloud, governor_limits(cloud)))
    texts = [to_yaml(config), str(flatten_config(config)), repr(config)]
    texts += [arguments.decode("latin-1"), repr(arguments)]
    return "\n".join(texts)


async def _sleep_briefly(seconds: float) -> None:
    await asyncio.sleep(min(seconds, 0.001))


@dataclass
class _Observation:
    """One run: all texts it produced, by source, and what the service received."""

    texts: dict[str, str]
    server: _WireServer
    error: BaseException | None


async def _query_twice(
    case: Case, cloud: Cloud, url: str, folder: Path, objects: list[Any]
) -> None:
    """Query about one image, twice at once; append all objects in use to ``objects``."""
    journal = open_journal(str(folder / "journal"))
    client = CloudClient(
        cloud,
        CLASSES,
        url,
        journal,
        LocalGovernor(Governor(governor_limits(cloud), journal.spent())),
        case.adapter,
        sleep=_sleep_briefly,
        uniform=lambda low, high: low,
    )
    client._query = client._replies._query = case.query()
    objects.extend([client, case.adapter, case.adapter.capabilities, vars(client)])
    try:
        await client.check()
        objects.append(case.adapter.encode(PICTURE, client._query))
        answers = [client.answer(PICTURE), client.answer(PICTURE)]
        objects.extend(await asyncio.gather(*answers))
    finally:
        await client.aclose()


def _observe(
    service_case: _ServiceCase,
    replies: Sequence[Reply],
    folder: Path,
    caplog: pytest.LogCaptureFixture,
    debug: bool = False,
    **settings: Any,
) -> _Observation:
    """Query about one image, twice at once, and collect all texts that this produces.
    ``debug``: asyncio logs more, slowly.
    """
    case = service_case.case
    server = _WireServer(replies, case.content_type)
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
            await _query_twice(case, cloud, url, folder, objects)

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
    return _Observation(texts, server, error)


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


def _all_secrets(service_case: _ServiceCase, server: _WireServer) -> list[str]:
    """Return the secrets of the environment, and AWS's signatures derived from them."""
    secrets = list(service_case.secrets.values())
    for headers in server.requests:
        authorization = headers.get("authorization", "")
        secrets += re.findall("Signature=([0-9a-f]+)", authorization)
    return secrets


def _check_hidden(service_case: _ServiceCase, observation: _Observation) -> None:
    sent = str(observation.server.requests)
    auth = service_case.case.adapter.capabilities.auth
    if observation.server.requests and auth is not None and not auth.sigv4:
        assert all(secret in sent for secret in service_case.secrets.values()), (
            "the secret was not even sent"
        )
    _assert_hidden(_all_secrets(service_case, observation.server), observation.texts)


def _replies(service_case: _ServiceCase) -> Iterator[tuple[str, list[Reply]]]:
    """Yield descriptions and replies of all a service may do, errors of every kind."""
    case = service_case.case
    success = service_case.success
    first = service_case.first_replies
    yield "success", [*first, success]
    yield "an error, then success", [*first, _WireReply(500), success]
    for status in (302, 400, 401, 402, 404, 408, 413, 429, 500, 503):
        reply = _WireReply(status, {}, {"location": "https://elsewhere.example.com/"})
        yield f"status {status}", [*first, reply]
    yield "status 403 at once", [_WireReply(403, b"<html>")]
    for number, failure in enumerate(case.failures):
        headers = {**failure.headers, "retry-after": "0"}
        reply = _WireReply(failure.status, failure.body, headers)
        yield f"failure {number}", [reply]
    for number, (body, _) in enumerate(case.embedded):
        yield f"embedded {number}", [*first, _WireReply(body=body)]
    for name, body in islice(case.broken.items(), 8):
        yield f"broken {name}", [*first, _WireReply(body=body)]
    yield "not JSON", [*first, _WireReply(body=b"{")]
    yield "closed at once", [*first, _WireReply(after=0)]
    yield "closed in the head", [*first, _WireReply(body=b"{}", after=20)]
    almost_all = len(success.encode("application/json")) - 5
    yield "closed in the body", [*first, replace(success, after=almost_all)]
    yield "not HTTP", [*first, _WireReply(headers={"Bad Header\x01": "x"})]
    not_gzip = _WireReply(body=b"not gzip", headers={"content-encoding": "gzip"})
    yield "not gzip", [*first, not_gzip]


@pytest.mark.parametrize("service_case", SERVICE_CASES, ids=lambda case: case.name)
def test_whatever_the_service_does(
    service_case: _ServiceCase, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    error_names = set()
    for number, (description, replies) in enumerate(_replies(service_case)):
        folder = tmp_path / str(number)
        debug = "success" in description
        observation = _observe(service_case, replies, folder, caplog, debug=debug)
        try:
            _check_hidden(service_case, observation)
        except AssertionError as error:
            raise AssertionError(f"{description}: {error}") from None
        error_names.add(type(observation.error).__name__)
        error_names.update(re.findall(r"error='(\w+)", observation.texts["reprs"]))
        if description == "success":
            assert "status='ok'" in observation.texts["reprs"]
            assert "connected to 127.0.0.1" in observation.texts["log"], (
                "what libraries log must be checked too"
            )
    assert {
        "NoneType",
        "AuthError",
        "BadRequest",
        "Throttled",
        "Transient",
        "ProtocolError",
        "ImageRejected",
    } <= error_names


@pytest.mark.parametrize("service_case", SERVICE_CASES, ids=lambda case: case.name)
def test_a_service_that_never_answers(
    service_case: _ServiceCase, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    replies = [*service_case.first_replies, _WireReply(hang=True)]
    observation = _observe(service_case, replies, tmp_path, caplog, deadline=0.2)
    assert "DeadlineExceeded" in observation.texts["reprs"]
    _check_hidden(service_case, observation)


def _echo_reply(status: int, encode: Callable[[str], str]) -> Reply:
    """Return a reply that repeats all headers of the request, in headers and in the body,
    which is JSON unless the status is 500.
    """

    def reply(request_headers: dict[str, str]) -> _WireReply:
        unrelated = ("content-length", "host", "accept-encoding")
        texts = [
            text for name, text in request_headers.items() if name not in unrelated
        ]
        echo = ECHO_MARK + encode(" ".join(texts))
        names = (
            "x-echo",
            "retry-after",
            "x-amzn-errortype",
            "x-ratelimit-left",
            "set-cookie",
            "content-language",
        )
        body = {
            "error": {"message": echo, "code": echo},
            "msg": echo,
            "title": echo,
            "code": 1,
        }
        headers = dict.fromkeys(names, echo)
        return _WireReply(status, echo.encode() if status == 500 else body, headers)

    return reply


ECHO_ENCODINGS: dict[str, Callable[[str], str]] = {
    "as they came": lambda text: text,
    "quoted": lambda text: quote(text, safe=""),
    "base64": lambda text: base64.b64encode(text.encode()).decode(),
    "shortened": lambda text: re.sub(r"(\S{12})\S+", r"\1...", text),
}


@pytest.mark.parametrize("encoding", ECHO_ENCODINGS)
@pytest.mark.parametrize("service_case", SERVICE_CASES, ids=lambda case: case.name)
def test_a_service_that_echoes_secrets(
    service_case: _ServiceCase,
    encoding: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    redacted = 0
    for status in (200, 401, 500):
        echo = _echo_reply(status, ECHO_ENCODINGS[encoding])
        replies = [*service_case.first_replies, echo]
        folder = tmp_path / str(status)
        observation = _observe(service_case, replies, folder, caplog, attempts=1)
        _check_hidden(service_case, observation)
        redacted += "***" in str(observation.texts)
    assert redacted > 0, "no echo was redacted: the test observes nothing"


CRASHES: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "disk full": lambda patch: patch.setattr(
        SegmentJournal, "put_all", _raise(OSError(28, "No space left on device"))
    ),
    "disk full before the call": lambda patch: patch.setattr(
        SegmentJournal, "attempt", _raise(OSError(28, "No space left on device"))
    ),
    "a bug in the HTTP client": lambda patch: patch.setattr(
        "coin_ray.cloud.http.connections.encode_head", _raise(RuntimeError("a bug"))
    ),
    "a bug below the HTTP client": lambda patch: patch.setattr(
        "coin_ray.cloud.http.http1._ResponseStream.exchange", _raise(KeyError("a bug"))
    ),
    "a bug while signing": lambda patch: patch.setattr(
        "botocore.auth.SigV4Auth.signature", _raise(ValueError("a bug"))
    ),
    "a bug while parsing": lambda patch: patch.setattr(
        "httptools.HttpResponseParser", _raise(MemoryError("a bug"))
    ),
}


def _raise(error: BaseException) -> Callable[..., Any]:
    def fail(*arguments: Any, **keywords: Any) -> Any:
        raise error

    return fail


@pytest.mark.parametrize("crash", CRASHES)
@pytest.mark.parametrize("service_case", SERVICE_CASES, ids=lambda s: s.name)
def test_crashes(
    service_case: _ServiceCase,
    crash: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    CRASHES[crash](monkeypatch)
    replies = [*service_case.first_replies, service_case.success]
    observation = _observe(service_case, replies, tmp_path, caplog)
    is_signed = service_case.secrets is AWS
    expects_error = is_signed or crash != "a bug while signing"
    assert (observation.error is not None) == expects_error
    if observation.error is not None:
        errors = observation.texts["errors"]
        assert "locals" not in errors or "self = " in errors
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
    observation = _observe(service_case, [_WireReply()], tmp_path, caplog)
    assert isinstance(observation.error, ConfigError)
    assert missing in str(observation.error)
    _check_hidden(service_case, observation)


def test_an_unusable_token(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_TOKEN", HTTP.secrets["MY_TOKEN"] + "\x01")
    observation = _observe(HTTP, [_WireReply()], tmp_path, caplog)
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
