"""A stock machine with two NUMA nodes is provisioned by docs/fresh-epyc-box.md, and serves.

`make test-vm` runs these tests. They are slow, because the processor is emulated. All modules of
the virtual machine share one machine and run in the order of their names, which is that of the
tutorial. Each test uses the results of earlier ones. At the end (test_vm_undo.py) the machine is in
its first state again.
"""

from __future__ import annotations

import json
import re
import sys

import pytest

from .host import CHECKOUT
from .tinymodel import tiny_model
from .vm import VM
from .vmbox import DATA, MODEL, SERVICE_USER, Box, differences, results, stackctl

pytestmark = pytest.mark.vm
NODE, CPUS = "1", "1"
BOUND = ("--set", "placement.policy=bind", "--set", f'placement.nodes="{NODE}"')
SPREAD = ("--set", "placement.policy=interleave", "--set", 'placement.nodes="0-1"')
MODELS = {SERVICE_USER: f"file:{MODEL}", "root": f"file:{DATA}/models/tiny.gguf"}
#: The model in whole pages. The part before its tensors may not be locked.
PAGES = -(-len(tiny_model()) // 4096)


def test_a_stock_machine_with_two_nodes(vm: VM) -> None:
    assert 'VERSION_ID="13"' in vm.run(["cat", "/etc/os-release"], check=True).stdout
    assert "available: 2 nodes (0-1)" in vm.run(["numactl", "--hardware"], check=True).stdout
    controllers = vm.run(["cat", "/sys/fs/cgroup/cgroup.controllers"], check=True).stdout.split()
    assert set(controllers) >= {"cpuset", "cpu", "io", "memory", "pids"}
    assert vm.run(["sh", "-c", "command -v podman stackctl"]).returncode != 0
    report = json.loads(stackctl(vm, "root", "status", "--json", code=6))
    assert report["message"] == "there is no stackctl on root@vm"


def test_a_host_key_that_is_not_known_is_refused(vm: VM) -> None:
    # The settings of ssh do not name this address of the machine.
    url = f"ssh://root@127.0.0.1:{vm.port}"
    words = [sys.executable, "-m", "stackctl", "--host", url, "status"]
    done = vm.client(words, env={"PYTHONPATH": str(CHECKOUT)})
    assert done.returncode == 1
    assert f"cannot connect to {url}: Host key verification failed" in done.stderr


def test_looking_changes_nothing(box: Box) -> None:
    ((_, said),) = box.follow("1. Look")
    for item in ("podman", "service-user", "cpuset", "memlock", "linger", "numa-balancing"):
        assert re.search(rf"^change   {item}\b", said, re.MULTILINE), said
    assert re.search(r"^skip     swappiness +no swap$", said, re.MULTILINE)
    changed = differences(box.before, box.record(), {})
    assert not changed, "\n".join(changed)


def test_it_is_made_ready_once_and_then_nothing_changes(ready: Box) -> None:
    (_, first), (_, second) = ready.follow("2. Do")
    assert re.search(r"^\d+ items changed", first, re.MULTILINE), first
    assert "REFUSED" not in first
    assert re.search(r"^0 items changed", second, re.MULTILINE), second
    assert ready.read("/proc/sys/kernel/numa_balancing") == "0\n"
    assert "[madvise]" in ready.read("/sys/kernel/mm/transparent_hugepage/enabled")
    # The purpose: services of that user may use cpusets and lock memory, from its first manager on.
    uid = ready.root("id", "-u", SERVICE_USER).stdout.strip()
    unit = f"user@{uid}.service"
    manager = ready.root("systemctl", "show", "-P", "MainPID", unit).stdout.strip()
    (limit,) = [
        line for line in ready.read(f"/proc/{manager}/limits").splitlines() if "locked" in line
    ]
    assert limit.split()[3:5] == ["unlimited", "unlimited"]
    given = ready.read(f"/sys/fs/cgroup/user.slice/user-{uid}.slice/{unit}/cgroup.controllers")
    assert "cpuset" in given.split()


def test_two_commands_make_it_serve_for_root(ready: Box) -> None:
    _, up = ready.follow("")
    assert "cpu is up (generation 1)" in up[1]
    assert "ok" in stackctl(ready.vm, "root", "check")
    stackctl(ready.vm, "root", "down")


def test_it_serves_as_the_tutorial_says(ready: Box) -> None:
    for command, said in ready.follow("3. Serve"):
        if " up " in command:
            assert "cpu is up (generation 1)" in said
    found = results(ready.json(SERVICE_USER, "verify"))
    assert found["memory"]["status"] == "ok", found


def test_probe_sees_both_nodes(ready: Box) -> None:
    host = json.loads(stackctl(ready.vm, "root", "probe", "--json"))
    nodes = [(node["id"], node["cpus"]) for node in host["cpu"]["numa"]]
    assert nodes == [(0, "0"), (1, CPUS)]
    assert "cpuset" in host["tools"]["cgroup_controllers"]


@pytest.mark.parametrize("user", [SERVICE_USER, "root"])
def test_an_engine_is_bound_to_one_node_and_its_model_locked(served: Box, user: str) -> None:
    up(served, user, *BOUND)
    found = results(served.json(user, "verify", code=None))["memory"]
    if found["status"] != "ok":
        # The pages of the model are on the other node after an earlier start that was not bound.
        assert "in the page cache already" in found["evidence"]
        # stackctl reads a model as small as this one completely, so the remedy runs on the right
        # node.
        served.run(user, "taskset", "--cpu-list", CPUS, "sh", "-c", found["remedy"])
    pid = engine(served, user)
    status = served.status(pid)
    assert (status["Cpus_allowed_list"], status["Mems_allowed_list"]) == (CPUS, NODE)
    assert locked(status) in (PAGES - 1, PAGES), status["VmLck"]
    assert set(served.pages(pid)) == {NODE}
    assert proven(served, user) >= {"cpus", "memory", "locked"}


@pytest.mark.parametrize("user", [SERVICE_USER, "root"])
def test_an_engine_is_spread_over_two_nodes(served: Box, user: str) -> None:
    up(served, user, *SPREAD)
    pid = engine(served, user)
    status = served.status(pid)
    assert (status["Cpus_allowed_list"], status["Mems_allowed_list"]) == ("0-1", "0-1")
    assert locked(status) in (PAGES - 1, PAGES), status["VmLck"]
    pages = served.pages(pid)
    assert set(pages) == {"0", "1"}
    # Pages alternate, except for stacks and allocations of single threads.
    assert 0.5 < pages["0"] / pages["1"] < 2, pages
    assert proven(served, user) >= {"cpus", "memory", "locked"}


def up(box: Box, user: str, *options: str) -> None:
    """Start the user's stack; root's has another port than the service user's."""
    port = ("--set", "port=8090") if user == "root" else ()
    box.run(
        user, "stackctl", "up", "cpu-latency", "--yes", "--model", MODELS[user], *port, *options
    )


def engine(box: Box, user: str) -> str:
    """Return the process of the user's engine, in either slot."""
    names = box.run(user, "podman", "ps", "--format", "{{.Names}}").split()
    (name,) = [name for name in names if re.fullmatch(r"stackctl-cpu(_b)?", name)]
    return box.pid(user, name)


def locked(status: dict[str, str]) -> int:
    """Return the number of pages that a process has locked."""
    return int(status["VmLck"].split()[0]) // 4


def proven(box: Box, user: str) -> set[str]:
    """Check that ``check`` and ``verify`` find no fault; return the names of proven results."""
    assert {one["status"] for one in box.json(user, "check", "cpu")["results"]} == {"ok"}
    found = results(box.json(user, "verify", "cpu"))
    # On an emulated processor threads wait for CPUs. That is a correct finding, no fault of the
    # stack.
    wrong = {name: one for name, one in found.items() if one["status"] in ("fail", "warn")}
    assert not wrong.keys() - {"cores", "threads"}, wrong
    return {name for name, one in found.items() if one["status"] == "ok"}
