"""history, diff, prune and key: what they print, what they keep, what they refuse."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from samples import EPYC, LATENCY, THROUGHPUT, plan

from stackctl.cli.history import model_name
from stackctl.cli.main import run
from stackctl.cli.options import stack_and_numbers
from stackctl.cli.output import Output
from stackctl.deploy.context import Context
from stackctl.deploy.transaction import record_end
from stackctl.errors import StackctlError
from stackctl.machine.lock import exclusive
from stackctl.machine.machine import Machine
from stackctl.machine.systemd import Systemd
from stackctl.observe.check import record_health
from stackctl.observe.history import compare_generations
from stackctl.plan.plan_diff import changed_decisions
from stackctl.state import keys, logs
from stackctl.state.generations import Generations, Journal, utc_now
from stackctl.state.paths import scope_paths
from stackctl.values.base import from_json
from stackctl.values.generation import (
    EngineFact,
    Generation,
    Outcome,
    Transaction,
    UnitFile,
    UnitSet,
)
from stackctl.values.history import (
    AuditEntry,
    AuditReport,
    DiffReport,
    HealthEntry,
    HistoryReport,
    KeyReport,
    PruneReport,
)
from stackctl.values.proxy import Proxy
from stackctl.values.result import ErrorReport

ONE, TWO = plan(wish=LATENCY), plan(wish=THROUGHPUT)


def units(number: int, stack: str = "cpu", name: str | None = None, more: str = "") -> UnitSet:
    text = (
        f"[Unit]\nDescription=x\n[X-Stackctl]\nProfile=cpu-latency\nGeneration={number}\n"
        f"[Container]\nSyslogIdentifier={stack}-g{number}\n{more}"
    )
    return UnitSet(
        stack=stack, service=f"{stack}.service", container=f"stackctl-{stack}",
        files=(UnitFile(name=name or f"{stack}.container", text=text),),
    )  # fmt: skip


def generation(number: int, state: str = "ready", **changes: Any) -> Generation:
    changed: dict[str, Any] = {
        "number": number, "stack": "cpu", "created": f"{utc_now()[:4]}-11-21T12:{number:02}:00Z",
        "image": "ghcr.io/x@sha256:00", "image_id": "0" * 64, "units": units(number), "plan": ONE,
        "host": EPYC,
        "outcome": Outcome(state=state, changed=utc_now(), ready_s=2.4),  # type: ignore[arg-type]
        **changes,
    }  # fmt: skip
    return Generation(**changed)


class Place:
    """One user's folders, and the commands he gives."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.state = folder / "state" / "stackctl"
        self.units = folder / "config" / "containers" / "systemd" / "stackctl"
        self.lock = folder / "stackctl" / "lock"
        self.compiled = folder / "cache" / "stackctl" / "compiled"
        self.store = Generations(self.state)
        self._capsys = capsys
        self.out = self.err = ""

    def fill(self, *states: str) -> None:
        """Generations 1, 2, ... with these outcomes."""
        for number, state in enumerate(states, 1):
            self.store.write(generation(number, state))

    def install(self, number: int, stack: str = "cpu") -> None:
        folder = self.units / stack
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{stack}.container").write_text(units(number, stack).files[0].text)

    def __call__(self, *arguments: str) -> int:
        self._capsys.readouterr()
        code = run(("--user", *arguments))
        self.out, self.err = self._capsys.readouterr()
        assert "Traceback" not in self.err
        assert "bug" not in self.err
        wide = [line for line in self.out.splitlines() if len(line) > 80 and "/keys/" not in line]
        assert "--json" in arguments or not wide
        return code

    def left(self) -> tuple[int, ...]:
        return self.store.numbers("cpu")


@pytest.fixture
def at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Place:
    for name in ("CONFIG", "STATE", "CACHE"):
        monkeypatch.setenv(f"XDG_{name}_HOME", str(tmp_path / name.lower()))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    for name in ("NO_COLOR", "COLUMNS", "LINES", "SUDO_USER", "PKEXEC_UID"):
        monkeypatch.delenv(name, raising=False)
    return Place(tmp_path, capsys)


# What is remembered


def test_what_served_keeps_how_it_served(tmp_path: Path) -> None:
    store = Generations(tmp_path)
    ready = store.set_outcome(
        generation(1, "starting"),
        "ready",
        ready_s=1.5,
        report=(EngineFact(name="n_ctx", value="8192"),),
    )
    for state in ("replaced", "stopped"):
        ended = store.set_outcome(ready, state)
        assert (ended.outcome.state, ended.outcome.ready_s) == (state, 1.5)
        assert ended.outcome.report == ready.outcome.report
        assert store.read("cpu", 1) == ended
    assert store.set_outcome(ready, "failed", message="died").outcome.ready_s is None


def test_what_a_rollback_goes_back_to(tmp_path: Path) -> None:
    store = Generations(tmp_path)
    states = ("replaced", "failed", "stopped", "interrupted", "replaced", "failed", "ready")
    for number, state in enumerate(states, 1):
        store.write(generation(number, state))

    def good(number: int | None) -> int | None:
        found = store.last_ready_before("cpu", number)
        return found.number if found else None

    assert [good(number) for number in (8, None, 7, 6, 5, 4, 3, 2, 1)] == [
        7, 7, 5, 5, 3, 3, 1, 1, None,
    ]  # fmt: skip
    (tmp_path / "stacks" / "cpu" / "5.json").write_text("{")
    assert good(7) == 3
    assert store.stacks() == ("cpu",)
    store.remove("cpu", 5)
    store.remove("cpu", 5)
    assert store.numbers("cpu") == (1, 2, 3, 4, 6, 7)
    (tmp_path / "stacks" / "empty").mkdir()
    (tmp_path / "stacks" / "empty" / "notes.json").write_text("{}")
    assert store.stacks() == ("cpu",)


# history


def test_history_is_a_table_newest_first(at: Place) -> None:
    at.fill("replaced", "failed", "ready")
    other = msgspec.structs.replace(ONE, objective="throughput")
    back = generation(4, "interrupted", operation="rollback", of=1, plan=other)
    back = msgspec.structs.replace(back, created="2019-02-03T04:05:06Z")
    at.store.write(msgspec.structs.replace(back, outcome=Outcome(state="interrupted", changed="")))
    at.install(3)
    logs.record_health(at.state, "cpu", HealthEntry(when=utc_now(), status="fail", generation=1))
    logs.record_health(at.state, "cpu", HealthEntry(when=utc_now(), status="ok", generation=3))
    assert at("history") == 0
    head, *rows = at.out.splitlines()
    assert re.split(r" {2,}", head) == [
        "N",
        "WHEN (UTC)",
        "HOW",
        "STATE",
        "READY",
        "HEALTH",
        "WHAT",
    ]
    # The lines that do not begin a generation go on with what was run.
    first = [re.split(r" {2,}", row)[:6] for row in rows if row[0] != " "]
    assert first == [
        ["4", "2019-02-03", "back to 1", "interrupted", "-", "-"],
        ["3 *", "11-21 12:03", "up", "ready", "0:02", "ok"],
        ["2", "11-21 12:02", "up", "failed", "0:02", "-"],
        ["1", "11-21 12:01", "up", "replaced", "0:02", "FAIL"],
    ]
    words = "".join(at.out.split())
    assert words.count("cpu-latency·" + model_name(ONE.model.source)) == 3
    assert words.count("cpu-latency·throughput·") == 1
    assert at.err == ""


def test_history_as_a_document(at: Place) -> None:
    at.fill("replaced", "ready")
    at.install(2)
    seen = HealthEntry(when=utc_now(), status="warn", generation=2, name="answer", message="slow")
    logs.record_health(at.state, "cpu", seen)
    assert at("history", "cpu", "--json") == 0
    found = from_json(at.out, HistoryReport, where="stdout")
    assert json.loads(at.out)["schema"] == "stackctl.history/1"
    assert (found.stack, found.scope) == ("cpu", "user")
    newest, oldest = found.generations
    assert (newest.number, newest.current, newest.health) == (2, True, seen)
    assert (oldest.number, oldest.current, oldest.health) == (1, False, None)
    assert newest.model == ONE.model.source
    assert (newest.state, newest.ready_s, newest.operation) == ("ready", 2.4, "up")


def test_a_damaged_record_hides_only_itself(at: Place) -> None:
    at.fill("replaced", "replaced", "ready")
    at.install(2)
    (at.state / "stacks" / "cpu" / "2.json").write_text('{"number": "two"}')
    assert at("history") == 0
    rows = [line for line in at.out.splitlines() if line[0] in "123"]
    assert [row.split()[0] for row in rows] == ["3", "2", "1"]
    assert re.match(r"2 \* +- +- +unreadable +- +-", rows[1])
    assert at("history", "--json") == 0
    damaged = from_json(at.out, HistoryReport, where="stdout").generations[1]
    assert (damaged.state, damaged.current) == ("unreadable", True)
    assert "2.json" in (damaged.message or "")
    # Nor does a health log that is not ours to read.
    (at.state / "stacks" / "cpu" / "health.jsonl").symlink_to("/etc/passwd")
    assert at("history") == 0
    assert "is a symbolic link" in at.err
    assert len(at.out.splitlines()) > 3


def test_which_stack_is_meant(at: Place) -> None:
    assert at("history") == 3
    assert "no stack is up" in at.err
    assert at("history", "cpu") == 4
    at.fill("stopped")
    # Down, but remembered: the only one there is.
    assert at("history") == 0
    assert at("logs", "--generation", "7") == 4
    assert at("check") == 3
    assert "no stack is up" in at.err
    assert at("check", "cpu") == 3
    at.store.write(generation(1, stack="other", units=units(1, "other")))
    assert at("history") == 2
    assert "cpu, other" in at.err
    assert at("history", "other") == 0
    assert at("history", "zzz") == 4
    assert "stacks: cpu, other" in at.err
    at.install(1, "other")
    # The one that is up is meant, by the name of its profile too.
    assert at("history", "--json") == 0
    assert json.loads(at.out)["stack"] == "other"
    assert at("history", "cpu-latency", "--json") == 0
    assert json.loads(at.out)["stack"] == "other"
    for name in ("../cpu", "cpu/.", ".", "", "*"):
        assert at("history", name) == 4


def test_the_audit_log_is_printed(at: Place) -> None:
    assert at("history", "--log") == 0
    assert (at.out, at.err) == ("", "nothing was changed yet\n")
    for number in (1, 2):
        logs.record_change(
            at.state,
            AuditEntry(
                when=f"{utc_now()[:4]}-11-21T12:00:0{number}Z", user="root (alice)",
                operation="switch",
                stack="cpu" if number == 1 else "other", generation=number,
                result="done" if number == 1 else "failed",
                message=None if number == 1 else "the port is taken by something " + "x" * 90,
            ),
        )  # fmt: skip
    assert at("history", "--log") == 0
    lines = at.out.splitlines()
    assert lines[0].split() == ["WHEN", "(UTC)", "WHO", "WHAT", "RESULT"]
    cells = re.split(r" {2,}", lines[1])
    assert cells == ["11-21 12:00", "root (alice)", "switch cpu (1)", "done"]
    assert "failed: the port is" in at.out
    assert at("history", "--log", "other", "--json") == 0
    found = from_json(at.out, AuditReport, where="stdout")
    assert [entry.stack for entry in found.entries] == ["other"]


def test_short_names_of_models() -> None:
    for source, name in (
        ("file:/srv/models/gemma-3-270m-q4_k_m.gguf", "gemma-3-270m-q4_k_m"),
        ("file:m.gguf", "m"),
        ("hf:ORG/REPO@REV", "REPO@REV"),
        ("dir:/srv/x", "x"),
        ("catalogue:some-id", "some-id"),
        ("", ""),
    ):
        assert model_name(source) == name


# diff


def test_decisions_that_differ_with_the_later_reason() -> None:
    assert changed_decisions(ONE, ONE) == ()
    found = {change.field: change for change in changed_decisions(ONE, TWO)}
    old = {decision.field: decision.value for decision in ONE.decisions}
    new = {decision.field: decision for decision in TWO.decisions}
    assert found
    assert set(found) == {
        field for field in {*old, *new}
        if field not in new or field not in old or old[field] != new[field].value
    }  # fmt: skip
    for field, change in found.items():
        assert change.before == old.get(field)
        if field in new:
            assert change.after == new[field].value
            assert (change.reason or "").startswith(new[field].reason)
    assert [change.field for change in changed_decisions(TWO, ONE)]


def test_units_differ_by_what_they_say_not_by_their_number() -> None:
    first, second = generation(1), generation(2)
    assert compare_generations(first, second).units == ()
    more = msgspec.structs.replace(second, units=units(2, more="Exec=a\u2028b\n"))
    (unit,) = compare_generations(first, more).units
    assert unit.name == "cpu.container"
    assert unit.diff.splitlines()[:2] == ["--- 1/cpu.container", "+++ 2/cpu.container"]
    assert "\n+Exec=a\u2028b\n" in unit.diff
    assert "Generation=2" not in unit.diff
    # An engine that takes turns between two names is still the same unit.
    other = msgspec.structs.replace(more, units=units(2, name="cpu-b.container", more="Exec=a\n"))
    (unit,) = compare_generations(first, other).units
    assert (unit.name, unit.diff.count("\n+"), unit.diff.count("\n-")) == ("cpu-b.container", 2, 0)
    two = UnitSet(
        stack="cpu", service="cpu.service", container="stackctl-cpu",
        files=(*units(2).files, UnitFile(name="door.container", text="[Container]\nImage=x\n")),
    )  # fmt: skip
    (unit,) = compare_generations(first, msgspec.structs.replace(second, units=two)).units
    assert unit.diff.startswith("--- /dev/null\n+++ 2/door.container\n")


def test_facts_that_differ() -> None:
    door = Proxy(port=8080, engine_port=18080, health_path="/health", image="haproxy", key=True)
    changed = generation(2, plan=TWO, image="other@sha256:11", image_id="1" * 64, door=door)
    found = {
        fact.field: (fact.before, fact.after)
        for fact in compare_generations(generation(1), changed).facts
    }
    assert found["profile"] == ("cpu-latency", "cpu-throughput")
    assert found["objective"] == ("latency", "throughput")
    assert found["image"] == ("ghcr.io/x@sha256:00", "other@sha256:11")
    assert found["front door"] == (None, "127.0.0.1:8080, with a key")
    assert "model" not in found
    assert compare_generations(generation(1), generation(2)).facts == ()


def test_diff_is_shown_side_by_side(at: Place) -> None:
    at.fill("replaced", "failed", "ready")
    at.store.write(generation(3, plan=TWO, units=units(3, more="Exec=more\n")))
    at.install(3)
    assert at("diff") == 0
    lines = at.out.splitlines()
    # The one before that served; 2 never did.
    assert lines[0] == "cpu: generation 1 -> 3"
    assert ["WHAT", "1", "3"] in [line.split() for line in lines]
    assert ["FIELD", "1", "3", "WHY"] in [line.split() for line in lines]
    assert ["profile", "cpu-latency", "cpu-throughput"] in [line.split() for line in lines]
    row = next(line for line in lines if line.startswith("ubatch-size"))
    assert len(row.split()) > 3
    assert lines[-1] == "+Exec=more"
    assert at("diff", "cpu", "3", "1") == 0
    assert at.out.splitlines()[0] == "cpu: generation 3 -> 1"
    assert at("diff", "2") == 0
    assert at.out.splitlines()[0] == "cpu: generation 2 -> 3"
    assert at("diff", "1", "2") == 0
    assert at.out.splitlines() == ["cpu: generation 1 -> 2", "nothing differs"]
    assert at("diff", "cpu", "1", "3", "--json") == 0
    found = from_json(at.out, DiffReport, where="stdout")
    assert json.loads(at.out)["schema"] == "stackctl.diff/1"
    assert (found.before, found.after) == (1, 3)
    assert found.decisions == changed_decisions(ONE, TWO)
    assert found.units[0].diff.endswith("+Exec=more\n")


def test_diff_refuses_what_it_cannot_compare(at: Place) -> None:
    at.fill("failed", "ready")
    assert at("diff") == 4
    assert "no generation of cpu served before 2" in at.err
    assert "stackctl diff cpu A B" in at.err
    assert at("diff", "1", "9") == 4
    assert "generations: 1, 2" in at.err
    for words in (("1", "2", "3"), ("cpu", "other"), ("cpu", "cpu")):
        assert at("diff", *words) == 2
    assert at("diff", "other") == 4
    assert stack_and_numbers(("9" * 40,), 2) == ("9" * 40, ())
    assert stack_and_numbers(("٣",), 2) == ("٣", ())
    assert stack_and_numbers(("cpu", "1", "2"), 2) == ("cpu", (1, 2))
    assert at("diff", "9" * 5000) == 4
    (at.state / "stacks" / "cpu" / "1.json").write_text("")
    assert at("diff", "1", "2") == 1
    assert "generation 1 of cpu cannot be read" in at.err


# prune


def test_old_generations_go_the_installed_and_the_last_good_stay(at: Place) -> None:
    at.fill("replaced", "replaced", *["failed"] * 4, "ready", *["failed"] * 5)
    at.install(7)
    assert at("prune", "--dry-run", "--keep", "2") == 0
    assert at.out == "cpu: would remove 1, 3, 4, 5, 6, 8, 9, 10; keep 2, 7, 11, 12\n"
    assert at.left() == tuple(range(1, 13))
    assert logs.read_changes(at.state) == ()
    # Nobody is asked where nobody can answer.
    assert at("prune", "--keep", "2") == 2
    assert "8 of 12 generations of cpu would be removed" in at.err
    assert at.left() == tuple(range(1, 13))
    assert at("prune", "--keep", "2", "-y") == 0
    assert at.out == "cpu: removed 1, 3, 4, 5, 6, 8, 9, 10; kept 2, 7, 11, 12\n"
    assert at.left() == (2, 7, 11, 12)
    (entry,) = logs.read_changes(at.state)
    assert (entry.operation, entry.stack, entry.result) == ("prune", "cpu", "done")
    assert entry.message == "removed 1, 3, 4, 5, 6, 8, 9, 10"
    assert at("prune", "--keep", "2", "-y", "--json") == 0
    found = from_json(at.out, PruneReport, where="stdout")
    assert (found.removed, found.kept) == ((), (2, 7, 11, 12))
    assert at("prune") == 0
    assert at.out == "cpu: nothing to remove, kept 2, 7, 11, 12\n"
    assert len(logs.read_changes(at.state)) == 1
    assert not at.lock.exists()


def test_what_a_second_rollback_goes_back_to_stays(at: Place) -> None:
    at.fill("replaced", "replaced", "replaced")
    at.store.write(generation(4, of=2, operation="rollback"))
    at.install(4)
    found = at.store.rollback_target("cpu", 4)
    assert found is not None
    assert found.number == 1
    assert at("prune", "--keep", "1", "-y") == 0
    assert at.left() == (1, 4)


def test_prune_of_a_stack_that_is_down_and_of_damaged_records(at: Place) -> None:
    at.fill("replaced", "stopped", "failed", "failed", "failed")
    for number in (1, 4):
        (at.state / "stacks" / "cpu" / f"{number}.json").write_text("{")
    assert at("prune", "--keep", "1", "-y") == 0
    # 2 can be gone back to; 5 is the last number that was given.
    assert at.left() == (2, 5)
    for nonsense in ("0", "-1", "x"):
        assert at("prune", "--keep", nonsense) == 2


def compiled(at: Place, image: str, blocks: int = 4) -> Path:
    """What an engine of an image has compiled."""
    folder = at.compiled / image[:12]
    (folder / "deep" / "er").mkdir(parents=True)
    (folder / "deep" / "er" / "kernel.so").write_bytes(b"x" * 4096 * blocks)
    return folder


def test_what_was_compiled_goes_with_the_last_generation_of_its_image(at: Place) -> None:
    images = {number: f"{number}" * 64 for number in range(1, 5)}
    for number in (1, 2, 3):
        at.store.write(generation(number, "replaced", image_id=images[number]))
    at.store.write(generation(1, "stopped", stack="other", image_id=f"sha256:{images[1]}"))
    at.install(3)
    folders = {number: compiled(at, image) for number, image in images.items()}
    # 1 is another stack's as well, 2 can be gone back to, 3 runs; 4 nobody knows.
    assert at("prune", "--keep", "1", "--dry-run") == 0
    assert at.out.splitlines()[0] == "cpu: would remove 1; keep 2, 3"
    assert re.fullmatch(
        r"would remove the compiled code of 1 image \(\d+ KiB\)", at.out.splitlines()[1]
    )
    assert at("prune", "--keep", "1") == 2
    assert "1 of 3 generations of cpu and the compiled code of 1 image (" in at.err
    assert all(folder.is_dir() for folder in folders.values())
    assert at("prune", "--keep", "1", "-y", "--json") == 0
    found = from_json(at.out, PruneReport, where="stdout")
    assert (found.removed, found.caches) == ((1,), 1)
    assert 4 * 4096 <= found.freed_bytes <= 16 * 4096
    assert [number for number, folder in folders.items() if folder.exists()] == [1, 2, 3]
    assert "removed 1 and the compiled code" in (logs.read_changes(at.state)[-1].message or "")
    # Also where no generation goes.
    at.store.remove("other", 1)
    assert at("prune", "-y") == 0
    assert at.out.startswith(
        "cpu: nothing to remove, kept 2, 3\nremoved the compiled code of 1 image"
    )
    assert [number for number, folder in folders.items() if folder.exists()] == [2, 3]


def test_pruning_caches_follows_no_link(at: Place, tmp_path: Path) -> None:
    at.fill("ready")
    away = tmp_path / "away"
    away.mkdir()
    (away / "file").write_text("x" * 100_000)
    folder = compiled(at, "4" * 64, blocks=1)
    (folder / "deep" / "out").symlink_to(away)
    (folder / "file").symlink_to(away / "file")
    (at.compiled / ("5" * 12)).symlink_to(away)
    assert at("prune", "-y", "--json") == 0
    found = from_json(at.out, PruneReport, where="stdout")
    assert found.caches == 1
    assert found.freed_bytes < 100_000
    assert not folder.exists()
    assert (away / "file").read_text() == "x" * 100_000
    # Nor is the folder itself a way out.
    shutil.rmtree(at.compiled)
    (away / ("6" * 12)).mkdir()
    at.compiled.symlink_to(away)
    assert at("prune", "-y") == 0
    assert (away / ("6" * 12)).is_dir()


def test_caches_that_may_be_in_use_stay(at: Place) -> None:
    at.fill("ready", "failed")
    folder = compiled(at, "4" * 64)
    (at.state / "stacks" / "cpu" / "2.json").write_text("{")
    assert at("prune", "-y") == 0
    assert "compiled code stays: the record of generation 2 of cpu cannot be read" in at.err
    assert folder.is_dir()
    # Installed, and its record is gone.
    at.store.remove("cpu", 2)
    unit = at.units / "cpu" / "cpu.container"
    unit.parent.mkdir(parents=True)
    unit.write_text(units(1).files[0].text + f"Volume={folder}:/cache:rw\n")
    assert at("prune", "-y") == 0
    assert folder.is_dir()
    unit.unlink()
    assert at("prune", "-y") == 0
    assert not folder.exists()


def test_prune_waits_for_nobody(at: Place) -> None:
    at.fill(*["replaced"] * 4, "ready")
    with exclusive(at.lock, "up cpu"):
        assert at("prune", "--keep", "1", "-y") == 7
        assert at("prune", "--keep", "1", "--dry-run") == 0
        assert at("history") == 0
    assert at.left() == (1, 2, 3, 4, 5)


# key


def test_a_key_is_printed_by_show_alone(at: Place) -> None:
    keys.create(at.state, "cpu")
    (key,) = keys.read(at.state, "cpu")
    assert at("key", "show", "cpu") == 0
    assert (at.out, at.err) == (f"{key}\n", "")
    assert at("key", "show", "cpu", "--json") == 0
    found = from_json(at.out, KeyReport, where="stdout")
    assert (found.key, found.valid) == (key, 1)
    at.fill("ready")
    at.install(1)
    for words in (
        ("key", "path"), ("key", "path", "--json"), ("key", "create"), ("history",),
        ("history", "--json"), ("history", "--log"), ("-v", "key", "path"),
    ):  # fmt: skip
        at(*words)
        assert key not in at.out + at.err, words
    assert at("key", "path") == 0
    assert at.out == f"{at.state}/keys/cpu\n"
    assert at("key", "create") == 5
    assert at("key", "remove") == 2
    assert keys.read(at.state, "cpu") == (key,)


def test_keys_are_made_changed_and_removed(at: Place) -> None:
    assert at("key", "create", "cpu") == 0
    (first,) = keys.read(at.state, "cpu")
    assert at.out == f"cpu: 1 key is valid, in {at.state}/keys/cpu\n"
    assert at.err == "stackctl key show cpu prints it\n"
    assert at("key", "rotate", "cpu", "--keep", "--json") == 0
    found = from_json(at.out, KeyReport, where="stdout")
    assert (found.valid, found.key) == (2, None)
    second, kept = keys.read(at.state, "cpu")
    assert kept == first != second
    assert at("key", "show", "cpu") == 0
    assert at.out == second + "\n"
    assert at("key", "rotate", "cpu") == 0
    (third,) = keys.read(at.state, "cpu")
    with exclusive(at.lock, "up cpu"):
        for verb in ("rotate", "create", "remove"):
            assert at("key", verb, "cpu") == 7
    assert keys.read(at.state, "cpu") == (third,)
    assert at("key", "remove", "cpu", "-y") == 0
    assert at("key", "remove", "cpu", "-y") == 4
    assert at("key", "create", "cpu") == 0
    assert at("key", "remove", "cpu", "-y", "--json") == 0
    assert from_json(at.out, KeyReport, where="stdout").valid == 0
    assert keys.read(at.state, "cpu") == ()
    log = logs.read_changes(at.state)
    assert [entry.operation for entry in log] == [
        "key create", "key rotate", "key rotate", "key remove", "key create", "key remove",
    ]  # fmt: skip
    assert "sk-" not in (at.state / "audit.jsonl").read_text()
    assert not at.lock.exists()


def test_a_door_that_does_not_take_new_keys_is_told(at: Place) -> None:
    assert at("key", "create", "cpu") == 0
    (before,) = keys.read(at.state, "cpu")
    # In the place of the file that HAProxy reads.
    (at.state / "doors" / "cpu" / "keys").mkdir(parents=True)
    assert at("key", "rotate", "cpu") == 1
    assert keys.read(at.state, "cpu") != (before,)
    assert "stored, but the running door of cpu still lets in the earlier keys" in at.err
    assert "hint: systemctl --user restart cpu_door.service" in at.err
    *_, last = logs.read_changes(at.state)
    assert (last.operation, last.result) == ("key rotate", "failed")


def test_keys_that_are_not_there(at: Place) -> None:
    for verb in ("show", "path"):
        assert at("key", verb, "cpu") == 4
        assert "cpu has no key" in at.err
        assert "stackctl key create cpu" in at.err
        assert at("key", verb) == 3
    for name in ("../x", "a b", "X", ".", "", "-"):
        assert at("key", "show", name) == 4
        assert "no stack named" in at.err
        assert at("key", "create", name) == 4
    assert not (at.state / "keys").exists()
    assert at("key") == 2


def test_errors_of_keys_are_documents_too(at: Place) -> None:
    assert at("key", "show", "cpu", "--json") == 4
    assert from_json(at.out, ErrorReport, where="stdout").exit_code == 4


# Nothing heavy


def test_history_imports_only_what_it_needs(at: Place) -> None:
    at.fill("ready")
    code = (
        "import sys; from stackctl.cli.main import run; run(['--user', 'history', '--json']);"
        "sys.exit(', '.join({'requests', 'podman', 'cpuinfo', 'rich'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert '"number": 1' in done.stdout


def test_completion_knows_stacks_that_are_down(at: Place) -> None:
    import click

    from stackctl.cli.options import _stack_names

    at.fill("stopped")
    at.install(1, "other")
    context = click.Context(click.Command("history"))
    context.params["scope"] = "user"
    assert _stack_names(context, None, "") == ["cpu", "other"]
    assert _stack_names(context, None, "c") == ["cpu"]


def test_a_wrong_word_is_told(at: Place) -> None:
    with pytest.raises(StackctlError, match="unexpected arguments: 1 2 3"):
        stack_and_numbers(("1", "2", "3"), 2)
    assert at("histroy") == 2
    assert "did you mean history?" in at.err


# A change that was cut off and cannot be ended


def cut_off(at: Place, before: int) -> Path:
    """The journal of a switch away from a generation."""
    change = Transaction(
        operation="switch", stack="cpu", before=before, running=True, after=before + 1,
        step="start", started=utc_now(),
    )  # fmt: skip
    Journal(at.state).write(change)
    return at.state / "transaction.json"


def test_what_cannot_be_recovered_locks_nobody_out(at: Place) -> None:
    at.fill("replaced", "failed")
    journal = cut_off(at, 7)
    # Who looks is told, and sees.
    assert at("history") == 0
    assert "warning: cannot recover cpu: cpu has no generation 7" in at.err
    assert "stackctl down cpu gives it up" in at.err
    assert "failed" in at.out
    assert at("history", "--json") == 0
    from_json(at.out, HistoryReport, where="stdout")
    # Who would change something is not let through.
    assert at("prune", "--keep", "1", "-y") == 4
    assert "error: cannot recover cpu: cpu has no generation 7" in at.err
    assert at.left() == (1, 2)
    assert at("recover") == 4
    assert journal.exists()


def test_a_check_that_cannot_be_recorded_warns(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    context = Context(
        paths=scope_paths("user", {"HOME": str(tmp_path)}),
        machine=Machine(),
        systemd=Systemd("user"),
        progress=Output(json=False, quiet=True, verbose=False, color="never", progress=False),
        confirm=lambda _: False,
    )
    seen = HealthEntry(when=utc_now(), generation=1, status="ok")
    # A stack without a folder has no history.
    record_health(context, "cpu", seen)
    assert capsys.readouterr().err == ""
    folder = context.paths.state / "stacks/cpu"
    folder.mkdir(parents=True)
    record_health(context, "cpu", seen)
    assert capsys.readouterr().err == ""
    assert logs.last_health(context.paths.state, "cpu") == seen
    for path in sorted(folder.iterdir()):
        path.unlink()
    folder.rmdir()
    folder.symlink_to(folder)
    record_health(context, "cpu", seen)
    assert "warning: not in the history: " in capsys.readouterr().err


def test_how_the_generations_of_a_change_ended(tmp_path: Path) -> None:
    context = Context(
        paths=scope_paths("user", {"HOME": str(tmp_path)}),
        machine=Machine(),
        systemd=Systemd("user"),
        progress=Output(json=False, quiet=True, verbose=False, color="never", progress=False),
        confirm=lambda _: False,
    )
    store = context.generations

    def ended(committed: bool, after: int | None) -> tuple[str, str]:
        store.write(generation(1, "ready"))
        store.write(generation(2, "starting"))
        change = Transaction(
            operation="up", stack="cpu", before=1, after=after, committed=committed, step="x",
            started=utc_now(),
        )  # fmt: skip
        assert change.winner == (after if committed else 1)
        record_end(context, change)
        first, second = (store.read("cpu", number).outcome.state for number in (1, 2))
        return first, second

    assert ended(False, 2) == ("ready", "interrupted")
    assert ended(True, 2) == ("replaced", "ready")
    assert ended(True, None) == ("stopped", "starting")
    assert ended(False, 9) == ("ready", "starting")


@pytest.mark.parametrize(
    ("words", "stack", "numbers"),
    [
        ((), None, ()),
        (("3",), None, (3,)),
        (("cpu", "12"), "cpu", (12,)),
        (("cpu",), "cpu", ()),
        # No generation, and not to be counted with: such a stack there is none.
        (("9" * 5000,), "9" * 5000, ()),
        (("\u0663",), "\u0663", ()),
        (("3", "cpu"), StackctlError, ()),
        (("cpu", "1", "2"), StackctlError, ()),
        (("a", "b"), StackctlError, ()),
    ],
)
def test_a_stack_and_a_generation(words: tuple[str, ...], stack: Any, numbers: Any) -> None:
    if stack is StackctlError:
        with pytest.raises(StackctlError, match="unexpected arguments") as caught:
            stack_and_numbers(words, 1)
        assert caught.value.exit_code == 2
    else:
        assert stack_and_numbers(words, 1) == (stack, numbers)
