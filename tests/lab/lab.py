"""A machine with its own systemd and Podman that boots in a second and ends with its caller.

    with Lab() as lab:
        lab.load_image("lab")
        lab.run(["stackctl", "probe"], user="lab", check=True)

The root tree is never written to. No process of the lab outlives the process that started it, even
if that process is killed. The exception is `start_detached`, for demos that take several commands.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import select
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from . import trees
from .furnish import Account, accounts, python_version
from .host import (
    CHECKOUT,
    LabError,
    cache_root,
    cached,
    call,
    fingerprint,
    locked,
    need,
    need_root,
    remove_tree,
    say,
)
from .supervise import cgroup_name, own_cgroup, remove_cgroups

IMAGE = "localhost/stackctl/llama-cpp:latest"
DOOR_IMAGE = "localhost/stackctl/haproxy:latest"
VLLM_IMAGE = "localhost/stackctl/vllm-cpu:latest"
CHECKPOINT_PATH = "/srv/models/tiny"
MODEL_PATH = f"/srv/models/{trees.MODEL}"
ARCHIVE_PATH = "/srv/images/engine.tar"
DOOR_ARCHIVE_PATH = "/srv/images/haproxy.tar"
APP_PATHS = ("/opt/stackctl/app", "/opt/stackctl/deps")
STORE_USERS = ("root", "lab")

_HOST_PROGRAMS = {
    "systemd-nspawn": "systemd-container",
    "nsenter": "util-linux",
    "setpriv": "util-linux",
    "unshare": "util-linux",
}
_COMPILED = ".compiled"
_VLLM_STORE = "/srv/images/vllm"
# Both users read one store, because the image is large. The store is mounted read-only.
_STORAGE = f"""\
[storage]
driver = "overlay"
[storage.options]
additionalimagestores = ["{_VLLM_STORE}"]
"""
_ROOT_STORAGE = f"""\
[storage]
runroot = "/run/containers/storage"
graphroot = "/var/lib/containers/storage"
{_STORAGE.removeprefix("[storage]").lstrip()}"""
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_DETACHED: list[subprocess.Popen[bytes]] = []
# Joins a control group of the lab and then executes the command.
_ENTER = 'echo $$ >"$1"/cgroup.procs; shift; exec "$@"'


class Lab:
    """One booted machine."""

    def __init__(
        self,
        *,
        private_network: bool = True,
        app: bool = True,
        seed: bool = True,
        door: bool = True,
        vllm: bool = False,
        folders: Mapping[str, Path] | None = None,
    ) -> None:
        """Prepare a lab; FOLDERS (path in the lab -> folder here) are bound read-only.

        APP installs the project. SEED gives root and lab the images from the start; with DOOR they
        include the image of the front door. VLLM adds the image of vLLM for all users, and its tiny
        model.
        """
        self.private_network = private_network
        self._app = app
        self._seed = seed
        self._folders = dict(folders or {})
        self._door = door
        self._vllm = vllm
        self._tree = Path()
        self._folder = Path()
        self._supervisor: subprocess.Popen[bytes] | None = None
        self._supervisor_pid = 0
        self._groups: dict[str, str] = {}
        self._accounts: dict[str, Account] = {}
        self.pid = 0

    def __enter__(self) -> Self:
        """Start the lab and wait until it is running."""
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End the lab with all its processes."""
        self.close()

    # Life

    def start(self, *, detached: bool = False) -> None:
        """Start the lab. It ends with this process unless it is detached."""
        need_root()
        need(_HOST_PROGRAMS)
        _sweep()
        prepared = os.environ.get("LAB_ROOT")
        self._tree = Path(prepared).resolve() if prepared else trees.build_tree()
        for program in ("podman", "systemctl", "python3"):
            if not os.path.lexists(self._tree / "usr/bin" / program):
                raise LabError(f"no root tree with {program}: {self._tree}")
        binds, stale = self._binds()
        stores = self._seed_stores() if self._seed else {}
        runs = cache_root() / "run"
        runs.mkdir(exist_ok=True)
        runs.chmod(0o755)
        with locked("run"):
            self._folder = Path(tempfile.mkdtemp(prefix="lab-", dir=runs))
            self._folder.chmod(0o755)
            # This process holds the lock until the supervisor inherits it: _sweep removes unlocked
            # folders.
            lock = (self._folder / "lock").open("w")
            fcntl.flock(lock, fcntl.LOCK_EX)
        for name, store in stores.items():
            _copy_store(store, self._folder / "data" / f"containers-{name}")
        config = {
            "tree": str(self._tree),
            "private_network": self.private_network,
            "binds": binds,
            "app": list(APP_PATHS) if self._app else [],
        }
        (self._folder / "config.json").write_text(json.dumps(config))
        self._launch(lock, detached=detached)
        self._accounts = accounts(Path(f"/proc/{self.pid}/root"))
        self.wait_running()
        if self._vllm:
            self.write("/etc/containers/storage.conf", _ROOT_STORAGE)
            # Rootless Podman ignores additionalimagestores in the system's settings.
            conf = f"{self.home('lab')}/.config/containers/storage.conf"
            self.write(conf, _STORAGE, user="lab")
        self._compile(stale)

    def close(self) -> None:
        """End the lab: none of its processes, mounts and files remains."""
        if self._supervisor_pid and _is_alive(self._folder):
            with contextlib.suppress(ProcessLookupError):
                gone = os.pidfd_open(self._supervisor_pid)
                try:
                    os.kill(self._supervisor_pid, signal.SIGTERM)
                    # The supervisor exits after all its processes, and after it has removed its
                    # files.
                    if not select.select([gone], [], [], 60)[0]:
                        raise LabError("the lab does not end")
                finally:
                    os.close(gone)
        if self._supervisor is not None:
            self._supervisor.wait(60)
        self._supervisor, self._supervisor_pid, self.pid = None, 0, 0
        self._groups.clear()

    @classmethod
    def start_detached(cls, state: Path, **options: Any) -> Lab:
        """Start a lab that outlives this process; `attach` and `stop` find it by STATE."""
        if cls.running(state):
            raise LabError(f"a lab of {state} is running already")
        lab = cls(**options)
        try:
            lab.start(detached=True)
            state.mkdir(parents=True, exist_ok=True)
            record = {"folder": str(lab._folder), "private_network": lab.private_network}
            (state / "lab.json").write_text(json.dumps(record))
        except BaseException:
            # Without the record no other process could find the lab to end it.
            lab.close()
            raise
        return lab

    @classmethod
    def running(cls, state: Path) -> bool:
        """Return True if the detached lab of that folder is running."""
        try:
            record = json.loads((state / "lab.json").read_text())
        except FileNotFoundError:
            return False
        return _is_alive(Path(record["folder"]))

    @classmethod
    def attach(cls, state: Path) -> Lab:
        """Return the detached lab of that folder. Leaving its context does not end it."""
        if not cls.running(state):
            raise LabError(f"no lab of {state} is running")
        record = json.loads((state / "lab.json").read_text())
        lab = cls(private_network=record["private_network"])
        lab._folder = Path(record["folder"])
        lab._read_state()
        lab._accounts = accounts(Path(f"/proc/{lab.pid}/root"))
        return lab

    @classmethod
    def stop(cls, state: Path) -> None:
        """End the detached lab of that folder, if it runs."""
        if cls.running(state):
            cls.attach(state).close()
        (state / "lab.json").unlink(missing_ok=True)
        _sweep()

    # Use

    def run(
        self,
        argv: Sequence[str],
        *,
        user: str = "root",
        env: Mapping[str, str] | None = None,
        input: str | None = None,
        timeout: float = 60,
        check: bool = False,
        cwd: str | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in the lab as that user, as after a login."""
        process = self.spawn(argv, user=user, env=env, cwd=cwd, stdin=subprocess.PIPE)
        try:
            out, err = process.communicate(input or "", timeout=timeout)
        except subprocess.TimeoutExpired as error:
            out, err = process.end()
            raise subprocess.TimeoutExpired(list(argv), timeout, out, err) from error
        except BaseException:
            process.end()
            raise
        done = subprocess.CompletedProcess(list(argv), process.returncode, out, err)
        if check and done.returncode:
            said = f"{done.stdout}\n{done.stderr}".strip()
            line = f"{user}: {shlex.join(argv)} exited {done.returncode}"
            raise AssertionError(f"{line}\n{said}")
        return done

    def spawn(
        self,
        argv: Sequence[str],
        *,
        user: str = "root",
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        stdin: int | IO[Any] | None = subprocess.DEVNULL,
        stdout: int | IO[Any] | None = subprocess.PIPE,
        stderr: int | IO[Any] | None = subprocess.PIPE,
    ) -> LabProcess:
        """Start a command in the lab. Signals sent to the result reach the command itself."""
        words = self.words(argv, user=user, env=env, cwd=cwd)
        return LabProcess(
            words,
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            text=True,
            start_new_session=True,
        )

    def words(
        self,
        argv: Sequence[str],
        *,
        user: str = "root",
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
    ) -> list[str]:
        """Return the command line of this machine that runs ARGV in the lab as that user."""
        group = self._login(user)
        account = self._accounts[user]
        values = {
            "HOME": account.home,
            "USER": user,
            "LOGNAME": user,
            "SHELL": "/bin/bash",
            "PATH": _PATH,
            "LANG": "C.UTF-8",
            "TERM": "dumb",
        }
        if account.uid:
            runtime = f"/run/user/{account.uid}"
            values["XDG_RUNTIME_DIR"] = runtime
            values["DBUS_SESSION_BUS_ADDRESS"] = f"unix:path={runtime}/bus"
        values.update(env or {})
        words = ["nsenter", "-t", str(self.pid), "-a", "--"]
        words += ["/bin/sh", "-c", _ENTER, "enter", f"/sys/fs/cgroup{group}"]
        words.append("setpriv")
        if account.uid:
            words += [f"--reuid={account.uid}", f"--regid={account.gid}", "--init-groups"]
        if not self.private_network:
            # Commands get no more rights than the lab, else they would keep this process's rights.
            words += ["--bounding-set=-net_admin"]
        words += ["--inh-caps=-all", "--"]
        words += ["env", "-i", "-C", cwd or account.home]
        words += [f"{name}={value}" for name, value in values.items()]
        return words + list(argv)

    def write(self, path: str, text: str, *, user: str = "root") -> None:
        """Write a file in the lab, with its parent folders."""
        script = 'mkdir -p "$(dirname "$1")" && cat >"$1"'
        self.run(["sh", "-c", script, "write", path], user=user, input=text, check=True)

    def read(self, path: str) -> str:
        """Return the text of a file in the lab."""
        return self.run(["cat", path], check=True).stdout

    def home(self, user: str) -> str:
        """Return the home folder of a user."""
        return self._accounts[user].home

    def uid(self, user: str) -> int:
        """Return the number of a user."""
        return self._accounts[user].uid

    def logout(self, user: str) -> None:
        """End the session of a user, which the first command of that user began.

        Without linger the user's services end with it, after systemd's ten seconds of grace.
        """
        self._groups.pop(user, None)
        self.run(["systemctl", "stop", f"lab-login-{user}.service"], check=True)

    def wait_running(self, timeout: float = 90) -> None:
        """Wait until the lab's systemd has finished its boot."""
        words = ["nsenter", "-t", str(self.pid), "-a", "--"]
        words += ["systemctl", "is-system-running", "--wait"]
        deadline = time.monotonic() + timeout
        while True:
            done = subprocess.run(
                words, capture_output=True, text=True, timeout=timeout, check=False
            )
            state = done.stdout.strip()
            if state == "running":
                return
            if state == "degraded":
                failed = self.run(["systemctl", "--failed", "--plain", "--no-legend"]).stdout
                say(f"the lab runs, but these units failed:\n{failed}")
                return
            if time.monotonic() > deadline or not _is_alive(self._folder):
                raise LabError(f"the lab does not come up: {state or done.stderr.strip()}")
            # Its bus does not listen yet.
            time.sleep(0.05)

    def load_image(self, user: str, archive: str = ARCHIVE_PATH, image: str = IMAGE) -> str:
        """Load an image, by default the engine's, into that user's Podman and return its name."""
        if self.run(["podman", "image", "exists", image], user=user).returncode == 0:
            return image
        kind = self.run(["tar", "-tf", archive, "manifest.json"]).returncode
        kind = kind and self.run(["tar", "-tf", archive, "oci-layout"]).returncode
        if kind:
            words = ["podman", "import", "--quiet", archive, image]
            self.run(words, user=user, timeout=900, check=True)
        else:
            words = ["podman", "load", "--quiet", "--input", archive]
            out = self.run(words, user=user, timeout=300, check=True).stdout
            found = re.search(r"Loaded image[^:]*: *(\S+)", out)
            if not found:
                raise LabError(f"podman load did not name what it loaded: {out}")
            if found[1] != image:
                self.run(["podman", "tag", found[1], image], user=user, check=True)
        return image

    def load_door(self, user: str) -> str | None:
        """Load the image of the front door into that user's Podman.

        Return None if there is none.
        """
        if self._door_archive() is None:
            return None
        return self.load_image(user, DOOR_ARCHIVE_PATH, DOOR_IMAGE)

    # Internal

    def _launch(self, lock: IO[str], *, detached: bool) -> None:
        package = __package__ or ""
        code = Path(__file__).resolve().parents[len(package.split("."))]
        watched = -1 if detached else os.pidfd_open(os.getpid())
        words = ["unshare", "--mount", "--propagation", "private", "--pid", "--fork"]
        words += ["--mount-proc", "--kill-child=KILL", "--"]
        words += [sys.executable, "-m", f"{package}.supervise", str(self._folder), str(watched)]
        environment = dict(os.environ, PYTHONPATH=str(code), PYTHONDONTWRITEBYTECODE="1")
        with (self._folder / "log").open("wb") as log:
            process = subprocess.Popen(
                words,
                env=environment,
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[number for number in (lock.fileno(), watched) if number >= 0],
                # Ctrl-C must not reach the lab: this process ends it in order.
                start_new_session=True,
            )
        lock.close()
        if watched >= 0:
            os.close(watched)
        if detached:
            # Nobody waits for this process. The reference prevents Python's warning about a running
            # child.
            _DETACHED.append(process)
        else:
            self._supervisor = process

        def started() -> bool:
            self.pid = _find_init(process.pid)
            return self.pid != 0 or process.poll() is not None

        try:
            _wait(started, 60, "the lab does not start", step=0.01)
            if not self.pid:
                raise LabError(f"the lab did not start (exit {process.returncode})")
        except BaseException as error:
            process.kill()
            process.wait()
            log_file = self._folder / "log"
            if isinstance(error, LabError) and log_file.exists():
                raise LabError(f"{error}\n{log_file.read_text()[-3000:]}") from error
            raise
        (self._supervisor_pid,) = _children(process.pid)
        record = {"init": self.pid, "supervisor": self._supervisor_pid}
        (self._folder / "state.json").write_text(json.dumps(record))

    def _read_state(self) -> None:
        state = json.loads((self._folder / "state.json").read_text())
        self.pid = int(state["init"])
        self._supervisor_pid = int(state["supervisor"])

    def _binds(self) -> tuple[list[tuple[str, str, bool]], dict[str, Path]]:
        """Return the mounts of the lab, and its folders of code that are not compiled yet."""
        binds = [(str(trees.fetch_model()), MODEL_PATH, False)]
        binds.append((str(self._archive()), ARCHIVE_PATH, False))
        if door := self._door_archive():
            binds.append((str(door), DOOR_ARCHIVE_PATH, False))
        if self._vllm:
            binds.append((str(self._vllm_store()), _VLLM_STORE, False))
            binds.append((str(trees.build_checkpoint()), CHECKPOINT_PATH, False))
        for path, source in self._folders.items():
            binds.append((str(source.resolve()), path, False))
        stale = {}
        if self._app:
            version = python_version(self._tree)
            code = (trees.build_app(version), trees.build_dependencies(version))
            for target, source in zip(APP_PATHS, code, strict=True):
                fresh = not (source / _COMPILED).exists()
                binds.append((str(source), target, fresh))
                if fresh:
                    stale[target] = source
        return binds, stale

    def _compile(self, stale: Mapping[str, Path]) -> None:
        """Compile Python code with the tree's own Python, else every command would compile it."""
        for target, source in stale.items():
            words = ["python3", "-m", "compileall", "-q", "-j", "2", target]
            # Some packages contain files for other Python versions that do not compile. That is
            # harmless.
            self.run(words, timeout=300)
            (source / _COMPILED).touch()

    def _archive(self) -> Path:
        """Return the engine image: the caller's choice, an archive in the tree, or our own."""
        chosen = os.environ.get("LAB_IMAGE")
        if chosen:
            return Path(chosen).resolve()
        brought = [path for path in self._archives() if "haproxy" not in path.name]
        return brought[0] if brought else trees.build_engine_archive()

    def _door_archive(self) -> Path | None:
        """Return the image of the front door. A foreign tree may lack one: then return None."""
        if not self._door:
            return None
        if brought := [path for path in self._archives() if "haproxy" in path.name]:
            return brought[0]
        try:
            return trees.build_door_archive()
        except LabError as error:
            if not os.environ.get("LAB_ROOT"):
                raise
            say(f"no image of the front door: {error}")
            self._door = False
            return None

    def _archives(self) -> list[Path]:
        """Return the image archives in a tree that the caller has given."""
        if not os.environ.get("LAB_ROOT"):
            return []
        return [
            Path(folder, name)
            for place in ("srv", "var/lib", "opt", "root")
            for folder, _names, files in os.walk(self._tree / place)
            for name in sorted(files)
            if re.search(r"\.(tar|tgz|tar\.(gz|xz|zst))$", name)
        ]

    def _seed_stores(self) -> dict[str, Path]:
        """Return storage folders of Podman that contain the images, by user."""
        status = self._tree / "var/lib/dpkg/status"
        recipe: list[object] = [str(self._tree), IMAGE, 2]
        for archive in filter(None, (self._archive(), self._door_archive())):
            facts = archive.stat()
            recipe += [str(archive), facts.st_size, facts.st_mtime_ns]
        key = fingerprint(recipe, status if status.exists() else b"")
        home = cached("store", key, lambda path: _build_stores(path, door=self._door))
        return {user: home / user for user in STORE_USERS}

    def _vllm_store(self) -> Path:
        """Return a storage folder of Podman with the image of vLLM, readable by every user."""
        key = fingerprint(str(self._tree), VLLM_IMAGE, trees.vllm_key(), 2)
        return cached("vllm", key, _build_vllm_store) / "storage"

    def _login(self, user: str) -> str:
        """Return the control group in which commands of that user run, as after a login."""
        if user in self._groups:
            return self._groups[user]
        account = self._accounts.get(user)
        if account is None:
            raise LabError(f"no user {user} in the lab")
        unit = f"lab-login-{user}.service"
        enter = ["nsenter", "-t", str(self.pid), "-a", "--"]
        show = [*enter, "systemctl", "show", "-P", "MainPID", unit]
        if call(show).strip() == "0":
            words = [*enter, "systemd-run", "--quiet", f"--unit={unit}"]
            if account.uid:
                # The login opens a session and starts the user's service manager.
                words += [f"--uid={user}", "--property=PAMName=login"]
            call([*words, "sleep", "infinity"])
        main = call(show).strip()
        group = ""

        def settled() -> bool:
            nonlocal group
            lines = call([*enter, "cat", f"/proc/{main}/cgroup"]).splitlines()
            group = next(line[3:] for line in lines if line.startswith("0::"))
            # The login moves the process from its unit to the session.
            return not account.uid or group.startswith("/user.slice/")

        _wait(settled, 30, f"{user} cannot log in to the lab")
        self._groups[user] = group
        if account.uid:
            words = ["systemctl", "--user", "is-system-running", "--wait"]
            state = ""

            def ready() -> bool:
                nonlocal state
                state = self.run(words, user=user).stdout.strip()
                return state in ("running", "degraded")

            _wait(ready, 60, f"the service manager of {user} does not come up")
        return group


class LabProcess(subprocess.Popen[str]):
    """A command in the lab. Signals go to it, not to nsenter, which runs it."""

    def send_signal(self, sig: int) -> None:
        """Send a signal to the command."""
        for pid in self._inside():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, sig)

    def terminate(self) -> None:
        """Send SIGTERM to the command."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Kill the command and the processes of its process group."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    def end(self) -> tuple[str, str]:
        """Kill the command and return its output.

        Processes in other process groups may hold the pipes open. They are not waited for.
        """
        self.kill()
        try:
            return self.communicate(timeout=10)
        except subprocess.TimeoutExpired as error:
            for pipe in (self.stdin, self.stdout, self.stderr):
                if pipe is not None:
                    with contextlib.suppress(OSError):
                        pipe.close()
            self.wait(10)
            return _text(error.output), _text(error.stderr)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Wait for the command; kill it first if the test that started it has failed."""
        if kind is not None:
            self.end()
        super().__exit__(kind, error, trace)

    def _inside(self) -> list[int]:
        while self.poll() is None:
            # nsenter forks after it has entered the lab: before that there is no command.
            if found := _children(self.pid):
                return found
            time.sleep(0.01)
        return []


def _text(output: str | bytes | None) -> str:
    """Return the output of a timeout as text: it is bytes even if the command's output is text."""
    return output.decode(errors="replace") if isinstance(output, bytes) else output or ""


def _children(pid: int) -> list[int]:
    """Return the child processes of a process."""
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def _find_init(launcher: int) -> int:
    """Return the lab's process 1, or 0 (launcher, supervisor, nspawn and systemd form a chain)."""
    for supervisor in _children(launcher):
        for container in _children(supervisor):
            for pid in _children(container):
                with contextlib.suppress(OSError):
                    # Before it executes systemd it is a copy of nspawn that still prepares the
                    # container.
                    name = Path(f"/proc/{pid}/comm").read_text().strip()
                    status = Path(f"/proc/{pid}/status").read_text()
                    spaces = re.search(r"^NSpid:(.*)$", status, re.MULTILINE)
                    if name in ("systemd", "init") and spaces and spaces[1].split()[-1] == "1":
                        return pid
    return 0


def _build_stores(target: Path, *, door: bool) -> None:
    say("importing the images for root and lab, once")
    with Lab(app=False, seed=False, door=door) as lab:
        target.mkdir()
        for user in STORE_USERS:
            lab.load_image(user)
            lab.load_door(user)
        lab.run(["sync"])
        for user in STORE_USERS:
            (lab._folder / "data" / f"containers-{user}").replace(target / user)


def _build_vllm_store(target: Path) -> None:
    archive = target.with_name("vllm.tar")
    trees.build_vllm_archive(archive)
    say("importing the image of vLLM, once, about a minute")
    folders = {"/srv/images/vllm.tar": archive}
    with Lab(app=False, seed=False, door=False, folders=folders) as lab:
        # Imported by the ordinary user: root can read a store of any owner, others only their own.
        lab.load_image("lab", "/srv/images/vllm.tar", VLLM_IMAGE)
        lab.run(["sync"], timeout=300)
        (lab._folder / "data" / "containers-lab").replace(target)
    call(["chmod", "-R", "a+rX", target])


def _copy_store(store: Path, target: Path) -> None:
    """Copy a storage folder.

    The files of image layers are hard links, because nobody writes to them.
    """
    target.parent.mkdir(exist_ok=True)
    try:
        call(["cp", "-al", store, target])
    except LabError:
        remove_tree(target)
        call(["cp", "-a", store, target])
        return
    layers = {path for path in target.glob("storage/overlay/*/diff") if path.is_dir()}
    for folder, names, files in os.walk(target):
        names[:] = [name for name in names if Path(folder, name) not in layers]
        for name in files:
            path = Path(folder, name)
            if path.is_symlink() or not path.is_file():
                continue
            facts = path.stat()
            draft = path.with_name(f"{name}.copy")
            shutil.copy2(path, draft)
            os.chown(draft, facts.st_uid, facts.st_gid)
            draft.replace(path)


def _is_alive(folder: Path) -> bool:
    """Return True if the supervisor of that lab is running, which holds the folder's lock."""
    try:
        with (folder / "lock").open("r") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def _sweep() -> None:
    """Remove the folders of labs whose supervisor was killed."""
    with locked("run"):
        for folder in (cache_root() / "run").glob("lab-*"):
            if not _is_alive(folder):
                remove_cgroups(own_cgroup() / cgroup_name(folder.name))
                remove_tree(folder)


def _wait(done: Callable[[], bool], timeout: float, failure: str, *, step: float = 0.05) -> None:
    deadline = time.monotonic() + timeout
    while not done():
        if time.monotonic() > deadline:
            raise LabError(failure)
        time.sleep(step)


def image_store() -> Path:
    """Return a read-only storage folder of rootless Podman with the images of the lab."""
    lab = Lab(app=False)
    lab._tree = trees.build_tree()
    return lab._seed_stores()["lab"]


def app_available() -> bool:
    """Return True if the checkout contains a project to install (a copied lab folder does not)."""
    return (CHECKOUT / "pyproject.toml").exists()
