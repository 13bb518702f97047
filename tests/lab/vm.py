"""A virtual machine with two NUMA nodes and all control group controllers.

    with VM() as vm:
        vm.run(["numactl", "--hardware"], check=True)

It is a stock Debian 13 without Podman and stackctl, in which nobody has logged in before. ssh
reaches root and a user `lab` on a port of 127.0.0.1, with a key and a host key of its own. QEMU
emulates the processor, which is ten times slower than the real machine and needs no /dev/kvm.
Changes of the disk are discarded, and the machine ends with the process that started it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import pwd
import shlex
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from . import vmtrees
from .host import LabError, cache_root, locked, need, need_root, remove_tree, say

USER = "lab"
# QEMU runs one thread per processor. More processors than the real machine has would slow down
# threads that wait by spinning.
NODES, CPUS_A_NODE, GIB_A_NODE = 2, 1, 2
_BOOT_S = 600
# In a mount namespace of its own QEMU sees only its tree and the folders of the machine.
_INSIDE = """\
set -e
for name in dev proc; do mount --rbind "/$name" "$1/$name"; done
mkdir -p "$1/vm" "$1/disks" "$1/data"
mount --bind "$2" "$1/vm"
mount --bind "$3" "$1/disks"
mount --bind "$4" "$1/data"
tree=$1
shift 4
exec chroot "$tree" "$@"
"""
# Runs a command of this machine with ssh settings of its own mounted over ~/.ssh.
_AS_CLIENT = 'mount --bind "$1" "$2" && shift 2 && exec "$@"'


class VM:
    """One virtual machine; `host` is its name in the ssh settings that `client` uses."""

    host = "vm"

    def __init__(self) -> None:
        """Prepare a machine. Only `start` builds and starts it."""
        self.port = 0
        self._folder = Path()
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        """Start the machine and wait until ssh answers."""
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End the machine."""
        self.close()

    def start(self) -> None:
        """Start the machine. It ends with this process."""
        need_root()
        need({"unshare": "util-linux", "setpriv": "util-linux", "ssh": "openssh-client"})
        tree, disks, data = vmtrees.build_qemu(), vmtrees.build_disk(), vmtrees.build_data()
        _sweep()
        runs = cache_root() / "run"
        runs.mkdir(exist_ok=True)
        with locked("run"):
            self._folder = Path(tempfile.mkdtemp(prefix="vm-", dir=runs))
            lock = (self._folder / "lock").open("w")
            fcntl.flock(lock, fcntl.LOCK_EX)
        self.port = _free_port()
        self._write_settings(disks)
        try:
            self._launch(lock, tree, disks, data)
            begin = time.monotonic()
            self.wait_reachable()
            say(f"the virtual machine answers after {time.monotonic() - begin:.0f} s")
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the machine at once and remove its folder."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(30)
            self._process = None
        if self._folder.name:
            remove_tree(self._folder)

    # Use

    def run(
        self,
        argv: Sequence[str],
        *,
        user: str = "root",
        input: str | None = None,
        timeout: float = 600,
        check: bool = False,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in the machine over ssh."""
        words = [*self.ssh(user), shlex.join(argv)]
        done = subprocess.run(
            words, input=input or "", capture_output=True, text=True, timeout=timeout, check=False
        )
        if check and done.returncode:
            line = f"{user}@{self.host}: {shlex.join(argv)} exited {done.returncode}"
            raise AssertionError(f"{line}\n{done.stdout}\n{done.stderr}")
        return done

    def type(
        self, script: str, answer: str = "", *, user: str = "root", timeout: float = 600
    ) -> subprocess.CompletedProcess[str]:
        """Run a shell script in the machine on a terminal, as its user does after a login.

        The user types ANSWER. All output, including that of stderr, is on stdout.
        """
        words = [*self.ssh(user)[:-1], "-tt", self.ssh(user)[-1]]
        # Without echo, so that the answer, which is sent before the question, is not in the output.
        words.append(shlex.join(["bash", "-lc", f"stty -echo cols 80 rows 50; {script}"]))
        done = subprocess.run(
            words, input=answer, capture_output=True, text=True, timeout=timeout, check=False
        )
        out = done.stdout.replace("\r\n", "\n")
        return subprocess.CompletedProcess(words, done.returncode, out, done.stderr)

    def reboot(self) -> None:
        """Restart the machine with systemctl and wait until root can log in again."""
        before = self._boot_id()
        with contextlib.suppress(subprocess.TimeoutExpired):
            # The network may go before the connection is closed.
            self.run(["systemctl", "reboot"], timeout=30)
        deadline = time.monotonic() + _BOOT_S
        while self._boot_id() in (None, before):
            if time.monotonic() > deadline:
                raise LabError(f"the virtual machine does not boot anew\n{self.console()[-3000:]}")
            time.sleep(1)

    def _boot_id(self) -> str | None:
        try:
            done = self.run(["cat", "/proc/sys/kernel/random/boot_id"], timeout=30)
        except subprocess.TimeoutExpired:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    def ssh(self, user: str = "root") -> list[str]:
        """Return the ssh command that runs a command in the virtual machine."""
        return ["ssh", "-F", str(self._folder / "ssh/config"), f"{user}@{self.host}"]

    def copy(self, source: Path, target: str, *, user: str = "root") -> None:
        """Copy a file or folder of this machine into the virtual one."""
        words = ["scp", "-q", "-r", "-F", str(self._folder / "ssh/config"), str(source)]
        subprocess.run([*words, f"{user}@{self.host}:{target}"], timeout=300, check=True)

    def client(
        self,
        argv: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        input: str | None = None,
        timeout: float = 300,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command of this machine that finds `vm`, also named `box`, in ~/.ssh/config."""
        home = Path(pwd.getpwuid(os.getuid()).pw_dir) / ".ssh"
        home.mkdir(mode=0o700, exist_ok=True)
        words = ["unshare", "--mount", "--propagation", "private", "--", "sh", "-c", _AS_CLIENT]
        words += ["client", str(self._folder / "ssh"), str(home), *argv]
        return subprocess.run(
            words,
            env=dict(os.environ, **(env or {})),
            input=input or "",
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    def wait_reachable(self, timeout: float = _BOOT_S) -> None:
        """Wait until ssh answers, after a start or a reboot."""
        deadline = time.monotonic() + timeout
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                done = self.run(["true"], timeout=60)
                if done.returncode == 0:
                    return
            ended = self._process is None or self._process.poll() is not None
            if ended or time.monotonic() > deadline:
                raise LabError(f"the virtual machine does not come up\n{self.console()[-3000:]}")
            time.sleep(1)

    def console(self) -> str:
        """Return the output of QEMU and of the machine's console."""
        logs = (self._folder / name for name in ("qemu.log", "console.log"))
        return "\n".join(path.read_text(errors="replace") for path in logs if path.exists())

    # Inside

    def _write_settings(self, disks: Path) -> None:
        folder = self._folder / "ssh"
        folder.mkdir(mode=0o700)
        shutil.copy(disks / "key", folder / "key")
        (folder / "key").chmod(0o600)
        known = (disks / "host_key.pub").read_text().split()[:2]
        (folder / "vm_hosts").write_text(f"[127.0.0.1]:{self.port} {' '.join(known)}\n")
        (folder / "config").write_text(
            f"Host {self.host} box\n"
            "  HostName 127.0.0.1\n"
            f"  Port {self.port}\n"
            f"  IdentityFile {folder}/key\n"
            "  IdentitiesOnly yes\n"
            f"  UserKnownHostsFile {folder}/vm_hosts\n"
            "  StrictHostKeyChecking yes\n"
            "  BatchMode yes\n"
            "  ConnectTimeout 180\n"
        )

    def _launch(self, lock: IO[str], tree: Path, disks: Path, data: Path) -> None:
        words = ["setpriv", "--pdeathsig", "KILL", "unshare", "--mount", "--propagation", "private"]
        words += ["--pid", "--fork", "--kill-child=KILL", "--", "sh", "-c", _INSIDE, "vm"]
        words += [str(tree), str(self._folder), str(disks), str(data)]
        words += ["env", "TMPDIR=/vm", *_qemu(self.port)]
        with (self._folder / "qemu.log").open("wb") as log:
            self._process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[lock.fileno()],
                start_new_session=True,
            )
        lock.close()


def _qemu(port: int) -> list[str]:
    """Return the command line of QEMU. Both disks stay unchanged."""
    cpus = NODES * CPUS_A_NODE
    words = ["qemu-system-x86_64", "-accel", "tcg,thread=multi", "-cpu", "max"]
    words += ["-m", f"{NODES * GIB_A_NODE}G", "-smp", f"{cpus},sockets={NODES},cores={CPUS_A_NODE}"]
    for node in range(NODES):
        first = node * CPUS_A_NODE
        words += ["-object", f"memory-backend-ram,size={GIB_A_NODE}G,id=m{node}"]
        last = first + CPUS_A_NODE - 1
        words += ["-numa", f"node,nodeid={node},memdev=m{node},cpus={first}-{last}"]
    words += ["-kernel", "/disks/vmlinuz", "-initrd", "/disks/initrd"]
    words += ["-append", "root=/dev/vda rw console=ttyS0 quiet"]
    for name in ("/disks/root.img", "/data/data.img"):
        words += ["-drive", f"file={name},format=raw,if=virtio,snapshot=on,cache=unsafe"]
    words += ["-netdev", f"user,id=n0,hostfwd=tcp:127.0.0.1:{port}-:22"]
    words += ["-device", "virtio-net-pci,netdev=n0", "-device", "virtio-rng-pci"]
    return [*words, "-display", "none", "-serial", "file:/vm/console.log", "-monitor", "none"]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _sweep() -> None:
    """Remove the folders of machines that were killed together with their owner."""
    with locked("run"):
        for folder in (cache_root() / "run").glob("vm-*"):
            with contextlib.suppress(FileNotFoundError, BlockingIOError):
                with (folder / "lock").open("r") as lock:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                remove_tree(folder)
