"""Fixtures of the tests in the lab: real systemd, Podman and llama-server."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from . import card as cards
from .host import LabError, need_root
from .lab import STORE_USERS, Lab
from .tinymodel import tiny_model
from .vmbox import box, ready, served, vm  # noqa: F401 - one machine for all modules

HERE = Path(__file__).parent
#: Enough for the image of vLLM on a slow network, with other work on the machine.
BUILD_S = 3600
# Names of files that a program is still writing.
DRAFT = re.compile(r"(^\.)|(\.(tmp|new|part|partial|draft|swp)$)|(^tmp)|(~$)")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test of this folder, so that the others can be run alone.

    The first test with vLLM waits until its image of 2.4 GiB is built.
    """
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.lab)
            if "vllm_lab" in getattr(item, "fixturenames", ()):
                item.add_marker(pytest.mark.timeout(BUILD_S))


class Seat:
    """One user of the lab: root with the system's units, others with their own."""

    def __init__(self, lab: Lab, user: str) -> None:
        """Find the folders of that user."""
        self.lab = lab
        self.user = user
        home, system = lab.home(user), user == "root"
        runtime = f"/run/user/{lab.uid(user)}"
        units = "/etc" if system else f"{home}/.config"
        self.units = f"{units}/containers/systemd/stackctl"
        self.state = "/var/lib/stackctl" if system else f"{home}/.local/state/stackctl"
        self.cache = "/var/cache/stackctl" if system else f"{home}/.cache/stackctl"
        self.runtime = "/run/stackctl" if system else f"{runtime}/stackctl"
        self.scope = ["--system"] if system else ["--user"]

    def run(
        self,
        *argv: str,
        check: bool = True,
        env: Mapping[str, str] | None = None,
        input: str | None = None,
        timeout: float = 60,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command as this user."""
        return self.lab.run(
            argv, user=self.user, env=env, input=input, timeout=timeout, check=check
        )

    def stackctl(
        self,
        *arguments: str,
        code: int | None = 0,
        env: Mapping[str, str] | None = None,
        input: str | None = None,
        timeout: float = 120,
    ) -> subprocess.CompletedProcess[str]:
        """Run stackctl and check its exit code; None permits any."""
        words = ["stackctl", *arguments]
        done = self.run(*words, check=False, env=env, input=input, timeout=timeout)
        if code is not None and done.returncode != code:
            line = f"{self.user}: {' '.join(words)} exited {done.returncode}, expected {code}"
            raise AssertionError(f"{line}\n{done.stdout}\n{done.stderr}\n{self.journal()[-4000:]}")
        return done

    def systemctl(self, *arguments: str, check: bool = True) -> str:
        """Run systemctl on this user's service manager and return its output."""
        return self.run("systemctl", *self.scope, *arguments, check=check).stdout

    def journal(self, *arguments: str) -> str:
        """Return the journal of this user's units, as far as the user may read it."""
        scope = [] if self.user == "root" else ["--user"]
        words = ["journalctl", *scope, "--no-pager", *arguments]
        return self.run(*words, check=False).stdout

    def files(self, *folders: str) -> list[str]:
        """Return every file below those folders. A missing folder has none."""
        found = self.run("find", *folders, "-type", "f", check=False).stdout
        return found.split("\n")[:-1]

    def loaded(self) -> list[str]:
        """Return the units that systemd has loaded from stackctl's files."""
        words = ["list-units", "--all", "--plain", "--no-legend", "--type=service"]
        names = [line.split()[0] for line in self.systemctl(*words).splitlines() if line.strip()]
        if not names:
            return []
        shown = self.systemctl("show", "--property=Id,SourcePath", *names)
        pairs = re.findall(r"^Id=(.*)\nSourcePath=(.*)$", shown, re.MULTILINE)
        return [name for name, source in pairs if source.startswith(self.units)]

    def left_behind(self) -> list[str]:
        """Return all remains that should be gone after every stack is down."""
        found = []
        listed = self.run("podman", "ps", "--all", "--format", "{{.Names}} {{.Status}}").stdout
        found += [f"container {line}" for line in listed.splitlines()]
        found += [f"unit file {path}" for path in self.files(self.units)]
        found += [f"unit {name}" for name in self.loaded()]
        locks = self.run("lslocks", "--noheadings", "--output", "COMMAND,PATH", check=False)
        found += [f"lock {line}" for line in locks.stdout.splitlines() if "stackctl" in line]
        for path in self.files(self.state, self.runtime):
            if DRAFT.search(Path(path).name):
                found.append(f"unfinished file {path}")
        words = ["find", "/tmp", "/var/tmp", "-name", "*stackctl*", "-user", self.user]
        found += [f"temporary {line}" for line in self.run(*words, check=False).stdout.splitlines()]
        return found

    def assert_nothing_left(self) -> None:
        """Check that no container, unit, lock or unfinished file of stackctl remains."""
        found = self.left_behind()
        assert not found, "left behind:\n" + "\n".join(found)

    def reset(self) -> None:
        """Remove the remains of a test, so that the next one starts clean."""
        for unit in self.loaded():
            self.systemctl("stop", unit, check=False)
        self.run("podman", "rm", "--all", "--force", "--time", "0", check=False)
        self.run("rm", "-rf", self.units, self.state, self.runtime)
        self.systemctl("daemon-reload")
        self.systemctl("reset-failed", check=False)


@pytest.fixture(scope="session")
def vllm_lab() -> Iterator[Lab]:
    """Yield another lab, with the image of vLLM for CPUs and a small checkpoint."""
    need_root()
    with contextlib.ExitStack() as stack:
        try:
            booted = stack.enter_context(Lab(vllm=True))
        except LabError as error:
            if not re.search(r"No matching distribution|Could not fetch|Connection", str(error)):
                raise
            # The packages come from the index of this machine's pip, torch as a CPU build.
            pytest.skip(f"vLLM for CPUs cannot be had here: {str(error)[-200:]}")
        yield booted


@pytest.fixture(scope="session")
def lab() -> Iterator[Lab]:
    """Yield the booted lab: images loaded for root and lab, stackctl installed."""
    try:
        need_root()
    except LabError as error:
        if os.environ.get("CI"):
            pytest.fail(str(error))
        pytest.skip(str(error))
    with contextlib.ExitStack() as stack:
        try:
            booted = stack.enter_context(Lab())
            for name in STORE_USERS:
                booted.load_image(name)
                booted.load_door(name)
        except LabError as error:
            pytest.fail(f"the lab cannot be built: {error}")
        yield booted


#: Both ways to run a stack. Without the marker deep, most tests run only as the ordinary user.
EITHER_USER = (pytest.param("root", marks=pytest.mark.deep), "lab")
#: Marks tests that always run as both users.
both_users = pytest.mark.parametrize("user", STORE_USERS)


@pytest.fixture(params=EITHER_USER)
def user(request: pytest.FixtureRequest) -> str:
    """Return the user who runs stacks in this case."""
    return str(request.param)


@pytest.fixture
def seat(lab: Lab, user: str) -> Iterator[Seat]:
    """Yield a user of the lab, and remove all stacks of that user afterwards."""
    place = Seat(lab, user)
    yield place
    place.reset()


@pytest.fixture(scope="session")
def tiny(lab: Lab) -> str:
    """Return a model of 1.4 MB in the lab, as --model takes it.

    It loads at once and fits memlock.
    """
    path = "/srv/models/tiny.gguf"
    target = Path(f"/proc/{lab.pid}/root{path}")
    target.write_bytes(tiny_model())
    target.chmod(0o644)
    return f"file:{path}"


@pytest.fixture(scope="session")
def card(lab: Lab) -> Lab:
    """Return the lab with a simulated NVML, the Python package that calls it, and a device file."""
    from . import look

    folder = cards.build()
    library, package = (folder / name for name in ("libnvidia-ml.so.1", "pynvml.py"))
    look.put(lab, f"/usr/lib/{library.name}", library.read_bytes(), mode=0o755)
    python = lab.run(["python3", "-c", "import sys; print(*sys.version_info[:2], sep='.')"])
    packages = f"/usr/local/lib/python{python.stdout.strip()}/dist-packages"
    look.put(lab, f"{packages}/{package.name}", package.read_bytes())
    look.put(lab, cards.DEVICE, b"")
    look.put(lab, cards.LIBRARY, b"not really\n")
    return lab


@pytest.fixture
def gpu(card: Lab, seat: Seat) -> Iterator[Seat]:
    """Yield a user of the machine with the simulated GPU and without a CDI file."""
    assert seat.lab is card
    yield seat
    card.run(["rm", "-rf", "/etc/cdi", "/run/cdi"], check=True)


@pytest.fixture
def one(lab: Lab) -> Iterator[Seat]:
    """Yield an ordinary user, for tests that do not depend on the user."""
    seat = Seat(lab, "lab")
    yield seat
    seat.reset()
