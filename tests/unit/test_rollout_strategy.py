"""How a generation takes over from the one before it: ports and order."""

from __future__ import annotations

import os
import re
import socket
import subprocess
from pathlib import Path
from typing import Any

import msgspec
import pytest
from samples import EPYC, LATENCY, plan

from stackctl.cli.output import Output
from stackctl.deploy import preflight, proxy, unit_files
from stackctl.deploy.context import Context
from stackctl.deploy.lifecycle import exclusive_change
from stackctl.deploy.stack_state import InstalledStack
from stackctl.errors import StackctlError
from stackctl.machine.files import remove_file
from stackctl.machine.machine import Machine, RecordedMachine
from stackctl.machine.systemd import Systemd
from stackctl.state.generations import Generations, Journal
from stackctl.state.paths import scope_paths
from stackctl.units.proxy_unit import proxy_log_identifier, proxy_service, render_proxy
from stackctl.values.generation import Generation, Outcome, UnitFile, UnitSet
from stackctl.values.plan import Claim
from stackctl.values.proxy import Proxy


def generation(number: int, engine_port: int, *, stack: str = "cpu") -> Generation:
    return Generation(
        number=number,
        stack=stack,
        created="2026-11-21T12:00:00Z",
        image="ghcr.io/x@sha256:00",
        image_id="0" * 64,
        units=UnitSet(
            stack=stack,
            service=f"{stack}.service",
            container=f"stackctl-{stack}",
            files=(UnitFile(name=f"{stack}.container", text="[Container]\n"),),
        ),
        door=Proxy(port=8080, engine_port=engine_port, health_path="/health", image="x"),
        plan=msgspec.structs.replace(plan(), engine_port=engine_port),
        host=EPYC,
        outcome=Outcome(state="ready", changed="2026-11-21T12:00:00Z"),
    )


def context(folder: Path) -> Context:
    return Context(
        paths=scope_paths("user", {"HOME": str(folder), "XDG_RUNTIME_DIR": str(folder)}),
        machine=Machine(),
        systemd=Systemd("user"),
        progress=Output(json=False, quiet=True, verbose=False, color="never", progress=False),
        confirm=lambda _: False,
    )


def unit_set(text: str) -> UnitSet:
    file = UnitFile(name="cpu.container", text=text)
    return UnitSet(stack="cpu", service="cpu.service", container="stackctl-cpu", files=(file,))


def test_a_comment_of_another_version_restarts_nothing(tmp_path: Path) -> None:
    old = msgspec.structs.replace(generation(1, 20001), units=unit_set("# old\n[Container]\nA=1\n"))
    (file,) = old.units.files

    def unchanged(text: str, installed: UnitFile = file) -> bool:
        before = InstalledStack(installed, "cpu", old, "active")
        new = msgspec.structs.replace(old, number=2, units=unit_set(text))
        return preflight.is_unchanged(new, before)

    assert unchanged("# new words\n[Container]\nA=1\n")
    assert not unchanged("# old\n[Container]\nA=2\n")
    # A file that was changed by hand is replaced.
    assert not unchanged(file.text, UnitFile(name=file.name, text=file.text + "# by hand\n"))
    # The same for the front door.
    here = context(tmp_path)
    assert old.door is not None
    files = render_proxy("cpu", old.door, scope="user", podman="5.4.0", folder=str(tmp_path))
    unit_files.write(here, "cpu", (files.unit,))
    folder = here.paths.proxy_folder("cpu")
    folder.mkdir(parents=True)
    for one in files.files:
        (folder / one.name).write_text(re.sub(r"(?m)^( *)# .*$", r"\1# old words", one.text))
    assert proxy._same(files, here, "cpu")
    (folder / "haproxy.cfg").write_text(files.files[0].text.replace("timeout", "timeouts"))
    assert not proxy._same(files, here, "cpu")


def test_a_private_port_is_one_that_no_stored_generation_needs(tmp_path: Path) -> None:
    store = Generations(tmp_path)

    def port(*claims: Claim) -> int:
        return preflight.allocate_engine_port(Machine(), store, LATENCY, claims)

    first = port()
    assert 20000 <= first < 32000
    store.write(generation(1, first))
    second = port()
    assert second == first + 1
    # Another stack's generation is one that it may be rolled back to.
    store.write(generation(1, second, stack="other"))
    (tmp_path / "stacks" / "other" / "2.json").write_text("{")
    assert port() == first + 2
    assert port(Claim(stack="third", engine_port=first + 2)) == first + 3
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", first + 2))
        taken.listen()
        assert port() == first + 3


def test_a_private_port_is_one_that_linux_gives_to_nobody_else(tmp_path: Path) -> None:
    settings = tmp_path / "proc/sys/net/ipv4"
    settings.mkdir(parents=True)
    store = Generations(tmp_path)

    def port() -> int:
        return preflight.allocate_engine_port(RecordedMachine(tmp_path), store, LATENCY, ())

    first = port()
    (settings / "ip_local_reserved_ports").write_text(f"80,{first}-{first + 4}\n")
    second = port()
    assert second not in range(first, first + 5)
    (settings / "ip_local_port_range").write_text("20000\t30000\n")
    assert 30000 < port() < 32000
    # Rather one of those than none.
    (settings / "ip_local_port_range").write_text("1024\t65535\n")
    assert port() == second


@pytest.mark.parametrize(
    ("engine_port", "changed", "words"),
    [
        (20001, {"door": None}, "no front door"),
        # Stored text put back over itself: both would have the same port.
        (20000, {}, "both want port 20000"),
    ],
)
def test_what_cannot_run_beside_the_old_one(
    tmp_path: Path, engine_port: int, changed: dict[str, Any], words: str
) -> None:
    old = generation(1, 20000)
    new = msgspec.structs.replace(generation(2, engine_port), **changed)
    before = InstalledStack(old.units.files[0], "cpu", old, "active")
    chosen = preflight.choose_strategy(context(tmp_path), new, before, EPYC)
    assert chosen is not None
    assert (chosen.field, chosen.value) == ("takeover", "stop first")
    assert words in chosen.reason
    stopped = InstalledStack(old.units.files[0], "cpu", old, "failed")
    assert preflight.choose_strategy(context(tmp_path), new, stopped, EPYC) is None


def test_a_rollback_keeps_its_ports_and_says_so(tmp_path: Path) -> None:
    nothing = InstalledStack(None, None, None, "inactive")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        hints = []
        for operation in ("up", "rollback"):
            new = msgspec.structs.replace(
                generation(2, port),
                operation=operation,
                plan=msgspec.structs.replace(plan(), port=port, engine_port=port),
            )
            with pytest.raises(StackctlError, match=rf"taken by .*process {os.getpid()}") as caught:
                preflight.require_room(context(tmp_path), EPYC, new, nothing, force=True)
            hints.append(caught.value.hint or "")
    assert "--set port=" in hints[0]
    assert hints[1] == "a rollback keeps its ports: stop that, or stackctl up cpu-latency"


def test_the_log_of_a_stack_is_that_of_both_slots_and_the_door() -> None:
    units = ("cpu.service", "cpu_b.service", proxy_service("cpu"))
    words = Systemd("user").journal_command(units, ("cpu-g2", proxy_log_identifier("cpu")), lines=3)
    assert [word for word in words if "unit" in word] == [
        "--user-unit=cpu.service", "--user-unit=cpu_b.service", "--user-unit=cpu_door.service",
    ]  # fmt: skip
    assert [word for word in words if "identifier" in word] == [
        "--identifier=cpu-g2", "--identifier=cpu-door",
    ]  # fmt: skip
    assert "--unit=a" in Systemd("system").journal_command(("a",), (), lines=1)


def test_what_a_killed_check_left_is_swept_away(tmp_path: Path) -> None:
    with subprocess.Popen(["true"]) as gone:
        pass
    here = context(tmp_path)
    assert here.paths.runtime == tmp_path / "stackctl"
    for name in (f"stage-{gone.pid}-a", f"stage-{os.getpid()}-b", "stage-c", "other"):
        (here.paths.runtime / name / "units").mkdir(parents=True)
    with exclusive_change(here, "up cpu"):
        pass
    left = {path.name for path in here.paths.runtime.iterdir()}
    assert left == {f"stage-{os.getpid()}-b", "stage-c", "other"}
    # They are named so.
    with unit_files._stage(here.paths.runtime, ()) as folder:
        assert folder.parent.name.startswith(f"stage-{os.getpid()}-")


def test_files_are_removed_or_it_is_said(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("x")
    assert remove_file(path)
    assert not remove_file(path)
    assert not remove_file(tmp_path / "no" / "folder")
    path.mkdir()
    with pytest.raises(StackctlError, match=f"cannot remove {path}"):
        remove_file(path)
    Journal(tmp_path).clear()
