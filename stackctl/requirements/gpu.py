"""The GPU: its presence, its driver, its number formats and its free memory."""

from __future__ import annotations

from collections.abc import Iterator

from stackctl.quantity import format_bytes, version_numbers
from stackctl.requirements.facts import StackNeeds
from stackctl.requirements.requirement import Requirement
from stackctl.values.host import Gpu, Host
from stackctl.values.result import Result

#: The oldest driver for each major version of CUDA, which runs all minor versions too (NVIDIA's
#: CUDA compatibility guide), and the CUDA in the published images of engines.
_DRIVERS = {11: 450, 12: 525, 13: 580}
DEFAULT_CUDA = "13"
#: The lowest compute capability that computes in nvfp4, and the lowest with which Marlin computes
#: nvfp4 weights in 16 bits.
_NVFP4_SINCE, _MARLIN_SINCE = (10, 0), (8, 0)
#: If a smaller share of a GPU's memory is free, another program uses the GPU.
_FREE_ENOUGH = 0.9


class GpuPresent(Requirement):
    """The machine has a GPU."""

    name = "gpu"

    def check(self, host: Host, needs: StackNeeds) -> Iterator[Result]:
        """Yield a finding with the names of the GPUs."""
        if not needs.gpu:
            return
        names = ", ".join(gpu.name or f"a GPU at {gpu.pci}" for gpu in host.gpus)
        yield self.result(
            "ok" if host.gpus else "fail",
            names or "none on the PCI bus",
            expected="a GPU",
            remedy=None
            if host.gpus
            else "in a virtual machine pass the GPU through; else look with: lspci -nn -d 10de:",
        )


class GpuDriver(Requirement):
    """The loaded driver runs the CUDA of the engine's image."""

    name = "gpu-driver"

    def check(self, host: Host, needs: StackNeeds) -> Iterator[Result]:
        """Yield a finding with the driver's version and the oldest one for the image's CUDA."""
        if not needs.gpu or not host.gpus:
            return
        major = (version_numbers(needs.cuda or "") or (0,))[0]
        # A CUDA that is newer than the table needs at least the newest driver of the table.
        oldest = _DRIVERS.get(major) or (max(_DRIVERS.values()) if major > max(_DRIVERS) else 0)
        expected = f"NVIDIA driver {oldest} or newer (the image has CUDA {needs.cuda})"
        if not oldest:
            expected = "an NVIDIA driver"
        version = next((gpu.driver for gpu in host.gpus if gpu.driver), None)
        good = version is not None and version_numbers(version)[:1] >= (oldest,)
        install = oldest or _DRIVERS[int(DEFAULT_CUDA)]
        ubuntu = (host.tools.os or "").startswith("Ubuntu")
        yield self.result(
            "ok" if good else "fail",
            version or "no driver is loaded",
            expected=expected,
            remedy=None
            if good
            else f"sudo apt-get install nvidia-driver-{install}-server-open && sudo reboot"
            if ubuntu
            else f"install NVIDIA's driver {install} or newer, open kernel modules, and reboot",
        )


class GpuNvfp4(Requirement):
    """The weakest GPU computes in nvfp4, if the model may need it."""

    name = "gpu-nvfp4"

    def check(self, host: Host, needs: StackNeeds) -> Iterator[Result]:
        """Yield a finding with the lowest compute capability, unless the model is not nvfp4."""
        known = [gpu for gpu in nvidia_gpus(host) if gpu.compute_capability]
        if not needs.gpu or not known or needs.nvfp4 is False:
            return
        weakest = min((gpu.compute_capability or "" for gpu in known), key=version_numbers)
        good = version_numbers(weakest) >= _NVFP4_SINCE
        impossible = needs.nvfp4 and version_numbers(weakest) < _MARLIN_SINCE
        yield self.result(
            "ok" if good else "fail" if impossible else "warn",
            weakest,
            expected="compute capability 10.0 or higher (12.0: RTX PRO 6000) computes in nvfp4",
            remedy=None
            if good
            else "nvfp4 models run through Marlin, in 16 bits: choose an fp8, AWQ or GPTQ one",
        )


class GpuMemory(Requirement):
    """Nearly all memory of each GPU is free."""

    name = "gpu-memory"

    def check(self, host: Host, needs: StackNeeds) -> Iterator[Result]:
        """Yield a finding for each GPU: free and total memory, and the processes that hold some."""
        for gpu in host.gpus if needs.gpu else ():
            if gpu.memory_bytes is None or gpu.free_bytes is None:
                continue
            expected = f"{_FREE_ENOUGH:.0%} of GPU {gpu.index} is free"
            actual = f"{format_bytes(gpu.free_bytes)} of {format_bytes(gpu.memory_bytes)}"
            if gpu.free_bytes >= _FREE_ENOUGH * gpu.memory_bytes:
                yield self.result("ok", actual, expected=expected)
                continue
            most = max(gpu.processes, key=lambda process: process.memory_bytes or 0, default=None)
            yield self.result(
                "warn", actual, expected=expected,
                evidence=gpu_memory_users(gpu) or "the driver names no process that holds it",
                remedy="stackctl down STACK if it is a stack of yours"
                + (f", else: kill {most.pid}" if most else ", else see: nvidia-smi"),
            )  # fmt: skip


def nvidia_gpus(host: Host) -> tuple[Gpu, ...]:
    """Return the GPUs that NVIDIA made."""
    return tuple(gpu for gpu in host.gpus if gpu.driver or (gpu.name or "").startswith("NVIDIA"))


def gpu_memory_users(gpu: Gpu) -> str:
    """Describe up to five processes that hold memory of a GPU, largest first; may be empty."""
    most_first = sorted(gpu.processes, key=lambda process: -(process.memory_bytes or 0))
    return "; ".join(
        f"process {process.pid}"
        + (f" ({process.command})" if process.command else "")
        + (f" holds {format_bytes(process.memory_bytes)}" if process.memory_bytes else "")
        for process in most_first[:5]
    )
