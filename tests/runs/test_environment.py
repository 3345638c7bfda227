"""What a run needs of its machine is checked before anything is read, asked or paid."""

from __future__ import annotations

import errno
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import grpc
import pytest

from coin_ray import storage
from coin_ray.errors import ConfigError, InputError
from coin_ray.runs import environment, runner
from coin_ray.runs.environment import check_environment

from .test_failed_images import CONFIG, STEPS


@pytest.fixture(autouse=True)
def variables(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
    names = (
        "RAY_ADDRESS",
        "RAY_USE_TLS",
        "RAY_AUTH_MODE",
        "RAY_AUTH_TOKEN",
        "RAY_AUTH_TOKEN_PATH",
    )
    for name in (*names, "TMPDIR", "RAY_TMPDIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(environment, "CLUSTER_SECONDS", 0.1)
    monkeypatch.setattr(environment, "RETRY_SECONDS", 0.01)


@contextmanager
def serve(answer: bytes | None) -> Iterator[int]:
    """Yield the port of a server that sends these bytes, and closes; None: that is
    silent."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        connections = []

        def accept() -> None:
            with suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    connections.append(connection)
                    if answer is not None:
                        connection.recv(1000)
                        connection.sendall(answer)
                        connection.close()

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        yield int(server.getsockname()[1])
        server.shutdown(socket.SHUT_RDWR)
        thread.join()
        for connection in connections:
            connection.close()


@contextmanager
def serve_head(code: grpc.StatusCode, host: str = "127.0.0.1") -> Iterator[int]:
    """Yield the port of a server that answers as Ray's head does, with that status."""

    def answer(_: bytes, call: grpc.ServicerContext) -> bytes:
        if code != grpc.StatusCode.OK:
            call.abort(code, "InvalidAuthToken")
        return b""

    handlers = {"CheckAlive": grpc.unary_unary_rpc_method_handler(answer)}
    service = "ray.rpc.NodeInfoGcsService"
    server = grpc.server(ThreadPoolExecutor(1))
    server.add_generic_rpc_handlers(
        [grpc.method_handlers_generic_handler(service, handlers)]
    )
    number = server.add_insecure_port(f"{host}:0")
    server.start()
    try:
        yield number
    finally:
        server.stop(None).wait()


@pytest.fixture
def port() -> Iterator[int]:
    """The port of a head without a token."""
    with serve_head(grpc.StatusCode.OK) as number:
        yield number


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def test_a_good_environment_leaves_nothing_behind(
    tmp_path: Path, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    for address in (f"127.0.0.1:{port}", f"ray://127.0.0.1:{port}", "auto", "local"):
        monkeypatch.setenv("RAY_ADDRESS", address)
        check_environment(str(tmp_path / "root"))
    assert [path.name for path in tmp_path.rglob("*")] == ["root", "lease"]


@pytest.mark.parametrize("form", ["127.0.0.1:{}", "ray://127.0.0.1:{}"])
def test_a_dead_cluster_is_named(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = form.format(_free_port())
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ConfigError, match=rf"RAY_ADDRESS={address} .*refused") as error:
        check_environment(str(tmp_path))
    assert "unset it to run on this machine" in str(error.value)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (None, "not a head of Ray: Deadline Exceeded"),
        (b"", "not a head of Ray"),
        (b"HTTP/1.1 404 Not Found\r\n\r\n", "not a head of Ray"),
    ],
    ids=["silent", "closes", "another server"],
)
def test_a_port_behind_which_no_head_answers(
    answer: bytes | None,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As a port that ssh forwards to a head that is dead."""
    monkeypatch.setattr(environment, "CONNECT_SECONDS", 0.1)
    with serve(answer) as number:
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{number}")
        with pytest.raises(ConfigError, match=f"no cluster answers.*{message}"):
            check_environment(str(tmp_path))
        monkeypatch.setenv("RAY_USE_TLS", "1")
        check_environment(str(tmp_path))


def test_a_token_for_a_head_that_has_none(
    tmp_path: Path, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray joins it, and runs tasks there, but never an actor."""
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    with pytest.raises(ConfigError, match="started without a token"):
        check_environment(str(tmp_path / "root"))
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    check_environment(str(tmp_path / "root"))


@pytest.mark.parametrize("mode", ["", "disabled"])
def test_no_token_for_a_head_that_wants_one(
    mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serve_head(grpc.StatusCode.UNAUTHENTICATED) as port:
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
        monkeypatch.setenv("RAY_AUTH_MODE", mode)
        with pytest.raises(ConfigError, match=r"wants a token.*RAY_AUTH_MODE=token"):
            check_environment(str(tmp_path / "root"))
        monkeypatch.setenv("RAY_AUTH_MODE", "token")
        check_environment(str(tmp_path / "root"))


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="needs IPv6")
def test_a_head_with_an_address_of_ipv6(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serve_head(grpc.StatusCode.OK, "[::1]") as port:
        monkeypatch.setenv("RAY_ADDRESS", f"[::1]:{port}")
        check_environment(str(tmp_path / "root"))


def test_a_head_that_does_not_know_the_call_decides_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the port of Ray's client."""
    with serve_head(grpc.StatusCode.UNIMPLEMENTED) as port:
        monkeypatch.setenv("RAY_ADDRESS", f"ray://127.0.0.1:{port}")
        monkeypatch.setenv("RAY_AUTH_MODE", "token")
        check_environment(str(tmp_path / "root"))


@pytest.mark.parametrize(
    "address", ["head", "head:port", ":6379", "http://127.0.0.1:8265"]
)
def test_an_address_without_host_or_port(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ConfigError, match="expected HOST:PORT"):
        check_environment(str(tmp_path))


@pytest.mark.parametrize("name", ["TMPDIR", "RAY_TMPDIR"])
def test_a_temporary_folder_that_cannot_be_written(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, str(tmp_path / "absent"))
    with pytest.raises(ConfigError, match=f"{name}=.*absent.*No such file"):
        check_environment(str(tmp_path))


@pytest.mark.parametrize(
    "variable", ["", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"]
)
def test_a_home_that_cannot_be_written(
    variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    if variable:
        monkeypatch.setenv(variable, "disabled")
        check_environment(str(tmp_path))
        return
    with pytest.raises(ConfigError, match=r"HOME=.*Ray keeps a token"):
        check_environment(str(tmp_path))


def test_a_root_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for root in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(InputError, match=r"--root .* can't be written") as error:
            check_environment(str(root))
        assert error.value.exit_code == 2


def test_a_full_disk_stays_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(uri: str, content: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", uri)

    monkeypatch.setattr(storage, "write_bytes", fail)
    with pytest.raises(OSError, match="No space"):
        check_environment(str(tmp_path))


def test_a_run_checks_before_its_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No step is begun: the stages do not even exist."""
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{_free_port()}")
    with pytest.raises(ConfigError, match="RAY_ADDRESS"):
        runner.run_pipeline(CONFIG, STEPS, str(tmp_path))
    assert not list(tmp_path.iterdir())
