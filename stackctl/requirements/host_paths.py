"""Paths and names of files, settings, units and packages that requirements use."""

from __future__ import annotations

DELEGATE = "user@.service.d/10-stackctl-delegate.conf"
MEMLOCK = "user@.service.d/10-stackctl-memlock.conf"
CDI_SERVICE = "system/stackctl-cdi-refresh.service"
CDI_DROP_IN = "system/nvidia-cdi-refresh.service.d/10-stackctl.conf"
NUMA = "sysctl.d/90-stackctl-numa-balancing.conf"
SWAPPINESS = "sysctl.d/90-stackctl-swappiness.conf"
HUGEPAGES = "tmpfiles.d/stackctl-transparent-hugepages.conf"
GOVERNOR = "tmpfiles.d/stackctl-governor.conf"
#: Shipped files (below systemd/) and the paths at which they are installed.
FILES = {
    **{name: f"/etc/systemd/system/{name}" for name in (DELEGATE, MEMLOCK)},
    **{name: f"/etc/systemd/{name}" for name in (CDI_SERVICE, CDI_DROP_IN)},
    **{name: f"/etc/{name}" for name in (NUMA, SWAPPINESS, HUGEPAGES, GOVERNOR)},
}

NUMA_SETTING = "/proc/sys/kernel/numa_balancing"
SWAPPINESS_SETTING = "/proc/sys/vm/swappiness"
HUGEPAGES_SETTING = "/sys/kernel/mm/transparent_hugepage/enabled"
GOVERNOR_SETTINGS = "/sys/devices/system/cpu/cpu[0-9]*/cpufreq/scaling_governor"
SETTINGS = (NUMA_SETTING, SWAPPINESS_SETTING, HUGEPAGES_SETTING, GOVERNOR_SETTINGS)

MODELS = "/srv/models"
GUARD_TIMER = "/etc/systemd/system/stackctl-guard.timer"
PROGRAM_FOLDER = "/usr/local/lib/stackctl"
#: The folder is in the search path of sudo and of services.
LINK = "/usr/local/bin/stackctl"
LINKS = (LINK, "/usr/bin/stackctl")

TOOLKIT = "nvidia-container-toolkit"
#: Variables of the toolkit's refresh service, which overrule its drop-ins (systemd.exec(5)).
CDI_VARIABLES = "/etc/nvidia-container-toolkit/nvidia-cdi-refresh.env"
CDI_FLAGS = "NVIDIA_CTK_CDI_GENERATE_FEATURE_FLAGS"
CDI_UNITS = (
    "nvidia-cdi-refresh.path",
    "nvidia-cdi-refresh.service",
    "stackctl-cdi-refresh.service",
)
UNIT_FOLDERS = ("/etc/systemd/system", "/usr/lib/systemd/system", "/lib/systemd/system")
