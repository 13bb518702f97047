"""This stackctl itself, copied to where only root can write: for sudo, timers and other users."""

from __future__ import annotations

import compileall
import hashlib
import importlib.util
import re
import shutil
import sys
import tomllib
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path

import stackctl
from stackctl.errors import ExitCode, StackctlError
from stackctl.machine.files import write_atomically
from stackctl.resources import data_folder

_DISTRIBUTION = "stackctl-inference"
_PACKAGE = Path(stackctl.__file__).parent
_DATA = ("templates", "profiles", "systemd")
#: Isolated (-I): neither the caller's variables nor a user's packages have a say.
_LAUNCHER = """\
#!{python} -I
import sys

sys.path.insert(0, {lib!r})
from stackctl.__main__ import main

sys.exit(main())
"""


def python() -> Path:
    """The interpreter below any virtual environment."""
    return Path(sys.executable).resolve()


def fingerprint() -> str:
    """What this stackctl is, by its own files."""
    digest = hashlib.sha256()
    for target, source in sorted(own_files()):
        digest.update(target.encode() + b"\0" + source.read_bytes() + b"\0")
    return digest.hexdigest()


def install(folder: Path) -> None:
    """Copy stackctl and the packages it uses into a folder, in one step for who looks.

    Raises:
        StackctlError: a package's files are not known, the disk is full.
    """
    made = folder.with_name(f".{folder.name}.new")
    old = folder.with_name(f".{folder.name}.old")
    try:
        for left in (made, old):
            shutil.rmtree(left, ignore_errors=True)
        for distribution in packages():
            for target, source in files_of(distribution):
                _copy(source, made / "lib" / target)
        for target, source in own_files():
            _copy(source, made / "lib" / target)
        target, text = own_metadata()
        write_atomically(made / "lib" / target, text)
        compileall.compile_dir(made / "lib", quiet=2)
        lib = str(folder / "lib")
        text = _LAUNCHER.format(python=python(), lib=lib)
        write_atomically(made / "bin" / "stackctl", text, mode=0o755)
        write_atomically(made / "fingerprint", fingerprint() + "\n")
        for path in (made, *made.rglob("*")):
            path.chmod(0o755 if path.is_dir() or path.name == "stackctl" else 0o644)
        if folder.exists():
            folder.rename(old)
        made.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        shutil.rmtree(made, ignore_errors=True)
        raise StackctlError(f"cannot copy stackctl to {folder}: {error.strerror}") from None


def _copy(source: Path, place: Path) -> None:
    """Copy a file with its time, by which Python knows what it has compiled of it: that comes too,
    as others than root could not keep it."""
    place.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(source, place)
    if source.suffix == ".py":
        compiled = Path(importlib.util.cache_from_source(str(source)))
        if compiled.is_file():
            (place.parent / "__pycache__").mkdir(exist_ok=True)
            shutil.copy2(compiled, place.parent / "__pycache__" / compiled.name)


def remove(folder: Path) -> None:
    """Remove such a folder; this very program may run from it."""
    shutil.rmtree(folder, ignore_errors=True)


def current(folder: Path) -> bool:
    """Whether a folder holds this very stackctl."""
    try:
        return (folder / "fingerprint").read_text("utf-8").strip() == fingerprint()
    except OSError:
        return False


def own_files() -> Iterator[tuple[str, Path]]:
    """The package's files and the data it ships, by where they go below ``lib``."""
    for path in _PACKAGE.rglob("*"):
        parts = path.relative_to(_PACKAGE).parts
        if path.is_file() and not {"__pycache__", "_data"} & set(parts):
            yield "/".join(("stackctl", *parts)), path
    for name in _DATA:
        folder = data_folder(name)
        for path in folder.rglob("*"):
            if path.is_file():
                yield "/".join(("stackctl/_data", name, *path.relative_to(folder).parts)), path


def own_metadata() -> tuple[str, str]:
    """Where the file is, and what it says: which version this is, and what that requires. It is
    written and not copied, since a checkout may have changed after it was installed."""
    lines = ["Metadata-Version: 2.1", f"Name: {_DISTRIBUTION}", f"Version: {stackctl.__version__}"]
    lines += [f"Requires-Dist: {line}" for line in requirements()]
    name = _DISTRIBUTION.replace("-", "_")
    return f"{name}-{stackctl.__version__}.dist-info/METADATA", "\n".join(lines) + "\n"


def requirements() -> tuple[str, ...]:
    """What stackctl requires, as packages say it (PEP 508); an installed one's, or a checkout's.

    Raises:
        StackctlError: exit 6 when neither is known.
    """
    try:
        return tuple(metadata.requires(_DISTRIBUTION) or ())
    except metadata.PackageNotFoundError:
        pass
    try:
        project = tomllib.loads((_PACKAGE.parent / "pyproject.toml").read_text("utf-8"))["project"]
    except (OSError, tomllib.TOMLDecodeError, KeyError):
        raise _unknown("which Python packages stackctl needs") from None
    extras = project.get("optional-dependencies", {}).items()
    more = (f"{line} ; extra == '{extra}'" for extra, lines in extras for line in lines)
    return (*project["dependencies"], *more)


def packages() -> tuple[metadata.Distribution, ...]:
    """The packages that stackctl imports, and those that these import, as they are here.

    Of extras, what is installed.
    """
    pending, found = _names(requirements(), extras=True), dict[str, metadata.Distribution]()
    seen = {_DISTRIBUTION}
    while pending:
        name = pending.pop()
        if name in seen:
            continue
        seen.add(name)
        try:
            found[name] = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            # For another Python or system, or an extra that was not asked for.
            continue
        # What other packages want for their own development is no part of them.
        pending += _names(found[name].requires or (), extras=False)
    return tuple(found.values())


def files_of(distribution: metadata.Distribution) -> Iterator[tuple[str, Path]]:
    """Files of a package, by where they go below ``lib``.

    Raises:
        StackctlError: exit 6 when they are not recorded.
    """
    if distribution.files is None:
        raise _unknown(f"which files belong to the Python package {distribution.name}")
    for file in distribution.files:
        path = Path(str(file.locate()))
        outside = ".." in file.parts or file.is_absolute() or "__pycache__" in file.parts
        # Scripts of other packages, and what was compiled for a path that it leaves.
        if not outside and file.parts[0] != "bin" and path.is_file():
            yield str(file), path


def _names(lines: Iterable[str], *, extras: bool) -> list[str]:
    wanted = (line for line in lines if extras or "extra ==" not in line)
    found = (re.match(r"[\w.-]+", line) for line in wanted)
    return [match[0].lower().replace("_", "-") for match in found if match]


def _unknown(what: str) -> StackctlError:
    return StackctlError(
        f"{what} is not recorded",
        hint="install stackctl with pip or pipx, then again",
        exit_code=ExitCode.HOST,
    )
