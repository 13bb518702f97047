"""history, diff, prune and key with real generations: two that served and one that failed."""

from __future__ import annotations

import json
import re

import pytest

from . import look
from .conftest import Seat

UP = ("up", "cpu-latency", "-y", "--soak", "0s", "--model")
BROKEN = ("--set", "engine_args.load-mode=nonsense")


@pytest.fixture
def tidy(seat: Seat) -> Seat:
    """Return a user without the compile caches of other tests' engines."""
    seat.run("rm", "-rf", f"{seat.cache}/compiled")
    return seat


def test_what_became_of_three_generations(tidy: Seat, tiny: str) -> None:
    seat = tidy
    seat.stackctl("history", code=3)
    seat.stackctl(*UP, tiny)
    seat.stackctl(*UP, tiny, "--set", "context=512")
    seat.stackctl(*UP, tiny, *BROKEN, code=1)

    table = seat.stackctl("history")
    assert max(map(len, table.stdout.splitlines())) <= 80
    rows = [re.split(r" {2,}", line) for line in table.stdout.splitlines() if line[0] in "123"]
    # Number, origin and state; the time is between them.
    assert [(row[0], row[2], row[3]) for row in rows] == [
        ("3", "up", "failed"),
        ("2 *", "up", "ready"),
        ("1", "up", "replaced"),
    ]
    # A replaced generation still shows the time of its start.
    assert [row[4] == "-" for row in rows] == [True, False, False]
    assert table.stdout.count("tiny") == 3
    assert table.stderr == ""
    found = json.loads(seat.stackctl("history", "cpu", "--json").stdout)
    assert [one["number"] for one in found["generations"] if one["current"]] == [2]
    assert "load-mode" in found["generations"][0]["message"]

    shown = seat.stackctl("diff").stdout
    assert shown.splitlines()[0] == "cpu: generation 1 -> 2"
    assert re.search(r"^ctx-size +\d+ +512 +\S", shown, re.MULTILINE)
    changed = [line for line in shown.splitlines() if re.match(r"[+-](?!\+\+|--)", line)]
    assert sorted(line.partition("=")[0] for line in changed) == [
        "+Claim", "+Exec", "-Claim", "-Exec"
    ]  # fmt: skip
    # The lines of the diff are in the installed unit.
    files = [path for path in seat.files(seat.units) if path.endswith(".container")]
    installed = "".join(seat.lab.read(path) for path in files).splitlines()
    port = str(look.record(seat, 2)["plan"]["engine_port"])
    changed = [line.replace("PORT", port) for line in changed]
    assert [line[1:] in installed for line in changed] == [line[0] == "+" for line in changed]
    assert "nonsense" in seat.stackctl("diff", "2", "3").stdout
    document = json.loads(seat.stackctl("diff", "1", "2", "--json").stdout)
    assert [change["field"] for change in document["decisions"]] == ["ctx-size"]

    assert seat.stackctl("prune", "--keep", "1", "-y").stdout == (
        "cpu: nothing to remove, kept 1, 2, 3\n"
    )
    seat.stackctl("down")
    look.assert_clean(seat)
    # After ``down`` the newest number and the generation for a rollback are kept.
    seat.stackctl("prune", "--keep", "1", code=2)
    assert seat.stackctl("prune", "--keep", "1", "-y").stdout == "cpu: removed 1; kept 2, 3\n"
    records = [path for path in seat.files(seat.state) if re.search(r"/[0-9]+\.json$", path)]
    assert sorted(records) == [f"{seat.state}/stacks/cpu/{number}.json" for number in (2, 3)]
    assert [line[:1] for line in seat.stackctl("history").stdout.splitlines()[1:]][:1] == ["3"]
    log = seat.stackctl("history", "--log", "--json")
    entry = json.loads(log.stdout)["entries"][-1]
    assert (entry["user"], entry["operation"], entry["message"]) == (
        seat.user,
        "prune",
        "removed 1",
    )
    assert seat.run("stat", "-c", "%a", f"{seat.state}/audit.jsonl").stdout == "600\n"
    # A number is never used twice.
    seat.stackctl(*UP, tiny)
    look.record(seat, 4)
    seat.stackctl("down")


@pytest.mark.deep
def test_whose_change_it_was(tidy: Seat, tiny: str) -> None:
    seat = tidy
    seat.stackctl(*UP, tiny)
    seat.stackctl(*UP, tiny, "--set", "context=512")
    seat.stackctl("down")
    seat.stackctl(*UP, tiny, "--set", "context=256")
    seat.stackctl("down")
    seat.stackctl("prune", "--keep", "1", "-y", env={"SUDO_USER": "alice", "USER": "mallory"})
    log = seat.stackctl("history", "--log")
    assert re.search(rf"{seat.user} \(alice\) +prune cpu +done: removed 1, 2$", log.stdout, re.M)
    assert "mallory" not in log.stdout
