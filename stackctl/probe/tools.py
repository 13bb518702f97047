"""Programs and kernel interfaces that a launch needs, for one scope."""

from __future__ import annotations

import os
import re
import threading
from typing import Literal

from stackctl.errors import NotInstalled, StackctlError
from stackctl.machine.machine import Machine
from stackctl.machine.runner import Completed, process_error
from stackctl.probe import kernel
from stackctl.probe.cdi import probe_cdi
from stackctl.probe.fact_reader import FactReader, sanitize
from stackctl.requirements.facts import ProbeUser, Scope, ToolsProbe
from stackctl.values.host import Tools

_CGROUP = "/sys/fs/cgroup"
_BOOTED = "/run/systemd/system"
#: The folders in which systemd searches generators, in its order; podman installs into the last.
_GENERATORS = ("/etc/systemd", "/usr/local/lib/systemd", "/usr/lib/systemd", "/lib/systemd")
#: The generator's program in the folders of distributions. Dry runs can use it there, but systemd
#: does not find it.
_QUADLET = ("/usr/libexec/podman/quadlet", "/usr/lib/podman/quadlet",
            "/usr/local/libexec/podman/quadlet")  # fmt: skip
#: Longer than the limit after which the runner kills the command.
_PATIENCE_S = 15.0


class BackgroundCommand:
    """A command that runs beside the rest of the probe."""

    def __init__(self, machine: Machine, *argv: str) -> None:
        self._machine = machine
        self._argv = argv
        self._done: Completed | None = None
        self._error: StackctlError | None = None
        self._thread = threading.Thread(target=self._ask, daemon=True)
        self._thread.start()

    def _ask(self) -> None:
        try:
            done = self._machine.run(self._argv)
            if done.status != 0:
                raise process_error(done)
            self._done = done
        except StackctlError as error:
            self._error = error

    def stdout(self) -> str:
        """Wait for the command and return its output.

        Raises:
            StackctlError: it could not be started, failed, or did not end in time.
        """
        self._thread.join(_PATIENCE_S)
        if self._done is not None:
            return self._done.stdout
        raise self._error or StackctlError(f"{self._argv[0]} does not answer")


class ProbeCommands:
    """The commands that a probe needs; all of them start at once."""

    def __init__(self, machine: Machine) -> None:
        self.podman = BackgroundCommand(machine, "podman", "--version")
        self.systemd = BackgroundCommand(machine, "systemctl", "--version")


def probe_tools(reader: FactReader, commands: ProbeCommands, scope: Scope) -> ToolsProbe:
    """Read installed programs, kernel settings and the state of the service manager.

    On a recording, an absent file means unknown, not absent.
    """
    release = _os_release(reader)
    user = _probe_user(reader)
    version = _cgroup_version(reader)
    podman, podman_failure = _version(commands.podman, r"\b([0-9]{1,4}(?:\.[0-9]{1,5})+)")
    systemd, systemd_failure = _version(commands.systemd, r"^systemd ([0-9]{1,5})\b")
    errors = {"podman": podman_failure, "systemctl": systemd_failure}
    controllers = _controllers(reader, scope, user) if version == 2 else None
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
        numa_balancing=kernel.numa_balancing(reader),
        swappiness=kernel.swappiness(reader),
        selinux=kernel.selinux(reader),
        selinux_devices=kernel.selinux_devices(reader),
        apparmor=kernel.apparmor(reader),
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


def _version(answer: BackgroundCommand, pattern: str) -> tuple[str | None, StackctlError | None]:
    try:
        text = answer.stdout()[:4096]
    except StackctlError as error:
        return None, error
    match = re.search(pattern, text, re.MULTILINE)
    if match is None:
        return None, StackctlError(f"it gives no version: {sanitize(text, most=60) or 'nothing'}")
    return match[1], None


def _in_one_line(error: StackctlError) -> str:
    return "; ".join((error.message, *error.details[-1:]))


def _os_release(reader: FactReader) -> dict[str, str]:
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
