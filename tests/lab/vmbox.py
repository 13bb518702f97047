"""The virtual machine as a box for the tutorial, and a record of its state."""

from __future__ import annotations

import atexit
import functools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from . import tutorial
from .host import CHECKOUT
from .vm import USER, VM

TUTORIAL = CHECKOUT / "docs/fresh-epyc-box.md"
SERVICE_USER = "models"
#: The disk with images and a model; the machine itself has no /srv/models.
DATA = "/mnt/data"
STORE = f"{DATA}/store"
MODEL = "/srv/models/your-model.gguf"

#: All files with type, permissions, owner and size (folders without size), hashes of settings and
#: local programs, and the state of systemd, dpkg and the kernel.
_RECORD = r"""
set -e
cd /
find . -xdev \( -path ./tmp -o -path ./var/tmp -o -path ./var/log -o -path ./mnt/data \) -prune \
    -o -type f -printf 'file %P %m %U:%G %s\n' -o -type l -printf 'link %P -> %l\n' \
    -o -type d -printf 'folder %P %m %U:%G\n' -o -printf 'other %P %y %m %U:%G\n'
find etc usr/local usr/lib/systemd opt srv root home var/lib -xdev -type f -print0 |
    xargs -0 sha256sum | sed 's/^\([0-9a-f]*\)  /hash \1 /'
dpkg-query -W -f 'package ${Package} ${Version} ${Status}\n'
# apt-mark, run by root, else leaves caches behind: the record would find itself.
marks() { apt-mark -o Dir::Cache::pkgcache= -o Dir::Cache::srcpkgcache= "$1"; }
marks showmanual | sed 's/^/manual /'; marks showhold | sed 's/^/hold /'
for scope in --system --global; do
    systemctl $scope list-unit-files --no-legend --no-pager --plain |
        sed "s/  */ /g; s/^/unit $scope /"
done
for user in 0 1000; do
    systemctl show "user@$user.service" -p LimitMEMLOCK,DelegateControllers | sed "s/^/user $user /"
done
for base in passwd group shadow gshadow; do getent $base | sed "s/^/$base /"; done
sysctl -a 2>/dev/null | sed 's/^/sysctl /'
grep -H . /sys/kernel/mm/transparent_hugepage/* /sys/devices/system/node/online \
    /sys/devices/system/cpu/online | sed 's/^/kernel /'
"""
#: Lines that change from one minute to the next on a machine that nobody uses.
_RESTLESS = {
    r"hash \w+ var/lib/systemd/": "stamps of timers, the seed of the random numbers",
    r"\w+ var/lib/systemd/(timers|timesync)\b": "stamps of timers",
    r"unit --system session-\d+\.scope": "the login that asks",
    r"sysctl vm\.user_reserve_kbytes": "by the memory that is free at boot",
    r"sysctl fs\.(dentry-state|file-nr|inode-nr|inode-state|quota|aio-nr)": "counters",
    r"sysctl kernel\.(random\.|ns_last_pid|pty\.nr|perf_event_max_sample_rate)": "counters",
    r"\w+ (\w+ )?root/\.(bash_history|cache|lesshst)": "of root's shell",
}


@functools.cache
def program() -> Path:
    """Return a folder for the search path with this checkout's stackctl."""
    folder = Path(tempfile.mkdtemp(prefix="stackctl-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    text = f'#!/bin/sh\nPYTHONPATH={CHECKOUT} exec {sys.executable} -P -m stackctl "$@"\n'
    (folder / "stackctl").write_text(text)
    (folder / "stackctl").chmod(0o755)
    return folder


#: Colours, control codes of terminals at the end of a line, and the end of the typed input.
_DRAWN = re.compile(r"\x1b\[[\d;]*[mK]|[\r\0]|\^[@D]")


class Box:
    """A stock machine with its recorded first state."""

    def __init__(self, vm: VM) -> None:
        """Record the first state of a machine that has booted."""
        self.vm = vm
        #: Functions of the shell that the reader has defined.
        self._known = ""
        self._sections: dict[str, list[tuple[str, str]]] = {}
        vm.run(["sh", "-c", _MOVE_DATA], check=True)
        self.before = self.record()

    def record(self) -> set[str]:
        """Return the state of the machine in lines, without lines that always change."""
        lines = self.vm.run(["sh", "-c", _RECORD], check=True, timeout=600).stdout.splitlines()
        restless = re.compile("|".join(_RESTLESS))
        return {line for line in lines if not restless.match(line)}

    def follow(self, section: str) -> list[tuple[str, str]]:
        """Run the commands of a section of the tutorial, once. Return each with its output.

        Commands with --host run here, the others as the machine's user, who may use sudo. Every
        question is answered with yes.
        """
        if section not in self._sections:
            done: list[tuple[str, str]] = []
            for command in tutorial.commands(TUTORIAL)[section]:
                if command.partition("\n")[0].endswith("{"):
                    self._known += f"{command}\n"
                    continue
                if " --host " in command:
                    words = ["script", "--quiet", "--return", "--command", command, "/dev/null"]
                    path = f"{program()}:{os.environ['PATH']}"
                    said = self.vm.client(words, env={"PATH": path}, input="y\n", timeout=1500)
                else:
                    said = self.vm.type(self._known + command, "y\n", user=USER, timeout=1500)
                text = _DRAWN.sub("", said.stdout)
                assert said.returncode == 0, f"{command}\n{text}{said.stderr}"
                done.append((command, text))
            self._sections[section] = done
        return self._sections[section]

    # Users

    def service(
        self, *words: str, code: int | None = 0, timeout: float = 600
    ) -> subprocess.CompletedProcess[str]:
        """Run a command as the service user, who cannot log in."""
        script = 'cd && exec "$@"'
        runtime = self.vm.run(["id", "-u", SERVICE_USER], check=True).stdout.strip()
        enter = ["sudo", "-u", SERVICE_USER, "-H", f"XDG_RUNTIME_DIR=/run/user/{runtime}"]
        return self._run(
            [*enter, "sh", "-c", script, "service", *words], code=code, timeout=timeout
        )

    def root(
        self, *words: str, code: int | None = 0, timeout: float = 600
    ) -> subprocess.CompletedProcess[str]:
        """Run a command as root."""
        return self._run(list(words), code=code, timeout=timeout)

    def _run(
        self, words: list[str], *, code: int | None, timeout: float
    ) -> subprocess.CompletedProcess[str]:
        done = self.vm.run(words, timeout=timeout)
        said = f"{words} exited {done.returncode}\n{done.stdout}{done.stderr}"
        assert code is None or done.returncode == code, said
        return done

    def run(self, user: str, *words: str, code: int | None = 0) -> str:
        """Run a command as root or the service user and return its output."""
        return (self.root if user == "root" else self.service)(*words, code=code).stdout

    def json(self, user: str, *words: str, code: int | None = 0) -> dict[str, Any]:
        """Run stackctl and return its JSON document."""
        found: dict[str, Any] = json.loads(self.run(user, "stackctl", *words, "--json", code=code))
        return found

    def read(self, path: str) -> str:
        """Return the text of a file."""
        return self.root("cat", path).stdout

    # Engines

    def pid(self, user: str, container: str) -> str:
        """Return the process id of an engine."""
        words = ("podman", "inspect", "--type=container", "--format", "{{.State.Pid}}", container)
        return self.run(user, *words).strip()

    def status(self, pid: str) -> dict[str, str]:
        """Return /proc/PID/status by field."""
        pairs = (line.partition(":") for line in self.read(f"/proc/{pid}/status").splitlines())
        return {name: value.strip() for name, _, value in pairs}

    def pages(self, pid: str) -> dict[str, int]:
        """Return the number of anonymous pages of a process by node.

        Pages of files are not counted, because other processes may have read the files before.
        """
        lines = self.read(f"/proc/{pid}/numa_maps").splitlines()
        found: dict[str, int] = {}
        for node, count in re.findall(
            r" N(\d)=(\d+)", "\n".join(line for line in lines if "anon=" in line)
        ):
            found[node] = found.get(node, 0) + int(count)
        return found


_MOVE_DATA = f"""
set -e
umount /srv
mkdir {DATA}
# Without nofail: what starts at boot finds it there.
sed -i 's, /srv ext4 ro.nofail , {DATA} ext4 ro ,' /etc/fstab
systemctl daemon-reload
mount {DATA}
"""


def stackctl(vm: VM, user: str, *arguments: str, code: int = 0, timeout: float = 600) -> str:
    """Run this checkout's stackctl here with --host for that user; return its output."""
    words = [sys.executable, "-m", "stackctl", "--host", f"{user}@{vm.host}", *arguments]
    done = vm.client(words, env={"PYTHONPATH": str(CHECKOUT)}, timeout=timeout)
    assert done.returncode == code, f"{words} exited {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


def results(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the results of a document by name."""
    return {one["name"]: one for one in document["results"]}


def differences(before: Iterable[str], after: Iterable[str], allowed: dict[str, str]) -> list[str]:
    """Return the changed lines that no pattern allows.

    ALLOWED maps patterns that lines begin with to reasons.
    """
    expected = re.compile("|".join(allowed)) if allowed else None
    gone, new = set(before) - set(after), set(after) - set(before)
    told = [*(f"- {line}" for line in sorted(gone)), *(f"+ {line}" for line in sorted(new))]
    return [line for line in told if expected is None or not expected.match(line[2:])]


@pytest.fixture(scope="session")
def vm() -> Iterator[VM]:
    """Yield the machine after its first boot, with nothing installed."""
    with VM() as booted:
        yield booted


@pytest.fixture(scope="session")
def box(vm: VM) -> Box:
    """Return the box with its first state recorded."""
    return Box(vm)


@pytest.fixture(scope="session")
def ready(box: Box) -> Box:
    """Return the box after the tutorial's provisioning, with a model and the engine's image."""
    box.follow("1. Look")
    box.follow("2. Do")
    box.root("cp", f"{DATA}/models/tiny.gguf", MODEL)
    # The registry cannot be reached, so the images come from read-only stores.
    write = 'mkdir -p "${1%/*}" && cat >"$1"'
    for user, store, more in (("root", STORE, _ROOTFUL), (SERVICE_USER, _STORE_OF_IT, "")):
        enter = ["sudo", "-u", user, "sh", "-c", write, "write", STORAGE[user]]
        box.vm.run(enter, input=_STORAGE.format(more=more, store=store), check=True)
    box.root("sh", "-c", _LEND_STORE, timeout=120)
    return box


#: The files of the store belong to a rootless user with the number 1000.
_STORE_OF_IT = f"/mnt/{SERVICE_USER}"
_LEND_STORE = f"""
set -e
mkdir {_STORE_OF_IT}
uid=$(id -u {SERVICE_USER})
echo "{STORE} {_STORE_OF_IT} none bind,ro,X-mount.idmap=b:1000:$uid:1 0 0" >>/etc/fstab
systemctl daemon-reload
mount {_STORE_OF_IT}
"""
_TAKE_STORE = f"""
set -e
umount {_STORE_OF_IT}
rmdir {_STORE_OF_IT}
sed -i '\\, {_STORE_OF_IT} ,d' /etc/fstab
systemctl daemon-reload
"""


@pytest.fixture(scope="session")
def served(ready: Box) -> Box:
    """Return the box while it serves a model, as in the tutorial."""
    rest(ready)
    ready.follow("3. Serve")
    return ready


STORAGE = {
    "root": "/etc/containers/storage.conf",
    SERVICE_USER: f"/var/lib/{SERVICE_USER}/.config/containers/storage.conf",
}
_STORAGE = """\
[storage]
driver = "overlay"
{more}[storage.options]
additionalimagestores = ["{store}"]
"""
_ROOTFUL = 'runroot = "/run/containers/storage"\ngraphroot = "/var/lib/containers/storage"\n'


def rest(box: Box) -> None:
    """Stop the guards until the next boot.

    They run every minute, and each run takes half a minute on an emulated processor.
    """
    box.root("systemctl", "stop", "stackctl-guard.timer", code=None)
    box.service("systemctl", "--user", "stop", "stackctl-guard.timer")


def give_back(box: Box) -> None:
    """Remove the additions of ``ready`` that are not part of the tutorial."""
    box.root("sh", "-c", _TAKE_STORE)
