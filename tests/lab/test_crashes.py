"""The crash matrix: a kill or a failing disk at every step of stackctl loses nothing.

The everyday tests take a part of the places, spread over all steps. ``make test-deep`` takes all
places of a kill and more places of a failing disk. With LAB_FAULTS=all it takes those all as well.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from . import look
from .conftest import Seat

HERE = Path(__file__).parent
LOG = "/srv/faults.log"
QUICK = ("--yes", "--soak", "0s")


def strike(seat: Seat, kind: str, place: int, *words: str) -> list[str]:
    """Run stackctl with a fault and return the places that it reached."""
    look.put(seat.lab, "/srv/faults.py", (HERE / "faults.py").read_bytes())
    look.put(seat.lab, LOG, b"", mode=0o666)
    argv = ("python3", "-P", "/srv/faults.py", kind, str(place), LOG, *words)
    seat.run(*argv, check=False, timeout=120)
    return seat.lab.read(LOG).splitlines()


def settled(seat: Seat) -> int | None:
    """Return the generation that serves after recovery, None for none; check for stray parts."""
    seat.stackctl("recover")
    assert not look.exists(seat.lab, f"{seat.state}/transaction.json")
    assert not look.exists(seat.lab, f"{seat.runtime}/lock")
    names = seat.run("podman", "ps", "--all", "--format", "{{.Names}}").stdout.split()
    if not look.exists(seat.lab, f"{seat.units}/cpu"):
        assert not names
        look.assert_clean(seat)
        return None
    seat.stackctl("check")
    (stack,) = json.loads(seat.stackctl("status", "--json").stdout)["stacks"]
    assert (stack["state"], stack["drift"]) == ("ready", []), stack
    record = look.record(seat, stack["generation"])
    assert record["outcome"]["state"] == "ready"
    door = ["stackctl-cpu_door"] if record["door"] else []
    assert sorted(names) == sorted([record["units"]["container"], *door])
    files = sorted(Path(path).name for path in seat.files(seat.units))
    unit = record["units"]["files"][0]["name"]
    assert files == sorted([unit, *(["cpu_door.container"] if door else [])])
    number: int = stack["generation"]
    return number


def places(seat: Seat, kind: str, *words: str) -> list[str]:
    """Return all places that a run without a fault reaches."""
    return [line.partition(" ")[2] for line in strike(seat, kind, 0, *words)]


#: Faults and the distance of their places: in the everyday tests, and in the deep ones.
OPERATIONS = ("up", "switch", "rollback", "down")
EVERY_DAY = (
    ("kill", "up", 6),
    ("kill", "switch", 7),
    ("kill", "rollback", 13),
    ("ENOSPC", "switch", 20),
)
ALL = os.environ.get("LAB_FAULTS") == "all"
IN_DEPTH = {"kill": 1, "ENOSPC": 1 if ALL else 4, "EIO": 1 if ALL else 6}
CASES = [
    *(pytest.param(kind, name, step, id=f"{kind}-{name}") for kind, name, step in EVERY_DAY),
    *(
        pytest.param(kind, name, step, id=f"{kind}-{name}-deep", marks=pytest.mark.deep)
        for kind, step in IN_DEPTH.items()
        for name in OPERATIONS
    ),
]


@pytest.mark.parametrize(("kind", "operation", "step"), CASES)
def test_crash_matrix(one: Seat, tiny: str, kind: str, operation: str, step: int) -> None:
    up = ("up", "cpu-latency", "--model", tiny, *QUICK)
    crash = {"up": _crash_up, "down": _crash_down}.get(operation, _crash_change)
    ended = crash(one, kind, operation, step, up)
    old, new = ended.count(False), ended.count(True)
    print(f"{kind} during {operation}: {len(ended)} faults, {old} old, {new} new, 0 lost")
    assert len(ended) >= 2


def _crash_up(seat: Seat, kind: str, operation: str, step: int, up: tuple[str, ...]) -> list[bool]:
    """Crash ``up`` without a stack; afterwards the stack serves, or nothing exists.

    Return True for each fault after which the stack serves.
    """
    passed = places(seat, kind, *up)
    seat.stackctl("down")
    ended = []
    for place in range(1, len(passed) + 1, step):
        strike(seat, kind, place, *up)
        found = settled(seat)
        ended.append(found is not None)
        if found:
            seat.stackctl("down")
    return ended


def _crash_change(
    seat: Seat, kind: str, operation: str, step: int, up: tuple[str, ...]
) -> list[bool]:
    """Crash a switch or rollback; afterwards exactly one engine serves, the old or the new one.

    Return True for each fault after which the new engine serves.
    """
    seat.stackctl(*up)
    if operation == "rollback":
        seat.stackctl(*_words(seat, "switch"))
    passed = places(seat, kind, *_words(seat, operation))
    before = settled(seat)
    ended = []
    for place in range(1, len(passed) + 1, step):
        strike(seat, kind, place, *_words(seat, operation))
        found = settled(seat)
        assert found is not None, f"{kind} at {passed[place - 1]}: nothing serves"
        ended.append(found != before)
        before = found
    return ended


def _crash_down(
    seat: Seat, kind: str, operation: str, step: int, up: tuple[str, ...]
) -> list[bool]:
    """Crash ``down``; the stack is down afterwards, at the latest after a second ``down``."""
    seat.stackctl(*up)
    passed = places(seat, kind, operation)
    ended = []
    for place in range(1, len(passed) + 1, step):
        seat.stackctl(*up)
        strike(seat, kind, place, operation)
        seat.stackctl("recover")
        if look.exists(seat.lab, f"{seat.units}/cpu"):
            seat.stackctl("down")
        look.assert_clean(seat)
        ended.append(True)
    return ended


def _words(seat: Seat, operation: str) -> tuple[str, ...]:
    """Return the command that changes the serving engine to the other objective."""
    rows = json.loads(seat.stackctl("history", "--json").stdout)["generations"]
    (serving,) = (row for row in rows if row["current"])
    if operation == "switch":
        return ("switch", {"latency": "throughput", "throughput": "latency"}[serving["objective"]],
                *QUICK)  # fmt: skip
    others = [
        row["number"]
        for row in rows
        if row["ready_s"] is not None and row["objective"] != serving["objective"]
    ]
    return ("rollback", str(max(others)), *QUICK)
