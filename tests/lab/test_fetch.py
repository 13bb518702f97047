"""Models from a hub on a real machine: fetched, launched, used without a network, and exported.

The hub is tests/hub.py in the lab, with the real model and a file of more than 1 GB.
"""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from . import look
from .conftest import Seat
from .lab import IMAGE, MODEL_PATH, Lab

HUB = Path(__file__).parents[1] / "hub.py"
PORT = 8600
SOURCE = "hf:test/gemma:Q4_K_M"
TOKEN = "hf_secretsecretsecret"
ENV = {"HF_ENDPOINT": f"http://127.0.0.1:{PORT}"}
LARGE = 1_010_000_000


@pytest.fixture(scope="module")
def site(lab: Lab) -> Iterator[Lab]:
    """Yield the lab with a hub on its loopback."""
    look.put(lab, "/srv/hub.py", HUB.read_bytes())
    lab.run(["mkdir", "-p", "/srv/hub/gemma", "/srv/hub/big"], check=True)
    lab.run(["ln", "-sf", MODEL_PATH, "/srv/hub/gemma/gemma-3-270m-Q4_K_M.gguf"], check=True)
    lab.run(["truncate", f"--size={LARGE}", "/srv/hub/big/big-F16.gguf"], check=True)
    start(lab)
    yield lab
    lab.run(["systemctl", "stop", "test-hub"])
    lab.run(["rm", "-rf", "/srv/hub", "/srv/hub.py"])


def start(lab: Lab) -> None:
    """Start the hub and wait until it has hashed its files."""
    words = ["systemd-run", "--quiet", "--unit=test-hub", "python3", "/srv/hub.py"]
    words += ["test/gemma=/srv/hub/gemma", "test/big=/srv/hub/big", "--gated"]
    lab.run([*words, "--port", str(PORT)], check=True)
    look.wait_for("the hub listens", lambda: bool(look.listening(lab, PORT)))
    for repo in ("gemma", "big"):
        address = f"http://127.0.0.1:{PORT}/api/models/test/{repo}/revision/main"
        lab.run(["curl", "--silent", "--fail", address], check=True, timeout=60)


@pytest.fixture
def user_of_hub(site: Lab, one: Seat) -> Iterator[Seat]:
    """Yield a user with the hub's token and without a model."""
    token = f"{site.home('lab')}/.cache/huggingface/token"
    site.write(token, f"{TOKEN}\n", user="lab")
    yield one
    one.run("rm", "-rf", f"{site.home('lab')}/.cache/huggingface")


def blob(seat: Seat) -> str:
    """Return the path of the model's only blob."""
    (path,) = seat.files(f"{seat.lab.home('lab')}/.cache/huggingface/hub/models--test--gemma/blobs")
    return path


def test_up_fetches_the_model_and_it_serves_without_a_network(user_of_hub: Seat) -> None:
    seat, lab = user_of_hub, user_of_hub.lab
    wish = ("cpu-latency", "--model", SOURCE, *look.ONE_THREAD_AT_ANY_SPEED)
    shown = seat.stackctl("model", "show", SOURCE, env=ENV).stdout
    assert re.search(r"^Q4_K_M +241 MiB +yes ", shown, re.MULTILINE), shown
    done = seat.stackctl("up", *wish, "--soak", "0s", env=ENV, timeout=300)
    assert "model     hf:test/gemma:Q4_K_M, 241 MiB in 1 file, verified" in done.stderr
    assert f"model     235 MiB, verified, {SOURCE}" in done.stderr
    assert TOKEN not in done.stdout + done.stderr
    # Without a network everything continues, including a new start.
    lab.run(["systemctl", "stop", "test-hub"], check=True)
    try:
        seat.stackctl("restart", "cpu", timeout=300)
        assert "nothing to change" in seat.stackctl("up", *wish).stdout
        ask = ("curl", "--silent", "--fail", "-d", '{"prompt": "a", "max_tokens": 2}')
        assert seat.run(*ask, "http://127.0.0.1:8080/v1/completions", timeout=120).stdout
        mounts = look.unit_text(seat)
        assert f"{blob(seat)}:/models/gemma-3-270m-Q4_K_M.gguf:ro" in mounts
        # A model in use is not removed. A changed one is not launched, and the running engine
        # stays.
        done = seat.stackctl("model", "remove", "gemma", "--yes", code=5)
        look.assert_error(done, "is used by cpu", "stackctl down cpu")
        path = blob(seat)
        before = look.container_id(seat)
        seat.run("sh", "-c", f"printf x | dd of={path} bs=1 seek=9000000 conv=notrunc 2>&1")
        done = seat.stackctl("restart", "cpu", code=1)
        look.assert_error(done, f"{path} .* has changed: its content", "stackctl model fetch")
        assert look.container_id(seat) == before
        seat.stackctl("down", "cpu")
        done = seat.stackctl("up", *wish, code=1)
        look.assert_error(done, f"{path} .* has changed", "stackctl model fetch")
        seat.run("truncate", "--size=200000000", path)
        done = seat.stackctl("up", *wish, code=1)
        look.assert_error(done, f"{path} .* has changed: it has 200000000 bytes", "fetch")
        seat.assert_nothing_left()
    finally:
        start(lab)
    # A fetch repairs the file.
    seat.stackctl("model", "fetch", SOURCE, env=ENV)
    assert "as it was" in seat.stackctl("model", "verify", "gemma").stdout


@pytest.mark.deep
def test_a_large_download_outlives_the_command(user_of_hub: Seat) -> None:
    seat, lab = user_of_hub, user_of_hub.lab
    fetch = ("model", "fetch", "hf:test/big", "--limit", "150MB")
    done = seat.stackctl(*fetch, code=2, env=ENV)
    look.assert_error(done, "963 MiB are to be downloaded", "--yes")
    # Here the token comes from the environment. It may reach only the service.
    seat.run("rm", f"{lab.home('lab')}/.cache/huggingface/token")
    env = {**ENV, "HF_TOKEN": TOKEN}
    words = ["stackctl", *fetch, "--yes", "--no-progress"]
    with lab.spawn(words, user="lab", env=env) as process:
        assert process.stderr is not None
        line = process.stderr.readline()
        while "fetching as" not in line:
            assert line, "no word of a service"
            line = process.stderr.readline()
        unit = line.split("fetching as ")[1].split(";")[0]
        process.send_signal(signal.SIGKILL)
    jobs = ["sh", "-c", f"ls {seat.runtime}/*.job"]
    look.wait_for(
        "the service has read its job", lambda: seat.run(*jobs, check=False).returncode > 0
    )
    assert seat.systemctl("is-active", unit).strip() == "active"
    shown = seat.systemctl("show", unit) + seat.systemctl("cat", unit, check=False)
    shown += "".join(
        lab.run(["sh", "-c", "cat /proc/[0-9]*/cmdline | tr '\\0' ' '"]).stdout for _ in range(2)
    )
    assert TOKEN not in shown
    # A second call shows the running download and starts no other.
    done = seat.stackctl(*fetch, env=ENV)
    assert f"hf:test/big is being fetched ({unit})" in done.stderr
    assert "963 MiB in 1 file, verified" in done.stderr
    listed = json.loads(seat.stackctl("model", "list", "--json").stdout)
    assert "hf:test/big" in [model["source"] for model in listed["models"]]
    seat.stackctl("model", "remove", "test/big", "--yes")
    assert TOKEN not in seat.journal()
    assert seat.files(seat.runtime) == []


@pytest.mark.deep
def test_a_full_disk_leaves_what_is_there(site: Lab) -> None:
    seat = Seat(site, "root")
    disk = "/srv/disk"
    site.run(["mkdir", "-p", disk], check=True)
    site.run(["mount", "-t", "tmpfs", "-o", "size=620m", "tmpfs", disk], check=True)
    env = {**ENV, "HF_HOME": disk, "HF_TOKEN": TOKEN}
    try:
        words = ["stackctl", "model", "fetch", SOURCE, "--limit", "60MB", "--here"]
        with site.spawn(words, env=env) as process:
            blobs = f"{disk}/hub/models--test--gemma/blobs"
            look.wait_for(
                "some of it is there",
                lambda: bool(re.search("[1-9]", site.run(["du", "-sm", blobs]).stdout[:3])),
            )
            site.run(["dd", "if=/dev/zero", f"of={disk}/filler", "bs=1M"])
            _, said = process.communicate(timeout=60)
        assert process.returncode == 1, said
        assert "the disk is full" in said
        assert "the part is kept" in said
        there = int(site.run(["du", "-sm", blobs]).stdout.split()[0])
        site.run(["rm", f"{disk}/filler"], check=True)
        assert there > 0
        seat.stackctl("model", "fetch", SOURCE, env=env)
        seat.stackctl("model", "verify", "gemma", env=env)
        done = seat.stackctl("model", "remove", "gemma", "--yes", env=env)
        assert "241 MiB are free again" in done.stdout
    finally:
        site.run(["umount", disk])


def test_models_and_images_are_carried_to_a_machine_without_network(
    site: Lab, user_of_hub: Seat
) -> None:
    seat = user_of_hub
    seat.stackctl("model", "fetch", SOURCE, env=ENV)
    seat.stackctl("model", "export", "gemma", "/var/tmp/disk", "--image", IMAGE, timeout=300)
    seat.stackctl("model", "remove", "gemma", "--yes")
    seat.run("podman", "untag", IMAGE)
    try:
        done = seat.stackctl("model", "import", "/var/tmp/disk", timeout=300)
        assert re.search(r"^hf:test/gemma@[0-9a-f]{40}:Q4_K_M$", done.stdout, re.MULTILINE)
        assert IMAGE in done.stdout
        seat.run("podman", "image", "exists", IMAGE)
        # The imported files suffice for a launch, also under the plain name.
        done = seat.stackctl("up", "cpu-latency", "--model", SOURCE, "--dry-run")
        assert f"model     235 MiB, verified, {SOURCE}" in done.stderr
        assert f"image     {IMAGE}, present" in done.stderr
    finally:
        if seat.run("podman", "image", "exists", IMAGE, check=False).returncode:
            site.load_image("lab")
        seat.run("rm", "-rf", "/var/tmp/disk")
