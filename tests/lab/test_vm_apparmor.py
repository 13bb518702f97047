"""AppArmor is on: root's containers have Podman's profile and can signal each other."""

from __future__ import annotations

import re

import pytest

from .look import wait_for
from .test_vm import BOUND, engine, up
from .vmbox import SERVICE_USER, Box, rest

pytestmark = pytest.mark.vm
#: Seconds that a stop may take on an idle machine.
MOST_S = 6
#: Prints the milliseconds that systemd takes to stop a service.
STOP = 'a=$(date +%s%N); systemctl stop "$1"; b=$(date +%s%N); echo $(((b - a) / 1000000))'


@pytest.fixture(scope="module")
def with_door(served: Box) -> Box:
    """Return the box with root's stack behind a front door."""
    rest(served)
    up(served, "root", "--set", "front_door=on", *BOUND)
    return served


def test_the_machine_has_apparmor(with_door: Box) -> None:
    assert with_door.read("/sys/module/apparmor/parameters/enabled") == "Y\n"
    loaded = with_door.read("/sys/kernel/security/apparmor/profiles")
    assert re.search(r"^crun \(", loaded, re.MULTILINE)
    tools = with_door.json("root", "probe")["tools"]
    assert tools["apparmor"] is True
    assert "crun" in tools["apparmor_profiles"]


def test_containers_of_root_have_podman_s_profile_alone(with_door: Box) -> None:
    for pid in (with_door.pid("root", "stackctl-cpu_door"), engine(with_door, "root")):
        label = with_door.read(f"/proc/{pid}/attr/current").strip("\0\n")
        assert re.fullmatch(r"containers-default-\S+ \(enforce\)", label), label
        status = with_door.status(pid)
        assert status["NoNewPrivs"] == "0"
        assert (status["Seccomp"], int(status["CapBnd"], 16)) == ("2", 0)
    # Containers of users have no profile, and keep no-new-privileges.
    assert with_door.status(engine(with_door, SERVICE_USER))["NoNewPrivs"] == "1"


def test_a_door_and_an_engine_of_root_stop_in_time(with_door: Box) -> None:
    names = with_door.run("root", "podman", "ps", "--format", "{{.Names}}").split()
    services = sorted(f"{name.removeprefix('stackctl-')}.service" for name in names)
    assert services[-1] == "cpu_door.service"
    for service in reversed(services):
        wait_until_idle(with_door)
        took_s = int(with_door.run("root", "sh", "-c", STOP, "stop", service)) / 1000
        result = with_door.run("root", "systemctl", "show", "-P", "Result", service).strip()
        assert (result, took_s < MOST_S) == ("success", True), f"{service}: {result}, {took_s} s"
    for service in services:
        with_door.root("systemctl", "start", service)


def wait_until_idle(box: Box) -> None:
    """Wait until the load of the machine is low."""

    def is_idle() -> bool:
        return float(box.read("/proc/loadavg").split()[0]) < 0.5

    wait_for("an idle machine", is_idle, 600, step=5)
