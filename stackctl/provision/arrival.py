"""Runs where there is no stackctl, by ``python3 -I -S -c``: takes the one that was sent.

Nothing of stackctl can be imported before it is unpacked, and whatever happens nothing is to stay.
``keep`` holds what was sent for as long as the connection stands; ``start`` runs it, which the end
of a connection does not end. What is run is what the caller has the hash of, in a folder of whoever
runs it: through sudo that is root's, and nothing that the user could change meanwhile.
"""

from __future__ import annotations

import hashlib
import io
import os
import pwd
import runpy
import shutil
import signal
import sys
import tempfile
import zipfile
from typing import NoReturn

#: Names of what is made here begin so.
PREFIX = ".stackctl-brought-"


def keep(size: int, room: int) -> None:
    """Keep ``size`` bytes of stdin in a file, whose path is printed, until stdin ends; and refuse
    where there is no room to unpack it to ``room`` bytes."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    data = sys.stdin.buffer.read(size)
    if len(data) < size:
        _fail(f"{len(data)} of {size} bytes arrived")
    # Root reads it, who may not look into a home that comes over a network.
    folder = _folder(size + room, *reversed(_places()))
    path = f"{folder}/stackctl.zip"
    try:
        with open(path, "xb") as stream:  # noqa: PTH123 - pathlib costs time, and is not needed
            stream.write(data)
    except OSError as error:
        _fail(f"it cannot be kept in {folder}: {error.strerror}")
    sys.stdout.write(f"kept {path}\n")
    sys.stdout.flush()
    sys.stdin.buffer.read()


def start(path: str, digest: str, caller: str, *words: str) -> None:
    """Run the stackctl in the file ``path`` with ``words``; it is gone when that ends."""
    try:
        with open(path, "rb") as stream:  # noqa: PTH123
            data = stream.read()
    except OSError as error:
        _fail(f"the bundle cannot be read: {error.strerror}")
    if hashlib.sha256(data).hexdigest() != digest:
        _fail(f"{path} is not the bundle that was sent")
    archive = zipfile.ZipFile(io.BytesIO(data))
    folder = _folder(sum(entry.file_size for entry in archive.infolist()), *_places())
    try:
        archive.extractall(folder)
    except OSError as error:
        _fail(f"cannot unpack it in {folder}: {error.strerror}")
    del data, archive
    # sudo would have left it out.
    os.environ["STACKCTL_CALLER"] = caller
    sys.argv = ["stackctl", *words]
    sys.path.insert(0, folder)
    runpy.run_module("stackctl", run_name="__main__")


def _folder(size: int, *places: str) -> str:
    """A new folder of this user's alone, in the first of ``places`` where ``size`` bytes of
    programs may be; it goes when this process ends.

    A process of its own makes it, waits for the end of this one, however it ends, and removes it.
    """
    told, tells = os.pipe()
    ours, its = os.pipe()
    if os.fork():
        os.close(tells)
        os.close(ours)
        with open(told, encoding="utf-8") as stream:  # noqa: PTH123
            return stream.read() or _fail(
                f"neither {' nor '.join(places)} has {size / 2**20:.0f} MiB left for programs: "
                "full, read-only, or mounted noexec"
            )
    os.setsid()
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    os.close(its)
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    for place in places:
        try:
            seen = os.statvfs(place)
            if seen.f_bavail * seen.f_frsize < size or seen.f_flag & os.ST_NOEXEC:
                continue
            folder = tempfile.mkdtemp(prefix=PREFIX, dir=place)
        except OSError:
            continue
        os.write(tells, folder.encode())
        os.close(tells)
        os.read(ours, 1)
        shutil.rmtree(folder, ignore_errors=True)
        break
    os._exit(0)


def _places() -> tuple[str, ...]:
    return pwd.getpwuid(os.geteuid()).pw_dir, "/var/tmp"


def _fail(why: str) -> NoReturn:
    sys.stderr.write(f"error: {why}\n")
    sys.exit(6)


if __name__ == "__main__":
    try:
        if sys.argv[1] == "keep":
            keep(int(sys.argv[2]), int(sys.argv[3]))
        else:
            start(*sys.argv[2:])
    except KeyboardInterrupt:
        # Before there was a stackctl that says it itself.
        sys.exit(130)
