"""This stackctl as an archive for another machine, with the packages that its Python needs."""

from __future__ import annotations

import base64
import hashlib
import io
import os
import platform
import re
import shlex
import shutil
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from stackctl.deploy.imagewheels import _PIP_SETTINGS
from stackctl.errors import ExitCode, StackctlError
from stackctl.machine import runner
from stackctl.machine.trust import private_folder
from stackctl.provision import arrival, program

#: As in pyproject.toml.
OLDEST = (3, 11)
_NVIDIA = "nvidia-ml-py"
_PIP_S = 600
#: The oldest glibc that wheels are tagged for: manylinux1 is 2.5 (PEP 600).
_OLDEST_GLIBC = 5
_UNREACHABLE = re.compile(r"(?i)connection|timed? ?out|retries exceeded|resolve|proxy|ssl")
#: Run by sh on the box, with _PYTHON as $1. Root is to run no Python that a user has put somewhere,
#: so only the system's folders count. No line ends: not every login shell lets them through.
_LOOK = (
    'echo "uid $(id -u)"; '
    '(PATH="$PATH:$HOME/.local/bin"; stackctl --version) 2>/dev/null; '
    "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin; "
    "grep -qs 0x10de /sys/bus/pci/devices/*/vendor && echo nvidia; "
    "for name in python3 python3.14 python3.13 python3.12 python3.11; do "
    'command -v "$name" >/dev/null && "$name" -I -c "$1"; done; exit 0'
)
_PYTHON = (
    'import platform, sys; print("python", sys.executable, "%d.%d" % sys.version_info[:2], '
    'platform.machine(), platform.python_implementation(), "-".join(platform.libc_ver()))'
)
#: As one word without line ends.
_UNPACK = "import base64, sys; exec(base64.b64decode(sys.argv.pop(1)))"


@dataclass(frozen=True)
class Target:
    """A Python of another machine: its path, version and machine, the minor number of its glibc
    2.N (None: another C library), and whether an NVIDIA card is there to be asked."""

    python: str
    version: tuple[int, int]
    machine: str
    glibc: int | None
    nvidia: bool = False

    def __str__(self) -> str:
        return f"Python {self.version[0]}.{self.version[1]} on {self.machine}"


@dataclass(frozen=True)
class Seen:
    """What the box has: user number, version of its stackctl, and Pythons, the preferred first."""

    uid: int
    version: str | None
    pythons: tuple[Target, ...]

    def target(self, destination: str) -> Target:
        """The Python to run stackctl by. Raises StackctlError (exit 6) when there is none."""
        for found in self.pythons:
            if found.version >= OLDEST and found.glibc is not None:
                return found
        older = [
            f"{found.python} is {found.version[0]}.{found.version[1]}" for found in self.pythons
        ]
        raise StackctlError(
            f"{destination} has no Python that runs stackctl: "
            + (", ".join(older) or "there is no python3"),
            hint="CPython 3.11 or later with glibc, as Debian 12 and Ubuntu 24.04 have it: install "
            "python3 there, or a newer release",
            exit_code=ExitCode.HOST,
        )


def look() -> str:
    """The command by which a box tells what it has."""
    return shlex.join(["exec", "sh", "-c", _LOOK, "sh", _PYTHON])


def seen(text: str) -> Seen:
    """What a box has told."""
    uid, version, pythons = -1, None, []
    for line in text.splitlines():
        match line.split():
            case ["uid", number] if number.isdecimal():
                uid = int(number)
            case ["stackctl", found]:
                version = found
            case ["python", path, found, machine, implementation, libc]:
                major, minor = (int(part) for part in found.split("."))
                level = re.fullmatch(r"glibc-2\.(\d+)", libc)
                glibc = int(level[1]) if level and implementation == "CPython" else None
                pythons.append(Target(path, (major, minor), machine, glibc, "\nnvidia\n" in text))
    return Seen(uid, version, tuple(pythons))


def older(version: str, other: str) -> bool:
    """Whether a version comes before another one; by its numbers."""
    one, two = (tuple(int(n) for n in re.findall(r"\d{1,9}", text)) for text in (version, other))
    return one < two


def pack(target: Target, cache: Path, tell: Callable[[str], None]) -> bytes:
    """A zip archive of stackctl and what it needs there. What pip fetches is kept in ``cache``.

    Args:
        tell: hears what takes long.

    Raises:
        StackctlError: exit 6 when packages cannot be had.
    """
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED, strict_timestamps=False) as archive:
        for name, path in (*_packages(target, cache, tell), *program.own_files()):
            archive.write(path, name)
        archive.writestr(*program.own_metadata())
    return out.getvalue()


def unpacked_bytes(data: bytes) -> int:
    """What such an archive holds."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return sum(entry.file_size for entry in archive.infolist())


def arrive(target: Target, *words: str) -> tuple[str, ...]:
    """The words that run a function of ``arrival`` there."""
    text = base64.b64encode(Path(arrival.__file__).read_bytes()).decode()
    return (target.python, "-I", "-c", _UNPACK, text, *words)


def _packages(
    target: Target, cache: Path, tell: Callable[[str], None]
) -> Iterator[tuple[str, Path]]:
    """Files of the packages by their names: those of here where they would run there as well."""
    here = program.packages()
    asks_gpu = any(one.name.lower() == _NVIDIA for one in here)
    # Of a distribution's own packages nobody knows the files.
    known = all(one.files is not None for one in here)
    if known and _alike(target) and (asks_gpu or not target.nvidia):
        for one in here:
            yield from program.files_of(one)
        return
    wanted = [f"{one.name}=={one.version}" for one in here]
    if target.nvidia and not asks_gpu:
        lines = (line.partition(";")[0].strip() for line in program.requirements())
        wanted += [line for line in lines if line.startswith(_NVIDIA)]
    folder = _fetched(target, sorted(wanted), cache / "brought", tell)
    for path in folder.rglob("*"):
        parts = path.relative_to(folder).parts
        if path.is_file() and parts[0] != "bin" and "__pycache__" not in parts:
            yield "/".join(parts), path


def _alike(target: Target) -> bool:
    """Whether what was compiled for this Python runs by that one."""
    name, _, level = (os.confstr("CS_GNU_LIBC_VERSION") or "").partition(" 2.")
    return (
        (name, sys.implementation.name) == ("glibc", "cpython")
        and (sys.version_info[:2], platform.machine()) == (target.version, target.machine)
        and target.glibc is not None
        and int(level) <= target.glibc
    )


def _fetched(target: Target, wanted: list[str], cache: Path, tell: Callable[[str], None]) -> Path:
    """A folder with those packages for that Python, by pip where it is not there yet."""
    key = hashlib.sha256(f"{target.version}{target.machine}{target.glibc}{wanted}".encode())
    folder = cache / key.hexdigest()[:16]
    if folder.is_dir():
        return folder
    private_folder(cache)
    tell(f"fetching {len(wanted)} packages for {target} with pip")
    made = cache / f".{folder.name}.{os.getpid()}"
    try:
        done = runner.run_family(
            (
                *_pip(), "install", "--quiet", "--no-deps", "--no-compile", "--only-binary=:all:",
                "--disable-pip-version-check", "--no-input", "--root-user-action=ignore",
                "--implementation=cp", f"--python-version={target.version[0]}.{target.version[1]}",
                *(f"--platform={name}" for name in platforms(target)),
                f"--target={made}", *wanted,
            ),
            timeout_s=_PIP_S,
            extra_env={name: os.environ[name] for name in _PIP_SETTINGS if name in os.environ},
        )  # fmt: skip
        if done.status != 0:
            raise _failure(target, done.stdout)
        # Somebody else may have been faster.
        if not folder.is_dir():
            made.rename(folder)
    except OSError as error:
        raise StackctlError(f"cannot write {cache}: {error.strerror}") from None
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return folder


def platforms(target: Target) -> tuple[str, ...]:
    """Names of platforms whose wheels run there (PEP 600), the newest first."""
    assert target.glibc is not None
    levels = range(target.glibc, _OLDEST_GLIBC - 1, -1)
    named = ("manylinux2014", "manylinux2010", "manylinux1")
    return tuple(
        f"{name}_{target.machine}" for name in (*(f"manylinux_2_{n}" for n in levels), *named)
    )


def _pip() -> tuple[str, ...]:
    for python in (sys.executable, "python3"):
        words = (python, "-m", "pip")
        if shutil.which(python) and runner.run((*words, "--version"), check=False).status == 0:
            return words
    raise StackctlError(
        "there is no pip here, which fetches the packages that stackctl needs there",
        hint="apt-get install python3-pip; or install stackctl there",
        exit_code=ExitCode.HOST,
    )


def _failure(target: Target, said: str) -> StackctlError:
    lines = [line for line in said.splitlines() if line.strip()]
    missing = re.search(r"No matching distribution found for (\S+)", said)
    if missing and not _UNREACHABLE.search(said):
        return StackctlError(
            f"there is no wheel of {missing[1]} for {target}",
            details=lines[-6:],
            hint="pip looked where your settings say (pip config list); or install stackctl there",
            exit_code=ExitCode.HOST,
        )
    return StackctlError(
        f"the packages for {target} cannot be fetched",
        details=lines[-6:],
        hint="the package index of your settings must be reachable from here (pip config list)",
        exit_code=ExitCode.HOST,
    )
