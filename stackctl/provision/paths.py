"""Names of what provisioning looks at and writes."""

from __future__ import annotations

#: Shipped files (below systemd/) and where they are installed.
FILES = {
    name: f"/etc/{'systemd/' if name.startswith('system') or '@' in name else ''}{place}"
    for name, place in (
        ("user@.service.d/10-stackctl-delegate.conf",
         "system/user@.service.d/10-stackctl-delegate.conf"),
        ("user@.service.d/10-stackctl-memlock.conf",
         "system/user@.service.d/10-stackctl-memlock.conf"),
        ("system/stackctl-cdi-refresh.service", "system/stackctl-cdi-refresh.service"),
        ("sysctl.d/90-stackctl-numa-balancing.conf", "sysctl.d/90-stackctl-numa-balancing.conf"),
        ("sysctl.d/90-stackctl-swappiness.conf", "sysctl.d/90-stackctl-swappiness.conf"),
        ("tmpfiles.d/stackctl-transparent-hugepages.conf",
         "tmpfiles.d/stackctl-transparent-hugepages.conf"),
        ("tmpfiles.d/stackctl-governor.conf", "tmpfiles.d/stackctl-governor.conf"),
    )
}  # fmt: skip
DELEGATE, MEMLOCK, CDI_SERVICE, NUMA, SWAPPINESS, HUGEPAGES, GOVERNOR = FILES

NUMA_SETTING = "/proc/sys/kernel/numa_balancing"
SWAPPINESS_SETTING = "/proc/sys/vm/swappiness"
HUGEPAGES_SETTING = "/sys/kernel/mm/transparent_hugepage/enabled"
GOVERNOR_SETTINGS = "/sys/devices/system/cpu/cpu[0-9]*/cpufreq/scaling_governor"
SETTINGS = (NUMA_SETTING, SWAPPINESS_SETTING, HUGEPAGES_SETTING, GOVERNOR_SETTINGS)

MODELS = "/srv/models"
GUARD_TIMER = "/etc/systemd/system/stackctl-guard.timer"
PROGRAM_FOLDER = "/usr/local/lib/stackctl"
#: In the search path of sudo and of services.
LINK = "/usr/local/bin/stackctl"
LINKS = (LINK, "/usr/bin/stackctl")

TOOLKIT = "nvidia-container-toolkit"
CDI_UNITS = (
    "nvidia-cdi-refresh.path",
    "nvidia-cdi-refresh.service",
    "stackctl-cdi-refresh.service",
)
UNIT_FOLDERS = ("/etc/systemd/system", "/usr/lib/systemd/system", "/lib/systemd/system")


#: What a podman that somebody built needs of the distribution all the same.
HELPERS = ("uidmap", "dbus-user-session")


def packages(families: tuple[str, ...], release: str | None) -> tuple[str, ...]:
    """What rootless and rootful Podman needs of Debian's or Ubuntu's packages; else nothing.

    podman's own recommendations name more; these are what containers of stackctl cannot do
    without: a runtime, a network stack, subordinate ids, and a bus for user services.
    """
    if not {"debian", "ubuntu"} & set(families):
        return ()
    # Podman 4 starts slirp4netns for rootless networks, 5 and later passt.
    network = "slirp4netns" if (families[0], release) == ("ubuntu", "24.04") else "passt"
    return ("podman", "crun", "netavark", network, *HELPERS)
