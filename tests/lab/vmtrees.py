"""Build the cached parts of the virtual machine: QEMU, a disk with a stock Debian 13, data."""

from __future__ import annotations

import shutil
from pathlib import Path

from .host import CHECKOUT, cached, call, call_confined, fingerprint, need, need_root, pip, say
from .lab import image_store
from .tinymodel import tiny_model
from .trees import need_mmdebstrap

# The packages of a Debian 13 server (with AppArmor), and the tools of the tests (numactl, procps,
# curl).
PACKAGES = [
    "linux-image-cloud-amd64",
    "systemd",
    "systemd-sysv",
    "dbus",
    "dbus-user-session",
    "libpam-systemd",
    "udev",
    "kmod",
    "apparmor",
    "login",
    "passwd",
    "openssh-server",
    "python3",
    "python3-venv",
    "sudo",
    "ca-certificates",
    "curl",
    "iproute2",
    "numactl",
    "procps",
]
DISK, DATA_MARGIN_MIB = "6G", 64
_NETWORK = """\
[Match]
Type=ether
[Network]
Address=10.0.2.15/24
Gateway=10.0.2.2
DNS=10.0.2.3
"""
# mmdebstrap runs them with the new tree as the first argument.
_HOOKS = [
    'chroot "$1" useradd --create-home --shell /bin/bash lab',
    'chroot "$1" systemctl enable systemd-networkd ssh',
    'echo vm >"$1/etc/hostname"',
    'echo "127.0.0.1 localhost vm" >"$1/etc/hosts"',
    'echo "nameserver 10.0.2.3" >"$1/etc/resolv.conf"',
    'echo "LABEL=srv /srv ext4 ro,nofail 0 2" >>"$1/etc/fstab"',
    'printf "lab ALL=(ALL) NOPASSWD: ALL\\n" >"$1/etc/sudoers.d/lab"',
]


def build_qemu() -> Path:
    """Return a tree with QEMU 10 of Debian 13.

    That of Debian 12 crashes, other systems have none.
    """
    return cached("qemu", fingerprint("trixie", "qemu-system-x86", 1), _build_qemu)


def build_disk() -> Path:
    """Return a folder with root.img, vmlinuz, initrd, the key of the logins, and host_key.pub."""
    return cached("vmdisk", fingerprint(PACKAGES, DISK, _NETWORK, _HOOKS, 1), _build_disk)


def build_data() -> Path:
    """Return a folder with data.img for /srv: a Podman store with the images, and a model."""
    store = image_store()
    key = fingerprint(store.parent.name, Path(__file__).with_name("tinymodel.py"), 1)
    return cached("vmdata", key, lambda target: _build_data(target, store))


def build_wheels(python: str = "3.13") -> Path:
    """Return a folder with the wheels that stackctl needs on that Python, without its own."""
    pinned = CHECKOUT / "requirements/runtime.txt"
    return cached("wheels", fingerprint(python, pinned, 1), lambda path: _fetch(path, python))


def _mmdebstrap(target: Path, packages: list[str], hooks: list[str]) -> None:
    options = ["--variant=apt", "--mode=root", "--format=directory", "--quiet"]
    options += [f"--include={','.join(packages)}"]
    options += ['--aptopt=Acquire::Check-Valid-Until "false"']
    options += ['--aptopt=Acquire::Languages "none"']
    for unused in ("man", "info", "locale", "doc"):
        options += [f"--dpkgopt=path-exclude=/usr/share/{unused}/*"]
    options += [f"--customize-hook={hook}" for hook in hooks]
    call_confined(["mmdebstrap", *options, "trixie", target, *need_mmdebstrap()])


def _build_qemu(target: Path) -> None:
    say("building a tree with QEMU, about a minute")
    need_root()
    _mmdebstrap(target, ["qemu-system-x86"], [])


def _build_disk(target: Path) -> None:
    say("building the disk of the virtual machine (Debian 13), about 2 minutes")
    need_root()
    need({"mke2fs": "e2fsprogs", "ssh-keygen": "openssh-client"})
    tree = target.with_name("tree")
    _mmdebstrap(tree, PACKAGES, _HOOKS)
    target.mkdir()
    call(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "lab", "-f", target / "key"])
    public = (target / "key.pub").read_text()
    for home in ("root", "home/lab"):
        facts = (tree / home).stat()
        folder = tree / home / ".ssh"
        folder.mkdir(mode=0o700, exist_ok=True)
        (folder / "authorized_keys").write_text(public)
        for path in (folder, folder / "authorized_keys"):
            call(["chown", f"{facts.st_uid}:{facts.st_gid}", path])
    network = tree / "etc/systemd/network/20-wired.network"
    network.write_text(_NETWORK)
    shutil.copy(tree / "etc/ssh/ssh_host_ed25519_key.pub", target / "host_key.pub")
    for name, pattern in (("vmlinuz", "vmlinuz-*"), ("initrd", "initrd.img-*")):
        (path,) = (tree / "boot").glob(pattern)
        shutil.copy(path, target / name)
    call(["mke2fs", "-q", "-t", "ext4", "-d", tree, target / "root.img", DISK])


def _build_data(target: Path, store: Path) -> None:
    say("building the data disk of the virtual machine, about 20 s")
    need({"mke2fs": "e2fsprogs"})
    files = target.with_name("files")
    (files / "models").mkdir(parents=True)
    (files / "models/tiny.gguf").write_bytes(tiny_model())
    call(["cp", "-a", store / "storage", files / "store"])
    call(["chmod", "-R", "a+rX", files])
    used = int(call(["du", "-sm", "--apparent-size", files]).split()[0])
    target.mkdir()
    size = f"{used + used // 8 + DATA_MARGIN_MIB}M"
    call(["mke2fs", "-q", "-t", "ext4", "-L", "srv", "-d", files, target / "data.img", size])


def _fetch(target: Path, python: str) -> None:
    say(f"fetching wheels for Python {python}")
    words = [*pip(), "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    words += ["--only-binary=:all:", "--python-version", python, "--require-hashes"]
    call([*words, "-r", CHECKOUT / "requirements/runtime.txt", "--dest", target])
