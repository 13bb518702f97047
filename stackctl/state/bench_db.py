"""Measurements of stacks, ``STATE/benches.sqlite``: each run with its plan, its machine and every
request, because comparisons and charts need whole distributions."""

from __future__ import annotations

import contextlib
import os
import stat
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from stackctl.errors import ExitCode, StackctlError
from stackctl.machine.path_security import make_private_folder
from stackctl.values.base import from_json, to_json
from stackctl.values.bench import BenchEntry, BenchReport, RequestSample
from stackctl.values.host import Host
from stackctl.values.plan import Plan

if TYPE_CHECKING:
    import sqlite3

#: PRAGMA user_version of the file.
SCHEMA = 1
_TABLES = """
CREATE TABLE run (
    id INTEGER PRIMARY KEY AUTOINCREMENT, stack TEXT NOT NULL, generation INTEGER NOT NULL,
    happened TEXT NOT NULL, report TEXT NOT NULL, plan TEXT NOT NULL, host TEXT NOT NULL
);
CREATE TABLE sample (
    run INTEGER NOT NULL REFERENCES run(id), cell INTEGER NOT NULL, began_s REAL NOT NULL,
    e2e_s REAL NOT NULL, ttft_s REAL, gaps_ms BLOB NOT NULL, prompt_tokens INTEGER,
    cached_tokens INTEGER, output_tokens INTEGER, generation_tok_s REAL, error TEXT
);
CREATE INDEX sample_of_run ON sample (run);
"""
_COLUMNS = (
    "cell", "began_s", "e2e_s", "ttft_s", "gaps_ms", "prompt_tokens", "cached_tokens",
    "output_tokens", "generation_tok_s", "error",
)  # fmt: skip


class BenchDatabase:
    """The measurements of one scope. The file is created when the first one is stored."""

    def __init__(self, state: Path) -> None:
        self.path = state / "benches.sqlite"

    def prepare(self) -> None:
        """Check that a run can be stored later.

        Raises:
            StackctlError: the disk is full, the file is damaged or not ours, or of a newer schema.
        """
        with self._open(create=True) as database:
            database.execute("BEGIN IMMEDIATE")
            database.execute("ROLLBACK")

    def add(
        self, report: BenchReport, samples: Sequence[RequestSample], plan: Plan, host: Host
    ) -> int:
        """Store a run in one transaction and return its number. Raise as ``prepare`` does."""
        with self._open(create=True) as database:
            database.execute("BEGIN IMMEDIATE")
            cursor = database.execute(
                "INSERT INTO run (stack, generation, happened, report, plan, host) "
                "VALUES (?, ?, ?, ?, ?, ?)",
                (report.stack, report.generation, report.when, to_json(report), to_json(plan),
                 to_json(host)),
            )  # fmt: skip
            number = int(cursor.lastrowid or 0)
            marks = ", ".join("?" * (len(_COLUMNS) + 1))
            database.executemany(
                f"INSERT INTO sample (run, {', '.join(_COLUMNS)}) VALUES ({marks})",
                ((number, *_row(sample)) for sample in samples),
            )
            database.execute("COMMIT")
        return number

    def runs(self, stack: str | None = None) -> tuple[BenchEntry, ...]:
        """Return short entries of the stored runs, of one stack or all, newest first."""
        return tuple(map(_entry, self.reports(stack)))

    def reports(self, stack: str | None = None) -> tuple[BenchReport, ...]:
        """Return the stored runs, of one stack or all, newest first."""
        where, values = ("WHERE stack = ? ", (stack,)) if stack else ("", ())
        rows = self._rows(f"SELECT id, report FROM run {where}ORDER BY id DESC", values)
        return tuple(self._report(*row) for row in rows)

    def read(self, number: int) -> BenchReport:
        """Return one run. Raise StackctlError (exit 4) when no run has that number."""
        return self._report(number, self._one(number, "report"))

    def plan(self, number: int) -> Plan:
        """Return the plan of a run. Raise as ``read`` does."""
        return from_json(self._one(number, "plan"), Plan, where=f"bench {number}")

    def host(self, number: int) -> Host:
        """Return the machine of a run. Raise as ``read`` does."""
        return from_json(self._one(number, "host"), Host, where=f"bench {number}")

    def samples(self, number: int) -> tuple[RequestSample, ...]:
        """Return every request of a run, in the order in which they ended."""
        names = ", ".join(_COLUMNS)
        rows = self._rows(f"SELECT {names} FROM sample WHERE run = ? ORDER BY rowid", (number,))
        try:
            return tuple(_sample(row) for row in rows)
        except (ValueError, TypeError) as error:
            raise self._damaged(str(error)) from None

    def latest(self, stack: str, generation: int) -> BenchReport | None:
        """Return the newest run with results of a generation of this machine; None without one."""
        rows = self._rows(
            "SELECT id, report FROM run WHERE stack = ? AND generation = ? ORDER BY id DESC",
            (stack, generation),
        )
        reports = (self._report(*row) for row in rows)
        return next((report for report in reports if report.has_answers and not report.box), None)

    def _one(self, number: int, column: str) -> str:
        rows = self._rows(f"SELECT {column} FROM run WHERE id = ?", (number,))
        if not rows:
            known = self._rows("SELECT min(id), max(id) FROM run", ())
            first, last = known[0] if known else (None, None)
            raise StackctlError(
                f"there is no bench {number}",
                hint=f"stackctl bench list ({first} to {last})" if first else "stackctl bench",
                exit_code=ExitCode.NOT_FOUND,
            )
        return str(rows[0][0])

    def _report(self, number: int, text: str) -> BenchReport:
        report = from_json(text, BenchReport, where=f"bench {number}")
        return msgspec.structs.replace(report, id=number)

    def _rows(self, query: str, values: tuple[Any, ...]) -> list[Any]:
        try:
            self.path.lstat()
        except FileNotFoundError:
            return []
        except OSError as error:
            raise StackctlError(f"cannot open {self.path}: {error.strerror}") from None
        with self._open() as database:
            # A file without a schema is empty: its creation was interrupted.
            if not _version(database):
                return []
            try:
                return database.execute(query, values).fetchall()
            except OverflowError:  # no row can have a number that SQLite cannot hold
                return []

    @contextlib.contextmanager
    def _open(self, *, create: bool = False) -> Iterator[sqlite3.Connection]:
        """Open the database. Raise when it is not this user's own or its schema is unknown."""
        import sqlite3

        try:
            if create:
                make_private_folder(self.path.parent)
                flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
                os.close(os.open(self.path, flags, 0o600))
            seen = self.path.lstat()
            if not stat.S_ISREG(seen.st_mode) or seen.st_uid != os.geteuid():
                raise StackctlError(
                    f"{self.path} is not a file of this user's own",
                    hint=f"look at it, then move it away: mv {self.path} {self.path}.old",
                )
            with contextlib.closing(
                sqlite3.connect(self.path, timeout=5, isolation_level=None)
            ) as database:
                self._settle(database, create)
                yield database
        except sqlite3.Error as error:
            raise self._failed(error) from None
        except OSError as error:
            raise StackctlError(f"cannot open {self.path}: {error.strerror}") from None

    def _settle(self, database: sqlite3.Connection, create: bool) -> None:
        version = _version(database)
        if version > SCHEMA:
            raise StackctlError(
                f"{self.path} has schema {version}, this stackctl reads {SCHEMA}",
                hint="use the stackctl that wrote it, or move it away: "
                f"mv {self.path} {self.path}.old",
            )
        if version == 0 and create:
            # When two processes create it at once, the second one finds the tables.
            database.execute("BEGIN IMMEDIATE")
            if _version(database) == 0:
                for statement in filter(str.strip, _TABLES.split(";")):
                    database.execute(statement)
                database.execute(f"PRAGMA user_version = {SCHEMA}")
            database.execute("COMMIT")

    def _failed(self, error: sqlite3.Error) -> StackctlError:
        told = str(error)
        if "full" in told or "I/O" in told:
            return StackctlError(
                f"cannot write {self.path}: {told}", hint="make room on its disk, then try again"
            )
        if "locked" in told:
            return StackctlError(
                f"{self.path} is in use by another process",
                hint="wait until it is done, then try again",
                exit_code=ExitCode.LOCKED,
            )
        if "readonly" in told:
            return StackctlError(f"cannot write {self.path}: {told}")
        return self._damaged(told)

    def _damaged(self, told: str) -> StackctlError:
        return StackctlError(
            f"{self.path} is damaged: {told}",
            hint=f"move it away, which starts a new one: mv {self.path} {self.path}.old",
        )


def _version(database: sqlite3.Connection) -> int:
    (version,) = database.execute("PRAGMA user_version").fetchone()
    return int(version)


def _row(sample: RequestSample) -> tuple[Any, ...]:
    values = [getattr(sample, name) for name in _COLUMNS]
    # Four bytes for each gap: seven digits are more than a clock resolves.
    values[_COLUMNS.index("gaps_ms")] = array("f", sample.gaps_ms).tobytes()
    return tuple(values)


def _sample(row: Sequence[Any]) -> RequestSample:
    values = dict(zip(_COLUMNS, row, strict=True))
    gaps = array("f")
    gaps.frombytes(values["gaps_ms"])
    return msgspec.convert({**values, "gaps_ms": tuple(gaps)}, RequestSample)


def _entry(report: BenchReport) -> BenchEntry:
    speeds = [
        cell.generation_tok_s.p50
        for cell in report.cells
        if cell.generation_tok_s and cell.shape.is_single_uncached
    ]
    return BenchEntry(
        id=report.id or 0,
        stack=report.stack,
        box=report.box,
        generation=report.generation,
        when=report.when,
        tool=report.tool,
        model=report.model,
        objective=report.objective,
        seconds=report.seconds,
        complete=report.complete,
        cells=len(report.cells),
        generation_tok_s=max(speeds, default=None),
    )
