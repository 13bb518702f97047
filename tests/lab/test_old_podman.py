"""Debian 12 as stackctl sees it: its os-release, and a podman that prints version 4.3.1."""

from __future__ import annotations

from pathlib import Path

from . import look
from .conftest import Seat
from .lab import Lab

RELEASE = """\
PRETTY_NAME="Debian GNU/Linux 12 (bookworm)"
NAME="Debian GNU/Linux"
VERSION_ID="12"
VERSION="12 (bookworm)"
VERSION_CODENAME=bookworm
ID=debian
"""
#: Before it refuses, stackctl may ask only for the version. The program records all other calls.
PODMAN = """\
#!/bin/sh
case $* in
    *--version*) echo podman version 4.3.1 ;;
    *) echo "$*" >>/srv/old/asked; exit 125 ;;
esac
"""
AS_BOOKWORM = """\
mount --bind /srv/old/os-release /etc/os-release
mount --bind /srv/old/podman /usr/bin/podman
exec stackctl "$@"
"""


def files(root: Seat) -> list[str]:
    """Return the files that a provisioning could change; Python may write its caches any time."""
    found = root.files("/etc", "/var/lib/stackctl", "/usr/local")
    return [path for path in found if "/__pycache__/" not in path]


def test_provision_refuses_an_old_podman(lab: Lab) -> None:
    root = Seat(lab, "root")
    look.put(lab, "/srv/old/os-release", RELEASE.encode())
    look.put(lab, "/srv/old/podman", PODMAN.encode(), mode=0o755)
    before = files(root)
    for words in (("provision", "--yes", "--service-user=worker"), ("provision", "--yes")):
        done = root.run("unshare", "-m", "sh", "-c", AS_BOOKWORM, "sh", *words, check=False)
        assert done.returncode == 6, f"{done.stdout}{done.stderr}"
        look.assert_error(
            done, "podman 4.3.1 is too old: Quadlet reads subfolders .* from 4.7 on: nothing was",
            "upgrade to Debian 13, Ubuntu 24.04 or newer, or install podman 4.7 or newer",
        )  # fmt: skip
    # A dry run reports the same, and the other changes.
    done = root.run(
        "unshare", "-m", "sh", "-c", AS_BOOKWORM, "sh", "provision", "--dry-run", check=False
    )
    assert done.returncode == 6
    assert "REFUSED  podman                 podman 4.3.1 is too old" in done.stdout
    assert files(root) == before
    assert not Path(f"/proc/{lab.pid}/root/srv/old/asked").exists()


def test_a_stack_is_refused_there_too(lab: Lab, tiny: str) -> None:
    root = Seat(lab, "root")
    look.put(lab, "/srv/old/os-release", RELEASE.encode())
    look.put(lab, "/srv/old/podman", PODMAN.encode(), mode=0o755)
    words = ("up", "cpu-latency", "--model", tiny)
    done = root.run("unshare", "-m", "sh", "-c", AS_BOOKWORM, "sh", *words, check=False)
    assert done.returncode == 6, f"{done.stdout}{done.stderr}"
    look.assert_error(done, "4.3.1", "4.7 or newer")
    root.assert_nothing_left()
