"""stackctl brought to a machine without: what is asked of it and packed, and how it runs there.

The other machine is this one, with another Python's packages from a real pip and wheels made here.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import pwd
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path

import pytest
from test_image_wheels import look_only_in, wheel

from stackctl import __version__
from stackctl.errors import ExitCode, StackctlError
from stackctl.provision import remote_bundle, self_install
from stackctl.provision.remote_bootstrap_main import PREFIX
from stackctl.provision.remote_bundle import RemoteFacts, RemotePython

CHECKOUT = Path(__file__).parents[2]
ELSEWHERE = RemotePython("/usr/bin/python3", (3, 99), "aarch64", 28)

# What a box says


def test_what_a_box_says_of_itself() -> None:
    text = """\
Welcome to box!
python 3 is the default here
uid 1000
sudo
stackctl 0.0.9
nvidia
python /usr/bin/python3 3.10 x86_64 CPython glibc-2.35
python /usr/bin/python3.12 3.12 x86_64 CPython glibc-2.35
python /usr/bin/python3.13 3.13 x86_64 CPython glibc-2.35.9000
"""
    seen = remote_bundle.parse_probe(text)
    assert (seen.uid, seen.sudo, seen.version) == (1000, True, "0.0.9")
    assert seen.choose_python("box") == RemotePython(
        "/usr/bin/python3.12", (3, 12), "x86_64", 35, True
    )
    assert [found.glibc for found in seen.pythons] == [35, 35, 35]
    assert remote_bundle.parse_probe("uid 0\n") == RemoteFacts(0, False, None, ())


def test_this_machine_is_asked_as_a_box_would_be() -> None:
    done = subprocess.run(
        ["sh", "-c", remote_bundle.probe_command()],
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    seen = remote_bundle.parse_probe(done.stdout)
    assert seen.uid == os.geteuid()
    assert seen.sudo is (shutil.which("sudo") is not None)
    assert seen.pythons, done.stderr
    # Any login shell must let it through.
    assert "\n" not in remote_bundle.probe_command()


@pytest.mark.parametrize(
    ("python", "message"),
    [
        ("", "there is no python3"),
        ("python /usr/bin/python3 3.9 x86_64 CPython glibc-2.34\n", "/usr/bin/python3 is 3.9"),
        ("python /usr/bin/python3 3.12 x86_64 CPython -\n", "python3 is 3.12"),
        ("python /usr/bin/python3 3.12 x86_64 PyPy glibc-2.34\n", "python3 is 3.12"),
    ],
)
def test_a_box_without_a_python_for_it(python: str, message: str) -> None:
    with pytest.raises(StackctlError, match=message) as caught:
        remote_bundle.parse_probe(f"uid 0\n{python}").choose_python("root@box")
    assert caught.value.exit_code == ExitCode.HOST
    assert "CPython 3.11 or later" in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("one", "other", "older"),
    [("0.1.0", "0.1.0", False), ("0.9.0", "0.10.0", True), ("0.10", "0.9.1", False)],
)
def test_versions_are_compared_by_their_numbers(one: str, other: str, older: bool) -> None:
    assert remote_bundle.is_older(one, other) is older


# What is packed


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of wheels, and a user who told pip to look there and nowhere else."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    look_only_in(folder, monkeypatch)
    return folder


def every_package(folder: Path, tag: str) -> None:
    """A wheel of each package that stackctl uses, in its version of here."""
    for one in self_install.required_distributions():
        name = one.name.replace("-", "_")
        wheel(folder, name, tag, {f"{name}.py": ""}, version=one.version)


def test_packages_are_those_of_the_other_python(wheels: Path, tmp_path: Path) -> None:
    every_package(wheels, "cp399-cp399-manylinux_2_17_aarch64.manylinux2014_aarch64")
    told: list[str] = []
    for _ in range(2):
        data = remote_bundle.build_bundle(ELSEWHERE, tmp_path / "cache", told.append)
    # Once fetched they are there; of a process that was killed nothing is taken for them.
    assert len(told) == 1
    assert "Python 3.99 on aarch64" in told[0]
    names = set(zipfile.ZipFile(BytesIO(data)).namelist())
    assert {"msgspec.py", "stackctl/__main__.py", "stackctl/_data/profiles/cpu.yaml"} <= names
    assert not any("__pycache__" in name or name.startswith("bin/") for name in names)
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {"brought"}


def test_pip_is_our_own_and_set_up_for_something_else(
    wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    every_package(wheels, "py3-none-any")
    settings = tmp_path / "pip.conf"
    settings.write_text("[global]\nrequire-virtualenv = true\n[install]\nuser = true\n")
    monkeypatch.setenv("PIP_CONFIG_FILE", str(settings))
    # A folder of somebody's who would like root to run something.
    (tmp_path / "pip.py").write_text("raise SystemExit('not this one')")
    monkeypatch.chdir(tmp_path)
    assert remote_bundle.build_bundle(ELSEWHERE, tmp_path / "cache", print)


def test_a_box_with_a_card_gets_what_asks_it(wheels: Path, tmp_path: Path) -> None:
    every_package(wheels, "py3-none-any")
    if not any(one.name == "nvidia-ml-py" for one in self_install.required_distributions()):
        wheel(wheels, "nvidia_ml_py", "py3-none-any", {}, version="13.0")
    card = RemotePython("python3", (3, 99), "aarch64", 28, nvidia=True)
    names = zipfile.ZipFile(
        BytesIO(remote_bundle.build_bundle(card, tmp_path / "cache", print))
    ).namelist()
    assert any(name.startswith("nvidia_ml_py-") for name in names)


def test_no_wheel_for_that_platform(wheels: Path, tmp_path: Path) -> None:
    # Built for a newer glibc than the box has.
    every_package(wheels, "cp399-cp399-manylinux_2_31_aarch64")
    with pytest.raises(
        StackctlError, match=r"no wheel of \S+==\S+ for Python 3.99 on aarch64"
    ) as e:
        remote_bundle.build_bundle(ELSEWHERE, tmp_path / "cache", print)
    assert e.value.exit_code == ExitCode.HOST
    assert not list((tmp_path / "cache/brought").iterdir())


def test_an_index_that_does_not_answer(
    wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "1")
    with pytest.raises(StackctlError, match="cannot be fetched") as caught:
        remote_bundle.build_bundle(ELSEWHERE, tmp_path / "cache", print)
    assert caught.value.exit_code == ExitCode.HOST
    assert any("refused" in line for line in caught.value.details)


def test_what_is_needed_is_known_in_a_checkout_that_nobody_installed(tmp_path: Path) -> None:
    for name in ("msgspec", "yaml", "click"):
        (found,) = [Path(path) / name for path in sys.path if (Path(path) / name).is_dir()][:1]
        (tmp_path / name).symlink_to(found)
    code = (
        f"import sys; sys.path[:0] = [{str(CHECKOUT)!r}, {str(tmp_path)!r}];"
        "from stackctl.provision import self_install as p;"
        "print(*p.requirements(), sep='\\n'); print(p.package_metadata()[0])"
    )
    text = subprocess.check_output([sys.executable, "-I", "-S", "-c", code], text=True, timeout=60)
    *lines, path = text.splitlines()
    assert {line.partition(";")[0].strip() for line in lines} == {
        line.partition(";")[0].strip() for line in self_install.requirements()
    }
    assert path == f"stackctl_inference-{__version__}.dist-info/METADATA"


# How it runs there


@pytest.fixture
def here() -> RemotePython:
    """This machine and its own Python: packages of here will do."""
    text = subprocess.check_output(
        [sys.executable, "-I", "-c", remote_bundle._PYTHON], text=True, timeout=30
    )
    return remote_bundle.parse_probe(text).choose_python("here")


@pytest.fixture
def kept(here: RemotePython, tmp_path: Path) -> Iterator[tuple[str, str]]:
    """What was sent, at its place: path and hash. Gone with who sent it."""
    data = remote_bundle.build_bundle(here, tmp_path / "cache", print)
    words = remote_bundle.bootstrap_command(
        here, "keep", str(len(data)), str(remote_bundle.unpacked_bytes(data))
    )
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(data)
        process.stdin.flush()
        path = process.stdout.readline().decode().split()[1]
        yield path, hashlib.sha256(data).hexdigest()
    assert process.returncode == 0
    wait_until(lambda: not Path(path).parent.exists())


def wait_until(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def left(path: str) -> list[Path]:
    """Folders of what runs."""
    homes = (Path(pwd.getpwuid(os.geteuid()).pw_dir), Path("/var/tmp"))
    found = (folder for home in homes for folder in home.glob(f"{PREFIX}*"))
    return [folder for folder in found if folder != Path(path).parent]


def test_it_runs_and_is_gone(kept: tuple[str, str], here: RemotePython) -> None:
    path, digest = kept
    assert Path(path).parent.stat().st_mode & 0o777 == 0o700
    for words, code in ((["--version"], 0), (["plan", "no such"], 4)):
        done = subprocess.run(
            remote_bundle.bootstrap_command(here, "start", path, digest, f"{__version__} box",
                *words),
            cwd="/", env={}, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert done.returncode == code, done.stderr
    assert "no such" in done.stderr
    wait_until(lambda: not left(path))


def test_packages_of_the_box_are_none_of_ours(tmp_path: Path) -> None:
    # Podman's client asks for tomli, where Python is older; a distribution's has no list of files.
    python = tmp_path / "box/bin/python"
    words = [sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "box")]
    subprocess.run(words, check=True, timeout=60)
    (packages,) = (tmp_path / "box/lib").glob("python3.*/site-packages")
    (packages / "tomli-2.0.dist-info").mkdir()
    text = "Metadata-Version: 2.1\nName: tomli\nVersion: 2.0\n"
    (packages / "tomli-2.0.dist-info/METADATA").write_text(text)
    code = "from importlib import metadata as m; print([d.name for d in m.distributions()])"
    target = RemotePython(str(python), (3, 11), "x86_64", 36)
    own, *flags, _, _, _ = remote_bundle.bootstrap_command(target)
    said = [
        subprocess.check_output([own, *chosen, "-c", code], text=True, timeout=60)
        for chosen in (["-I"], flags)
    ]
    assert said == ["['tomli']\n", "[]\n"]


def test_killed_it_is_gone_as_well(kept: tuple[str, str], here: RemotePython) -> None:
    path, digest = kept
    words = remote_bundle.bootstrap_command(
        here, "start", path, digest, f"{__version__} box", "top", "--no-such"
    )
    with subprocess.Popen(words, stderr=subprocess.DEVNULL) as process:
        wait_until(lambda: bool(left(path)) or process.poll() is not None)
        process.send_signal(signal.SIGKILL)
    assert process.returncode in (-9, 2)
    wait_until(lambda: not left(path))


def test_interrupted_before_it_runs_it_ends_as_stackctl_does(
    here: RemotePython, tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "pipe")
    words = remote_bundle.bootstrap_command(
        here, "start", str(tmp_path / "pipe"), "0", "x y", "--version"
    )
    with subprocess.Popen(words, stderr=subprocess.PIPE) as process:
        opened: list[int] = []

        def reads() -> bool:
            with contextlib.suppress(OSError):
                opened.append(os.open(tmp_path / "pipe", os.O_WRONLY | os.O_NONBLOCK))
            return bool(opened)

        wait_until(reads)
        process.send_signal(signal.SIGINT)
        # A signal that arrives just before the read does not end it, but the end of the pipe does.
        os.close(opened[0])
        _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (130, b"")


def test_only_what_was_sent_is_run(kept: tuple[str, str], here: RemotePython) -> None:
    path, digest = kept
    with Path(path).open("ab") as stream:
        stream.write(b"more")
    words = remote_bundle.bootstrap_command(here, "start", path, digest, "x y", "--version")
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (6, "")
    assert "is not the bundle that was sent" in done.stderr


def test_half_of_it_is_not_kept(here: RemotePython) -> None:
    words = remote_bundle.bootstrap_command(here, "keep", "1000", "0")
    done = subprocess.run(words, input=b"x" * 500, capture_output=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (6, b"")
    assert b"500 of 1000 bytes arrived" in done.stderr


def test_a_box_without_room(here: RemotePython) -> None:
    words = remote_bundle.bootstrap_command(here, "keep", "1", str(2**60))
    done = subprocess.run(words, input=b"x", capture_output=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (6, b"")
    assert b"neither /var/tmp nor /" in done.stderr
    assert b" has 1099511627776 MiB left for programs" in done.stderr
