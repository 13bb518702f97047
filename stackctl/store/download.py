"""Downloads files by several connections at once, and knows what of them is there already.

Each connection (receive.py) takes one piece after another, in order, of the first file that still
lacks some. One thread (follow.py) hashes what has come, so that a file is verified a moment after
its last byte. What is kept between runs: part.py.
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
    """Fetch files, each whole and verified or not at all. What has come stays for the next run.

    Args:
        files: no two with the same target.
        secret: a token for the servers of their URLs; no other server gets it.
        limit: bytes a second, of all connections together.
        connections: how many there are.
        patience: how long it goes on while nothing comes.
        timeout_s: how long a connection may be silent.
        tell: hears of progress a few times a second, in the caller's thread.

    Raises:
        StackctlError: with the file's name and why.
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
