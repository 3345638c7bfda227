"""The servers of the office: an object store that can go away or refuse calls, and
MLflow."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import pwd
import random
import shutil
import signal
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
CHECKPOINT = "/state.pt"
STORE_PORT = 9000
TRACKING_PORT = 5000
POSTGRES_PORT = 5432
POSTGRES_USER = "postgres"
POSTGRES_VERSIONS = Path("/usr/lib/postgresql")
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
        self.checkpoints: list[tuple[float, str]] = []
        """When each checkpoint of a training was stored, and its key."""
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
        answer = self._application(environ, start_response)
        path = environ["PATH_INFO"]
        if environ["REQUEST_METHOD"] == "PUT" and path.endswith(CHECKPOINT):
            self.checkpoints.append((time.monotonic(), path))
        return answer

    def go_away(self) -> None:
        """Refuse connections from now on."""
        assert self._server is not None
        self._server.shutdown()
        self._server.server_close()
        self._server = None

    def come_back(self) -> None:
        """Listen, with all objects."""
        if self._server is not None:
            return
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


def missing_database() -> str:
    """Return what this machine lacks for PostgreSQL; empty: nothing."""
    if not _postgres_folders():
        return f"PostgreSQL in {POSTGRES_VERSIONS}"
    if importlib.util.find_spec("psycopg") is None:
        return "the Python package psycopg[binary]"
    try:
        pwd.getpwnam(POSTGRES_USER)
    except KeyError:
        return f"the user {POSTGRES_USER}"
    return ""


def _postgres_folders() -> list[Path]:
    return sorted(POSTGRES_VERSIONS.glob("*/bin"))


class Database:
    """PostgreSQL of the system's packages, on the loopback address."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "postgres"
        self.log = folder / "postgres.log"
        self.folder.mkdir(mode=0o700)
        shutil.chown(self.folder, POSTGRES_USER)
        options = ("--auth=trust", "--username=mlflow", "--no-sync")
        self._start("initdb", "-D", str(self.folder), *options).wait()
        self.start()

    def _start(self, program: str, *options: str) -> subprocess.Popen[bytes]:
        """Start a program of PostgreSQL, which does not run as root."""
        with self.log.open("ab") as log:
            return subprocess.Popen(
                [str(_postgres_folders()[-1] / program), *options],
                stdout=log,
                stderr=log,
                cwd="/",
                user=POSTGRES_USER,
                group=pwd.getpwnam(POSTGRES_USER).pw_gid,
                extra_groups=[],
                preexec_fn=die_with_parent,
            )

    def start(self) -> None:
        """Start the server, and wait until it takes connections."""
        options = ("-h", "127.0.0.1", "-p", str(POSTGRES_PORT), "-k", "")
        self.process = self._start("postgres", "-D", str(self.folder), *options)
        give_up_at = time.monotonic() + START_SECONDS
        while self._start("pg_isready", *options[:4]).wait():
            if time.monotonic() > give_up_at or self.process.poll() is not None:
                log_text = self.log.read_text()
                raise RuntimeError(f"PostgreSQL did not start: {log_text[-3000:]}")
            time.sleep(0.2)

    def stop(self) -> None:
        """Break off all transactions, and end the server."""
        self.process.send_signal(signal.SIGINT)
        self.process.wait(timeout=60)


class TrackingServer:
    """MLflow on the office's address, with PostgreSQL; with SQLite where there is none."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.database = None if missing_database() else Database(folder)
        self.start()

    def start(self) -> None:
        """Start the server."""
        uri = f"sqlite:///{self.folder}/mlflow.db"
        if self.database is not None:
            uri = f"postgresql+psycopg://mlflow@127.0.0.1:{POSTGRES_PORT}/postgres"
        options = {
            "--backend-store-uri": uri,
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

    def finished_steps(self) -> list[str]:
        """Return the names of the finished runs of steps, below the last run."""
        experiments = self._search("experiments", max_results=100)["experiments"]
        names = [entry["experiment_id"] for entry in experiments]
        found = self._search("runs", experiment_ids=names, max_results=1000)
        runs = found.get("runs", [])
        steps = [(run, _parent(run)) for run in runs if _parent(run)]
        roots = [run["info"] for run in runs if not _parent(run)]
        last = max(roots, key=lambda info: info["start_time"])["run_id"]
        return sorted(
            run["info"]["run_name"]
            for run, parent in steps
            if parent == last and run["info"]["status"] == "FINISHED"
        )

    def _search(self, kind: str, **body: Any) -> dict[str, Any]:
        url = f"{TRACKING_URL}/api/2.0/mlflow/{kind}/search"
        answer: dict[str, Any] = httpx.post(url, json=body, timeout=60).json()
        return answer


def _parent(run: dict[str, Any]) -> str:
    """Return the id of the run of which this is a step; empty: it is none."""
    tags = {tag["key"]: tag["value"] for tag in run["data"].get("tags", [])}
    parent: str = tags.get("mlflow.parentRunId", "")
    return parent
