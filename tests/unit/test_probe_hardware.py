"""Memory channels, GPUs, CDI files, storage and measured bandwidth."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_probe_machines import Written, write

from stackctl.errors import StackctlError
from stackctl.machine.machine import Machine, RecordedMachine
from stackctl.probe import bandwidth, dmi, probe, storage
from stackctl.probe.cdi import check_cdi_file, probe_cdi
from stackctl.probe.doctor import findings
from stackctl.probe.fact_reader import FactReader
from stackctl.probe.nvml import read_nvml
from stackctl.probe.tools import probe_apparmor
from stackctl.requirements.cdi import missing_device_remedy
from stackctl.values.cpu_list import CpuList
from stackctl.values.host import CdiSpec, Cpu, Gpu, Host, HugePages

FACTS = Path(__file__).resolve().parents[1] / "machines"
MAX_Q = (FACTS / "nvml-rtx-pro-6000-max-q.json").read_text(encoding="utf-8")
CDI = (FACTS / "nvidia-cdi.yaml").read_text(encoding="utf-8")
MIB = 2**20


# Memory channels


def structure(kind: int, body: bytes, *texts: str) -> bytes:
    strings = b"".join(text.encode() + b"\0" for text in texts) or b"\0"
    return bytes([kind, len(body) + 4, 0x11, 0]) + body + strings + b"\0"


def module(
    slot: str,
    bank: str = "",
    *,
    mib: int = 65536,
    speed: int = 6400,
    rated: int = 6400,
    kind: int = 0x22,
    technology: int = 3,
) -> bytes:
    """A memory device of SMBIOS 3.3."""
    body = bytearray(0x5C - 4)

    def put(at: int, value: int, size: int = 2) -> None:
        body[at - 4 : at - 4 + size] = value.to_bytes(size, "little")

    put(0x0A, 64)
    put(0x0C, mib if mib < 0x7FFF else 0x7FFF)
    put(0x1C, mib, 4)
    put(0x10, 1, 1)
    put(0x11, 2 if bank else 0, 1)
    put(0x12, kind, 1)
    put(0x15, rated)
    put(0x20, speed)
    put(0x28, technology, 1)
    return structure(17, bytes(body), slot, *([bank] if bank else []))


TWELVE = b"".join(module(f"DIMM {n}", f"P0 CHANNEL {n}") for n in "ABCDEFGHIJKL")
OTHERS = structure(0, bytes(20), "Vendor", "1.0") + structure(16, bytes(19))
THE_END = structure(127, b"")
RYZEN = "AMD Ryzen 9 9950X 16-Core Processor"
TURIN = "AMD EPYC 9175F 16-Core Processor"


class WithTable(RecordedMachine):
    """A recorded machine with bytes in its firmware tables."""

    def __init__(self, root: Path, table: bytes) -> None:
        super().__init__(root)
        self.table = table

    def read_bytes(self, path: str) -> bytes | None:
        return self.table if path == "/sys/firmware/dmi/tables/DMI" else None


Found = tuple[int | None, int | None, float | None, str | None]


def memory(
    root: Path, model: str, table: bytes = b"", *, flags: str = "avx2", sockets: int = 1
) -> Found:
    entry = f"processor\t: 0\nvendor_id\t: AuthenticAMD\nmodel name\t: {model}\nflags\t: {flags}\n"
    cores = [str(n) for n in range(2 * sockets)]
    packages = [f"{2 * n}-{2 * n + 1}" for n in range(sockets)]
    write(root, Written(cores=cores, sockets=packages, cpuinfo=entry).files())
    found = probe(WithTable(root, table), scope="user").memory
    return (
        found.channels,
        found.speed_mt_s,
        found.bandwidth_bytes_s.theoretical,
        (found.bandwidth_source),
    )


def test_channels_from_the_firmware(tmp_path: Path) -> None:
    table = OTHERS + TWELVE + THE_END
    assert memory(tmp_path / "a", TURIN, table) == (12, 6400, 614.4e9, "dmi")
    # As configured, not as sold: and the slowest counts.
    slower = OTHERS + TWELVE[: len(TWELVE) // 2] + module("X", speed=5600) + THE_END
    assert memory(tmp_path / "b", TURIN, slower) == (7, 5600, 7 * 8 * 5.6e9, "dmi")
    # Two modules a channel are no more channels, and empty slots and Optane are none.
    double = TWELVE * 2 + module("empty", mib=0) + module("pmem", technology=7) + THE_END
    assert memory(tmp_path / "c", TURIN, double) == (12, 6400, 614.4e9, "dmi")


@pytest.mark.parametrize(
    ("places", "channels"),
    [
        (["ChannelA-DIMM0", "ChannelA-DIMM1", "ChannelB-DIMM0", "ChannelB-DIMM1"], 2),
        (["P0_Node0_Channel0_Dimm0", "P0_Node0_Channel1_Dimm0", "P1_Node0_Channel0_Dimm0"], 3),
        (["P1-DIMMA1", "P1-DIMMB1", "P2-DIMMA1", "P2-DIMMB1"], 4),
        (["CPU1_DIMM_A1", "CPU1_DIMM_A2", "CPU2_DIMM_A1"], 2),
        # These words do not tell channels apart, or cannot mean them.
        (["A1", "A2"], None),
        (["DIMM 0", "DIMM 1"], None),
        (["DIMM_A1", "DIMM_A2", "DIMM_A3", "DIMM_A4"], None),
    ],
)
def test_channels_by_name(tmp_path: Path, places: list[str], channels: int | None) -> None:
    table = b"".join(module(place) for place in places)
    peak = channels * 8 * 6.4e9 if channels else None
    source = "dmi" if channels else None
    assert memory(tmp_path, RYZEN, table) == (channels, 6400, peak, source)


def test_soldered_memory_is_unknown(tmp_path: Path) -> None:
    table = module("Controller0-ChannelA", kind=0x23)
    assert memory(tmp_path, RYZEN, table) == (None, 6400, None, None)


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (TURIN, (12, 6400, 614.4e9, "table: EPYC Turin")),
        ("AMD EPYC 9755 128-Core Processor", (12, 6000, 576e9, "table: EPYC Turin")),
        ("AMD EPYC 9654 96-Core Processor", (12, 4800, 460.8e9, "table: EPYC Genoa")),
        ("AMD EPYC 8534P 64-Core Processor", (6, 4800, 230.4e9, "table: EPYC Siena")),
        ("AMD EPYC 75F3 32-Core Processor", (8, 3200, 204.8e9, "table: EPYC Milan")),
        ("AMD EPYC 7742 64-Core Processor", (8, 3200, 204.8e9, "table: EPYC Rome")),
        ("AMD EPYC 7551 32-Core Processor", (8, 2666, 170.624e9, "table: EPYC Naples")),
        ("AMD EPYC 7282 16-Core Processor", (None, None, None, None)),
        ("AMD EPYC 4464P 12-Core Processor", (None, None, None, None)),
        ("AMD EPYC", (None, None, None, None)),
        (RYZEN, (None, None, None, None)),
        ("Intel(R) Xeon(R) Platinum 8480+", (None, None, None, None)),
    ],
)
def test_channels_from_the_table(tmp_path: Path, model: str, expected: Any) -> None:
    assert memory(tmp_path, model) == expected


def test_two_sockets_have_twice_the_channels(tmp_path: Path) -> None:
    assert memory(tmp_path, TURIN, sockets=2)[:3] == (24, 6400, 2 * 614.4e9)


def test_a_virtual_machine_sees_none_of_it(tmp_path: Path) -> None:
    found = memory(tmp_path, TURIN, TWELVE + THE_END, flags="avx2 hypervisor")
    assert found == (None, None, None, None)


@settings(max_examples=300, database=None, deadline=None)
@given(
    st.binary(max_size=600)
    | st.tuples(st.sampled_from([0, 3, 17, 200]), st.binary(max_size=64)).map(
        lambda cut: (TWELVE + THE_END)[: cut[0] * 3] + cut[1] + TWELVE[cut[0] :]
    )
)
@example(b"\x11\x04\0\0" * 1000)
@example(b"\x11\xff" * 700_000)
def test_no_table_stops_the_reader(table: bytes) -> None:
    started = time.process_time()
    found = dmi.memory_modules(table)
    dmi.channels_in_use(found, None, 1)
    dmi.common_speed(found)
    assert len(found) <= 1024
    assert time.process_time() - started < 1
    assert all(module.place.isprintable() for module in found)


def test_huge_pages(tmp_path: Path) -> None:
    folder = "sys/kernel/mm/hugepages/hugepages-"
    more = {
        f"{folder}1048576kB/nr_hugepages": "4\n", f"{folder}1048576kB/free_hugepages": "3\n",
        f"{folder}2048kB/nr_hugepages": "0\n", f"{folder}2048kB/free_hugepages": "0\n",
    }  # fmt: skip
    machine = write(tmp_path, Written(cores=["0"], sockets=["0"], more=more).files())
    assert probe(machine, scope="user").memory.hugepages_free == (
        HugePages(bytes=2**30, total=4, free=3),
    )


# GPUs

ADDRESS = "0000:c1:00.0"
BUS = f"sys/bus/pci/devices/{ADDRESS}"
CARD = {
    f"{BUS}/vendor": "0x10de\n",
    f"{BUS}/device": "0x2bb4\n",
    f"{BUS}/class": "0x030200\n",
    f"{BUS}/numa_node": "0\n",
    f"{BUS}/max_link_speed": "32.0 GT/s PCIe\n",
    f"{BUS}/current_link_width": "16\n",
}


def look(root: Path, files: dict[str, str]) -> Host:
    return probe(write(root, {"proc/x": "", **files}), scope="system")


def test_the_reference_gpu_as_its_driver_reports_it(tmp_path: Path) -> None:
    (gpu,) = look(tmp_path, {**CARD, "nvml.json": MAX_Q, "etc/cdi/nvidia.yaml": CDI}).gpus
    assert gpu == Gpu(
        index=0,
        name="NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition",
        uuid="GPU-00000000-0000-4000-8000-000000000000",
        memory_bytes=97887 * MIB,
        free_bytes=97223 * MIB,
        compute_capability="12.0",
        driver="580.95.05",
        cuda="13.0",
        pci=ADDRESS,
        numa_node=0,
        cdi="nvidia.com/gpu=0",
        bandwidth_bytes_s=1792128000000.0,
        power_limit_w=300,
        pcie="gen5 x16",
    )


def test_a_gpu_by_its_pci_id_alone(tmp_path: Path) -> None:
    information = "Model: \t\t NVIDIA Graphics\nGPU UUID: \t GPU-????????-\nBus Type: \t PCIe\n"
    files = {
        **CARD,
        f"proc/driver/nvidia/gpus/{ADDRESS}/information": information,
        "sys/module/nvidia/version": "575.51.02\n",
    }
    (gpu,) = look(tmp_path, files).gpus
    assert (gpu.name, gpu.uuid, gpu.driver) == ("NVIDIA Graphics", None, "575.51.02")
    assert (gpu.memory_bytes, gpu.compute_capability) == (97887 * MIB, "12.0")
    assert (gpu.bandwidth_bytes_s, gpu.pcie, gpu.free_bytes) == (1.792e12, "gen5 x16", None)


def test_gpus_of_other_makers_come_last(tmp_path: Path) -> None:
    amd = "sys/bus/pci/devices/0000:03:00.0"
    files = {
        **CARD,
        f"{amd}/vendor": "0x1002\n", f"{amd}/class": "0x030000\n", f"{amd}/device": "0x744c\n",
        f"{amd}/mem_info_vram_total": "1000\n", f"{amd}/mem_info_vram_used": "400\n",
        "etc/cdi/nvidia.yaml": CDI,
    }  # fmt: skip
    nvidia, other = look(tmp_path, files).gpus
    assert (nvidia.index, nvidia.cdi) == (0, "nvidia.com/gpu=0")
    assert (other.index, other.name, other.cdi) == (1, None, None)
    assert (other.memory_bytes, other.free_bytes) == (1000, 600)


@pytest.mark.parametrize("text", ["", "[]", '{"devices": [{"memory_bytes": "x"}]}', "{" * 9000])
def test_damaged_recordings_fall_back(tmp_path: Path, text: str) -> None:
    (gpu,) = look(tmp_path, {**CARD, "nvml.json": text}).gpus
    assert gpu.memory_bytes == 97887 * MIB


class NVMLError(Exception):
    pass


def _library(**changes: Any) -> types.ModuleType:
    """A stand-in for the library, with one GPU that does not tell everything."""

    def refuse(*_: Any) -> None:
        raise NVMLError("Not Supported")

    library = types.ModuleType("pynvml")
    told: dict[str, Any] = {
        "nvmlSystemGetCudaDriverVersion_v2": lambda: 13010,
        "nvmlSystemGetDriverVersion": lambda: "590.44.01",
        "nvmlDeviceGetCount": lambda: 1,
        "nvmlDeviceGetHandleByIndex": lambda index: f"handle {index}",
        "nvmlDeviceGetMemoryInfo": lambda _: types.SimpleNamespace(total=1000, free=600),
        "nvmlDeviceGetCudaComputeCapability": lambda _: (12, 0),
        "nvmlDeviceGetEnforcedPowerLimit": lambda _: 299_600,
        "nvmlDeviceGetPciInfo": lambda _: types.SimpleNamespace(busId=b"00000000:C1:00.0"),
        "nvmlDeviceGetName": lambda _: b"NVIDIA X",
        "nvmlDeviceGetMaxPcieLinkGeneration": lambda _: 5,
        "nvmlDeviceGetCurrPcieLinkWidth": lambda _: 8,
        "nvmlDeviceGetMemoryBusWidth": lambda _: 512,
        "nvmlDeviceGetMaxClockInfo": lambda _, kind: 14001,
        "nvmlDeviceGetComputeRunningProcesses": lambda _: [
            types.SimpleNamespace(pid=7, usedGpuMemory=400),
            types.SimpleNamespace(pid=5, usedGpuMemory=2**64 - 1),
        ],
        "nvmlDeviceGetGraphicsRunningProcesses": refuse,
        "nvmlDeviceGetUUID": refuse,
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "NVML_CLOCK_MEM": 2,
        "NVMLError": NVMLError,
    }
    for name, value in (told | changes).items():
        setattr(library, name, value)
    return library


def test_the_library_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", _library())
    readings = read_nvml()
    (device,) = readings.devices
    assert (readings.driver, readings.cuda) == ("590.44.01", "13.1")
    assert (device.name, device.uuid, device.pci) == ("NVIDIA X", None, "00000000:C1:00.0")
    assert (device.compute_capability, device.power_limit_w) == ("12.0", 300)
    assert [(process.pid, process.memory_bytes) for process in device.processes or ()] == [
        (5, None), (7, 400),
    ]  # fmt: skip


def test_the_library_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> None:
        raise NVMLError("Driver Not Loaded")

    monkeypatch.setitem(sys.modules, "pynvml", _library(nvmlInit=fails))
    with pytest.raises(StackctlError, match="Driver Not Loaded"):
        read_nvml()
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(StackctlError, match="nvidia-ml-py"):
        read_nvml()


def test_the_probe_does_not_import_the_library() -> None:
    code = "import sys, stackctl.probe; print('pynvml' in sys.modules, 'yaml' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False False\n"


# CDI


class Standing(RecordedMachine):
    """A recorded machine that stands for the live one: what it lacks is absent."""

    live = True


def cdi(
    root: Path, files: dict[str, str], podman: str | None = "5.4.2", *, live: bool = False
) -> tuple[CdiSpec, ...]:
    write(root, {"proc/x": "", **files})
    return probe_cdi(FactReader(Standing(root) if live else RecordedMachine(root)), podman)


def test_a_cdi_file(tmp_path: Path) -> None:
    (spec,) = cdi(tmp_path, {"etc/cdi/nvidia.yaml": CDI, "etc/cdi/other.txt": "x"}, "4.9.3")
    assert (spec.path, spec.version, spec.problem) == ("/etc/cdi/nvidia.yaml", "0.5.0", None)
    assert spec.devices == (
        "nvidia.com/gpu=0",
        "nvidia.com/gpu=GPU-00000000-0000-4000-8000-000000000000",
        "nvidia.com/gpu=all",
    )


def test_the_same_file_by_two_names_counts_once(tmp_path: Path) -> None:
    files = {"run/cdi/nvidia.yaml": CDI, "var/run/cdi/nvidia.yaml": CDI}
    assert [spec.path for spec in cdi(tmp_path, files)] == ["/run/cdi/nvidia.yaml"]


def test_json_and_conflicts(tmp_path: Path) -> None:
    as_json = json.dumps(yaml.safe_load(CDI))
    first, second = cdi(tmp_path, {"etc/cdi/a.json": as_json, "etc/cdi/b.yaml": CDI})
    assert (first.problem, first.devices) == (None, second.devices)
    assert second.problem is not None
    assert "also in /etc/cdi/a.json" in second.problem


GIDS = CDI.replace("  env:\n", "  additionalGids:\n  - 44\n  - 104\n  env:\n", 1).replace(
    "cdiVersion: 0.5.0", "cdiVersion: 0.7.0"
)


@pytest.mark.parametrize(
    ("text", "podman", "words"),
    [
        (GIDS, "4.9.3", "additionalGids (CDI 0.7.0), which podman 4.9.3 cannot parse"),
        (CDI.replace("0.5.0", "0.8.0"), "4.9.3", "podman 4.9.3 parses 0.6 at most"),
        (GIDS, "5.0.3", "additionalGids (CDI 0.7.0), which podman 5.0.3 cannot parse"),
        (GIDS, "5.1.0", None),
        (GIDS, "5.4.2", None),
        (CDI.replace("0.5.0", "0.8.0"), "5.1.2", "podman 5.1.2 parses 0.7 at most"),
        (CDI.replace("0.5.0", "0.8.0"), "5.2.0", None),
        (CDI.replace("0.5.0", "1.0.0"), "5.4.2", "podman 5.4.2 parses 0.8 at most"),
        (CDI.replace("kind:", "sort:"), "5.4.2", "no valid kind"),
        ("devices: [", "5.4.2", "cannot be parsed"),
        ("- 1\n", "5.4.2", "not a mapping"),
        ("kind: nvidia.com/gpu\ndevices: 3\n", "5.4.2", "names no devices"),
        ("a: &a {b: c}\nd: {<<: *a}\n", "5.4.2", "merges keys"),
    ],
)
def test_what_is_wrong_with_a_cdi_file(
    tmp_path: Path, text: str, podman: str, words: str | None
) -> None:
    (spec,) = cdi(tmp_path, {"etc/cdi/n.yaml": text}, podman)
    assert spec.problem is None if words is None else words in (spec.problem or "")


def test_files_that_a_cdi_file_names_exist(tmp_path: Path) -> None:
    there = {f"dev/{name}": "" for name in ("nvidia0", "nvidiactl", "nvidia-uvm")}
    library = "usr/lib/x86_64-linux-gnu/libcuda.so.580.95.05"
    files = {"etc/cdi/nvidia.yaml": CDI}
    whole = cdi(tmp_path / "a", {**files, **there, library: ""}, live=True)
    assert whole[0].problem is None
    # The driver was upgraded since.
    stale = cdi(tmp_path / "b", {**files, **there}, live=True)
    assert "libcuda.so.580.95.05 does not exist" in (stale[0].problem or "")
    gone = cdi(tmp_path / "c", files, live=True)
    assert "/dev/nvidiactl does not exist" in (gone[0].problem or "")
    # A recording lacks most files.
    assert cdi(tmp_path / "d", files)[0].problem is None


@pytest.mark.parametrize("podman", ["4.7.2", "4.9.3", "5.0.3"])
@pytest.mark.parametrize("name", ["etc/cdi/n.yaml", "etc/cdi/n.json", "run/cdi/nvidia.yaml"])
def test_the_fix_for_old_podman_lasts(tmp_path: Path, podman: str, name: str) -> None:
    said = {"commands.json": json.dumps({"podman --version": f"podman version {podman}"})}
    text = GIDS if name.endswith(".yaml") else json.dumps(yaml.safe_load(GIDS))
    host = look(tmp_path, {**CARD, **said, name: text})
    (found,) = (one for one in findings(host, needs_gpu=True) if one.name == "cdi")
    assert found.status == "fail"
    # The finding states the fact, and its remedy is the only one.
    assert found.actual == (
        f"/{name}: it has additionalGids (CDI 0.7.0), which podman {podman} cannot parse"
    )
    remedy = found.remedy or ""
    flags = "NVIDIA_CTK_CDI_GENERATE_FEATURE_FLAGS=no-additional-gids-for-device-nodes"
    assert flags in remedy
    if name.startswith("etc"):
        assert remedy == f"sudo {flags} nvidia-ctk cdi generate --output=/{name}"
    else:
        # The file is made anew at each boot, so its service has to change.
        assert remedy.startswith("stackctl provision --only cdi\n# by hand: ")
        assert "/etc/nvidia-container-toolkit/nvidia-cdi-refresh.env" in remedy
    # A container that podman refuses gets the same remedy.
    assert missing_device_remedy(host) == remedy


def test_additional_gids_of_another_vendor(tmp_path: Path) -> None:
    said = {"commands.json": '{"podman --version": "podman version 4.9.3"}'}
    text = GIDS.replace("nvidia.com/gpu", "amd.com/gpu")
    host = look(tmp_path, {**CARD, **said, "etc/cdi/amd.yaml": text})
    (found,) = (one for one in findings(host, needs_gpu=True) if one.name == "cdi")
    assert (found.remedy or "").startswith("upgrade podman to 5.1")


_YAMLISH = st.text(alphabet="a:-?&*!|>[]{},#'\"%@ \n\t0.<~é\0", max_size=300)


@settings(max_examples=300, database=None, deadline=None)
@given(
    text=_YAMLISH
    | st.text(max_size=100)
    | st.tuples(st.integers(0, len(CDI)), _YAMLISH).map(lambda cut: CDI[: cut[0]] + cut[1]),
    suffix=st.sampled_from(["yaml", "json"]),
)
@example("[" * 5000, "yaml")
@example("- " * 2000 + "a", "yaml")
@example("\n".join(" " * n + "a:" for n in range(3000)), "yaml")
@example("a: b\n" * 60000, "yaml")
@example("[" * 4000 + "]" * 4000, "json")
@example('{"kind": "a/b", "devices": [' + "9" * 5000 + "]}", "json")
@example("kind: a/b\ndevices: [{name: [x]}, {name: 3}, 7]\ncontainerEdits: [1]\n", "yaml")
@example("a: 2001-99-99\n", "yaml")
def test_no_cdi_file_stops_the_probe(text: str, suffix: str) -> None:
    reader = FactReader(Machine())
    started = time.process_time()
    spec = check_cdi_file(reader, f"/etc/cdi/x.{suffix}", text, "4.9.3")
    assert time.process_time() - started < 1
    assert spec.problem is None or spec.problem.isprintable()
    assert len(spec.devices) <= 2048


# Kernel settings


def test_kernel_settings(tmp_path: Path) -> None:
    tools = look(
        tmp_path,
        {
            "proc/sys/kernel/numa_balancing": "1\n",
            "proc/sys/vm/swappiness": "60\n",
            "sys/fs/selinux/enforce": "1",
            "sys/module/apparmor/parameters/enabled": "N\n",
        },
    ).tools
    assert (tools.numa_balancing, tools.swappiness) == (True, 60)
    assert (tools.selinux, tools.apparmor) == ("enforcing", False)
    nothing = look(tmp_path / "nothing", {}).tools
    assert (nothing.numa_balancing, nothing.selinux, nothing.apparmor) == (None, None, None)


@pytest.mark.parametrize(
    ("files", "apparmor", "profiles"),
    [
        ({}, None, ()),
        ({"sys/module/apparmor/parameters/enabled": "Y\n"}, True, ()),
        # A user cannot read the list.
        ({"sys/module/apparmor/parameters/enabled": "Y\n", "etc/apparmor.d/crun": "profile crun"},
         True, ("crun",)),
        ({"sys/module/apparmor/parameters/enabled": "Y\n", "etc/apparmor.d/crun": "profile crun",
          "sys/kernel/security/apparmor/profiles": "/usr/bin/man (enforce)\nrunc (unconfined)\n"
          "containers-default-0.57.4-apparmor1 (enforce)\ncrun (unconfined)\n"},
         True, ("containers-default-0.57.4-apparmor1", "crun")),
        ({"sys/module/apparmor/parameters/enabled": "Y\n", "etc/apparmor.d/crun": "profile crun",
          "sys/kernel/security/apparmor/profiles": "man_filter (enforce)\n"}, True, ()),
    ],
)  # fmt: skip
def test_apparmor(
    tmp_path: Path, files: dict[str, str], apparmor: bool | None, profiles: tuple[str, ...]
) -> None:
    tools = look(tmp_path, files).tools
    assert (tools.apparmor, tools.apparmor_profiles) == (apparmor, profiles)


@pytest.mark.parametrize(
    ("present", "confines"),
    [
        (("sbin/apparmor_parser", "sys/kernel/security/apparmor/profiles"), True),
        (("usr/sbin/apparmor_parser", "sys/kernel/security/apparmor/profiles"), True),
        (("sys/kernel/security/apparmor/profiles",), False),
        # The interface is not mounted in most containers.
        (("sbin/apparmor_parser",), False),
    ],
)
def test_podman_uses_apparmor_only_if_it_can_load_profiles(
    tmp_path: Path, present: tuple[str, ...], confines: bool
) -> None:
    files = {"sys/module/apparmor/parameters/enabled": "Y\n"} | dict.fromkeys(present, "")
    write(tmp_path, files)
    reader = FactReader(Standing(tmp_path))
    assert probe_apparmor(reader) is confines


# Storage


def test_the_file_system_of_a_folder(tmp_path: Path) -> None:
    lines = (
        "22 1 254:0 / / rw,relatime - ext4 /dev/vda rw\n"
        "30 22 0:30 / /srv rw shared:5 master:1 - xfs /dev/vdb rw\n"
        "31 30 0:31 / /srv/model\\040files rw - btrfs /dev/vdc rw\n"
        "32 31 0:31 / /srv/models rw - zfs pool rw\n"
        "short\n"
    )
    machine = write(tmp_path, {"proc/self/mountinfo": lines})
    kinds = {
        path: storage.probe_storage(machine, path).filesystem
        for path in ("/", "/srv/x", "/srv/models", "/srv/modelsx", "/srv/model files/a", "/srv/..")
    }
    assert list(kinds.values()) == ["ext4", "xfs", "zfs", "xfs", "btrfs", "ext4"]
    assert storage.probe_storage(machine, "/srv").free_bytes is None


def test_storage_of_this_machine(tmp_path: Path) -> None:
    found = storage.probe_storage(Machine(), str(tmp_path / "not" / "yet"))
    assert found.filesystem
    assert found.free_bytes
    assert found.path.endswith("not/yet")


@pytest.fixture
def big(tmp_path: Path) -> Iterator[Path]:
    file = tmp_path / "model.gguf"
    with file.open("wb") as stream:
        for _ in range(96):
            stream.write(os.urandom(MIB))
        os.fsync(stream.fileno())
    yield file
    file.unlink()


def test_read_speed(big: Path) -> None:
    (big.parent / "small").write_bytes(b"x")
    started = time.monotonic()
    found = storage.measure_storage(storage.probe_storage(Machine(), str(big.parent)), seconds=0.2)
    assert time.monotonic() - started < 5
    assert found.read_bytes_s is not None
    assert found.read_bytes_s > MIB
    assert storage.read_speed(big.parent / "small") is None
    assert storage.read_speed(big.parent / "absent") is None


# Bandwidth


def _cpu() -> Cpu:
    usable = sorted(os.sched_getaffinity(0))
    return Cpu(siblings=tuple(CpuList([cpu]) for cpu in usable), allowed=CpuList(usable))


def test_measured_bandwidth() -> None:
    before = os.sched_getaffinity(0)
    one = Cpu(siblings=_cpu().siblings[:1], allowed=_cpu().allowed)
    found = bandwidth.measure_bandwidth(one, available_bytes=2**30, seconds=0.1)
    assert found is not None
    # Slower than any memory, and faster than any core.
    assert 2e8 < found < 1e12
    assert os.sched_getaffinity(0) == before


def test_bandwidth_needs_room() -> None:
    assert bandwidth.measure_bandwidth(_cpu(), available_bytes=64 * MIB) is None
    assert (
        bandwidth.measure_bandwidth(
            Cpu(siblings=(CpuList.parse("8000"),), allowed=CpuList.parse("8000"))
        )
        is None
    )


def test_bandwidth_of_a_process_that_hangs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "hangs"
    program.write_text("#!/bin/sh\nexec sleep 60\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    monkeypatch.setattr(bandwidth, "_GRACE_S", 0.2)
    began = time.monotonic()
    assert bandwidth.measure_bandwidth(_cpu(), seconds=0.1) is None
    assert time.monotonic() - began < 10


def test_bandwidth_without_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    before = os.sched_getaffinity(0)
    monkeypatch.setattr(sys, "executable", "/nonexistent")
    assert bandwidth.measure_bandwidth(_cpu(), seconds=0.1) is None
    monkeypatch.setattr(sys, "executable", "/bin/true")
    assert bandwidth.measure_bandwidth(_cpu(), seconds=0.1) is None
    assert os.sched_getaffinity(0) == before
