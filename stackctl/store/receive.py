"""One connection of a download: asks for pieces and writes them."""

from __future__ import annotations

import random
import re
import time
from typing import Final, NoReturn

from stackctl.errors import StackctlError
from stackctl.machine.transfer import Lost, Response, Transfer, host_of
from stackctl.store.answers import check_hop, check_range, refusal, retry_after
from stackctl.store.board import Board, Job
from stackctl.store.pace import Limiter
from stackctl.store.part import PIECE_BYTES
from stackctl.store.wanted import Patience

#: What is read at once is what a killed process may lose, for each connection: little on a slow
#: line, more where a read takes no time.
_LEAST_BYTES: Final = 64 << 10
_MOST_BYTES: Final = 1 << 20
_SOON_S: Final = 0.002
_LATE_S: Final = 0.010
#: How often the address that a hub has redirected to is asked for again, when it is refused and
#: nothing comes in between.
_MOST_ADDRESSES: Final = 3
#: How often a file that the server replaces is begun anew.
_MOST_RESTARTS: Final = 2
#: What a server may call a file: more, or anything else, is not kept, nor sent back.
_ETAG: Final = re.compile(r'(?:W/)?"[\x21\x23-\x7e]{0,200}"')
_DATE: Final = re.compile(r"[A-Za-z0-9 ,:+-]{1,60}")


class Receiver:
    """Takes pieces from a board. ``secret`` goes to the server of a file's URL and to no other."""

    def __init__(
        self,
        board: Board,
        *,
        secret: str | None,
        limiter: Limiter,
        patience: Patience,
        timeout_s: float,
    ) -> None:
        self.transfer = Transfer(timeout_s=timeout_s)
        self._board = board
        self._secret = secret
        self._limiter = limiter
        self._patience = patience
        self._view = memoryview(bytearray(_MOST_BYTES))
        self._step = _LEAST_BYTES

    def run(self) -> None:
        """Receive until nothing is left."""
        with self.transfer:
            while (task := self._board.next()) is not None:
                self._try(*task)

    def _try(self, job: Job, piece: int) -> None:
        board, before, begun = self._board, job.part.done[piece], time.monotonic()
        lost: Lost | None = None
        wait: float | None = None
        try:
            wait = self._receive(job, piece)
        except Lost as error:
            lost = error
        with board.changed:
            job.flying -= 1
            if job.whole and not job.flying:
                job.rest()
            elif not job.part.complete(piece) and not job.whole:
                job.pending.appendleft(piece)
            if board.stop.is_set():
                return
            if lost is not None or wait is not None:
                if job.part.done[piece] > before:
                    job.failures = job.addresses = 0
                # What breaks all connections at the same time is one failure.
                if begun >= job.not_before:
                    job.failures += 1
                    if job.failures > self._patience.attempts:
                        self._give_up(job, lost)
                    job.not_before = time.monotonic() + self._pause(job.failures, wait)
                elif wait:
                    job.not_before = max(job.not_before, time.monotonic() + wait)
                if lost is not None:
                    board.note = f"{lost.message}: once more"
            elif job.part.complete(piece):
                job.failures = job.addresses = 0
                board.note = None
            board.changed.notify_all()

    def _pause(self, failures: int, wanted: float | None) -> float:
        """Seconds until the next attempt; what the server asked for, where it did."""
        pause = min(self._patience.most_s, self._patience.first_s * 2.0 ** (failures - 1))
        return max(wanted or 0.0, pause * random.uniform(0.5, 1.0))

    def _give_up(self, job: Job, lost: Lost | None) -> NoReturn:
        why = lost.message if lost else f"{host_of(job.wanted.url)} stays busy"
        raise StackctlError(
            f"{job.wanted.name}: {why}, {self._patience.attempts + 1} times in a row",
            hint="the part is kept: the same command continues it",
        )

    def _receive(self, job: Job, piece: int) -> float | None:
        """Ask for what is missing of a piece and write it.

        Returns:
            None; or, where nothing came, the seconds to wait before the next attempt.
        """
        part, wanted = job.part, job.wanted
        first = piece * PIECE_BYTES + part.done[piece]
        last = piece * PIECE_BYTES + part.length(piece) - 1
        address, turn = job.address, job.turn
        headers = {"Range": f"bytes={first}-{last}"}
        # A weak one cannot be compared by a server (RFC 9110, 13.1.5).
        known = part.etag
        if known is not None and not known.startswith("W/"):
            headers["If-Range"] = known
        response = self.transfer.get(
            address or wanted.url,
            headers,
            secret=None if address else self._secret,
            seen=lambda answer: check_hop(wanted, answer),
        )
        if response.status not in (200, 206):
            return self._other(job, response, turn)
        if address is None and response.url != wanted.url:
            job.address = response.url
        etag = _named(response)
        # Where no hash will tell, a server that no longer says what it has is not believed.
        changed = known is not None and etag != known and (etag is not None or not wanted.known)
        if changed and wanted.sha256 is None:
            return self._anew(job)
        if etag:
            part.name(etag)
        if response.status == 206:
            check_range(wanted, response, first, last)
            self._copy(response, job, piece, last + 1 - first)
        elif changed and "If-Range" in headers:
            # Another server of the same file, by its hash: what is there counts there too.
            return 0.0
        else:
            self._all(response, job)
        return None

    def _all(self, response: Response, job: Job) -> None:
        """The server sends the whole file, whatever part of it was asked for."""
        part, board = job.part, self._board
        where = host_of(response.url)
        if response.length not in (None, part.size):
            raise Lost(f"{where} would send {response.length} of {part.size} bytes")
        with board.changed:
            job.whole = True
            if job.flying > 1:
                raise Lost(f"{where} sends whole files only")
            for number in range(part.count):
                board.here -= part.done[number]
                part.forget(number)
            job.pending.clear()
        for number in range(part.count):
            self._copy(response, job, number, part.length(number))

    def _copy(self, response: Response, job: Job, piece: int, left: int) -> None:
        board = self._board
        while left:
            if board.stop.is_set() or job.fresh:
                return
            begin = time.perf_counter()
            count = response.readinto(self._view[: min(left, self._step)])
            if count == 0:
                raise Lost(f"{host_of(response.url)} broke the connection off")
            took = time.perf_counter() - begin
            if took > _LATE_S:
                self._step = max(self._step // 2, _LEAST_BYTES)
            elif took < _SOON_S:
                self._step = min(self._step * 2, _MOST_BYTES)
            job.part.write(piece, self._view[:count])
            left -= count
            if left == 0:
                job.part.settle(piece)
            with board.changed:
                board.here += count
                board.came += count
                if left == 0:
                    board.changed.notify_all()
            self._limiter.take(count, board.stop)

    def _other(self, job: Job, response: Response, turn: int) -> float:
        """What another status means: seconds until it is worth trying again."""
        status = response.status
        if status in (408, 425, 429) or status >= 500:
            self._board.note = f"{host_of(response.url)} is busy ({status})"
            return retry_after(response.header("Retry-After"))
        away = response.url != job.wanted.url
        if away and status in (400, 401, 403, 404, 410) and job.addresses < _MOST_ADDRESSES:
            # Signed addresses end after an hour or so, for all connections.
            with self._board.changed:
                if job.turn == turn:
                    job.address, job.addresses, job.turn = None, job.addresses + 1, turn + 1
            return 0.0
        if status == 416:
            return self._anew(job)
        raise refusal(job.wanted.name, response)

    def _anew(self, job: Job) -> float:
        """The server has another file than the one that the pieces are of."""
        with self._board.changed:
            if not job.fresh:
                job.fresh = True
                job.restarts += 1
            if job.restarts > _MOST_RESTARTS:
                raise StackctlError(
                    f"{job.wanted.name} changes while it is fetched", hint="try again later"
                )
        return 0.0


def _named(response: Response) -> str | None:
    """What the server calls the file that it sends: its ETag, else the time of its last change."""
    etag, date = response.header("ETag") or "", response.header("Last-Modified") or ""
    if _ETAG.fullmatch(etag):
        return etag
    return date if _DATE.fullmatch(date) else None
