"""Serve an application below a secret path, for callers that send no token."""

from __future__ import annotations

import secrets

from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send


class SecretPath:
    """An ASGI application that passes requests below ``/SECRET`` on to ``app``, without
    that prefix. It answers all others with 404.
    """

    def __init__(self, app: ASGIApp, secret: str) -> None:
        self.app = app
        self.secret = secret

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        first_segment, _, remaining_path = scope["path"].lstrip("/").partition("/")
        if secrets.compare_digest(first_segment.encode(), self.secret.encode()):
            path = f"/{remaining_path}"
            inner_scope = {**scope, "path": path, "raw_path": path.encode()}
            await self.app(inner_scope, receive, send)
            return
        await PlainTextResponse("not found", 404)(scope, receive, send)
