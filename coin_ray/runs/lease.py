"""A root belongs to one run at a time, so that no image is asked and paid twice.

The run that holds a root keeps a claim below it: a small file that says whose the root
is and since when, renewed while the run lives. On a disk the run also locks a file,
which the operating system unlocks however the process ends. A claim of a dead process
on this machine is replaced at once, one of another machine when it is not renewed.
"""

from __future__ import annotations

import errno
import fcntl
import os
import random
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from coin_ray import storage
from coin_ray.errors import RootInUse
from coin_ray.runs.tracking import without_password

LEASE_FOLDER = "lease"
"""Folder of the claims and the lock below a root."""
RENEW_SECONDS = 30.0
SILENT_SECONDS = 300.0
"""Age of its last renewal at which a claim of another machine no longer counts."""
RACE_ATTEMPTS = 4
"""Tries of two runs that begin at the same moment and both withdraw."""
RACE_PAUSE_SECONDS = 1.0
COMMAND_CHARACTERS = 200
START_TOLERANCE_SECONDS = 2.0
"""Difference of two readings of when the same process started."""
_held_roots: set[str] = set()
"""Roots that this process holds: its own file locks do not exclude each other."""
_held_roots_lock = threading.Lock()


@dataclass(frozen=True)
class Claim:
    """What the file of a claim says about its run."""

    token: str
    host: str
    machine: str
    """Identifies the kernel and the process numbers that ``pid`` belongs to."""
    pid: int
    process_start: float
    command: str
    since: float
    """Seconds since 1970."""
    renewed: float
    """Seconds since 1970 at which the claim was last written."""

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Claim:
        """Read a claim; unknown keys are ignored."""
        return cls(**{f.name: values[f.name] for f in fields(cls)})

    @classmethod
    def of_this_process(cls) -> Claim:
        """Return a new claim of this process."""
        now = time.time()
        command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
        return cls(
            token=uuid.uuid4().hex,
            host=socket.gethostname(),
            machine=_machine_identity(),
            pid=os.getpid(),
            process_start=psutil.Process().create_time(),
            command=without_password(command)[:COMMAND_CHARACTERS],
            since=now,
            renewed=now,
        )

    def is_live(self, *, disk_is_locked: bool) -> bool:
        """Return whether the claim's run still holds the root.

        ``disk_is_locked``: this process has the root's file lock, so no other process
        of this machine holds the root.
        """
        if self.machine == _machine_identity():
            return not disk_is_locked and self._process_lives()
        return time.time() - self.renewed < SILENT_SECONDS

    def _process_lives(self) -> bool:
        try:
            process = psutil.Process(self.pid)
            is_same = (
                abs(process.create_time() - self.process_start)
                < START_TOLERANCE_SECONDS
            )
            return is_same and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    def describe(self) -> str:
        """Return whose the claim is, as part of a message."""
        since = datetime.fromtimestamp(self.since, UTC).strftime("%Y-%m-%d %H:%M:%S")
        return (
            f"{self.command!r} (process {self.pid} on {self.host}, since {since} UTC)"
        )


@contextmanager
def hold_root(root: str) -> Iterator[None]:
    """Hold the root, a path or URI, while the ``with`` block runs.

    Raises RootInUse at once if another run holds it.
    """
    identity = _root_identity(root)
    with _held_roots_lock:
        if identity in _held_roots:
            raise RootInUse(_refusal(root, None))
        _held_roots.add(identity)
    try:
        lock_file = _lock_disk(root)
        try:
            with _claim(root, disk_is_locked=lock_file is not None):
                yield
        finally:
            if lock_file is not None:
                os.close(lock_file)
    finally:
        with _held_roots_lock:
            _held_roots.discard(identity)


@contextmanager
def _claim(root: str, *, disk_is_locked: bool) -> Iterator[None]:
    """Write a claim, renew it while the block runs, and remove it."""
    claim = _write_claim(root, disk_is_locked=disk_is_locked)
    ended = threading.Event()
    renewal = threading.Thread(
        target=_renew_until, args=(ended, root, claim), daemon=True
    )
    renewal.start()
    try:
        yield
    finally:
        ended.set()
        renewal.join(RENEW_SECONDS)
        storage.remove(_claim_uri(root, claim))


def _write_claim(root: str, *, disk_is_locked: bool) -> Claim:
    """Return this process's claim once it is the only live one.

    Each run writes its claim before it looks for others, so of two runs at least one
    sees the other; who sees another withdraws.
    """
    claim = Claim.of_this_process()
    for _ in range(RACE_ATTEMPTS):
        _raise_if_claimed(root, claim, disk_is_locked)
        storage.write_json(_claim_uri(root, claim), asdict(claim))
        try:
            _raise_if_claimed(root, claim, disk_is_locked)
        except RootInUse:
            storage.remove(_claim_uri(root, claim))
            time.sleep(random.uniform(0, RACE_PAUSE_SECONDS))
            continue
        _remove_dead_claims(root, claim)
        return claim
    others = _other_claims(root, claim)
    raise RootInUse(_refusal(root, others[0] if others else None))


def _raise_if_claimed(root: str, claim: Claim, disk_is_locked: bool) -> None:
    for other in _other_claims(root, claim):
        if other.is_live(disk_is_locked=disk_is_locked):
            raise RootInUse(_refusal(root, other))


def _remove_dead_claims(root: str, claim: Claim) -> None:
    """Remove the claims of others, none of which is live."""
    for dead in _other_claims(root, claim):
        print(f"took over {root} from {dead.describe()}, which has ended", flush=True)
        storage.remove(_claim_uri(root, dead))


def _renew_until(ended: threading.Event, root: str, claim: Claim) -> None:
    """Renew the claim every ``RENEW_SECONDS`` until ``ended`` is set."""
    while not ended.wait(RENEW_SECONDS):
        # a store that can't be reached for a while must not end the run
        with suppress(Exception):
            _renew(root, claim)


def _renew(root: str, claim: Claim) -> None:
    """Write the claim again. If another run took the root over, because this process
    was suspended for long, end the process before it asks and pays.
    """
    for other in _other_claims(root, claim):
        if other.is_live(disk_is_locked=False):
            print(
                f"{root} was taken over by {other.describe()} while this process was"
                " suspended; it ends here",
                file=sys.stderr,
                flush=True,
            )
            os._exit(RootInUse.exit_code)
    renewed = replace(claim, renewed=time.time())
    storage.write_json(_claim_uri(root, claim), asdict(renewed))


def _other_claims(root: str, claim: Claim | None) -> list[Claim]:
    """Return all claims below the root but ``claim``, oldest first."""
    claims = []
    for uri in storage.list_files(storage.join(root, LEASE_FOLDER), ".json"):
        # a claim may be removed, or be half a file, between listing and reading
        with suppress(FileNotFoundError, ValueError, KeyError):
            claims.append(Claim.from_json(storage.read_json(uri)))
    others = [other for other in claims if claim is None or other.token != claim.token]
    return sorted(others, key=lambda other: other.since)


def _claim_uri(root: str, claim: Claim) -> str:
    return storage.join(root, LEASE_FOLDER, f"{claim.token}.json")


def _lock_disk(root: str) -> int | None:
    """Lock the root's lock file and return its descriptor; None for an object store or
    a disk without locks. Raises RootInUse if another process has locked it.
    """
    path = _local_path(root)
    if path is None:
        return None
    folder = os.path.join(path, LEASE_FOLDER)
    os.makedirs(folder, exist_ok=True)
    lock_file = os.open(os.path.join(folder, "lock"), os.O_CREAT | os.O_RDWR, 0o644)
    try:
        # a record lock: unlike flock, forked workers do not inherit it
        fcntl.lockf(lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(lock_file)
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            return None
        claims = _other_claims(root, None)
        raise RootInUse(_refusal(root, claims[-1] if claims else None)) from None
    return lock_file


def _refusal(root: str, holder: Claim | None) -> str:
    """Return the message for a root that is not free."""
    if holder is None:
        return (
            f"{root} belongs to another run. Wait until it ends, stop it, or give"
            " another --root; nothing was asked or paid"
        )
    silent = ""
    if holder.machine != _machine_identity():
        age = max(0.0, time.time() - holder.renewed)
        silent = (
            f" It was last seen {age:.0f} s ago; after {SILENT_SECONDS:.0f} s it counts"
            " as ended."
        )
    return (
        f"{root} belongs to another run: {holder.describe()}.{silent} Wait until it"
        " ends, stop it, or give another --root; nothing was asked or paid"
    )


def _local_path(root: str) -> str | None:
    """Return the path of a local root; None for an object store."""
    uri = storage.absolute_uri(root)
    return None if "://" in uri else uri


def _root_identity(root: str) -> str:
    path = _local_path(root)
    return root.rstrip("/") if path is None else os.path.realpath(path)


def _machine_identity() -> str:
    """Return what two processes share if they see the same process numbers."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux
        return socket.gethostname()
