"""The probe agrees with hwloc's lstopo, on machines of every shape and on the recorded ones."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import tarfile
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path

import pytest
from test_probe_machines import SHARED, SMT, Written, write

from stackctl.machine.machine import RecordedMachine
from stackctl.probe import probe
from stackctl.values.cpu_list import CpuList
from stackctl.values.host import Host

LSTOPO = shutil.which("lstopo-no-graphics") or shutil.which("lstopo")


@dataclass(frozen=True)
class Topology:
    """The online hardware: CPU lists, sorted."""

    packages: tuple[CpuList, ...]
    cores: tuple[CpuList, ...]
    threads: CpuList
    l3: tuple[tuple[CpuList, int], ...]
    #: (number, CPUs, bytes)
    nodes: tuple[tuple[int, CpuList, int], ...]
    #: Rows in the order of the nodes; none for a single node.
    distances: tuple[tuple[int, ...], ...]
    dies: tuple[CpuList, ...]
    offline: CpuList
    allowed: CpuList
    #: None when all are alike.
    kinds: tuple[CpuList, ...]


def by_lstopo(root: Path) -> Topology:
    """Asks lstopo; CPUs that a cpuset forbids are included, as in the probe's counts."""
    assert LSTOPO is not None
    done = subprocess.run(
        [LSTOPO, "--disallowed", "--no-io", "--filter", "all:all", "--of", "xml"],
        env=os.environ
        | {"HWLOC_FSROOT": str(root), "HWLOC_COMPONENTS": "linux,stop", "HWLOC_HIDE_ERRORS": "2"},
        capture_output=True,
        check=True,
    )
    found: dict[str, list[ElementTree.Element]] = {}
    topology = ElementTree.fromstring(done.stdout)
    for item in topology.iter("object"):
        found.setdefault(item.attrib["type"], []).append(item)
    threads = {int(item.attrib["os_index"]) for item in found.get("PU", [])}
    (machine,) = found["Machine"]
    kinds = sorted((_cpus(item) for item in topology.iter("cpukind")), key=str)
    return Topology(
        packages=_lists(found.get("Package", [])),
        cores=_lists(found.get("Core", [])),
        threads=CpuList(threads),
        l3=tuple(
            sorted(
                (
                    (_cpus(item), int(item.attrib.get("cache_size", "0")))
                    for item in found.get("L3Cache", [])
                ),
                key=str,
            )
        ),
        nodes=tuple(
            sorted(
                (
                    int(item.attrib["os_index"]),
                    _cpus(item),
                    int(item.attrib.get("local_memory", "0")),
                )
                for item in found.get("NUMANode", [])
            )
        ),
        distances=_distances(topology),
        dies=_lists(found.get("Die", [])),
        offline=CpuList(_bits(machine, "complete_cpuset") - _bits(machine, "cpuset")),
        allowed=CpuList(_bits(machine, "allowed_cpuset") & _bits(machine, "cpuset")),
        kinds=tuple(kinds) if len(kinds) > 1 else (),
    )


def differences(root: Path, host: Host) -> list[str]:
    """Where the probe and lstopo disagree about the machine below ``root``."""
    known = by_lstopo(root)
    cpu = host.cpu
    # hwloc gives a memory-only node the CPUs that are near it; here it has none.
    empty = {node.id for node in cpu.numa if not node.cpus}
    pairs: list[tuple[str, object, object]] = [
        ("sockets", len(known.packages), cpu.sockets or 0),
        ("cores", known.cores, tuple(sorted(cpu.siblings, key=str))),
        ("threads", known.threads, cpu.online or CpuList()),
        ("l3", known.l3, tuple(sorted(((l3.cpus, l3.bytes or 0) for l3 in cpu.l3), key=str))),
        (
            "numa",
            tuple((number, CpuList() if number in empty else cpus, size)
                  for number, cpus, size in known.nodes),
            tuple((node.id, node.cpus, node.memory_bytes or 0) for node in cpu.numa),
        ),
        (
            "distances",
            known.distances,
            tuple(node.distances for node in cpu.numa if node.distances and len(cpu.numa) > 1),
        ),
        # hwloc leaves out dies that are whole packages.
        ("dies", len(known.dies) or (cpu.dies and len(known.packages)), cpu.dies),
        ("offline", known.offline, cpu.offline or CpuList()),
        ("allowed", known.allowed, cpu.allowed),
        # hwloc's Linux part does not read the lists of hybrid drivers.
        ("kinds", known.kinds,
         tuple(sorted((one.cpus for one in cpu.kinds if known.kinds), key=str))),
        ("smt", any(len(core) > 1 for core in known.cores), bool(cpu.smt)),
    ]  # fmt: skip
    return [f"{name}: lstopo {theirs}, probe {ours}" for name, theirs, ours in pairs
            if theirs != ours]  # fmt: skip


def _cpus(item: ElementTree.Element) -> CpuList:
    return CpuList(_bits(item, "cpuset"))


def _bits(item: ElementTree.Element, name: str) -> set[int]:
    mask = 0
    for word in item.attrib[name].split(","):
        mask = mask << 32 | int(word or "0", 16)
    return {bit for bit in range(mask.bit_length()) if mask >> bit & 1}


def _distances(topology: ElementTree.Element) -> tuple[tuple[int, ...], ...]:
    for matrix in topology.iter("distances2"):
        if matrix.attrib["type"] == "NUMANode":
            values = [int(word) for part in matrix.findall("u64values")
                      for word in (part.text or "").split()]  # fmt: skip
            width = int(matrix.attrib["nbobjs"])
            return tuple(tuple(values[at : at + width]) for at in range(0, len(values), width))
    return ()


def _lists(items: list[ElementTree.Element]) -> tuple[CpuList, ...]:
    return tuple(sorted(map(_cpus, items), key=str))


# Machines

needs_lstopo = pytest.mark.skipif(LSTOPO is None, reason="hwloc's lstopo is not installed")

#: Nodes' memory in KiB that adds up to the machines' 32 GiB, or is the whole of it.
WHOLE = 33554432


def _even(count: int) -> list[str]:
    """Eight CPUs each, in order."""
    return [f"{first}-{first + 7}" for first in range(0, 8 * count, 8)]


SINGLES = [str(number) for number in range(16)]
MACHINES = {
    "smt, two L3": SMT,
    "no L3": Written(cores=SINGLES, sockets=["0-15"], nodes=[(0, "0-15", WHOLE)]),
    "one core per L3": Written(
        cores=SINGLES,
        sockets=["0-15"],
        dies=["0-15"],
        l3=[(cpu, "32768K", int(cpu)) for cpu in SINGLES],
        nodes=[(0, "0-15", WHOLE)],
    ),
    "L3 as NUMA": Written(
        cores=SINGLES,
        sockets=["0-15"],
        l3=[(cpu, "32768K", int(cpu)) for cpu in SINGLES],
        nodes=[(int(cpu), cpu, WHOLE // 16) for cpu in SINGLES],
    ),
    "two sockets, NPS4, SMT": Written(
        cores=[f"{n},{n + 64}" for n in range(64)],
        sockets=["0-31,64-95", "32-63,96-127"],
        l3=[(f"{n}-{n + 7},{n + 64}-{n + 71}", "32768K", n // 8) for n in range(0, 64, 8)],
        nodes=[
            (n // 8, f"{n}-{n + 7},{n + 64}-{n + 71}", WHOLE // 8) for n in range(0, 64, 8)
        ],
        smt="1",
    ),
    "two dies a socket": Written(
        cores=[str(n) for n in range(32)],
        sockets=["0-15", "16-31"],
        dies=_even(4),
        l3=[(cpus, "16384K", n) for n, cpus in enumerate(_even(4))],
        nodes=[(n, cpus, WHOLE // 4) for n, cpus in enumerate(_even(4))],
    ),
    "offline CPUs": Written(
        cores=["0,4", "1,5", "2,6", "3,7"],
        sockets=["0-7"],
        online="0,2-6",
        l3=[("0-1,4-5", "16384K", 0), ("2-3,6-7", "16384K", 1)],
        nodes=[(0, "0-7", WHOLE)],
    ),
    "a socket offline, its node memory-only": Written(
        cores=[str(n) for n in range(16)],
        sockets=["0-7", "8-15"],
        online="0-7",
        l3=[("0-7", "16384K", 0), ("8-15", "16384K", 1)],
        nodes=[(0, "0-7", WHOLE // 2), (1, "8-15", WHOLE // 2)],
    ),
    "memory-only and sparse nodes": Written(
        cores=["0", "1", "2", "3"],
        sockets=["0-3"],
        nodes=[(0, "0-1", WHOLE // 2), (4, "2-3", 0), (17, "", WHOLE // 2)],
    ),
    "sparse CPU numbers": Written(
        cores=["0,88", "8,96", "16,104", "24,112"],
        sockets=["0,8,88,96", "16,24,104,112"],
        l3=[("0,8,88,96", "10240K", None), ("16,24,104,112", "10240K", None)],
        nodes=[(0, "0,8,88,96", WHOLE // 2), (8, "16,24,104,112", WHOLE // 2)],
    ),
    "hybrid": Written(
        cores=["0-1", "2-3", "4", "5", "6", "7", "8"],
        sockets=["0-8"],
        l3=[("0-7", "24576K", 0)],
        nodes=[(0, "0-8", WHOLE)],
        more={
            "sys/devices/cpu_core/cpus": "0-3\n",
            "sys/devices/cpu_atom/cpus": "4-7\n",
            "sys/devices/cpu_lowpower/cpus": "8\n",
        },
    ),
    "ARM, old names, no nodes": Written(
        cores=SINGLES[:8],
        sockets=["0-7"],
        # What ARM kernels say of dies: every CPU its own.
        dies=SINGLES[:8],
        siblings_file="thread_siblings_list",
        more={
            f"sys/devices/system/cpu/cpu{n}/cpu_capacity": f"{446 if n < 4 else 1024}\n"
            for n in range(8)
        },
    ),
    "seven sockets": Written(
        cores=[str(n) for n in range(56)],
        sockets=_even(7),
        l3=[(cpus, "8M", None) for cpus in _even(7)],
        nodes=[(n, cpus, WHOLE // 7) for n, cpus in enumerate(_even(7))],
    ),
}  # fmt: skip


def _host(root: Path, machine: Written) -> Host:
    files = dataclasses.replace(machine, masks=True).files()
    files = {name: text.replace("8M", "8192K") for name, text in files.items()}
    return probe(write(root, files), scope="system")


@needs_lstopo
@pytest.mark.parametrize("name", MACHINES)
def test_machines_written_as_values(tmp_path: Path, name: str) -> None:
    host = _host(tmp_path, MACHINES[name])
    assert differences(tmp_path, host) == []


#: Recordings that come with hwloc where the probe means to differ, and why.
MEANT = {
    "40intel64-4n10c+pci-conflicts": "one package's CPUs are false: the numbers tell four packages",
    "64intel64-fakeKNL-A2A-cache": "hwloc reads this cache from a file of its own",
    "8em64t-2s2ca2c-buggynuma": "eight nodes of the same CPUs: the first gets all their memory",
    "64intel64-fakeKNL-SNC4-hybrid": "hwloc replaces the distances of this processor by its own",
    "fakeheterocpunuma": "kinds by capacity, as Linux schedules; hwloc splits one by base clock",
    "vmware_fpe": "Bulldozer's modules are two cores each; hwloc misses the family here",
}


@needs_lstopo
def test_recorded_machines(tmp_path: Path) -> None:
    """Those beside this checkout, and any below $STACKCTL_RECORDED."""
    for archive in sorted(SHARED.glob("*.tar.gz")):
        with tarfile.open(archive) as tar:
            tar.extractall(tmp_path / archive.name, filter="tar")
    roots = [tmp_path, Path(os.environ.get("STACKCTL_RECORDED", "/nonexistent"))]
    found = {
        folder.parent
        for root in roots
        for depth in ("*/sys", "*/*/sys", "*/*/*/sys")
        for folder in root.glob(depth)
        if (folder / "devices").is_dir()
    }
    if not found:
        pytest.skip("no recorded machines beside this checkout, nor in STACKCTL_RECORDED")
    wrong = {
        str(root): lines
        for root in sorted(found)
        if (lines := differences(root, probe(RecordedMachine(root), scope="system")))
        and not MEANT.keys() & set(root.parts)
    }
    assert wrong == {}


def test_without_lists_the_masks_do(tmp_path: Path) -> None:
    """As recordings of kernels before 2.6.37 are: neither lists nor a list of online CPUs."""
    files = dataclasses.replace(MACHINES["offline CPUs"], masks=True).files()
    old = {
        name: text
        for name, text in files.items()
        if not name.endswith(("_list", "cpulist", "cpu/online"))
    }
    old |= {f"sys/devices/system/cpu/cpu{n}/online": "0\n" for n in (1, 7)}
    host = probe(write(tmp_path / "old", old), scope="system")
    assert host.cpu == probe(write(tmp_path / "new", files), scope="system").cpu
    assert (host.cpu.online, host.cpu.offline) == (CpuList.parse("0,2-6"), CpuList.parse("1,7"))


def test_dies(tmp_path: Path) -> None:
    assert _host(tmp_path / "a", MACHINES["two dies a socket"]).cpu.dies == 4
    assert _host(tmp_path / "b", MACHINES["one core per L3"]).cpu.dies == 1
    assert _host(tmp_path / "c", MACHINES["ARM, old names, no nodes"]).cpu.dies is None


def test_kinds(tmp_path: Path) -> None:
    kinds = _host(tmp_path / "a", MACHINES["hybrid"]).cpu.kinds
    assert [(kind.name, str(kind.cpus)) for kind in kinds] == [
        ("performance", "0-3"), ("efficient", "4-7"), ("low-power", "8"),
    ]  # fmt: skip
    kinds = _host(tmp_path / "b", MACHINES["ARM, old names, no nodes"]).cpu.kinds
    assert [(kind.name, str(kind.cpus), kind.capacity) for kind in kinds] == [
        ("big", "4-7", 1024), ("little", "0-3", 446),
    ]  # fmt: skip
    assert _host(tmp_path / "c", SMT).cpu.kinds == ()


def test_a_kernel_without_nodes_has_one(tmp_path: Path) -> None:
    (node,) = _host(tmp_path, MACHINES["ARM, old names, no nodes"]).cpu.numa
    assert (node.id, node.cpus, node.memory_bytes) == (0, CpuList.parse("0-7"), WHOLE * 1024)


def test_bulldozer_siblings_are_cores(tmp_path: Path) -> None:
    entries = "processor\t: 0\nvendor_id\t: AuthenticAMD\ncpu family\t: 21\nflags\t: avx\n"
    machine = Written(cores=["0-1", "2-3"], sockets=["0-3"], cpuinfo=entries)
    files = machine.files()
    for cpu in range(4):
        files[f"sys/devices/system/cpu/cpu{cpu}/topology/core_id"] = f"{cpu}\n"
    assert probe(write(tmp_path, files), scope="user").cpu.siblings == (
        CpuList.parse("0"),
        CpuList.parse("1"),
        CpuList.parse("2"),
        CpuList.parse("3"),
    )


def test_nodes_that_overlap(tmp_path: Path) -> None:
    machine = Written(cores=["0", "1"], sockets=["0-1"], nodes=[(0, "0-1", 5), (1, "0-1", 5)])
    host = probe(write(tmp_path, machine.files()), scope="user")
    assert [(node.id, node.cpus) for node in host.cpu.numa] == [(0, CpuList.parse("0-1"))]
    assert "NUMA nodes overlap" in [problem.what for problem in host.problems]


def test_memory_of_a_gpu_is_no_node(tmp_path: Path) -> None:
    machine = Written(
        cores=["0", "1"],
        sockets=["0-1"],
        nodes=[(0, "0", WHOLE // 4), (8, "1", WHOLE // 4), (255, "", WHOLE // 2)],
        more={"proc/driver/nvidia/gpus/0004:04:00.0/numa_status": "Node:  255\nStatus: online\n"},
    )
    nodes = probe(write(tmp_path, machine.files()), scope="user").cpu.numa
    assert [(node.id, node.memory_bytes) for node in nodes] == [
        (0, WHOLE * 256), (8, WHOLE * 256),
    ]  # fmt: skip
    assert nodes[1].distances == (20, 10)


# What cgroups leave

MOUNTS = "cgroup2 /sys/fs/cgroup cgroup2 rw,nosuid 0 0\n"
LEAF = "sys/fs/cgroup/user.slice/a.scope"


@pytest.mark.parametrize(
    ("files", "allowed", "quota"),
    [
        ({"proc/self/cgroup": "0::/user.slice/a.scope\n"}, "0-15", None),
        (
            {
                "proc/self/cgroup": "0::/user.slice/a.scope\n",
                f"{LEAF}/cpuset.cpus.effective": "2-3\n",
                f"{LEAF}/cpu.max": "max 100000\n",
                "sys/fs/cgroup/user.slice/cpu.max": "250000 100000\n",
            },
            "2-3",
            2.5,
        ),
        # The nearest cgroup with the controller counts.
        (
            {
                "proc/self/cgroup": "0::/user.slice/a.scope\n",
                "sys/fs/cgroup/user.slice/cpuset.cpus.effective": "4-7\n",
            },
            "4-7",
            None,
        ),
        (
            {
                "proc/self/cgroup": "3:cpu,cpuacct:/x\n7:cpuset:/x\n0::/\n",
                "sys/fs/cgroup/cpu,cpuacct/x/cpu.cfs_quota_us": "50000\n",
                "sys/fs/cgroup/cpu,cpuacct/x/cpu.cfs_period_us": "100000\n",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
                "sys/fs/cgroup/cpuset/x/cpuset.cpus": "1\n",
            },
            "1",
            0.5,
        ),
        # A file system of its own, as batch systems mounted it.
        (
            {
                "proc/self/cpuset": "/job\n",
                "proc/mounts": "none /dev/cpuset cpuset rw 0 0\n",
                "dev/cpuset/job/cpus": "0-3\n",
            },
            "0-3",
            None,
        ),
        # A list of other CPUs is another machine's.
        (
            {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpuset.cpus.effective": "40-47\n"},
            "0-15",
            None,
        ),
    ],
)
def test_cgroups(tmp_path: Path, files: dict[str, str], allowed: str, quota: float | None) -> None:
    machine = Written(cores=SINGLES, sockets=["0-15"], more={"proc/mounts": MOUNTS, **files})
    cpu = probe(write(tmp_path, machine.files()), scope="user").cpu
    assert (str(cpu.allowed), cpu.quota_cpus) == (allowed, quota)
    assert cpu.online == CpuList(range(16))


@pytest.mark.parametrize(
    ("files", "driver"),
    [
        ({"cpu0/cpufreq/scaling_driver": "acpi-cpufreq\n"}, "acpi-cpufreq"),
        (
            {
                "cpu0/cpufreq/scaling_driver": "amd-pstate-epp\n",
                "amd_pstate/status": "active\n",
            },
            "amd-pstate-epp (active)",
        ),
        ({"amd_pstate/status": "disable\n"}, "amd_pstate (disable)"),
        ({}, None),
    ],
)
def test_governor_driver(tmp_path: Path, files: dict[str, str], driver: str | None) -> None:
    more = {f"sys/devices/system/cpu/{name}": text for name, text in files.items()}
    machine = Written(cores=["0"], sockets=["0"], more=more)
    assert probe(write(tmp_path, machine.files()), scope="user").cpu.governor_driver == driver
