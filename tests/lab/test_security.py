"""The promises of docs/security.md, tested with real engines."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator

import pytest

from . import look
from .conftest import EITHER_USER, Seat
from .host import CHECKOUT
from .lab import STORE_USERS, Lab

MODEL = "/srv/models/tiny.gguf"
PROFILE = "engine: llama.cpp\nport: 9001\n"
#: Types of file systems that contain nothing of the host's files.
PSEUDO = {"proc", "sysfs", "tmpfs", "devpts", "mqueue", "cgroup2", "devtmpfs"}


@pytest.fixture(scope="module", params=EITHER_USER)
def served(request: pytest.FixtureRequest, lab: Lab, tiny: str) -> Iterator[Seat]:
    """Yield a user whose stack is up. No test here may change it."""
    seat = Seat(lab, str(request.param))
    try:
        seat.stackctl("up", "cpu-latency", "--model", tiny)
        yield seat
    finally:
        seat.reset()


@pytest.fixture
def root(lab: Lab) -> Iterator[Seat]:
    """Yield root without a stack; all running stacks are removed before."""
    for name in STORE_USERS:
        Seat(lab, name).reset()
    seat = Seat(lab, "root")
    yield seat
    lab.run(["rm", "-rf", "/etc/stackctl"])
    seat.reset()


# The engine


def test_the_engine_may_do_as_little_as_possible(served: Seat) -> None:
    status = look.process_status(served.lab, look.engine_pid(served))
    for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
        assert int(status[name], 16) == 0, name
    assert status["NoNewPrivs"] == "1"
    assert status["Seccomp"] == "2"


def test_the_engine_sees_nothing_of_the_host_s_files_but_the_model(served: Seat) -> None:
    lines = served.lab.read(f"/proc/{look.engine_pid(served)}/mountinfo").splitlines()
    files, written = {}, set()
    for line in lines:
        before, _, after = line.partition(" - ")
        _, _, _, source, target, options = before.split()[:6]
        kind = after.split()[0]
        if target.startswith("/sys/") and served.user != "root":
            # Podman may not mount sysfs for a network that is the host's, so it passes on that of
            # the host. The files below it belong to root, and this engine is not root.
            continue
        if kind not in PSEUDO:
            files[target] = source
        if "rw" in options.split(","):
            written.add(target)
        # Single files of another file system: Podman's own, and masks over files of the kernel.
        elif source != "/" and target != "/models/tiny.gguf":
            own = re.fullmatch(r"/etc/(hosts|hostname|resolv\.conf)|/run/\.containerenv", target)
            assert own or target.startswith(("/proc/", "/sys/")), line
    assert set(files) == {"/", "/models/tiny.gguf"}
    assert files["/models/tiny.gguf"].endswith("/tiny.gguf")
    assert not written & set(files)
    fresh = {"/tmp", "/var/tmp", "/run", "/proc"}
    assert {target for target in written if not target.startswith("/dev")} <= fresh


def test_the_engine_cannot_write_its_root_or_the_model(served: Seat) -> None:
    for path in ("/x", "/etc/hosts", "/models/tiny.gguf", "/models/x"):
        words = ("podman", "exec", look.CONTAINER, "sh", "-c", f"echo >>{path}")
        done = served.run(*words, check=False)
        assert done.returncode != 0, path
        # A file may also be refused because it belongs to another user.
        assert re.search("Read-only file system|Permission denied", done.stderr), path


def test_the_engine_cannot_reach_other_processes_or_devices(served: Seat) -> None:
    pid = look.engine_pid(served)
    own = ["pid", "ipc", "uts", "mnt", "cgroup", *(["user"] if served.user != "root" else [])]
    for name in own:
        ours, theirs = (
            look.lab_path(served.lab, f"/proc/{n}/ns/{name}").readlink() for n in (1, pid)
        )
        assert ours != theirs, name
    devices = {"console", "core", "fd", "full", "mqueue", "null", "ptmx", "pts", "random", "shm",
               "stderr", "stdin", "stdout", "tty", "urandom", "zero"}  # fmt: skip
    inside = served.run("podman", "exec", look.CONTAINER, "ls", "/dev").stdout.split()
    assert set(inside) <= devices


def test_systemd_s_own_measure_is_what_the_docs_say(served: Seat) -> None:
    text = (CHECKOUT / "docs" / "security.md").read_text("utf-8")
    (allowed,) = re.findall(rf"exposure level of {served.user}'s: (\d+\.\d)", text)
    scope = ["--user"] if served.user != "root" else []
    done = served.run("systemd-analyze", *scope, "security", "--no-pager", "cpu.service")
    (level,) = re.findall(r"Overall exposure level for cpu\.service: (\d+\.\d)", done.stdout)
    assert float(level) <= float(allowed)


# The network

SCAN = """
import selectors, socket, sys
def scan(family, address):
    found, ports, waiting = [], iter(range(1, 65536)), selectors.DefaultSelector()
    more = True
    while more or waiting.get_map():
        while more and len(waiting.get_map()) < 200:
            port = next(ports, None)
            if port is None:
                more = False
                break
            s = socket.socket(family)
            s.setblocking(False)
            if s.connect_ex((address, port)) == 0:
                found.append(port)
                s.close()
            else:
                waiting.register(s, selectors.EVENT_WRITE, port)
        events = waiting.select(5)
        if not events and waiting.get_map():
            sys.exit("no answer from %d ports" % len(waiting.get_map()))
        for key, _ in events:
            if key.fileobj.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0:
                found.append(key.data)
            waiting.unregister(key.fileobj)
            key.fileobj.close()
    return found
print(*scan(socket.AF_INET, "10.77.0.1"), "|", *scan(socket.AF_INET6, "fd77::1"))
"""


@pytest.fixture(scope="module")
def neighbour(lab: Lab) -> Iterator[list[str]]:
    """Yield the command prefix that runs a command on another machine in the lab's network."""
    script = """
        set -e
        ip netns add neighbour
        ip link add lan0 type veth peer name lan1 netns neighbour
        ip address add 10.77.0.1/24 dev lan0
        ip address add fd77::1/64 dev lan0 nodad
        ip link set lan0 up
        ip -n neighbour address add 10.77.0.2/24 dev lan1
        ip -n neighbour address add fd77::2/64 dev lan1 nodad
        ip -n neighbour link set lan1 up
    """
    lab.run(["sh", "-c", script], check=True)
    yield ["ip", "netns", "exec", "neighbour"]
    lab.run(["ip", "link", "delete", "lan0"])
    lab.run(["ip", "netns", "delete", "neighbour"])


def test_a_port_scan_from_another_machine_finds_nothing(served: Seat, neighbour: list[str]) -> None:
    lab = served.lab
    # A known port shows that the scan works.
    words = ["python3", "-m", "http.server", "4444", "--bind", "::"]
    door = lab.spawn(words)
    try:
        look.wait_for("the open door", lambda: ":4444" in lab.run(["ss", "-Hltn"]).stdout, step=0.1)
        found = lab.run([*neighbour, "python3", "-c", SCAN], timeout=120, check=True).stdout
    finally:
        door.terminate()
        door.communicate(timeout=10)
    assert found == "4444 | 4444\n"
    assert look.chat(served)["usage"]["completion_tokens"] > 0
    # No UDP port is reachable either.
    shown = lab.run(["ss", "-Hlun"], check=True).stdout.splitlines()
    addresses = [line.split()[3].rpartition(":")[0] for line in shown]
    assert [a for a in addresses if not a.startswith(("127.", "[::1]"))] == []


def test_only_loopback_listens(served: Seat) -> None:
    shown = served.lab.run(["ss", "-Hltn"], check=True).stdout
    addresses = [line.split()[3] for line in shown.splitlines()]
    assert [a for a in addresses if a.endswith(f":{look.PORT}")] == [f"127.0.0.1:{look.PORT}"]
    assert {a.rpartition(":")[0] for a in addresses} <= {"127.0.0.1", "[::1]"}


# Files


def test_state_is_for_its_owner_alone(served: Seat) -> None:
    folders = [served.state, served.runtime, served.cache]
    served.run("mkdir", "-p", f"{served.cache}/compiled/0123456789ab")
    served.run("chmod", "775", served.cache, f"{served.cache}/compiled")
    served.stackctl("status")
    # The modes of compiled files are the engine's choice, but no other user can enter their folder.
    inside = ["-path", f"{served.cache}/compiled/*", "-prune"]
    words = ["find", *folders, *inside, "-o", "-printf", "%y %m %u %p\\n"]
    shown = served.run(*words).stdout.splitlines()
    assert f"d 700 {served.user} {served.cache}/compiled" in shown
    assert len(shown) >= 6
    for line in shown:
        kind, mode, owner, _ = line.split(maxsplit=3)
        assert (mode, owner) == ("700" if kind == "d" else "600", served.user), line


def test_units_are_read_by_all_and_changed_by_their_owner_only(served: Seat) -> None:
    shown = served.run("find", served.units, "-printf", "%y %m %u\\n").stdout.splitlines()
    assert set(shown) == {f"d 755 {served.user}", f"f 644 {served.user}"}


@pytest.mark.deep
@pytest.mark.usefixtures("root")
def test_state_folders_of_older_versions_are_closed(one: Seat, tiny: str) -> None:
    one.stackctl("up", "cpu-latency", "--model", tiny)
    for folder in (one.state, one.runtime):
        one.run("chmod", "755", folder)
    one.stackctl("restart")
    for folder in (one.state, one.runtime):
        assert one.run("stat", "-c", "%a", folder).stdout == "700\n"


WATCH = r"""
import ctypes, os, sys
libc = ctypes.CDLL(None)
watch = libc.inotify_init1(0)
for folder in sys.argv[1:]:
    assert libc.inotify_add_watch(watch, folder.encode(), 0x100 | 0x80) >= 0  # created, moved here
print("watching")
while True:
    for part in os.read(watch, 65536).split(b"\0"):
        print(*(word.decode() for word in part.split() if word.isascii() and len(word) > 3))
"""


def test_nothing_is_made_in_folders_that_everybody_may_write(root: Seat, tiny: str) -> None:
    words = ["python3", "-u", "-c", WATCH, "/tmp", "/var/tmp", "/dev/shm"]
    watch = root.lab.spawn(words)
    try:
        assert watch.stdout is not None
        assert watch.stdout.readline() == "watching\n"
        root.run("mktemp", "/tmp/seen-XXXXXX")
        root.stackctl("up", "cpu-latency", "--model", tiny, env={"TMPDIR": "/tmp"})
        root.stackctl("down")
    finally:
        watch.terminate()
        said, _ = watch.communicate(timeout=10)
    seen = said.split()
    assert any(name.startswith("seen-") for name in seen)
    # systemd and Podman make files with unguessable names there, and protect them themselves.
    others = re.compile(r"seen-|systemd-|podman|libpod|storage|container|buildah")
    assert [name for name in seen if not others.match(name)] == []


def test_root_follows_no_link_that_another_user_planted(root: Seat, tiny: str) -> None:
    lab = root.lab
    lab.run(["ln", "-s", "/root/target", "/tmp/units"], user="lab", check=True)
    lab.run(["mkdir", "/root/target"], check=True)
    try:
        words = ("render", "cpu-latency", "--model", tiny, "-o")
        for folder in ("/tmp/units", "/tmp/units/below"):
            done = root.stackctl(*words, folder, code=2)
            look.assert_error(
                done, "/tmp/units is a link that belongs to lab", "folder of your own"
            )
        assert lab.run(["ls", "/root/target"]).stdout == ""
        # A link in place of a file is replaced.
        lab.run(["mkdir", "/tmp/shared"], user="lab", check=True)
        lab.run(["ln", "-s", "/root/target/x", "/tmp/shared/cpu.container"], user="lab", check=True)
        root.stackctl(*words, "/tmp/shared")
        assert lab.run(["ls", "/root/target"]).stdout == ""
    finally:
        lab.run(["rm", "-rf", "/tmp/units", "/tmp/shared", "/root/target"])


@pytest.mark.parametrize("which", ["state", "units", "runtime"])
def test_root_works_in_no_folder_that_another_user_could_change(
    root: Seat, tiny: str, which: str
) -> None:
    folder = getattr(root, which)
    root.run("install", "-d", "-o", "lab", folder)
    done = root.stackctl("up", "cpu-latency", "--model", tiny, code=2)
    look.assert_error(done, f"{folder}: {folder} belongs to lab", f"chown root:root {folder}")
    root.run("rm", "-rf", folder)
    root.run("ln", "-s", "/home/lab", folder)
    done = root.stackctl("up", "cpu-latency", "--model", tiny, code=2)
    look.assert_error(done, f"{folder}: /home/lab belongs to lab")
    root.run("rm", folder)


def test_another_user_cannot_hold_the_lock(root: Seat, tiny: str) -> None:
    root.stackctl("up", "cpu-latency", "--model", tiny)
    words = ["flock", "--nonblock", f"{root.runtime}/lock", "true"]
    done = root.lab.run(words, user="lab")
    assert "Permission denied" in done.stderr


# Trust of root


def test_root_takes_no_profile_that_another_user_could_change(root: Seat, tiny: str) -> None:
    path = "/etc/stackctl/profiles/mine.yaml"
    root.lab.write(path, PROFILE)
    words = ("plan", "mine", "--model", tiny)
    root.stackctl(*words)
    root.run("chown", "lab", path)
    for verb in ("render", "up", "doctor"):
        root.stackctl(verb, *words[1:], code=2)
    for change in (
        f"chown lab {path}",
        f"chmod g+w {path}; chgrp lab {path}",
        f"chmod o+w {path}",
        "chown lab /etc/stackctl",
        "chmod 777 /etc/stackctl/profiles",
    ):
        root.run("sh", "-c", change)
        done = root.stackctl(*words, code=2)
        look.assert_error(done, f"root does not use profile {path}: /etc/", "chown root")
        restore = "chown -R root:root /etc/stackctl; chmod -R u=rwX,go=rX /etc/stackctl"
        root.run("sh", "-c", restore)
    root.stackctl(*words)


@pytest.mark.deep
def test_root_with_another_user_s_environment(root: Seat, tiny: str) -> None:
    # sudo -E and su -p leave such an environment.
    lab = root.lab
    lab.write("/home/lab/.config/stackctl/profiles/mine.yaml", PROFILE, user="lab")
    runtime = f"/run/user/{lab.uid('lab')}"
    env = {"HOME": "/home/lab", "XDG_RUNTIME_DIR": runtime, "XDG_CONFIG_HOME": "/home/lab/.config",
           "DBUS_SESSION_BUS_ADDRESS": f"unix:path={runtime}/bus"}  # fmt: skip
    try:
        done = root.stackctl("up", "mine", "--model", tiny, env=env, code=2)
        look.assert_error(done, "root does not use profile /home/lab/.config/", "--profiles")
        named = "/home/lab/.config/stackctl/profiles"
        root.stackctl("plan", "mine", "--model", tiny, "--profiles", named, env=env)
        root.stackctl("up", "cpu-latency", "--model", tiny, env=env)
        assert root.run("find", "/home/lab", "-user", "root").stdout == ""
        assert look.exists(lab, "/var/lib/stackctl/stacks/cpu/1.json")
    finally:
        lab.run(["rm", "-rf", "/home/lab/.config/stackctl"])


def test_root_runs_and_imports_nothing_that_another_user_put_there(root: Seat, tiny: str) -> None:
    lab, folder, mark = root.lab, "/home/lab/trap", "/run/trapped"
    modules = ("json", "click", "yaml", "jinja2", "msgspec", "rich", "requests", "podman",
               "stackctl", "cpuinfo", "sitecustomize", "usercustomize")  # fmt: skip
    programs = ("podman", "systemctl", "journalctl", "systemd-analyze", "python3", "lscpu", "sh",
                "dmidecode", "nvidia-smi", "env", "mmdebstrap", "curl")  # fmt: skip
    for name in modules:
        lab.write(f"{folder}/{name}.py", f"open({mark!r}, 'w')\n", user="lab")
    for name in programs:
        lab.write(f"{folder}/{name}", f"#!/bin/sh\necho {name} >>{mark}\n", user="lab")
    lab.run(["sh", "-c", f"chmod 755 {folder}/*"], user="lab", check=True)
    # The trap works.
    lab.run(["python3", "-c", "import click"], cwd=folder)
    assert look.exists(lab, mark)
    lab.run(["rm", mark], check=True)
    env = {"PATH": f"{folder}:.:/usr/local/bin:/usr/bin:/bin", "HOME": "/home/lab"}
    try:
        for line in (
            "probe",
            "doctor",
            f"up cpu-latency --model {tiny}",
            "status",
            "check",
            "logs -n 3",
            "down",
        ):
            words = ["/usr/local/bin/stackctl", *shlex.split(line)]
            done = lab.run(words, cwd=folder, env=env, timeout=120)
            assert done.returncode in (0, 1, 6), f"{line}\n{done.stdout}\n{done.stderr}"
            assert "Traceback" not in done.stderr
            assert not look.exists(lab, mark), (line, lab.read(mark))
    finally:
        lab.run(["rm", "-rf", folder, mark])


def test_units_of_other_users_are_data(root: Seat, one: Seat, tiny: str) -> None:
    claim = {"stack": "theirs", "cpus": "0", "memory_bytes": 2**60, "gpus": [], "port": 9999}
    text = f"[X-Stackctl]\nClaim={json.dumps(claim)}\n"
    script = f"""
        mkdir -p {one.units}
        cd {one.units}
        mkdir a b c d
        mkfifo a/a.container
        ln -s /root/secret.container b/b.container
        truncate -s 1T c/c.container
        ln -s /root d/d
        ln -s /root e
        ln -s /dev/watchdog a/w.container
        i=0; while [ $i -lt 300 ]; do mkdir n$i; echo x >n$i/n.container; i=$((i+1)); done
    """
    one.run("sh", "-c", script)
    words = ("plan", "cpu-latency", "--model", tiny, "--json")
    secret = claim | {"stack": "secret"}
    root.lab.write("/root/secret.container", f"Claim={json.dumps(secret)}\n")
    try:
        root.stackctl(*words, timeout=15)
        root.run("sh", "-c", f"rm -rf {one.units}/*")
        one.lab.write(f"{one.units}/theirs/theirs.container", text, user="lab")
        # The owner's plan obeys the claim. No user may limit root, so root's plan only reports it.
        assert one.stackctl(*words, code=5).stdout
        done = root.stackctl(*words, timeout=15)
        assert json.loads(done.stdout)["verdict"]["fits"] is True
        assert re.search("^warning: not counted, .*theirs", done.stderr, re.MULTILINE)
        done = root.stackctl("up", *words[1:-1], "--set", "port=9999", "--dry-run")
        assert re.search("^warning: not counted, .*theirs", done.stderr, re.MULTILINE)
        assert "port 9999 is claimed by theirs, a stack of a user" in done.stderr
        done = one.stackctl(
            "up", *words[1:-1], "--set", "port=9999", "--dry-run", "--force", code=1
        )
        look.assert_error(done, "port 9999 belongs to theirs")
    finally:
        root.lab.run(["rm", "/root/secret.container"])
