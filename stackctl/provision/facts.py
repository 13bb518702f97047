"""Read the facts for a plan: the host, the service user, settings, packages and files."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from stackctl.errors import StackctlError
from stackctl.machine import path_security
from stackctl.probe import probe
from stackctl.probe.fact_reader import FactReader
from stackctl.probe.tools import (
    can_raise_limits,
    manager_socket,
    os_release,
    probe_limits,
    user_service,
)
from stackctl.provision import apt, self_install
from stackctl.provision.apply import UndoStore
from stackctl.provision.changes import account
from stackctl.provision.target_root import TargetRoot
from stackctl.requirements import host_paths, podman
from stackctl.requirements.facts import (
    ForeignSetting,
    MachineFacts,
    ProbeUser,
    ServiceUser,
    SettingValue,
)
from stackctl.resources import data_folder
from stackctl.values.host import UNLIMITED
from stackctl.values.provision import FileChange

#: Without these options apt writes its cache of package lists when root runs it.
_WRITE_NOTHING = ("--option=Dir::Cache::pkgcache=", "--option=Dir::Cache::srcpkgcache=")
_SYSCTL = re.compile(r"\s*-?\s*([\w./-]+)\s*=\s*(\S+)\s*$")
_DROP_IN = re.compile(r"\s*(LimitMEMLOCK|Delegate)\s*=\s*(.*?)\s*$")
_TMPFILES = re.compile(r"\s*[wf][+^!=~-]*\s+(\S+)(?:\s+\S+){4}\s+(\S.*?)\s*$")
_FOLDERS = ("/etc", "/run", "/usr/local/lib", "/usr/lib")
#: Files that show that another program sets the governors.
_GOVERNORS = (
    "/etc/tuned/active_profile",
    "/etc/default/cpufrequtils",
    "/etc/default/cpupower",
    "/etc/systemd/system/graphical.target.wants/power-profiles-daemon.service",
)


def read_facts(target: TargetRoot, store: UndoStore, user: str | None) -> MachineFacts:
    """Read the facts of a machine; ``user`` is the service user, None for root's stacks only."""
    reader = FactReader(target.machine)
    host = probe(target.machine, scope="system")
    release = os_release(reader)
    families = tuple(f"{release.get('ID', '')} {release.get('ID_LIKE', '')}".split())
    packages, held = _packages(target)
    candidate = None if host.tools.podman else _candidate(target, "podman")
    needed = podman.packages(families, release.get("VERSION_ID"), host.tools.podman or candidate)
    missing = tuple(name for name in needed if packages is not None and name not in packages)
    program = next(filter(target.exists, host_paths.LINKS), None)
    uid, _ = _passwd_entry(target, user)
    weakness = None if program is None else _program_weakness(target, program)
    return MachineFacts(
        host=host,
        families=families,
        release=release.get("VERSION_ID"),
        user=None if user is None else _user(target, reader, user),
        may_raise=can_raise_limits(reader),
        memlock_reachable=probe_limits(reader, "system", ProbeUser(0, "root")).memlock_bytes,
        root_controllers=tuple((target.read("/sys/fs/cgroup/cgroup.controllers") or "").split()),
        files={path: target.read(path) for path in host_paths.FILES.values()},
        written=_written(store),
        shipped={
            name: (data_folder("systemd") / name).read_text("utf-8") for name in host_paths.FILES
        },
        foreign=_foreign_settings(target, uid),
        settings=_settings(target),
        packages=packages,
        held=held,
        simulated=_simulated(target, missing) if missing else (),
        podman_candidate=candidate,
        toolkit=_candidate(target, host_paths.TOOLKIT) if host.gpus else None,
        subuid=target.read("/etc/subuid") or "",
        subgid=target.read("/etc/subgid") or "",
        swap=len((target.read("/proc/swaps") or "").splitlines()) > 1,
        folders=frozenset(filter(target.exists, (host_paths.MODELS,))),
        units=frozenset(unit for unit in host_paths.CDI_UNITS if _has_unit(target, unit)),
        enabled=frozenset(unit for unit in host_paths.CDI_UNITS if _enabled(target, unit)),
        guarded=target.exists(host_paths.GUARD_TIMER),
        program=program,
        program_weakness=None if weakness is None else str(weakness),
        program_ours=program is not None and _is_own_copy(target, target.path_of(program)),
        program_replaceable=weakness is not None and _is_own_copy(target, Path(weakness.path)),
        program_current=self_install.is_current(target.path_of(host_paths.PROGRAM_FOLDER)),
        python_weakness=_weakness(self_install.base_python()),
    )


def _is_own_copy(target: TargetRoot, path: Path) -> bool:
    """Return True if a path leads into the folder of the copy that provisioning installs."""
    return path.resolve().is_relative_to(target.path_of(host_paths.PROGRAM_FOLDER).resolve())


def _program_weakness(target: TargetRoot, program: str) -> path_security.Weakness | None:
    """Return the first right by which other users can change a program.

    Every file of the copy that provisioning installs counts, because the program imports them.
    """
    paths = [target.path_of(program)]
    if _is_own_copy(target, paths[0]):
        paths += sorted(target.path_of(host_paths.PROGRAM_FOLDER).rglob("*"))
    found = (path_security.find_weakness(path) for path in paths)
    return next((weakness for weakness in found if weakness is not None), None)


def _has_unit(target: TargetRoot, unit: str) -> bool:
    return any(target.exists(f"{folder}/{unit}") for folder in host_paths.UNIT_FOLDERS)


def _weakness(path: Path) -> str | None:
    weakness = path_security.find_weakness(path)
    return None if weakness is None else str(weakness)


def _passwd_entry(target: TargetRoot, user: str | None) -> tuple[int | None, str | None]:
    """Return the number and the home of an account in /etc/passwd; None if they are not there."""
    for line in (target.read("/etc/passwd") or "").splitlines():
        fields = line.split(":")
        if len(fields) > 2 and fields[0] == user and fields[2].isdecimal():
            return int(fields[2]), fields[5] if len(fields) == 7 else None
    return None, None


def _user(target: TargetRoot, reader: FactReader, name: str) -> ServiceUser:
    uid, home = _passwd_entry(target, name)
    # Not every user is in /etc/passwd (LDAP, systemd-homed).
    if uid is None and target.machine.live and (entry := account(name)) is not None:
        uid, home = entry.pw_uid, entry.pw_dir
    if uid is None:
        return ServiceUser(name)
    unit = _properties(target, f"user@{uid}.service")
    limit = unit.get("LimitMEMLOCK", "")
    return ServiceUser(
        name,
        uid=uid,
        home=home,
        lingers=target.exists(f"/var/lib/systemd/linger/{name}"),
        running=target.exists(manager_socket(uid)),
        memlock_bytes=probe_limits(reader, "user", ProbeUser(uid, name)).memlock_bytes,
        memlock_next=UNLIMITED if limit == "infinity" else int(limit) if limit.isdigit() else None,
        controllers=tuple((target.read(f"{user_service(uid)}/cgroup.controllers") or "").split()),
        controllers_next=tuple(unit.get("DelegateControllers", "").split()),
        stale=unit.get("NeedDaemonReload") == "yes",
        guarded=home is not None
        and target.exists(f"{home}/.config/systemd/user/stackctl-guard.timer"),
    )


def _properties(target: TargetRoot, unit: str) -> dict[str, str]:
    names = "--property=LimitMEMLOCK,DelegateControllers,NeedDaemonReload"
    done = target.query("systemctl", "show", unit, names)
    pairs = (line.partition("=") for line in (done.stdout if done else "").splitlines())
    return {name: value for name, equals, value in pairs if equals}


def _written(store: UndoStore) -> dict[str, str]:
    try:
        changes = [one.change for one in store.read().changes]
    except StackctlError:
        # Only root may read the record. A preview by an ordinary user does without it.
        if os.geteuid() == 0:
            raise
        return {}
    return {change.path: change.text for change in changes if isinstance(change, FileChange)}


def _settings(target: TargetRoot) -> dict[str, SettingValue]:
    found = {}
    for pattern in host_paths.SETTINGS:
        for path in target.machine.glob(pattern):
            value = target.kernel_value(path)
            if value is not None:
                found[path] = SettingValue(value, target.may_write(path))
    return found


def _packages(target: TargetRoot) -> tuple[dict[str, str] | None, frozenset[str]]:
    """Return the versions of dpkg's installed packages (None without dpkg), and the held ones."""
    text = target.read("/var/lib/dpkg/status")
    if text is None:
        return None, frozenset()
    found: dict[str, str] = {}
    held = set()
    for block in text.split("\n\n"):
        name = re.search(r"^Package: (\S+)$", block, re.MULTILINE)
        status = re.search(r"^Status: (\S+) \S+ (\S+)$", block, re.MULTILINE)
        version = re.search(r"^Version: (\S+)$", block, re.MULTILINE)
        if name and status and status[2] == "installed":
            found[name[1]] = version[1] if version else ""
            if status[1] == "hold":
                held.add(name[1])
    return found, frozenset(held)


def _simulated(target: TargetRoot, names: tuple[str, ...]) -> tuple[str, ...]:
    done = target.query(
        "apt-get", *_WRITE_NOTHING, "--simulate", "--no-install-recommends", "install", *names
    )
    return apt.new_packages(done.stdout if done is not None and done.status == 0 else "")


def _candidate(target: TargetRoot, package: str) -> str | None:
    done = target.query("apt-cache", *_WRITE_NOTHING, "policy", package)
    # Without the epoch, which says nothing about the version.
    candidate = r"^\s+Candidate: (?:\d+:)?(\d\S*)$"
    found = re.search(candidate, done.stdout if done else "", re.MULTILINE)
    return found[1] if found else None


def _enabled(target: TargetRoot, unit: str) -> bool:
    done = target.query("systemctl", "is-enabled", unit)
    return done is not None and done.stdout.strip() == "enabled"


def _foreign_settings(target: TargetRoot, user_id: int | None) -> tuple[ForeignSetting, ...]:
    """Return the settings of others where stackctl's files would go, so that none is overruled.

    ``user_id`` is the service user, whose own service manager may have drop-ins; None without one.
    """
    units = ["user@.service.d", *([f"user@{user_id}.service.d"] if user_id is not None else [])]
    kinds = (
        ("sysctl.d", _sysctl),
        ("tmpfiles.d", _tmpfiles),
        *((f"systemd/system/{unit}", _drop_in) for unit in units),
    )
    found: list[ForeignSetting] = []
    for below, parse in kinds:
        # Of files of one name only the first counts, in the order of _FOLDERS, even if it is empty:
        # that is how an administrator masks a file (sysctl.d(5), tmpfiles.d(5), systemd.unit(5)).
        first: dict[str, str] = {}
        for folder in _FOLDERS:
            for path in target.machine.glob(f"{folder}/{below}/*.conf"):
                first.setdefault(path.rpartition("/")[2], path)
        for path in first.values():
            found += _lines(target, path, parse)
    found += _lines(target, "/etc/sysctl.conf", _sysctl)
    found += _lines(target, host_paths.CDI_VARIABLES, _cdi_flags)
    for path in _GOVERNORS:
        if target.exists(path):
            found.append(
                ForeignSetting(path, 0, host_paths.GOVERNOR_SETTINGS, "a program of its own")
            )
    return tuple(found)


def _lines(
    target: TargetRoot, path: str, parse: Callable[[str], tuple[str, str] | None]
) -> Iterator[ForeignSetting]:
    if path in host_paths.FILES.values():
        return
    for number, line in enumerate((target.read(path) or "").splitlines(), 1):
        found = None if line.lstrip().startswith(("#", ";")) else parse(line)
        if found is not None:
            yield ForeignSetting(path, number, *found)


def _sysctl(line: str) -> tuple[str, str] | None:
    match = _SYSCTL.match(line)
    return (match[1].replace("/", "."), match[2]) if match else None


def _cdi_flags(line: str) -> tuple[str, str] | None:
    name, _, value = line.partition("=")
    return (name.strip(), value.strip(" \"'")) if name.strip() == host_paths.CDI_FLAGS else None


def _drop_in(line: str) -> tuple[str, str] | None:
    match = _DROP_IN.match(line)
    return (match[1], match[2]) if match else None


def _tmpfiles(line: str) -> tuple[str, str] | None:
    match = _TMPFILES.match(line)
    if match is None:
        return None
    # Any pattern of CPUs counts as all CPUs.
    path = host_paths.GOVERNOR_SETTINGS if match[1].endswith("/scaling_governor") else match[1]
    return path, match[2]
