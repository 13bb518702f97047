"""Paths and names of files, settings, units and packages that requirements use."""

from __future__ import annotations

#: Shipped files (below systemd/) and the paths at which they are installed.
FILES = {
    name: f"/etc/{'systemd/' if name.startswith('system') or '@' in name else ''}{place}"
    for name, place in (
        ("user@.service.d/10-stackctl-delegate.conf",
         "system/user@.service.d/10-stackctl-delegate.conf"),
        ("user@.service.d/10-stackctl-memlock.conf",
         "system/user@.service.d/10-stackctl-memlock.conf"),
        ("system/stackctl-cdi-refresh.service", "system/stackctl-cdi-refresh.service"),
        ("system/nvidia-cdi-refresh.service.d/10-stackctl.conf",
         "system/nvidia-cdi-refresh.service.d/10-stackctl.conf"),
        ("sysctl.d/90-stackctl-numa-balancing.conf", "sysctl.d/90-stackctl-numa-balancing.conf"),
        ("sysctl.d/90-stackctl-swappiness.conf", "sysctl.d/90-stackctl-swappiness.conf"),
        ("tmpfiles.d/stackctl-transparent-hugepages.conf",
         "tmpfiles.d/stackctl-transparent-hugepages.conf"),
        ("tmpfiles.d/stackctl-governor.conf", "tmpfiles.d/stackctl-governor.conf"),
    )
}  # fmt: skip
DELEGATE, MEMLOCK, CDI_SERVICE, CDI_DROP_IN, NUMA, SWAPPINESS, HUGEPAGES, GOVERNOR = FILES

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
CDI_UNITS = (
    "nvidia-cdi-refresh.path",
    "nvidia-cdi-refresh.service",
    "stackctl-cdi-refresh.service",
)
UNIT_FOLDERS = ("/etc/systemd/system", "/usr/lib/systemd/system", "/lib/systemd/system")
