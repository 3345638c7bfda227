"""The servers of the office: an object store that can go away or refuse calls, and
MLflow."""

from __future__ import annotations

import json
import logging
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import boto3
import httpx
from botocore.exceptions import ClientError
from machines import OFFICE_ADDRESS, die_with_parent
from moto.moto_server.werkzeug_app import (
    DomainDispatcherApplication,
    create_backend_app,
)
from werkzeug.serving import BaseWSGIServer, WSGIRequestHandler, make_server

BUCKET = "coin-bucket"
STORE_PORT = 9000
TRACKING_PORT = 5000
STORE_URL = f"http://{OFFICE_ADDRESS}:{STORE_PORT}"
TRACKING_URL = f"http://{OFFICE_ADDRESS}:{TRACKING_PORT}"
START_SECONDS = 900.0
SLOW_DOWN = (
    b'<?xml version="1.0" encoding="UTF-8"?><Error><Code>SlowDown</Code>'
    b"<Message>Please reduce your request rate.</Message></Error>"
)
CREDENTIALS = {
    "AWS_ENDPOINT_URL": STORE_URL,
    "AWS_ACCESS_KEY_ID": "office",
    "AWS_SECRET_ACCESS_KEY": "office-key",
    "AWS_DEFAULT_REGION": "us-east-1",
}
Environ = dict[str, Any]
StartResponse = Callable[..., Any]


class _Handler(WSGIRequestHandler):
    """Logs nothing. Each request has a connection of its own."""

    def log(self, type: str, message: str, *args: Any) -> None:
        """Log nothing."""


class ObjectStore:
    """An S3 server (moto) with one bucket. Its objects outlive ``go_away``."""

    def __init__(self) -> None:
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        os.environ.update(CREDENTIALS)
        self.refused_share = 0.0
        """Share of the requests that are answered with 503 SlowDown."""
        self.refused = 0
        self._random = random.Random(0)
        self._application = DomainDispatcherApplication(create_backend_app)
        self._server: BaseWSGIServer | None = None
        self.come_back()
        self._client = boto3.client("s3", endpoint_url=STORE_URL)
        self._client.create_bucket(Bucket=BUCKET)

    def __call__(
        self, environ: Environ, start_response: StartResponse
    ) -> Iterable[bytes]:
        """Answer one request."""
        if self._random.random() < self.refused_share:
            self.refused += 1
            length = int(environ.get("CONTENT_LENGTH") or 0)
            environ["wsgi.input"].read(length)
            headers = [("Content-Type", "application/xml")]
            headers.append(("Content-Length", str(len(SLOW_DOWN))))
            start_response("503 Slow Down", headers)
            return [SLOW_DOWN]
        return self._application(environ, start_response)

    def go_away(self) -> None:
        """Refuse connections from now on."""
        assert self._server is not None
        self._server.shutdown()
        self._server.server_close()
        self._server = None

    def come_back(self) -> None:
        """Listen, with all objects."""
        self._server = make_server(
            OFFICE_ADDRESS, STORE_PORT, self, threaded=True, request_handler=_Handler
        )
        thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        thread.start()

    def read(self, key: str) -> bytes | None:
        """Return an object of the bucket, or None."""
        try:
            body = self._client.get_object(Bucket=BUCKET, Key=key)["Body"]
        except ClientError:
            return None
        content: bytes = body.read()
        return content

    def read_json(self, key: str) -> Any:
        """Return the content of a JSON object of the bucket, or None."""
        content = self.read(key)
        return None if content is None else json.loads(content)

    def keys(self, prefix: str) -> list[str]:
        """Return the keys of the bucket below a prefix."""
        pages = self._client.get_paginator("list_objects_v2")
        keys: list[str] = []
        for page in pages.paginate(Bucket=BUCKET, Prefix=prefix):
            keys += [entry["Key"] for entry in page.get("Contents", [])]
        return keys


class TrackingServer:
    """MLflow on the office's address, with SQLite."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.start()

    def start(self) -> None:
        """Start the server."""
        options = {
            "--backend-store-uri": f"sqlite:///{self.folder}/mlflow.db",
            "--artifacts-destination": f"s3://{BUCKET}/mlflow",
            "--host": "0.0.0.0",
            "--allowed-hosts": OFFICE_ADDRESS + ":*",
            "--port": str(TRACKING_PORT),
            "--workers": "1",
        }
        words = [word for option in options.items() for word in option]
        with (self.folder / "mlflow.log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "mlflow", "server", *words],
                stdout=log,
                stderr=log,
                env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
                preexec_fn=die_with_parent,
            )

    def wait_until_ready(self) -> None:
        """Wait until the server answers. Raises RuntimeError if it has ended."""
        give_up_at = time.monotonic() + START_SECONDS
        while not self._answers():
            if time.monotonic() > give_up_at or self.process.poll() is not None:
                log_text = (self.folder / "mlflow.log").read_text()
                raise RuntimeError(f"MLflow did not start: {log_text[-3000:]}")
            time.sleep(0.5)

    def _answers(self) -> bool:
        try:
            return httpx.get(f"{TRACKING_URL}/health").status_code == 200
        except httpx.TransportError:
            return False

    def count_runs(self) -> int:
        """Return the number of runs on record, those of steps included."""
        answer = httpx.post(
            f"{TRACKING_URL}/api/2.0/mlflow/experiments/search",
            json={"max_results": 100},
        )
        names = [entry["experiment_id"] for entry in answer.json()["experiments"]]
        runs = httpx.post(
            f"{TRACKING_URL}/api/2.0/mlflow/runs/search",
            json={"experiment_ids": names, "max_results": 1000},
        )
        return len(runs.json().get("runs", []))
