"""Programs, kernel interfaces and resource limits that a launch needs, for one scope."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Mapping
from typing import Literal

from stackctl.errors import NotInstalled, StackctlError
from stackctl.machine.machine import Machine
from stackctl.machine.runner import process_error
from stackctl.probe.background import Background
from stackctl.probe.cdi import probe_cdi
from stackctl.probe.fact_reader import FactReader, sanitize
from stackctl.requirements.facts import ProbeUser, Scope, ToolsProbe
from stackctl.values.host import UNLIMITED, Limits, Tools

_CGROUP = "/sys/fs/cgroup"
_BOOTED = "/run/systemd/system"
#: The folders in which systemd searches generators, in its order; podman installs into the last.
_GENERATORS = ("/etc/systemd", "/usr/local/lib/systemd", "/usr/lib/systemd", "/lib/systemd")
#: The generator's program in the folders of distributions. Dry runs can use it there, but systemd
#: does not find it.
_QUADLET = ("/usr/libexec/podman/quadlet", "/usr/lib/podman/quadlet",
            "/usr/local/libexec/podman/quadlet")  # fmt: skip
_APPARMOR_INTERFACE = "/sys/kernel/security/apparmor"
#: Where Podman finds the program that loads profiles, but for unusual folders in its PATH.
_APPARMOR_PARSERS = ("/sbin/apparmor_parser", "/usr/sbin/apparmor_parser")
#: Ubuntu 24.04 loads about 120 profiles, in 4 KiB.
_MOST_PROFILES = 256 * 1024
#: Longer than the limit after which the runner kills the command.
_PATIENCE_S = 15.0
_CAP_SYS_RESOURCE = 24


def start_commands(machine: Machine) -> dict[str, Background[str]]:
    """Start the commands that a probe needs, all at once; the result of each is its output."""

    def version(program: str) -> str:
        done = machine.run((program, "--version"))
        if done.status != 0:
            raise process_error(done)
        return done.stdout

    return {
        program: Background(functools.partial(version, program), _PATIENCE_S)
        for program in ("podman", "systemctl")
    }


def probe_tools(
    reader: FactReader, commands: Mapping[str, Background[str]], scope: Scope
) -> ToolsProbe:
    """Read installed programs, kernel settings and the state of the service manager.

    ``commands`` are those of start_commands. On a recording, an absent file means unknown, not
    absent.
    """
    release = os_release(reader)
    user = _probe_user(reader)
    version = _cgroup_version(reader)
    podman, podman_failure = _version(commands, "podman", r"\b([0-9]{1,4}(?:\.[0-9]{1,5})+)")
    systemd, systemd_failure = _version(commands, "systemctl", r"^systemd ([0-9]{1,5})\b")
    errors = {"podman": podman_failure, "systemctl": systemd_failure}
    controllers = _controllers(reader, scope, user) if version == 2 else None
    balancing = reader.number("/proc/sys/kernel/numa_balancing")
    tools = Tools(
        os=release.get("PRETTY_NAME"),
        kernel=_kernel(reader),
        podman=podman,
        quadlet_generator=_generator(reader, "system-generators/podman-system-generator", _QUADLET),
        systemd=systemd,
        systemd_running=_systemd_running(reader, scope, user),
        cgroup_version=version,
        cgroup_controllers=controllers or (),
        linger=_linger(reader, user) if scope == "user" else None,
        numa_balancing=None if balancing is None else balancing != 0,
        swappiness=reader.number("/proc/sys/vm/swappiness"),
        selinux=_selinux(reader),
        selinux_devices=selinux_devices(reader),
        apparmor=probe_apparmor(reader),
        apparmor_profiles=_apparmor_profiles(reader),
        cdi=probe_cdi(reader, podman),
    )
    linked = f"{scope}-generators/podman-{scope}-generator"
    return ToolsProbe(
        tools=tools,
        user=user,
        podman_error=None if podman_failure is None else _in_one_line(podman_failure),
        podman_absent=isinstance(podman_failure, NotInstalled),
        generator_runs=_absent_is_known(reader, _generator(reader, linked, ()) is not None),
        booted=_absent_is_known(reader, reader.exists(_BOOTED)),
        controllers_known=controllers is not None,
        families=tuple(f"{release.get('ID', '')} {release.get('ID_LIKE', '')}".split()),
        release=release.get("VERSION_ID"),
        unrecorded=()
        if reader.machine.live
        else tuple(name for name, error in errors.items() if error),
    )


def user_service(uid: int) -> str:
    """Return the cgroup folder of a user's service manager."""
    return f"{_CGROUP}/user.slice/user-{uid}.slice/user@{uid}.service"


def manager_socket(uid: int) -> str:
    """Return the socket on which a user's service manager listens while it runs."""
    return f"/run/user/{uid}/systemd/private"


def _absent_is_known(reader: FactReader, there: bool) -> bool | None:
    return True if there else (False if reader.machine.live else None)


def _version(
    commands: Mapping[str, Background[str]], program: str, pattern: str
) -> tuple[str | None, StackctlError | None]:
    try:
        text = commands[program].result()
    except StackctlError as error:
        return None, error
    if text is None:
        return None, StackctlError(f"{program} does not answer")
    text = text[:4096]
    match = re.search(pattern, text, re.MULTILINE)
    if match is None:
        return None, StackctlError(f"it gives no version: {sanitize(text, most=60) or 'nothing'}")
    return match[1], None


def _in_one_line(error: StackctlError) -> str:
    return "; ".join((error.message, *error.details[-1:]))


def os_release(reader: FactReader) -> dict[str, str]:
    """Return the fields of os-release; empty without one."""
    text = reader.text("/etc/os-release") or reader.text("/usr/lib/os-release") or ""
    found = {}
    for line in text[:65536].splitlines():
        key, equals, value = line.partition("=")
        plain = sanitize(value.strip().strip("\"'"))
        if equals and plain:
            found[key.strip()] = plain
    return found


def _kernel(reader: FactReader) -> str | None:
    release = reader.line("/proc/sys/kernel/osrelease")
    if release is not None:
        return release
    words = (reader.line("/proc/version") or "").split()
    return words[2] if words[:2] == ["Linux", "version"] and len(words) > 2 else None


def _probe_user(reader: FactReader) -> ProbeUser:
    if reader.machine.live:
        uid: int | None = os.getuid()
    else:
        line = re.search(
            r"^Uid:\s+([0-9]{1,10})\s", reader.text("/proc/self/status") or "", re.MULTILINE
        )
        uid = int(line[1]) if line else None
    return ProbeUser(uid, None if uid is None else _user_name(reader, uid))


def _user_name(reader: FactReader, uid: int) -> str | None:
    if reader.machine.live:
        # Not every user is in /etc/passwd (LDAP, systemd-homed).
        import pwd

        try:
            return pwd.getpwuid(uid).pw_name
        except KeyError:
            return None
    for line in (reader.text("/etc/passwd") or "").splitlines():
        fields = line.split(":")
        if len(fields) > 2 and fields[2] == str(uid) and re.fullmatch(r"[\w.@-]+\$?", fields[0]):
            return fields[0]
    return None


def _generator(reader: FactReader, name: str, others: tuple[str, ...]) -> str | None:
    paths = (*(f"{folder}/{name}" for folder in _GENERATORS), *others)
    return next((path for path in paths if reader.exists(path)), None)


def _systemd_running(reader: FactReader, scope: Scope, user: ProbeUser) -> bool | None:
    running = reader.exists(_BOOTED)
    if scope == "user" and running:
        if user.uid is None:
            return None
        # systemctl --user connects to this socket. Its folder is removed when the manager ends.
        running = reader.exists(manager_socket(user.uid))
    return _absent_is_known(reader, running)


def _cgroup_version(reader: FactReader) -> Literal[1, 2] | None:
    if reader.text(f"{_CGROUP}/cgroup.controllers") is not None:
        return 2
    # Hybrid counts as version 1: its controllers are not in the unified hierarchy.
    marks = ("unified", "systemd", "memory", "cpu", "cpu,cpuacct")
    return 1 if any(reader.exists(f"{_CGROUP}/{mark}") for mark in marks) else None


def _controllers(reader: FactReader, scope: Scope, user: ProbeUser) -> tuple[str, ...] | None:
    if scope == "user" and user.uid is None:
        return None
    folder = _CGROUP if scope == "system" or user.uid is None else user_service(user.uid)
    text = reader.text(f"{folder}/cgroup.controllers")
    if text is None:
        return None
    return tuple(name for name in text[:1024].split() if re.fullmatch(r"[a-z_]{1,20}", name))


def _linger(reader: FactReader, user: ProbeUser) -> bool | None:
    if user.name is None:
        return None
    folder = "/var/lib/systemd/linger"
    if reader.exists(f"{folder}/{user.name}"):
        return True
    return False if reader.machine.live or reader.exists(folder) else None


def _selinux(reader: FactReader) -> Literal["enforcing", "permissive", "disabled"] | None:
    """Return the mode of SELinux; None on a recording without it."""
    enforcing = reader.number("/sys/fs/selinux/enforce")
    if enforcing is not None:
        return "enforcing" if enforcing else "permissive"
    return "disabled" if reader.machine.live else None


def selinux_devices(reader: FactReader) -> bool | None:
    """Return True if SELinux lets containers use devices; None if its boolean is absent."""
    # The file holds two numbers: the current value, and the value after a commit.
    said = reader.line("/sys/fs/selinux/booleans/container_use_devices") or ""
    return {"1": True, "0": False}.get(said[:1])


def probe_apparmor(reader: FactReader) -> bool | None:
    """Return True if Podman confines root's containers with AppArmor; None: not recorded.

    Podman does so if the kernel has AppArmor on, its interface is mounted (containers often lack
    it), and the program is there that loads profiles.
    """
    enabled = reader.line("/sys/module/apparmor/parameters/enabled")
    if enabled in ("Y", "N"):
        loads = not reader.machine.live or (
            reader.exists(_APPARMOR_INTERFACE) and any(map(reader.exists, _APPARMOR_PARSERS))
        )
        return enabled == "Y" and loads
    return False if reader.machine.live else None


def _apparmor_profiles(reader: FactReader) -> tuple[str, ...]:
    """Return the loaded profiles of containers and of crun.

    Only root can read the list. For others, crun's file stands for its profile.
    """
    text = reader.text(f"{_APPARMOR_INTERFACE}/profiles", _MOST_PROFILES)
    if text is None:
        return ("crun",) if reader.exists("/etc/apparmor.d/crun") else ()
    names = (line.partition(" (")[0] for line in text.splitlines())
    return tuple(name for name in names if re.fullmatch(r"crun|containers-default-[\w.-]+", name))


def probe_limits(reader: FactReader, scope: Scope, user: ProbeUser) -> Limits:
    """Read the hard limits of the manager that starts the services."""
    if scope == "system":
        memlock, nofile = _hard_limits(reader, 1)
        if can_raise_limits(reader):
            # Whatever the limit, the kernel lets no process open more files than nr_open.
            return Limits(memlock_bytes=UNLIMITED, nofile=reader.number("/proc/sys/fs/nr_open"))
        return Limits(memlock_bytes=memlock, nofile=nofile)
    manager = None if user.uid is None else _user_manager(reader, user.uid)
    if manager is None:
        return Limits()
    memlock, nofile = _hard_limits(reader, manager)
    return Limits(memlock_bytes=memlock, nofile=nofile)


def can_raise_limits(reader: FactReader) -> bool | None:
    """Return True if the system manager can give any limit to its services; None if unknown."""
    status = reader.text("/proc/1/status") or ""
    line = re.search(r"^CapBnd:\s+([0-9a-f]{1,16})\s*$", status, re.MULTILINE)
    if line is None:
        return None
    mapped = (reader.text("/proc/1/uid_map") or "").split()
    if mapped and mapped != ["0", "0", "4294967295"]:
        # In a user namespace the capability does not reach limits of the machine.
        return False
    return bool(int(line[1], 16) >> _CAP_SYS_RESOURCE & 1)


def _hard_limits(reader: FactReader, pid: int) -> tuple[int | None, int | None]:
    text = reader.text(f"/proc/{pid}/limits") or ""
    return _hard(text, "Max locked memory"), _hard(text, "Max open files")


def _hard(text: str, name: str) -> int | None:
    line = re.search(rf"^{name}\s+\S+\s+([0-9]{{1,19}}|unlimited)\s", text, re.MULTILINE)
    if line is None:
        return None
    return UNLIMITED if line[1] == "unlimited" else int(line[1])


def _user_manager(reader: FactReader, uid: int) -> int | None:
    """Return the PID of a user's service manager; None if it is not found."""
    if reader.machine.live and not reader.exists(manager_socket(uid)):
        return None
    # Its cgroup lists its PID. With cgroup version 1, all processes are searched.
    listed = (reader.text(f"{user_service(uid)}/init.scope/cgroup.procs") or "").split()[:64]
    for pid in listed:
        if _is_manager(reader, pid, uid):
            return int(pid)
    for path in reader.machine.glob("/proc/[0-9]*/comm"):
        pid = path.split("/")[2]
        if reader.line(path) == "systemd" and _is_manager(reader, pid, uid):
            return int(pid)
    return None


def _is_manager(reader: FactReader, pid: str, uid: int) -> bool:
    if not re.fullmatch("[0-9]{1,10}", pid):
        return False
    argv = (reader.text(f"/proc/{pid}/cmdline") or "").split("\0")
    if not argv[0].endswith("systemd") or "--user" not in argv[1:]:
        return False
    status = reader.text(f"/proc/{pid}/status") or ""
    return bool(re.search(rf"^Uid:\s+{uid}\s", status, re.MULTILINE))
