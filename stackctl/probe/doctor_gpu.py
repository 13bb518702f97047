"""What stands in the way of a stack on a GPU: driver, CDI, memory, SELinux."""

from __future__ import annotations

import re
from collections.abc import Iterator

from stackctl.quantity import format_bytes
from stackctl.values.host import Gpu, Host
from stackctl.values.result import Result

#: What images with CUDA 13 need, and the first GPUs that compute in nvfp4.
_OLDEST_DRIVER, _CUDA = 580, "13"
_NVFP4_SINCE = (10, 0)
#: Less free than this part of a GPU: something else holds it.
_FREE_ENOUGH = 0.9
_GENERATE = "sudo nvidia-ctk cdi generate --output=/etc/cdi/nvidia.yaml"


def gpu_findings(host: Host) -> Iterator[Result]:
    """What was looked at for a stack that uses a GPU."""
    for check in (_gpus, _driver, _capability, _cdi, _gpu_memory, _selinux):
        yield from check(host)


def numbers(version: str) -> tuple[int, ...]:
    """The first two numbers of a version."""
    return tuple(int(number) for number in re.findall(r"[0-9]{1,6}", version)[:2])


def _nvidia(host: Host) -> tuple[Gpu, ...]:
    return tuple(gpu for gpu in host.gpus if gpu.driver or (gpu.name or "").startswith("NVIDIA"))


def _gpus(host: Host) -> Iterator[Result]:
    names = ", ".join(gpu.name or f"a GPU at {gpu.pci}" for gpu in host.gpus)
    yield Result(
        name="gpu",
        status="ok" if host.gpus else "fail",
        expected="a GPU",
        actual=names or "none on the PCI bus",
        remedy=None
        if host.gpus
        else "in a virtual machine pass the GPU through; else look with: lspci -nn -d 10de:",
    )


def _driver(host: Host) -> Iterator[Result]:
    if not host.gpus:
        return
    expected = f"NVIDIA driver {_OLDEST_DRIVER} or newer (images with CUDA {_CUDA})"
    version = next((gpu.driver for gpu in host.gpus if gpu.driver), None)
    good = version is not None and numbers(version)[:1] >= (_OLDEST_DRIVER,)
    ubuntu = (host.tools.os or "").startswith("Ubuntu")
    yield Result(
        name="gpu-driver",
        status="ok" if good else "fail",
        expected=expected,
        actual=version or "no driver is loaded",
        remedy=None
        if good
        else f"sudo apt-get install nvidia-driver-{_OLDEST_DRIVER}-server-open && sudo reboot"
        if ubuntu
        else f"install NVIDIA's driver {_OLDEST_DRIVER} or newer, open kernel modules, and reboot",
    )


def _capability(host: Host) -> Iterator[Result]:
    known = [gpu for gpu in _nvidia(host) if gpu.compute_capability]
    if not known:
        return
    weakest = min((gpu.compute_capability or "" for gpu in known), key=numbers)
    good = numbers(weakest) >= _NVFP4_SINCE
    yield Result(
        name="gpu-nvfp4",
        status="ok" if good else "warn",
        expected="compute capability 10.0 or higher (12.0: RTX PRO 6000) computes in nvfp4",
        actual=weakest,
        remedy=None
        if good
        else "nvfp4 models run through Marlin, in 16 bits: choose an fp8, AWQ or GPTQ one",
    )


def _cdi(host: Host) -> Iterator[Result]:
    if not host.gpus:
        return
    expected = "a CDI file that this podman can use names the GPUs"
    unnamed = [gpu for gpu in _nvidia(host) or host.gpus if gpu.cdi is None]
    specs = [spec for spec in host.tools.cdi if spec.problem is None]
    for spec in host.tools.cdi:
        if spec.problem is not None:
            fixed = re.search(r"generate it again|does not exist|cannot be parsed", spec.problem)
            yield Result(
                name="cdi", status="warn" if specs and not unnamed else "fail", expected=expected,
                actual=f"{spec.path}: {spec.problem}",
                evidence=f"podman {host.tools.podman}" if host.tools.podman else None,
                remedy=_cdi_remedy(spec.path, spec.problem) if not fixed else _GENERATE,
            )  # fmt: skip
    if not host.tools.cdi:
        yield Result(
            name="cdi", status="fail", expected=expected,
            actual="no file in /etc/cdi or /run/cdi", remedy=_GENERATE,
        )  # fmt: skip
    elif specs and unnamed:
        missing = ", ".join(gpu.uuid or gpu.name or str(gpu.index) for gpu in unnamed)
        yield Result(
            name="cdi", status="fail", expected=expected, actual=f"no device for {missing}",
            evidence=" ".join(spec.path for spec in specs), remedy=_GENERATE,
        )  # fmt: skip
    elif specs:
        names = " ".join(gpu.cdi for gpu in host.gpus if gpu.cdi)
        yield Result(name="cdi", status="ok", expected=expected, actual=names)


def _cdi_remedy(path: str, problem: str) -> str:
    if "additionalGids" in problem:
        if path.endswith(".json"):
            return "upgrade podman to 5, or delete additionalGids from the file"
        # Its numbers are the only list items in these files that are plain numbers.
        return f"sudo sed -i '/additionalGids:/d; /^ *- [0-9][0-9]*$/d' {path}"
    if "takes neither" in problem:
        return f"sudo rm {path}"
    return "upgrade podman to 5, or write the file with an older nvidia-container-toolkit"


def _gpu_memory(host: Host) -> Iterator[Result]:
    for gpu in host.gpus:
        if gpu.memory_bytes is None or gpu.free_bytes is None:
            continue
        expected = f"{_FREE_ENOUGH:.0%} of GPU {gpu.index} is free"
        actual = f"{format_bytes(gpu.free_bytes)} of {format_bytes(gpu.memory_bytes)}"
        if gpu.free_bytes >= _FREE_ENOUGH * gpu.memory_bytes:
            yield Result(name="gpu-memory", status="ok", expected=expected, actual=actual)
            continue
        holders = sorted(gpu.processes, key=lambda process: -(process.memory_bytes or 0))
        named = "; ".join(
            f"process {process.pid}"
            + (f" ({process.command})" if process.command else "")
            + (f" holds {format_bytes(process.memory_bytes)}" if process.memory_bytes else "")
            for process in holders[:5]
        )
        yield Result(
            name="gpu-memory", status="warn", expected=expected, actual=actual,
            evidence=named or "the driver names no process that holds it",
            remedy="stackctl down STACK if it is a stack of yours"
            + (f", else: kill {holders[0].pid}" if holders else ", else see: nvidia-smi"),
        )  # fmt: skip


def _selinux(host: Host) -> Iterator[Result]:
    if host.tools.selinux != "enforcing":
        return
    yield Result(
        name="selinux",
        status="warn",
        expected="containers may use devices (container_use_devices)",
        actual="SELinux is enforcing",
        evidence="the boolean is off unless it was set; see: getsebool container_use_devices",
        remedy="sudo setsebool -P container_use_devices=true",
    )
