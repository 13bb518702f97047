"""Keeps one lab: mounts its root, runs its container, clears all of it away.

Started by lab.py as process 1 of a process namespace, in a mount namespace of its own: whatever
ends it, the kernel ends every process of the lab with it and no mount remains. It ends in order
when it is told to, when the lab powers off, or when the process that it watches is gone.

Its arguments: the folder of the lab, and the descriptor of the process to watch (-1: none). It
also inherits the lock of the folder, which tells others that the lab lives for as long as we do.
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
    """Run the lab whose folder is given until its time is over."""
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
        # Below this mount namespace only: the paths of the caller never had the mounts.
        unmount(folder)
        shutil.rmtree(folder, ignore_errors=True)


def own_cgroup() -> Path:
    """The control group (version 2) of this process."""
    mount = Path("/sys/fs/cgroup")
    if not (mount / "cgroup.controllers").exists():
        mount = mount / "unified"
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    mine = next(line[3:] for line in lines if line.startswith("0::"))
    return mount / mine.lstrip("/")


def cgroup_name(lab: str) -> str:
    """The name of a lab's control group."""
    return f"stackctl-{lab}"


def enter_cgroup(name: str) -> Path:
    """Move into a control group of our own, so that labs side by side do not share one."""
    group = own_cgroup() / cgroup_name(name)
    group.mkdir()
    (group / "cgroup.procs").write_text(str(os.getpid()))
    return group


def leave_cgroup(group: Path) -> None:
    """Go back up and remove the control groups that the lab has left."""
    (group.parent / "cgroup.procs").write_text(str(os.getpid()))
    remove_cgroups(group)


def remove_cgroups(group: Path) -> None:
    """Remove a control group and those below it; its last processes may still be leaving."""
    groups = [group]
    unified = Path("/sys/fs/cgroup/unified")
    if group.is_relative_to(unified):
        # On a machine with both versions the container gets one of the old kind as well.
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
    """Run a command; what it says goes to our log."""
    subprocess.run(words, check=True, stdin=subprocess.DEVNULL)


def mount_root(folder: Path, tree: Path) -> Path:
    """Lay a writable layer over the tree; copy the tree where the kernel cannot."""
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
    """Take every mount of the lab's folder away, the innermost first."""
    lines = Path("/proc/self/mounts").read_text().splitlines()
    points = [line.split()[1] for line in lines]
    for point in reversed([p for p in points if p.startswith(f"{folder}/")]):
        subprocess.run(["umount", "--lazy", point], check=False)


def prepare(folder: Path, root: Path, config: dict[str, Any]) -> list[str]:
    """Furnish the root and return the options that bind folders into it."""
    furnish(root, app=tuple(config["app"]))
    if not config["private_network"]:
        # The settings of the network are the caller's and cannot be written: nothing may try.
        mask(root, "systemd-sysctl.service")
        with (root / CONTAINERS_CONF).open("a") as file:
            file.write("default_sysctls = []\n")
    binds = []
    for source, target, writable in config["binds"]:
        binds.append(f"--bind{'' if writable else '-ro'}={source}:{target}")
    data = folder / "data"
    data.mkdir(exist_ok=True)
    known = accounts(root)
    # Layers of podman cannot lie on a layered file system themselves.
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
        # The network is the caller's: the lab may use it, never change it.
        words += ["--drop-capability=CAP_NET_ADMIN"]
    words += binds
    # What nspawn notes there about its containers must not be shared or stay.
    notes = Path("/run/systemd/nspawn")
    notes.mkdir(parents=True, exist_ok=True)
    command("mount", "-t", "tmpfs", "lab", str(notes))
    return subprocess.Popen(words, env=environment, stdin=subprocess.DEVNULL)


def wait_for_end(container: subprocess.Popen[bytes], ending: int, watched: int) -> None:
    """Return when the lab's time is over."""
    poll = select.poll()
    for descriptor in (ending, watched, os.pidfd_open(container.pid)):
        if descriptor >= 0:
            poll.register(descriptor, select.POLLIN)
    poll.poll()


def stop(container: subprocess.Popen[bytes]) -> None:
    """End the container at once: nothing in it is worth an orderly shutdown."""
    # Every process of our namespace but us; those of the container go with its process 1.
    with contextlib.suppress(ProcessLookupError):
        os.kill(-1, signal.SIGKILL)
    container.wait(GRACE)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
