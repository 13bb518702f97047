"""Requirements of the host, one class each.

A class has the problems that a launch would meet, the findings of ``doctor``, and the changes by
which ``provision`` fulfils it. The classes are pure: probe/ and provision/ read the facts.
"""

from __future__ import annotations

from collections.abc import Iterator

from stackctl.requirements import (
    accounts,
    cdi,
    gpu,
    kernel_settings,
    podman,
    program,
    systemd,
    user_managers,
)
from stackctl.requirements.facts import StackNeeds
from stackctl.requirements.requirement import ProvisionItem, Requirement
from stackctl.values.host import Host
from stackctl.values.result import Result

_GPU: tuple[Requirement, ...] = (
    gpu.GpuPresent(), gpu.GpuDriver(), gpu.GpuNvfp4(), gpu.DriverHold(), cdi.CdiFiles(),
    gpu.GpuMemory(), gpu.SelinuxDevices(),
)  # fmt: skip
#: All requirements, in the order in which a launch meets them and provisioning fulfils them: each
#: makes the following ones possible. Limits come before lingering, so that the manager that
#: lingering starts has them from the beginning.
REQUIREMENTS: tuple[Requirement, ...] = (
    program.RecordedCommands(),
    podman.PodmanVersion(), podman.QuadletGenerator(), podman.ContainerProfile(),
    systemd.SystemdRunning(), systemd.CgroupVersion(),
    accounts.ServiceAccount(), accounts.SubordinateIds(),
    user_managers.CpusetController(), user_managers.MemlockLimit(),
    accounts.Lingering(),
    systemd.CpuQuota(), systemd.AllowedCpus(), systemd.MemoryLimit(),
    kernel_settings.NumaBalancing(), kernel_settings.TransparentHugepages(),
    kernel_settings.Swappiness(), kernel_settings.FrequencyGovernor(),
    program.ModelsFolder(),
    *_GPU,
    program.InstalledProgram(), program.GuardTimer(),
)  # fmt: skip
#: The requirements that ``stackctl provision`` can fulfil, by name.
ITEMS: dict[str, ProvisionItem] = {
    requirement.name: requirement
    for requirement in REQUIREMENTS
    if isinstance(requirement, ProvisionItem)
}


def gpu_findings(
    host: Host, *, nvfp4: bool | None = None, cuda: str | None = gpu.DEFAULT_CUDA
) -> Iterator[Result]:
    """Yield the findings for a stack that uses a GPU.

    Args:
        host: the machine, with only the GPUs that the stack uses.
        nvfp4: the model is quantised to nvfp4; None: the model is unknown.
        cuda: the CUDA of the engine's image; None: unknown, so any driver is accepted.
    """
    needs = StackNeeds(nvfp4=nvfp4, cuda=cuda)
    for requirement in _GPU:
        yield from requirement.check(host, needs)
