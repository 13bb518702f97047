"""GPUs before a launch: what the host lacks is refused with the remedy, from facts and in proof."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
from samples import CARD, EPYC_GPU, GEMMA, LATENCY, plan, shipped, shipped_model

from stackctl.deploy import gpu_access
from stackctl.errors import ExitCode, StackctlError
from stackctl.machine.machine import RecordedMachine
from stackctl.machine.podman import cuda_version
from stackctl.probe.cdi import check_cdi_file
from stackctl.probe.fact_reader import FactReader
from stackctl.probe.tools import selinux_devices
from stackctl.requirements import gpu_findings
from stackctl.values.host import CdiSpec, GpuProcess, Host

NVFP4 = shipped("gpu-nvfp4")
ON_GPU = plan(EPYC_GPU, shipped_model(NVFP4), NVFP4)
NAME = "nvidia.com/gpu=0"
SPEC = CdiSpec(path="/etc/cdi/nvidia.yaml", version="0.5.0", devices=(NAME,))
RECORDED = Path(__file__).parents[1] / "machines/nvidia-cdi.yaml"


def host(*, cdi: tuple[CdiSpec, ...] = (SPEC,), tools: Any = None, **card: Any) -> Host:
    """The reference machine with its GPU usable, but for what is given."""
    usable = NAME if any(spec.problem is None for spec in cdi) else None
    made = msgspec.structs.replace(CARD, **{"driver": "580.95.05", "cdi": usable, **card})
    changed = msgspec.structs.replace(EPYC_GPU.tools, cdi=cdi, **(tools or {}))
    return msgspec.structs.replace(EPYC_GPU, gpus=(made,), tools=changed)


def recorded(folder: Path, files: dict[str, str]) -> FactReader:
    """A machine of which only those files are known."""
    (folder / "proc").mkdir()
    for path, text in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
    return FactReader(RecordedMachine(folder))


def test_nothing_is_asked_of_a_plan_without_gpus() -> None:
    on_cpu = plan(EPYC_GPU, GEMMA, LATENCY)
    assert gpu_access.require_gpus(host(cdi=(), driver=None), on_cpu) == ()


def test_a_usable_gpu_passes() -> None:
    assert gpu_access.require_gpus(host(tools={"selinux": "disabled"}), ON_GPU) == ()


@pytest.mark.parametrize(
    ("made", "code", "words", "remedy"),
    [
        (host(driver=None), 6, "no driver is loaded", "reboot"),
        (host(driver="570.86.10"), 6, "570.86.10", "580"),
        (host(cdi=()), 6, "no file in /etc/cdi", "nvidia-ctk cdi generate"),
        (
            host(cdi=(CdiSpec(path="/etc/cdi/n.yaml", code="unreadable",
                              problem="it cannot be read"),)),
            6, "/etc/cdi/n.yaml: it cannot be read", "sudo chmod a+r /etc/cdi/n.yaml",
        ),
        (
            host(cdi=(CdiSpec(path="/run/cdi/n.yaml",
                              code="other-driver",
                              problem="it is for driver 1, loaded is 2: generate it again"),)),
            6, "it is for driver 1", "systemctl restart nvidia-cdi-refresh",
        ),
        (
            host(cdi=(CdiSpec(path="/etc/cdi/n.yaml", code="unparsable",
                              problem="it cannot be parsed: x"),)),
            6, "cannot be parsed", "nvidia-ctk cdi generate",
        ),
        (host(compute_capability="7.5"), 5, "7.5", "fp8"),
    ],
)  # fmt: skip
def test_what_is_missing_is_refused(made: Host, code: int, words: str, remedy: str) -> None:
    with pytest.raises(StackctlError) as caught:
        gpu_access.require_gpus(made, ON_GPU)
    assert caught.value.exit_code == code
    assert words in caught.value.message
    assert remedy in (caught.value.hint or "")


def test_cdi_0_7_is_refused_on_podman_4_9_3(tmp_path: Path) -> None:
    text = RECORDED.read_text().replace("cdiVersion: 0.5.0", "cdiVersion: 0.7.0")
    text = text.replace("  hooks:", "  additionalGids:\n  - 44\n  hooks:")
    reader = recorded(tmp_path, {})
    spec = check_cdi_file(reader, "/etc/cdi/nvidia.yaml", text, "4.9.3")
    with pytest.raises(StackctlError) as caught:
        gpu_access.require_gpus(host(cdi=(spec,), tools={"podman": "4.9.3"}), ON_GPU)
    assert caught.value.exit_code == ExitCode.HOST
    assert "additionalGids (CDI 0.7.0), which podman 4.9.3 cannot parse" in caught.value.message
    variable = "NVIDIA_CTK_CDI_GENERATE_FEATURE_FLAGS=no-additional-gids-for-device-nodes"
    command = f"sudo {variable} nvidia-ctk cdi generate --output=/etc/cdi/nvidia.yaml"
    assert caught.value.hint == command
    assert check_cdi_file(reader, "/etc/cdi/nvidia.yaml", text, "5.4.2").problem is None


def test_a_cdi_file_of_another_driver_is_stale(tmp_path: Path) -> None:
    version = "sys/module/nvidia/version"
    reader = recorded(tmp_path, {version: "590.44.01\n"})
    spec = check_cdi_file(reader, "/etc/cdi/nvidia.yaml", RECORDED.read_text(), "5.4.2")
    assert spec.problem is not None
    assert "for driver 580.95.05, loaded is 590.44.01" in spec.problem
    (tmp_path / version).write_text("580.95.05\n")
    again = FactReader(RecordedMachine(tmp_path))
    assert (
        check_cdi_file(again, "/etc/cdi/nvidia.yaml", RECORDED.read_text(), "5.4.2").problem is None
    )


@pytest.mark.parametrize(("said", "may"), [("1 1\n", True), ("0 0\n", False), (None, None)])
def test_the_selinux_boolean(tmp_path: Path, said: str | None, may: bool | None) -> None:
    path = "sys/fs/selinux/booleans/container_use_devices"
    assert selinux_devices(recorded(tmp_path, {path: said} if said else {})) is may
    made = host(tools={"selinux": "enforcing", "selinux_devices": may})
    (found,) = (one for one in gpu_findings(made) if one.name == "selinux")
    assert (found.status, found.remedy is None) == (("ok", True) if may else ("warn", False))


@pytest.mark.parametrize(
    ("cuda", "driver", "status"),
    [
        ("12.8.1", "570.86.10", "ok"), ("12.8.1", "520.61", "fail"),
        ("13.0.2", "570.86.10", "fail"),
        ("14.0", "570.86.10", "fail"), (None, "470.1", "ok"), (None, None, "fail"),
    ],
)  # fmt: skip
def test_the_driver_is_judged_by_the_cuda_of_the_image(
    cuda: str | None, driver: str | None, status: str
) -> None:
    found = [
        one for one in gpu_findings(host(driver=driver), cuda=cuda) if one.name == "gpu-driver"
    ]
    assert [one.status for one in found] == [status]


@pytest.mark.parametrize(
    ("nvfp4", "capability", "status"),
    [
        (True, "12.0", ["ok"]), (True, "9.0", ["warn"]), (True, "7.5", ["fail"]),
        (None, "7.5", ["warn"]), (False, "7.5", []),
    ],
)  # fmt: skip
def test_nvfp4_is_asked_of_a_gpu_by_such_models_only(
    nvfp4: bool | None, capability: str, status: list[str]
) -> None:
    found = gpu_findings(host(compute_capability=capability), nvfp4=nvfp4)
    assert [one.status for one in found if one.name == "gpu-nvfp4"] == status


@pytest.mark.parametrize(
    ("environment", "cuda"),
    [
        (["PATH=/bin", "CUDA_VERSION=13.0.2"], "13.0.2"),
        (["NVIDIA_REQUIRE_CUDA=cuda>=12.8 brand=tesla,driver>=535,driver<536"], "12.8"),
        (["NVIDIA_REQUIRE_CUDA=brand=tesla", "CUDA_VERSION="], None),
        ([], None),
    ],
)
def test_the_cuda_of_an_image(environment: list[str], cuda: str | None) -> None:
    assert cuda_version(environment) == cuda


@pytest.mark.parametrize(
    ("said", "cause", "remedy"),
    [
        ("Error: setting up CDI devices: unresolvable CDI devices nvidia.com/gpu=0",
         "finds no device nvidia.com/gpu=0", "nvidia-ctk cdi generate"),
        ("Error: stat /dev/nvidia0: no such file or directory",
         "a CDI file names /dev/nvidia0, which is not there", "nvidia-ctk cdi generate"),
        ("Error: crun: cannot stat `/usr/lib/libcuda.so.580.95.05`: No such file or directory",
         "names /usr/lib/libcuda.so.580.95.05, which", "nvidia-ctk cdi generate"),
        ("Error: crun: open `/dev/nvidia0`: Permission denied: OCI permission denied",
         "may not use /dev/nvidia0", "ls -l /dev/nvidia0"),
        ("Error: crun: error executing hook `/usr/bin/nvidia-cdi-hook` (exit code: 1)",
         "the hook that a CDI file names fails", "install nvidia-container-toolkit"),
        ("Error: something new", "cannot make a container with the GPU", "podman info"),
    ],
)  # fmt: skip
def test_what_podman_says_is_explained(said: str, cause: str, remedy: str) -> None:
    found = gpu_access.explain_device_error(said, "sudo nvidia-ctk cdi generate")
    assert cause in found[0]
    assert remedy in found[1]


def test_who_holds_the_gpu_is_named_when_there_is_no_room() -> None:
    from stackctl.deploy.preflight import require_free_memory

    held = GpuProcess(pid=4711, command="python3", memory_bytes=90 * 2**30)
    with pytest.raises(StackctlError) as caught:
        require_free_memory(host(free_bytes=2**30, processes=(held,)), ON_GPU, None)
    assert caught.value.exit_code == ExitCode.REFUSED
    assert "process 4711 (python3) holds 90 GiB" in (caught.value.hint or "")
