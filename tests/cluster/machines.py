"""Make machines on this one: each has a network, processes, a host name, a home, ``/tmp``
and ``/dev/shm`` of its own, and an sshd.

All of it lies in namespaces without a name, which the kernel removes with the process
that made them. Nothing here can reach another network.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil

USER = "coin"
USER_ID = 61_000
BRIDGE = "lan"
SUBNET = "10.90.0"
OFFICE_ADDRESS = f"{SUBNET}.1"
"""Address of the machine on which the user and the servers are."""
ISOLATE = (
    "unshare",
    *("--net", "--mount", "--pid", "--uts", "--ipc"),
    *("--fork", "--kill-child", "--mount-proc"),
)
PROGRAMS = ("bash", "ip", "mount", "rsync", "ssh", "ssh-keygen", "unshare")
SSHD = "/usr/sbin/sshd"
PYTHON = "/usr/bin/python3.11"
"""A Python that every user can execute, as ``python3.11`` on the machines."""
PR_SET_PDEATHSIG = 1
START_SECONDS = 60.0
FILLER = "filler"
FULL_DISK_BYTES = 1 << 20
"""Room that a full disk may have left."""
TMP_BYTES = 1 << 30
"""Size of a machine's ``/tmp``, in which Ray keeps its logs and spilled objects."""


def missing_requirements() -> list[str]:
    """Return what this machine lacks to make others; empty: nothing."""
    missing = [f"the program {name}" for name in PROGRAMS if not shutil.which(name)]
    missing += [path for path in (SSHD, PYTHON) if not os.access(path, os.X_OK)]
    if os.geteuid() != 0:
        missing.append("root's rights")
    if missing:
        return missing
    trial = subprocess.run([*ISOLATE, "true"], capture_output=True, text=True)
    if trial.returncode:
        missing.append(f"namespaces ({trial.stderr.strip()})")
    return missing


def missing_netem() -> str:
    """Return what this machine lacks to delay and lose packets; empty: nothing."""
    trial = ("ip", "link", "set", "lo", "up", "&&", "tc", "qdisc", "add", "dev", "lo")
    command = " ".join((*trial, "root", "netem", "delay", "1ms"))
    completed = subprocess.run(
        ["unshare", "--net", "bash", "-c", command], capture_output=True, text=True
    )
    return "netem in the kernel" if completed.returncode else ""


def die_with_parent() -> None:
    """Let the kernel kill this process when its parent ends, however it ends."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def run_command(*words: str) -> None:
    """Run a command of the system; print its output only if it fails."""
    completed = subprocess.run(words, capture_output=True, text=True)
    if completed.returncode:
        raise RuntimeError(f"{' '.join(words)}: {completed.stdout}{completed.stderr}")


class Network:
    """A bridge in this process's network, with this process as the office."""

    def __init__(self) -> None:
        run_command("ip", "link", "set", "lo", "up")
        run_command("ip", "link", "add", BRIDGE, "type", "bridge")
        run_command("ip", "addr", "add", f"{OFFICE_ADDRESS}/24", "dev", BRIDGE)
        run_command("ip", "link", "set", BRIDGE, "up")


def _free_bytes(path: Path) -> int:
    room = os.statvfs(path)
    return room.f_bavail * room.f_frsize


class Machine:
    """One machine, switched on. Its home outlives ``cut_power``.

    ``folder``: where its files lie on this machine; ``key``: path of the key without
    ``.pub`` with which USER may log in.
    """

    def __init__(self, number: int, folder: Path, key: Path) -> None:
        self.number = number
        self.name = f"machine{number}"
        self.address = f"{SUBNET}.{10 + number}"
        self.cable = f"cable{number}"
        self.folder = folder
        self.home = folder / "home"
        self.key = key
        self._prepare_files()
        self.switch_on()

    def _prepare_files(self) -> None:
        ssh = self.home / ".ssh"
        ssh.mkdir(parents=True)
        for name in (".bashrc", ".profile"):
            if (Path("/etc/skel") / name).exists():
                shutil.copy(f"/etc/skel/{name}", self.home / name)
        shutil.copy(f"{self.key}.pub", ssh / "authorized_keys")
        ssh.chmod(0o700)
        group = f"{USER}:x:{USER_ID}:\n"
        account = f"{USER}:x:{USER_ID}:{USER_ID}::/home/{USER}:/bin/bash\n"
        (self.folder / "passwd").write_text(account + Path("/etc/passwd").read_text())
        (self.folder / "group").write_text(group + Path("/etc/group").read_text())
        (self.folder / "shadow").write_text(
            f"root:*:1::::::\nsshd:*:1::::::\n{USER}:*:1::::::\n"
        )
        host_key = self.folder / "host_key"
        create_key(host_key)
        (self.folder / "sshd_config").write_text(
            f"ListenAddress {self.address}\nHostKey {host_key}\n"
            "PidFile none\nUsePAM no\nAuthorizedKeysFile .ssh/authorized_keys\n"
        )
        self.give_home_to_user()

    def _start_script(self) -> str:
        files = "\n".join(
            f"mount --bind {self.folder}/{name} /etc/{name}"
            for name in ("passwd", "group", "shadow")
        )
        return f"""set -e
{files}
umask 022
mount -t tmpfs -o mode=755 tmpfs /home
mkdir /home/{USER}
mount --bind {self.home} /home/{USER}
mount -t tmpfs -o size={TMP_BYTES},mode=1777 tmpfs /tmp
mount -t tmpfs -o size=7g,mode=1777 tmpfs /dev/shm
mount -t tmpfs -o mode=755 tmpfs /run
mkdir /run/sshd
hostname {self.name}
ulimit -n $(ulimit -H -n)
exec {SSHD} -D -e -f {self.folder}/sshd_config
"""

    def give_home_to_user(self) -> None:
        """Make USER the owner of all files in the home."""
        run_command("chown", "-R", f"{USER_ID}:{USER_ID}", str(self.home))

    def switch_on(self) -> None:
        """Start the machine, and wait until it takes logins."""
        with (self.folder / "console.log").open("ab") as log:
            self._shell = subprocess.Popen(
                [*ISOLATE, "bash", "-c", f"read; . {self.folder}/start"],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                preexec_fn=die_with_parent,
            )
        self._init = self._first_process()
        self._connect_cable()
        (self.folder / "start").write_text(self._start_script())
        stdin = self._shell.stdin
        assert stdin is not None
        stdin.write(b"\n")
        stdin.close()
        give_up_at = time.monotonic() + START_SECONDS
        while self.ssh("true").returncode:
            if time.monotonic() > give_up_at:
                log_text = (self.folder / "console.log").read_text()[-1000:]
                raise RuntimeError(f"{self.name} takes no logins: {log_text}")
            time.sleep(0.1)

    def _first_process(self) -> psutil.Process:
        """Return process 1 of the machine."""
        give_up_at = time.monotonic() + START_SECONDS
        while time.monotonic() < give_up_at:
            children = psutil.Process(self._shell.pid).children()
            if children:
                return children[0]
            time.sleep(0.02)
        raise RuntimeError(f"{self.name} did not start")

    def _connect_cable(self) -> None:
        process = str(self._init.pid)
        # the same one after a power cut: the others remember it
        hardware_address = f"02:00:00:00:00:{self.number:02x}"
        peer = ("peer", "name", "eth0", "address", hardware_address, "netns", process)
        run_command("ip", "link", "add", self.cable, "type", "veth", *peer)
        run_command("ip", "link", "set", self.cable, "master", BRIDGE, "up")
        inside = ("nsenter", f"--net=/proc/{process}/ns/net", "ip")
        run_command(*inside, "link", "set", "lo", "up")
        run_command(*inside, "addr", "add", f"{self.address}/24", "dev", "eth0")
        run_command(*inside, "link", "set", "eth0", "up")

    def ssh(self, command: str) -> subprocess.CompletedProcess[str]:
        """Run a command of USER's login shell."""
        options = ["StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null"]
        options += ["LogLevel=ERROR", "ConnectTimeout=5", "BatchMode=yes"]
        words = [word for option in options for word in ("-o", option)]
        target = f"{USER}@{self.address}"
        return subprocess.run(
            ["ssh", "-i", str(self.key), *words, target, command],
            capture_output=True,
            text=True,
        )

    def unplug(self) -> None:
        """Pull out the network cable: nothing dies, nothing answers."""
        run_command("ip", "link", "set", self.cable, "down")

    def plug_in(self) -> None:
        """Put the network cable back."""
        run_command("ip", "link", "set", self.cable, "up")

    def limit_link(self, rate: str) -> None:
        """Limit both directions of the link, for example to ``20mbit``."""
        bucket = ("tbf", "rate", rate, "burst", "64kbit", "latency", "400ms")
        run_command("tc", "qdisc", "add", "dev", self.cable, "root", *bucket)
        inside = ("nsenter", f"--net=/proc/{self._init.pid}/ns/net", "tc")
        run_command(*inside, "qdisc", "add", "dev", "eth0", "root", *bucket)

    def degrade_link(self, delay: str, loss: str) -> None:
        """Delay and lose packets in both directions, for example ``50ms``, ``1%``."""
        netem = ("netem", "delay", delay, "loss", loss)
        run_command("tc", "qdisc", "add", "dev", self.cable, "root", *netem)
        inside = ("nsenter", f"--net=/proc/{self._init.pid}/ns/net", "tc")
        run_command(*inside, "qdisc", "add", "dev", "eth0", "root", *netem)

    def free_link(self) -> None:
        """Remove what ``limit_link`` or ``degrade_link`` has added."""
        run_command("tc", "qdisc", "del", "dev", self.cable, "root")
        inside = ("nsenter", f"--net=/proc/{self._init.pid}/ns/net", "tc")
        run_command(*inside, "qdisc", "del", "dev", "eth0", "root")

    def fill_disk(self) -> None:
        """Leave no room in ``/tmp``, to which others write at the same time."""
        with self.path(f"/tmp/{FILLER}").open("wb", buffering=0) as stream:
            for _ in range(100):
                room = _free_bytes(self.path("/tmp"))
                size = os.fstat(stream.fileno()).st_size
                with suppress(OSError):  # less room than a moment ago
                    os.posix_fallocate(stream.fileno(), size, max(room, 1))
        room = _free_bytes(self.path("/tmp"))
        if room > FULL_DISK_BYTES:
            raise RuntimeError(f"/tmp of {self.name} still has room for {room} bytes")

    def empty_disk(self) -> None:
        """Undo ``fill_disk``."""
        self.path(f"/tmp/{FILLER}").unlink(missing_ok=True)

    def cut_power(self) -> None:
        """Kill all processes of the machine at once. The network goes with them."""
        self._init.kill()
        self._shell.wait(timeout=30)
        while (Path("/sys/class/net") / self.cable).exists():
            time.sleep(0.05)

    def is_on(self) -> bool:
        """Return whether the machine runs."""
        return self._shell.poll() is None

    def path(self, path: str) -> Path:
        """Return where a path of the running machine lies for this process."""
        return Path(f"/proc/{self._init.pid}/root{path}")

    def processes(self, word: str) -> list[psutil.Process]:
        """Return the machine's processes whose command line contains ``word``."""
        try:
            processes = self._init.children(recursive=True)
        except psutil.NoSuchProcess:
            return []
        return [process for process in processes if word in _command_line(process)]


def _command_line(process: psutil.Process) -> str:
    """Return the words of the command line, with a space after each."""
    try:
        return "".join(f"{word} " for word in process.cmdline())
    except psutil.Error:
        return ""


def create_key(path: Path) -> None:
    """Create an ssh key without a passphrase."""
    run_command("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path))


def install_environment(machines: Sequence[Machine], packages: Path) -> None:
    """Create the environment of ``deploy/cluster-onprem.yaml`` on each machine.

    ``packages``: a folder of installed packages, of which the environments see all but
    the project itself: no machine reaches a registry. pip installs the project.
    """
    links = machines[0].folder.parent / "packages"
    links.mkdir()
    for package in packages.iterdir():
        if "coin_ray" not in package.name:
            (links / package.name).symlink_to(package)
    first, *others = machines
    created = first.ssh("python3.11 -m venv ~/coin_ray/venv")
    if created.returncode:
        raise RuntimeError(created.stdout + created.stderr)
    venv = first.home / "coin_ray/venv"
    site_packages = venv / "lib/python3.11/site-packages"
    for outdated in site_packages.glob("setuptools*"):
        shutil.rmtree(outdated)  # it would hide that of the packages
    (site_packages / "packages.pth").write_text(f"{links}\n")
    source = Path(sys.executable).parent / "ray"
    _, _, script = source.read_text().partition("\n")
    interpreter = f"#!/home/{USER}/coin_ray/venv/bin/python\n"
    (venv / "bin/ray").write_text(interpreter + script)
    (venv / "bin/ray").chmod(0o755)
    for machine in machines:
        if machine in others:
            shutil.copytree(venv, machine.home / "coin_ray/venv", symlinks=True)
        pip_config = machine.home / ".config/pip/pip.conf"
        pip_config.parent.mkdir(parents=True)
        # the packages that the project needs are those that the environment sees
        pip_config.write_text("[install]\nno-index = true\nno-deps = true\n")
        machine.give_home_to_user()
