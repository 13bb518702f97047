"""Give any Debian-like root tree the users, masks and settings that the lab expects.

Files are edited below a root folder. No program of the tree has to run, so a tree that was prepared
elsewhere works as well as our own. Existing users and homes are kept.
"""

from __future__ import annotations

import os
import shutil
import uuid
from pathlib import Path
from typing import NamedTuple

USERS = {"lab": True, "nolinger": False}  # name -> lingers
RANGE = 65536
CONTAINERS_CONF = "etc/containers/containers.conf.d/lab.conf"

# Units that delay the boot, wait for a network that the lab lacks or would change the caller's.
MASKED = [
    "systemd-networkd-wait-online.service",
    "NetworkManager-wait-online.service",
    "systemd-networkd.service",
    "systemd-networkd.socket",
    "systemd-resolved.service",
    "NetworkManager.service",
    "networking.service",
    "ssh.service",
    "ssh.socket",
    "sshd-keygen.service",
    "systemd-timesyncd.service",
    "console-getty.service",
    "getty.target",
    "getty-static.service",
    "apt-daily.timer",
    "apt-daily-upgrade.timer",
    "dpkg-db-backup.timer",
    "fstrim.timer",
    "e2scrub_all.timer",
    "e2scrub_reap.service",
    "man-db.timer",
    "motd-news.timer",
    "systemd-pstore.service",
    "systemd-modules-load.service",
    "systemd-udev-settle.service",
    "multipathd.service",
    "unattended-upgrades.service",
    "snapd.service",
    "snapd.socket",
    "snapd.seeded.service",
    "cloud-init.target",
    "cloud-init-local.service",
    "cloud-init.service",
    "cloud-init-main.service",
    "cloud-config.service",
    "cloud-final.service",
    "tmp.mount",
    "dev-hugepages.mount",
    "systemd-firstboot.service",
    "podman-auto-update.timer",
    "podman-auto-update.service",
]

LAUNCHER = """\
#!/usr/bin/python3
import runpy
import sys

sys.argv[0] = "/usr/local/bin/stackctl"
runpy.run_module("stackctl", run_name="__main__", alter_sys=False)
"""


class Account(NamedTuple):
    """A user of the tree."""

    name: str
    uid: int
    gid: int
    home: str


def accounts(root: Path) -> dict[str, Account]:
    """Return the users in the tree's passwd file."""
    found = {}
    for line in _lines(root / "etc/passwd"):
        fields = line.split(":")
        if len(fields) >= 6:
            found[fields[0]] = Account(fields[0], int(fields[2]), int(fields[3]), fields[5])
    return found


def python_version(root: Path) -> str:
    """Return the X.Y of the tree's own python3, read from the target of its link."""
    return (root / "usr/bin/python3").readlink().name.removeprefix("python")


def furnish(root: Path, *, app: tuple[str, ...] = ()) -> None:
    """Add the missing files to the tree at ROOT; APP are the folders of Python code to add."""
    etc = root / "etc"
    _write(etc / "machine-id", uuid.uuid4().hex + "\n")
    _write(root / CONTAINERS_CONF, "[containers]\npids_limit = 0\n")
    _write(etc / "hostname", "lab\n")
    _write(etc / "hosts", "127.0.0.1 localhost lab\n::1 localhost\n")
    for unit in MASKED:
        mask(root, unit)
    link = etc / "systemd/system/default.target"
    link.unlink(missing_ok=True)
    link.symlink_to("/lib/systemd/system/multi-user.target")
    # Only if this folder exists, journals are kept per user and each user can read their own.
    journal = root / "var/log/journal"
    journal.mkdir(parents=True, exist_ok=True)
    os.chown(journal, 0, _group(root, "systemd-journal"))
    journal.chmod(0o2755)
    for name, lingers in USERS.items():
        _user(root, name)
        flag = root / "var/lib/systemd/linger" / name
        flag.parent.mkdir(parents=True, exist_ok=True)
        if lingers:
            flag.touch()
        else:
            flag.unlink(missing_ok=True)
    if app:
        version = python_version(root)
        # First in the path: the tree may carry older copies of the same packages.
        line = f"import sys; sys.path[:0] = {list(app)!r}\n"
        _write(root / f"usr/local/lib/python{version}/dist-packages/stackctl-lab.pth", line)
        _write(root / "usr/local/bin/stackctl", LAUNCHER, mode=0o755)


def mask(root: Path, unit: str) -> None:
    """Disable a unit of the tree by a link to /dev/null."""
    path = root / "etc/systemd/system" / unit
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    path.symlink_to("/dev/null")


def own_folder(root: Path, account: Account, below_home: str) -> Path:
    """Make a folder below a user's home; every level of it belongs to the user."""
    path = root / account.home.lstrip("/")
    for part in Path(below_home).parts:
        path = path / part
        if not path.exists():
            path.mkdir()
            os.chown(path, account.uid, account.gid)
    return path


def _user(root: Path, name: str) -> None:
    etc = root / "etc"
    known = accounts(root)
    if name not in known:
        used = {user.uid for user in known.values()} | _ids(etc / "group")
        uid = next(number for number in range(1000, 60000) if number not in used)
        account = Account(name, uid, uid, f"/home/{name}")
        _append(etc / "group", f"{name}:x:{uid}:")
        _append(etc / "gshadow", f"{name}:!::")
        _append(etc / "passwd", f"{name}:x:{uid}:{uid}::{account.home}:/bin/bash")
        _append(etc / "shadow", f"{name}:!:20000:0:99999:7:::")
    account = accounts(root)[name]
    for file in ("subuid", "subgid"):
        lines = [line.split(":") for line in _lines(etc / file)]
        ranges = [line for line in lines if len(line) == 3]
        if not any(line[0] in (name, str(account.uid)) for line in ranges):
            start = max([100000, *(int(line[1]) + int(line[2]) for line in ranges)])
            _append(etc / file, f"{name}:{start}:{RANGE}")
    home = root / account.home.lstrip("/")
    if not home.exists():
        skeleton = etc / "skel"
        if skeleton.is_dir():
            shutil.copytree(skeleton, home, symlinks=True)
        else:
            home.mkdir(parents=True)
        for path in [home, *home.rglob("*")]:
            os.chown(path, account.uid, account.gid, follow_symlinks=False)
        home.chmod(0o700)


def _group(root: Path, name: str) -> int:
    for line in _lines(root / "etc/group"):
        fields = line.split(":")
        if fields[0] == name:
            return int(fields[2])
    return 0


def _ids(path: Path) -> set[int]:
    rows = (line.split(":") for line in _lines(path))
    return {int(row[2]) for row in rows if len(row) > 2 and row[2].isdigit()}


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def _append(path: Path, line: str) -> None:
    lines = _lines(path)
    mode = path.stat().st_mode if path.exists() else 0o644
    path.write_text("\n".join([*lines, line]) + "\n")
    path.chmod(mode & 0o777)


def _write(path: Path, text: str, *, mode: int = 0o644) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    path.write_text(text)
    path.chmod(mode)
