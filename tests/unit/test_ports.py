"""Who has a TCP port."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from refusing import run_without

from stackctl.deploy.preflight import require_port
from stackctl.errors import StackctlError
from stackctl.machine.machine import Machine
from stackctl.machine.ports import Listener, listener

LISTEN = """
import socket, sys
family = socket.AF_INET6 if sys.argv[1] == "::" else socket.AF_INET
server = socket.create_server((sys.argv[1], 0), family=family, dualstack_ipv6=sys.argv[1] == "::")
print(server.getsockname()[1], flush=True)
sys.stdin.read()
"""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def test_a_free_port() -> None:
    port = free_port()
    assert listener(Machine(), port) is None
    require_port(Machine(), port)
    # To ask does not take it.
    with socket.create_server(("127.0.0.1", port)):
        pass


def test_a_port_of_this_process() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        found = listener(Machine(), port)
        assert found is not None
        assert found.pid == os.getpid()
        assert found.command == Path("/proc/self/comm").read_text().strip()
        with pytest.raises(StackctlError) as caught:
            require_port(Machine(), port)
    assert f"port {port} is taken by" in caught.value.message
    assert f"process {os.getpid()}" in caught.value.message
    assert f"--set port={port + 1}" in (caught.value.hint or "")


@pytest.mark.parametrize("address", ["127.0.0.1", "0.0.0.0", "::"])
def test_a_port_of_another_process(address: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", LISTEN, address],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            pytest.skip("no IPv6 here")
        found = listener(Machine(), int(line))
        process.communicate("")
    assert found is not None
    assert found.pid == process.pid
    assert str(found) == f"{found.command} (process {process.pid})"


def test_a_port_that_was_closed_a_moment_ago_is_free() -> None:
    """Connections in TIME_WAIT must not stop a restart."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)):
            accepted, _ = server.accept()
            accepted.close()
    assert listener(Machine(), port) is None


def test_a_port_for_root_alone() -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root, to become somebody else")
    code = (
        "import os; from stackctl.deploy.preflight import require_port\n"
        "from stackctl.machine.machine import Machine\n"
        "os.setuid(65534)\n"
        "require_port(Machine(), 80)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "StackctlError: port 80 needs root" in done.stderr


@pytest.mark.parametrize("error", [errno.EPERM, errno.ENOBUFS])
def test_a_port_that_cannot_be_bound_for_another_reason(error: int) -> None:
    code = (
        "from stackctl.machine.machine import Machine\n"
        "from stackctl.machine.ports import listener\n"
        f"listener(Machine(), {free_port()})\n"
    )
    done = run_without("bind", error, code)
    last = done.stderr.splitlines()[-1]
    assert "StackctlError: cannot bind port" in last
    assert os.strerror(error) in last


def test_an_outgoing_connection_is_no_listener() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname()) as client,
    ):
        port = client.getsockname()[1]
        found = listener(Machine(), port)
        # The port cannot be bound, but nobody listens: no process is accused.
        assert found is None or found.pid is None


def test_how_a_listener_is_called() -> None:
    assert str(Listener(None, None)) == "a process of another user"
    assert str(Listener(5, None)) == "process (process 5)"
