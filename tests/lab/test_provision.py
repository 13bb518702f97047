"""``stackctl provision`` changes a machine once and reverts it: real apt, systemd and Podman.

The lab lacks some things (controllers, settings of its own kernel, packages from the network). Here
they are refused or skipped, and a virtual machine tests them. The package is a local one of a few
bytes. A stand-in for the toolkit's program is used, because NVIDIA's needs a GPU.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest

from .conftest import Seat
from .host import LabError, need_root
from .lab import Lab

WORKER = "--service-user=worker"
RECORD = "/var/lib/stackctl/provision.json"
DROP_INS = "/etc/systemd/system/user@.service.d"
MEMLOCK = f"{DROP_INS}/10-stackctl-memlock.conf"
#: Files with permissions and hashes, links, folders, and the state of systemd, dpkg and the kernel.
#: It lacks logs, caches, and the backups that shadow's programs make of their files.
STATE = r"""
cd /
find etc usr/local var/lib home srv -xdev \( -path var/lib/containers -o -path var/lib/apt \
    -o -path var/lib/systemd/timers -o -path srv/repo -o -path 'usr/local/lib/python3*' \
    -o -path srv/models -o -path srv/images -o -path 'etc/*-' -o -path etc/.pwd.lock \
    -o -path var/lib/stackctl -o -path var/lib/dpkg -o -path 'home/*/.local' \) -prune \
    -o \( -type f -printf '%p %m %u:%g\n' -fprint0 /tmp/files \) \
    -o -type l -printf '%p -> %l\n' -o -type d -printf '%p/ %m %u:%g\n' | sort
xargs -0 sha256sum </tmp/files | sort
dpkg-query -W -f '${Package} ${Version} ${Status}\n'
systemctl list-unit-files --no-legend --no-pager | sort
ls /var/lib/systemd/linger
getent passwd; getent group
cat /proc/sys/vm/swappiness /proc/sys/kernel/numa_balancing
"""
PACKAGE = r"""
set -e
mkdir -p /srv/repo/tree/DEBIAN /srv/repo/tree/usr/share/doc/passt
printf 'Package: passt\nVersion: 99\nArchitecture: all\nMaintainer: lab <lab@localhost>\n' \
    >/srv/repo/tree/DEBIAN/control
echo 'Description: stands in for the network of rootless containers' >>/srv/repo/tree/DEBIAN/control
dpkg-deb -b /srv/repo/tree /srv/repo/passt.deb >/dev/null
cd /srv/repo
{ cat tree/DEBIAN/control; echo Filename: ./passt.deb; echo "Size: $(stat -c%s passt.deb)"
  echo "SHA256: $(sha256sum passt.deb | cut -d' ' -f1)"; } >Packages
echo 'deb [trusted=yes] file:/srv/repo ./' >/etc/apt/sources.list.d/lab.list
"""


@pytest.fixture(scope="module")
def box() -> Iterator[Seat]:
    """Yield root of a separate lab without stacks and images, and without the package passt."""
    try:
        need_root()
        with Lab(seed=False, door=False) as booted:
            booted.run(["sh", "-c", PACKAGE], check=True)
            booted.run(["dpkg", "--purge", "--force-depends", "passt"], check=True)
            yield Seat(booted, "root")
    except LabError as error:
        pytest.fail(f"the lab cannot be built: {error}")


@pytest.fixture
def clean(box: Seat) -> Iterator[Seat]:
    """Yield the same lab, and undo all changes of the test."""
    yield box
    box.stackctl("provision", "--undo", "--yes", code=None)
    box.run("rm", "-rf", RECORD, DROP_INS, "/etc/cdi")
    box.run("systemctl", "daemon-reload")


def state(box: Seat) -> list[str]:
    """Return the state of the machine in lines."""
    return box.run("sh", "-c", STATE, timeout=120).stdout.splitlines()


def report(box: Seat, *arguments: str, code: int | None = 0) -> dict[str, Any]:
    """Run ``provision`` and return its document."""
    done = box.stackctl("provision", "--json", "--yes", *arguments, code=code)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def statuses(document: dict[str, Any]) -> dict[str, str]:
    """Return the status of each item."""
    return {one["item"]: one["status"] for one in document["items"]}


def changed(document: dict[str, Any]) -> set[str]:
    """Return the items that were changed or would be."""
    return {name for name, one in statuses(document).items() if one in ("change", "changed")}


WANTED = {"podman", "service-user", "subids", "linger", "guard"}


def test_dry_run_then_once_then_never_again_then_back(clean: Seat) -> None:
    box = clean
    box.run("rm", "-rf", "/var/lib/cni")
    before = state(box)
    shown = box.stackctl("provision", WORKER, "--dry-run").stdout
    for words in (
        "install passt",
        "useradd --key SUB_UID_COUNT=0",
        "loginctl enable-linger worker",
    ):
        assert words in shown
    assert changed(report(box, WORKER, "--dry-run")) == WANTED
    # A dry run changes nothing.
    assert state(box) == before

    done = report(box, WORKER, "--profile=cpu-latency")
    assert changed(done) == WANTED
    assert statuses(done)["memlock"] == "skip"
    assert report(box, WORKER)["changed"] == 0
    # Podman's package creates it at the next boot.
    box.run("mkdir", "-p", "/var/lib/cni/networks")

    # The purpose: the new user's manager runs, with its ids and the guard.
    uid = box.run("id", "-u", "worker").stdout.strip()
    manager = ["systemctl", "--user", "-M", "worker@"]
    timer = box.run(*manager, "is-active", "stackctl-guard.timer").stdout.strip()
    assert timer == "active"
    enter = ["runuser", "-u", "worker", "--", "env", "-C", "/", f"XDG_RUNTIME_DIR=/run/user/{uid}"]
    mapped = box.run(*enter, "podman", "unshare", "cat", "/proc/self/uid_map", timeout=60).stdout
    assert [line.split()[2] for line in mapped.splitlines()] == ["1", "65536"]
    doctor = box.run(
        *enter, "HOME=/var/lib/worker", "stackctl", "--user", "doctor", "--json", check=False
    )
    found = {one["name"]: one["status"] for one in json.loads(doctor.stdout)["results"]}
    for name in ("podman", "quadlet", "systemd", "linger"):
        assert found[name] == "ok", found
    # The user can read the logs of its own services.
    box.run(*enter, "systemd-run", "--user", "--wait", "--quiet", "echo", "from a service of it")
    box.run("journalctl", "--sync")
    assert "from a service" in box.run(*enter, "journalctl", "--user", "-t", "echo").stdout
    assert box.run("stat", "-c", "%a", RECORD).stdout.strip() == "600"

    # Rootless Podman has made its folders, and an account with files is not removed.
    kept = report(box, "--undo")
    assert statuses(kept)["service-user"] == "kept"
    assert "userdel --remove worker" in str(kept["items"])
    box.run("userdel", "--remove", "worker", check=False)
    assert statuses(report(box, "--undo")) == {"service-user": "undone"}
    assert state(box) == before
    assert box.run("test", "-e", RECORD, check=False).returncode == 1


def test_drop_ins_are_seen_by_a_new_manager(clean: Seat) -> None:
    box = clean
    only = ("--only=memlock", "--only=cpuset")
    assert changed(report(box, *only)) == {"memlock", "cpuset"}
    assert report(box, *only)["changed"] == 0
    text = box.run(
        "systemctl", "show", "user@1000.service", "-p", "LimitMEMLOCK,DelegateControllers"
    ).stdout
    assert "LimitMEMLOCK=infinity" in text
    assert "cpuset" in text
    report(box, "--undo", "--only=memlock")
    text = box.run("systemctl", "show", "user@1000.service", "-p", "LimitMEMLOCK").stdout
    assert "LimitMEMLOCK=8388608" in text
    assert box.run("ls", DROP_INS).stdout.split() == ["10-stackctl-delegate.conf"]


@pytest.mark.deep
def test_a_manager_with_old_limits_is_told_of_and_started_anew_when_asked(clean: Seat) -> None:
    """The lab's own limit is 8 MiB, so a manager with a lower one can be raised to it."""
    box, user = clean, "nolinger"
    site = f"{DROP_INS}/50-site.conf"
    box.lab.write(site, "[Service]\nLimitMEMLOCK=1M\n")
    box.run("systemctl", "daemon-reload")
    box.run("loginctl", "enable-linger", user)
    try:
        uid = box.lab.uid(user)
        wait_for_manager(box, uid)
        refused = report(box, f"--service-user={user}", "--only=memlock", code=6)
        assert f"{site}:2 sets LimitMEMLOCK to 1M" in refused["items"][0]["problem"]
        box.run("rm", site)
        box.run("systemctl", "daemon-reload")
        done = report(box, f"--service-user={user}", "--only=memlock")
        assert done["items"][0]["effect"] == "login"
        # --yes alone ends no session.
        assert "memlock (1 MiB at most now, 8 MiB at most then)" in done["pending"][0]
        assert limit(box, uid) == 2**20
        seen = Seat(box.lab, user).stackctl("probe").stdout
        assert "changes that when the user's service manager starts" in " ".join(seen.split())
        done = report(box, f"--service-user={user}", "--only=memlock", "--restart-user")
        assert done["pending"] == []
        wait_for_manager(box, uid)
        assert limit(box, uid) == 8 * 2**20
    finally:
        box.run("loginctl", "disable-linger", user)


def wait_for_manager(box: Seat, uid: int) -> None:
    """Wait until the user's service manager runs."""
    for _ in range(100):
        path = f"/run/user/{uid}/systemd/private"
        if box.run("test", "-e", path, check=False).returncode == 0:
            return
        time.sleep(0.1)
    raise AssertionError("the service manager does not start")


def limit(box: Seat, uid: int) -> int:
    """Return the hard limit of locked memory of the running manager."""
    pid = box.run("systemctl", "show", "-P", "MainPID", f"user@{uid}.service").stdout.strip()
    (line,) = [
        text for text in box.lab.read(f"/proc/{pid}/limits").splitlines() if "locked" in text
    ]
    return int(line.split()[4])


def test_a_file_of_somebody_else_is_shown_and_left(clean: Seat) -> None:
    box = clean
    box.lab.write(MEMLOCK, "[Service]\nLimitMEMLOCK=64M\n")
    done = box.stackctl("provision", "--only=memlock", "--yes", code=6)
    assert "is not stackctl's" in done.stdout
    assert "-LimitMEMLOCK=64M" in done.stdout
    assert f"fix: keep what you need of it, then: sudo rm {MEMLOCK}" in done.stdout
    assert box.lab.read(MEMLOCK) == "[Service]\nLimitMEMLOCK=64M\n"


#: Kills the process before or after the first change of this kind.
KILL = """
import os, runpy, signal, sys
from stackctl.provision import changes
when, kind = sys.argv[1:3]
real = changes.perform
def perform(box, change):
    if type(change).__name__ != kind:
        return real(box, change)
    if when == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    real(box, change)
    os.kill(os.getpid(), signal.SIGKILL)
changes.perform = perform
from stackctl.cli.main import run
sys.exit(run(sys.argv[3:]))
"""


@pytest.mark.parametrize(
    ("when", "kind"),
    [
        pytest.param("before", "PackagesChange", marks=pytest.mark.deep),
        ("after", "SubidsChange"),
    ],
)
def test_a_killed_run_goes_on_and_goes_back(clean: Seat, when: str, kind: str) -> None:
    box = clean
    before = state(box)
    words = ["provision", WORKER, "--yes", "--only=podman", "--only=service-user", "--only=subids"]
    killed = box.run("python3", "-c", KILL, when, kind, *words, check=False)
    assert killed.returncode in (-9, 137), killed.stderr
    assert kind.removesuffix("Change").lower() in box.lab.read(RECORD)
    box.stackctl(*words)
    assert report(box, *words[1:])["changed"] == 0
    report(box, "--undo")
    assert state(box) == before


@pytest.mark.deep
def test_an_interrupt_waits_for_the_change_and_is_heard(clean: Seat) -> None:
    box = clean
    process = box.lab.spawn(
        ["stackctl", "provision", WORKER, "--yes", "--only=podman", "--only=service-user"]
    )
    # While apt installs
    for _ in range(200):
        if box.run("test", "-e", RECORD, check=False).returncode == 0:
            break
        time.sleep(0.02)
    process.send_signal(2)
    out, err = process.communicate(timeout=60)
    assert process.returncode in (0, 130), f"{out}\n{err}"
    assert box.run("dpkg", "--audit").stdout == ""
    report(box, WORKER, "--only=podman", "--only=service-user")
    assert report(box, WORKER, "--only=podman", "--only=service-user")["changed"] == 0


@pytest.mark.parametrize(
    ("wrap", "item", "message", "hint"),
    [
        (
            "mount --bind /etc /etc && mount -o remount,bind,ro /etc", "memlock",
            "the file system of /etc is read-only", "mount -o remount,rw /etc",
        ),
        pytest.param(
            "mkdir -p /var/lib/stackctl && mount -t tmpfs -o size=64k none /var/lib/stackctl",
            "memlock", "/var/lib/stackctl has 64 KiB left, 1 MiB are needed", "make room",
            marks=pytest.mark.deep,
        ),
        pytest.param(
            "exec 9<>/var/lib/dpkg/lock-frontend && python3 -c "
            "'import fcntl; fcntl.lockf(9, fcntl.LOCK_EX); import time; time.sleep(4)' & sleep 1",
            "podman", "the package manager is at work: process", "wait until it is done",
            marks=pytest.mark.deep,
        ),
        (
            "mount --bind /dev/null /etc/apt/sources.list.d/lab.list "
            "&& rm -rf /var/lib/apt/lists/*",
            "podman", "the packages cannot be fetched: no network, or no package source",
            "connect this machine",
        ),
    ],
    ids=["read-only", "full", "locked", "offline"],
)  # fmt: skip
def test_refusals(clean: Seat, wrap: str, item: str, message: str, hint: str) -> None:
    box = clean
    script = f'{wrap}\nexec stackctl provision --yes --only="$1"'
    done = box.run("unshare", "-m", "sh", "-c", script, "sh", item, check=False, timeout=60)
    assert done.returncode == 6, done.stderr
    assert message in done.stderr
    assert hint in done.stderr
    # The refusal comes before the first change.
    assert box.run("test", "-e", MEMLOCK, check=False).returncode == 1
    assert box.run("dpkg", "-s", "passt", check=False).returncode == 1


def test_an_ordinary_user_may_look_and_is_told_how_to_go_on(box: Seat) -> None:
    user = Seat(box.lab, "lab")
    assert "would change" in user.stackctl("provision", "--dry-run").stdout
    done = user.stackctl("provision", "--yes", code=2)
    assert "needs root" in done.stderr
    assert "as root: /usr/local/bin/stackctl provision --yes" in done.stderr


def test_sudo_is_asked_for_what_needs_root(clean: Seat) -> None:
    box = clean
    box.lab.write("/etc/sudoers.d/lab", "lab ALL=(ALL) NOPASSWD: ALL\n")
    box.run("chmod", "440", "/etc/sudoers.d/lab")
    try:
        user = Seat(box.lab, "lab")
        document = json.loads(user.stackctl("provision", "--yes", "--json", "--only=guard").stdout)
        # The user who calls sudo is the one who runs stacks.
        assert document["service_user"] == "lab"
        assert statuses(document) == {"guard": "changed"}
        assert user.systemctl("is-active", "stackctl-guard.timer").strip() == "active"
        assert json.loads(box.lab.read(RECORD))["changes"][0]["user"] == "root (lab)"
        user.stackctl("provision", "--undo", "--yes")
        assert user.systemctl("is-active", "stackctl-guard.timer", check=False) != "active\n"
    finally:
        box.run("rm", "/etc/sudoers.d/lab")


@pytest.mark.deep
def test_the_ground_is_not_taken_from_under_a_stack(clean: Seat) -> None:
    box = clean
    report(box, "--only=podman")
    box.lab.write("/etc/containers/systemd/stackctl/cpu/cpu.container", "[Container]\n")
    try:
        done = box.stackctl("provision", "--undo", "--yes", code=5)
        assert "cpu is up" in done.stderr
        assert "stackctl down cpu" in done.stderr
        assert box.run("dpkg", "-s", "passt", check=False).returncode == 0
    finally:
        box.run("rm", "-r", "/etc/containers/systemd/stackctl/cpu")


@pytest.mark.deep
def test_packages_that_others_need_stay(clean: Seat) -> None:
    box = clean
    report(box, "--only=podman")
    needs = """
        mkdir -p /srv/repo/other/DEBIAN
        printf 'Package: other\\nVersion: 1\\nArchitecture: all\\nMaintainer: lab <l@localhost>\\n'\
'Depends: passt\\nDescription: needs it\\n' >/srv/repo/other/DEBIAN/control
        dpkg-deb -b /srv/repo/other /srv/repo/other.deb && dpkg -i /srv/repo/other.deb
    """
    box.run("sh", "-c", needs)
    try:
        kept = report(box, "--undo")
        assert statuses(kept) == {"podman": "kept"}
        assert "other, installed since, need" in kept["items"][0]["problem"]
    finally:
        box.run("dpkg", "--purge", "other")
    assert statuses(report(box, "--undo")) == {"podman": "undone"}


@pytest.mark.deep
def test_two_at_once_are_one_after_the_other(clean: Seat) -> None:
    box = clean
    both = [
        box.lab.spawn(["stackctl", "provision", "--yes", WORKER, "--only=service-user"])
        for _ in range(2)
    ]
    said = [process.communicate(timeout=60) for process in both]
    codes = sorted(process.returncode for process in both)
    assert codes in ([0, 0], [0, 7]), said
    assert report(box, WORKER, "--only=service-user")["changed"] == 0


def test_stackctl_itself_is_put_where_root_alone_can_change_it(clean: Seat) -> None:
    """Root runs it from an ordinary user's copy, as with sudo."""
    box = clean
    box.run("mv", "/usr/local/bin/stackctl", "/root/stackctl")
    try:
        words = ["provision", "--yes", "--only=stackctl", "--only=guard"]
        box.run("python3", "-P", "-m", "stackctl", *words, timeout=120)
        assert box.run("readlink", "/usr/local/bin/stackctl").stdout.startswith("/usr/local/lib/")
        assert (
            "ExecStart=/usr/local/bin/stackctl"
            in box.run("systemctl", "cat", "stackctl-guard.service").stdout
        )
        box.run("systemctl", "start", "stackctl-guard.service")
        assert report(box, *words[1:])["changed"] == 0
        # It also works for every user, from the isolated copy.
        where = "import stackctl; print(stackctl.__file__)"
        user = Seat(box.lab, "lab")
        assert "cpu-latency" in user.stackctl("profiles").stdout
        isolated = "import sys; sys.path.insert(0, '/usr/local/lib/stackctl/lib');" + where
        assert "/usr/local/lib/stackctl/" in user.run("python3", "-I", "-c", isolated).stdout
        # An undo removes the program that runs it at the end.
        box.stackctl("provision", "--undo", "--yes")
        assert box.run("ls", "/usr/local/bin").stdout == ""
        assert "stackctl" not in box.run("ls", "/usr/local/lib").stdout.split()
    finally:
        box.run("mv", "/root/stackctl", "/usr/local/bin/stackctl")
