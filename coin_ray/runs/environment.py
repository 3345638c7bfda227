"""Check what a run needs of its machine before anything is read, asked or paid: a root
and folders that can be written, and a cluster that answers.
"""

from __future__ import annotations

import os
import socket
import tempfile
import time
import uuid
from urllib.parse import urlsplit

from coin_ray import storage
from coin_ray.errors import (
    FULL_DISK_ERRNOS,
    ConfigError,
    InputError,
    StorageUnavailable,
)

CLUSTER_SECONDS = 15.0
"""Time in which a cluster's head must answer, from when on no further try begins."""
CONNECT_SECONDS = 5.0
RETRY_SECONDS = 1.0
FINDS_ITSELF = ("auto", "local")
"""Values of RAY_ADDRESS that name no host."""
HTTP2_GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(
    [0, 0, 0, 4, 0, 0, 0, 0, 0]
)
"""The client's preface and empty settings (RFC 9113, 3.4): the server sends its own."""
FRAME_HEADER_BYTES = 9
SETTINGS_FRAME = 4
TOKEN_VARIABLES = ("RAY_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
"""Variables with which Ray makes no token of its own: a cluster has one."""
TEMPORARY_FOLDERS = ("TMPDIR", "RAY_TMPDIR")
"""Variables with a folder for temporary files: Ray's sockets and logs, and copies."""


def check_environment(root: str) -> None:
    """Check the temporary folders, the cluster and the root.

    Raises ConfigError, InputError for a root that can't be written, StorageUnavailable
    for storage that can't be reached.
    """
    _check_temporary_folders()
    _check_home()
    check_cluster_address()
    storage.check_reachable(root)
    _check_writable(root)


def check_cluster_address() -> None:
    """Raise ConfigError if no head of a cluster answers at RAY_ADDRESS: Ray would wait
    for ever.
    """
    address = os.environ.get("RAY_ADDRESS", "")
    if not address or address in FINDS_ITSELF:
        return
    parts = urlsplit(address if "://" in address else f"ray://{address}")
    host, port = parts.hostname, _port_of(address)
    if host is None or port is None or parts.scheme != "ray":
        raise ConfigError(
            f"RAY_ADDRESS is {address!r}; expected HOST:PORT of a cluster's head (an"
            " address with http:// is for `ray job submit` only). Unset it to run on"
            " this machine"
        )
    give_up_at = time.monotonic() + CLUSTER_SECONDS
    while True:
        try:
            _check_speaks_http2(host, port)
        except OSError as error:
            if time.monotonic() < give_up_at:
                time.sleep(RETRY_SECONDS)
                continue
            raise ConfigError(
                f"no cluster answers at RAY_ADDRESS={address} ({error}). Start its head,"
                " correct RAY_ADDRESS, or unset it to run on this machine; nothing was"
                " asked or paid"
            ) from None
        return


def _check_speaks_http2(host: str, port: int) -> None:
    """Raise OSError unless the server begins HTTP/2, on which Ray's gRPC is built.

    A forwarded port accepts connections for a head that is dead. Servers with TLS
    (RAY_USE_TLS) are only connected to.
    """
    with socket.create_connection((host, port), CONNECT_SECONDS) as connection:
        if os.environ.get("RAY_USE_TLS", "0") != "0":
            return
        connection.sendall(HTTP2_GREETING)
        answer = connection.recv(FRAME_HEADER_BYTES, socket.MSG_WAITALL)
    if not answer:
        raise ConnectionError("it closes the connection")
    if len(answer) < FRAME_HEADER_BYTES or answer[3] != SETTINGS_FRAME:
        raise ConnectionError(f"not a head of Ray: it answers {answer!r}")


def _port_of(address: str) -> int | None:
    try:
        return urlsplit(address if "://" in address else f"ray://{address}").port
    except ValueError:
        return None


def _check_temporary_folders() -> None:
    for name in TEMPORARY_FOLDERS:
        folder = os.environ.get(name)
        if not folder:
            continue
        try:
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            raise ConfigError(
                f"{name}={folder}, the folder for temporary files, can't be written"
                f" ({error.strerror}). Create it or give another one: export"
                f" {name}=/path"
            ) from None


def _check_home() -> None:
    """Check that Ray can keep its token below HOME, if it has none and needs one."""
    folder = os.path.expanduser("~/.ray")
    if (
        any(os.environ.get(name) for name in TOKEN_VARIABLES)
        or os.environ.get("RAY_AUTH_MODE") == "disabled"
        or os.path.exists(os.path.join(folder, "auth_token"))
    ):
        return
    try:
        os.makedirs(folder, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ConfigError(
            f"HOME={os.path.expanduser('~')} can't be written ({error.strerror}): Ray"
            " keeps a token in .ray below it. Give another one: export HOME=/path, or"
            " export RAY_AUTH_MODE=disabled on a machine of your own"
        ) from None


def _check_writable(root: str) -> None:
    """Write and remove a small file below the root."""
    probe = storage.join(root, "lease", f"probe-{uuid.uuid4().hex[:8]}")
    try:
        storage.write_bytes(probe, b"")
        storage.remove(probe)
    except StorageUnavailable:
        raise
    except Exception as error:  # optional clients have errors of their own
        if isinstance(error, OSError) and error.errno in FULL_DISK_ERRNOS:
            raise
        reason = str(error).strip().splitlines() or [""]
        raise InputError(
            f"--root {root} can't be written ({type(error).__name__}: {reason[0]})."
            " Give a folder or URI that this user may write, by another --root; nothing"
            " was asked or paid"
        ) from None
