"""Access to the machine that runs the lab: packages, processes, cached results."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]


class LabError(Exception):
    """The lab cannot be built or used; the message gives the reason."""


def say(message: str) -> None:
    """Print one line of progress."""
    print(f"lab: {message}", file=sys.stderr, flush=True)


def cache_root() -> Path:
    """Return the folder of all cached results."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    path = Path(base) / "stackctl-lab"
    path.mkdir(parents=True, exist_ok=True)
    return path


def call(
    argv: Sequence[str | os.PathLike[str]],
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    timeout: float = 1800,
) -> str:
    """Run a command on this machine and return its output. Raise LabError with its error output."""
    words = [os.fspath(word) for word in argv]
    try:
        done = subprocess.run(
            words,
            env=dict(os.environ, LC_ALL="C.UTF-8", **(env or {})),
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise LabError(f"{shlex.join(words)}: {error}") from error
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip())[-3000:]
        raise LabError(f"{shlex.join(words)} exited {done.returncode}\n{said}")
    return done.stdout


def call_confined(argv: Sequence[str | os.PathLike[str]]) -> str:
    """Run a command in namespaces that end all its processes and mounts with it and with us."""
    confined = ["setpriv", "--pdeathsig", "KILL", "unshare", "--mount", "--pid", "--fork"]
    return call([*confined, "--mount-proc", "--kill-child=KILL", "--", *argv])


def need_root() -> None:
    """Raise LabError if the lab cannot work on this machine."""
    if sys.platform != "linux" or os.geteuid() != 0:
        raise LabError("the lab boots a real init system: it needs Linux and root (try sudo)")


def need(programs: Mapping[str, str]) -> None:
    """Install the missing packages of those programs (program -> package)."""
    missing = sorted({pkg for program, pkg in programs.items() if not shutil.which(program)})
    if missing:
        install(missing)


def install(packages: Sequence[str]) -> None:
    """Install Debian packages. The package lists are refreshed only if the first attempt fails."""
    need_root()
    if not shutil.which("apt-get"):
        raise LabError(f"missing, and there is no apt-get to install them: {' '.join(packages)}")
    say(f"installing {' '.join(packages)}")
    command = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", *packages]
    # apt waits for another apt on the machine and does not fail at its lock.
    command[1:1] = ["-o", "DPkg::Lock::Timeout=300"]
    quiet = {"DEBIAN_FRONTEND": "noninteractive"}
    with locked("apt"):
        try:
            call(command, env=quiet)
        except LabError:
            call(["apt-get", "update", "-qq"])
            call(command, env=quiet)


def mirror() -> str:
    """Return the Debian mirror of this machine's own apt."""
    chosen = os.environ.get("LAB_MIRROR")
    if chosen:
        return chosen
    query = ["apt-get", "indextargets", "--format", "$(REPO_URI)"]
    query += ["Created-By: Packages", "Label: Debian"]
    for refresh in (False, True):
        if refresh:
            # Without downloaded lists apt has no labels.
            call(["apt-get", "update", "-qq"])
        for line in call(query).splitlines():
            if line.strip():
                return line.strip()
    raise LabError("no Debian mirror in the apt sources of this machine: set LAB_MIRROR")


def pip() -> list[str]:
    """Return the command that starts pip; a virtual environment may lack its own."""
    if importlib.util.find_spec("pip"):
        return [sys.executable, "-m", "pip"]
    for python in ("/usr/bin/python3", shutil.which("python3") or "python3"):
        words = [python, "-m", "pip"]
        with contextlib.suppress(LabError):
            call([*words, "--version"])
            return words
    install(["python3-pip"])
    return ["/usr/bin/python3", "-m", "pip"]


def fingerprint(*parts: object) -> str:
    """Return a short hash of a recipe.

    Its parts are values that JSON can hold, bytes, and paths, whose content counts.
    """
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, Path):
            data = part.read_bytes()
        elif isinstance(part, bytes):
            data = part
        else:
            data = json.dumps(part, sort_keys=True).encode()
        digest.update(len(data).to_bytes(8, "big") + data)
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def locked(name: str) -> Iterator[None]:
    """Hold the lock of that name. A second builder prints a line and waits."""
    path = cache_root() / "locks" / name
    path.parent.mkdir(exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"waiting for another builder of {name}")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def remove_tree(path: Path) -> None:
    """Delete a file, or a folder with its content."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def cached(kind: str, key: str, build: Callable[[Path], None], *, name: str = "") -> Path:
    """Return the cached result KIND-KEY; build it first if it is missing.

    BUILD gets an absent path below a fresh folder and makes a file or a folder there. The result is
    then renamed into place, so the rest of an interrupted build is never used as a result.
    """
    home = cache_root() / f"{kind}-{key}" / name
    if home.exists():
        _touch(home)
        return home
    with locked(f"{kind}-{key}"):
        if home.exists():
            return home
        # This process holds the lock, so these folders come from builds that were killed.
        for stale in cache_root().glob(f".build-{kind}-{key}-*"):
            remove_tree(stale)
        home.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".build-{kind}-{key}-", dir=cache_root()))
        # mkdtemp creates it with 0700, and users of the lab reach some results through it.
        work.chmod(0o755)
        try:
            build(work / "result")
            (work / "result").replace(home)
        finally:
            remove_tree(work)
        _forget(kind)
    return home


def _forget(kind: str) -> None:
    """Remove old results of a kind; results that were used within a day are kept."""
    results = [*cache_root().glob(f"{kind}-*"), *cache_root().glob(f".build-{kind}-*")]
    for path in results:
        if path.stat().st_mtime < time.time() - 24 * 3600:
            remove_tree(path)


def _touch(path: Path) -> None:
    """Record the use of a result on its folder: the time of a file is part of keys."""
    with contextlib.suppress(OSError):
        os.utime(path.parent if path.is_file() else path)
