"""The crash matrix: stackctl is killed, or its disk fails, at every step; nothing is ever lost.

LAB_FAULTS=all takes every place; otherwise a part of them, spread over all steps.
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
ALL = os.environ.get("LAB_FAULTS") == "all"
QUICK = ("--yes", "--soak", "0s")


def strike(seat: Seat, kind: str, place: int, *words: str) -> list[str]:
    """Run stackctl with a fault; gives the places that it passed."""
    look.put(seat.lab, "/srv/faults.py", (HERE / "faults.py").read_bytes())
    look.put(seat.lab, LOG, b"", mode=0o666)
    argv = ("python3", "-P", "/srv/faults.py", kind, str(place), LOG, *words)
    seat.run(*argv, check=False, timeout=120)
    return seat.lab.read(LOG).splitlines()


def settled(seat: Seat) -> int | None:
    """The generation that serves after recovery, with nothing stray beside it; None for none."""
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
    """All places that a run without fault passes."""
    return [line.partition(" ")[2] for line in strike(seat, kind, 0, *words)]


def chosen(count: int, step: int) -> range:
    """The places to try: all of them, or every STEPth."""
    return range(1, count + 1, 1 if ALL else step)


@pytest.mark.parametrize(
    ("kind", "step"),
    [("kill", 3), ("ENOSPC", 8), ("EIO", 11)],
    ids=["kill", "full-disk", "bad-disk"],
)
def test_crash_matrix(one: Seat, tiny: str, kind: str, step: int) -> None:
    up = ("up", "cpu-latency", "--model", tiny, *QUICK)
    rows: list[tuple[str, int, int, int]] = []
    # up, where nothing is: afterwards it serves, or there is nothing.
    passed = places(one, kind, *up)
    one.stackctl("down")
    ended = {"old": 0, "new": 0}
    for place in chosen(len(passed), step):
        strike(one, kind, place, *up)
        found = settled(one)
        ended["new" if found else "old"] += 1
        if found:
            one.stackctl("down")
    rows.append(("up", sum(ended.values()), ended["old"], ended["new"]))
    # switch and rollback, where one serves: afterwards exactly one does, the old or the new one.
    one.stackctl(*up)
    for operation in ("switch", "rollback"):
        ended = {"old": 0, "new": 0}
        passed = places(one, kind, *_words(one, operation))
        for place in chosen(len(passed), step):
            before = settled(one)
            strike(one, kind, place, *_words(one, operation))
            found = settled(one)
            assert found is not None, f"{kind} at {passed[place - 1]}: nothing serves"
            ended["old" if found == before else "new"] += 1
        rows.append((operation, sum(ended.values()), ended["old"], ended["new"]))
    # down: it ends down, whatever happens.
    passed = places(one, kind, "down")
    for place in chosen(len(passed), step):
        one.stackctl(*up)
        strike(one, kind, place, "down")
        one.stackctl("recover")
        if look.exists(one.lab, f"{one.units}/cpu"):
            one.stackctl("down")
        look.assert_clean(one)
    total = sum(row[1] for row in rows)
    print(f"\n{kind:<10}{'faults':>8}{'old':>6}{'new':>6}{'lost':>6}")
    for name, faults, old, new in rows:
        print(f"{name:<10}{faults:>8}{old:>6}{new:>6}{0:>6}")
    print(f"{total} faults, 0 lost")
    assert total >= (40 if ALL else 8)


def _words(seat: Seat, operation: str) -> tuple[str, ...]:
    if operation == "rollback":
        numbers = [number for number in _ready(seat) if number != settled(seat)]
        return ("rollback", str(numbers[-1]), *QUICK)
    (stack,) = json.loads(seat.stackctl("status", "--json").stdout)["stacks"]
    other = {"latency": "throughput", "throughput": "latency"}[stack["objective"]]
    return ("switch", other, *QUICK)


def _ready(seat: Seat) -> list[int]:
    """Generations to go back to: those of another objective than the one that serves."""
    (stack,) = json.loads(seat.stackctl("status", "--json").stdout)["stacks"]
    found = json.loads(seat.stackctl("history", "--json").stdout)["generations"]
    return sorted(
        row["number"]
        for row in found
        if row["ready_s"] is not None and row["objective"] != stack["objective"]
    )
