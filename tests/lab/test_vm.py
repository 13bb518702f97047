"""A virtual machine with two NUMA nodes, reached as a user reaches a box: what the fast lab lacks.

Run by `make test-vm`. Slow: the processor is emulated.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Sequence

import pytest

from . import trees, vmtrees
from .host import CHECKOUT
from .tinymodel import tiny_model
from .vm import USER, VM

pytestmark = pytest.mark.vm
MODEL = "file:/srv/models/tiny.gguf"
NODE, CPUS = "1", "2-3"
BOUND = ("--set", "placement.policy=bind", "--set", f'placement.nodes="{NODE}"')
PODMAN = "podman crun netavark aardvark-dns passt uidmap catatonit nftables"
#: Where podman finds images that it need not import, by user.
STORAGE = {
    "root": (
        "/etc",
        'runroot = "/run/containers/storage"\ngraphroot = "/var/lib/containers/storage"',
    ),
    USER: (f"/home/{USER}/.config", ""),
}


@pytest.fixture(scope="module")
def vm() -> Iterator[VM]:
    """The machine as it comes: booted, nothing installed."""
    with VM() as booted:
        yield booted


@pytest.fixture(scope="module")
def box(vm: VM) -> VM:
    """With podman and stackctl, and the limits of services as they should be."""
    install = f"apt-get update -qq && apt-get install -qq --no-install-recommends {PODMAN}"
    vm.run(["sh", "-c", f"DEBIAN_FRONTEND=noninteractive; export DEBIAN_FRONTEND; {install}"],
           timeout=1200, check=True)  # fmt: skip
    vm.copy(vmtrees.build_wheels(), "/root/wheels")
    (wheel,) = trees.build_wheel().glob("*.whl")
    vm.copy(wheel, "/root/wheels/")
    script = """
        set -e
        python3 -m venv --without-pip /opt/stackctl
        # Debian's own pip, as a wheel: to unpack it first would double the time.
        set -- /usr/share/python-wheels/pip-*.whl
        /opt/stackctl/bin/python "$1/pip" install -q \
            --no-index --find-links /root/wheels stackctl-inference
        ln -s /opt/stackctl/bin/stackctl /usr/local/bin/
    """
    vm.run(["sh", "-c", script], timeout=900, check=True)
    vm.copy(CHECKOUT / "systemd/user@.service.d", "/etc/systemd/system/")
    for user, (folder, more) in STORAGE.items():
        text = f'[storage]\ndriver = "overlay"\n{more}\n[storage.options]\n'
        text += 'additionalimagestores = ["/srv/store"]\n'
        target = f"{folder}/containers/storage.conf"
        write = f'mkdir -p "{folder}/containers" && cat >{target}'
        vm.run(["sh", "-c", write], user=user, input=text, check=True)
    # A session that began before the limits were raised goes on without them.
    vm.run(["systemctl", "daemon-reload"], check=True)
    vm.run(["sh", "-c", f"loginctl enable-linger {USER}; systemctl restart user@1000"], check=True)
    return vm


def stackctl(vm: VM, user: str, *arguments: str, code: int = 0, timeout: float = 600) -> str:
    """Run this checkout's stackctl here, for that user of the machine; what it prints."""
    words = [sys.executable, "-m", "stackctl", "--host", f"{user}@{vm.host}", *arguments]
    done = vm.client(words, env={"PYTHONPATH": str(CHECKOUT)}, timeout=timeout)
    assert done.returncode == code, f"{words} exited {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


def read(vm: VM, path: str) -> str:
    return vm.run(["cat", path], check=True).stdout


def test_a_stock_machine_with_two_nodes(vm: VM) -> None:
    assert 'VERSION_ID="13"' in read(vm, "/etc/os-release")
    assert "available: 2 nodes (0-1)" in vm.run(["numactl", "--hardware"], check=True).stdout
    controllers = set(read(vm, "/sys/fs/cgroup/cgroup.controllers").split())
    assert controllers >= {"cpuset", "cpu", "io", "memory", "pids"}
    assert vm.run(["sh", "-c", "command -v podman stackctl"]).returncode != 0
    report = json.loads(stackctl(vm, "root", "status", "--json", code=6))
    assert report["message"] == "there is no stackctl on root@vm"


def test_a_host_key_that_is_not_known_is_refused(vm: VM) -> None:
    # The same machine, by an address of which the settings know nothing.
    url = f"ssh://root@127.0.0.1:{vm.port}"
    words = [sys.executable, "-m", "stackctl", "--host", url, "status"]
    done = vm.client(words, env={"PYTHONPATH": str(CHECKOUT)})
    assert done.returncode == 1
    assert f"cannot connect to {url}: Host key verification failed" in done.stderr


def test_probe_sees_both_nodes(box: VM) -> None:
    host = json.loads(stackctl(box, "root", "probe", "--json"))
    nodes = [(node["id"], node["cpus"]) for node in host["cpu"]["numa"]]
    assert nodes == [(0, "0-1"), (1, CPUS)]
    assert "cpuset" in host["tools"]["cgroup_controllers"]


@pytest.mark.parametrize("user", ["root", USER])
def test_an_engine_is_bound_to_one_node_and_its_model_locked(box: VM, user: str) -> None:
    out = stackctl(box, user, "up", "cpu-latency", "--model", MODEL, *BOUND)
    assert out.startswith("cpu is up (generation 1)")
    words = ["podman", "inspect", "--type=container", "--format", "{{.State.Pid}}", "stackctl-cpu"]
    pid = box.run(words, user=user, check=True).stdout.strip()
    status = fields(read(box, f"/proc/{pid}/status").splitlines())
    assert (status["Cpus_allowed_list"], status["Mems_allowed_list"]) == (CPUS, NODE)
    # All of the model in whole pages, but for what comes before its tensors.
    locked, pages = int(status["VmLck"].split()[0]) // 4, -(-len(tiny_model()) // 4096)
    assert pages - 1 <= locked <= pages, status["VmLck"]
    on_nodes = re.findall(r" N(\d)=(\d+)", "\n".join(private(read(box, f"/proc/{pid}/numa_maps"))))
    assert {node for node, _ in on_nodes} == {NODE}
    assert "ok" in stackctl(box, user, "check")
    stackctl(box, user, "down")


def private(lines: str) -> list[str]:
    """Memory of the process itself: files may have been read before, from another node."""
    return [line for line in lines.splitlines() if "anon=" in line]


def fields(lines: Sequence[str]) -> dict[str, str]:
    """NAME: VALUE lines."""
    pairs = (line.partition(":") for line in lines)
    return {name: value.strip() for name, _, value in pairs}
