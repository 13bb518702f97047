"""Images from a real registry: pulled once, pinned by digest, started without the registry."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from . import look
from .conftest import Seat
from .host import need
from .lab import Lab

PORT = 5000
ADDRESS = f"127.0.0.1:{PORT}"
IMAGE = f"{ADDRESS}/engines/llama-cpp:1"
SETTINGS = f"""version: 0.1
storage: {{filesystem: {{rootdirectory: /var/lib/test-registry}}}}
http: {{addr: "{ADDRESS}"}}
"""


@pytest.fixture(scope="module")
def registry(lab: Lab) -> Iterator[str]:
    """Yield the address of an engine image in a registry on the lab's loopback."""
    need({"docker-registry": "docker-registry"})
    program = shutil.which("docker-registry")
    assert program is not None
    with Path(program).open("rb") as stream:
        copied = lab.spawn(
            ["install", "-m", "755", "/dev/stdin", "/usr/local/bin/docker-registry"], stdin=stream
        )
        assert copied.wait(30) == 0, copied.communicate()
    copied.communicate()
    lab.write("/etc/test-registry.yml", SETTINGS)
    lab.write(
        "/etc/containers/registries.conf.d/test.conf",
        f'[[registry]]\nlocation = "{ADDRESS}"\ninsecure = true\n',
    )
    start = ["systemd-run", "--unit=test-registry", "docker-registry", "serve"]
    lab.run([*start, "/etc/test-registry.yml"], check=True)
    look.wait_for("the registry listens", lambda: bool(look.listening(lab, PORT)))
    push = ["podman", "push", "--quiet", "localhost/stackctl/llama-cpp:latest", IMAGE]
    lab.run(push, check=True, timeout=120)
    yield IMAGE
    lab.run(["systemctl", "stop", "test-registry"])
    lab.run(["rm", "-rf", "/var/lib/test-registry", "/etc/containers/registries.conf.d/test.conf"])


def test_is_pulled_pinned_and_starts_without_the_registry(
    lab: Lab, registry: str, seat: Seat, tiny: str
) -> None:
    if seat.user != "root":
        # In an empty store, everything has to come from the registry.
        seat.run("podman", "rmi", "--all", "--force", check=False)
    wish = ["cpu-latency", "--model", tiny, "--set", f"image={registry}"]
    try:
        done = seat.stackctl("up", *wish)
        assert re.search(r"image +127\.0\.0\.1:5000/engines/llama-cpp@sha256:[0-9a-f]{64}, pulled",
                         done.stderr), done.stderr  # fmt: skip
        unit = lab.read(f"{seat.units}/cpu/cpu.container")
        pinned = re.search(r"^Image=(\S+)$", unit, re.MULTILINE)
        assert pinned is not None
        assert re.fullmatch(r"127\.0\.0\.1:5000/engines/llama-cpp@sha256:[0-9a-f]{64}", pinned[1])
        again = seat.stackctl("up", *wish)
        assert "nothing to change" in again.stdout
        lab.run(["systemctl", "stop", "test-registry"], check=True)
        assert "generation 1, restarted" in seat.stackctl("restart").stdout
    finally:
        start = ["systemd-run", "--unit=test-registry", "docker-registry", "serve"]
        lab.run(["systemctl", "reset-failed", "test-registry"])
        lab.run([*start, "/etc/test-registry.yml"])
    seat.stackctl("down")
    seat.assert_nothing_left()
    lab.load_image(seat.user)
    lab.load_door(seat.user)


def test_a_tag_that_the_registry_lacks_is_refused_with_its_words(
    registry: str, seat: Seat, tiny: str
) -> None:
    missing = registry.replace(":1", ":2")
    done = seat.stackctl("up", "cpu", "--model", tiny, "--set", f"image={missing}", code=6)
    assert f"error: cannot pull image {missing}" in done.stderr
    assert "manifest unknown" in done.stderr
    seat.assert_nothing_left()
