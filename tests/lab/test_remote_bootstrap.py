"""A box without stackctl is provisioned over a real sshd: this stackctl is sent for the run.

The box is a lab in which nothing is installed. The caller is this machine, with its own Python.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pty
import pwd
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from . import look
from .conftest import Seat
from .host import CHECKOUT, LabError, need, need_root
from .lab import Lab
from .test_provision import STATE
from .vm import _AS_CLIENT

ITEMS = ("--only", "stackctl", "--only", "guard")
REST_S = 16
FOLDER, LINK = "/usr/local/lib/stackctl", "/usr/local/bin/stackctl"
#: Forwards so many bytes of the client, then breaks the connection, or pauses and continues.
CUT = """\
import os, select, socket, sys, time
port, left, rest_s = (int(word) for word in sys.argv[1:])
box = socket.create_connection(("127.0.0.1", port))
while left > 0 or rest_s:
    if left < 0:
        time.sleep(rest_s)
        left = 2**40
    for ready in select.select([0, box], [], [])[0]:
        data = os.read(0, 65536) if ready == 0 else box.recv(65536)
        if not data:
            sys.exit()
        if ready == 0:
            left -= len(data)
            box.sendall(data)
        else:
            os.write(1, data)
"""


class Caller:
    """Somebody on this machine. Only their ssh settings name the box."""

    def __init__(self, lab: Lab, folder: Path) -> None:
        self.lab = lab
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.box = f"bare{self.port}"
        self._ssh = folder / "ssh"
        self._ssh.mkdir(mode=0o700)
        self._env: dict[str, str] = {}

    def prepare(self) -> None:
        """Start an sshd in the lab; caller and sshd get each other's keys."""
        key = self._ssh / "key"
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
        public = key.with_suffix(".pub").read_text()
        for user in ("root", "lab"):
            self.lab.write(f"{self.lab.home(user)}/.ssh/authorized_keys", public, user=user)
        self.lab.run(["sh", "-c", "mkdir -p /run/sshd && ssh-keygen -A"], check=True)
        words = ["systemd-run", "--quiet", "--unit=lab-sshd", "/usr/sbin/sshd", "-D"]
        words += ["-o", f"Port={self.port}", "-o", "ListenAddress=127.0.0.1"]
        self.lab.run([*words, "-o", "StrictModes=no"], check=True)
        look.wait_for("sshd", lambda: bool(look.listening(self.lab, self.port)))
        known = self.lab.read("/etc/ssh/ssh_host_ed25519_key.pub").split()[:2]
        (self._ssh / "hosts").write_text(f"{self.box} {' '.join(known)}\n")
        (self._ssh / "cut.py").write_text(CUT)
        cut = f"{sys.executable} {self._ssh}/cut.py {self.port} 2000000"
        rests = f"Host rests\n  ProxyCommand {cut} {REST_S}\n"
        (self._ssh / "config").write_text(
            f"Host cut\n  ProxyCommand {cut} 0\n{rests}"
            f"Host *\n  HostName 127.0.0.1\n  Port {self.port}\n  IdentityFile {key}\n"
            f"  UserKnownHostsFile {self._ssh}/hosts\n  HostKeyAlias {self.box}\n  BatchMode yes\n"
        )

    def words(self, *arguments: str, user: str = "root", host: str | None = None) -> list[str]:
        """Return the command that runs this checkout's stackctl for that user of the box."""
        home = Path(pwd.getpwuid(os.getuid()).pw_dir) / ".ssh"
        home.mkdir(mode=0o700, exist_ok=True)
        words = ["unshare", "--mount", "--propagation", "private", "--", "sh", "-c", _AS_CLIENT]
        words += ["client", str(self._ssh), str(home), "env", f"PYTHONPATH={CHECKOUT}"]
        words += [sys.executable, "-P", "-m", "stackctl"]
        return [*words, "--host", f"{user}@{host or self.box}", *arguments]

    def __call__(
        self, *arguments: str, code: int = 0, user: str = "root", host: str | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run stackctl for the box and check its exit code."""
        done = subprocess.run(
            self.words(*arguments, user=user, host=host),
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        assert done.returncode == code, f"{arguments}\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr
        return done

    def spawn(self, *arguments: str, host: str | None = None) -> subprocess.Popen[str]:
        """Start stackctl for the box without waiting for it."""
        return subprocess.Popen(
            self.words(*arguments, host=host), stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def brought(self) -> list[str]:
        """Return the remains of the copy that was sent."""
        words = ["find", "/root", "/home", "/var/tmp", "/tmp", "-name", "*stackctl*"]
        return self.lab.run(words).stdout.split()

    def assert_gone(self) -> None:
        """Wait until no part of the copy remains."""
        look.wait_for("nothing is left", lambda: not self.brought(), 20)


@pytest.fixture(scope="module")
def caller(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Caller]:
    """Yield a caller, and a box without any change."""
    try:
        need_root()
        need({"ssh": "openssh-client"})
        with Lab(app=False, seed=False, door=False, private_network=False) as booted:
            found = Caller(booted, tmp_path_factory.mktemp("caller"))
            found.prepare()
            yield found
    except LabError as error:
        pytest.fail(f"the lab cannot be built: {error}")


@pytest.fixture(autouse=True)
def clean(caller: Caller) -> Iterator[None]:
    """Undo all changes of a test on the box."""
    yield
    if look.exists(caller.lab, "/var/lib/stackctl/provision.json"):
        caller("provision", "--undo", "--yes")
    caller.lab.run(["rm", "-rf", FOLDER, LINK, "/var/lib/stackctl", "/run/stackctl"], check=True)


def state(caller: Caller) -> list[str]:
    """Return the state of the box in lines."""
    lines = Seat(caller.lab, "root").run("sh", "-c", STATE, timeout=120).stdout.splitlines()
    # Sessions of ssh logins change all the time.
    return [line for line in lines if not re.match(r"session-\S+\.scope ", line)]


def statuses(text: str) -> dict[str, str]:
    """Return the status of each item."""
    return {one["item"]: one["status"] for one in json.loads(text)["items"]}


def test_from_nothing_to_provisioned_and_back(caller: Caller) -> None:
    # Podman creates ~/.config when a user first asks for its version, which `profiles` does.
    caller.lab.run(["podman", "--version"], user="lab", check=True)
    before = state(caller)
    done = caller("status", code=6)
    assert f"stackctl --host root@{caller.box} provision --dry-run" in done.stderr
    done = caller("provision", "--dry-run", *ITEMS)
    assert re.search(r"stackctl +\S+ is brought to root@bare\d+ for this run \(", done.stderr)
    assert f"copy this stackctl to {FOLDER}, link {LINK}" in " ".join(done.stdout.split())
    caller.assert_gone()
    assert state(caller) == before

    done = caller("provision", "--yes", "--json", *ITEMS)
    assert statuses(done.stdout) == {"stackctl": "changed", "guard": "changed"}
    caller.assert_gone()
    # From now on the box has its own complete copy, for all users.
    assert "cpu-latency" in caller("profiles").stdout
    assert "cpu-latency" in caller("profiles", user="lab").stdout
    assert caller.lab.run(["stat", "-c", "%U", LINK], check=True).stdout == "root\n"
    done = caller("provision", "--yes", "--json", *ITEMS)
    assert json.loads(done.stdout)["changed"] == 0
    assert "brought" not in done.stderr

    assert "as before" in caller("provision", "--undo", "--yes").stdout
    assert state(caller) == before
    done = caller("provision", "--undo", "--yes")
    assert "nothing to take back" in done.stdout
    assert "brought" in done.stderr
    caller.assert_gone()


@pytest.mark.deep
def test_an_older_one_is_replaced_as_a_change(caller: Caller) -> None:
    caller("provision", "--yes", "--only", "stackctl")
    path = f"{FOLDER}/lib/stackctl/__init__.py"
    caller.lab.run(["sed", "-i", "s/^__version__ = .*/__version__ = '0.0.1'/", path], check=True)
    caller.lab.write(f"{FOLDER}/fingerprint", "of 0.0.1\n")
    said = caller("profiles").stderr
    assert "stackctl is 0.0.1 on" in said
    assert f"stackctl --host root@{caller.box} provision" in said
    done = caller("provision", "--dry-run", "--only", "stackctl")
    assert ", which has 0.0.1, for this run" in done.stderr
    assert f"{LINK}, another version" in done.stdout
    assert "stackctl is 0.0.1 on" in caller("profiles").stderr
    caller("provision", "--yes", "--only", "stackctl")
    assert "stackctl is 0.0.1 on" not in caller("profiles").stderr
    caller.assert_gone()


@pytest.mark.deep
def test_a_user_who_may_use_sudo(caller: Caller) -> None:
    assert "2 items would change" in caller("provision", "--dry-run", *ITEMS, user="lab").stdout
    done = caller("provision", "--yes", *ITEMS, user="lab", code=2)
    assert "sudo does not let this user of lab@bare" in done.stderr
    caller.lab.write("/etc/sudoers.d/lab", "lab ALL=(ALL) NOPASSWD: ALL\n")
    caller.lab.run(["chmod", "440", "/etc/sudoers.d/lab"], check=True)
    try:
        caller("provision", "--yes", *ITEMS, user="lab")
        caller("provision", "--undo", "--yes", user="lab")
    finally:
        caller.lab.run(["rm", "/etc/sudoers.d/lab"], check=True)
    caller.assert_gone()


def test_a_question_on_a_terminal(caller: Caller) -> None:
    primary, secondary = pty.openpty()
    words = caller.words("provision", *ITEMS)
    process = subprocess.Popen(
        words, stdin=secondary, stdout=secondary, stderr=secondary, start_new_session=True
    )
    os.close(secondary)
    seen = b""
    while b"[y/N]" not in seen:
        seen += os.read(primary, 65536)
    assert caller.brought()
    os.write(primary, b"n\n")
    assert process.wait(60) == 130, seen
    os.close(primary)
    caller.assert_gone()
    assert not look.exists(caller.lab, FOLDER)


@pytest.mark.deep
def test_a_connection_that_breaks_while_it_is_sent(caller: Caller) -> None:
    done = caller("provision", "--yes", *ITEMS, host="cut", code=1)
    assert "the connection to root@cut broke while stackctl was sent" in done.stderr
    caller.assert_gone()
    assert not look.exists(caller.lab, FOLDER)


@pytest.mark.deep
def test_ctrl_c_while_it_is_sent(caller: Caller) -> None:
    def keeps() -> bool:
        return caller.lab.run(["pgrep", "-f", "keep [0-9]"]).returncode == 0

    with caller.spawn("provision", "--yes", *ITEMS, host="rests") as process:
        look.wait_for("it is being sent", keeps)
        process.terminate()
        # It ends although the connection is stuck.
        _, err = process.communicate(timeout=REST_S / 2)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    look.wait_for("the box gives it up", lambda: not keeps(), 60)
    caller.assert_gone()


@pytest.mark.deep
def test_what_was_begun_ends_without_the_connection(caller: Caller) -> None:
    with caller.spawn("provision", "--yes", *ITEMS) as process:
        look.wait_for(
            "it began", lambda: look.exists(caller.lab, "/var/lib/stackctl/provision.json")
        )
        for pid in masters(caller):
            os.kill(pid, signal.SIGKILL)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 1, err
    assert f"error: the connection to root@{caller.box} broke" in err
    link = look.lab_path(caller.lab, LINK)
    look.wait_for("it is done", link.is_symlink, 60)
    caller.assert_gone()
    done = caller("provision", "--yes", "--json", *ITEMS)
    assert json.loads(done.stdout)["changed"] <= 1


def masters(caller: Caller) -> list[int]:
    """Return the ssh processes that keep our connection to the box."""
    name = hashlib.sha256(f"root@{caller.box}".encode()).hexdigest()[:12].encode()
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = path.read_bytes()
            if words.startswith(b"ssh: ") and name in words:
                found.append(int(path.parent.name))
    return found


def test_a_box_without_python(caller: Caller) -> None:
    hide = "for p in /usr/bin/python3 /usr/bin/python3.[0-9]*; do mv $p $p.away; done"
    caller.lab.run(["sh", "-c", hide], check=True)
    try:
        report = json.loads(caller("provision", "--dry-run", "--json", code=6).stdout)
    finally:
        show = "for p in /usr/bin/python3*.away; do mv $p ${p%.away}; done"
        caller.lab.run(["sh", "-c", show], check=True)
    assert report["message"].endswith("has no Python that runs stackctl: there is no python3")
