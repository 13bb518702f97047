"""Topology of recorded machines, of machines written as values, and of damaged ones."""

from __future__ import annotations

import datetime
import shutil
import tarfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stackctl.machine.machine import RecordedMachine
from stackctl.probe import probe
from stackctl.values.base import from_json, to_json
from stackctl.values.cpu_list import CpuList
from stackctl.values.host import L3, Host, NumaNode

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "machines"
X86_FLAGS = "fpu sse sse4_2 avx avx2 fma f16c avx512f avx512_vnni amx_tile amx_int8 amx_bf16"
UNRECORDED = ("tools: not recorded",)


@dataclass(frozen=True)
class Written:
    """A machine in a few lines. CPUs not in ``online`` lose their topology, as the kernel does it.

    ``cores`` and ``sockets`` are CPU lists; ``l3`` is (CPUs, size, id), ``nodes`` (id, CPUs, KiB).
    """

    cores: Sequence[str] = ()
    sockets: Sequence[str] = ()
    online: str | None = None
    l3: Sequence[tuple[str, str, int | None]] = ()
    nodes: Sequence[tuple[int, str, int]] = ()
    smt: str | None = None
    governors: Sequence[str] = ()
    siblings_file: str = "core_cpus_list"
    flags: str = X86_FLAGS
    cpuinfo: str | None = None
    #: CPU lists of the dies; masks beside the lists, as the kernel writes them.
    dies: Sequence[str] = ()
    masks: bool = False
    more: dict[str, str] = field(default_factory=dict)

    def files(self) -> dict[str, str]:
        """Every file of it, by path below the root."""
        cpu = "sys/devices/system/cpu"
        every = sorted({c for core in self.cores for c in CpuList.parse(core)})
        online = set(every if self.online is None else CpuList.parse(self.online))
        out = {"proc/meminfo": "MemTotal: 33554432 kB\nMemAvailable:   16777216 kB\n"}

        def listed(text: str) -> str:
            return f"{CpuList.parse(text) & online}\n"

        def share(folder: str, name: str, text: str, *, mask: str | None = None) -> None:
            out[f"{folder}/{name}"] = listed(text)
            if self.masks:
                bits = sum(1 << number for number in CpuList.parse(text) & online)
                words = f"{bits:0{max(1, -(-bits.bit_length() // 32)) * 8}x}"
                groups = [words[at : at + 8] for at in range(0, len(words), 8)]
                out[f"{folder}/{mask or name.removesuffix('_list')}"] = ",".join(groups) + "\n"

        if every:
            out[f"{cpu}/online"] = f"{CpuList(online)}\n"
        for number in every:
            out[f"{cpu}/cpu{number}/uevent"] = ""
        for core_id, core in enumerate(self.cores):
            for number in CpuList.parse(core) & online:
                topology = f"{cpu}/cpu{number}/topology"
                share(topology, self.siblings_file, core)
                # Repeats over sockets and dies, as it does on real machines.
                out[f"{topology}/core_id"] = f"{core_id % 4}\n"
        for package, cpus in enumerate(self.sockets):
            for number in CpuList.parse(cpus) & online:
                topology = f"{cpu}/cpu{number}/topology"
                out[f"{topology}/physical_package_id"] = f"{package}\n"
                if self.masks:
                    new = self.siblings_file == "core_cpus_list"
                    share(topology, "package_cpus_list" if new else "core_siblings_list", cpus)
        for die, cpus in enumerate(self.dies):
            for number in CpuList.parse(cpus) & online:
                out[f"{cpu}/cpu{number}/topology/die_id"] = f"{die}\n"
                share(f"{cpu}/cpu{number}/topology", "die_cpus_list", cpus)
        for cpus, size, number_of in self.l3:
            for number in CpuList.parse(cpus) & online:
                for index, level in ((0, 1), (3, 3)):
                    cache = f"{cpu}/cpu{number}/cache/index{index}"
                    out[f"{cache}/level"] = f"{level}\n"
                    out[f"{cache}/type"] = "Unified\n" if level == 3 else "Data\n"
                out[f"{cache}/size"] = size + "\n"
                share(cache, "shared_cpu_list", cpus, mask="shared_cpu_map")
                if number_of is not None:
                    out[f"{cache}/id"] = f"{number_of}\n"
        if self.masks and self.nodes:
            numbers = CpuList(node for node, _, _ in self.nodes)
            out["sys/devices/system/node/online"] = f"{numbers}\n"
        for place, (node, cpus, kib) in enumerate(self.nodes):
            folder = f"sys/devices/system/node/node{node}"
            share(folder, "cpulist", cpus, mask="cpumap")
            out[f"{folder}/meminfo"] = (
                f"Node {node} MemTotal:  {kib} kB\nNode {node} MemFree: 1 kB\n"
            )
            row = ["10" if other == place else "20" for other in range(len(self.nodes))]
            out[f"{folder}/distance"] = " ".join(row) + "\n"
        for number, governor in enumerate(self.governors):
            out[f"{cpu}/cpu{number}/cpufreq/scaling_governor"] = governor + "\n"
        if self.smt is not None:
            out[f"{cpu}/smt/active"] = self.smt + "\n"
        out["proc/cpuinfo"] = self.cpuinfo or "\n".join(
            f"processor\t: {n}\nvendor_id\t: GenuineIntel\nmodel name\t: Test CPU  @ 2 GHz\n"
            f"flags\t\t: {self.flags}\n"
            for n in sorted(online)
        )
        return out | self.more


def write(root: Path, files: dict[str, str]) -> RecordedMachine:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8", newline="")
    return RecordedMachine(root)


def probed(root: Path, machine: Written) -> Host:
    host = probe(write(root, machine.files()), scope="user")
    assert from_json(to_json(host), Host, where="test") == host
    return host


def whats(host: Host) -> tuple[str, ...]:
    return tuple(problem.what for problem in host.problems)


# Recorded machines


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    archives = sorted(SHARED.glob("*.tar.gz"))
    if not archives:
        pytest.skip("the recorded machines are not beside this checkout")
    root = tmp_path_factory.mktemp("recorded")
    for archive in archives:
        with tarfile.open(archive) as tar:
            tar.extractall(root / archive.name.removesuffix(".tar.gz"), filter="tar")
    return root


def _recording(root: Path, name: str) -> RecordedMachine:
    folder = root / name
    # Archives may hold one folder.
    inner = [folder, *folder.iterdir()]
    return RecordedMachine(next(path for path in inner if (path / "sys").is_dir()))


def test_epyc_with_one_numa_node(recorded: Path) -> None:
    host = probe(_recording(recorded, "epyc-9175f-nps1"), scope="system")
    cpu = host.cpu
    assert cpu.model == "AMD EPYC 9175F 16-Core Processor"
    assert (cpu.vendor, cpu.architecture) == ("AuthenticAMD", "x86_64")
    assert (cpu.sockets, cpu.cores, cpu.threads, cpu.threads_per_core) == (1, 16, 16, 1)
    assert (cpu.online, cpu.allowed, cpu.smt) == (
        CpuList.parse("0-15"),
        CpuList.parse("0-15"),
        False,
    )
    assert cpu.siblings == tuple(CpuList([number]) for number in range(16))
    # One core a cache: the fact that decides placement on this processor.
    assert cpu.l3 == tuple(L3(id=n, bytes=32 * 2**20, cpus=CpuList([n])) for n in range(16))
    assert cpu.numa == (
        NumaNode(
            id=0, cpus=CpuList.parse("0-15"), memory_bytes=host.memory.total_bytes, distances=(10,)
        ),
    )
    assert cpu.isa == (
        "sse4_2", "avx", "avx2", "fma", "f16c", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni"
    )  # fmt: skip
    assert host.memory.total_bytes is not None
    assert host.memory.total_bytes // 2**30 == 754
    assert host.memory.transparent_hugepages == "always"
    assert host.tools.kernel == "6.12.107+deb13-cloud-amd64"
    assert (host.tools.podman, host.tools.systemd_running, host.tools.linger) == (None, None, None)
    assert whats(host) == UNRECORDED


def test_epyc_with_one_numa_node_for_each_l3(recorded: Path) -> None:
    host = probe(_recording(recorded, "epyc-9175f-l3numa"), scope="user")
    assert (host.cpu.cores, len(host.cpu.l3), len(host.cpu.numa)) == (16, 16, 16)
    third = host.cpu.numa[3]
    assert (third.id, third.cpus, third.memory_bytes) == (3, CpuList.parse("3"), 49437500 * 1024)
    assert third.distances == (20, 20, 20, 10, *(20,) * 12)
    assert [node.id for node in host.cpu.numa] == list(range(16))
    assert whats(host) == UNRECORDED


# Machines written as values

SMT = Written(
    cores=[f"{n},{n + 16}" for n in range(16)],
    sockets=["0-31"],
    l3=[("0-7,16-23", "32768K", 0), ("8-15,24-31", "32768K", 1)],
    nodes=[(0, "0-31", 33554432)],
    smt="1",
    governors=["performance"] * 32,
)


def test_siblings_far_apart(tmp_path: Path) -> None:
    cpu = probed(tmp_path, SMT).cpu
    assert (cpu.cores, cpu.threads, cpu.threads_per_core, cpu.smt) == (16, 32, 2, True)
    assert cpu.siblings[:2] == (CpuList.parse("0,16"), CpuList.parse("1,17"))
    assert [domain.cpus for domain in cpu.l3] == [
        CpuList.parse("0-7,16-23"),
        CpuList.parse("8-15,24-31"),
    ]
    assert (cpu.model, cpu.governor) == ("Test CPU @ 2 GHz", "performance")
    assert cpu.isa[-4:] == ("avx512_vnni", "amx_tile", "amx_int8", "amx_bf16")


def test_two_sockets_of_four_nodes(tmp_path: Path) -> None:
    per_node = [f"{first}-{first + 7}" for first in range(0, 64, 8)]
    host = probed(
        tmp_path,
        Written(
            cores=[str(n) for n in range(64)],
            sockets=["0-31", "32-63"],
            l3=[(cpus, "96M", n) for n, cpus in enumerate(per_node)],
            nodes=[(n, cpus, 4194304) for n, cpus in enumerate(per_node)],
            smt="0",
            governors=["performance", "powersave"],
        ),
    )
    assert (host.cpu.sockets, host.cpu.cores, len(host.cpu.numa)) == (2, 64, 8)
    assert host.cpu.l3[7] == L3(id=7, bytes=96 * 2**20, cpus=CpuList.parse("56-63"))
    assert host.cpu.governor == "mixed"
    assert whats(host) == UNRECORDED


def test_offline_cpus_are_left_out_everywhere(tmp_path: Path) -> None:
    machine = Written(
        cores=["0,4", "1,5", "2,6", "3,7"],
        sockets=["0-7"],
        online="0,2-6",
        l3=[("0-1,4-5", "16384K", 0), ("2-3,6-7", "16384K", 1)],
        nodes=[(0, "0-7", 33554432)],
        smt="1",
    )
    files = machine.files()
    # Some kernels leave offline CPUs in the lists of the others.
    files["sys/devices/system/cpu/cpu2/cache/index3/shared_cpu_list"] = "2-3,6-7\n"
    files["sys/devices/system/node/node0/cpulist"] = "0-7\n"
    cpu = probe(write(tmp_path, files), scope="user").cpu
    assert (cpu.online, cpu.threads, cpu.cores) == (CpuList.parse("0,2-6"), 6, 4)
    assert cpu.siblings == (
        CpuList.parse("0,4"),
        CpuList.parse("2,6"),
        CpuList.parse("3"),
        CpuList.parse("5"),
    )
    assert [domain.cpus for domain in cpu.l3] == [CpuList.parse("0,4-5"), CpuList.parse("2-3,6")]
    assert cpu.numa[0].cpus == CpuList.parse("0,2-6")


def test_memory_only_and_sparse_nodes(tmp_path: Path) -> None:
    host = probed(
        tmp_path,
        Written(
            cores=["0", "1", "2", "3"],
            sockets=["0-3"],
            nodes=[(0, "0-1", 16777216), (4, "2-3", 0), (17, "", 16777216)],
        ),
    )
    assert [(node.id, node.cpus) for node in host.cpu.numa] == [
        (0, CpuList.parse("0-1")),
        (4, CpuList.parse("2-3")),
        (17, CpuList()),
    ]
    # A node without memory is a fact, an unknown size is null.
    assert [node.memory_bytes for node in host.cpu.numa] == [2**34, 0, 2**34]
    assert host.cpu.numa[1].distances == (20, 10, 20)
    assert (host.cpu.l3, host.cpu.smt, host.cpu.governor) == ((), False, None)
    assert whats(host) == UNRECORDED


def test_l3_without_numbers_is_numbered_in_order(tmp_path: Path) -> None:
    l3 = [("0-1", "512K", None), ("2-3", "512K", 7)]
    cpu = probed(tmp_path, Written(cores=["0", "1", "2", "3"], sockets=["0-3"], l3=l3)).cpu
    assert [domain.id for domain in cpu.l3] == [0, 1]


def test_l3_at_another_index(tmp_path: Path) -> None:
    files = Written(cores=["0", "1"], sockets=["0-1"]).files()
    for number in (0, 1):
        cache = f"sys/devices/system/cpu/cpu{number}/cache/index2"
        files |= {f"{cache}/level": "3", f"{cache}/size": "2M", f"{cache}/shared_cpu_list": "0-1"}
    assert probe(write(tmp_path, files), scope="user").cpu.l3 == (
        L3(id=0, bytes=2 * 2**20, cpus=CpuList.parse("0-1")),
    )


def test_arm(tmp_path: Path) -> None:
    entry = (
        "processor\t: {}\nBogoMIPS\t: 2000.00\nFeatures\t: fp asimd asimddp sve i8mm bf16 sve2\n"
        "CPU implementer\t: 0x41\nCPU part\t: 0xd4f\n"
    )
    machine = Written(
        cores=["0", "1"],
        sockets=["0-1"],
        siblings_file="thread_siblings_list",
        cpuinfo="\n".join(entry.format(n) for n in (0, 1)),
    )
    cpu = probed(tmp_path, machine).cpu
    assert (cpu.architecture, cpu.vendor, cpu.model) == ("aarch64", "ARM", "Neoverse-V2")
    assert cpu.isa == ("asimd", "asimddp", "i8mm", "bf16", "sve", "sve2")
    assert (cpu.cores, cpu.sockets) == (2, 1)


ARM_ENTRY = "processor\t: {}\nFeatures\t: fp asimd\nCPU implementer\t: 0x41\nCPU part\t: {}\n\n"


@pytest.mark.parametrize(
    ("cpuinfo", "architecture", "model"),
    [
        (
            "vendor_id       : IBM/S390\n# processors    : 1\nfeatures\t: esan3 zarch vx\n"
            "processor 0: version = FF,  identification = 0133E8,  machine = 2964\n",
            "s390x",
            None,
        ),
        (
            "processor\t: 0\ncpu\t\t: POWER9, altivec supported\nclock\t\t: 3800.0MHz\n",
            None,
            "POWER9, altivec supported",
        ),
        (
            "processor\t: 0\nhart\t\t: 0\nisa\t\t: rv64imafdc\nuarch\t\t: sifive,u74-mc\n",
            "riscv64",
            "sifive,u74-mc",
        ),
        (
            "processor\t\t: 0\nModel Name\t\t: Loongson-3A5000-HV\n"
            "ISA\t\t\t: loongarch32 loongarch64\nFeatures\t\t: fpu lsx lasx\n",
            "loongarch64",
            "Loongson-3A5000-HV",
        ),
        # What 32-bit ARM says of all processors follows the last of them.
        (
            "Processor\t: ARMv7 Processor rev 1 (v7l)\nprocessor\t: 0\nBogoMIPS\t: 1\n\n"
            "Features\t: swp half thumb neon\nCPU implementer\t: 0x41\n",
            "arm",
            "ARMv7 Processor rev 1 (v7l)",
        ),
        (ARM_ENTRY.format(0, "0xd87") + ARM_ENTRY.format(1, "0xd85"), "aarch64",
         "Cortex-A725 + Cortex-X925"),
        (ARM_ENTRY.format(0, "0xfff"), "aarch64", None),
    ],
    ids=["s390", "power", "riscv", "loongarch", "arm32", "two parts", "unknown part"],
)  # fmt: skip
def test_other_architectures(
    tmp_path: Path, cpuinfo: str, architecture: str | None, model: str | None
) -> None:
    cpu = probed(tmp_path, Written(cores=["0"], sockets=["0"], cpuinfo=cpuinfo)).cpu
    assert (cpu.architecture, cpu.model, cpu.cores) == (architecture, model, 1)


def _entry(number: int, package: int, core: int, cores: int) -> str:
    return (
        f"processor\t: {number}\nphysical id\t: {package}\ncore id\t\t: {core}\n"
        f"cpu cores\t: {cores}\nflags\t\t: avx2\n"
    )


def test_container_without_topology(tmp_path: Path) -> None:
    entries = [_entry(n, n % 4 // 2, n % 2, 2) for n in range(8)]
    host = probed(tmp_path, Written(cpuinfo="\n".join(entries)))
    assert (host.cpu.sockets, host.cpu.cores, host.cpu.threads) == (2, 4, 8)
    assert host.cpu.siblings == (
        CpuList.parse("0,4"),
        CpuList.parse("1,5"),
        CpuList.parse("2,6"),
        CpuList.parse("3,7"),
    )
    assert (host.cpu.smt, host.cpu.online, host.cpu.allowed) == (
        True,
        CpuList.parse("0-7"),
        CpuList.parse("0-7"),
    )
    assert whats(host) == UNRECORDED


def test_virtual_machine_that_numbers_every_core_zero(tmp_path: Path) -> None:
    entries = [_entry(n, 0, 0, 4) for n in range(4)]
    host = probed(tmp_path, Written(cpuinfo="\n".join(entries)))
    assert (host.cpu.threads, host.cpu.cores, host.cpu.smt, host.cpu.siblings) == (
        4, None, None, (),
    )  # fmt: skip
    assert whats(host) == (*UNRECORDED, "cores are unknown")


def test_hybrid_cores(tmp_path: Path) -> None:
    machine = Written(
        cores=["0-1", "2-3", "4", "5", "6"], sockets=["0-6"], l3=[("0-5", "24576K", 0)], smt="1"
    )
    cpu = probed(tmp_path, machine).cpu
    assert (cpu.cores, cpu.threads, cpu.threads_per_core) == (5, 7, 2)
    assert cpu.siblings == (
        CpuList.parse("0-1"),
        CpuList.parse("2-3"),
        CpuList.parse("4"),
        CpuList.parse("5"),
        CpuList.parse("6"),
    )
    # The low-power core has no L3 cache.
    assert cpu.l3 == (L3(id=0, bytes=24 * 2**20, cpus=CpuList.parse("0-5")),)


def test_allowed_follows_the_cpuset(tmp_path: Path) -> None:
    status = {"proc/self/status": "Name:\tx\nCpus_allowed:\tff\nCpus_allowed_list:\t2-3,18,90\n"}
    host = probed(tmp_path, Written(cores=SMT.cores, sockets=["0-31"], more=status))
    assert (host.cpu.online, host.cpu.allowed) == (CpuList.parse("0-31"), CpuList.parse("2-3,18"))


def test_memory_of_nodes_that_does_not_add_up(tmp_path: Path) -> None:
    one = Written(cores=["0"], sockets=["0"], nodes=[(0, "0", 4194304)])
    assert probed(tmp_path / "one", one).cpu.numa[0].memory_bytes == 2**35
    two = Written(cores=["0"], sockets=["0"], nodes=[(0, "0", 4194304), (1, "", 4194304)])
    host = probed(tmp_path / "two", two)
    assert [node.memory_bytes for node in host.cpu.numa] == [None, None]
    assert whats(host) == (*UNRECORDED, "memory of the NUMA nodes is unknown")


# Damaged machines

_CPU0 = "sys/devices/system/cpu/cpu0"
_CORE = f"{_CPU0}/topology/core_cpus_list"
_DAMAGE = {
    "size": (f"{_CPU0}/cache/index3/size", "lots\n", "size is not usable"),
    "siblings of another": (_CORE, "3\n", "core_cpus_list is not usable"),
    "not a list": (_CORE, "a-b\n", "core_cpus_list is not usable"),
    "one core of all": (_CORE, "0-65535\n", "core_cpus_list is not usable"),
    "package": (
        f"{_CPU0}/topology/physical_package_id", "x\n", "physical_package_id is not usable",
    ),
    "more CPUs than folders": ("sys/devices/system/cpu/online", "0-4000\n", "online is not usable"),
    "cache of another": (
        f"{_CPU0}/cache/index3/shared_cpu_list", "9\n", "shared_cpu_list is not usable",
    ),
    "node": ("sys/devices/system/node/node0/cpulist", "?\n", "NUMA layout is unknown"),
    "distance": ("sys/devices/system/node/node0/distance", "10 20\n", "distance is not usable"),
}  # fmt: skip


@pytest.mark.parametrize(("path", "text", "what"), _DAMAGE.values(), ids=_DAMAGE.keys())
def test_damage_is_a_problem(tmp_path: Path, path: str, text: str, what: str) -> None:
    files = SMT.files()
    assert path in files
    files[path] = text
    host = probe(write(tmp_path, files), scope="user")
    assert what in whats(host)
    sane(host)


def test_every_file_damaged_alike_is_one_problem(tmp_path: Path) -> None:
    files = SMT.files()
    for path in files:
        if path.endswith("index3/size"):
            files[path] = "lots\n"
    host = probe(write(tmp_path, files), scope="user")
    (problem,) = (found for found in host.problems if found.what == "size is not usable")
    # One look a cache, so one more.
    assert problem.why.endswith("cpu0/cache/index3/size: 'lots' is not a size; 1 more like it")
    assert all(domain.bytes is None for domain in host.cpu.l3)


def sane(host: Host) -> None:
    """What holds of every Host, however damaged the machine."""
    assert from_json(to_json(host), Host, where="test") == host
    cpu = host.cpu
    online = set(cpu.online or ())
    for lists in (
        cpu.siblings,
        [domain.cpus for domain in cpu.l3],
        [node.cpus for node in cpu.numa],
    ):
        seen: set[int] = set()
        for listed in lists:
            cpus = set(listed)
            assert not cpus & seen
            seen |= cpus
        assert not online or seen <= online
    if cpu.cores is not None:
        assert len(cpu.siblings) == cpu.cores
        assert {c for core in cpu.siblings for c in core} == online
    for number in (cpu.sockets, cpu.dies, cpu.cores, cpu.threads, cpu.threads_per_core):
        assert number is None or number > 0
    for word in (cpu.model, cpu.governor, host.tools.kernel):
        assert word is None or (word.isprintable() and word.strip() == word != "")
    assert all(problem.what and problem.why for problem in host.problems)
    assert len(host.problems) < 25


_MANAGER = "sys/fs/cgroup/user.slice/user-1000.slice/user@1000.service"
FUZZED = Written(
    cores=["0,2", "1,3"],
    sockets=["0-3"],
    l3=[("0-3", "8192K", 0)],
    nodes=[(0, "0-3", 16777216), (1, "", 16777216)],
    smt="1",
    governors=["performance"] * 4,
    dies=["0-3"],
    masks=True,
    more={
        "etc/os-release": 'ID=debian\nVERSION_ID="13"\nPRETTY_NAME="Debian 13 (trixie)"\n',
        "etc/passwd": "root:x:0:0::/root:/bin/sh\nsam:x:1000:1000::/home/sam:/bin/sh\n",
        "proc/version": "Linux version 6.12.1 (x) #1\n",
        "proc/self/status": "Uid:\t1000\t1000\t1000\t1000\nCpus_allowed_list:\t0-3\n",
        "proc/self/cgroup": "0::/user.slice/a.service\n4:memory:/b\n",
        "proc/1/status": "CapBnd:\t000001ffffffffff\n",
        "proc/1/uid_map": "0 0 4294967295\n",
        "proc/1/limits": "Max open files  1024  524288  files\nMax locked memory 8 8 bytes\n",
        "proc/77/comm": "systemd\n",
        "proc/77/cmdline": "/usr/lib/systemd/systemd\0--user\0",
        "proc/77/status": "Uid:\t1000\t1000\t1000\t1000\n",
        "proc/77/limits": "Max locked memory         8388608   8388608   bytes     \n",
        "proc/sys/fs/nr_open": "1048576\n",
        "sys/fs/cgroup/cgroup.controllers": "cpuset cpu io memory pids\n",
        "sys/fs/cgroup/memory.max": "max\n",
        "sys/fs/cgroup/user.slice/a.service/memory.max": "1073741824\n",
        f"{_MANAGER}/cgroup.controllers": "cpu\n",
        f"{_MANAGER}/init.scope/cgroup.procs": "77\n",
        "sys/kernel/mm/transparent_hugepage/enabled": "always [madvise] never\n",
        "sys/bus/pci/devices/0000:c1:00.0/vendor": "0x10de\n",
        "sys/bus/pci/devices/0000:c1:00.0/class": "0x030200\n",
        "sys/bus/pci/devices/0000:c1:00.0/numa_node": "0\n",
        "sys/bus/pci/devices/0000:c1:00.0/device": "0x2bb4\n",
        "sys/bus/pci/devices/0000:c1:00.0/max_link_speed": "32.0 GT/s PCIe\n",
        "sys/bus/pci/devices/0000:c1:00.0/current_link_width": "16\n",
        "proc/driver/nvidia/gpus/0000:c1:00.0/information": "Model: \t NVIDIA X\n",
        "proc/driver/nvidia/gpus/0000:c1:00.0/numa_status": "Node: \t -1\n",
        "nvml.json": '{"devices": [{"name": "NVIDIA X", "pci": "00000000:C1:00.0"}]}',
        "etc/cdi/n.yaml": "cdiVersion: 0.5.0\nkind: nvidia.com/gpu\ndevices: [{name: '0'}]\n",
        "proc/mounts": "cgroup2 /sys/fs/cgroup cgroup2 rw 0 0\n",
        "proc/self/cpuset": "/user.slice/a.service\n",
        "sys/fs/cgroup/user.slice/a.service/cpu.max": "200000 100000\n",
        "sys/fs/cgroup/user.slice/a.service/cpuset.cpus.effective": "0-3\n",
        "sys/devices/cpu_core/cpus": "0,2\n",
        "sys/devices/cpu_atom/cpus": "1,3\n",
        "sys/devices/system/cpu/cpu0/cpu_capacity": "1024\n",
        "sys/devices/system/cpu/amd_pstate/status": "active\n",
        "sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages": "4\n",
        "sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages": "4\n",
        "proc/sys/kernel/numa_balancing": "1\n",
        "proc/sys/vm/swappiness": "60\n",
        "run/systemd/system/x": "",
        "var/lib/systemd/linger/sam": "",
        "commands.json": '{"podman --version": "podman version 5.4.2", '
        '"systemctl --version": "\\u0000"}',
    },
)  # fmt: skip

_MOST_DAMAGING = (
    "", "\n", "\0", "-1", "-", "0-", "4-2", "0-3:1/0", "0-65535", "99999999999", "9" * 6000,
    "0-65535," * 3000, "0," * 50000, "0 " * 20000, "a/" * 9000, "0::/" + "a/" * 3000 + "\n",
    "0::/../../x\n", "0::/a\0b\n", "\u0663", "\u00b2", "0x10de", "max", "[always",
    "18446744073709551616K",
    "Uid:\t0\t0\nCapBnd:\tzz\nCpus_allowed_list:\t9-\n", "processor: 0\nprocessor: 0\nflags: avx\n",
    "processor : 77777\nphysical id : 0\ncore id : 0\n" * 50, "\x1b[31mred\u202e",
    "Node 0 MemTotal: 0 kB", "ffffffff,ffffffff\n", "0" * 5000, "f" * 5000, "ffffffff," * 3000,
    "{}", "[" * 3000, '{"devices": [{"pci": "../x", "memory_clock_mhz": 1}]}', "Node: 0\n",
    "- - - -\n" * 500, "a b c d\n" * 9000, "0 0", "-1 -1",
)  # fmt: skip


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("fuzzed")
    write(root, FUZZED.files())
    yield root
    shutil.rmtree(root)


_DAMAGES = st.dictionaries(
    st.sampled_from(sorted(set(FUZZED.files()) - {"commands.json"})),
    st.none() | st.sampled_from(_MOST_DAMAGING) | st.text(max_size=40) | st.binary(max_size=40),
    min_size=1,
    max_size=6,
)


@settings(
    max_examples=150,
    database=None,
    deadline=datetime.timedelta(seconds=10),
)
@given(damages=_DAMAGES, scope=st.sampled_from(["user", "system"]))
def test_no_damage_stops_the_probe(
    fuzzed: Path, damages: dict[str, str | bytes | None], scope: str
) -> None:
    whole = FUZZED.files()
    try:
        for name, content in damages.items():
            if content is None:
                (fuzzed / name).unlink()
            else:
                raw = content if isinstance(content, bytes) else content.encode("utf-8", "replace")
                (fuzzed / name).write_bytes(raw)
        started = time.process_time()
        host = probe(RecordedMachine(fuzzed), scope="user" if scope == "user" else "system")
        assert time.process_time() - started < 5
        sane(host)
    finally:
        write(fuzzed, {name: whole[name] for name in damages})


def test_the_machine_that_is_damaged_above_is_whole(fuzzed: Path) -> None:
    host = probe(RecordedMachine(fuzzed), scope="user")
    sane(host)
    assert (host.cpu.cores, len(host.cpu.numa), len(host.cpu.l3)) == (2, 2, 1)
    assert host.memory.limit_bytes == 2**30
    assert host.limits.memlock_bytes == 8 * 2**20
    assert (host.tools.podman, host.tools.linger, host.tools.cgroup_version) == ("5.4.2", True, 2)
    assert host.gpus[0].pci == "0000:c1:00.0"
    assert host.gpus[0].cdi == "nvidia.com/gpu=0"
    assert (host.cpu.dies, len(host.cpu.kinds), host.cpu.quota_cpus) == (1, 2, 2.0)
