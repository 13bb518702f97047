"""Stored measurements: what comes back, and files that are damaged, newer, foreign or too large."""

from __future__ import annotations

import resource
import signal
import sqlite3
from pathlib import Path
from typing import Any

import msgspec
import pytest
from samples import EPYC, EPYC_GPU, IQUEST, LATENCY, plan

from stackctl.errors import ExitCode, StackctlError
from stackctl.observe.bench.compare import compare_runs
from stackctl.state.bench_db import SCHEMA, BenchDatabase
from stackctl.values.bench import BenchCell, BenchReport, Quantiles, RequestSample, Workload

SHAPE = Workload(prompt_tokens=1024, output_tokens=200)
PLAN = plan(EPYC, IQUEST, LATENCY)


def summary(value: float) -> Quantiles:
    return Quantiles(n=5, mean=value, p5=value, p50=value, p95=value, p99=value)


def report(**changes: Any) -> BenchReport:
    cell = BenchCell(shape=SHAPE, requests=5, seconds=9.5, generation_tok_s=summary(25.5))
    base = BenchReport(
        stack="cpu", generation=3, when="2026-11-28T12:00:00Z", seconds=61.5, profile="cpu-latency",
        objective="latency", engine="llama.cpp", image_id="abc", model="IQuest", cells=(cell,),
    )  # fmt: skip
    return msgspec.structs.replace(base, **changes)


def samples(speed: float = 25.0, count: int = 5) -> list[RequestSample]:
    return [
        RequestSample(cell=0, began_s=n, e2e_s=8.0 + n / 100, ttft_s=0.5 + n / 1000,
               gaps_ms=(40.0, 41.5), prompt_tokens=1024, output_tokens=200,
               generation_tok_s=speed + n / 100)
        for n in range(count)
    ]  # fmt: skip


def test_what_is_stored_comes_back(tmp_path: Path) -> None:
    benches = BenchDatabase(tmp_path / "state")
    assert (benches.runs(), benches.latest("cpu", 3)) == ((), None)
    assert not benches.path.exists()
    broken = RequestSample(cell=0, began_s=1.0, e2e_s=0.1, error="HTTP 503: busy")
    assert benches.add(report(), [*samples(), broken], PLAN, EPYC) == 1
    assert benches.add(report(generation=4, complete=False), [], PLAN, EPYC) == 2
    assert benches.add(report(stack="other"), [], PLAN, EPYC_GPU) == 3
    assert benches.read(1) == report(id=1)
    assert benches.samples(1) == (*samples(), broken)
    assert (benches.plan(1), benches.host(3)) == (PLAN, EPYC_GPU)
    assert [run.id for run in benches.runs()] == [3, 2, 1]
    (newest, oldest) = benches.runs("cpu")
    assert (newest.id, newest.complete, oldest.id, oldest.generation_tok_s) == (2, False, 1, 25.5)
    latest = benches.latest("cpu", 3)
    assert latest is not None and latest.id == 1
    assert benches.latest("cpu", 5) is None
    assert benches.path.stat().st_mode & 0o777 == 0o600
    assert benches.path.parent.stat().st_mode & 0o777 == 0o700


def test_a_run_that_measured_nothing_is_not_the_latest(tmp_path: Path) -> None:
    benches = BenchDatabase(tmp_path)
    benches.add(report(), [], PLAN, EPYC)
    benches.add(report(cells=()), [], PLAN, EPYC)
    failed = BenchCell(shape=SHAPE, requests=1, failed=1, seconds=5.0)
    benches.add(report(cells=(failed,), complete=False), [], PLAN, EPYC)
    latest = benches.latest("cpu", 3)
    assert latest is not None and latest.id == 1


def test_no_such_run(tmp_path: Path) -> None:
    for stored in (False, True):
        benches = BenchDatabase(tmp_path)
        if stored:
            benches.add(report(), [], PLAN, EPYC)
        with pytest.raises(StackctlError, match="there is no bench 7") as caught:
            benches.read(7)
        assert caught.value.exit_code == ExitCode.NOT_FOUND
        with pytest.raises(StackctlError, match="there is no bench 1000"):
            benches.read(10**20)


@pytest.mark.parametrize("change", ["gaps_ms = x'0102'", "gaps_ms = 'text'", "ttft_s = 'soon'"])
def test_a_damaged_request(tmp_path: Path, change: str) -> None:
    benches = BenchDatabase(tmp_path)
    benches.add(report(), samples(), PLAN, EPYC)
    with sqlite3.connect(benches.path) as database:
        database.execute(f"UPDATE sample SET {change} WHERE rowid = 2")
    database.close()
    with pytest.raises(StackctlError, match="is damaged"):
        compare_runs(benches, 1, 1)


@pytest.mark.parametrize("damage", [b"", b"not a database at all" * 100, None])
def test_a_damaged_file(tmp_path: Path, damage: bytes | None) -> None:
    benches = BenchDatabase(tmp_path)
    benches.add(report(), samples(), PLAN, EPYC)
    raw = benches.path.read_bytes()
    # None: torn in the middle, its head is whole.
    benches.path.write_bytes(raw[: len(raw) // 2] if damage is None else damage)
    if damage == b"":
        # An empty file is what a crash leaves before the first run: it is filled.
        assert benches.add(report(), [], PLAN, EPYC) == 1
        return
    for act in (benches.prepare, lambda: benches.read(1), lambda: benches.samples(1)):
        try:
            act()
        except StackctlError as error:
            assert "is damaged" in error.message
            assert f"mv {benches.path} " in (error.hint or "")
            break
    else:
        pytest.fail("a damaged file was read")


def test_a_file_without_tables_is_empty(tmp_path: Path) -> None:
    """Whoever made it was stopped at that moment."""
    benches = BenchDatabase(tmp_path / "state")
    benches.path.parent.mkdir(mode=0o700)
    benches.path.touch(mode=0o600)
    assert (benches.runs(), benches.latest("cpu", 3)) == ((), None)
    assert benches.add(report(), samples(), PLAN, EPYC) == 1
    assert [run.id for run in benches.runs()] == [1]


def test_a_newer_schema_is_refused_and_left_alone(tmp_path: Path) -> None:
    benches = BenchDatabase(tmp_path)
    benches.add(report(), [], PLAN, EPYC)
    with sqlite3.connect(benches.path) as database:
        database.execute(f"PRAGMA user_version = {SCHEMA + 1}")
    database.close()
    before = benches.path.read_bytes()
    for act in (benches.prepare, benches.runs, lambda: benches.add(report(), [], PLAN, EPYC)):
        with pytest.raises(StackctlError, match=f"has schema {SCHEMA + 1}, this stackctl reads"):
            act()
    assert benches.path.read_bytes() == before


def test_a_link_or_a_pipe_is_not_followed(tmp_path: Path) -> None:
    import os

    benches = BenchDatabase(tmp_path)
    target = tmp_path / "target"
    target.write_bytes(b"precious")
    benches.path.symlink_to(target)
    for act in (benches.prepare, benches.runs):
        with pytest.raises(StackctlError):
            act()
    assert target.read_bytes() == b"precious"
    benches.path.unlink()
    os.mkfifo(benches.path)
    with pytest.raises(StackctlError):
        benches.prepare()


def test_a_full_disk_leaves_what_was_there(tmp_path: Path) -> None:
    """A limit on the size of files stands in for the disk: a write beyond it fails the same way."""
    benches = BenchDatabase(tmp_path)
    benches.add(report(), samples(), PLAN, EPYC)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (benches.path.stat().st_size, limits[1]))
        with pytest.raises(StackctlError) as caught:
            benches.add(report(), samples(count=5000), PLAN, EPYC)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert caught.value.message.startswith("cannot write")
    assert [run.id for run in benches.runs()] == [1]
    assert benches.samples(1) == tuple(samples())
    assert benches.add(report(), [], PLAN, EPYC) == 2


def test_another_process_writes(tmp_path: Path) -> None:
    benches = BenchDatabase(tmp_path)
    benches.add(report(), [], PLAN, EPYC)
    other = sqlite3.connect(benches.path, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    try:
        with pytest.raises(StackctlError, match="in use by another process") as caught:
            benches.runs()
    finally:
        other.close()
    assert caught.value.exit_code == ExitCode.LOCKED


# Comparison


def test_a_faster_run_is_better(tmp_path: Path) -> None:
    benches = BenchDatabase(tmp_path)
    benches.add(report(), samples(25), PLAN, EPYC)
    benches.add(report(image_id="new"), samples(30), PLAN, EPYC)
    found = compare_runs(benches, 1, 2)
    words = {one.figure: one.word for one in found.differences}
    assert words == {
        "ttft_s": "no difference", "generation_tok_s": "better", "e2e_s": "no difference"
    }  # fmt: skip
    speed = found.differences[1]
    assert (speed.before, speed.after, speed.n) == (25.02, 30.02, (5, 5))
    assert speed.ratio is not None and speed.ratio[0] == pytest.approx(1.2, abs=0.001)
    assert found.differs == ("another image of the engine",)
    back = {one.figure: one.word for one in compare_runs(benches, 2, 1).differences}
    assert back["generation_tok_s"] == "worse"


def test_cells_of_one_run_only_and_what_else_differs(tmp_path: Path) -> None:
    benches = BenchDatabase(tmp_path)
    other = msgspec.structs.replace(SHAPE, concurrency=4)
    cells = (BenchCell(shape=other, requests=5, seconds=1.0),)
    benches.add(report(), samples(), PLAN, EPYC)
    changed = plan(EPYC_GPU, IQUEST, LATENCY)
    benches.add(report(cells=cells, model="Other"), samples(), changed, EPYC_GPU)
    found = compare_runs(benches, 1, 2)
    assert (found.only_before, found.only_after) == ((SHAPE,), (other,))
    assert found.differences == ()
    assert "model: IQuest -> Other" in found.differs
    assert any(line.startswith("machine: ") for line in found.differs)


def test_failed_requests_are_not_compared(tmp_path: Path) -> None:
    benches = BenchDatabase(tmp_path)
    broken = [msgspec.structs.replace(one, error="lost") for one in samples(90)]
    benches.add(report(), samples(25), PLAN, EPYC)
    benches.add(report(), [*samples(25), *broken], PLAN, EPYC)
    words = [one.word for one in compare_runs(benches, 1, 2).differences]
    assert words == ["no difference"] * 3
    assert [one.n for one in compare_runs(benches, 1, 2).differences] == [(5, 5)] * 3
