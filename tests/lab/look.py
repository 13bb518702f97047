"""Inspect and prepare the lab for the tests of stackctl."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .conftest import Seat
from .lab import IMAGE, MODEL_PATH, Lab

GEMMA = f"file:{MODEL_PATH}"
#: Two threads wait for each other: with other work on the machine a real model takes minutes.
ONE_THREAD = ("--set", "engine_args.threads=1", "--set", "engine_args.threads-batch=1")
#: For a real model, whose plan with one thread misses the objective of 30 s on slower machines.
ONE_THREAD_AT_ANY_SPEED = (*ONE_THREAD, "--set", "slo.ttft_s=6000")
PORT = 8080  # of the cpu profiles
STACK = "cpu"
CONTAINER = "stackctl-cpu"


def get(lab: Lab, path: str) -> bytes:
    """Return the content of a file in the lab."""
    return lab_path(lab, path).read_bytes()


def put(lab: Lab, path: str, content: bytes, *, mode: int = 0o644) -> None:
    """Write a file of the lab that all its users may read."""
    target = lab_path(lab, path)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(content)
    target.chmod(mode)


def wait_for(
    what: str, done: Callable[[], bool], timeout: float = 90, *, step: float = 0.03
) -> None:
    """Wait until the condition holds. After the timeout, fail with its description."""
    deadline = time.monotonic() + timeout
    while not done():
        assert time.monotonic() < deadline, f"not within {timeout:.0f} s: {what}"
        time.sleep(step)


def exists(lab: Lab, path: str) -> bool:
    """Return True if the lab has that file. No command runs in the lab for it."""
    return lab_path(lab, path).exists()


def lab_path(lab: Lab, path: str) -> Path:
    """Return the path at which this machine sees a path of the lab."""
    return Path(f"/proc/{lab.pid}/root{path}")


# The running engine


def engine_container(seat: Seat, stack: str = STACK) -> str:
    """Return the container of a stack's engine, which is in one of two slots."""
    names = seat.run("podman", "ps", "--all", "--format", "{{.Names}}").stdout.split()
    slots = (f"stackctl-{stack}", f"stackctl-{stack}_b")
    return next((name for name in slots if name in names), slots[0])


def engine_unit(seat: Seat, stack: str = STACK) -> str:
    """Return the service of a stack's engine."""
    return engine_container(seat, stack).removeprefix("stackctl-") + ".service"


def engine_files(seat: Seat) -> list[str]:
    """Return the names of the unit files of engines, without those of front doors."""
    names = [Path(path).name for path in seat.files(seat.units)]
    return [name for name in names if not name.endswith("_door.container")]


def container_id(seat: Seat, name: str | None = None) -> str:
    """Return the id of a container of this user, or an empty text. None means the engine's."""
    name = name or engine_container(seat)
    words = ("podman", "inspect", "--type=container", "--format", "{{.Id}}", name)
    return seat.run(*words, check=False).stdout.strip()


def engine_pid(seat: Seat, name: str | None = None) -> int:
    """Return the process id of the engine as the lab numbers it."""
    name = name or engine_container(seat)
    words = ("podman", "inspect", "--type=container", "--format", "{{.State.Pid}}", name)
    return int(seat.run(*words).stdout)


def argv(seat: Seat, name: str | None = None) -> list[str]:
    """Return the command line of the engine."""
    return seat.lab.read(f"/proc/{engine_pid(seat, name)}/cmdline").split("\0")[:-1]


def process_status(lab: Lab, pid: int) -> dict[str, str]:
    """Return /proc/PID/status by field."""
    pairs = (line.partition(":") for line in lab.read(f"/proc/{pid}/status").splitlines())
    return {name: value.strip() for name, _, value in pairs}


def unit_properties(seat: Seat, *names: str, unit: str | None = None) -> dict[str, str]:
    """Return properties of a unit from systemd. None means the engine's unit."""
    unit = unit or engine_unit(seat)
    shown = seat.systemctl("show", unit, f"--property={','.join(names)}")
    return dict(line.split("=", 1) for line in shown.splitlines() if "=" in line)


def unit_text(seat: Seat, stack: str = STACK) -> str:
    """Return the text of the installed unit file."""
    (name,) = engine_files(seat)
    return seat.lab.read(f"{seat.units}/{stack}/{name}")


def record(seat: Seat, number: int, stack: str = STACK) -> dict[str, Any]:
    """Return the stored record of a generation."""
    text = seat.lab.read(f"{seat.state}/stacks/{stack}/{number}.json")
    found: dict[str, Any] = json.loads(text)
    return found


def chat(seat: Seat, port: int = PORT, content: str = "Say hello.") -> dict[str, Any]:
    """Return the answer to one real completion."""
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": 8}
    return post(seat, f"http://127.0.0.1:{port}/v1/chat/completions", body)


POST = """\
import sys, urllib.request
head = {"Content-Type": "application/json"}
ask = urllib.request.Request(sys.argv[1], sys.argv[2].encode(), head)
for line in urllib.request.urlopen(ask, timeout=100):
    print(line.decode(), end="", flush=True)
"""


def post(seat: Seat, url: str, body: Mapping[str, object]) -> dict[str, Any]:
    """Return the answer to a JSON body. It needs no curl, which a tree from elsewhere may lack."""
    done = seat.run("python3", "-c", POST, url, json.dumps(body), timeout=120)
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


# The lab seen from outside: the tree needs no ps, ss or pgrep


def listening(lab: Lab, port: int | None = None) -> list[str]:
    """Return the addresses in the lab that listen at that port or at any, in hexadecimal.

    127.0.0.1 is 0100007F.
    """
    rows = []
    for table in ("tcp", "tcp6"):
        rows += Path(f"/proc/{lab.pid}/net/{table}").read_text().splitlines()[1:]
    fields = [row.split() for row in rows]
    local = [row[1].split(":") for row in fields if row[3] == "0A"]
    return [address for address, number in local if port in (None, int(number, 16))]


def processes(lab: Lab, command: str) -> list[int]:
    """Return the processes whose command line begins with these words, as the lab numbers them."""
    found = []
    for path in lab_path(lab, "/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = path.read_bytes().rstrip(b"\0").decode(errors="replace").split("\0")
            if f"{' '.join(words)} ".startswith(f"{command} "):
                found.append(int(path.parent.name))
    return found


# State after a test


def assert_clean(seat: Seat, stack: str = STACK) -> None:
    """Check that nothing of any stack is left, including empty folders, sockets and lock files."""
    seat.assert_nothing_left()
    assert not exists(seat.lab, seat.units), f"{seat.units} is still there"
    left = seat.run("find", seat.runtime, "-mindepth", "1", check=False).stdout
    assert left == "", f"left in {seat.runtime}: {left}"
    assert unit_properties(seat, "LoadState", unit=f"{stack}.service") == {"LoadState": "not-found"}
    assert not listening(seat.lab, PORT), "somebody still listens"


def assert_error(
    done: subprocess.CompletedProcess[str], message: str, hint: str | None = None
) -> None:
    """Check that one error and its hint match these patterns, without a traceback."""
    assert "Traceback" not in done.stderr, done.stderr
    lines = done.stderr.splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    assert re.search(message, errors[0]), done.stderr
    if hint is not None:
        hints = done.stderr.partition("\nhint: ")[2]
        assert re.search(hint, hints), done.stderr


# Preparation


def in_namespace(
    seat: Seat,
    setup: str,
    *arguments: str,
    code: int,
    after: str = "",
    folder: str | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run stackctl as this user with mounts of its own, made by SETUP as root; then run AFTER.

    Both are shell text, with $UNITS, $STATE, $USER, $BECOME and $XDG_RUNTIME_DIR set.
    """
    lab, user = seat.lab, seat.user
    group = seat.run("cat", "/proc/self/cgroup").stdout.partition("0::")[2].splitlines()[0]
    names = ("HOME", "USER", "LOGNAME", "PATH", "XDG_RUNTIME_DIR", "DBUS_SESSION_BUS_ADDRESS")
    shown = seat.run("env").stdout.splitlines()
    env = dict(line.split("=", 1) for line in shown if line.partition("=")[0] in names)
    become = f"setpriv --reuid={user} --regid={user} --init-groups --" if user != "root" else ""
    env |= {"UNITS": seat.units, "STATE": seat.state, "BECOME": become}
    script = f"""
        echo $$ >/sys/fs/cgroup{group}/cgroup.procs
        ( set -e
        {setup}
        ) || exit 99
        cd "{folder or "$HOME"}"
        $BECOME stackctl "$@"
        code=$?
        {after}
        exit $code
    """
    words = ["unshare", "--mount", "--propagation=private", "sh", "-c", script, "sh", *arguments]
    done = lab.run(words, env=env, timeout=120)
    assert done.returncode == code, f"exited {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


NEVER_HEALTHY = """\
#!/bin/sh
case "$1" in --help|--version) exec "$0.real" "$@" ;; esac
trap 'exit 0' TERM
echo "pretending to load"
sleep 98765 &
wait
"""


def derived_image(seat: Seat, name: str, change: str) -> str:
    """Return an image of this user: the engine's, changed by a shell command in its root folder."""
    name = f"localhost/lab/{name}:1"
    if seat.run("podman", "image", "exists", name, check=False).returncode == 0:
        return name
    script = f"""
        set -e
        id=$(podman create --pull=never {IMAGE} llama-server)
        cd "$(podman mount "$id")"
        {change}
        cd /
        podman umount "$id" >/dev/null
        podman commit --quiet "$id" {name} >/dev/null
        podman rm "$id" >/dev/null
    """
    enter = () if seat.user == "root" else ("podman", "unshare")
    seat.run(*enter, "sh", "-c", script, timeout=120)
    return name


def never_healthy(seat: Seat) -> str:
    """Return an image whose llama-server starts and then never answers."""
    return scripted_engine(seat, "never-healthy", NEVER_HEALTHY)


def scripted_engine(seat: Seat, name: str, script: str) -> str:
    """Return an image with that script in place of the engine, which it finds as ``$0.real``."""
    change = f"""
        program=$(find . -path ./proc -prune -o -type f -perm -111 -name llama-server -print)
        mv "$program" "$program.real"
        cat >"$program" <<'END'
{script}END
        chmod 755 "$program"
    """
    return derived_image(seat, name, change)
