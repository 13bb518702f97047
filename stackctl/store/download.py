"""Download files over several connections at once, and resume earlier downloads.

Each connection (receive.py) fetches one piece after another, in order, of the first file that lacks
pieces. One thread (follow.py) hashes the bytes soon after their arrival, so that a file is verified
a moment after its last byte. part.py stores the state between runs.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Final

from stackctl.store.board import POLL_S, Board
from stackctl.store.follow import follow
from stackctl.store.pace import Limiter, Pace, Progress
from stackctl.store.receive import Receiver
from stackctl.store.wanted import Got, Patience, Wanted

CONNECTIONS: Final = 4
_PATIENCE: Final = Patience()


def download(
    files: Sequence[Wanted],
    *,
    secret: str | None = None,
    limit: float | None = None,
    connections: int = CONNECTIONS,
    patience: Patience = _PATIENCE,
    timeout_s: float = 30,
    tell: Callable[[Progress], None] = lambda _: None,
) -> list[Got]:
    """Download files. Only complete, verified files get their name; parts stay for the next run.

    Args:
        files: no two with the same target.
        secret: a token for the servers of their URLs; no other server gets it.
        limit: bytes per second, of all connections together.
        connections: their number.
        patience: retries while no bytes arrive.
        timeout_s: seconds for which a connection may be silent.
        tell: called with the progress a few times a second, in the caller's thread.

    Raises:
        StackctlError: a file cannot be fetched or verified; the message names it.
    """
    board = Board(files)
    limiter, pace = Limiter(limit), Pace(sum(file.size for file in files))
    receivers = [
        Receiver(board, secret=secret, limiter=limiter, patience=patience, timeout_s=timeout_s)
        for _ in range(max(1, connections))
    ]
    work: list[Callable[[], None]] = [receiver.run for receiver in receivers]
    work.append(lambda: follow(board))
    threads = [threading.Thread(target=board.guard, args=(one,)) for one in work]
    try:
        for thread in threads:
            thread.start()
        while board.left and board.error is None:
            with board.changed:
                board.changed.wait(POLL_S)
            board.look_again()
            tell(pace.at(board.seen(), board.came, note=board.note))
    finally:
        board.end()
        for receiver in receivers:
            receiver.transfer.abort()
        for thread in threads:
            if thread.ident is not None:
                thread.join()
        board.close()
    if board.error is not None:
        raise board.error
    return board.got
