"""What stands in the way of a stack on a GPU: driver, CDI, memory, SELinux."""

from __future__ import annotations

import re
from collections.abc import Iterator

from stackctl.probe.problems import provision
from stackctl.quantity import format_bytes
from stackctl.values.host import CdiProblemCode, Gpu, Host
from stackctl.values.result import Result

#: The first driver of each CUDA, which runs all its minor versions (NVIDIA's CUDA compatibility
#: guide), and what engines' published images hold.
_DRIVERS = {11: 450, 12: 525, 13: 580}
DEFAULT_CUDA = "13"
#: The first GPUs that compute in nvfp4, and the first for which Marlin makes 16 bits of it.
_NVFP4_SINCE, _MARLIN_SINCE = (10, 0), (8, 0)
#: Less free than this part of a GPU: something else holds it.
_FREE_ENOUGH = 0.9
_GENERATE = "sudo nvidia-ctk cdi generate --output=/etc/cdi/nvidia.yaml"
#: Toolkits from 1.18 have a service for the files in /run, which are made anew at each boot.
_REFRESH = "sudo systemctl restart nvidia-cdi-refresh.service"


def gpu_findings(
    host: Host, *, nvfp4: bool | None = None, cuda: str | None = DEFAULT_CUDA
) -> Iterator[Result]:
    """What was looked at for a stack that uses a GPU.

    Args:
        host: the machine; of GPUs only those that matter.
        nvfp4: whether the model is quantised so; None: not known which model.
        cuda: the CUDA of the engine's image; None: unknown, any driver will do.
    """
    yield from _gpus(host)
    yield from _driver(host, cuda)
    yield from _capability(host, nvfp4)
    for check in (_cdi, _gpu_memory, _selinux):
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


def _driver(host: Host, cuda: str | None) -> Iterator[Result]:
    if not host.gpus:
        return
    major = (numbers(cuda or "") or (0,))[0]
    # Of a CUDA to come only this is known: it needs no older driver.
    oldest = _DRIVERS.get(major) or (max(_DRIVERS.values()) if major > max(_DRIVERS) else 0)
    expected = f"NVIDIA driver {oldest} or newer (the image has CUDA {cuda})"
    if not oldest:
        expected = "an NVIDIA driver"
    version = next((gpu.driver for gpu in host.gpus if gpu.driver), None)
    good = version is not None and numbers(version)[:1] >= (oldest,)
    install = oldest or _DRIVERS[13]
    ubuntu = (host.tools.os or "").startswith("Ubuntu")
    yield Result(
        name="gpu-driver",
        status="ok" if good else "fail",
        expected=expected,
        actual=version or "no driver is loaded",
        remedy=None
        if good
        else f"sudo apt-get install nvidia-driver-{install}-server-open && sudo reboot"
        if ubuntu
        else f"install NVIDIA's driver {install} or newer, open kernel modules, and reboot",
    )


def _capability(host: Host, nvfp4: bool | None) -> Iterator[Result]:
    known = [gpu for gpu in _nvidia(host) if gpu.compute_capability]
    if not known or nvfp4 is False:
        return
    weakest = min((gpu.compute_capability or "" for gpu in known), key=numbers)
    good = numbers(weakest) >= _NVFP4_SINCE
    yield Result(
        name="gpu-nvfp4",
        status="ok" if good else "fail" if nvfp4 and numbers(weakest) < _MARLIN_SINCE else "warn",
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
            yield Result(
                name="cdi", status="warn" if specs and not unnamed else "fail", expected=expected,
                actual=f"{spec.path}: {spec.problem}",
                evidence=f"podman {host.tools.podman}" if host.tools.podman else None,
                remedy=_cdi_remedy(spec.path, spec.code),
            )  # fmt: skip
    if not host.tools.cdi:
        yield Result(
            name="cdi", status="fail", expected=expected,
            actual="no file in /etc/cdi or /run/cdi", remedy=provision("cdi", _GENERATE),
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


def _cdi_remedy(path: str, code: CdiProblemCode | None) -> str:
    if code == "unreadable":
        return f"sudo chmod a+r {path}"
    if code == "additional-gids":
        if path.endswith(".json"):
            return "upgrade podman to 5, or delete additionalGids from the file"
        # Its numbers are the only list items in these files that are plain numbers.
        return f"sudo sed -i '/additionalGids:/d; /^ *- [0-9][0-9]*$/d' {path}"
    if code == "duplicate-device":
        return f"sudo rm {path}"
    if code == "newer-cdi":
        return "upgrade podman to 5, or write the file with an older nvidia-container-toolkit"
    return _REFRESH if path.startswith(("/run/", "/var/run/")) else _GENERATE


def _gpu_memory(host: Host) -> Iterator[Result]:
    for gpu in host.gpus:
        if gpu.memory_bytes is None or gpu.free_bytes is None:
            continue
        expected = f"{_FREE_ENOUGH:.0%} of GPU {gpu.index} is free"
        actual = f"{format_bytes(gpu.free_bytes)} of {format_bytes(gpu.memory_bytes)}"
        if gpu.free_bytes >= _FREE_ENOUGH * gpu.memory_bytes:
            yield Result(name="gpu-memory", status="ok", expected=expected, actual=actual)
            continue
        biggest = max(gpu.processes, key=lambda process: process.memory_bytes or 0, default=None)
        yield Result(
            name="gpu-memory", status="warn", expected=expected, actual=actual,
            evidence=holders(gpu) or "the driver names no process that holds it",
            remedy="stackctl down STACK if it is a stack of yours"
            + (f", else: kill {biggest.pid}" if biggest else ", else see: nvidia-smi"),
        )  # fmt: skip


def holders(gpu: Gpu) -> str:
    """Who holds memory of a GPU, most first, in words; empty when the driver names nobody."""
    most_first = sorted(gpu.processes, key=lambda process: -(process.memory_bytes or 0))
    return "; ".join(
        f"process {process.pid}"
        + (f" ({process.command})" if process.command else "")
        + (f" holds {format_bytes(process.memory_bytes)}" if process.memory_bytes else "")
        for process in most_first[:5]
    )


def _selinux(host: Host) -> Iterator[Result]:
    if host.tools.selinux != "enforcing":
        return
    may = host.tools.selinux_devices
    said = {True: "they may", False: "they may not", None: "SELinux is enforcing"}
    yield Result(
        name="selinux",
        status="ok" if may else "warn",
        expected="containers may use devices (container_use_devices)",
        actual=said[may],
        evidence="the boolean is off unless it was set; see: getsebool container_use_devices"
        if may is None
        else None,
        remedy=None if may else "sudo setsebool -P container_use_devices=true",
    )
