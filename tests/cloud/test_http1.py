from __future__ import annotations

import asyncio
import ssl
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from coin_ray.cloud.http import http1
from coin_ray.cloud.http.http1 import Http1Connection

TIMEOUT = httpx.Timeout(0.3, connect=5.0).as_dict()
Talk = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
WHOLE = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nX-Name: value\r\n\r\nhello"
CHUNKED = (
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding:"
    b" chunked\r\n\r\n2\r\nhe\r\n3\r\nllo\r\n0\r\n\r\n"
)
CONTINUED = b"HTTP/1.1 100 Continue\r\n\r\n" + WHOLE
UNTIL_CLOSED = b"HTTP/1.1 200 OK\r\n\r\nhello"
SAID_CLOSE = WHOLE.replace(b"X-Name: value", b"Connection: close")


class Server:
    """Gives each request the next answer; None: no answer at all. Counts connections
    and keeps what came."""

    def __init__(self, *answers: bytes | None, close: bool = False) -> None:
        self.answers, self.close = list(answers), close
        self.connections, self.requests = 0, list[bytes]()
        self.unasked, self.pause = b"", 0.0
        """What is sent after each answer although nobody asked, and how long after."""

    async def talk(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.connections += 1
        try:
            while self.answers:
                head = await reader.readuntil(b"\r\n\r\n")
                length = next(
                    (
                        int(line.split(b":")[1])
                        for line in head.split(b"\r\n")
                        if line.lower().startswith(b"content-length")
                    ),
                    0,
                )
                self.requests.append(head + await reader.readexactly(length))
                answer = self.answers.pop(0)
                if answer is None:
                    await asyncio.sleep(5)
                    continue
                for part in (answer[:20], answer[20:]):
                    writer.write(part)
                    await writer.drain()
                if self.unasked:
                    await asyncio.sleep(self.pause)
                    writer.write(self.unasked)
                if self.close or answer == SAID_CLOSE:
                    break
        except asyncio.IncompleteReadError:
            pass
        finally:
            writer.close()


async def ask(
    connection: Http1Connection, url: str, content: bytes = b"question"
) -> tuple[int, bytes]:
    request = httpx.Request(
        "POST", f"{url}/v1?a=b", content=content, extensions={"timeout": TIMEOUT}
    )
    response = await connection.handle_async_request(request)
    try:
        return response.status_code, await response.aread()
    finally:
        await response.aclose()


def talked(
    server: Server, *scripts: Callable[[Http1Connection, str], Awaitable[None]]
) -> None:
    async def main() -> None:
        running = await asyncio.start_server(server.talk, "127.0.0.1", 0)
        connection = Http1Connection(None)
        url = f"http://127.0.0.1:{running.sockets[0].getsockname()[1]}"
        for script in scripts:
            await script(connection, url)
        await connection.aclose()
        running.close()

    asyncio.run(main())


@pytest.mark.parametrize(
    ("answer", "close"),
    [
        (WHOLE, False),
        (CHUNKED, False),
        (CONTINUED, False),
        (UNTIL_CLOSED, True),
        (SAID_CLOSE, False),
    ],
)
def test_each_way_of_sending_a_body_is_read_and_the_connection_is_kept_where_it_can_be(
    answer: bytes, close: bool
) -> None:
    server = Server(answer, answer, close=close)

    async def twice(connection: Http1Connection, url: str) -> None:
        assert await ask(connection, url) == (200, b"hello")
        await asyncio.sleep(0.02)
        assert await ask(connection, url) == (200, b"hello")

    talked(server, twice)
    assert server.connections == (2 if close or answer == SAID_CLOSE else 1)
    assert server.requests[0].startswith(b"POST /v1?a=b HTTP/1.1\r\nHost: 127.0.0.1:")
    assert server.requests[0].endswith(b"\r\n\r\nquestion")


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (
            b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\nshort",
            httpx.RemoteProtocolError,
        ),
        (b"HTTP/1.1 20", httpx.RemoteProtocolError),
        (b"", httpx.RemoteProtocolError),
        (b"nonsense, and more of it\r\n\r\n", httpx.RemoteProtocolError),
        (None, httpx.ReadTimeout),
    ],
)
def test_what_is_no_whole_answer_is_httpx_s_error_and_the_next_request_gets_a_new_connection(
    answer: bytes | None, error: type[Exception]
) -> None:
    server = Server(answer, WHOLE, close=answer is not None)

    async def fails_then_works(connection: Http1Connection, url: str) -> None:
        with pytest.raises(error):
            await ask(connection, url)
        assert await ask(connection, url) == (200, b"hello")

    talked(server, fails_then_works)
    assert server.connections == 2


def test_a_connection_that_was_idle_for_long_is_not_used_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(http1, "IDLE_SECONDS", -1.0)
    server = Server(WHOLE, WHOLE)

    async def twice(connection: Http1Connection, url: str) -> None:
        await ask(connection, url)
        await ask(connection, url)

    talked(server, twice)
    assert server.connections == 2


@pytest.mark.parametrize("pause", [0.0, 0.05])
def test_what_a_server_says_unasked_is_no_answer_to_the_next_request(
    pause: float,
) -> None:
    """As 408 on an idle connection, or an answer too many: it may come with the one
    before or later."""
    unasked = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nwrong"
    server = Server(WHOLE, WHOLE)
    server.unasked, server.pause = unasked, pause

    async def twice(connection: Http1Connection, url: str) -> None:
        assert await ask(connection, url) == (200, b"hello")
        await asyncio.sleep(0.15)
        assert await ask(connection, url) == (200, b"hello")

    talked(server, twice)
    assert server.connections == 2


def secured(folder: Path, name: str) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """A server's context with a certificate of its own for ``name``, and a client's
    that trusts it."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject, now = (
        x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]),
        datetime.now(UTC),
    )
    certificate = (
        x509.CertificateBuilder(
            subject,
            subject,
            key.public_key(),
            x509.random_serial_number(),
            now - timedelta(1),
            now + timedelta(1),
        )
        .add_extension(
            x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False
        )
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    plain = serialization.NoEncryption()
    (folder / "key.pem").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain
        )
    )
    (folder / "certificate.pem").write_bytes(
        certificate.public_bytes(serialization.Encoding.PEM)
    )
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    server.load_cert_chain(folder / "certificate.pem", folder / "key.pem")
    return server, ssl.create_default_context(cafile=folder / "certificate.pem")


def asked_over_tls(
    server: Server, context: ssl.SSLContext, trusted: ssl.SSLContext | None
) -> tuple[int, bytes]:
    async def main() -> tuple[int, bytes]:
        running = await asyncio.start_server(server.talk, "127.0.0.1", 0, ssl=context)
        connection = Http1Connection(trusted)
        try:
            return await ask(
                connection, f"https://localhost:{running.sockets[0].getsockname()[1]}"
            )
        finally:
            await connection.aclose()
            running.close()

    return asyncio.run(main())


def test_over_tls_the_server_must_be_who_it_says(tmp_path: Path) -> None:
    context, trusting = secured(tmp_path, "localhost")
    server = Server(WHOLE)
    assert asked_over_tls(server, context, trusting) == (200, b"hello")
    assert server.requests[0].endswith(b"question")

    other, trusting_other = secured(tmp_path, "elsewhere.example")
    unheard = Server(WHOLE)
    for given in (trusting_other, ssl.create_default_context(), None):
        with pytest.raises(httpx.ConnectError):
            asked_over_tls(unheard, other, given)
    assert not unheard.requests, (
        "nothing is sent to a server that is not who it should be"
    )


def test_a_cancelled_request_leaves_nothing_for_the_next_one_to_read() -> None:
    server = Server(None, WHOLE)

    async def cancelled(connection: Http1Connection, url: str) -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(ask(connection, url), 0.05)
        assert await ask(connection, url) == (200, b"hello")

    talked(server, cancelled)
    assert server.connections == 2


def test_nobody_there_is_a_connect_error_and_a_server_without_tls_too() -> None:
    async def nobody() -> None:
        with pytest.raises(httpx.ConnectError):
            await ask(Http1Connection(None), "http://127.0.0.1:1")

    asyncio.run(nobody())

    async def no_tls(_: Http1Connection, url: str) -> None:
        with pytest.raises((httpx.ConnectError, httpx.ConnectTimeout)):
            await ask(
                Http1Connection(ssl.create_default_context()),
                url.replace("http:", "https:"),
            )

    talked(Server(b""), no_tls)
