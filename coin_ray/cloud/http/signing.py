"""Signing of requests, and removal of the secret from whatever comes back.

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
from coin_ray.errors import ConfigError, describe_variables

SECRET_LENGTH_MIN = 6
"""A shorter text may occur in an answer by chance and is not searched for."""
PREFIX_LENGTH = 8
"""A secret's first characters that are removed even if the others are missing."""
AWS_ID, AWS_SECRET, AWS_SESSION = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
)
AWS_DATE = "%Y%m%dT%H%M%SZ"
CLOCK_ERRORS = (
    b"RequestTimeTooSkewed",
    b"RequestExpired",
    b"RequestInTheFuture",
    b"Signature expired",
    b"Signature not yet current",
)
"""Errors of AWS services for a request whose date is far from their own."""
SKEW_MIN = 60.0
"""Seconds; a smaller difference of the clocks does not make a signature invalid."""


@dataclass(frozen=True, slots=True)
class SignedHeaders:
    """Headers to add to one request; ``secrets``: texts that must not be shown of its
    response; ``correction``: seconds added to the clock when it was signed.
    """

    headers: Mapping[str, str] = field(repr=False)
    secrets: tuple[str, ...] = field(repr=False)
    correction: float = 0.0
    body: bytes | None = field(default=None, repr=False)
    """The body to send instead, if it holds the secret."""


class Signer(Protocol):
    """Adds the secret to requests."""

    @property
    def secret(self) -> bool:
        """Return whether it adds one at all."""

    def check(self) -> None:
        """Raise ``ConfigError`` naming the variable that is missing or unusable."""

    def describe_source(self) -> str:
        """Return a sentence on where the secret comes from and whether it was sent, for
        a request that the service refused; never the secret.
        """

    def sign(
        self, method: str, url: str, headers: Mapping[str, str], body: bytes
    ) -> SignedHeaders:
        """Return headers that authenticate a request with exactly this URL, these
        headers and this body.
        """

    def adopt_clock(
        self,
        signed: SignedHeaders,
        status: int,
        headers: Mapping[str, str],
        body: bytes,
    ) -> bool:
        """Correct the clock if the answer to ``signed`` rejects its date; return
        whether the same request may now be signed again.
        """


def signer_for(
    auth: Auth | None,
    variable: str | None,
    region: str,
    now: Callable[[], float] = time.time,
) -> Signer:
    """Return the signer for a service. ``variable``: name of the environment variable
    with the token, None without one. ``now``: seconds since 1970.
    """
    if auth is not None and auth.sigv4:
        return AwsSigner(auth.sigv4, region, now)
    return TokenSigner(auth or Auth(), variable if auth is not None else None)


class TokenSigner:
    """Sends a token in a header, or in a JSON body."""

    def __init__(self, auth: Auth, variable: str | None) -> None:
        self._auth, self._variable = auth, variable

    @property
    def secret(self) -> bool:
        return self._variable is not None

    def check(self) -> None:
        self._token()

    def describe_source(self) -> str:
        if self._variable is None:
            return (
                "No key was sent: put it into an environment variable and name that with"
                " --cloud.token-env NAME"
            )
        part = "the body" if self._auth.json_key else f"the header {self._auth.header}"
        return (
            f"The key comes from the environment variable"
            f" {describe_variables(self._variable)} and is sent in {part}: check it and"
            " what its account may do; --cloud.token-env names another variable"
        )

    def sign(
        self, method: str, url: str, headers: Mapping[str, str], body: bytes
    ) -> SignedHeaders:
        token = self._token()
        if not token:
            return SignedHeaders({}, ())
        if self._auth.json_key:
            member = json.dumps({self._auth.json_key: token})[1:].encode()
            signed_body = body.rstrip()[:-1] + b", " + member if body else body
            return SignedHeaders({}, (token,), body=signed_body)
        header = {self._auth.header: f"{self._auth.prefix}{token}"}
        return SignedHeaders(header, (token,))

    def adopt_clock(
        self,
        signed: SignedHeaders,
        status: int,
        headers: Mapping[str, str],
        body: bytes,
    ) -> bool:
        return False

    def _token(self) -> str:
        if self._variable is None:
            return ""
        token = _read_variable(self._variable)
        if not token:
            raise ConfigError(
                f"the environment variable {self._variable} is not set; put the"
                " service's token there, or name the variable that holds it with"
                " cloud.token_env"
            )
        return token


class AwsSigner:
    """Signs with AWS Signature Version 4. A date that the service refuses is corrected
    once, by the service's own.
    """

    secret = True

    def __init__(
        self, service: str, region: str, now: Callable[[], float] = time.time
    ) -> None:
        self._service, self._region, self._now = service, region, now
        self._correction = 0.0

    def check(self) -> None:
        _read_aws_credentials()
        _import_botocore()

    def describe_source(self) -> str:
        variables = describe_variables(AWS_ID, AWS_SECRET, AWS_SESSION)
        return (
            f"Requests are signed for the region {self._region} with the environment"
            f" variables {variables}: check them, what their account may do, and"
            " --cloud.region"
        )

    def sign(
        self, method: str, url: str, headers: Mapping[str, str], body: bytes
    ) -> SignedHeaders:
        key_id, key, session = _read_aws_credentials()
        correction = self._correction
        date = time.strftime(AWS_DATE, time.gmtime(self._now() + correction))
        added = {"X-Amz-Date": date}
        if session:
            added["X-Amz-Security-Token"] = session
        added["Authorization"], signature = self._signature(
            method, url, {**headers, **added}, body, (key_id, key, session)
        )
        credentials = (key_id, key, session, signature)
        secrets = tuple(secret for secret in credentials if secret)
        return SignedHeaders(added, secrets, correction)

    def adopt_clock(
        self,
        signed: SignedHeaders,
        status: int,
        headers: Mapping[str, str],
        body: bytes,
    ) -> bool:
        if status < 400 or not any(code in body for code in CLOCK_ERRORS):
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
        """Return the Authorization header and the signature in it. botocore's own
        ``add_auth`` takes no date, and logs the session token.
        """
        sigv4, aws_request, aws_credentials = _import_botocore()
        request = aws_request(method=method, url=url, headers=dict(headers), data=body)
        request.context["timestamp"] = headers["X-Amz-Date"]
        signer = sigv4(aws_credentials(*credentials), self._service, self._region)
        text_to_sign = signer.string_to_sign(request, signer.canonical_request(request))
        signature = signer.signature(text_to_sign, request)
        names = signer.signed_headers(signer.headers_to_sign(request))
        header = (
            f"AWS4-HMAC-SHA256 Credential={signer.scope(request)},"
            f" SignedHeaders={names}, Signature={signature}"
        )
        return header, signature


def redact_secrets(content: bytes, secrets: Iterable[str]) -> bytes:
    """Return ``content`` without the secrets and their first characters: plain,
    escaped, url-encoded or inside base64.
    """
    forms = {form for secret in secrets for form in _encoded_forms(secret)}
    longest_first = sorted(forms, key=len, reverse=True)
    for form in longest_first:
        content = content.replace(form, b"***")
    for form in longest_first:
        content = _remove_prefixes(content, form)
    return content


def _remove_prefixes(content: bytes, form: bytes) -> bytes:
    """Return ``content`` without texts that begin like ``form``, as far as they agree
    with it.
    """
    parts: list[bytes] = []
    end = 0
    while (start := content.find(form[:PREFIX_LENGTH], end)) >= 0:
        parts.append(content[end:start])
        end = start + _common_length(form, content[start : start + len(form)])
    parts.append(content[end:])
    return b"***".join(parts)


def _common_length(first: bytes, second: bytes) -> int:
    """Return how many first bytes are equal; the length of ``first`` if all are."""
    for length, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return length
    return len(first)


def without_traceback(error: BaseException) -> BaseException:
    """Return the error as if it began where it is raised next: variables of the frames
    below may hold secrets.
    """
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)


def _encoded_forms(secret: str) -> set[bytes]:
    quoted = {quote(secret), quote(secret, safe=""), quote_plus(secret)}
    lower_case = {
        re.sub("%..", lambda match: match.group().lower(), text) for text in quoted
    }
    in_json = json.dumps(secret)[1:-1]
    escaped = {in_json, in_json.replace("/", "\\/"), html.escape(secret)}
    texts = {secret} | quoted | lower_case | escaped
    forms = {text.encode() for text in texts} | _base64_forms(secret.encode())
    return {form for form in forms if len(form) >= SECRET_LENGTH_MIN}


def _base64_forms(secret: bytes) -> set[bytes]:
    """Return the part of the base64 form that does not depend on the text before and
    after it, for each of three alignments.
    """
    forms = set()
    for shift in range(3):
        encoded = base64.b64encode(bytes(shift) + secret)
        certain = encoded[-(-shift * 8 // 6) : (shift + len(secret)) * 8 // 6]
        url_safe = certain.replace(b"+", b"-").replace(b"/", b"_")
        forms |= {certain, url_safe}
    return forms


def _read_variable(name: str) -> str:
    """Return the variable's text, or an empty string. Raises ``ConfigError`` for
    characters that a header can't hold.
    """
    if not _fits_header(os.environ.get(name, "").strip()):
        raise ConfigError(
            f"the environment variable {name} holds characters that can't be sent in a"
            " header"
        )
    return os.environ.get(name, "").strip()


def _fits_header(text: str) -> bool:
    return text.isascii() and text.isprintable()


def _read_aws_credentials() -> tuple[str, str, str]:
    """Return key id, secret key and session token (may be empty)."""
    missing = [name for name in (AWS_ID, AWS_SECRET) if not _read_variable(name)]
    if missing:
        raise ConfigError(
            f"the environment variable {' and '.join(missing)} must be set to sign"
            " requests to AWS"
        )
    return (
        _read_variable(AWS_ID),
        _read_variable(AWS_SECRET),
        _read_variable(AWS_SESSION),
    )


def _import_botocore() -> tuple[
    Callable[..., Any], Callable[..., Any], Callable[..., Any]
]:
    """Return SigV4Auth, AWSRequest and Credentials."""
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
    """Return how far an HTTP date is ahead of ``now``; 0 for an unusable one."""
    try:
        return parsedate_to_datetime(date).timestamp() - now
    except (ValueError, TypeError, IndexError, OverflowError):
        return 0.0
