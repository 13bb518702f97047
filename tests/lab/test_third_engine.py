"""An engine that stackctl does not ship, from plan to down, on a GPU and on a CPU.

It runs under systemd and Podman. The engine (tests/thirdengine.py) is registered by the program
that runs stackctl. Its server is a stand-in (stubserver.pl), and NVML is that of card.py.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator

import pytest
from thirdengine import profile_text

from . import look
from .card import cdi
from .conftest import HERE, Seat
from .test_gpu import CDI, committed

PROGRAM = "/srv/thirdengine.py"
PORT = 8090
#: The failure that verify finds with a simulated GPU, which no process can use.
NO_MEMORY = "no process of it holds memory of GPU 0"


@pytest.fixture
def name() -> str:
    """Return the name of the engine, its profile and its stack."""
    return "stub-cpu"


@pytest.fixture
def stub(gpu: Seat, name: str) -> Iterator[Seat]:
    """Yield a user with the engine, its image and a profile, on a machine with a simulated GPU."""
    look.put(gpu.lab, CDI, cdi().encode())
    look.put(gpu.lab, PROGRAM, (HERE.parent / "thirdengine.py").read_bytes())
    # The stand-in computes with one thread, and verify counts threads.
    text = profile_text(gpu=name == "stub-gpu", port=PORT, engine_args={"workers": 1})
    look.put(gpu.lab, f"/srv/stub/{name}.yaml", text.encode())
    look.put(gpu.lab, "/srv/stub/server", (HERE / "stubserver.pl").read_bytes(), mode=0o755)
    made = look.derived_image(gpu, "stub", "cp -p /srv/stub/server usr/bin/stub-server")
    committed(gpu, made, f"localhost/lab/{name}:1", "stub-server")
    yield gpu
    gpu.reset()


def stackctl(seat: Seat, *arguments: str, code: int | None = 0) -> subprocess.CompletedProcess[str]:
    """Run stackctl with the engine registered, and check its exit code. None permits any."""
    words = ("python3", "-P", PROGRAM, *arguments)
    done = seat.run(*words, check=False, timeout=120)
    assert code is None or done.returncode == code, f"{done.stdout}\n{done.stderr}"
    return done


@pytest.mark.parametrize(("user", "name"), [("lab", "stub-gpu"), ("root", "stub-cpu")])
def test_a_third_engine_from_plan_to_down(stub: Seat, name: str, tiny: str) -> None:
    on_gpu = name == "stub-gpu"
    wish = (f"/srv/stub/{name}.yaml", "--model", tiny)
    made = json.loads(stackctl(stub, "plan", *wish, "--json").stdout)
    assert (made["engine"], made["placement"]["gpus"]) == (name, ["0"] if on_gpu else [])
    assert "/livez" in stackctl(stub, "render", *wish).stdout

    done = stackctl(stub, "up", "--yes", *wish)
    assert f"{name} is up (generation 1)" in done.stdout
    pid = look.engine_pid(stub, look.engine_container(stub, name))
    words = look.argv(stub, look.engine_container(stub, name))
    assert words[words.index("--window") + 1] == "2048"
    assert words[words.index("--device") + 1] == ("gpu" if on_gpu else "cpu")
    assert ("LAB_GPU=edited" in stub.lab.read(f"/proc/{pid}/environ").split("\0")) is on_gpu
    # The engine in the image was asked for its options in its own way.
    recorded = look.record(stub, 1, name)["plan"]
    (dialect,) = (one for one in recorded["decisions"] if one["field"] == "dialect")
    assert dialect["value"] == "7.1"
    assert "nothing to change (generation 1)" in stackctl(stub, "up", "--yes", *wish).stdout

    answer = look.chat(stub, PORT)
    assert answer["choices"][0]["message"]["content"].startswith("amber copper")
    checked = stackctl(stub, "check", name).stdout
    assert {line.split()[0] for line in checked.splitlines()} == {"ok"}

    found = json.loads(stackctl(stub, "verify", name, "--json", code=None).stdout)["results"]
    wrong = [(one["name"], one["actual"]) for one in found if one["status"] == "fail"]
    assert wrong == ([("gpu", NO_MEMORY)] if on_gpu else [])
    seen = {one["name"]: one for one in found}
    assert (seen["context"]["actual"], seen["lanes"]["actual"]) == ("2048", "1")

    results = json.loads(stackctl(stub, "diagnose", name, "--json").stdout)["results"]
    slow = {one["name"]: one for one in results}["decode-bound"]
    assert "2.0 tok/s" in slow["actual"]
    log = stackctl(stub, "logs", name).stdout
    assert "speed: prompt 0.0/s, text 2.0/s" in log
    stackctl(stub, "status")

    stackctl(stub, "down", name)
    look.assert_clean(stub, name)
    assert not look.listening(stub.lab, PORT)


@pytest.mark.parametrize("user", ["lab"])
def test_why_it_does_not_start_is_read_by_the_engine(stub: Seat, name: str, tiny: str) -> None:
    change = "cp -p /srv/stub/server usr/bin/stub-server && touch small-cache"
    image = look.derived_image(stub, "stub-small", change)
    wish = (f"/srv/stub/{name}.yaml", "--model", tiny, "--set", f"image={image}")
    done = stackctl(stub, "up", "--yes", *wish, code=1)
    look.assert_error(done, "the cache holds only 512 tokens", "--set context=512")
    look.assert_clean(stub, name)
