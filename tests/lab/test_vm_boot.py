"""Boots without a login: all stacks answer, also if the GPU's driver is late.

If the driver never comes, status reports it. Then a NUMA node loses its CPUs. The GPU is simulated
(card.py): its driver is there a minute after the boot, or never. The service of ``provision``, the
CDI file, Podman and the units are real.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest

from . import card
from .look import wait_for
from .test_vm import BOUND, CPUS, MODELS, proven, up
from .vmbox import SERVICE_USER, Box, rest, results

pytestmark = pytest.mark.vm
USERS = (SERVICE_USER, "root")
IMAGE = "localhost/stackctl/llama-cpp:latest"
PLACE = "/usr/local/lib/lab-gpu"
REFRESH = "stackctl-cdi-refresh.service"
#: Seconds from the boot to the driver.
LATE_S = 60
DRIVER = f"""\
[Service]
ExecStart=/bin/sh -c 'sleep {LATE_S}; touch {card.DEVICE}'
[Install]
WantedBy=multi-user.target
"""
PORTS = {("cpu", SERVICE_USER): 8080, ("cpu", "root"): 8090,
         ("gpu-gguf", SERVICE_USER): 8083, ("gpu-gguf", "root"): 8093}  # fmt: skip


@pytest.fixture(scope="module")
def carded(served: Box) -> Iterator[Box]:
    """Yield the box with a GPU that is described at each boot.

    Each user has a stack on it and one on the CPU.
    """
    vm, folder = served.vm, card.build()
    vm.run(["mkdir", "-p", PLACE], check=True)
    for name in ("libnvidia-ml.so.1", "pynvml.py"):
        vm.copy(folder / name, f"{PLACE}/{name}")
    library = f"{PLACE}/libcuda.so.{card.DRIVER}"
    write(served, library, "not really\n")
    write(served, f"{PLACE}/cdi.json", card.cdi(library=library))
    write(served, "/etc/systemd/system/lab-driver.service", DRIVER)
    served.root("sh", "-c", SET_UP, "set-up", PLACE)
    vm.run(["sh", "-c", card.TOOLKIT, "toolkit", PLACE], check=True)
    served.root("apt-get", "update", *ONLY_THAT)
    served.root("stackctl", "provision", "--yes", "--only=cdi", timeout=900)
    for user in USERS:
        up(served, user, *BOUND)
        words = [
            "--set",
            f"image={IMAGE}",
            "--set",
            "front_door=off",
            "--set",
            f"port={PORTS['gpu-gguf', user]}",
        ]
        served.run(user, "stackctl", "up", "gpu-gguf", "--yes", "--model", MODELS[user], *words)
    yield served
    for user in USERS:
        served.run(user, "stackctl", "down", "gpu-gguf", code=None)
    served.root("stackctl", "down", "cpu", code=None)
    served.root("stackctl", "provision", "--undo", "--yes", "--only=cdi", timeout=900)
    served.root("sh", "-c", CLEAN_UP, "clean-up", PLACE)


ONLY_THAT = ("-o", "Dir::Etc::sourcelist=/etc/apt/sources.list.d/toolkit.list",
             "-o", "Dir::Etc::sourceparts=-")  # fmt: skip
SET_UP = f"""
set -e
ln -sf $1/libnvidia-ml.so.1 /usr/lib/x86_64-linux-gnu/
mkdir -p /usr/local/lib/python3.13/dist-packages
ln -sf $1/pynvml.py /usr/local/lib/python3.13/dist-packages/
touch {card.DEVICE}
systemctl enable --quiet lab-driver.service
"""
CLEAN_UP = f"""
systemctl disable --quiet lab-driver.service
rm -f {card.DEVICE} /etc/systemd/system/lab-driver.service /etc/apt/sources.list.d/toolkit.list
rm -f /usr/lib/x86_64-linux-gnu/libnvidia-ml.so.1
rm -rf /usr/local/lib/python3.13/dist-packages/pynvml.py \\
    /usr/local/lib/python3.13/dist-packages/__pycache__
rm -rf "$1" /run/cdi
systemctl daemon-reload
"""


def test_all_stacks_answer_after_a_boot_at_which_the_driver_is_late(carded: Box) -> None:
    carded.vm.reboot()
    # The requests come before any stackctl runs on the machine.
    for number in PORTS.values():
        wait_for_answer(carded, number)
    # The service user has no session and cannot log in. Its manager lingers.
    shown = carded.root("loginctl", "show-user", SERVICE_USER, "-P", "State").stdout
    assert shown.strip() == "lingering"
    # The units started long before the file existed, and waited for it.
    made = monotonic(carded, "root", REFRESH, "ActiveEnterTimestampMonotonic")
    assert made > LATE_S
    for user in USERS:
        began = monotonic(carded, user, "gpu-gguf.service", "InactiveExitTimestampMonotonic")
        assert began < made
        uid = carded.root("id", "-u", user).stdout.strip()
        words = ("journalctl", "-b", "-o", "cat", "-t", "gpu-gguf-g1", f"_UID={uid}")
        assert f"waits: {MISSING}\n" in carded.root(*words).stdout
        for stack in ("cpu", "gpu-gguf"):
            assert state(carded, user, stack)["state"] == "ready"
            assert state(carded, user, stack)["restarts"] == 0


def test_a_driver_that_never_comes_is_told_by_status(carded: Box) -> None:
    carded.root("systemctl", "disable", "--quiet", "lab-driver.service")
    carded.vm.reboot()
    rest(carded)
    for user in USERS:
        wait_for_answer(carded, PORTS["cpu", user])
        seen = state(carded, user, "gpu-gguf")
        assert seen["state"] == "starting"
        assert seen["cause"] == f"waits for its GPU: {MISSING}"
        assert seen["remedy"] == LOOK
    # The remedy reports the missing driver.
    done = carded.root("stackctl", "provision", "--yes", "--only=cdi", code=6).stdout
    assert "none on the PCI bus" in done


MISSING = "no file in /etc/cdi or /run/cdi describes nvidia.com/gpu"
LOOK = "stackctl provision --only cdi says what is missing"
OFFLINE = f"sudo chcpu --enable {CPUS}; then stackctl restart cpu"


@pytest.fixture
def offline(carded: Box) -> Iterator[Callable[[], None]]:
    """Yield a function that takes the second node's CPU offline; it is online again afterwards."""
    yield lambda: switch(carded, "0")
    switch(carded, "1")


def switch(box: Box, to: str) -> None:
    """Write 1 or 0 to switch the second node's CPU on or off."""
    box.root("sh", "-c", f"echo {to} >/sys/devices/system/cpu/cpu{CPUS}/online")


def test_a_node_that_loses_its_processors_while_a_stack_runs(
    carded: Box, offline: Callable[[], None]
) -> None:
    offline()
    found = results(carded.json("root", "verify", "cpu", code=1))
    assert found["cpus"]["status"] == "fail", found
    assert found["cpus"]["remedy"] == OFFLINE
    # It serves on the other node, because systemd uses the CPUs that exist. verify reports it, and
    # no new stack may be bound to the node.
    carded.root("stackctl", "restart", "cpu")
    assert results(carded.json("root", "verify", "cpu", code=1))["cpus"]["status"] == "fail"
    words = ("stackctl", "plan", "cpu-latency", "--model", MODELS["root"], *BOUND)
    refused = carded.root(*words, code=2).stderr
    assert "the chosen NUMA nodes have no CPU" in refused
    carded.root("sh", "-c", OFFLINE.replace("; then", " &&"))
    assert proven(carded, "root") >= {"cpus", "memory", "locked"}


def test_a_gpu_that_did_not_come_ends_in_a_clear_state(carded: Box) -> None:
    """The unit has waited since the last boot, three times two minutes.

    The CDI service still waits.
    """
    for user in USERS:
        wait_for("it gives up", partial(gave_up, carded, user), 500, step=10)
        seen = state(carded, user, "gpu-gguf")
        assert (seen["state"], seen["cause"]) == (
            "crash loop", f"gave up after 3 starts: {MISSING}",
        )  # fmt: skip
        assert seen["remedy"] == f"{LOOK}; then stackctl restart gpu-gguf"
    # With the driver it serves again.
    carded.root("touch", card.DEVICE)
    carded.root("systemctl", "restart", REFRESH)
    carded.root("stackctl", "restart", "gpu-gguf")
    assert answers(carded, PORTS["gpu-gguf", "root"])


def write(box: Box, path: str, text: str) -> None:
    """Write a file on the machine."""
    box.vm.run(["sh", "-c", 'cat >"$1"', "write", path], input=text, check=True)


def answers(box: Box, number: int) -> bool:
    """Return True if an endpoint of the machine answers."""
    body = json.dumps({"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2})
    url = f"http://127.0.0.1:{number}/v1/chat/completions"
    done = box.root("curl", "-sf", "--max-time", "60", url, "-d", body, code=None)
    return done.returncode == 0 and bool(json.loads(done.stdout)["usage"]["completion_tokens"])


def wait_for_answer(box: Box, number: int) -> None:
    """Wait for an answer after a boot on an emulated processor."""
    wait_for(f"port {number} answers", partial(answers, box, number), 400, step=2)


def gave_up(box: Box, user: str) -> bool:
    """Return True if systemd no longer starts the user's stack on the GPU."""
    return str(state(box, user, "gpu-gguf")["state"]) != "starting"


def monotonic(box: Box, user: str, unit: str, name: str) -> float:
    """Return a time of a unit in seconds since the boot."""
    scope = [] if user == "root" else ["--user"]
    return int(box.run(user, "systemctl", *scope, "show", "-P", name, unit)) / 1e6


def state(box: Box, user: str, stack: str) -> dict[str, Any]:
    """Return the stack's entry in ``status``."""
    (seen,) = box.json(user, "status", stack, code=None)["stacks"]
    found: dict[str, Any] = seen
    return found
