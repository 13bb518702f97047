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

from stackctl.deploy import image_wheels
from stackctl.errors import ExitCode, StackctlError
from stackctl.machine import runner
from stackctl.machine.path_security import make_private_folder
from stackctl.provision import remote_bootstrap_main, self_install

#: As in pyproject.toml.
OLDEST = (3, 11)
_NVIDIA = "nvidia-ml-py"
_PIP_S = 600
#: N of the oldest glibc 2.N that wheels are tagged for: manylinux1 means 2.5 (PEP 600).
_OLDEST_GLIBC = 5
_UNREACHABLE = re.compile(r"(?i)connection|timed? ?out|retries exceeded|resolve|proxy|ssl")
#: Run by sh on the box, with _PYTHON as $1. Only the system's folders are searched for Python,
#: because root must not run one that a user has installed. No line ends: not every login shell
#: passes them on.
_LOOK = (
    'echo "uid $(id -u)"; command -v sudo >/dev/null && echo sudo; '
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
#: One argument without line ends, for the same reason.
_UNPACK = "import base64, sys; exec(base64.b64decode(sys.argv.pop(1)))"


@dataclass(frozen=True)
class RemotePython:
    """A Python of another machine: its path, version and hardware name (``uname -m``).

    ``glibc`` is N of its glibc 2.N, None for another C library or another Python than CPython.
    ``nvidia`` is True if the machine has an NVIDIA GPU.
    """

    python: str
    version: tuple[int, int]
    machine: str
    glibc: int | None
    nvidia: bool = False

    def __str__(self) -> str:
        return f"Python {self.version[0]}.{self.version[1]} on {self.machine}"


@dataclass(frozen=True)
class RemoteFacts:
    """Facts of the box: number of the user (-1: unknown), ``sudo`` (True if it is installed),
    version of its stackctl (None: not installed), and its Pythons, the preferred first."""

    uid: int
    sudo: bool
    version: str | None
    pythons: tuple[RemotePython, ...]

    def choose_python(self, destination: str) -> RemotePython:
        """Return the Python to run stackctl with. Raises StackctlError (exit 6) if none fits."""
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


def probe_command() -> str:
    """Return the command for the box that prints its facts."""
    return shlex.join(["exec", "sh", "-c", _LOOK, "sh", _PYTHON])


def parse_probe(text: str) -> RemoteFacts:
    """Return the facts in the output of the command that ``probe_command`` returns."""
    uid, sudo, version, pythons = -1, False, None, []
    for line in text.splitlines():
        match line.split():
            case ["uid", number] if number.isdecimal():
                uid = int(number)
            case ["sudo"]:
                sudo = True
            case ["stackctl", found]:
                version = found
            case ["python", path, found, machine, implementation, libc] if numbers := re.fullmatch(
                r"(\d+)\.(\d+)", found
            ):
                python = int(numbers[1]), int(numbers[2])
                glibc = _glibc(libc) if implementation == "CPython" else None
                pythons.append(RemotePython(path, python, machine, glibc, "\nnvidia\n" in text))
    return RemoteFacts(uid, sudo, version, tuple(pythons))


def _glibc(libc: str) -> int | None:
    """Return N of "glibc-2.N", also for development versions (2.41.9000); None for others."""
    found = re.match(r"glibc-2\.(\d+)", libc)
    return int(found[1]) if found else None


def is_older(version: str, other: str) -> bool:
    """Return True if a version is older than another one, by their numbers."""
    one, two = (tuple(int(n) for n in re.findall(r"\d{1,9}", text)) for text in (version, other))
    return one < two


def build_bundle(target: RemotePython, cache: Path, tell: Callable[[str], None]) -> bytes:
    """Return the bundle: a zip archive of stackctl and the packages that it needs on the target.

    Packages that pip downloads are kept in ``cache``. ``tell`` is called with a text before a step
    that takes long.

    Raises:
        StackctlError: exit 6 if packages cannot be downloaded.
    """
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED, strict_timestamps=False) as archive:
        for name, path in (*_packages(target, cache, tell), *self_install.own_files()):
            archive.write(path, name)
        archive.writestr(*self_install.package_metadata())
    return out.getvalue()


def unpacked_bytes(data: bytes) -> int:
    """Return the bytes of a bundle's files after unpacking."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return sum(entry.file_size for entry in archive.infolist())


def bootstrap_command(target: RemotePython, *words: str) -> tuple[str, ...]:
    """Return the command that runs a function of ``remote_bootstrap_main`` on the target.

    It leaves out that machine's own packages (-S), because the item ``stackctl`` could take them
    for packages of the bundle.
    """
    text = base64.b64encode(Path(remote_bootstrap_main.__file__).read_bytes()).decode()
    return (target.python, "-I", "-S", "-c", _UNPACK, text, *words)


def _packages(
    target: RemotePython, cache: Path, tell: Callable[[str], None]
) -> Iterator[tuple[str, Path]]:
    """Yield the packages' files with their names in the bundle.

    They are copied from this machine if they run on the target too, else downloaded.
    """
    here = self_install.required_distributions()
    asks_gpu = any(one.name.lower() == _NVIDIA for one in here)
    # Python packages that a Linux distribution installs may have no list of their files.
    known = all(one.files is not None for one in here)
    if known and _alike(target) and (asks_gpu or not target.nvidia):
        for one in here:
            yield from self_install.distribution_files(one)
        return
    wanted = [f"{one.name}=={one.version}" for one in here]
    if target.nvidia and not asks_gpu:
        lines = (line.partition(";")[0].strip() for line in self_install.requirements())
        wanted += [line for line in lines if line.startswith(_NVIDIA)]
    folder = _fetched(target, sorted(wanted), cache / "brought", tell)
    for path in folder.rglob("*"):
        parts = path.relative_to(folder).parts
        if path.is_file() and parts[0] != "bin" and "__pycache__" not in parts:
            yield "/".join(parts), path


def _alike(target: RemotePython) -> bool:
    """Return True if packages compiled for this Python run on the target's."""
    glibc = _glibc("-".join(platform.libc_ver()))
    return (
        sys.implementation.name == "cpython"
        and (sys.version_info[:2], platform.machine()) == (target.version, target.machine)
        and target.glibc is not None
        and glibc is not None
        and glibc <= target.glibc
    )


def _fetched(
    target: RemotePython, wanted: list[str], cache: Path, tell: Callable[[str], None]
) -> Path:
    """Return a folder with these packages for the target, downloaded with pip if not cached."""
    key = hashlib.sha256(f"{target.version}{target.machine}{target.glibc}{wanted}".encode())
    folder = cache / key.hexdigest()[:16]
    if folder.is_dir():
        return folder
    make_private_folder(cache)
    tell(f"fetching {len(wanted)} packages for {target} with pip")
    made = cache / f".{folder.name}.{os.getpid()}"
    try:
        done = runner.run_process_group(
            (
                *image_wheels.pip_command(sys.executable, "python3"), "install", "--quiet",
                "--no-deps", "--no-compile", "--only-binary=:all:",
                "--disable-pip-version-check", "--no-input",
                "--implementation=cp", f"--python-version={target.version[0]}.{target.version[1]}",
                *(f"--platform={name}" for name in platforms(target)),
                f"--target={made}", *wanted,
            ),
            timeout_s=_PIP_S,
            extra_env=image_wheels.pip_environment(),
        )  # fmt: skip
        if done.status != 0:
            raise _failure(target, done.stdout)
        made.rename(folder)
    except OSError as error:
        # Another stackctl may have made the folder meanwhile.
        if not folder.is_dir():
            raise StackctlError(f"cannot write {cache}: {error.strerror}") from None
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return folder


def platforms(target: RemotePython) -> tuple[str, ...]:
    """Return the platform tags of wheels that run on the target (PEP 600), the newest first."""
    assert target.glibc is not None
    levels = range(target.glibc, _OLDEST_GLIBC - 1, -1)
    named = ("manylinux2014", "manylinux2010", "manylinux1")
    return tuple(
        f"{name}_{target.machine}" for name in (*(f"manylinux_2_{n}" for n in levels), *named)
    )


def _failure(target: RemotePython, said: str) -> StackctlError:
    missing = re.search(r"No matching distribution found for (\S+)", said)
    if missing and not _UNREACHABLE.search(said):
        message = f"there is no wheel of {missing[1]} for {target}"
        hint = "pip looked where your settings say (pip config list); or install stackctl there"
    else:
        message = f"the packages for {target} cannot be fetched"
        hint = "the package index of your settings must be reachable from here (pip config list)"
    lines = [line for line in said.splitlines() if line.strip()]
    return StackctlError(message, details=lines[-6:], hint=hint, exit_code=ExitCode.HOST)
