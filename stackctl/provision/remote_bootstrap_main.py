"""Program that receives stackctl on a machine without it and runs it (``python3 -I -S -c``).

It imports nothing of stackctl, which is not unpacked yet, and leaves no file behind.

- ``hold_bundle`` stores the bundle while the connection lasts.
- ``run_bundle`` checks its hash, unpacks it into a folder of its own user and runs it, even if the
  connection ends. Under sudo that user is root, so the caller's user cannot change the code.
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

#: The names of all folders made here begin with this.
PREFIX = ".stackctl-brought-"


def hold_bundle(size: int, room: int) -> None:
    """Store ``size`` bytes of stdin in a file, print its path, and keep it until stdin ends.

    Exit with 6 if there is no room for it and for its ``room`` unpacked bytes.
    """
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    data = sys.stdin.buffer.read(size)
    if len(data) < size:
        _fail(f"{len(data)} of {size} bytes arrived")
    # /var/tmp comes first: root, who reads the file, may have no access to a home on NFS.
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


def run_bundle(path: str, digest: str, caller: str, *words: str) -> None:
    """Unpack the stackctl in the file ``path``, run it with ``words``, and remove it at its end.

    Exit with 6 if the file does not have the SHA-256 ``digest``.
    """
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
    # sudo does not pass the variable on, so an argument carries it.
    os.environ["STACKCTL_CALLER"] = caller
    sys.argv = ["stackctl", *words]
    sys.path.insert(0, folder)
    runpy.run_module("stackctl", run_name="__main__")


def _folder(size: int, *places: str) -> str:
    """Return a new folder that only this user can open, in the first of ``places`` that has
    ``size`` bytes left and may hold programs; exit with 6 if there is none.

    A child process makes the folder and removes it when this process ends, even if it is killed.
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
            hold_bundle(int(sys.argv[2]), int(sys.argv[3]))
        else:
            run_bundle(*sys.argv[2:])
    except KeyboardInterrupt:
        # Interrupted before stackctl ran, which handles an interrupt itself.
        sys.exit(130)
