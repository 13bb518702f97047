"""GPUs: their presence, driver, number formats and free memory, and the permission to use them."""

from __future__ import annotations

import re
from collections.abc import Iterator

from stackctl.quantity import format_bytes, version_numbers
from stackctl.requirements.facts import MachineFacts, StackNeeds
from stackctl.requirements.requirement import ProvisionItem, Requirement
from stackctl.values.host import Gpu, Host
from stackctl.values.provision import HoldChange, ItemPlan
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
#: Packages of NVIDIA's driver. If one is newer than the loaded driver, no GPU is found.
_DRIVER = re.compile(
    r"(nvidia-(driver|dkms|kernel|utils|compute|firmware|settings|persistenced|modprobe|open)"
    r"|libnvidia-|xserver-xorg-video-nvidia|cuda-drivers)[\w.+-]*"
)


class GpuPresent(Requirement):
    """The machine has a GPU."""

    name = "gpu"

    def check(self, host: Host, needs: StackNeeds) -> Iterator[Result]:
        """Yield a finding with the names of the GPUs."""
        if not needs.gpu:
            return
        names = ", ".join(gpu.name or f"a GPU at {gpu.pci}" for gpu in host.gpus)
        yield self.judge(
            bool(host.gpus), names or "none on the PCI bus", expected="a GPU",
            remedy="in a virtual machine pass the GPU through; else look with: lspci -nn -d 10de:",
        )  # fmt: skip


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
        remedy = f"install NVIDIA's driver {install} or newer, open kernel modules, and reboot"
        if (host.tools.os or "").startswith("Ubuntu"):
            remedy = f"sudo apt-get install nvidia-driver-{install}-server-open && sudo reboot"
        yield self.judge(good, version or "no driver is loaded", expected=expected, remedy=remedy)


class GpuNvfp4(Requirement):
    """The weakest GPU computes in nvfp4, if the model may need it."""

    name = "gpu-nvfp4"

    def check(self, host: Host, needs: StackNeeds) -> Iterator[Result]:
        """Yield a finding with the lowest compute capability, unless the model is not nvfp4."""
        known = [gpu for gpu in nvidia_gpus(host) if gpu.compute_capability]
        if not needs.gpu or not known or needs.nvfp4 is False:
            return
        weakest = min((gpu.compute_capability or "" for gpu in known), key=version_numbers)
        impossible = needs.nvfp4 and version_numbers(weakest) < _MARLIN_SINCE
        yield self.judge(
            version_numbers(weakest) >= _NVFP4_SINCE, weakest,
            expected="compute capability 10.0 or higher (12.0: RTX PRO 6000) computes in nvfp4",
            otherwise="fail" if impossible else "warn",
            remedy="nvfp4 models run through Marlin, in 16 bits: choose an fp8, AWQ or GPTQ one",
        )  # fmt: skip


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
            most = max(gpu.processes, key=lambda process: process.memory_bytes or 0, default=None)
            yield self.judge(
                gpu.free_bytes >= _FREE_ENOUGH * gpu.memory_bytes, actual, expected=expected,
                otherwise="warn",
                evidence=gpu_memory_users(gpu) or "the driver names no process that holds it",
                remedy="stackctl down STACK if it is a stack of yours"
                + (f", else: kill {most.pid}" if most else ", else see: nvidia-smi"),
            )  # fmt: skip


class DriverHold(ProvisionItem):
    """The GPU's driver is not updated until a person releases its packages."""

    name = "driver-hold"
    why = "an update beside the loaded driver takes the GPU away until the next boot"

    def unneeded(self, facts: MachineFacts, needs: StackNeeds) -> str | None:
        """Return the reason if no GPU is used, or if there is none; else None."""
        if needs.gpu and facts.host.gpus:
            return None
        return "no GPU is used" if facts.host.gpus else "no GPU"

    def changes(self, facts: MachineFacts, needs: StackNeeds) -> ItemPlan:  # noqa: ARG002
        """Return the plan that holds the driver's packages."""
        found = tuple(sorted(n for n in facts.packages or () if _DRIVER.fullmatch(n)))
        if not found:
            return self.skipped("the driver did not come from the distribution's packages")
        loose = tuple(name for name in found if name not in facts.held)
        if not loose:
            return self.already_set(f"{len(found)} packages are held")
        now = f"{len(loose)} packages may be updated at any time"
        return self.planned(now, "releases them", HoldChange(names=loose))


class SelinuxDevices(ProvisionItem):
    """The policy lets containers use devices; only the administrator may change the policy."""

    name = "selinux"
    why = "under SELinux containers may use a GPU only where a boolean says so"

    def check(self, host: Host, needs: StackNeeds) -> Iterator[Result]:
        """Yield a finding with the boolean, if SELinux is enforcing."""
        if not needs.gpu or host.tools.selinux != "enforcing":
            return
        may = host.tools.selinux_devices
        unset = "the boolean is off unless it was set; see: getsebool container_use_devices"
        yield self.judge(
            may is True,
            {True: "they may", False: "they may not", None: "SELinux is enforcing"}[may],
            expected="containers may use devices (container_use_devices)", otherwise="warn",
            evidence=unset if may is None else None,
            remedy="sudo setsebool -P container_use_devices=true",
        )  # fmt: skip

    def unneeded(self, facts: MachineFacts, needs: StackNeeds) -> str | None:
        """Return the reason if the boolean has no effect; else None."""
        if not needs.gpu or not facts.host.gpus or facts.host.tools.selinux != "enforcing":
            return "not enforcing, or no GPU is used"
        return None

    def changes(self, facts: MachineFacts, needs: StackNeeds) -> ItemPlan:
        """Return a refusal with the command for the administrator, unless the boolean is on."""
        (state,) = self.check(facts.host, needs)
        if state.status == "ok":
            return self.already_set(state.actual or "")
        return self.refused(f"SELinux: {state.actual}", state.remedy)


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
