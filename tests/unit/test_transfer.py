"""HTTP for large files, against servers that misbehave."""

from __future__ import annotations

import socket
import threading

import pytest

from stackctl.machine.http_download import ConnectionLost, Transfer


def test_a_server_that_closes_without_an_answer_broke_the_connection_off() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def hang_up() -> None:
            accepted, _ = server.accept()
            with accepted:
                accepted.recv(65536)

        thread = threading.Thread(target=hang_up)
        thread.start()
        url = f"http://127.0.0.1:{server.getsockname()[1]}/file"
        with (
            Transfer(timeout_s=10) as transfer,
            pytest.raises(ConnectionLost, match="broke the connection"),
        ):
            transfer.get(url, {})
        thread.join()
