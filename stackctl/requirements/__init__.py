"""Requirements of the host, one class each.

A class has the problems that a launch would meet, the findings of ``doctor``, and the changes by
which ``provision`` fulfils it. The classes are pure: probe/ and provision/ read the facts.
"""

from __future__ import annotations

from collections.abc import Iterator

from stackctl.requirements.accounts import Lingering, ServiceAccount, SubordinateIds
from stackctl.requirements.cdi import CdiFiles
from stackctl.requirements.facts import StackNeeds
from stackctl.requirements.gpu import (
    DEFAULT_CUDA,
    DriverHold,
    GpuDriver,
    GpuMemory,
    GpuNvfp4,
    GpuPresent,
    SelinuxDevices,
)
from stackctl.requirements.kernel_settings import (
    FrequencyGovernor,
    NumaBalancing,
    Swappiness,
    TransparentHugepages,
)
from stackctl.requirements.podman import ContainerProfile, PodmanVersion, QuadletGenerator
from stackctl.requirements.program import GuardTimer, InstalledProgram, ModelsFolder
from stackctl.requirements.recording import RecordedCommands
from stackctl.requirements.requirement import ProvisionItem, Requirement
from stackctl.requirements.systemd import (
    AllowedCpus,
    CgroupVersion,
    CpuQuota,
    MemoryLimit,
    SystemdRunning,
)
from stackctl.requirements.user_managers import CpusetController, MemlockLimit
from stackctl.values.host import Host
from stackctl.values.result import Result

_GPU: tuple[Requirement, ...] = (
    GpuPresent(), GpuDriver(), GpuNvfp4(), DriverHold(), CdiFiles(), GpuMemory(), SelinuxDevices(),
)  # fmt: skip
#: All requirements, in the order in which a launch meets them and provisioning fulfils them: each
#: makes the following ones possible. Limits come before lingering, so that the manager that
#: lingering starts has them from the beginning.
REQUIREMENTS: tuple[Requirement, ...] = (
    RecordedCommands(),
    PodmanVersion(),
    QuadletGenerator(),
    ContainerProfile(),
    SystemdRunning(),
    CgroupVersion(),
    ServiceAccount(),
    SubordinateIds(),
    CpusetController(),
    MemlockLimit(),
    Lingering(),
    CpuQuota(),
    AllowedCpus(),
    MemoryLimit(),
    NumaBalancing(),
    TransparentHugepages(),
    Swappiness(),
    FrequencyGovernor(),
    ModelsFolder(),
    *_GPU,
    InstalledProgram(),
    GuardTimer(),
)
#: The requirements that ``stackctl provision`` can fulfil, by name.
ITEMS: dict[str, ProvisionItem] = {
    requirement.name: requirement
    for requirement in REQUIREMENTS
    if isinstance(requirement, ProvisionItem)
}


def gpu_findings(
    host: Host, *, nvfp4: bool | None = None, cuda: str | None = DEFAULT_CUDA
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
