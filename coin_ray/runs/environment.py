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
CHECK_ALIVE = "/ray.rpc.NodeInfoGcsService/CheckAlive"
"""The call by which Ray asks its head whether it lives; an empty message is a whole
request."""
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
            wants_token = _head_wants_token(host, port)
        except OSError as error:
            if time.monotonic() < give_up_at:
                time.sleep(RETRY_SECONDS)
                continue
            raise ConfigError(
                f"no cluster answers at RAY_ADDRESS={address} ({error}). Start its head,"
                " correct RAY_ADDRESS, or unset it to run on this machine; nothing was"
                " asked or paid"
            ) from None
        break
    sends_token = os.environ.get("RAY_AUTH_MODE", "").lower() == "token"
    if wants_token is False and sends_token:
        raise ConfigError(
            f"RAY_AUTH_MODE is token, but the cluster at RAY_ADDRESS={address} was"
            " started without a token: its actors would never start. Unset"
            " RAY_AUTH_MODE, or start the cluster with it; nothing was asked or paid"
        )
    if wants_token and not sends_token:
        raise ConfigError(
            f"the cluster at RAY_ADDRESS={address} wants a token. Export"
            " RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN unless the token is in"
            " ~/.ray/auth_token; nothing was asked or paid"
        )


def _head_wants_token(host: str, port: int) -> bool | None:
    """Return whether the head refuses a call without a token; None: it doesn't say.

    Raises OSError if no head answers: a forwarded port accepts connections for a head
    that is dead. Servers with TLS (RAY_USE_TLS) are only connected to.
    """
    socket.create_connection((host, port), CONNECT_SECONDS).close()
    if os.environ.get("RAY_USE_TLS", "0") != "0":
        return None
    import grpc

    without_proxy = [("grpc.enable_http_proxy", 0)]
    target = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    with grpc.insecure_channel(target, without_proxy) as channel:
        try:
            channel.unary_unary(CHECK_ALIVE)(b"", timeout=CONNECT_SECONDS)
        except grpc.RpcError as error:
            code = error.code()
            if code == grpc.StatusCode.UNAUTHENTICATED:
                return True
            if code in (
                grpc.StatusCode.UNAVAILABLE,
                grpc.StatusCode.DEADLINE_EXCEEDED,
            ):
                raise ConnectionError(f"not a head of Ray: {error.details()}") from None
            return None
        return False


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
