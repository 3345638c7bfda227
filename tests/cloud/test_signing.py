from __future__ import annotations

import asyncio
import base64
import datetime as dt
import html
import json
import logging
import re
import subprocess
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from email.utils import formatdate
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coin_ray.cloud.http.signing import AwsSigner, redact_secrets, signer_for
from coin_ray.cloud.protocol import Auth, PreparedRequest
from coin_ray.errors import AuthError, CloudError, ConfigError

from .conftest import (
    ClientHarness,
    HarnessBuilder,
    InBodyAdapter,
    TaskAdapter,
    journal_text,
    ok_response,
    solid_image,
    status_response,
)

TOKEN = "sk-live/01+23=45&67 89"
KEY_ID, SECRET, SESSION = (
    "AKIDEXAMPLE",
    "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY",
    "FwoGZXIvYXdzE/session+token==",
)
THEN = dt.datetime(2015, 8, 30, 12, 36, tzinfo=dt.UTC).timestamp()


@pytest.fixture
def aws(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY_ID)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_SESSION_TOKEN", SESSION)
    return monkeypatch


class _AwsAdapter(InBodyAdapter):
    def encode(self, image: Any, query: Any) -> PreparedRequest:
        headers = {"X-Amz-Target": "RekognitionService.DetectLabels"}
        return replace(
            super().encode(image, query),
            path="/",
            content_type="application/x-amz-json-1.1",
            headers=headers,
        )


def _aws_adapter() -> _AwsAdapter:
    return _AwsAdapter({"auth": Auth(sigv4="rekognition"), "health_path": None})


def _detect(harness: ClientHarness) -> Any:
    return asyncio.run(harness.client.answer(solid_image()))


def test_the_signature_of_awss_own_test_suite(aws: pytest.MonkeyPatch) -> None:
    """Check the case get-vanilla of AWS's suite."""
    aws.delenv("AWS_SESSION_TOKEN")
    signed = AwsSigner("service", "us-east-1", lambda: THEN).sign(
        "GET", "https://example.amazonaws.com/", {}, b""
    )
    assert signed.headers["X-Amz-Date"] == "20150830T123600Z"
    assert (
        signed.headers["Authorization"] == "AWS4-HMAC-SHA256"
        " Credential=AKIDEXAMPLE/20150830/us-east-1/service/aws4_request,"
        " SignedHeaders=host;x-amz-date,"
        " Signature=5fa00fa31553b73ebf1942676e86291e8372ff2a2260956d9b8aae1d763fbf31"
    )


URLS = [
    "https://rekognition.eu-west-1.amazonaws.com/",
    "http://127.0.0.1:9000/",
    "https://host.example.com/a%20b/c?x=1&b=%2F&a=",
]


@pytest.mark.parametrize("session", [True, False])
@pytest.mark.parametrize("url", URLS)
@pytest.mark.parametrize("body", [b"", b'{"Image": {}}', bytes(range(256))])
def test_the_signature_of_botocore(
    aws: pytest.MonkeyPatch, url: str, body: bytes, session: bool
) -> None:
    from botocore import auth
    from botocore.awsrequest import AWSRequest
    from botocore.credentials import Credentials

    if not session:
        aws.delenv("AWS_SESSION_TOKEN")
    headers = {
        "Content-Type": "application/x-amz-json-1.1",
        "X-Amz-Target": "RekognitionService.DetectLabels",
        "Idempotency-Key": "k",
    }
    aws.setattr(
        auth, "get_current_datetime", lambda: dt.datetime.fromtimestamp(THEN, dt.UTC)
    )
    expected = AWSRequest("POST", url, headers=dict(headers), data=body)
    auth.SigV4Auth(
        Credentials(KEY_ID, SECRET, SESSION if session else None),
        "rekognition",
        "eu-west-1",
    ).add_auth(expected)
    signed = AwsSigner("rekognition", "eu-west-1", lambda: THEN).sign(
        "POST", url, headers, body
    )
    assert {**headers, **signed.headers} == dict(expected.headers)


def test_a_signed_call(build_harness: HarnessBuilder, aws: pytest.MonkeyPatch) -> None:
    """The signature covers exactly what is sent."""
    harness = build_harness(
        ok_response(),
        adapter=_aws_adapter(),
        url=URLS[0],
        region="eu-west-1",
        wall_clock=lambda: THEN,
    )
    assert _detect(harness).status == "ok"
    (request,) = harness.service.requests
    authorization = request.headers["authorization"]
    signed_headers = authorization.split("SignedHeaders=")[1].split(",")[0]
    names = set(signed_headers.split(";"))
    set_by_signer = {"host", "x-amz-date", "x-amz-security-token"}
    assert names >= set_by_signer | {"content-type", "x-amz-target"}
    headers = {name: request.headers[name] for name in names - set_by_signer}
    resigned = AwsSigner("rekognition", "eu-west-1", lambda: THEN).sign(
        "POST", str(request.url), headers, request.content
    )
    assert resigned.headers["Authorization"] == request.headers["authorization"]


def _skewed_clock_response(code: str, date: float) -> httpx.Response:
    return httpx.Response(
        400,
        headers={"date": formatdate(date, usegmt=True)},
        json={"__type": code, "message": "no"},
    )


@pytest.mark.parametrize(
    "code",
    [
        "RequestTimeTooSkewed",
        "com.amazon#RequestExpired",
        "InvalidSignatureException: Signature expired",
    ],
)
def test_a_wrong_clock_is_corrected_once(
    build_harness: HarnessBuilder, aws: pytest.MonkeyPatch, code: str
) -> None:
    harness = build_harness(
        _skewed_clock_response(code, THEN + 3600),
        ok_response(),
        adapter=_aws_adapter(),
        wall_clock=lambda: THEN,
    )
    answer = _detect(harness)
    assert (answer.status, answer.attempts, answer.calls) == ("ok", 1, 1)
    assert [r.headers["x-amz-date"] for r in harness.service.requests] == [
        "20150830T123600Z",
        "20150830T133600Z",
    ]
    assert asyncio.run(harness.client.answer(solid_image(1))).status == "ok"
    assert harness.service.requests[-1].headers["x-amz-date"] == "20150830T133600Z"
    assert len(harness.service.requests) == 3


@pytest.mark.parametrize("ahead", [3600, 20, None])
def test_a_clock_is_not_corrected_again_and_again(
    build_harness: HarnessBuilder, aws: pytest.MonkeyPatch, ahead: float | None
) -> None:
    reply = _skewed_clock_response("RequestTimeTooSkewed", THEN + (ahead or 0))
    if ahead is None:
        del reply.headers["date"]
    harness = build_harness(reply, adapter=_aws_adapter(), wall_clock=lambda: THEN)
    with pytest.raises(CloudError):
        _detect(harness)
    assert len(harness.service.requests) == 1 + (ahead == 3600)
    assert harness.journal.spent()[0] == 0


def test_calls_under_way_while_the_clock_is_corrected(
    build_harness: HarnessBuilder, aws: pytest.MonkeyPatch
) -> None:
    calls, old_dates = 8, 0
    harness = build_harness(
        ok_response(), adapter=_aws_adapter(), wall_clock=lambda: THEN, in_flight=calls
    )

    async def run() -> list[Any]:
        all_sent = asyncio.Event()
        # the first call goes alone
        await harness.client.answer(solid_image(calls))

        async def serve(request: httpx.Request) -> httpx.Response:
            nonlocal old_dates
            if request.headers["x-amz-date"] != "20150830T123600Z":
                return ok_response()
            old_dates += 1
            all_sent.set() if old_dates == calls else await all_sent.wait()
            return _skewed_clock_response("RequestTimeTooSkewed", THEN + 900)

        harness.service.handler = serve
        images = [solid_image(seed) for seed in range(calls)]
        return list(await asyncio.gather(*map(harness.client.answer, images)))

    assert {a.status for a in asyncio.run(run())} == {"ok"}
    assert old_dates == calls


def test_a_wrong_aws_key_costs_one_request(
    build_harness: HarnessBuilder, aws: pytest.MonkeyPatch
) -> None:
    harness = build_harness(
        status_response(
            403, {"date": formatdate(THEN + 9999)}, title="InvalidSignatureException"
        ),
        adapter=_aws_adapter(),
    )
    with pytest.raises(AuthError) as refusal:
        _detect(harness)
    assert "for the region us-east-1" in str(refusal.value)
    assert "AWS_ACCESS_KEY_ID (set), AWS_SECRET_ACCESS_KEY (set)" in str(refusal.value)
    assert len(harness.service.requests) == 1


def test_a_service_that_asks_for_a_key_and_gets_none(
    build_harness: HarnessBuilder,
) -> None:
    harness = build_harness(status_response(401))
    with pytest.raises(AuthError, match=r"No key was sent: .*--cloud\.token-env NAME"):
        _detect(harness)


@pytest.mark.parametrize("missing", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
def test_missing_aws_credentials(
    build_harness: HarnessBuilder, aws: pytest.MonkeyPatch, missing: str
) -> None:
    aws.delenv(missing)
    with pytest.raises(ConfigError, match=missing):
        build_harness(ok_response(), adapter=_aws_adapter())


def test_without_botocore(
    build_harness: HarnessBuilder, aws: pytest.MonkeyPatch
) -> None:
    aws.setitem(sys.modules, "botocore.auth", None)
    with pytest.raises(ConfigError, match=r"pip install coin-ray\[aws\]"):
        build_harness(ok_response(), adapter=_aws_adapter())


def test_aws_needs_https(
    build_harness: HarnessBuilder, aws: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="https"):
        build_harness(
            ok_response(), adapter=_aws_adapter(), url="http://host.example.com"
        )


AUTHS = [
    (Auth(), "authorization", "Bearer secret-token"),
    (Auth("Token", ""), "token", "secret-token"),
    (Auth("X-Goog-Api-Key", ""), "x-goog-api-key", "secret-token"),
    (Auth("Authorization", "Key "), "authorization", "Key secret-token"),
]


@pytest.mark.parametrize(("auth", "header", "header_value"), AUTHS)
def test_headers_with_a_token(
    build_harness: HarnessBuilder,
    monkeypatch: pytest.MonkeyPatch,
    auth: Auth,
    header: str,
    header_value: str,
) -> None:
    monkeypatch.setenv("CLOUD_TOKEN", " secret-token\n")
    harness = build_harness(
        ok_response(), adapter=InBodyAdapter({"auth": auth}), token_env="CLOUD_TOKEN"
    )
    _detect(harness)
    asyncio.run(harness.client.check())
    assert [r.method for r in harness.service.requests] == ["POST", "GET"]
    for request in harness.service.requests:
        assert request.headers[header] == header_value
        assert sum("secret-token" in v for v in request.headers.values()) == 1


def test_polls_carry_the_token_too(
    build_harness: HarnessBuilder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLOUD_TOKEN", "secret-token")
    harness = build_harness(
        httpx.Response(200, json={"task": "t"}),
        ok_response(),
        adapter=TaskAdapter(),
        token_env="CLOUD_TOKEN",
    )
    _detect(harness)
    assert [r.headers["authorization"] for r in harness.service.requests] == [
        "Bearer secret-token"
    ] * 2


def test_a_service_that_takes_no_secret_gets_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CLOUD_TOKEN", "secret-token")
    signer = signer_for(None, "CLOUD_TOKEN", "us-east-1")
    assert not signer.secret
    assert not signer.sign("GET", "https://host/", {}, b"").headers


def _derived_forms(secret: str) -> dict[str, str]:
    raw = secret.encode()
    return {
        "plain": secret,
        "url": quote(secret),
        "url, also slashes": quote(secret, safe=""),
        "url, lower case": re.sub(
            "%(2F|2B|3D)",
            lambda match: match.group().lower(),
            quote(secret, safe=""),
        ),
        "form": quote_plus(secret),
        "json": json.dumps(secret)[1:-1],
        "json, escaped slashes": json.dumps(secret)[1:-1].replace("/", "\\/"),
        "html": html.escape(secret),
        "base64": base64.b64encode(raw).decode(),
        "base64 for urls": base64.urlsafe_b64encode(raw).decode(),
        "basic auth": base64.b64encode(b"user:" + raw).decode(),
        "basic auth, other way round": base64.b64encode(raw + b":x").decode(),
        "base64, third alignment": base64.b64encode(b"ab" + raw + b"c").decode(),
    }


@pytest.mark.parametrize("secret", [TOKEN, SECRET, SESSION])
@pytest.mark.parametrize("form", _derived_forms(TOKEN))
def test_derived_forms_are_cut_out(secret: str, form: str) -> None:
    text = _derived_forms(secret)[form]
    redacted_body = redact_secrets(
        f'{{"before": 1, "echo": "{text}", "after": 2}}'.encode(), [secret]
    ).decode()
    assert redacted_body.startswith('{"before": 1, "echo": "')
    assert redacted_body.endswith('", "after": 2}')
    echo = redacted_body.removeprefix('{"before": 1, "echo": "').removesuffix(
        '", "after": 2}'
    )
    assert "***" in echo
    # what surrounds the secret, and base64's edges
    assert len(echo.replace("***", "")) <= len(text) - len(secret) + 1 + 5
    assert secret[:6] not in echo


@given(
    st.text("abcXYZ019+/=-_", min_size=6, max_size=40),
    st.binary(max_size=5),
    st.binary(max_size=5),
)
def test_base64_around_a_secret_tells_at_most_its_edges(
    secret: str, before: bytes, after: bytes
) -> None:
    text = base64.b64encode(before + secret.encode() + after)
    cut = redact_secrets(text, [secret])
    assert b"***" in cut or len(secret) < 8


def test_short_secrets_and_other_text_stay() -> None:
    assert redact_secrets(b"a car and a bus", ["car", ""]) == b"a car and a bus"
    assert redact_secrets(b"nothing to see", [SECRET]) == b"nothing to see"


def _visible_text(
    harness: ClientHarness, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> str:
    """Return all text that one call produces: its answer or error, the log, the files."""
    texts = [repr(harness.client)]
    try:
        texts.append(repr(_detect(harness)))
    except CloudError as error:
        texts += [repr(error), *traceback.format_exception(error)]
    texts += [caplog.text, journal_text(tmp_path)]
    return "".join(texts)


ECHOED_SECRETS: dict[str, Callable[[httpx.Request], str]] = {
    "secret key": lambda _: SECRET,
    "session token": lambda r: r.headers["x-amz-security-token"],
    "signature": lambda r: r.headers["authorization"].split("Signature=")[1],
}


@pytest.mark.parametrize("code", [200, 400, 403, 500])
@pytest.mark.parametrize("form", ["plain", "url, also slashes", "base64"])
@pytest.mark.parametrize("secret_name", ECHOED_SECRETS)
def test_aws_secrets_are_shown_nowhere(
    build_harness: HarnessBuilder,
    tmp_path: Path,
    aws: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    code: int,
    form: str,
    secret_name: str,
) -> None:
    """Secrets are hidden even if the service repeats them."""

    def reply(request: httpx.Request) -> httpx.Response:
        secret = _derived_forms(ECHOED_SECRETS[secret_name](request))[form]
        return httpx.Response(
            code,
            headers={"retry-after": secret, "x-ratelimit-echo": secret},
            json={"title": f"seen: {secret}."},
        )

    caplog.set_level(logging.DEBUG)
    harness = build_harness(reply, adapter=_aws_adapter(), attempts=1)
    visible_text = _visible_text(harness, tmp_path, caplog)
    assert "seen: ***" in visible_text
    request, *_ = harness.service.requests
    assert (
        _derived_forms(ECHOED_SECRETS[secret_name](request))[form] not in visible_text
    )
    assert request.headers["x-amz-security-token"] == SESSION
    assert SECRET not in str(request.headers)


@pytest.mark.parametrize("code", [200, 403, 500])
@pytest.mark.parametrize("form", _derived_forms(TOKEN))
def test_tokens_are_shown_nowhere(
    build_harness: HarnessBuilder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    code: int,
    form: str,
) -> None:
    monkeypatch.setenv("CLOUD_TOKEN", TOKEN)
    caplog.set_level(logging.DEBUG)
    encoded_token = _derived_forms(TOKEN)[form]
    echo = httpx.Response(
        code, content=f'{{"title": "seen: {encoded_token}."}}'.encode()
    )
    harness = build_harness(echo, token_env="CLOUD_TOKEN", attempts=1)
    visible_text = _visible_text(harness, tmp_path, caplog)
    assert "***" in visible_text
    assert encoded_token not in visible_text
    assert TOKEN not in visible_text


def test_reprs_hide_secrets(aws: pytest.MonkeyPatch) -> None:
    signer = AwsSigner("rekognition", "us-east-1")
    signed = signer.sign("POST", "https://host/", {}, b"")
    for text in (repr(signer), repr(signed), str(vars(signer))):
        assert SECRET not in text
        assert SESSION not in text
        assert "Signature=" not in text


def test_botocore_is_imported_for_aws_only() -> None:
    code = (
        "import sys, coin_ray.cloud.client; print('botocore' in sys.modules, 'torch' in"
        " sys.modules)"
    )
    assert subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split() == ["False", "False"]
