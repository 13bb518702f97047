"""What /proc tells of processes: recorded, live, damaged, and gone while it is read."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from samples import GEMMA, HOSTS, plan
from test_verify import generation

from stackctl.machine.machine import Machine, RecordedMachine
from stackctl.machine.ports import listening_sockets
from stackctl.observe import procfs
from stackctl.observe.inspection import (
    Unread,
    observed_model_files,
    parse_memlock,
    read_cpuset,
    service_sockets,
)
from stackctl.observe.thread_sampling import thread_activity
from stackctl.values.cpu_list import CpuList
from stackctl.values.host import UNLIMITED

NAME = "odd) (name"
STATUS = "Name:\todd\nVmLck:\t    1428 kB\nRssAnon:\t    7212 kB\nRssFile:\t   19052 kB\n"
ROLLUP = "555f-7ffd ---p 00000000 00:00 0 [rollup]\nRss: 26264 kB\nPss_Anon: 7000 kB\n" \
    "Pss_Shmem: 24 kB\nAnonHugePages: 2048 kB\n"  # fmt: skip
NUMA = "7f0b30694000 default file=/models/m.gguf mapped=357 N0=357 kernelpagesize_kB=4\n"
TCP = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid inode\n"
ROW = "   0: {} 00000000:0000 {} 00000000:00000000 00:00000000 00000000  1000        0 {} 1 0\n"


def stat(pid: int, parent: int, name: str = "x") -> str:
    return f"{pid} ({name}) S {parent} " + "0 " * 9 + "593 67 0 0 20 0 11 0 4711 0\n"


@pytest.fixture
def proc(tmp_path: Path) -> RecordedMachine:
    """An engine of two processes (315, 320), its door (324), and others."""
    for pid, parent in ((1, 0), (310, 1), (315, 310), (320, 315), (324, 1)):
        folder = tmp_path / f"proc/{pid}"
        (folder / "fd").mkdir(parents=True)
        (folder / "stat").write_text(stat(pid, parent, NAME))
        (folder / "comm").write_text(f"{NAME}\n")
    engine = tmp_path / "proc/315"
    for tid, cpus, times in ((315, "0-1", "900 80 3"), (316, "1", "500 20 3"), (317, "", "x")):
        (engine / f"task/{tid}").mkdir(parents=True)
        (engine / f"task/{tid}/schedstat").write_text(f"{times}\n")
        text = f"Cpus_allowed_list:\t{cpus}\n" if cpus else "Name:\tx\n"
        (engine / f"task/{tid}/status").write_text(text)
    (engine / "status").write_text(STATUS)
    (engine / "smaps_rollup").write_text(ROLLUP)
    (engine / "numa_maps").write_text(NUMA)
    (engine / "cgroup").write_text("9:name=systemd:/\n0::/user.slice/x.scope\n")
    (engine / "maps").write_text(
        "7f0b-7f0c r--s 00001000 00:4a 16229104   /models/gemma-3-270m-it-Q4_K_M.gguf (deleted)\n"
    )
    for fd, target in enumerate(("/dev/null", "socket:[11]", "socket:[12]")):
        (engine / f"fd/{fd}").symlink_to(target)
    (tmp_path / "proc/320/fd/0").symlink_to("/dev/null")
    (tmp_path / "proc/310/fd/3").symlink_to("socket:[99]")
    (tmp_path / "proc/324/fd/0").symlink_to("socket:[13]")
    (engine / "net").mkdir()
    rows = (("0100007F:1F90", "0A", 11), ("0100007F:9999", "01", 12), ("00000000:1F91", "0A", 12),
            ("0100007F:1F90", "0A", 99), ("0100007F:0050", "0A", 98))  # fmt: skip
    (engine / "net/tcp").write_text(TCP + "".join(ROW.format(*row) for row in rows) + "torn")
    loopback6 = "00000000000000000000000001000000:1F90"
    (engine / "net/tcp6").write_text(TCP + ROW.format(loopback6, "0A", 13))
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (group / "cgroup.controllers").write_text("cpuset cpu memory\n")
    return RecordedMachine(tmp_path)


def test_the_processes_of_a_container(proc: RecordedMachine) -> None:
    stats = procfs.processes(proc)
    assert procfs.descendants(stats, 315) == (315, 320)
    assert procfs.descendants(stats, 9) == ()
    assert stats[315] == procfs.ProcessStat(pid=315, parent=310, command=NAME, start_ticks=4711)


def test_threads_and_memory(proc: RecordedMachine) -> None:
    assert procfs.thread_times(proc, (315,)) == {
        (315, 315): procfs.ThreadTimes(900, 80),
        (315, 316): procfs.ThreadTimes(500, 20),
    }
    assert procfs.affinities(proc, 315) == {315: CpuList.parse("0-1"), 316: CpuList.parse("1")}
    one = procfs.process_memory(
        proc, procfs.processes(proc)[315], procfs.is_below(["/models/m.gguf"])
    )
    assert one.own_bytes == (7000 + 24) * 1024
    assert (one.file_bytes, one.locked_bytes, one.huge_bytes) == (19052 * 1024, 1428 * 1024, 2**21)
    assert [(p.kind, p.policy, p.nodes[0].bytes) for p in one.pages] == [
        ("model", "default", 357 * 4096)
    ]


def test_all_processes_of_an_engine_count(proc: RecordedMachine, tmp_path: Path) -> None:
    second = tmp_path / "proc/320"
    (second / "task/321").mkdir(parents=True)
    (second / "task/321/schedstat").write_text("7 5 1\n")
    (second / "numa_maps").write_text(NUMA + "7f20 bind:1 anon=2 N1=2 kernelpagesize_kB=2048\n")
    pids = procfs.descendants(procfs.processes(proc), 310)[1:]
    assert procfs.thread_times(proc, pids) == {
        (315, 315): procfs.ThreadTimes(900, 80),
        (315, 316): procfs.ThreadTimes(500, 20),
        (320, 321): procfs.ThreadTimes(7, 5),
    }
    both = procfs.numa_bytes(proc, (*pids, 999))
    assert [(one.node, one.bytes) for one in both] == [(0, 2 * 357 * 4096), (1, 2 * 2**21)]
    assert procfs.numa_bytes(proc, ()) == ()


def test_time_between_two_looks() -> None:
    was = {(1, 1): procfs.ThreadTimes(100, 10), (1, 2): procfs.ThreadTimes(5, 5)}
    now = {(1, 1): procfs.ThreadTimes(150, 30), (1, 3): procfs.ThreadTimes(7, 1)}
    found = {
        t.id: (t.computed_ns, t.waited_ns)
        for t in thread_activity(
            was, now, 1, {1: CpuList.parse("0"), 2: CpuList.parse("0"), 3: CpuList.parse("0")}
        )
    }
    # One that ended meanwhile is not known, one that began has all its time from then.
    assert found == {1: (50, 20), 2: (None, None), 3: (7, 1)}


def test_who_listens(proc: RecordedMachine) -> None:
    given = generation(plan(HOSTS["lab"], GEMMA))
    notes = Unread()
    found = service_sockets(proc, given, 315, (315, 320), (324,), notes)
    assert found is not None
    assert [(one.owner, one.address, one.port) for one in found] == [
        ("engine", "127.0.0.1", 8080), ("engine", "0.0.0.0", 8081),
        ("other", "127.0.0.1", 8080), ("door", "::1", 8080),
    ]  # fmt: skip
    # Not the port of a stranger (80), and the stranger on ours is named.
    assert found[2].process == f"{NAME} (process 310)"


def test_files_that_may_not_be_seen(proc: RecordedMachine, tmp_path: Path) -> None:
    given, notes = generation(plan(HOSTS["lab"], GEMMA)), Unread()
    (tmp_path / "proc/315/fd/0").unlink()
    for number in (1, 2):
        (tmp_path / f"proc/315/fd/{number}").unlink()
    assert service_sockets(proc, given, 315, (315,), (), notes) is None
    assert notes == {"ports": "the kernel does not show /proc/315/fd to this user"}
    assert service_sockets(proc, given, 4, (4,), (), notes := Unread()) is None
    assert notes == {"ports": "process 4 has ended"}


def test_the_engine_s_files_and_ours(proc: RecordedMachine, tmp_path: Path) -> None:
    given = generation(plan(HOSTS["lab"], GEMMA))
    path = given.plan.model.files[0].path
    inside = "/proc/315/root/models/gemma-3-270m-it-Q4_K_M.gguf"
    for name, text in ((path, "new"), (inside, "old one")):
        place = tmp_path / name.lstrip("/")
        place.parent.mkdir(parents=True)
        place.write_text(text)
    (seen,) = observed_model_files(proc, given, 315, notes := Unread())
    assert seen.deleted
    assert seen.now is not None
    assert seen.engine is not None
    assert (seen.now.bytes, seen.engine.bytes) == (3, 7)
    assert seen.now.inode != seen.engine.inode
    assert not notes


def test_the_cpuset(proc: RecordedMachine, tmp_path: Path) -> None:
    # Its own group cannot be seen: nothing is known of it.
    assert read_cpuset(proc, 315) == (None, None, None)
    group = tmp_path / "sys/fs/cgroup/user.slice/x.scope"
    group.mkdir(parents=True)
    (group / "cgroup.controllers").write_text("cpu memory\n")
    assert read_cpuset(proc, 315) == (None, None, False)
    (group / "cgroup.controllers").write_text("cpuset cpu memory\n")
    (group / "cpuset.cpus.effective").write_text("2-3\n")
    (group / "cpuset.mems.effective").write_text("1\n")
    assert read_cpuset(proc, 315) == ("2-3", "1", True)
    assert read_cpuset(proc, 9) == (None, None, None)


@pytest.mark.parametrize(
    ("line", "limit"),
    [
        ("Max locked memory         8388608              8388608              bytes", 8388608),
        ("Max locked memory         unlimited            unlimited            bytes", UNLIMITED),
        ("Max open files            1024                 4096                 files", None),
        ("Max locked memory", None),
    ],
)
def test_the_limit_on_locked_memory(line: str, limit: int | None) -> None:
    assert parse_memlock(f"Limit                     Soft Limit\n{line}\n") == limit
    assert parse_memlock(None) is None


@pytest.mark.parametrize(
    "text", ["", "315", "315 (x)", "315 (x) S", "a (x) S " + "0 " * 20, ") (", "\0\0"]
)
def test_a_damaged_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "proc/315").mkdir(parents=True)
    (tmp_path / "proc/315/stat").write_text(text)
    assert procfs.processes(RecordedMachine(tmp_path)) == {}
    assert procfs.read_stat(RecordedMachine(tmp_path), 315) is None


# Live


def test_this_process() -> None:
    machine, pid = Machine(), os.getpid()
    stats = procfs.processes(machine)
    assert stats[pid].parent == os.getppid()
    one = procfs.process_memory(machine, stats[pid], procfs.is_below(["/models"]))
    assert one.own_bytes is not None
    assert one.own_bytes > 2**20
    assert one.file_bytes
    wait = threading.Event()
    other = threading.Thread(target=wait.wait)
    other.start()
    assert {pid, other.native_id} <= set(procfs.affinities(machine, pid))
    wait.set()
    other.join()


def test_a_process_that_ends_while_it_is_read() -> None:
    machine = Machine()
    with subprocess.Popen(["sleep", "60"]) as process:
        stats = procfs.processes(machine)
        assert process.pid in procfs.descendants(stats, os.getpid())
        process.kill()
    gone = process.pid
    one = procfs.process_memory(machine, stats[gone], procfs.is_below(["/models"]))
    assert (one.own_bytes, one.file_bytes, one.locked_bytes, one.pages) == (None, None, None, ())
    assert not procfs.thread_times(machine, (gone,))
    assert not procfs.affinities(machine, gone)
    assert procfs.read_stat(machine, gone) is None
    assert listening_sockets(machine, gone) is None
    given, notes = generation(plan(HOSTS["lab"], GEMMA)), Unread()
    assert service_sockets(machine, given, gone, (gone,), (), notes) is None
    assert notes == {"ports": f"process {gone} has ended"}


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_sockets_of_this_machine(address: str) -> None:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with (
        socket.create_server((address, 0), family=family) as server,
        socket.socket(family, socket.SOCK_DGRAM) as datagrams,
    ):
        datagrams.bind((address, 0))
        found = listening_sockets(Machine(), os.getpid())
        assert found is not None
        have = {(one.protocol, one.address, one.port): one.inode for one in found}
        inode = str(os.fstat(server.fileno()).st_ino)
        assert have["tcp", address, server.getsockname()[1]] == inode
        assert ("udp", address, datagrams.getsockname()[1]) in have


def test_links_and_states_of_files(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/a").write_text("four")
    (tmp_path / "proc/b").symlink_to("/proc/a")
    live, recorded = Machine(), RecordedMachine(tmp_path)
    for machine, path in ((live, f"{tmp_path}/proc"), (recorded, "/proc")):
        assert machine.read_link(f"{path}/b") == "/proc/a"
        assert machine.read_link(f"{path}/a") is None
        state = machine.file_state(f"{path}/a")
        assert state is not None
        assert (state.bytes, state.inode) == (4, (tmp_path / "proc/a").stat().st_ino)
        assert machine.file_state(f"{path}/missing") is None
        assert machine.file_state(f"{path}/\0") is None
    # A link of a recording leads where it led on that machine.
    assert recorded.file_state("/proc/b") == recorded.file_state("/proc/a")
    assert sys.platform == "linux"
