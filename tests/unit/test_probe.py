"""Tools, limits, memory and the problems that stand in the way of a launch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from stackctl.errors import ExitCode, NotInstalled, StackctlError
from stackctl.machine.machine import Machine, RecordedMachine
from stackctl.machine.runner import Completed
from stackctl.probe import probe
from stackctl.probe.cpu import CpuInfoFallback, read_cpuinfo
from stackctl.probe.fact_reader import FactReader
from stackctl.requirements.facts import Scope
from stackctl.values.base import from_json, to_json
from stackctl.values.cpu_list import CpuList
from stackctl.values.host import UNLIMITED, Cpu, Host, Problem

UID = os.getuid()
USER_MANAGER = f"sys/fs/cgroup/user.slice/user-{UID}.slice/user@{UID}.service"
LIMITS = (
    "Limit                     Soft Limit           Hard Limit           Units     \n"
    "Max open files            1024                 {nofile:<20} files     \n"
    "Max locked memory         8388608              {memlock:<20} bytes     \n"
)
VERSIONS = {
    "podman --version": "podman version 5.4.2\n",
    "systemctl --version": "systemd 257 (257.7-1)\n+PAM +AUDIT\n",
}
NODE = "sys/devices/system/node/node"

#: A Debian 13 that is ready for user services, as user ``UID`` sees it.
READY: dict[str, str] = {
    "etc/os-release": 'PRETTY_NAME="Debian GNU/Linux 13 (trixie)"\nID=debian\nVERSION_ID="13"\n',
    "proc/sys/kernel/osrelease": "6.12.1-amd64\n",
    "proc/meminfo": "MemTotal: 4194304 kB\nMemAvailable: 2097152 kB\n",
    # A CPU that the tests may use: it must be among those allowed.
    "proc/cpuinfo": f"processor\t: {min(os.sched_getaffinity(0))}\nphysical id\t: 0\n"
    "core id\t: 0\nmodel name\t: Test\nflags\t: avx2\n",
    "proc/1/status": "Name:\tsystemd\nCapBnd:\t000001ffffffffff\n",
    "proc/1/uid_map": "         0          0 4294967295\n",
    "proc/1/limits": LIMITS.format(nofile="524288", memlock="8388608"),
    "proc/sys/fs/nr_open": "1073741816\n",
    "proc/900/comm": "systemd\n",
    "proc/900/cmdline": "/usr/lib/systemd/systemd\0--user\0",
    "proc/900/status": f"Name:\tsystemd\nUid:\t{UID}\t{UID}\t{UID}\t{UID}\n",
    "proc/900/limits": LIMITS.format(nofile="524288", memlock="unlimited"),
    f"{USER_MANAGER}/cgroup.controllers": "cpuset cpu io memory pids\n",
    f"{USER_MANAGER}/init.scope/cgroup.procs": "900\n901\n",
    "sys/fs/cgroup/cgroup.controllers": "cpuset cpu io memory hugetlb pids rdma misc\n",
    "usr/lib/systemd/system-generators/podman-system-generator": "",
    "usr/lib/systemd/user-generators/podman-user-generator": "",
    "run/systemd/system/.keep": "",
    f"run/user/{UID}/systemd/private": "",
}  # fmt: skip


class Standing(RecordedMachine):
    """A recorded machine that stands for the live one: what it lacks is absent, not unknown."""

    live = True

    def run(self, argv: Sequence[str], *, timeout_s: float = 10) -> Completed:
        try:
            return super().run(argv, timeout_s=timeout_s)
        except StackctlError:
            raise NotInstalled(f"{argv[0]} is not installed", exit_code=ExitCode.HOST) from None


def _write(root: Path, files: dict[str, str | None], versions: dict[str, str] | None) -> Path:
    for name, text in files.items():
        if text is not None:
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8", newline="")
    if versions is not None:
        (root / "commands.json").write_text(json.dumps(versions), encoding="utf-8")
    return root


def _user_name() -> str:
    import pwd

    try:
        return pwd.getpwuid(UID).pw_name
    except KeyError:
        pytest.skip("the user running the tests has no name")


@pytest.fixture
def look(tmp_path: Path) -> Any:
    """Probe READY with some files changed (None removes one)."""

    def looked(
        change: dict[str, str | None] | None = None,
        *,
        scope: Scope = "user",
        versions: dict[str, str] | None = VERSIONS,
        linger: bool = True,
    ) -> Host:
        files: dict[str, str | None] = {**READY, **(change or {})}
        if linger:
            files[f"var/lib/systemd/linger/{_user_name()}"] = ""
        host = probe(Standing(_write(tmp_path, files, versions)), scope=scope)
        assert from_json(to_json(host), Host, where="test") == host
        return host

    return looked


def _whats(host: Host) -> list[str]:
    return [problem.what for problem in host.problems]


def _only(host: Host) -> Problem:
    (problem,) = host.problems
    return problem


def _as_root(command: str) -> str:
    return command if UID == 0 else f"sudo {command}"


def test_a_machine_that_is_ready(look: Any) -> None:
    host = look()
    tools = host.tools
    assert (tools.os, tools.kernel) == ("Debian GNU/Linux 13 (trixie)", "6.12.1-amd64")
    assert (tools.podman, tools.systemd, tools.systemd_running) == ("5.4.2", "257", True)
    assert tools.quadlet_generator == "/usr/lib/systemd/system-generators/podman-system-generator"
    assert tools.cgroup_version == 2
    assert tools.cgroup_controllers == ("cpuset", "cpu", "io", "memory", "pids")
    assert tools.linger is True
    assert (host.limits.memlock_bytes, host.limits.nofile) == (UNLIMITED, 524288)
    assert host.memory.available_bytes == 2**31
    assert host.problems == ()
    assert host.scope == "user"


def test_system_scope(look: Any) -> None:
    host = look(scope="system", linger=False)
    assert "rdma" in host.tools.cgroup_controllers
    assert host.tools.linger is None
    # Process 1 may raise the limit, whatever its own is; open files only up to the kernel's.
    assert (host.limits.memlock_bytes, host.limits.nofile) == (UNLIMITED, 1073741816)
    assert host.problems == ()


def test_no_podman(look: Any) -> None:
    problem = look(versions={"systemctl --version": "systemd 257"}).problems[0]
    assert problem.what == "podman is not installed"
    by_hand = _as_root("apt-get install podman")
    assert problem.fix == f"stackctl provision --only podman\n# by hand: {by_hand}"


@pytest.mark.parametrize(
    ("release", "fix"),
    [
        ('ID="rhel"\nID_LIKE="fedora"\nVERSION_ID="9.4"\n', _as_root("dnf install podman")),
        ("ID=pop\nID_LIKE='ubuntu debian'\n", _as_root("apt-get install podman")),
        ("ID=plan9\n", None),
    ],
)
def test_podman_is_installed_as_the_distribution_does(
    look: Any, release: str, fix: str | None
) -> None:
    host = look({"etc/os-release": release}, versions={"systemctl --version": "systemd 257"})
    # By stackctl where it can, and as it is done by hand.
    assert (_only(host).fix or "").rpartition("# by hand: ")[2] == (fix or "")


def test_debian_12_has_no_podman_worth_installing(look: Any) -> None:
    old = {"etc/os-release": "ID=debian\nVERSION_ID=12\n"}
    fix = _only(look(old, versions={"systemctl --version": "systemd 252"})).fix
    assert fix is not None
    assert fix.startswith("upgrade to Debian 13")


@pytest.mark.parametrize("version", ["4.6.2", "4.4.4", "4.3.1", "3.4.4"])
def test_podman_that_is_too_old(look: Any, version: str) -> None:
    host = look(versions=VERSIONS | {"podman --version": f"podman version {version}"})
    assert _only(host).what == f"podman {version} is too old"
    assert "subfolders" in _only(host).why
    assert "install podman 4.7 or newer" in (_only(host).fix or "")


@pytest.mark.parametrize(
    "text",
    ["podman version 4.7.0", "podman version 4.9.3", "podman version 5.6.0-rc1", "podman 10.0"],
)
def test_podman_with_quadlet(look: Any, text: str) -> None:
    assert look(versions=VERSIONS | {"podman --version": text}).problems == ()


def test_podman_that_says_nothing(look: Any) -> None:
    problem = _only(look(versions=VERSIONS | {"podman --version": "\n"}))
    assert problem.what == "podman does not answer"
    assert "it gives no version: nothing" in problem.why


def test_podman_that_cannot_be_executed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    program = tmp_path / "podman"
    program.write_bytes(b"")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    problems = probe(Machine(), scope="system").problems
    (found,) = [problem for problem in problems if problem.what == "podman does not answer"]
    assert found.why == "cannot run podman: Exec format error"
    # The thread that asks podman ends without a traceback.
    assert capfd.readouterr() == ("", "")


def test_no_generator_for_the_scope(look: Any) -> None:
    host = look({"usr/lib/systemd/user-generators/podman-user-generator": None})
    assert _only(host).what == "no Quadlet generator"
    assert host.tools.quadlet_generator is not None


def test_generator_outside_systemd_is_good_for_dry_runs_only(look: Any) -> None:
    host = look(
        {
            "usr/lib/systemd/system-generators/podman-system-generator": None,
            "usr/libexec/podman/quadlet": "",
        },
        scope="system",
    )
    assert host.tools.quadlet_generator == "/usr/libexec/podman/quadlet"
    assert _only(host).what == "no Quadlet generator"


def test_systemd_does_not_run(look: Any) -> None:
    host = look({"run/systemd/system/.keep": None, f"run/user/{UID}/systemd/private": None})
    assert host.tools.systemd_running is False
    # One problem: that the user's manager and its limits are missing follows from it.
    assert _only(host).what == "systemd is not running"
    assert (host.limits.memlock_bytes, host.limits.nofile) == (None, None)


def test_no_user_manager(look: Any) -> None:
    gone: dict[str, str | None] = {f"run/user/{UID}/systemd/private": None}
    problem = _only(look(gone))
    assert problem.what == "no service manager for this user"
    assert problem.fix == _as_root(f"systemctl start user@{UID}.service")


def test_no_user_manager_because_of_linger(look: Any) -> None:
    problem = _only(look({f"run/user/{UID}/systemd/private": None}, linger=False))
    assert problem.fix == _as_root(f"loginctl enable-linger {_user_name()}")


def test_services_end_at_logout(look: Any) -> None:
    host = look(linger=False)
    problem = _only(host)
    assert (host.tools.linger, problem.what) == (False, "user services end at logout")
    by_hand = _as_root(f"loginctl enable-linger {_user_name()}")
    assert problem.fix == f"stackctl provision --only linger\n# by hand: {by_hand}"


@pytest.mark.parametrize("mark", ["unified/cgroup.controllers", "memory/tasks"])
def test_cgroup_version_1_and_hybrid(look: Any, mark: str) -> None:
    host = look({"sys/fs/cgroup/cgroup.controllers": None, f"sys/fs/cgroup/{mark}": "pids\n"})
    assert (host.tools.cgroup_version, host.tools.cgroup_controllers) == (1, ())
    assert _only(host).what == "cgroup version 1"


def test_cpuset_matters_with_two_nodes(look: Any) -> None:
    undelegated: dict[str, str | None] = {
        f"{USER_MANAGER}/cgroup.controllers": "cpu memory pids\n",
        f"{NODE}0/cpulist": "0\n",
    }
    assert look(undelegated).problems == ()
    problem = _only(look(undelegated | {f"{NODE}1/cpulist": "\n"}))
    assert problem.what == "cpuset is not delegated to user services"
    assert problem.why.endswith("delegated: cpu memory pids")
    command, by_hand = (problem.fix or "").split("\n")
    assert command == "stackctl provision --only cpuset"
    steps = by_hand.split(" && ")
    path = "/etc/systemd/system/user@.service.d/10-stackctl-delegate.conf"
    assert steps[0].endswith("mkdir -p /etc/systemd/system/user@.service.d")
    assert steps[1] == (
        r"printf '[Service]\nDelegate=cpu cpuset io memory pids\n' | " + _as_root(f"tee {path}")
    )
    assert steps[2:] == [_as_root("systemctl daemon-reload") + "; then log in anew"]
    # Once the file is there, a new manager is what is missing.
    there = undelegated | {f"{NODE}1/cpulist": "\n", path[1:]: "[Service]\n"}
    problem = _only(look(there))
    assert f"{path} changes that when" in problem.why
    assert (problem.fix or "").startswith("stackctl provision --only cpuset --restart-user\n")


def test_no_controller_at_all_is_not_unknown(look: Any) -> None:
    nodes: dict[str, str | None] = {f"{NODE}0/cpulist": "0\n", f"{NODE}1/cpulist": "\n"}
    host = look(nodes | {f"{USER_MANAGER}/cgroup.controllers": "\n"})
    assert _only(host).why.endswith("delegated: nothing")
    assert look(nodes | {"sys/fs/cgroup/cgroup.controllers": "\n"}, scope="system").problems == (
        Problem(
            code="cpuset-missing",
            what="no cpuset controller",
            why="services cannot be bound to one of the 2 NUMA nodes without it",
        ),
    )


def test_the_fix_writes_the_lines_it_shows(look: Any) -> None:
    host = look({"proc/900/limits": LIMITS.format(nofile="1024", memlock="8388608")})
    fix = _only(host).fix
    assert fix is not None
    shown = fix.split(" && ")[1].split(" | ")[0]
    written = subprocess.run(["sh", "-c", shown], capture_output=True, text=True, check=True)
    assert written.stdout == "[Service]\nLimitMEMLOCK=infinity\n"


def test_memlock_of_user_services(look: Any) -> None:
    host = look({"proc/900/limits": LIMITS.format(nofile="4096", memlock="8388608")})
    assert (host.limits.memlock_bytes, host.limits.nofile) == (8 * 2**20, 4096)
    problem = _only(host)
    assert problem.what == "locked memory is limited"
    assert "8 MiB" in problem.why
    assert (problem.fix or "").startswith("stackctl provision --only memlock\n")
    assert "user@.service.d/10-stackctl-memlock.conf" in (problem.fix or "")


@pytest.mark.parametrize("scope", ["user", "system"])
@pytest.mark.parametrize(
    "change",
    [
        # CAP_SYS_RESOURCE is bit 24.
        {"proc/1/status": "CapBnd:\t000001fffeffffff\n"},
        {"proc/1/uid_map": "         0     100000      65536\n"},
    ],
    ids=["no capability", "user namespace"],
)
def test_memlock_that_nothing_can_raise(look: Any, scope: Scope, change: dict[str, str]) -> None:
    limited = LIMITS.format(nofile="524288", memlock="8388608")
    host = look({"proc/900/limits": limited, **change}, scope=scope)
    assert host.limits.memlock_bytes == 8 * 2**20
    problem = _only(host)
    assert (problem.what, problem.fix) == ("locked memory is limited", None)
    assert "CAP_SYS_RESOURCE" in problem.why


def test_manager_is_found_without_its_cgroup(look: Any) -> None:
    host = look(
        {
            f"{USER_MANAGER}/init.scope/cgroup.procs": None,
            # The same program for another user, and a helper of this one, are not it.
            "proc/100/comm": "systemd\n",
            "proc/100/cmdline": "/usr/lib/systemd/systemd\0--user\0",
            "proc/100/status": "Uid:\t424242\t424242\t424242\t424242\n",
            "proc/100/limits": LIMITS.format(nofile="1", memlock="1"),
            "proc/101/comm": "systemd\n",
            "proc/101/cmdline": "(sd-pam)\0",
            "proc/101/status": READY["proc/900/status"],
        }
    )
    assert host.limits.memlock_bytes == UNLIMITED


def test_limits_that_cannot_be_read(look: Any) -> None:
    host = look({"proc/900/limits": None})
    assert _whats(host) == ["locked memory limit is unknown"]


# Memory


@pytest.mark.parametrize(
    ("files", "limit"),
    [
        ({"proc/self/cgroup": "0::/\n"}, None),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/memory.max": "max\n"}, None),
        (
            {
                "proc/self/cgroup": "0::/a/b/c\n",
                "sys/fs/cgroup/a/b/c/memory.max": "max\n",
                "sys/fs/cgroup/a/b/memory.max": "3000\n",
                "sys/fs/cgroup/a/memory.max": "2000\n",
                "sys/fs/cgroup/memory.max": "9000\n",
            },
            2000,
        ),
        # A container whose own cgroup is mounted as the root.
        ({"proc/self/cgroup": "0::/docker/x\n", "sys/fs/cgroup/memory.max": "4096\n"}, 4096),
        ({"proc/self/cgroup": "0::/../x\n", "sys/fs/cgroup/memory.max": "4096\n"}, 4096),
        (
            {
                "proc/self/cgroup": "5:cpu,memory:/x\n0::/\n",
                "sys/fs/cgroup/memory/x/memory.limit_in_bytes": "9223372036854771712\n",
            },
            None,
        ),
        (
            {
                "proc/self/cgroup": "5:memory:/x\n0::/\n",
                "sys/fs/cgroup/memory/x/memory.limit_in_bytes": "5000\n",
            },
            5000,
        ),
    ],
)
def test_memory_limit(tmp_path: Path, files: dict[str, str | None], limit: int | None) -> None:
    base: dict[str, str | None] = {"proc/meminfo": READY["proc/meminfo"], "sys/x": ""}
    host = probe(RecordedMachine(_write(tmp_path, base | files, None)), scope="user")
    assert host.memory.limit_bytes == limit
    assert host.memory.total_bytes == 2**32


def test_memory_size_unknown(tmp_path: Path) -> None:
    host = probe(RecordedMachine(_write(tmp_path, {"proc/x": ""}, None)), scope="user")
    assert (host.memory.total_bytes, host.memory.transparent_hugepages) == (None, None)
    assert _whats(host) == [
        "tools: not recorded", "processors are unknown", "cores are unknown",
        "memory size is unknown",
    ]  # fmt: skip


# GPUs


def test_gpus_of_the_pci_bus(tmp_path: Path) -> None:
    files: dict[str, str | None] = {"proc/x": ""}
    for address, vendor, kind, node in (
        ("0000:c1:00.0", "0x10de", "0x030200", "1"),
        ("0000:41:00.0", "0x10de", "0x030000", "-1"),
        ("0000:41:00.1", "0x10de", "0x040300", "-1"),
        ("0000:05:00.0", "0x1a03", "0x030000", "0"),
    ):
        folder = f"sys/bus/pci/devices/{address}"
        files |= {f"{folder}/vendor": vendor, f"{folder}/class": kind, f"{folder}/numa_node": node}
    gpus = probe(RecordedMachine(_write(tmp_path, files, None)), scope="user").gpus
    assert [(gpu.index, gpu.pci, gpu.numa_node, gpu.name) for gpu in gpus] == [
        (0, "0000:41:00.0", None, None),
        (1, "0000:c1:00.0", 1, None),
    ]


# Recorded and live


def test_a_partly_recorded_machine_names_what_is_missing(tmp_path: Path) -> None:
    recorded = {"podman --version": "podman version 4.3.1"}
    files: dict[str, str | None] = {"proc/meminfo": "MemTotal: 1 kB\n"}
    host = probe(RecordedMachine(_write(tmp_path, files, recorded)), scope="user")
    assert _whats(host)[:2] == ["tools: not recorded", "podman 4.3.1 is too old"]
    assert host.problems[0].why == "the recording holds no answer of systemctl"


#: Ways to start a process, as the interpreter reports them.
_STARTS = {"subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.system", "os.exec"}
_watching: list[list[str]] = []


def _watch(event: str, _args: tuple[Any, ...]) -> None:
    if _watching and event in _STARTS:
        _watching[-1].append(event)


sys.addaudithook(_watch)


@pytest.mark.parametrize("scope", ["user", "system"])
def test_a_recorded_machine_starts_no_process(tmp_path: Path, scope: Scope) -> None:
    # No name and no flags: where the live machine would ask py-cpuinfo.
    machine = RecordedMachine(_write(tmp_path, {"proc/cpuinfo": "processor: 0\n"}, None))
    started: list[str] = []
    _watching.append(started)
    try:
        subprocess.run(["true"], check=True)
        # The watch works: one more than the probe may cause.
        assert "subprocess.Popen" in started
        started.clear()
        host = probe(machine, scope=scope, names=True)
    finally:
        _watching.clear()
    assert started == []
    assert (host.cpu.model, host.cpu.isa) == (None, ())


@pytest.mark.parametrize("scope", ["user", "system"])
def test_this_machine(scope: Scope) -> None:
    host = probe(Machine(), scope=scope)
    assert from_json(to_json(host), Host, where="test") == host
    assert host.cpu.threads == len(_cpus(host.cpu.online))
    assert _cpus(host.cpu.allowed) <= os.sched_getaffinity(0)
    assert host.cpu.architecture == os.uname().machine
    assert host.tools.kernel == os.uname().release
    assert host.memory.total_bytes is not None
    assert not any(problem.what.startswith("tools:") for problem in host.problems)


def _cpus(cpus: CpuList | None) -> set[int]:
    return set(cpus or ())


def test_probing_leaves_no_thread_behind() -> None:
    before = threading.active_count()
    probe(Machine(), scope="user")
    assert threading.active_count() == before


# py-cpuinfo


def test_names_fill_gaps_only(monkeypatch: pytest.MonkeyPatch) -> None:
    import cpuinfo

    monkeypatch.setattr(
        cpuinfo,
        "get_cpu_info",
        lambda: {"brand_raw": " Some  CPU ", "flags": ["sve", "x", "asimd"]},
    )
    filled = CpuInfoFallback().complete(Cpu(threads=3))
    assert (filled.model, filled.isa, filled.threads) == ("Some CPU", ("asimd", "sve"), 3)
    kept = Cpu(model="Kernel's", isa=("avx2",))
    assert CpuInfoFallback().complete(kept) == kept


@pytest.mark.parametrize("error", [Exception("not supported"), SystemExit(1), OSError()])
def test_names_that_fail(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    import cpuinfo

    def fails() -> None:
        raise error

    monkeypatch.setattr(cpuinfo, "get_cpu_info", fails)
    assert CpuInfoFallback().complete(Cpu()) == Cpu()


@pytest.mark.parametrize("answer", [{}, {"brand_raw": 3, "flags": "avx2"}, {"flags": [None]}])
def test_names_of_another_shape(monkeypatch: pytest.MonkeyPatch, answer: dict[str, Any]) -> None:
    import cpuinfo

    monkeypatch.setattr(cpuinfo, "get_cpu_info", lambda: answer)
    assert CpuInfoFallback().complete(Cpu()) == Cpu()


def test_names_that_never_come(monkeypatch: pytest.MonkeyPatch) -> None:
    import cpuinfo

    import stackctl.probe.cpu as module

    let_go = threading.Event()
    monkeypatch.setattr(module, "_PATIENCE_S", 0.05)
    monkeypatch.setattr(cpuinfo, "get_cpu_info", let_go.wait)
    started = time.monotonic()
    try:
        assert CpuInfoFallback().complete(Cpu()) == Cpu()
        assert time.monotonic() - started < 2
    finally:
        let_go.set()


def test_names_are_asked_only_for_what_the_kernel_does_not_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import cpuinfo

    monkeypatch.setattr(cpuinfo, "get_cpu_info", lambda: {"brand_raw": "Found", "flags": ["avx"]})
    unnamed = Standing(_write(tmp_path / "a", {"proc/cpuinfo": "processor: 0\n"}, VERSIONS))
    assert probe(unnamed, scope="user", names=True).cpu.model == "Found"
    assert probe(unnamed, scope="user").cpu.model is None
    named = Standing(_write(tmp_path / "b", {"proc/cpuinfo": READY["proc/cpuinfo"]}, VERSIONS))
    assert probe(named, scope="user", names=True).cpu.model == "Test"


@pytest.mark.skipif(
    read_cpuinfo(FactReader(Machine())).architecture != "x86_64", reason="py-cpuinfo and x86"
)
def test_the_real_library_answers() -> None:
    filled = CpuInfoFallback().complete(Cpu())
    assert filled.model
    assert "sse4_2" in filled.isa
