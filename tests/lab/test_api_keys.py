"""API keys and addresses, from the profile to the client: access, and the places without a key."""

from __future__ import annotations

import json

import pytest

from . import look
from .conftest import Seat
from .test_switch import needs_a_door

__all__ = ["needs_a_door"]

UP = ("up", "cpu-latency", "--model")
OPEN = ("--set", "api_key=true", "--set", "address=0.0.0.0")
STATUS = """\
import sys, urllib.error, urllib.request
head = {"Authorization": f"Bearer {sys.argv[2]}"} if sys.argv[2] else {}
ask = urllib.request.Request(sys.argv[1], headers=head)
try:
    print(urllib.request.urlopen(ask, timeout=30).status)
except urllib.error.HTTPError as error:
    print(error.code)
"""


def status(seat: Seat, path: str, key: str = "") -> int:
    """Return the HTTP status of a request with that key."""
    url = f"http://127.0.0.1:{look.PORT}{path}"
    return int(seat.run("python3", "-c", STATUS, url, key).stdout)


def test_a_key_is_asked_for_and_known_to_nobody_else(seat: Seat, tiny: str) -> None:
    done = seat.stackctl(*UP, tiny, *OPEN)
    assert "stackctl key show cpu" in done.stderr + done.stdout
    key = seat.stackctl("key", "show").stdout.strip()
    assert key.startswith("sk-stackctl-")
    assert status(seat, "/v1/models") == 401
    assert status(seat, "/v1/models", key[:-1]) == 401
    assert status(seat, "/v1/models", key) == 200
    # Routes that are not for clients exist only on the engine's own port.
    assert (status(seat, "/metrics", key), status(seat, "/slots", key)) == (404, 404)
    assert status(seat, "/health") == 200
    seat.stackctl("check")
    # A switch keeps the key.
    seat.stackctl("switch", "throughput", "--yes", "--soak", "0s")
    assert (status(seat, "/v1/models"), status(seat, "/v1/models", key)) == (401, 200)
    # The key is only in its file.
    path = seat.stackctl("key", "path").stdout.strip()
    folders = [seat.units, seat.state, seat.runtime, "/etc/systemd", "/tmp", "/var/tmp"]
    found = seat.lab.run(["grep", "-rlF", key, *folders])
    assert found.stdout.split() == [path]
    assert seat.lab.run(["stat", "-c", "%a", path]).stdout.strip() == "600"
    said = "".join(
        seat.stackctl(*words).stdout
        for words in (
            ("status", "--json"), ("history", "--json"), ("history", "--log"), ("check", "--json"),
            ("diff", "1", "2", "--json"), ("plan", "cpu-latency", "--model", tiny, *OPEN, "--json"),
        )
    )  # fmt: skip
    assert key not in said + seat.journal() + done.stdout + done.stderr
    for words in look.lab_path(seat.lab, "/proc").glob("[0-9]*/cmdline"):
        try:
            assert key.encode() not in words.read_bytes()
            assert key.encode() not in words.with_name("environ").read_bytes()
        except OSError:
            continue
    container = look.engine_container(seat)
    assert key not in seat.run("podman", "inspect", container, "stackctl-cpu_door").stdout
    # Clients get the key without printing it, and keep the other settings in their files.
    ask = 'curl -sf -H "Authorization: Bearer $OPENAI_API_KEY" $OPENAI_BASE_URL/models'
    asked = seat.run("sh", "-c", f'eval "$(stackctl client openai)"; {ask}').stdout
    assert json.loads(asked)["data"][0]["id"] == "tiny"
    folder = seat.run("mktemp", "-d").stdout.strip()
    seat.run("sh", "-c", f'echo "auto-commits: false" > "{folder}/.aider.conf.yml"')
    done = seat.stackctl("client", "aider", "--write", "--folder", folder, code=2)
    look.assert_error(done, "3 files would be written", "--yes")
    assert "+model: openai/tiny" in done.stderr
    for said in ("wrote .aider.conf.yml", "nothing to change"):
        done = seat.stackctl("client", "aider", "--write", "--folder", folder, "--yes")
        assert said in done.stderr
        assert done.stdout.strip().startswith("export OPENAI_API_KEY=")
    config = seat.run("cat", f"{folder}/.aider.conf.yml").stdout
    assert config.startswith("auto-commits: false\nmodel: openai/tiny\n")
    assert seat.lab.run(["grep", "-rlF", key, folder], check=False).stdout == ""
    seat.run("rm", "-r", folder)


@pytest.mark.deep
def test_a_new_key_counts_at_once(seat: Seat, tiny: str) -> None:
    seat.stackctl(*UP, tiny, "--set", "api_key=true")
    keys = [seat.stackctl("key", "show").stdout.strip()]
    seat.stackctl("key", "rotate", "--keep")
    keys.append(seat.stackctl("key", "show").stdout.strip())
    assert [status(seat, "/v1/models", key) for key in keys] == [200, 200]
    seat.stackctl("key", "rotate")
    keys.append(seat.stackctl("key", "show").stdout.strip())
    assert [status(seat, "/v1/models", key) for key in keys] == [401, 401, 200]
    # Without a stored key every request is refused.
    seat.stackctl("key", "remove", "--yes")
    assert [status(seat, "/v1/models", key) for key in ("", *keys)] == [401] * 4
    seat.stackctl("down")
    look.assert_clean(seat)


def test_other_addresses_need_a_key_and_a_door(one: Seat, tiny: str) -> None:
    done = one.stackctl(*UP, tiny, "--set", "address=0.0.0.0", code=2)
    look.assert_error(done, "address 0.0.0.0 can be reached from other machines", "api_key")
    done = one.stackctl(*UP, tiny, *OPEN, "--set", "front_door=off", code=2)
    look.assert_error(done, "only a front door does that", "front_door: on")
    done = one.stackctl(*UP, tiny, "--set", "address=lan", code=2)
    look.assert_error(done, "'lan' is not an IP address")
    look.assert_clean(one)
