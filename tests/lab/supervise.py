"""Run one lab: mount its root, run its container and remove both at the end.

lab.py starts this program as process 1 of a process namespace, in a mount namespace of its own.
However it ends, the kernel ends every process of the lab with it, and no mount remains. It ends in
order at SIGTERM, when the lab powers off, or when the watched process is gone.

Its arguments are the folder of the lab, and the descriptor of the process to watch (-1: none). It
inherits the lock of the folder; as long as the lock is held, the lab is running.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from .furnish import CONTAINERS_CONF, accounts, furnish, mask, own_folder

GRACE = 20.0


def main(folder: Path, watched: int) -> None:
    """Run the lab of that folder until it powers off, SIGTERM comes or its owner ends."""
    config = json.loads((folder / "config.json").read_text())
    ending, wake = os.pipe()
    signal.signal(signal.SIGTERM, lambda *_: os.write(wake, b"x"))
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    group = enter_cgroup(folder.name)
    try:
        root = mount_root(folder, Path(config["tree"]))
        binds = prepare(folder, root, config)
        container = start(root, binds, config)
        try:
            wait_for_end(container, ending, watched)
        finally:
            stop(container)
    finally:
        leave_cgroup(group)
        # The mounts exist only in this mount namespace, never in that of the caller.
        unmount(folder)
        shutil.rmtree(folder, ignore_errors=True)


def own_cgroup() -> Path:
    """Return the control group (version 2) of this process."""
    mount = Path("/sys/fs/cgroup")
    if not (mount / "cgroup.controllers").exists():
        mount = mount / "unified"
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    mine = next(line[3:] for line in lines if line.startswith("0::"))
    return mount / mine.lstrip("/")


def cgroup_name(lab: str) -> str:
    """Return the name of a lab's control group."""
    return f"stackctl-{lab}"


def enter_cgroup(name: str) -> Path:
    """Move into a new control group, so that parallel labs do not share one."""
    group = own_cgroup() / cgroup_name(name)
    group.mkdir()
    (group / "cgroup.procs").write_text(str(os.getpid()))
    return group


def leave_cgroup(group: Path) -> None:
    """Move to the parent group and remove the remaining control groups of the lab."""
    (group.parent / "cgroup.procs").write_text(str(os.getpid()))
    remove_cgroups(group)


def remove_cgroups(group: Path) -> None:
    """Remove a control group and those below it. Its last processes may still be exiting."""
    groups = [group]
    unified = Path("/sys/fs/cgroup/unified")
    if group.is_relative_to(unified):
        # With both versions mounted, the container also gets a group of version 1.
        groups.append(Path("/sys/fs/cgroup/systemd") / group.relative_to(unified))
    for _ in range(50):
        for path in groups:
            for folder, _names, _files in os.walk(path, topdown=False):
                with contextlib.suppress(OSError):
                    Path(folder).rmdir()
        if not any(path.exists() for path in groups):
            return
        time.sleep(0.1)


def command(*words: str) -> None:
    """Run a command. Its output goes to our log."""
    subprocess.run(words, check=True, stdin=subprocess.DEVNULL)


def mount_root(folder: Path, tree: Path) -> Path:
    """Mount a writable layer over the tree; copy the tree if the kernel has no overlay."""
    root = folder / "root"
    for name in ("root", "upper", "work"):
        (folder / name).mkdir()
    options = f"lowerdir={tree},upperdir={folder / 'upper'},workdir={folder / 'work'}"
    try:
        command("mount", "-t", "overlay", "-o", options, "lab", str(root))
    except subprocess.CalledProcessError:
        print("no overlay here: copying the tree", flush=True)
        command("cp", "-a", "--reflink=auto", f"{tree}/.", str(root))
    return root


def unmount(folder: Path) -> None:
    """Unmount every mount below the lab's folder, the innermost first."""
    lines = Path("/proc/self/mounts").read_text().splitlines()
    points = [line.split()[1] for line in lines]
    for point in reversed([p for p in points if p.startswith(f"{folder}/")]):
        subprocess.run(["umount", "--lazy", point], check=False)


def prepare(folder: Path, root: Path, config: dict[str, Any]) -> list[str]:
    """Prepare the root and return the options that bind folders into it."""
    furnish(root, app=tuple(config["app"]))
    if not config["private_network"]:
        # The network settings belong to the caller and are read-only, so nothing may try to set
        # them.
        mask(root, "systemd-sysctl.service")
        with (root / CONTAINERS_CONF).open("a") as file:
            file.write("default_sysctls = []\n")
    binds = []
    for source, target, writable in config["binds"]:
        binds.append(f"--bind{'' if writable else '-ro'}={source}:{target}")
    data = folder / "data"
    data.mkdir(exist_ok=True)
    known = accounts(root)
    # Podman's layers need a file system that is no overlay itself.
    for name in ("root", "lab", "nolinger"):
        account = known[name]
        store = data / f"containers-{name}"
        if not store.exists():
            store.mkdir(mode=0o700 if name != "root" else 0o755)
            os.chown(store, account.uid, account.gid)
        target = "/var/lib/containers"
        if name == "root":
            (root / target.lstrip("/")).mkdir(parents=True, exist_ok=True)
        else:
            below = ".local/share/containers"
            own_folder(root, account, below)
            target = f"{account.home}/{below}"
        binds.append(f"--bind={store}:{target}")
    return binds


def start(root: Path, binds: list[str], config: dict[str, Any]) -> subprocess.Popen[bytes]:
    """Start the container."""
    environment = {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C.UTF-8"}
    environment["SYSTEMD_NSPAWN_UNIFIED_HIERARCHY"] = "1"
    words = [
        "systemd-nspawn",
        "--quiet",
        "--register=no",
        "--keep-unit",
        f"--directory={root}",
        "--boot",
    ]
    words += ["--console=read-only", "--machine=lab", "--timezone=off", "--capability=all"]
    words += ["--system-call-filter=@keyring bpf @mount @privileged", "--link-journal=no"]
    if config["private_network"]:
        words += ["--private-network", "--resolv-conf=off"]
    else:
        # The network belongs to the caller: the lab may use it but not change it.
        words += ["--drop-capability=CAP_NET_ADMIN"]
    words += binds
    # nspawn's notes about its containers must be neither shared nor kept.
    notes = Path("/run/systemd/nspawn")
    notes.mkdir(parents=True, exist_ok=True)
    command("mount", "-t", "tmpfs", "lab", str(notes))
    return subprocess.Popen(words, env=environment, stdin=subprocess.DEVNULL)


def wait_for_end(container: subprocess.Popen[bytes], ending: int, watched: int) -> None:
    """Return when the container or the watched process has ended, or after SIGTERM."""
    poll = select.poll()
    for descriptor in (ending, watched, os.pidfd_open(container.pid)):
        if descriptor >= 0:
            poll.register(descriptor, select.POLLIN)
    poll.poll()


def stop(container: subprocess.Popen[bytes]) -> None:
    """Kill the container: nothing in it is worth an orderly shutdown."""
    # All processes of our namespace except this one; the container's end with its process 1.
    with contextlib.suppress(ProcessLookupError):
        os.kill(-1, signal.SIGKILL)
    container.wait(GRACE)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
