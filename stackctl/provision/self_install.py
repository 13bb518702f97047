"""A copy of this stackctl that only root can change, for sudo, timers and other users."""

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
#: Isolated (-I): the caller's variables and packages have no effect.
_LAUNCHER = """\
#!{python} -I
import sys

sys.path.insert(0, {lib!r})
from stackctl.__main__ import main

sys.exit(main())
"""


def base_python() -> Path:
    """Return the path of the interpreter itself, outside any virtual environment."""
    return Path(sys.executable).resolve()


def fingerprint() -> str:
    """Return the SHA-256 of this stackctl's own files and their names."""
    digest = hashlib.sha256()
    for target, source in sorted(own_files()):
        digest.update(target.encode() + b"\0" + source.read_bytes() + b"\0")
    return digest.hexdigest()


def install_program(folder: Path) -> None:
    """Copy stackctl and the packages it uses into a folder.

    The copy is made beside the folder and then takes its place.

    Raises:
        StackctlError: a package has no list of its files, or the folder cannot be written.
    """
    made = folder.with_name(f".{folder.name}.new")
    old = folder.with_name(f".{folder.name}.old")
    try:
        for left in (made, old):
            shutil.rmtree(left, ignore_errors=True)
        for distribution in required_distributions():
            for target, source in distribution_files(distribution):
                _copy(source, made / "lib" / target)
        for target, source in own_files():
            _copy(source, made / "lib" / target)
        target, text = package_metadata()
        write_atomically(made / "lib" / target, text)
        compileall.compile_dir(made / "lib", quiet=2)
        lib = str(folder / "lib")
        text = _LAUNCHER.format(python=base_python(), lib=lib)
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
    """Copy a file with its time and its compiled code.

    Python uses compiled code only if it names the file's time. Users other than root could not
    store compiled code in the copy.
    """
    place.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(source, place)
    if source.suffix == ".py":
        compiled = Path(importlib.util.cache_from_source(str(source)))
        if compiled.is_file():
            (place.parent / "__pycache__").mkdir(exist_ok=True)
            shutil.copy2(compiled, place.parent / "__pycache__" / compiled.name)


def is_current(folder: Path) -> bool:
    """Return True if a folder holds a copy of exactly this stackctl."""
    try:
        return (folder / "fingerprint").read_text("utf-8").strip() == fingerprint()
    except OSError:
        return False


def own_files() -> Iterator[tuple[str, Path]]:
    """Yield stackctl's files and its data, each with its path below ``lib``."""
    for path in _PACKAGE.rglob("*"):
        parts = path.relative_to(_PACKAGE).parts
        if path.is_file() and not {"__pycache__", "_data"} & set(parts):
            yield "/".join(("stackctl", *parts)), path
    for name in _DATA:
        folder = data_folder(name)
        for path in folder.rglob("*"):
            if path.is_file():
                yield "/".join(("stackctl/_data", name, *path.relative_to(folder).parts)), path


def package_metadata() -> tuple[str, str]:
    """Return path (below ``lib``) and text of the METADATA file: version and requirements.

    It is not copied, because a checkout may have changed after it was installed.
    """
    lines = ["Metadata-Version: 2.1", f"Name: {_DISTRIBUTION}", f"Version: {stackctl.__version__}"]
    lines += [f"Requires-Dist: {line}" for line in requirements()]
    name = _DISTRIBUTION.replace("-", "_")
    return f"{name}-{stackctl.__version__}.dist-info/METADATA", "\n".join(lines) + "\n"


def requirements() -> tuple[str, ...]:
    """Return the requirements of stackctl (PEP 508), from its metadata or else its pyproject.toml.

    Raises:
        StackctlError: exit 6 if neither can be read.
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


def required_distributions() -> tuple[metadata.Distribution, ...]:
    """Return the installed packages that stackctl requires, and those that these require.

    The packages of stackctl's extras are included if they are installed.
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
            # A package for another Python or system, or one of an extra that is not installed.
            continue
        # The extras of other packages are not needed.
        pending += _names(found[name].requires or (), extras=False)
    return tuple(found.values())


def distribution_files(distribution: metadata.Distribution) -> Iterator[tuple[str, Path]]:
    """Yield the files of a package, each with its path below ``lib``.

    Raises:
        StackctlError: exit 6 if the package has no list of its files.
    """
    if distribution.files is None:
        raise _unknown(f"which files belong to the Python package {distribution.name}")
    for file in distribution.files:
        path = Path(str(file.locate()))
        outside = ".." in file.parts or file.is_absolute() or "__pycache__" in file.parts
        # Leave out scripts, and compiled code, which names the path of its source.
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
