from __future__ import annotations

import asyncio
import gzip
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
from coin_ray.cloud.http.connections import Connections
from coin_ray.cloud.http.http1 import Http1Connection, encode_head
from coin_ray.cloud.http.signing import signer_for
from coin_ray.cloud.protocol import PreparedRequest

Talk = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
WHOLE = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nX-Name: value\r\n\r\nhello"
CHUNKED = (
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding:"
    b" chunked\r\n\r\n2\r\nhe\r\n3\r\nllo\r\n0\r\n\r\n"
)
CONTINUED = b"HTTP/1.1 100 Continue\r\n\r\n" + WHOLE
UNTIL_CLOSED = b"HTTP/1.1 200 OK\r\n\r\nhello"
CONNECTION_CLOSE = WHOLE.replace(b"X-Name: value", b"Connection: close")


class _ScriptedServer:
    """Sends each request the next response; None: no response. Counts connections and
    records requests.
    """

    def __init__(self, *responses: bytes | None, close: bool = False) -> None:
        self.responses = list(responses)
        self.close = close
        self.connections = 0
        self.requests: list[bytes] = []
        self.unrequested = b""
        """Bytes sent after each response without a request."""
        self.pause = 0.0
        """Seconds between a response and the unrequested bytes."""

    async def talk(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.connections += 1
        try:
            while self.responses:
                head = await reader.readuntil(b"\r\n\r\n")
                length = 0
                for line in head.split(b"\r\n"):
                    if line.lower().startswith(b"content-length"):
                        length = int(line.split(b":")[1])
                self.requests.append(head + await reader.readexactly(length))
                response = self.responses.pop(0)
                if response is None:
                    await asyncio.sleep(5)
                    continue
                for part in (response[:20], response[20:]):
                    writer.write(part)
                    await writer.drain()
                if self.unrequested:
                    await asyncio.sleep(self.pause)
                    writer.write(self.unrequested)
                if self.close or response == CONNECTION_CLOSE:
                    break
        except asyncio.IncompleteReadError:
            pass
        finally:
            writer.close()


async def _post(
    connection: Http1Connection,
    url: str,
    body: bytes = b"question",
    connect_seconds: float = 5.0,
) -> tuple[int, bytes]:
    address = httpx.URL(f"{url}/v1?a=b")
    headers = {"Host": address.netloc.decode(), "Content-Length": str(len(body))}
    head = encode_head("POST", address.raw_path, headers)
    response = await connection.send(address, head, body, connect_seconds, 0.3)
    return response.status, response.body


def _run_scripts(
    server: _ScriptedServer, *scripts: Callable[[Http1Connection, str], Awaitable[None]]
) -> None:
    async def main() -> None:
        running = await asyncio.start_server(server.talk, "127.0.0.1", 0)
        connection = Http1Connection(None)
        url = f"http://127.0.0.1:{running.sockets[0].getsockname()[1]}"
        for script in scripts:
            await script(connection, url)
        connection.close()
        running.close()

    asyncio.run(main())


@pytest.mark.parametrize(
    ("response", "close"),
    [
        (WHOLE, False),
        (CHUNKED, False),
        (CONTINUED, False),
        (UNTIL_CLOSED, True),
        (CONNECTION_CLOSE, False),
    ],
)
def test_each_way_of_sending_a_body_is_read_and_the_connection_is_kept_where_it_can_be(
    response: bytes, close: bool
) -> None:
    server = _ScriptedServer(response, response, close=close)

    async def twice(connection: Http1Connection, url: str) -> None:
        assert await _post(connection, url) == (200, b"hello")
        await asyncio.sleep(0.02)
        assert await _post(connection, url) == (200, b"hello")

    _run_scripts(server, twice)
    assert server.connections == (2 if close or response == CONNECTION_CLOSE else 1)
    assert server.requests[0].startswith(b"POST /v1?a=b HTTP/1.1\r\nHost: 127.0.0.1:")
    assert server.requests[0].endswith(b"\r\n\r\nquestion")


@pytest.mark.parametrize(
    ("response", "error"),
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
    response: bytes | None, error: type[Exception]
) -> None:
    server = _ScriptedServer(response, WHOLE, close=response is not None)

    async def fails_then_works(connection: Http1Connection, url: str) -> None:
        with pytest.raises(error):
            await _post(connection, url)
        assert await _post(connection, url) == (200, b"hello")

    _run_scripts(server, fails_then_works)
    assert server.connections == 2


def test_a_connection_that_was_idle_for_long_is_not_used_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(http1, "IDLE_SECONDS", -1.0)
    server = _ScriptedServer(WHOLE, WHOLE)

    async def twice(connection: Http1Connection, url: str) -> None:
        await _post(connection, url)
        await _post(connection, url)

    _run_scripts(server, twice)
    assert server.connections == 2


@pytest.mark.parametrize("pause", [0.0, 0.05])
def test_what_a_server_says_unasked_is_no_answer_to_the_next_request(
    pause: float,
) -> None:
    """A server may send 408 on an idle connection, or one response too many, together with
    the response before it or later.
    """
    server = _ScriptedServer(WHOLE, WHOLE)
    server.unrequested = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nwrong"
    server.pause = pause

    async def twice(connection: Http1Connection, url: str) -> None:
        assert await _post(connection, url) == (200, b"hello")
        await asyncio.sleep(0.1)
        assert await _post(connection, url) == (200, b"hello")

    _run_scripts(server, twice)
    assert server.connections == 2


def _tls_contexts(folder: Path, name: str) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """Return a server's context with a new certificate for ``name``, and the context of a
    client that trusts it.
    """
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.now(UTC)
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


def _post_over_tls(
    server: _ScriptedServer, context: ssl.SSLContext, trusted: ssl.SSLContext | None
) -> tuple[int, bytes]:
    async def main() -> tuple[int, bytes]:
        running = await asyncio.start_server(server.talk, "127.0.0.1", 0, ssl=context)
        connection = Http1Connection(trusted)
        port = running.sockets[0].getsockname()[1]
        try:
            return await _post(connection, f"https://localhost:{port}")
        finally:
            connection.close()
            running.close()

    return asyncio.run(main())


def test_over_tls_the_server_must_be_who_it_says(tmp_path: Path) -> None:
    server_context, trusting_client = _tls_contexts(tmp_path, "localhost")
    server = _ScriptedServer(WHOLE)
    response = _post_over_tls(server, server_context, trusting_client)
    assert response == (200, b"hello")
    assert server.requests[0].endswith(b"question")

    other_context, client_of_other = _tls_contexts(tmp_path, "elsewhere.example")
    distrusted_server = _ScriptedServer(WHOLE)
    for client_context in (client_of_other, ssl.create_default_context(), None):
        with pytest.raises(httpx.ConnectError):
            _post_over_tls(distrusted_server, other_context, client_context)
    assert not distrusted_server.requests, (
        "nothing is sent to a server that is not who it should be"
    )


def test_a_cancelled_request_leaves_nothing_for_the_next_one_to_read() -> None:
    server = _ScriptedServer(None, WHOLE)

    async def cancelled(connection: Http1Connection, url: str) -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(_post(connection, url), 0.05)
        assert await _post(connection, url) == (200, b"hello")

    _run_scripts(server, cancelled)
    assert server.connections == 2


def test_nobody_there_is_a_connect_error_and_a_server_without_tls_too() -> None:
    async def nobody() -> None:
        with pytest.raises(httpx.ConnectError):
            await _post(Http1Connection(None), "http://127.0.0.1:1")

    asyncio.run(nobody())

    async def no_tls(_: Http1Connection, url: str) -> None:
        connection = Http1Connection(ssl.create_default_context())
        https_url = url.replace("http:", "https:")
        with pytest.raises((httpx.ConnectError, httpx.ConnectTimeout)):
            await _post(connection, https_url, connect_seconds=0.3)

    _run_scripts(_ScriptedServer(b""), no_tls)


@pytest.mark.parametrize("is_own", [True, False])
def test_a_proxy_is_not_used_for_a_cloud_that_the_run_serves(
    monkeypatch: pytest.MonkeyPatch, is_own: bool
) -> None:
    """On a cluster such a cloud has the node's address, not a loopback one."""
    for name in ("no_proxy", "NO_PROXY", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    cloud, proxy = _ScriptedServer(WHOLE), _ScriptedServer(WHOLE)

    async def main() -> None:
        running_cloud = await asyncio.start_server(cloud.talk, "127.0.0.1", 0)
        running_proxy = await asyncio.start_server(proxy.talk, "127.0.0.1", 0)
        ports = [
            server.sockets[0].getsockname()[1]
            for server in (running_cloud, running_proxy)
        ]
        monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{ports[1]}")
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{ports[1]}")
        url = httpx.URL(f"http://127.0.0.2:{ports[0]}")
        if is_own:  # listens on one address only
            url = url.copy_with(host="127.0.0.1")
            monkeypatch.setattr("coin_ray.cloud.http.connections.LOOPBACK", ())
        connections = Connections(url, signer_for(None, None, ""), 5, is_own=is_own)
        reply = await connections.send(PreparedRequest("/v1", b"question"))
        assert reply.body == b"hello"
        await connections.aclose()
        running_cloud.close()
        running_proxy.close()

    asyncio.run(main())
    assert (len(cloud.requests), len(proxy.requests)) == ((1, 0) if is_own else (0, 1))


def test_a_compressed_body_is_unpacked() -> None:
    packed = gzip.compress(b"hello")
    response = (
        b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n"
    )
    server = _ScriptedServer(response % len(packed) + packed)

    async def ask(_: Http1Connection, url: str) -> None:
        connections = Connections(httpx.URL(url), signer_for(None, None, ""), 5)
        reply = await connections.send(PreparedRequest("/v1", b"question"))
        assert reply.body == b"hello"
        await connections.aclose()

    _run_scripts(server, ask)


def test_a_body_without_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http1, "BODY_MAX", 4)
    server = _ScriptedServer(WHOLE)

    async def ask(connection: Http1Connection, url: str) -> None:
        with pytest.raises(http1.BodyTooLong):
            await _post(connection, url)

    _run_scripts(server, ask)


def test_a_header_holds_no_further_header() -> None:
    with pytest.raises(httpx.LocalProtocolError):
        encode_head("POST", b"/", {"X-Name": "text\r\nX-Other: text"})
