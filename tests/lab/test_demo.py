"""`make demo` and `make demo-down`, from an empty state to an empty state."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from .host import CHECKOUT, LabError, need_root


def demo(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the demo as make does, with a state folder of its own."""
    words = [sys.executable, "-m", "lab.demo", "--folder", str(folder), *arguments]
    return subprocess.run(
        words,
        cwd=CHECKOUT,
        env=dict(os.environ, PWD=str(CHECKOUT), PYTHONPATH="tests"),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
        check=False,
    )


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Yield the state folder of a demo. The demo is stopped even if the test fails."""
    try:
        need_root()
    except LabError as error:
        if os.environ.get("CI"):
            pytest.fail(str(error))
        pytest.skip(str(error))
    yield tmp_path
    demo(tmp_path, "down")


def free_port() -> int:
    """Return a port that no program uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_the_demo_keeps_what_it_promises(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    port = str(free_port())
    first = demo(folder, "up", "--lab", "--port", port)
    assert first.returncode == 0, first.stdout
    endpoint = f"http://127.0.0.1:{port}/v1"
    assert f"demo is up: {endpoint}" in first.stdout
    measured = re.search(
        r"first token (\d+\.\d+) s, (\d+\.\d+) tok/s over (\d+) tokens", first.stdout
    )
    assert measured, first.stdout
    assert float(measured[2]) > 0
    assert int(measured[3]) >= 64

    # The commands that it prints work without a change.
    block = first.stdout.split("try next, in this shell\n")[1].split("stop\n")[0]
    script = block.replace("logs -f", "logs")
    pasted = subprocess.run(
        ["bash", "-e"], input=script, cwd=CHECKOUT, capture_output=True, text=True, check=False
    )
    assert pasted.returncode == 0, pasted.stderr
    answer, rest = pasted.stdout.split("\n", 1)
    assert json.loads(answer)["usage"]["completion_tokens"] > 0
    assert rest.startswith("demo   ready")
    assert "listening on" in rest

    again = demo(folder, "up", "--lab", "--port", port)
    assert again.returncode == 0, again.stdout
    assert "demo is up already" in again.stdout

    # A second demo is refused the port of the first.
    other = demo(tmp_path_factory.mktemp("other"), "up", "--lab", "--port", port)
    assert other.returncode == 1
    assert f"error: port {port} is taken by llama-server" in other.stdout

    home = Path(json.loads((folder / "lab.json").read_text())["folder"])
    state = json.loads((home / "state.json").read_text())
    down = demo(folder, "down")
    assert down.returncode == 0, down.stdout
    assert "the demo is down" in down.stdout
    assert not home.exists()
    assert f" {home}/" not in Path("/proc/mounts").read_text()
    assert not [pid for pid in state.values() if Path("/proc", str(pid)).exists()]
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", int(port)))
    assert "nothing to stop" in demo(folder, "down").stdout
