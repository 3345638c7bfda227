"""An S3 server on this machine (moto), named by AWS_ENDPOINT_URL, that can go away."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

s3fs = pytest.importorskip("s3fs", reason="s3:// needs the extra s3")
moto_server = pytest.importorskip(
    "moto.server",
    reason="the S3 server of these tests is moto[server], of the extra test",
)

BUCKET = "coin-runs"
USERS_VARIABLES = (
    "AWS_PROFILE",
    "AWS_SESSION_TOKEN",
    "AWS_CONFIG_FILE",
    "AWS_SHARED_CREDENTIALS_FILE",
    "HTTP_PROXY",
    "http_proxy",
)


class S3Server:
    """Keeps its objects while it is stopped: they are in this process's memory."""

    def __init__(self) -> None:
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self.server = moto_server.ThreadedMotoServer("127.0.0.1", port=0)
        self.server.start()
        self.port = int(self.server.get_host_and_port()[1])
        self.url = f"http://127.0.0.1:{self.port}"

    def stop(self) -> None:
        self.server.stop()

    def start_again(self) -> None:
        self.server = moto_server.ThreadedMotoServer("127.0.0.1", port=self.port)
        self.server.start()

    def new_root(self) -> str:
        """Return a root that no other test uses."""
        return f"s3://{BUCKET}/{uuid.uuid4().hex}"


@contextmanager
def start_s3_server() -> Iterator[S3Server]:
    """Start the server with an empty bucket, and set the variables that lead to it."""
    server = S3Server()
    with pytest.MonkeyPatch.context() as patch:
        for name in USERS_VARIABLES:
            patch.delenv(name, raising=False)
        patch.setenv("AWS_ENDPOINT_URL", server.url)
        patch.setenv("AWS_ACCESS_KEY_ID", "id")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_MAX_ATTEMPTS", "1")
        patch.setattr(s3fs.S3FileSystem, "retries", 1)
        s3fs.S3FileSystem.clear_instance_cache()
        if not s3fs.S3FileSystem().exists(BUCKET):
            s3fs.S3FileSystem().mkdir(BUCKET)
        yield server
        s3fs.S3FileSystem.clear_instance_cache()
    server.stop()
