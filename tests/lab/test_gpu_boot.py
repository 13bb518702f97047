"""The GPU's CDI file: a service of provision writes it at each boot, and units wait for it."""

from __future__ import annotations

import json

import pytest

from . import look
from .card import TOOLKIT, cdi
from .conftest import Seat
from .lab import IMAGE, Lab

CDI = "/etc/cdi/nvidia.yaml"
STACK = "gpu-gguf"
UP = ("up", "--yes", STACK, "--set", f"image={IMAGE}", "--model")
MISSING = "no file in /etc/cdi or /run/cdi describes nvidia.com/gpu"


def test_provision_has_the_card_described_at_each_boot(card: Lab) -> None:
    root = Seat(card, "root")
    words = ("provision", "--yes", "--only=cdi")
    service = "stackctl-cdi-refresh.service"
    try:
        # No package source has the toolkit, and stackctl does not choose which source to trust.
        done = root.stackctl(*words, code=6)
        assert "no package source here has nvidia-container-toolkit" in " ".join(
            done.stdout.split()
        )
        card.run(["sh", "-c", f"{TOOLKIT} apt-get update", "sh", "/srv/toolkit"], check=True)
        look.put(card, "/srv/toolkit/cdi.json", cdi().encode())
        # A file that somebody wrote for another driver is reported and left unchanged.
        look.put(card, CDI, cdi(library="/srv/gpu/libcuda.so.570.1").encode())
        done = root.stackctl(*words, code=6)
        assert f"{CDI} is not stackctl's: /srv/gpu/libcuda.so.570.1 does not exist" in " ".join(
            done.stdout.split()
        )
        card.run(["rm", CDI], check=True)

        done = root.stackctl(*words)
        assert "1 item changed" in done.stdout
        assert root.systemctl("is-enabled", service).strip() == "enabled"
        (seen,) = json.loads(root.stackctl("probe", "--json").stdout)["gpus"]
        assert seen["cdi"] == "nvidia.com/gpu=0"
        assert "0 items changed" in root.stackctl(*words).stdout
        # At the next boot the folder in /run is empty.
        card.run(["rm", "-r", "/run/cdi"], check=True)
        root.systemctl("restart", service)
        assert card.run(["test", "-s", "/run/cdi/nvidia.yaml"]).returncode == 0
        root.stackctl("provision", "--undo", "--yes")
        assert card.run(["test", "-e", f"/etc/systemd/system/{service}"]).returncode == 1
        assert card.run(["test", "-e", "/usr/bin/nvidia-ctk"]).returncode == 1
    finally:
        card.run(["rm", "-rf", "/run/cdi", "/etc/cdi", "/etc/apt/sources.list.d/toolkit.list"])


@pytest.mark.deep
@pytest.mark.parametrize("user", ["lab"])
def test_a_unit_waits_for_its_card_to_be_described(gpu: Seat, tiny: str) -> None:
    """The driver is late, as in some boots. test_vm_boot tests it with a real reboot."""
    look.put(gpu.lab, "/run/cdi/nvidia.json", cdi().encode())
    gpu.stackctl(*UP, tiny)
    service = look.engine_unit(gpu, STACK)
    gpu.systemctl("stop", service)
    gpu.lab.run(["rm", "/run/cdi/nvidia.json"], check=True)
    gpu.systemctl("start", "--no-block", service)
    look.wait_for("it waits", lambda: state(gpu)[0] == "starting" and state(gpu)[1] is not None)
    assert state(gpu) == (
        "starting", f"waits for its GPU: {MISSING}",
        "stackctl provision --only cdi says what is missing",
    )  # fmt: skip
    look.put(gpu.lab, "/run/cdi/nvidia.json", cdi().encode())
    look.wait_for("it serves", lambda: state(gpu) == ("ready", None, None))
    # A model of random weights may end its answer early.
    assert look.chat(gpu, 8083)["usage"]["completion_tokens"] > 0

    # If the file lacks this device, status shows Podman's message.
    gpu.systemctl("stop", service)
    look.put(gpu.lab, "/run/cdi/nvidia.json", cdi().replace('"0"', '"7"').encode())
    gpu.systemctl("reset-failed", service, check=False)
    gpu.systemctl("start", service, check=False)
    look.wait_for("systemd gives up", lambda: state(gpu)[0] == "crash loop")
    _, cause, remedy = state(gpu)
    assert "podman finds no device nvidia.com/gpu=0" in str(cause)
    assert (
        remedy
        == f"stackctl provision --only cdi says what is missing; then stackctl restart {STACK}"
    )
    gpu.stackctl("down", STACK)
    gpu.assert_nothing_left()


def state(gpu: Seat) -> tuple[str, str | None, str | None]:
    """Return state, cause and remedy from ``status``."""
    (seen,) = json.loads(gpu.stackctl("status", STACK, "--json", code=None).stdout)["stacks"]
    return seen["state"], seen["cause"], seen["remedy"]
