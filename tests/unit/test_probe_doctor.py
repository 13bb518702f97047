"""What stands in the way of a stack, judged from hosts written as values."""

from __future__ import annotations

import re
import subprocess
from typing import Any

import msgspec
import pytest

from stackctl.probe.doctor import findings
from stackctl.requirements import ITEMS
from stackctl.values.cpu_list import CpuList
from stackctl.values.host import (
    UNLIMITED,
    CdiSpec,
    Cpu,
    Gpu,
    GpuProcess,
    Host,
    Limits,
    Memory,
    NumaNode,
    Problem,
    Tools,
)
from stackctl.values.result import Result

GIB = 2**30
NAME = "nvidia.com/gpu=0"
READY = Host(
    scope="user",
    cpu=Cpu(
        cores=16, threads=32, online=CpuList(range(32)), allowed=CpuList(range(32)),
        governor="performance",
        numa=(NumaNode(id=0, cpus=CpuList.parse("0-31")),),
    ),
    memory=Memory(total_bytes=768 * GIB, transparent_hugepages="madvise"),
    gpus=(
        Gpu(index=0, name="NVIDIA X", driver="580.95.05", compute_capability="12.0", cdi=NAME,
            memory_bytes=96 * GIB, free_bytes=95 * GIB),
    ),
    tools=Tools(
        os="Ubuntu 24.04.3 LTS", podman="4.9.3", systemd="255", systemd_running=True,
        quadlet_generator="/usr/lib/systemd/system-generators/podman-system-generator",
        cgroup_version=2, cgroup_controllers=("cpuset", "cpu", "io", "memory", "pids"),
        linger=True, numa_balancing=False, swappiness=10, selinux="disabled", apparmor=True,
        cdi=(CdiSpec(path="/etc/cdi/nvidia.yaml", version="0.5.0", devices=(NAME,)),),
    ),
    limits=Limits(memlock_bytes=UNLIMITED),
)  # fmt: skip
TWO_NODES = (
    NumaNode(id=0, cpus=CpuList.parse("0-15")),
    NumaNode(id=1, cpus=CpuList.parse("16-31")),
)


def changed(**changes: dict[str, Any]) -> Host:
    """READY with some fields of its parts changed: ``tools={"podman": None}``."""
    parts = {
        name: msgspec.structs.replace(getattr(READY, name), **fields)
        for name, fields in changes.items()
    }
    return msgspec.structs.replace(READY, **parts)


def all_needs(host: Host) -> tuple[Result, ...]:
    return findings(host, memlock_bytes=100 * GIB, needs_cpuset=True, needs_gpu=True)


def one(host: Host, name: str, **needs: Any) -> Result:
    found = findings(host, **needs) if needs else all_needs(host)
    (result,) = (result for result in found if result.name == name)
    return result


def test_a_host_that_is_ready() -> None:
    assert {result.status for result in all_needs(READY)} == {"ok"}
    assert all(result.remedy is None for result in all_needs(READY))
    names = [result.name for result in all_needs(READY)]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("changes", "name", "status", "words"),
    [
        ({"tools": {"podman": "4.3.1"}}, "podman", "fail", "upgrade"),
        ({"tools": {"podman": None}}, "podman", "skip", None),
        ({"tools": {"quadlet_generator": None}}, "quadlet", "skip", None),
        ({"tools": {"systemd_running": False}}, "systemd", "fail", "boot"),
        ({"tools": {"cgroup_version": 1}}, "cgroup", "fail", "unified_cgroup_hierarchy"),
        ({"tools": {"linger": False}}, "linger", "warn", 'loginctl enable-linger "$USER"'),
        ({"limits": {"memlock_bytes": 8 << 20}}, "memlock", "warn", "LimitMEMLOCK=infinity"),
        ({"limits": {"memlock_bytes": None}}, "memlock", "skip", None),
        ({"tools": {"cgroup_controllers": ("cpu",)}}, "cpuset", "fail", "Delegate=cpu cpuset"),
        ({"cpu": {"governor": "powersave"}}, "governor", "warn", "scaling_governor"),
        ({"memory": {"transparent_hugepages": "always"}}, "transparent-hugepages", "info", "tee"),
        ({"cpu": {"quota_cpus": 4.0}}, "cpu-quota", "warn", "CPUQuota"),
        ({"cpu": {"allowed": CpuList(range(8))}}, "cpus-allowed", "warn", "AllowedCPUs"),
        ({"memory": {"limit_bytes": GIB}}, "memory-limit", "warn", "MemoryMax"),
        (
            {"tools": {"numa_balancing": True}, "cpu": {"numa": TWO_NODES}},
            "numa-balancing", "warn", "kernel.numa_balancing = 0",
        ),
        ({"tools": {"selinux": "enforcing"}}, "selinux", "warn", "container_use_devices=true"),
        ({"tools": {"cdi": ()}}, "cdi", "fail", "nvidia-ctk cdi generate"),
    ],
)  # fmt: skip
def test_each_obstacle(
    changes: dict[str, dict[str, Any]], name: str, status: str, words: str | None
) -> None:
    result = one(changed(**changes), name)
    assert result.status == status
    assert result.expected
    assert result.actual
    assert result.remedy is None if words is None else words in (result.remedy or "")


@pytest.mark.parametrize(
    ("gpu", "name", "status", "words"),
    [
        ({"driver": "575.51.02"}, "gpu-driver", "fail", "nvidia-driver-580-server-open"),
        ({"driver": None}, "gpu-driver", "fail", "reboot"),
        ({"compute_capability": "9.0"}, "gpu-nvfp4", "warn", "fp8"),
        ({"compute_capability": "10.0"}, "gpu-nvfp4", "ok", None),
        ({"cdi": None}, "cdi", "fail", "nvidia-ctk"),
        ({"free_bytes": 2 * GIB}, "gpu-memory", "warn", "nvidia-smi"),
    ],
)
def test_each_obstacle_of_a_gpu(
    gpu: dict[str, Any], name: str, status: str, words: str | None
) -> None:
    host = msgspec.structs.replace(READY, gpus=(msgspec.structs.replace(READY.gpus[0], **gpu),))
    result = one(host, name)
    assert result.status == status
    assert result.remedy is None if words is None else words in (result.remedy or "")
    # Nothing of it matters to a stack without a GPU.
    assert not any(found.name in ("gpu", "cdi", name) for found in findings(host))


def test_who_holds_the_gpu() -> None:
    held = msgspec.structs.replace(
        READY.gpus[0],
        free_bytes=4 * GIB,
        processes=(GpuProcess(pid=5, memory_bytes=GIB),
                   GpuProcess(pid=77, command="VLLM::EngineCore", memory_bytes=90 * GIB)),
    )  # fmt: skip
    result = one(msgspec.structs.replace(READY, gpus=(held,)), "gpu-memory")
    assert (result.evidence or "").startswith("process 77 (VLLM::EngineCore) holds 90")
    assert (result.remedy or "").endswith("kill 77")


def test_no_gpu_at_all() -> None:
    host = msgspec.structs.replace(READY, gpus=())
    assert one(host, "gpu").status == "fail"
    # What follows from it is not said again.
    assert not {"cdi", "gpu-driver"} & {result.name for result in all_needs(host)}


def test_cdi_files_with_problems() -> None:
    bad = CdiSpec(
        path="/run/cdi/n.yaml",
        devices=(NAME,),
        code="additional-gids",
        problem="it has additionalGids (CDI 0.7.0)",
    )
    result = one(changed(tools={"cdi": (bad,)}), "cdi")
    assert result.status == "fail"
    assert result.actual == "/run/cdi/n.yaml: it has additionalGids (CDI 0.7.0)"
    assert (result.remedy or "").startswith(
        "stackctl provision --only cdi\n# by hand: echo NVIDIA_"
    )
    gone = CdiSpec(
        path="/etc/cdi/n.yaml",
        code="missing-file",
        problem="/dev/nvidia0 does not exist: generate it again",
    )
    both = [found for found in all_needs(changed(tools={"cdi": (*READY.tools.cdi, gone)}))
            if found.name == "cdi"]  # fmt: skip
    assert [found.status for found in both] == ["warn", "ok"]
    assert "nvidia-ctk cdi generate" in (both[0].remedy or "")


@pytest.mark.parametrize(
    ("problem", "remedy"),
    [
        ("it cannot be read", "sudo chmod a+r "),
        ("it has additionalGids (CDI 0.7.0), which podman 4.9.3 cannot parse; delete those lines, "
         "or upgrade podman to 5", "stackctl provision --only cdi"),
        ("it is CDI 0.8.0, podman 4.9.3 parses 0.6 at most; upgrade podman to 5",
         "upgrade podman, or write the file with an older"),
        ("a=b is also in /run/cdi/b.yaml: podman takes neither; remove one file", "sudo rm "),
        ("/dev/nvidia0 does not exist: generate it again", "sudo systemctl restart nvidia-cdi"),
    ],
)  # fmt: skip
def test_cdi_files_of_documents_without_codes(problem: str, remedy: str) -> None:
    bad = CdiSpec(path="/run/cdi/n.yaml", devices=(NAME,), problem=problem)
    assert (one(changed(tools={"cdi": (bad,)}), "cdi").remedy or "").startswith(remedy)


@pytest.mark.parametrize(
    ("podman", "system", "profiles", "words"),
    [
        ("4.9.3", "Debian GNU/Linux 13", ("containers-default-0.57.4", "crun"),
         "containers-default-0.57.4 lacks it"),
        ("4.9.3", "Ubuntu 24.04", ("containers-default-0.57.4", "crun"),
         "containers-default-0.57.4 lacks it"),
        ("5.0.3", "Debian GNU/Linux 13", ("crun",), "the profile of podman 5.0.3 lacks it"),
        ("4.9.3", "Ubuntu 24.04", ("containers-default-0.57.4-apparmor1", "crun"), None),
        # No container has run yet.
        ("4.9.3", "Ubuntu 24.04", ("crun",), None),
        # AppArmor 3 does not confine crun.
        ("4.9.3", "Debian GNU/Linux 12", ("containers-default-0.57.4",), None),
        ("5.4.2", "Debian GNU/Linux 13", ("containers-default-0.62.3", "crun"), None),
    ],
)  # fmt: skip
def test_podman_s_apparmor_profile_lets_crun_stop_containers(
    podman: str, system: str, profiles: tuple[str, ...], words: str | None
) -> None:
    tools = {"podman": podman, "os": system, "apparmor": True, "apparmor_profiles": profiles}
    host = msgspec.structs.replace(changed(tools=tools), scope="system")
    found = [result for result in all_needs(host) if result.name == "apparmor"]
    assert [(one.status, one.actual) for one in found] == ([("warn", words)] if words else [])
    # Rootless containers have no profile.
    for other in (
        msgspec.structs.replace(host, scope="user"),
        msgspec.structs.replace(changed(tools={**tools, "apparmor": False}), scope="system"),
    ):
        assert not [result for result in all_needs(other) if result.name == "apparmor"]


def test_the_most_important_comes_first() -> None:
    host = changed(
        tools={"podman": "4.3.1", "linger": False, "swappiness": 60, "cgroup_version": None},
        cpu={"governor": "powersave"},
    )
    found = findings(host)
    assert [result.status for result in found] == sorted(
        (result.status for result in found), key=["fail", "warn", "info", "skip", "ok"].index
    )
    assert found[0].name == "podman"
    assert one(host, "swappiness", needs_gpu=False).status == "info"
    assert one(host, "swappiness").status == "ok"


def test_fixes_that_the_probe_knows_are_used() -> None:
    # As in documents from before there were codes.
    missing = Problem(what="podman is not installed", why="none", fix="apt-get install podman")
    other = Problem(what="memory size is unknown", why="/proc/meminfo has no usable MemTotal")
    host = changed(tools={"podman": None})
    host = msgspec.structs.replace(host, problems=(missing, other))
    found = all_needs(host)
    assert (found[0].name, found[0].status) == ("podman", "fail")
    assert found[0].remedy == "apt-get install podman"
    # And what no check looks at is not lost.
    assert [(one.status, one.actual) for one in found if one.name == "probe"] == [
        ("warn", "memory size is unknown")
    ]


def test_checks_find_problems_by_their_codes_whatever_the_text() -> None:
    reworded = Problem(code="podman-missing", what="x", why="y", fix="z")
    unknown = Problem(code="memory-size-unknown", what="x", why="other")
    host = changed(tools={"podman": None})
    found = all_needs(msgspec.structs.replace(host, problems=(reworded, unknown)))
    assert (found[0].name, found[0].status, found[0].remedy) == ("podman", "fail", "z")
    assert [(one.name, one.evidence) for one in found if one.actual == "x"] == [
        ("podman", "y"),
        ("probe", "other"),
    ]


def test_system_services_need_no_linger_and_no_drop_ins() -> None:
    host = changed(tools={"linger": None, "cgroup_controllers": ("cpu",)})
    host = msgspec.structs.replace(host, scope="system")
    assert not any(result.name == "linger" for result in all_needs(host))
    assert one(host, "cpuset").remedy is None


def test_an_unknown_host_is_not_a_failure() -> None:
    found = findings(Host(), memlock_bytes=1, needs_cpuset=True)
    assert {result.status for result in found} == {"skip"}


def test_remedies_are_commands_that_a_shell_reads() -> None:
    host = changed(
        tools={"linger": False, "cgroup_controllers": ("cpu",), "numa_balancing": True,
               "swappiness": 60, "selinux": "enforcing", "cdi": ()},
        cpu={"governor": "powersave", "numa": TWO_NODES},
        limits={"memlock_bytes": 1},
        memory={"transparent_hugepages": "always"},
    )  # fmt: skip
    commands = [
        result.remedy
        for result in (*all_needs(host), *findings(host))
        if result.remedy and ("sudo " in result.remedy)
    ]
    assert len(commands) >= 10
    named = set(re.findall(r"provision --only ([a-z-]+)", "\n".join(commands)))
    assert named >= {"memlock", "cpuset", "linger", "governor", "swappiness", "cdi"}
    assert named <= set(ITEMS)
    for command in commands:
        subprocess.run(["sh", "-nc", command], check=True)
