"""The lab itself: it has the properties that the other tests rely on."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from . import look
from .conftest import Seat
from .lab import IMAGE, MODEL_PATH, Lab

UNIT = f"""\
[Container]
ContainerName=lab-probe
Image={IMAGE}
Pull=never
Network=host
ReadOnly=true
NoNewPrivileges=true
DropCapability=all
LogDriver=passthrough
Volume=/srv/models:/srv/models:ro
Exec=llama-server --model {MODEL_PATH} --host 127.0.0.1 --port PORT --ctx-size 512 --threads 1
# What every podman understands; Notify=healthy means something else before 5.0.
PodmanArgs=--sdnotify=healthy
HealthCmd=curl --fail --silent http://127.0.0.1:PORT/health
HealthStartupCmd=curl --fail --silent http://127.0.0.1:PORT/health
HealthStartupInterval=1s

[Service]
SyslogIdentifier=lab-probe-engine
TimeoutStartSec=60
"""


def test_a_quadlet_unit_serves_a_real_model(seat: Seat) -> None:
    port = "18080" if seat.user == "root" else "18081"
    seat.lab.write(
        f"{seat.units}/probe/probe.container", UNIT.replace("PORT", port), user=seat.user
    )
    seat.systemctl("daemon-reload")
    # Quadlet makes a user's units wait for the network, which never becomes online in the lab.
    seat.lab.run(["systemctl", "start", "network-online.target"], check=True)
    seat.systemctl("start", "probe.service")
    seat.lab.run(["systemctl", "stop", "network-online.target"], check=True)
    ask = {"prompt": "The capital of France is", "n_predict": 8, "temperature": 0}
    answer = look.post(seat, f"http://127.0.0.1:{port}/completion", ask)
    assert "France" in answer["content"]
    # The user's own journal has the engine's lines under the identifier of the unit.
    assert "model loaded" in seat.journal("--identifier", "lab-probe-engine")
    assert seat.loaded() == ["probe.service"]
    assert len(seat.left_behind()) == 3  # container, unit file, unit
    seat.reset()
    seat.assert_nothing_left()


def test_a_user_without_linger_can_log_in(lab: Lab) -> None:
    done = lab.run(["systemctl", "--user", "is-system-running"], user="nolinger", check=True)
    assert done.stdout.strip() == "running"
    shown = lab.run(["loginctl", "show-user", "nolinger", "-P", "Linger"], check=True)
    assert shown.stdout.strip() == "no"


def test_signals_reach_the_command(lab: Lab) -> None:
    script = "trap 'echo interrupted; exit 7' INT; echo ready; while :; do sleep 0.05; done"
    with lab.spawn(["sh", "-c", script], user="lab") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=10)
        assert (out, process.returncode) == ("interrupted\n", 7)


def test_a_command_that_takes_too_long_is_ended(lab: Lab) -> None:
    with pytest.raises(subprocess.TimeoutExpired):
        lab.run(["sleep", "31.25"], timeout=0.5)
    assert not look.processes(lab, "sleep 31.25")


def test_what_holds_the_pipes_of_a_command_is_not_waited_for(lab: Lab) -> None:
    script = "echo said; setsid sleep 33.25 & exec sleep 33.75"
    began = time.monotonic()
    with pytest.raises(subprocess.TimeoutExpired) as late:
        lab.run(["sh", "-c", script], timeout=0.5)
    assert late.value.output == "said\n"
    assert time.monotonic() - began < 30
    lab.run(["pkill", "-f", "sleep 33.25"])


def test_a_failing_test_ends_what_it_started(lab: Lab) -> None:
    with pytest.raises(ZeroDivisionError), lab.spawn(["sleep", "34.25"]):
        raise ZeroDivisionError
    assert not look.processes(lab, "sleep 34.25")


@pytest.mark.parametrize("victim", ["starter", pytest.param("supervisor", marks=pytest.mark.deep)])
def test_nothing_outlives_the_lab(victim: str) -> None:
    code = (
        f"from {__package__}.lab import Lab\n"
        "import time\n"
        "lab = Lab(app=False)\n"
        "lab.start()\n"
        "lab.spawn(['setsid', 'sleep', '3600'], user='lab')\n"
        "print(lab._supervisor_pid, lab.pid, lab._folder, flush=True)\n"
        "time.sleep(600)\n"
    )
    base = Path(__file__).resolve().parents[len(str(__package__).split("."))]
    words = [sys.executable, "-c", code]
    with subprocess.Popen(words, cwd=base, stdout=subprocess.PIPE, text=True) as starter:
        assert starter.stdout is not None
        supervisor, init, folder = starter.stdout.readline().split()
        if victim == "starter":
            starter.kill()
        else:
            Path("/proc", supervisor).stat()
            subprocess.run(["kill", "-KILL", supervisor], check=True)
        gone = [Path("/proc", supervisor), Path("/proc", init)]
        if victim == "starter":
            gone.append(Path(folder))
        deadline = time.monotonic() + 60
        while any(path.exists() for path in gone) and time.monotonic() < deadline:
            time.sleep(0.05)
        starter.kill()
    assert not [path for path in gone if path.exists()]
    assert folder not in Path("/proc/mounts").read_text()


def test_a_detached_lab_goes_on_until_it_is_stopped(tmp_path: Path) -> None:
    code = f"""\
from pathlib import Path
from {__package__}.lab import Lab
Lab.start_detached(Path({str(tmp_path)!r}), app=False)
"""
    base = Path(__file__).resolve().parents[len(str(__package__).split("."))]
    subprocess.run([sys.executable, "-c", code], cwd=base, check=True)
    lab = Lab.attach(tmp_path)
    try:
        init = Path("/proc", str(lab.pid))
        assert lab.run(["hostname"]).stdout == "lab\n"
        assert lab.run(["id", "-un"], user="lab").stdout == "lab\n"
    finally:
        Lab.stop(tmp_path)
    assert not init.exists()
    assert not Lab.running(tmp_path)
