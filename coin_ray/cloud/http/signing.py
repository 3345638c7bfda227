"""How a request proves who sends it, and how the secret is kept out of whatever comes
back.

Secrets are read from the environment for each request and kept nowhere. AWS: Signature
Version 4, computed by botocore (extra ``aws``) from AWS_ACCESS_KEY_ID,
AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN.
"""

from __future__ import annotations

import base64
import html
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any, Protocol
from urllib.parse import quote, quote_plus

from coin_ray.cloud.protocol import Auth
from coin_ray.errors import ConfigError

SECRET_LENGTH_MIN = 6
"""A shorter text may occur in an answer by chance and is not looked for."""
BEGINNING = 8
"""A secret's first characters that are cut out even if the rest is left out or hidden.
"""
AWS_ID, AWS_SECRET, AWS_SESSION = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
)
AWS_DATE = "%Y%m%dT%H%M%SZ"
SKEWED = (
    b"RequestTimeTooSkewed",
    b"RequestExpired",
    b"RequestInTheFuture",
    b"Signature expired",
    b"Signature not yet current",
)
"""What AWS services say to a request whose date is far from their own."""
SKEW_MIN = 60.0
"""Seconds; a smaller difference of the clocks is not why a signature was refused."""


@dataclass(frozen=True, slots=True)
class Signed:
    """Headers to add to one request, what must not come back from it, and the clock's
    correction (seconds) it was signed with.
    """

    headers: Mapping[str, str] = field(repr=False)
    secrets: tuple[str, ...] = field(repr=False)
    correction: float = 0.0


class Signer(Protocol):
    """Adds the secret to requests."""

    @property
    def secret(self) -> bool:
        """Whether it adds one at all."""

    def check(self) -> None:
        """Raises ``ConfigError`` naming the variable that is missing or unusable."""

    def sign(
        self, method: str, url: str, headers: Mapping[str, str], body: bytes
    ) -> Signed:
        """Headers that prove who sends a request with exactly this URL, these headers
        and this body.
        """

    def adopt_clock(
        self, signed: Signed, status: int, headers: Mapping[str, str], body: bytes
    ) -> bool:
        """Whether the answer to ``signed`` complains about the date, and the same
        request may now be signed with a better one.
        """


def signer_for(
    auth: Auth | None,
    variable: str | None,
    region: str,
    now: Callable[[], float] = time.time,
) -> Signer:
    """``variable``: name of the environment variable with the token, None without one.
    ``now``: seconds since 1970.
    """
    if auth is not None and auth.sigv4:
        return AwsSigner(auth.sigv4, region, now)
    return TokenSigner(auth or Auth(), variable if auth is not None else None)


class TokenSigner:
    """A token in a header."""

    def __init__(self, auth: Auth, variable: str | None) -> None:
        self._auth, self._variable = auth, variable

    @property
    def secret(self) -> bool:
        return self._variable is not None

    def check(self) -> None:
        self._token()

    def sign(
        self, method: str, url: str, headers: Mapping[str, str], body: bytes
    ) -> Signed:
        token = self._token()
        return (
            Signed({self._auth.header: f"{self._auth.prefix}{token}"}, (token,))
            if token
            else Signed({}, ())
        )

    def adopt_clock(
        self, signed: Signed, status: int, headers: Mapping[str, str], body: bytes
    ) -> bool:
        return False

    def _token(self) -> str:
        if self._variable is None:
            return ""
        token = _variable(self._variable)
        if not token:
            raise ConfigError(
                f"the environment variable {self._variable} is not set; put the"
                " service's token there, or name the variable that holds it with"
                " cloud.token_env"
            )
        return token


class AwsSigner:
    """AWS Signature Version 4. A date that the service refuses is corrected once, by
    the service's own.
    """

    secret = True

    def __init__(
        self, service: str, region: str, now: Callable[[], float] = time.time
    ) -> None:
        self._service, self._region, self._now = service, region, now
        self._correction = 0.0

    def check(self) -> None:
        _aws_credentials()
        _botocore()

    def sign(
        self, method: str, url: str, headers: Mapping[str, str], body: bytes
    ) -> Signed:
        key_id, key, session = _aws_credentials()
        correction = self._correction
        date = time.strftime(AWS_DATE, time.gmtime(self._now() + correction))
        added = {"X-Amz-Date": date} | (
            {"X-Amz-Security-Token": session} if session else {}
        )
        added["Authorization"], signature = self._signature(
            method, url, {**headers, **added}, body, (key_id, key, session)
        )
        return Signed(
            added, tuple(s for s in (key_id, key, session, signature) if s), correction
        )

    def adopt_clock(
        self, signed: Signed, status: int, headers: Mapping[str, str], body: bytes
    ) -> bool:
        if status < 400 or not any(code in body for code in SKEWED):
            return False
        if signed.correction != self._correction:
            return True  # another request has corrected the clock since
        difference = _seconds_ahead(headers.get("date", ""), self._now())
        if self._correction or abs(difference) < SKEW_MIN:
            return False
        self._correction = difference
        return True

    def _signature(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        body: bytes,
        credentials: tuple[str, str, str],
    ) -> tuple[str, str]:
        """The Authorization header and the signature in it. botocore's own ``add_auth``
        has no date to give, and logs the session token.
        """
        sigv4, aws_request, aws_credentials = _botocore()
        request = aws_request(method=method, url=url, headers=dict(headers), data=body)
        request.context["timestamp"] = headers["X-Amz-Date"]
        signer = sigv4(aws_credentials(*credentials), self._service, self._region)
        signature = signer.signature(
            signer.string_to_sign(request, signer.canonical_request(request)), request
        )
        names = signer.signed_headers(signer.headers_to_sign(request))
        return (
            (
                f"AWS4-HMAC-SHA256 Credential={signer.scope(request)},"
                f" SignedHeaders={names}, Signature={signature}"
            ),
            signature,
        )


def redacted(content: bytes, secrets: Iterable[str]) -> bytes:
    """``content`` without the secrets and without their beginnings: plain, escaped,
    url-encoded or inside base64.
    """
    forms = sorted(
        {f for secret in secrets for f in _forms(secret)}, key=len, reverse=True
    )
    for form in forms:
        content = content.replace(form, b"***")
    for form in forms:
        content = _without_beginning(content, form)
    return content


def _without_beginning(content: bytes, form: bytes) -> bytes:
    """``content`` without what has at least the first characters of ``form``."""
    kept, end = [], 0
    while (start := content.find(form[:BEGINNING], end)) >= 0:
        kept.append(content[end:start])
        end = start + next(
            (
                i
                for i, (a, b) in enumerate(
                    zip(form, content[start : start + len(form)], strict=False)
                )
                if a != b
            ),
            len(form),
        )
    return b"***".join([*kept, content[end:]])


def without_frames(error: BaseException) -> BaseException:
    """The error as if it began where it is raised next: what lies below may hold
    secrets in its variables.
    """
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)


def _forms(secret: str) -> set[bytes]:
    quoted = {quote(secret), quote(secret, safe=""), quote_plus(secret)}
    quoted |= {re.sub("%..", lambda m: m.group().lower(), text) for text in quoted}
    escaped = {
        json.dumps(secret)[1:-1],
        json.dumps(secret)[1:-1].replace("/", "\\/"),
        html.escape(secret),
    }
    texts = {text.encode() for text in {secret} | quoted | escaped}
    return {
        form
        for form in texts | _base64_forms(secret.encode())
        if len(form) >= SECRET_LENGTH_MIN
    }


def _base64_forms(secret: bytes) -> set[bytes]:
    """The part of its base64 form that does not depend on what stands before and after
    it, for each of three alignments.
    """
    found = set()
    for shift in range(3):
        plain = base64.b64encode(bytes(shift) + secret)
        certain = plain[-(-shift * 8 // 6) : (shift + len(secret)) * 8 // 6]
        found |= {certain, certain.replace(b"+", b"-").replace(b"/", b"_")}
    return found


def _variable(name: str) -> str:
    """The variable's value, or an empty string. Raises ``ConfigError`` for what no
    header can hold.
    """
    if not _sendable(os.environ.get(name, "").strip()):
        raise ConfigError(
            f"the environment variable {name} holds characters that can't be sent in a"
            " header"
        )
    return os.environ.get(name, "").strip()


def _sendable(value: str) -> bool:
    return value.isascii() and value.isprintable()


def _aws_credentials() -> tuple[str, str, str]:
    """Key id, secret key, session token (may be empty)."""
    missing = [name for name in (AWS_ID, AWS_SECRET) if not _variable(name)]
    if missing:
        raise ConfigError(
            f"the environment variable {' and '.join(missing)} must be set to sign"
            " requests to AWS"
        )
    return _variable(AWS_ID), _variable(AWS_SECRET), _variable(AWS_SESSION)


def _botocore() -> tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]:
    try:
        from botocore.auth import SigV4Auth
        from botocore.awsrequest import AWSRequest
        from botocore.credentials import Credentials
    except ImportError:
        raise ConfigError(
            "requests to AWS are signed with botocore: pip install coin-ray[aws]"
        ) from None
    return SigV4Auth, AWSRequest, Credentials


def _seconds_ahead(date: str, now: float) -> float:
    """How far an HTTP date is ahead of ``now``; 0 for an unusable one."""
    try:
        return parsedate_to_datetime(date).timestamp() - now
    except (ValueError, TypeError, IndexError, OverflowError):
        return 0.0
