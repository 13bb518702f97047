"""A unit waits for its GPUs to be described: the command itself, in every shell there is."""

from __future__ import annotations

import re
import shutil
import subprocess
import threading
from pathlib import Path

import pytest

from stackctl.deploy import gpu_access
from stackctl.units import wait_for_cdi

SHELLS = [
    words
    for words in (["dash"], ["bash", "--posix"], ["bash"], ["busybox", "sh"], ["mksh"])
    if shutil.which(words[0])
]
KIND = "nvidia.com/gpu"
TEXT = '{"cdiVersion": "0.5.0", "kind": "nvidia.com/gpu", "devices": [{"name": "0"}]}'


def wait(shell: list[str], place: Path, *, most_s: int) -> subprocess.CompletedProcess[str]:
    """Run the command for files below a folder, with other times."""
    _, _, text = wait_for_cdi.wait_command((f"{KIND}=0", f"{KIND}=1"))
    for name in ("etc", "run"):
        (place / name / "cdi").mkdir(parents=True, exist_ok=True)
        text = re.sub(rf" /{name}/cdi/(?=\*)", f" {place}/{name}/cdi/", text)
    text = text.replace(f"-lt {wait_for_cdi.WAIT_S}", f"-lt {10 * most_s}")
    text = text.replace(f"n+{wait_for_cdi.PAUSE_S}", "n+1").replace("sleep 2", "sleep 0.1")
    return subprocess.run(
        [*shell, "-c", text], capture_output=True, text=True, timeout=30, check=False
    )


@pytest.mark.parametrize("shell", SHELLS, ids=lambda words: words[0])
def test_a_described_gpu_is_not_waited_for(shell: list[str], tmp_path: Path) -> None:
    for name in ("etc/cdi/site.yaml", "run/cdi/nvidia.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(TEXT)
        done = wait(shell, tmp_path, most_s=0)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        (tmp_path / name).unlink()
        # What Podman does not read does not count, nor does another device.
        (tmp_path / name).with_suffix(".new").write_text(TEXT)
        (tmp_path / name).write_text(TEXT.replace("nvidia", "amd"))
        assert wait(shell, tmp_path, most_s=0).returncode == 1
        (tmp_path / name).unlink()


@pytest.mark.parametrize("shell", SHELLS, ids=lambda words: words[0])
def test_a_gpu_that_is_described_late(shell: list[str], tmp_path: Path) -> None:
    late = threading.Timer(0.5, lambda: (tmp_path / "run/cdi/nvidia.yaml").write_text(TEXT))
    late.start()
    done = wait(shell, tmp_path, most_s=20)
    late.join()
    assert (done.returncode, done.stderr) == (0, "")
    said = done.stdout.splitlines()
    assert said == [f"waits: no file in /etc/cdi or /run/cdi describes {KIND}"]
    # What a unit waits for is no failure of it.
    assert gpu_access.device_failure(said) is None
    known = gpu_access.device_failure(said, waits=True)
    assert known is not None
    assert known.cause == f"no file in /etc/cdi or /run/cdi describes {KIND}"


@pytest.mark.parametrize("shell", SHELLS, ids=lambda words: words[0])
def test_a_gpu_that_is_never_described(shell: list[str], tmp_path: Path) -> None:
    done = wait(shell, tmp_path, most_s=1)
    assert (done.returncode, done.stderr) == (1, "")
    known = gpu_access.device_failure(done.stdout.splitlines())
    assert known is not None
    assert known.cause == f"no file in /etc/cdi or /run/cdi describes {KIND}"
    assert "stackctl provision --only cdi" in (known.remedy or "")


def test_a_device_that_is_not_among_those_described() -> None:
    said = ["Error: setting up CDI devices: unresolvable CDI devices nvidia.com/gpu=7"]
    known = gpu_access.device_failure(["llama-server loads", *said])
    assert known is not None
    assert "no device nvidia.com/gpu=7" in known.cause
    assert gpu_access.device_failure(["/dev/nvidia0: No such file or directory"]) is None


def test_a_driver_is_looked_for_as_often_as_a_start_waits() -> None:
    from stackctl.resources import data_folder

    text = (data_folder("systemd") / "system/stackctl-cdi-refresh.service").read_text()
    # However late: systemd does not give up, and does not refuse who starts it by hand.
    assert "\nStartLimitIntervalSec=0\n" in text
    longest = re.search(r"^RestartMaxDelaySec=(\d+)min$", text, re.MULTILINE)
    assert longest is not None
    assert int(longest[1]) * 60 <= wait_for_cdi.WAIT_S
