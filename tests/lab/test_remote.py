"""`--host`: a user of one machine works on another one over a real sshd, with broken connections.

Both machines are the lab. The caller is a user without stacks, and on the box root or lab.
"""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import signal
import subprocess
import threading
import time
from collections.abc import Iterator

import pytest

from . import look
from .conftest import Seat, both_users
from .lab import STORE_USERS, Lab, LabProcess

CALLER, PORT = "nolinger", 2222
UP = ("up", "cpu-latency", "--model")
SETTINGS = f"""\
Host *
  HostName 127.0.0.1
  Port {PORT}
Host box
  IdentityFile ~/.ssh/key
Host stranger
  HostKeyAlias stranger
Host impostor
  HostKeyAlias impostor
"""


class Caller:
    """Somebody who works on the box from elsewhere; `user` is their account there."""

    def __init__(self, lab: Lab, user: str) -> None:
        self.lab = lab
        self.host = f"{user}@box"

    def __call__(
        self, *arguments: str, code: int = 0, host: str | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run stackctl for the box and check its exit code."""
        words = ["stackctl", "--host", host or self.host, *arguments]
        done = self.lab.run(words, user=CALLER, timeout=120)
        assert done.returncode == code, f"{words} exited {done.returncode}\n{done.stderr}"
        assert "Traceback" not in done.stderr
        return done

    def spawn(self, *arguments: str) -> LabProcess:
        """Start stackctl for the box without waiting for it."""
        return self.lab.spawn(["stackctl", "--host", self.host, *arguments], user=CALLER)

    def cut(self) -> None:
        """Disconnect as a network does: kill ssh on this side without a message."""
        for pid in look.processes(self.lab, "ssh:"):
            self.lab.run(["kill", "-KILL", str(pid)])


class Terminal:
    """Stackctl for the box, on a terminal of its caller."""

    def __init__(self, caller: Caller, *arguments: str) -> None:
        self.primary, secondary = pty.openpty()
        words = ["stackctl", "--host", caller.host, *arguments]
        self.process = caller.lab.spawn(
            words, user=CALLER, env={"TERM": "xterm"},
            stdin=secondary, stdout=secondary, stderr=secondary,
        )  # fmt: skip
        os.close(secondary)
        self.seen = ""
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        with contextlib.suppress(OSError):  # the end of a terminal is an error
            while part := os.read(self.primary, 65536):
                self.seen += re.sub(r"\x1b\[[\d;]*[mK]", "", part.decode(errors="replace"))

    def wait_for(self, pattern: str) -> None:
        """Wait until the pattern is on the screen."""
        look.wait_for(pattern, lambda: re.search(pattern, self.seen) is not None, 60)

    def type(self, keys: str) -> None:
        """Write keys to the terminal."""
        os.write(self.primary, keys.encode())

    def end(self) -> int:
        """Wait for its end and return the exit code."""
        code = self.process.wait(60)
        self._reader.join(10)
        os.close(self.primary)
        return code


@pytest.fixture(scope="module")
def sshd(lab: Lab) -> Iterator[Lab]:
    """Yield the lab with an sshd; caller and sshd have each other's keys."""
    home = lab.home(CALLER)
    make = 'mkdir -m 700 "$HOME/.ssh" && ssh-keygen -q -t ed25519 -N "" -f "$HOME/.ssh/key"'
    lab.run(["sh", "-c", make], user=CALLER, check=True)
    lab.write(f"{home}/.ssh/config", SETTINGS, user=CALLER)
    key = lab.read(f"{home}/.ssh/key.pub")
    for user in STORE_USERS:
        words = ["install", "-d", "-m", "700", f"{lab.home(user)}/.ssh"]
        lab.run(words, user=user, check=True)
        lab.write(f"{lab.home(user)}/.ssh/authorized_keys", key, user=user)
    lab.run(["sh", "-c", "mkdir -p /run/sshd && ssh-keygen -A"], check=True)
    kind, public = lab.read("/etc/ssh/ssh_host_ed25519_key.pub").split()[:2]
    known = f"[127.0.0.1]:{PORT} {kind} {public}\nimpostor {' '.join(key.split()[:2])}\n"
    lab.write(f"{home}/.ssh/known_hosts", known, user=CALLER)
    words = ["systemd-run", "--quiet", "--unit=lab-sshd", "/usr/sbin/sshd", "-D"]
    lab.run([*words, "-o", f"Port={PORT}", "-o", "ListenAddress=127.0.0.1"], check=True)
    look.wait_for("sshd", lambda: bool(look.listening(lab, PORT)))
    yield lab
    lab.run(["systemctl", "stop", "lab-sshd"], check=True)


@pytest.fixture
def either(sshd: Lab, seat: Seat) -> Caller:
    """Return a caller who is root on the box or its ordinary user."""
    return Caller(sshd, seat.user)


@pytest.fixture
def caller(sshd: Lab) -> Caller:
    """Return a caller who is an ordinary user of the box."""
    return Caller(sshd, "lab")


@both_users
def test_the_same_commands_on_the_box(seat: Seat, either: Caller, tiny: str) -> None:
    assert "error: no stack is up" in either("check", code=3).stderr
    done = either(*UP, tiny)
    # Results are on stdout and progress on stderr, as in a local run.
    assert done.stdout.splitlines()[0] == "cpu is up (generation 1)"
    assert re.search(r"^answer +ok ", done.stderr, re.MULTILINE)
    assert re.search(r"^ok +answer +16 tokens", either("check").stdout, re.MULTILINE)
    here, there = (call("status", "--json").stdout for call in (seat.stackctl, either))
    assert [json.loads(text)["stacks"][0]["generation"] for text in (here, there)] == [1, 1]
    # Without a terminal a command that needs an answer is refused.
    done = either(*UP, tiny, "--set", "context=1024", code=2)
    look.assert_error(done, "is running .* would be replaced", "--yes")
    assert "error: no stack named nope" in either("logs", "nope", code=4).stderr
    report = json.loads(either("plan", "nope", "--json", code=4).stdout)
    assert report["schema"] == "stackctl.error/1"
    either("down")
    look.assert_clean(seat)
    # Nothing was done on this side.
    assert not look.exists(seat.lab, f"{seat.lab.home(CALLER)}/.local/state/stackctl")


def test_words_arrive_as_they_were_written(caller: Caller) -> None:
    for text in ("a b", "$HOME", "it's", '"', "a\\nb", "*", "é; exit 9", "-"):
        done = caller("plan", f"no {text}", code=4)
        assert f"no {text}" in done.stderr, done.stderr
    done = caller("profiles", "show", "cpu", "--profiles", "/nowhere", code=2)
    assert "/nowhere" in done.stderr


def test_paths_are_those_of_the_box(caller: Caller) -> None:
    folder = f"{caller.lab.home(CALLER)}/.ssh"
    done = caller("plan", "cpu", "--profiles", folder, code=2)
    assert f"{folder} was looked for on lab@box: with --host every path is there" in done.stderr


def test_a_host_key_is_always_checked(caller: Caller) -> None:
    done = caller("status", code=1, host="root@stranger")
    look.assert_error(done, "cannot connect to root@stranger: Host key verif", "compare the box's")
    done = caller("status", code=1, host="root@impostor")
    look.assert_error(done, "cannot connect to root@impostor: Host key verification failed")
    assert "REMOTE HOST IDENTIFICATION HAS CHANGED" in done.stderr
    known = caller.lab.read(f"{caller.lab.home(CALLER)}/.ssh/known_hosts")
    assert "stranger" not in known
    done = caller("status", code=1, host="root@locked")
    look.assert_error(done, "cannot connect to root@locked: .*Permission denied", "ssh-copy-id")


def test_a_box_without_stackctl(caller: Caller) -> None:
    path = "/usr/local/bin/stackctl"
    caller.lab.run(["mv", path, f"{path}.away"], check=True)
    try:
        words = ["python3", "-m", "stackctl", "--host", caller.host, "status", "--json"]
        done = caller.lab.run(words, user=CALLER)
    finally:
        caller.lab.run(["mv", f"{path}.away", path], check=True)
    assert done.returncode == 6
    report = json.loads(done.stdout)
    assert report["message"] == f"there is no stackctl on {caller.host}"
    assert f"stackctl --host {caller.host} provision" in report["hint"]


@pytest.mark.deep
def test_another_version_on_the_box_is_told(caller: Caller) -> None:
    words = ["ssh", caller.host, "STACKCTL_CALLER='0.0.1 my-box' stackctl profiles"]
    done = caller.lab.run(words, user=CALLER, check=True)
    assert re.search(r"stackctl is \S+ on my-box, and 0\.0\.1 where it is called", done.stderr)
    assert "warning" not in caller("profiles").stderr


#: Reads the arguments of all processes, and prints each one once at SIGTERM.
WATCH = """
import glob, signal, time
seen = set()
def end(*_):
    print(b"\\n".join(seen).replace(b"\\0", b" ").decode(errors="replace"))
    raise SystemExit
signal.signal(signal.SIGTERM, end)
print("watching")
while True:
    for path in glob.glob("/proc/[0-9]*/cmdline"):
        try:
            seen.add(open(path, "rb").read())
        except OSError:
            pass
    time.sleep(0.005)
"""


def test_no_secret_is_in_an_argument(one: Seat, caller: Caller, tiny: str) -> None:
    one.stackctl(*UP, tiny, "--set", "api_key=true", "--set", "front_door=on")
    with caller.lab.spawn(["python3", "-u", "-c", WATCH]) as watch:
        assert watch.stdout is not None
        assert watch.stdout.readline() == "watching\n"
        shown = caller("key", "show", "cpu")
        caller("key", "rotate", "cpu")
        caller("bench", "--from-here", "--prompt=64", "--output=8", "--requests=1")
        watch.terminate()
        seen, _ = watch.communicate(timeout=30)
    for verb in ("show", "rotate"):
        assert f"/usr/local/bin/stackctl key {verb} cpu" in seen
    key = shown.stdout.strip()
    assert len(key) > 20
    caller.lab.run(["rm", "-rf", f"{caller.lab.home(CALLER)}/.local/state/stackctl"])
    for secret in (key, one.stackctl("key", "show").stdout.strip()):
        assert secret not in seen
    # Clients on this side need a port that leads to the box, and the key from there.
    done = caller("client", "openai")
    assert f'OPENAI_API_KEY="$(stackctl --host {caller.host} key show cpu)"' in done.stdout
    assert f"ssh -N -L 8080:127.0.0.1:8080 {caller.host}" in done.stderr
    look.assert_error(caller("client", "openai", "nope", code=4), "lab@box: no stack named nope")
    # Files for a client are written on the client's side.
    caller("client", "aider", "--write", "-y")
    assert look.exists(caller.lab, f"{caller.lab.home(CALLER)}/.aider.conf.yml")
    assert not look.exists(caller.lab, f"{caller.lab.home('lab')}/.aider.conf.yml")


def test_a_stack_is_measured_from_here(one: Seat, caller: Caller, tiny: str) -> None:
    one.stackctl(*UP, tiny, "--set", "api_key=true", "--set", "front_door=on")
    before = open_ports(caller.lab)
    words = ("bench", "--from-here", "--prompt", "64", "--output", "8", "--concurrency", "1")
    try:
        done = caller(*words, "--requests", "5", "--prefix", "uncached")
        assert "bench     cpu of lab@box, from here over ssh" in done.stderr
        assert done.stdout.startswith("bench 1 · cpu of lab@box, from here, generation 1")
        report = json.loads(caller(*words, "--requests", "1", "--json").stdout)
        assert (report["box"], report["lengths"]) == ("lab@box", "tokenizer")
        assert all(cell["failed"] == 0 for cell in report["cells"])
        assert open_ports(caller.lab) == before
        # The run is stored here, with the name of the box; the box has none.
        shown = caller.lab.run(["stackctl", "bench", "list"], user=CALLER, check=True).stdout
        assert shown.count("cpu 1 of lab@box") == 2
        assert "nothing was measured" in one.stackctl("bench", "list").stderr
        # An interrupt closes the ports too.
        with caller.spawn(*words, "--output", "500", "--requests", "50") as process:
            look.wait_for("ports are open", lambda: len(open_ports(caller.lab)) > len(before))
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 130
        assert open_ports(caller.lab) == before
    finally:
        caller.lab.run(["rm", "-rf", f"{caller.lab.home(CALLER)}/.local/state/stackctl"])
    here = caller.lab.run(["stackctl", "bench", "--from-here"], user=CALLER)
    assert here.returncode == 2
    assert "stackctl --host USER@BOX bench --from-here" in here.stderr


#: The connection is kept for a second; after three seconds it is used by a forwarded port.
_IDLE = f"""\
import pathlib, tempfile, time
from stackctl.machine import ssh
ssh._KEPT_S = 1
with tempfile.TemporaryDirectory() as name:
    box = ssh.RemoteHost("lab@box", pathlib.Path(name) / "ssh")
    box.connect()
    with box.forward_port("127.0.0.1", {PORT}) as port:
        time.sleep(3)
        assert box.is_connected()
    time.sleep(3)
    assert not box.is_connected()
"""


@pytest.mark.deep
def test_a_port_that_is_idle_keeps_its_connection(caller: Caller) -> None:
    done = caller.lab.run(["python3", "-c", _IDLE], user=CALLER)
    assert done.returncode == 0, done.stderr


def open_ports(lab: Lab) -> list[str]:
    """Return the ports that listen on loopback."""
    words = ["ss", "-Hltn", "src", "127.0.0.1"]
    return sorted(line.split()[3] for line in lab.run(words, check=True).stdout.splitlines())


def test_one_connection_serves_all_commands(caller: Caller) -> None:
    for _ in range(3):
        caller("profiles")
    folder = f"/run/user/{caller.lab.uid(CALLER)}/stackctl/ssh"
    assert len(caller.lab.run(["ls", folder], user=CALLER).stdout.split()) >= 1
    assert caller.lab.run(["stat", "-c", "%a", folder], user=CALLER).stdout == "700\n"
    number = len(look.processes(caller.lab, "ssh:"))
    caller("profiles")
    assert len(look.processes(caller.lab, "ssh:")) == number


# Interrupts and broken connections


def test_ctrl_c_reaches_the_box(seat: Seat, either: Caller, tiny: str) -> None:
    image = look.never_healthy(seat)
    with either.spawn(*UP, tiny, "--set", f"image={image}") as process:
        look.wait_for("the engine runs", lambda: bool(look.processes(seat.lab, "sleep 98765")))
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, ""), err
    assert err.count("error: interrupted") == 1
    assert look.record(seat, 1)["outcome"]["state"] == "interrupted"
    look.assert_clean(seat)


@pytest.mark.deep
def test_on_a_terminal_it_asks_and_is_interrupted(one: Seat, caller: Caller, tiny: str) -> None:
    one.stackctl(*UP, tiny)
    screen = Terminal(caller, *UP, tiny, "--set", "context=1024", "--soak", "0s")
    screen.wait_for(r"go on\? \[y/N\]")
    screen.type("y\n")
    assert screen.end() == 0, screen.seen
    assert "cpu is up (generation 2)" in screen.seen
    image = look.never_healthy(one)
    screen = Terminal(caller, *UP, tiny, "--set", f"image={image}", "-y")
    look.wait_for("the engine runs", lambda: bool(look.processes(caller.lab, "sleep 98765")))
    screen.type("\x03")
    assert screen.end() == 130, screen.seen
    assert "error: interrupted" in screen.seen
    assert one.stackctl("check").returncode == 0
    states = [look.record(one, number)["outcome"]["state"] for number in (1, 2, 3)]
    assert states == ["replaced", "ready", "interrupted"]


@pytest.mark.parametrize("terminal", [False, pytest.param(True, marks=pytest.mark.deep)])
def test_the_box_ends_what_a_broken_connection_began(
    one: Seat, caller: Caller, tiny: str, terminal: bool
) -> None:
    caller(*UP, tiny)
    image = look.never_healthy(one)
    words = (*UP, tiny, "--set", f"image={image}", "--timeout", "6s", "-y")
    screen = Terminal(caller, *words) if terminal else None
    process = screen.process if screen else caller.spawn(*words)
    with process:
        look.wait_for("the engine runs", lambda: bool(look.processes(caller.lab, "sleep 98765")))
        caller.cut()
        if screen:
            code, said = screen.end(), screen.seen
        else:
            said = process.communicate(timeout=30)[1]
            code = process.returncode
    assert code == 1, said
    assert "error: the connection to lab@box broke" in said
    assert "stackctl --host lab@box status" in said
    # The command continues, and another one is refused with its name.
    done = caller("down", code=7)
    look.assert_error(done, r"another stackctl is at work here: process \d+, up cpu, since")
    # It fails on the box as it would have with a connection, and the old engine serves.
    look.wait_for("it is over", lambda: not look.exists(caller.lab, f"{one.runtime}/lock"))
    assert look.record(one, 2)["outcome"]["state"] == "failed"
    caller("check")
    if terminal:
        return
    # A change that can succeed does so.
    words = (*UP, tiny, "--set", "context=1024", "-y", "--soak", "0s")
    with caller.spawn(*words) as process:
        look.wait_for("it began", lambda: look.exists(caller.lab, f"{one.runtime}/lock"))
        caller.cut()
        assert process.wait(30) == 1
    look.wait_for("it is over", lambda: not look.exists(caller.lab, f"{one.runtime}/lock"))
    assert look.record(one, 3)["outcome"]["state"] == "ready"
    (stack,) = json.loads(caller("status", "--json").stdout)["stacks"]
    assert (stack["state"], stack["generation"]) == ("ready", 3)


@pytest.mark.deep
def test_what_only_watches_ends_with_its_connection(one: Seat, caller: Caller, tiny: str) -> None:
    one.stackctl(*UP, tiny)
    for terminal in (False, True):
        screen = Terminal(caller, "logs", "-f") if terminal else None
        process = screen.process if screen else caller.spawn("logs", "-f")
        with process:
            look.wait_for("it follows", lambda: bool(look.processes(caller.lab, "journalctl")))
            time.sleep(0.5)
            caller.cut()
            assert (screen.end() if screen else process.wait(30)) == 1
            look.chat(one)  # the engine logs something
        look.wait_for("nobody follows", lambda: not look.processes(caller.lab, "journalctl"), 20)


@pytest.mark.deep
def test_a_command_that_is_killed_on_the_box(one: Seat, caller: Caller, tiny: str) -> None:
    one.stackctl(*UP, tiny)
    with caller.spawn("logs", "-f") as process:
        look.wait_for("it follows", lambda: bool(look.processes(caller.lab, "journalctl")))
        for name in ("/usr/bin/python3 /usr/local/bin/stackctl logs", "journalctl"):
            for pid in look.processes(caller.lab, name):
                caller.lab.run(["kill", "-KILL", str(pid)])
        _, err = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "error: stackctl was killed on lab@box" in err
    caller("check")
