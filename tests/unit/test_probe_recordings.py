"""Recordings as people make them: parts missing, links of the whole tree, files gone wrong."""

from __future__ import annotations

import dataclasses
import os
import random
import time
from pathlib import Path

import pytest
from test_probe_lstopo import MACHINES, MOUNTS, SINGLES, WHOLE
from test_probe_machines import Written, probed, whats, write

from stackctl.cli.probe import machine_overview
from stackctl.errors import StackctlError
from stackctl.machine.machine import RecordedMachine
from stackctl.probe import probe
from stackctl.values.cpu_list import CpuList
from stackctl.values.host import Host

GIB = 2**30
CPU = "sys/devices/system/cpu"


def _host(root: Path, machine: Written, *, without: tuple[str, ...] = ()) -> Host:
    files = {name: text for name, text in machine.files().items() if not name.endswith(without)}
    return probe(write(root, files), scope="system")


# Memory and nodes


def test_without_meminfo_the_nodes_tell_the_size(tmp_path: Path) -> None:
    host = _host(tmp_path, MACHINES["two dies a socket"], without=("proc/meminfo",))
    assert (host.memory.total_bytes, host.memory.available_bytes) == (32 * GIB, None)
    assert "memory size is unknown" not in whats(host)


def test_a_node_of_unknown_size_tells_none(tmp_path: Path) -> None:
    gone = ("proc/meminfo", "node3/meminfo")
    host = _host(tmp_path, MACHINES["two dies a socket"], without=gone)
    assert host.memory.total_bytes is None
    assert "memory size is unknown" in whats(host)


def test_memory_of_a_gpu_is_no_main_memory(tmp_path: Path) -> None:
    gpu = "sys/devices/system/node/node255/meminfo"
    machine = Written(
        cores=["0", "1"],
        sockets=["0-1"],
        nodes=[(0, "0", WHOLE // 4), (8, "1", WHOLE // 4), (255, "", WHOLE // 2)],
        more={
            "proc/driver/nvidia/gpus/0004:04:00.0/numa_status": "Node:  255\n",
            gpu: f"Node 255 MemTotal: {WHOLE // 2} kB\nNode 255 MemFree: {WHOLE // 4} kB\n",
        },
    )
    memory = probed(tmp_path, machine).memory
    assert (memory.total_bytes, memory.available_bytes) == (16 * GIB, 8 * GIB)


def test_nodes_without_lists_link_to_their_cpus(tmp_path: Path) -> None:
    machine = MACHINES["sparse CPU numbers"]
    links = {
        f"sys/devices/system/node/node{node}/cpu{cpu}/uevent": ""
        for node, cpus in ((0, (0, 8, 88, 96)), (8, (16, 24, 104, 112)))
        for cpu in cpus
    }
    more = dataclasses.replace(machine, more=links)
    found = _host(tmp_path / "links", more, without=("cpulist", "cpumap")).cpu.numa
    assert found == _host(tmp_path / "lists", machine).cpu.numa
    assert [node.cpus for node in found] == [
        CpuList.parse("0,8,88,96"),
        CpuList.parse("16,24,104,112"),
    ]


# Processors


@pytest.mark.parametrize(
    ("cores", "active", "smt"),
    [(["0-1"], "0", True), (["0", "1"], "1", False), (["0", "1"], None, False)],
)
def test_siblings_decide_on_smt(
    tmp_path: Path, cores: list[str], active: str | None, smt: bool
) -> None:
    assert probed(tmp_path, Written(cores=cores, sockets=["0-1"], smt=active)).cpu.smt is smt


def test_what_a_version_1_cpuset_was_set_to(tmp_path: Path) -> None:
    folder = "sys/fs/cgroup/cpuset/job"
    more = {
        "proc/self/cgroup": "7:cpuset:/job\n",
        "proc/mounts": MOUNTS.replace("cgroup2", "cgroup"),
        f"{folder}/cpuset.cpus": "0-3,8-11\n",
        f"{folder}/cpuset.effective_cpus": "0-3\n",
    }
    machine = Written(cores=SINGLES, sockets=["0-15"], more=more)
    assert probed(tmp_path, machine).cpu.allowed == CpuList.parse("0-3,8-11")


@pytest.mark.parametrize(
    ("highest", "base", "kinds"),
    [
        # Compact cores beside full ones.
        ((5100, 5100, 3300, 3300), None, [("performance", "0-1"), ("efficient", "2-3")]),
        ((2600, 3900, 3900, 2000), None,
         [("performance", "1-2"), ("efficient", "0"), ("low-power", "3")]),
        # An early hybrid: the clocks in use differ little, the base clocks do.
        ((2800, 2800, 2800, 3000), (1400, 1400, 1400, 2000),
         [("performance", "3"), ("efficient", "0-2")]),
        # Favoured cores.
        ((5700, 5500, 5200, 5200), None, []),
        # Servers whose cores were given different base clocks.
        ((3600, 3600, 3600, 3600), (2800, 2800, 2100, 2100), []),
        ((5100, 5100, 3300, None), None, []),
    ],
)  # fmt: skip
def test_kinds_by_clock(
    tmp_path: Path,
    highest: tuple[int | None, ...],
    base: tuple[int, ...] | None,
    kinds: list[tuple[str, str]],
) -> None:
    more = {}
    for name, values in (("cpuinfo_max_freq", highest), ("base_frequency", base or ())):
        for cpu, value in enumerate(values):
            if value is not None:
                more[f"{CPU}/cpu{cpu}/cpufreq/{name}"] = f"{value * 1000}\n"
    found = probed(tmp_path, Written(cores=SINGLES[:4], sockets=["0-3"], more=more)).cpu.kinds
    assert [(kind.name, str(kind.cpus)) for kind in found] == kinds


# Links and damage


def test_links_stay_inside_the_recording(tmp_path: Path) -> None:
    """A tree copied with its links: they lead to the recording's files, never to this machine's."""
    root = tmp_path / "root"
    write(root, MACHINES["smt, two L3"].files())
    for name, target in (
        ("system/cpu", "/moved/cpu"),
        ("system/node", "../../../../../../../../moved/node"),
    ):
        folder = root / "sys/devices" / name
        folder.rename(root / Path(target).name)
        (root / "moved").mkdir(exist_ok=True)
        (root / Path(target).name).rename(root / "moved" / Path(target).name)
        folder.symlink_to(target)
    moved = probe(RecordedMachine(root), scope="system")
    plain = write(tmp_path / "plain", MACHINES["smt, two L3"].files())
    assert moved == probe(plain, scope="system")


def test_links_to_nowhere_are_not_the_live_machine(tmp_path: Path) -> None:
    write(tmp_path, {"proc/x": ""})
    (tmp_path / "sys").symlink_to("/sys")
    for name in ("cpuinfo", "meminfo", "self"):
        (tmp_path / "proc" / name).symlink_to(f"/proc/{name}")
    (tmp_path / "etc").symlink_to("../" * 20 + "etc")
    machine = RecordedMachine(tmp_path)
    assert machine.glob("/sys/devices/system/cpu/*") == machine.glob("/etc/*") == ()
    assert machine.read("/etc/passwd") is None
    assert probe(machine, scope="system").cpu.threads is None


@pytest.mark.parametrize("text", ["[]", '{"podman --version": 3}', "[" * 100_000])
def test_answers_that_are_none(tmp_path: Path, text: str) -> None:
    write(tmp_path, {"proc/x": ""})
    (tmp_path / "commands.json").write_text(text)
    with pytest.raises(StackctlError, match=r"commands\.json is not"):
        RecordedMachine(tmp_path)


@pytest.mark.parametrize("kind", ["huge", "junk", "pipe", "folder", "list", "zero"])
def test_whatever_the_files_are_the_probe_ends_soon(tmp_path: Path, kind: str) -> None:
    machine = Written(
        cores=[str(n) for n in range(128)],
        sockets=["0-127"],
        l3=[(f"{n}-{n + 7}", "32768K", n // 8) for n in range(0, 128, 8)],
        nodes=[(0, "0-127", WHOLE)],
        masks=True,
    )
    write(tmp_path, machine.files())
    junk = random.Random(1).randbytes(9000)
    for path in [path for path in tmp_path.rglob("*") if path.is_file()]:
        path.unlink()
        if kind == "huge":
            with path.open("wb") as stream:
                stream.truncate(2**30)
        elif kind == "pipe":
            os.mkfifo(path)
        elif kind == "folder":
            path.mkdir()
        elif kind == "zero":
            path.symlink_to("/dev/zero")
        else:
            path.write_bytes(junk if kind == "junk" else b"0-7," * 50_000)
    start = time.process_time()
    host = probe(RecordedMachine(tmp_path), scope="user")
    assert time.process_time() - start < 1.5
    assert host.cpu.sockets is None
    assert host.problems


# The picture


def test_the_picture_of_a_large_machine(tmp_path: Path) -> None:
    machine = Written(
        cores=[f"{n},{n + 256}" for n in range(256)],
        sockets=["0-127,256-383", "128-255,384-511"],
        l3=[(f"{n}-{n + 7},{n + 256}-{n + 263}", "32768K", n // 8) for n in range(0, 256, 8)],
        nodes=[
            (n // 16, f"{n}-{n + 15},{n + 256}-{n + 271}", WHOLE // 16) for n in range(0, 256, 16)
        ],
        more={"proc/self/status": "Cpus_allowed_list:\t0-255\n"},
    )
    lines = machine_overview(probed(tmp_path, machine))
    assert "  allowed this process may use CPU 0-255 of 0-511" in lines
    assert "  threads 2 a core: n and n+256" in lines
    assert "  L3      32 x 32 MiB, 8 cores each: 0-7 | 8-15 | 16-23 | ... | 248-255" in lines
    assert "  nodes   0-15: 16 cores and 2 GiB each" in lines
    assert max(map(len, lines)) <= 80


def test_the_picture_of_interleaved_and_hybrid_machines(tmp_path: Path) -> None:
    even, odd = (",".join(str(n) for n in range(first, 20, 2)) for first in (0, 1))
    interleaved = Written(
        cores=[str(n) for n in range(20)],
        sockets=[even, odd],
        l3=[(even, "30720K", 0), (odd, "30720K", 1)],
        nodes=[(0, even, WHOLE // 2), (100, odd, WHOLE // 2)],
    )
    lines = machine_overview(probed(tmp_path / "a", interleaved))
    assert "  L3      2 x 30 MiB, 10 cores each: 0-18 by 2 | 1-19 by 2" in lines
    assert "  node 100 cores 1-19 by 2, 16 GiB" in lines
    lines = machine_overview(_host(tmp_path / "b", MACHINES["hybrid"]))
    assert "  kinds   cores: performance 0,2, efficient 4-7, low-power 8" in lines
    lines = machine_overview(_host(tmp_path / "c", MACHINES["offline CPUs"]))
    assert "  offline CPU 1,7" in lines
