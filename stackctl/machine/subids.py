"""Lines of /etc/subuid and /etc/subgid, changed under the lock that shadow's programs take.

usermod could add lines, too, but it removes none while the user has processes, and it leaves a
backup of the file each time.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

from stackctl.errors import StackctlError
from stackctl.machine.files import write_atomically

#: The file that lckpwdf(3) locks; useradd, usermod and userdel call it first.
_LOCK = ".pwd.lock"
_PATIENCE_S = 15.0


def add_line(file: Path, line: str) -> None:
    """Add a line, unless the file has it. Raises StackctlError if the file stays locked."""
    with _locked_lines(file) as lines:
        if line not in lines:
            lines.append(line)


def remove_line(file: Path, line: str) -> None:
    """Remove a line, if the file has it. Raises StackctlError if the file stays locked."""
    with _locked_lines(file) as lines:
        lines[:] = [other for other in lines if other != line]


@contextlib.contextmanager
def _locked_lines(file: Path) -> Iterator[list[str]]:
    """Yield the lines of a locked file; write them back if they were changed."""
    try:
        descriptor = os.open(file.parent / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StackctlError(f"cannot lock {file}: {error.strerror}") from None
    try:
        deadline = time.monotonic() + _PATIENCE_S
        while True:
            try:
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if time.monotonic() > deadline:
                    raise StackctlError(
                        f"{file} is being changed by another program",
                        hint="wait until useradd, usermod or the like is done, then again",
                    ) from None
                time.sleep(0.1)
        try:
            text = file.read_text("utf-8")
        except FileNotFoundError:
            text = ""
        lines = text.splitlines()
        yield lines
        if lines != text.splitlines():
            mode = file.stat().st_mode & 0o7777 if file.exists() else 0o644
            text = "".join(line + "\n" for line in lines)
            write_atomically(file, text, mode=mode, keep_folder=True)
    finally:
        os.close(descriptor)
