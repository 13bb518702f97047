"""The admin client against a socket that answers as HAProxy 3.0 does (itself: in the lab)."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from stackctl.errors import StackctlError
from stackctl.machine.haproxy import Haproxy, QueueStats, Traffic
from stackctl.values.proxy import key_digest

STAT = """\
# pxname,svname,qcur,qmax,scur,smax,slim,stot,bin,bout,dreq,dresp,ereq,econ,eresp,w,x,status,addr,
door,FRONTEND,,,9,,2000,,,,,,,,,,,OPEN,,
engine,engine,0,0,2,3,,9,9,9,,0,,0,0,0,0,{status},127.0.0.1:20001,
engine,again,0,0,1,1,,9,9,9,,0,,0,0,0,0,no check,unix,
engine,BACKEND,0,0,8,8,200,9,9,9,0,0,,0,0,0,0,UP,,

"""


@contextlib.contextmanager
def admin(folder: Path, answer: Callable[[str], bytes | None]) -> Iterator[list[str]]:
    """Serves one command line a connection; None closes late. Yields what was asked."""
    asked: list[str] = []
    ended = threading.Event()
    descriptor = os.open(folder, os.O_PATH)
    with socket.socket(socket.AF_UNIX) as server:
        # By way of the descriptor, since such a path may be of any length.
        here = f"/proc/self/fd/{descriptor}/admin.sock"
        server.bind(here)
        server.listen()

        def serve() -> None:
            while not ended.is_set():
                connection, _ = server.accept()
                with connection, contextlib.suppress(OSError):
                    line = connection.makefile().readline().rstrip("\n")
                    asked.append(line)
                    said = answer(line) if line else b""
                    if said is None:
                        ended.wait(2)
                    else:
                        connection.sendall(said)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield asked
        ended.set()
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as last:
            last.connect(here)
        thread.join()
    os.close(descriptor)


def test_orders_are_sent_as_haproxy_wants_them(tmp_path: Path) -> None:
    with admin(tmp_path, lambda _: b"\n\n") as asked:
        door = Haproxy(tmp_path)
        door.hold()
        door.release()
        door.release(healthy=False)
    assert asked[:3] == [
        "waited reset; set server engine/engine state maint",
        "set server engine/engine state ready",
        "set server engine/engine state ready; set server engine/engine health down",
    ]


@pytest.mark.parametrize(
    ("status", "state"),
    [
        ("UP", "up"), ("UP 1/3", "up"), ("DOWN", "down"), ("DOWN 1/2", "down"), ("MAINT", "held"),
        ("MAINT (via x/y)", "held"),
    ],
)  # fmt: skip
def test_state_and_traffic(tmp_path: Path, status: str, state: str) -> None:
    with admin(tmp_path, lambda _: STAT.format(status=status).encode()):
        assert Haproxy(tmp_path).state() == state
        assert Haproxy(tmp_path).port() == 20001
        # One of the eight is there twice.
        assert Haproxy(tmp_path).traffic() == Traffic(running=2, waiting=5)


def test_waited(tmp_path: Path) -> None:
    with admin(tmp_path, lambda _: b"7 51.250\n\n"):
        assert Haproxy(tmp_path).queue_stats() == QueueStats(requests=7, longest_s=51.25)


@pytest.mark.parametrize(
    "said", ["nothing changed", "port changed from '1' to '18082' by 'stats socket command'"]
)
def test_pointing_to_another_port(tmp_path: Path, said: str) -> None:
    with admin(tmp_path, lambda _: said.encode() + b"\n\n") as asked:
        Haproxy(tmp_path).set_backend_port(18082)
    assert asked[0] == "set server engine/engine addr 127.0.0.1 port 18082"


def test_keys_are_replaced_as_a_whole_and_never_sent(tmp_path: Path) -> None:
    keys = [f"secret-{number}" for number in range(230)]

    def answer(line: str) -> bytes:
        return b"New version created: 4\n\n" if line.startswith("prepare") else b"\n"

    with admin(tmp_path, answer) as asked:
        Haproxy(tmp_path).replace_keys(keys)
    assert asked[0] == "prepare acl /door/keys"
    assert [line for line in asked if line][-1] == "commit acl @4 /door/keys"
    added = [order for line in asked for order in line.split("; ") if order.startswith("add")]
    assert added == [f"add acl @4 /door/keys {key_digest(key)}" for key in keys]
    # A line that is longer than HAProxy's buffer is refused.
    assert max(map(len, asked)) < 16000
    assert "secret" not in " ".join(asked)


@pytest.mark.parametrize(
    "order",
    [
        Haproxy.hold, Haproxy.release, Haproxy.state, Haproxy.traffic, Haproxy.queue_stats,
        lambda door: door.set_backend_port(1), lambda door: door.replace_keys(["x"]),
    ],
)  # fmt: skip
def test_what_haproxy_refuses(tmp_path: Path, order: Callable[[Haproxy], object]) -> None:
    with (
        admin(tmp_path, lambda _: b"No such server.\n\n"),
        pytest.raises(StackctlError, match="the front door refused") as caught,
    ):
        order(Haproxy(tmp_path))
    assert caught.value.hint


def test_a_door_that_does_not_run(tmp_path: Path) -> None:
    with pytest.raises(StackctlError, match="does not answer: No such file"):
        Haproxy(tmp_path / "nothing").hold()
    with pytest.raises(StackctlError, match="does not answer: No such file"):
        Haproxy(tmp_path).hold()
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(tmp_path / "admin.sock"))
        with pytest.raises(StackctlError, match="does not answer: Connection refused"):
            Haproxy(tmp_path).hold()


def test_a_door_that_says_nothing_or_too_much(tmp_path: Path) -> None:
    with (
        admin(tmp_path, lambda _: None),
        pytest.raises(StackctlError, match="no answer in time"),
    ):
        Haproxy(tmp_path, timeout_s=0.2).hold()
    (tmp_path / "admin.sock").unlink()
    with (
        admin(tmp_path, lambda _: b"x" * 2**21),
        pytest.raises(StackctlError, match="refused") as caught,
    ):
        Haproxy(tmp_path).queue_stats()
    assert caught.value.details == ("more than 1 MiB of answer",)


def test_a_state_folder_deeper_than_a_socket_s_path(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 100) / ("e" * 100)
    deep.mkdir(parents=True)
    with admin(deep, lambda _: b"0 0.000\n\n"):
        assert Haproxy(deep).queue_stats() == QueueStats(requests=0, longest_s=0)
