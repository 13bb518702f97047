"""The timeout of a start: it grows as long as the engine makes progress."""

from __future__ import annotations

import itertools
import re
import time

import pytest

from . import look
from .conftest import HERE, Seat

DEADLINE_S, STEP_S = 6, 7
#: An engine that takes some seconds for each phase, and one that repeats the first one forever.
SLOW = """\
#!/bin/sh
case "$1" in --help|--version) exec "$0.real" "$@" ;; esac
for phase in "loading model" "warming up" "model loaded"; do echo "$phase"; sleep 4; done
exec "$0.real" "$@"
"""
STUCK = """\
#!/bin/sh
case "$1" in --help|--version) exec "$0.real" "$@" ;; esac
trap 'exit 0' TERM
while :; do echo "loading model"; sleep 1; done
"""


@pytest.fixture
def hurried(one: Seat, tiny: str) -> tuple[Seat, tuple[str, ...]]:
    """Return a user, and an ``up`` with short timeouts."""
    look.put(one.lab, "/srv/hurried.py", (HERE / "hurried.py").read_bytes())
    words = ("python3", "-P", "/srv/hurried.py", str(DEADLINE_S), str(STEP_S))
    return one, (*words, "up", "cpu-latency", "--model", tiny, "--soak", "0s", "--set")


def test_a_start_has_time_while_the_engine_gets_on(hurried: tuple[Seat, tuple[str, ...]]) -> None:
    seat, up = hurried
    done = seat.run(*up, f"image={look.scripted_engine(seat, 'slow', SLOW)}", timeout=120)
    assert "cpu is up (generation 1)" in done.stdout
    (ready,) = re.findall(r"^ready +0:(\d\d)$", done.stderr, re.MULTILINE)
    assert int(ready) > DEADLINE_S
    # Without a terminal the output has one plain line for each phase that takes long.
    assert not set(done.stderr) & set("\r\x1b")
    told = re.findall(r"^start +(.+?)  ·  0:\d\d$", done.stderr, re.MULTILINE)
    assert told
    assert all(before != after for before, after in itertools.pairwise(told))
    phases = {"starting", "loading model", "warming up", "model loaded", "answering"}
    assert {text.removesuffix(", waiting for systemd") for text in told} <= phases
    seat.stackctl("down")
    seat.assert_nothing_left()


@pytest.mark.deep
def test_a_start_without_progress_ends(hurried: tuple[Seat, tuple[str, ...]]) -> None:
    seat, up = hurried
    began = time.monotonic()
    image = look.scripted_engine(seat, "stuck", STUCK)
    done = seat.run(*up, f"image={image}", check=False, timeout=120)
    assert done.returncode == 1
    (limit,) = re.findall(r"cpu was not healthy within 0:(\d\d); last seen: loading", done.stderr)
    # The engine was given one step for its only phase, and none for the repetitions.
    assert DEADLINE_S <= int(limit) < 2 * STEP_S
    assert time.monotonic() - began < 60
    look.assert_clean(seat)
