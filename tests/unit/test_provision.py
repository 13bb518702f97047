"""Making a machine ready, below a folder: planned from facts, made, made once, and taken back."""

from __future__ import annotations

import io
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest
from test_probe_doctor import READY, changed

from stackctl.cli.main import run
from stackctl.errors import StackctlError
from stackctl.machine.lock import record_lock_holder
from stackctl.machine.machine import Machine, RecordedMachine
from stackctl.machine.runner import Completed
from stackctl.provision import apt, changes, facts, firmware_advice, items, self_install
from stackctl.provision.apply import PATH, UndoStore, apply_plans, undo_changes, undo_order
from stackctl.provision.change_text import describe, describe_revert
from stackctl.provision.target_root import TargetRoot
from stackctl.requirements import ITEMS, host_paths, podman
from stackctl.requirements.facts import MachineFacts, ServiceUser, StackNeeds
from stackctl.requirements.kernel_settings import KernelSetting
from stackctl.requirements.user_managers import UserManagerSetting
from stackctl.sources.profiles import Profiles
from stackctl.values.cpu_list import CpuList
from stackctl.values.host import L3, UNLIMITED, CdiSpec, NumaNode
from stackctl.values.profile import Overrides
from stackctl.values.provision import (
    Change,
    EnableChange,
    FileChange,
    ItemPlan,
    PackagesChange,
    PreviousState,
    RecordedChange,
    ReloadChange,
    RestartChange,
    SubidsChange,
    UndoRecord,
)

ROOT = Path(__file__).resolve().parents[2]
NUMA_FILE = host_paths.FILES[host_paths.NUMA]
GOVERNOR = "/sys/devices/system/cpu/cpu{}/cpufreq/scaling_governor"
NODE = "sys/devices/system/node/node"
DEBIAN = 'ID=debian\nVERSION_ID="13"\nPRETTY_NAME="Debian GNU/Linux 13 (trixie)"\n'
#: Two nodes that the kernel balances, swap, and processors that save power.
TWO_NODES = {
    "etc/os-release": DEBIAN,
    "etc/passwd": "root:x:0:0:root:/root:/bin/sh\nann:x:1000:1000::/home/ann:/bin/sh\n",
    "proc/meminfo": "MemTotal: 33554432 kB\n",
    "proc/sys/kernel/numa_balancing": "1\n",
    "proc/sys/vm/swappiness": "60\n",
    "proc/swaps": "Filename Type Size Used Priority\n/swap file 1 0 -2\n",
    "sys/kernel/mm/transparent_hugepage/enabled": "[always] madvise never\n",
    f"{NODE}0/cpulist": "0-1\n",
    f"{NODE}1/cpulist": "2-3\n",
    "sys/devices/system/cpu/online": "0-3\n",
    **{GOVERNOR.format(cpu)[1:]: "powersave\n" for cpu in range(4)},
}
KERNEL = ("numa-balancing", "transparent-hugepages", "swappiness", "governor")


class Heard:
    """What a run told of."""

    def __init__(self) -> None:
        self.steps: list[str] = []

    def step(self, name: str, text: str) -> None:
        self.steps.append(name)

    def progress(self, name: str, text: str, *, elapsed_s: float | None = None) -> None:
        pass


class Place:
    """A machine below a folder, which is looked at, changed and put back."""

    def __init__(self, root: Path, files: dict[str, str]) -> None:
        self.root = root
        for path, text in files.items():
            self.write(path, text)
        self.store = UndoStore(root / PATH[1:])

    @property
    def box(self) -> TargetRoot:
        return TargetRoot(RecordedMachine(self.root), self.root)

    def write(self, path: str, text: str) -> None:
        place = self.root / path.lstrip("/")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text)

    def read(self, path: str) -> str:
        return (self.root / path.lstrip("/")).read_text()

    def files(self) -> dict[str, tuple[str, int]]:
        """Text and mode of every file, and every folder."""
        found = {}
        for path in self.root.rglob("*"):
            text = path.read_text() if path.is_file() else ""
            found[str(path.relative_to(self.root))] = (text, stat.S_IMODE(path.stat().st_mode))
        return found

    def plan(self, *only: str, user: str | None = None) -> dict[str, ItemPlan]:
        seen = facts.read_facts(self.box, self.store, user)
        return {one.item: one for one in items.plan_items(seen, StackNeeds(), only)}

    def apply(self, *only: str) -> list[str]:
        heard = Heard()
        apply_plans(self.box, self.store, tuple(self.plan(*only).values()), "ann", heard)
        return heard.steps

    def undo(self, *only: str) -> tuple[tuple[str, str], ...]:
        return undo_changes(self.box, self.store, lambda item: not only or item in only, Heard())


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path / "box", TWO_NODES)


# Settings of the kernel


def test_settings_are_made_once_and_taken_back(place: Place) -> None:
    before = place.files()
    assert {one.status for one in place.plan(*KERNEL).values()} == {"change"}
    # Looking changes nothing.
    assert place.files() == before
    assert place.apply(*KERNEL) == list(KERNEL)
    assert place.read("/proc/sys/kernel/numa_balancing") == "0\n"
    assert place.read("/proc/sys/vm/swappiness").startswith("10\n")
    assert [place.read(GOVERNOR.format(cpu)) for cpu in range(4)] == ["performance\n"] * 4
    assert "kernel.numa_balancing = 0" in place.read(NUMA_FILE)
    assert (place.root / PATH[1:]).stat().st_mode & 0o777 == 0o600
    assert {one.status for one in place.plan(*KERNEL).values()} == {"ok"}
    assert place.apply(*KERNEL) == []
    assert place.undo() == ()
    after = place.files()
    for path in ("var", "var/lib"):
        after.pop(path)
    # The kernel would show all the choices, a file only what was written.
    pages = "sys/kernel/mm/transparent_hugepage/enabled"
    assert (after.pop(pages)[0], before.pop(pages)[0]) == ("always\n", TWO_NODES[pages])
    assert after == before


def test_one_item_can_be_taken_back_alone(place: Place) -> None:
    place.apply(*KERNEL)
    place.undo("numa-balancing")
    assert place.read("/proc/sys/kernel/numa_balancing").startswith("1\n")
    assert not (place.root / NUMA_FILE[1:]).exists()
    assert place.read("/proc/sys/vm/swappiness").startswith("10\n")
    assert {one.item for one in place.store.read().changes} == set(KERNEL) - {"numa-balancing"}


def test_a_machine_that_needs_nothing_gets_no_file(tmp_path: Path) -> None:
    calm = {
        "proc/sys/kernel/numa_balancing": "0\n",
        "sys/kernel/mm/transparent_hugepage/enabled": "always madvise [never]\n",
        "proc/swaps": "Filename Type Size Used Priority\n",
    }
    governors = {path: "performance\n" for path in TWO_NODES if path.endswith("governor")}
    place = Place(tmp_path / "box", TWO_NODES | calm | governors)
    found = place.plan(*KERNEL)
    assert {name: one.status for name, one in found.items()} == {
        "numa-balancing": "ok", "transparent-hugepages": "ok", "swappiness": "skip",
        "governor": "ok",
    }  # fmt: skip
    shutil.rmtree(place.root / f"{NODE}1")
    assert "one NUMA node" in (place.plan("numa-balancing")["numa-balancing"].now or "")


@pytest.mark.parametrize(
    ("path", "line", "status"),
    [
        ("etc/sysctl.d/10-site.conf", "kernel.numa_balancing=1", "refused"),
        ("etc/sysctl.conf", "kernel/numa_balancing = 1", "refused"),
        ("etc/sysctl.d/99-site.conf", "-kernel.numa_balancing = 0", "change"),
        ("etc/sysctl.d/99-site.conf", "# kernel.numa_balancing = 1", "change"),
        ("usr/lib/sysctl.d/50-default.conf", "kernel.numa_balancing = 1", "change"),
        ("usr/lib/sysctl.d/99-late.conf", "kernel.numa_balancing = 1", "refused"),
    ],
)
def test_what_others_set_is_not_overruled(place: Place, path: str, line: str, status: str) -> None:
    place.write(path, f"vm.dirty_ratio = 20\n{line}\n")
    found = place.plan("numa-balancing")["numa-balancing"]
    assert found.status == status
    if status == "refused":
        assert f"/{path}:2 sets kernel.numa_balancing to 1" in (found.problem or "")
        place.apply("numa-balancing")
        assert place.read("/proc/sys/kernel/numa_balancing") == "1\n"
        assert not (place.root / NUMA_FILE[1:]).exists()
    elif "= 0" in line:
        # Somebody else saw to the next boot: only what holds until then is missing.
        assert [type(change).__name__ for change in found.changes] == ["SettingChange"]


def test_a_masked_file_sets_nothing(place: Place) -> None:
    place.write("usr/lib/sysctl.d/99-late.conf", "kernel.numa_balancing = 1\n")
    assert place.plan("numa-balancing")["numa-balancing"].status == "refused"
    place.write("etc/sysctl.d/99-late.conf", "# masked by the administrator\n")
    assert place.plan("numa-balancing")["numa-balancing"].status == "change"


def test_an_upgraded_package_is_not_one_that_provisioning_added() -> None:
    simulation = (
        "Inst libsubid4 [1:4.13-1] (1:4.13-2 Debian:12.5/stable [amd64]) []\n"
        "Inst uidmap (1:4.13-2 Debian:12.5/stable [amd64])\n"
        "Conf uidmap (1:4.13-2 Debian:12.5/stable [amd64])\n"
    )
    assert apt.new_packages(simulation) == ("uidmap",)


def test_a_file_in_our_place_is_shown_and_left(place: Place) -> None:
    place.write(NUMA_FILE, "# mine\nvm.max_map_count = 1\n")
    found = place.plan("numa-balancing")["numa-balancing"]
    assert found.status == "refused"
    assert f"{NUMA_FILE} is not stackctl's" in (found.problem or "")
    assert "-vm.max_map_count = 1" in (found.problem or "")
    assert found.remedy is not None
    assert f"rm {NUMA_FILE}" in found.remedy
    assert place.apply("numa-balancing") == []
    assert place.read(NUMA_FILE) == "# mine\nvm.max_map_count = 1\n"


def test_our_own_older_text_is_brought_up_to_date(place: Place) -> None:
    place.apply("numa-balancing")
    older = "# of an older stackctl\nkernel.numa_balancing = 0\n"
    record = place.store.read()
    first, *rest = record.changes
    first = msgspec.structs.replace(
        first,
        change=msgspec.structs.replace(first.change, text=older),
    )
    place.store._write([first, *rest])
    place.write(NUMA_FILE, older)
    place.write("/proc/sys/kernel/numa_balancing", "1\n")
    assert place.plan("numa-balancing")["numa-balancing"].status == "change"
    place.apply("numa-balancing")
    assert place.undo() == ()
    assert not (place.root / NUMA_FILE[1:]).exists()


def test_what_was_changed_since_stays(place: Place) -> None:
    place.apply("numa-balancing")
    place.write(NUMA_FILE, "kernel.numa_balancing = 1\n")
    ((item, why),) = place.undo()
    assert (item, NUMA_FILE in why, "changed since" in why) == ("numa-balancing", True, True)
    assert place.read(NUMA_FILE) == "kernel.numa_balancing = 1\n"
    # And is told again, until somebody decides.
    assert [one.item for one in place.store.read().changes] == ["numa-balancing"]
    (place.root / NUMA_FILE[1:]).unlink()
    assert place.undo() == ()
    assert place.store.read() == UndoRecord()


def test_a_processor_that_vanishes(place: Place) -> None:
    plans = tuple(place.plan("governor", "swappiness").values())
    shutil.rmtree((place.root / GOVERNOR.format(2)[1:]).parent)
    with pytest.raises(StackctlError) as raised:
        apply_plans(place.box, place.store, plans, "ann", Heard())
    assert f"{GOVERNOR.format(2)} is gone since it was looked at" in raised.value.message
    assert "goes on from here" in (raised.value.hint or "")
    # What came before it is done; the rest is done next time, with what there is now.
    assert place.plan("swappiness")["swappiness"].status == "ok"
    assert place.apply("governor", "swappiness") == ["governor"]
    assert place.undo() == ()
    assert place.read(GOVERNOR.format(0)).startswith("powersave\n")


def test_a_read_only_kernel_file_belongs_to_another_machine(place: Place) -> None:
    seen = facts.read_facts(place.box, place.store, None)
    fixed = {path: replace(one, writable=False) for path, one in seen.settings.items()}
    found = {
        one.item: one
        for one in items.plan_items(replace(seen, settings=fixed), StackNeeds(), KERNEL)
    }
    assert {one.status for one in found.values()} == {"skip"}
    assert "the machine it runs on" in (found["numa-balancing"].now or "")


def test_the_kernel_s_own_files_are_read() -> None:
    """Which refuse more than a few MiB of room, as a file never does."""
    assert (TargetRoot(Machine()).kernel_value(host_paths.SWAPPINESS_SETTING) or "").isdecimal()


# The record


def test_what_was_there_first_is_what_comes_back(place: Place) -> None:
    """A crash between the record and the change, and a second run that finds half of it."""
    plan = place.plan("numa-balancing")["numa-balancing"]
    place.store.path.parent.mkdir(parents=True)
    first = RecordedChange(item="numa-balancing", change=plan.changes[1], when="t", user="ann")
    first = msgspec.structs.replace(
        first, before=msgspec.structs.replace(first.before, values=("1",))
    )
    place.store.add(first)
    place.write("/proc/sys/kernel/numa_balancing", "0\n")
    again = msgspec.structs.replace(
        first, before=msgspec.structs.replace(first.before, values=("0",))
    )
    place.store.add(again)
    place.undo()
    assert place.read("/proc/sys/kernel/numa_balancing").startswith("1\n")


def test_a_damaged_record_is_not_passed_over(place: Place) -> None:
    place.write(PATH, '{"schema": "stackctl.provisioned/2", "changes": []}')
    with pytest.raises(StackctlError, match="record of provisioning cannot be read"):
        place.store.read()


def test_stackctl_itself_goes_last(place: Place) -> None:
    from stackctl.values.provision import ProgramChange

    for item, change in (
        ("stackctl", ProgramChange(folder="/usr/local/lib/stackctl", link="/usr/local/bin/s")),
        ("guard", FileChange(path="/etc/x", text="x")),
        ("models", FileChange(path="/etc/y", text="y")),
    ):
        place.store.add(RecordedChange(item=item, change=change, when="t", user="ann"))
    done = undo_order(place.store, lambda _: True)
    assert [one.item for one in done] == ["models", "guard", "stackctl"]
    # And not before the rest: who else would take it back?
    place.write("/etc/y", "changed since")
    kept = dict(place.undo())
    assert kept.keys() == {"models", "stackctl"}
    assert "--undo --only stackctl" in kept["stackctl"]
    assert place.undo("stackctl") == ()
    (place.root / "etc/y").unlink()
    assert place.undo() == ()
    assert place.store.read() == UndoRecord()


# Users


@pytest.mark.parametrize(
    ("subuid", "first"),
    [
        ("", 100000),
        ("bob:100000:65536\n", 165536),
        ("bob:165536:65536\n", 100000),
        ("bob:120000:65536\ncarl:185536:1000\n", 186536),
        ("ann:100000:1000\n", 101000),
        ("ann:100000:65536\n", None),
        ("1000:300000:70000\n", None),
    ],
)
def test_subordinate_ids_that_nobody_has(place: Place, subuid: str, first: int | None) -> None:
    place.write("etc/subuid", subuid)
    place.write("etc/subgid", "ann:500000:65536\n")
    found = place.plan("subids", user="ann")["subids"]
    if first is None:
        assert found.status == "ok"
        return
    assert found.changes == (SubidsChange(user="ann", uid=first),)
    apply_plans(place.box, place.store, (found,), "ann", Heard())
    assert f"ann:{first}:65536" in place.read("etc/subuid").splitlines()
    assert place.plan("subids", user="ann")["subids"].status == "ok"
    place.undo()
    assert place.read("etc/subuid") == subuid
    assert place.read("etc/subgid") == "ann:500000:65536\n"


def ann(**changes: Any) -> ServiceUser:
    return ServiceUser(
        "ann", uid=1000, running=True, memlock_bytes=8 << 20, memlock_next=8 << 20,
        controllers=("cpu",), controllers_next=("cpu",), **changes,
    )  # fmt: skip


def seen(**changes: Any) -> MachineFacts:
    shipped = {name: (ROOT / "systemd" / name).read_text() for name in host_paths.FILES}
    known: dict[str, Any] = {
        "host": READY, "families": ("debian",), "release": "13", "packages": {}, "may_raise": True,
        "memlock_reachable": UNLIMITED, "root_controllers": ("cpuset", "cpu"), "user": ann(),
        "shipped": shipped, "files": dict.fromkeys(host_paths.FILES.values()),
    }  # fmt: skip
    return MachineFacts(**(known | changes))


def item(name: str, needs: StackNeeds | None = None, **changes: Any) -> ItemPlan:
    (found,) = items.plan_items(seen(**changes), needs or StackNeeds(), (name,))
    return found


def test_limits_of_user_services() -> None:
    for name in ("memlock", "cpuset"):
        found = item(name)
        assert (found.status, found.effect) == ("change", "login")
        assert isinstance(found.changes[0], FileChange)
        assert item(name, user=None).status == "skip"
        # Asked for by name it is done, for whoever will log in.
        assert item(name, StackNeeds(named=frozenset([name])), user=None).status == "change"
    assert item("memlock", StackNeeds(memlock=False)).status == "skip"
    cannot = item("memlock", may_raise=False, memlock_reachable=8 << 20)
    assert "CAP_SYS_RESOURCE" in (cannot.now or "")
    assert "no cpuset" in (item("cpuset", root_controllers=("cpu",)).now or "")


def test_limits_that_wait_for_a_login() -> None:
    raised = replace(ann(), memlock_next=UNLIMITED, controllers_next=("cpu", "cpuset"))
    facts_now = seen(user=raised)
    assert item("memlock", user=raised).status == "ok"
    assert items.pending_until_login(facts_now) == (
        "cpuset", "memlock (8 MiB at most now, without limit then)",
    )  # fmt: skip
    assert items.pending_until_login(seen(user=replace(raised, running=False))) == ()
    assert items.pending_until_login(seen(user=ann())) == ()
    # systemd has not read the file yet: it must, before it is said to be done.
    stale = item("memlock", user=replace(raised, stale=True))
    assert stale.status == "change"


def test_limits_that_a_person_has_set(place: Place) -> None:
    folder = "etc/systemd/system/user@.service.d"
    place.write(f"{folder}/50-site.conf", "[Service]\nLimitMEMLOCK=64M\n")
    found = place.plan("memlock", user="ann")["memlock"]
    assert found.status == "refused"
    assert f"/{folder}/50-site.conf:2 sets LimitMEMLOCK to 64M" in (found.problem or "")
    place.write(f"{folder}/50-site.conf", "[Service]\nLimitMEMLOCK=infinity\n")
    assert not any(
        isinstance(one, FileChange) for one in place.plan("memlock", user="ann")["memlock"].changes
    )


# Software


@pytest.mark.parametrize(
    ("release", "version", "status", "words"),
    [
        (("debian", "12"), None, "refused", "upgrade to Debian 13"),
        (("debian", "12"), "4.3.1", "refused", "upgrade to Debian 13"),
        (("ubuntu", "22.04"), None, "refused", "upgrade to Debian 13, Ubuntu 24.04"),
        (("debian", "13"), None, "change", "passt"),
        (("ubuntu", "24.04"), None, "change", "slirp4netns"),
        (("fedora", "42"), None, "refused", "install podman 4.7 or newer"),
        (("fedora", "38"), "4.6.2", "refused", "install podman 4.7 or newer"),
        (("fedora", "42"), "5.5.1", "ok", ""),
        (("debian", "12"), "5.5.1", "ok", ""),
        (("debian", "12"), "5.5.1 built", "change", "dbus-user-session"),
    ],
)
def test_podman_by_distribution(
    release: tuple[str, str], version: str | None, status: str, words: str
) -> None:
    built = version is not None and version.endswith("built")
    host = changed(tools={"podman": version, "os": " ".join(release)})
    family, number = release
    packages: dict[str, str] | None = None if family == "fedora" else {}
    if version and packages is not None and not built:
        packages = dict.fromkeys(podman.packages((family,), number, version), version)
    found = item("podman", host=host, families=(family,), release=number, packages=packages)
    assert found.status == status
    if status == "refused":
        assert words in (found.remedy or "")
    if status == "change":
        (change,) = found.changes
        assert isinstance(change, PackagesChange)
        assert {"uidmap", words} <= set(change.names)
        assert ("podman" in change.names) != built


@pytest.mark.parametrize(
    ("release", "offered", "status"),
    [
        # Derivatives of old releases have numbers of their own.
        (("linuxmint", "21.3"), "3.4.4+ds1-1ubuntu1.22.04.3", "refused"),
        (("raspbian", "12"), "4.3.1+ds1-8+deb12u1", "refused"),
        (("linuxmint", "22"), "4.9.3+ds1-1ubuntu0.2", "change"),
        # A package source of the administrator's has a newer one.
        (("debian", "12"), "5.4.2+ds1-2", "change"),
    ],
)
def test_the_podman_that_the_package_sources_have(
    release: tuple[str, str], offered: str, status: str
) -> None:
    host = changed(tools={"podman": None, "os": " ".join(release)})
    found = item(
        "podman", host=host, families=(release[0], "ubuntu", "debian"), release=release[1],
        packages={}, podman_candidate=offered,
    )  # fmt: skip
    assert found.status == status
    if status == "refused":
        assert f"its podman {offered} is too old" in (found.problem or "")
        assert "upgrade to Debian 13" in (found.remedy or "")


@pytest.mark.parametrize("version", ["4.9.3+ds1-1ubuntu0.2", "100:4.9.3+ds1-1ubuntu0.2"])
def test_the_version_of_a_candidate_has_no_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    said = f"podman:\n  Installed: (none)\n  Candidate: {version}\n  Version table:\n"
    box = TargetRoot(Machine(), tmp_path)
    monkeypatch.setattr(TargetRoot, "query", lambda *words: Completed(words[1:], 0, said, ""))
    assert facts._candidate(box, "podman") == "4.9.3+ds1-1ubuntu0.2"


@pytest.mark.parametrize(
    ("said", "message", "hint"),
    [
        (
            "E: Could not get lock /var/lib/dpkg/lock-frontend. It is held by process 812 (apt)",
            "at work on something else", "wait",
        ),
        ("E: Unable to locate package podman", "cannot be fetched", "package source"),
        (
            "E: Failed to fetch http://mirror/x.deb  Temporary failure resolving 'mirror'",
            "cannot be fetched", "connect this machine",
        ),
        ("E: You don't have enough free space in /var/cache/apt/archives/.", "too full", "df -h"),
        ("E: dpkg was interrupted, you must manually run 'dpkg --configure -a'", "cut off",
         "dpkg --configure -a"),
        ("dpkg: error: unable to open: Read-only file system", "read-only", "remount"),
        ("E: Something nobody has seen", "apt-get failed (exit 100)", "correct the fault"),
    ],
)  # fmt: skip
def test_refusals_of_the_package_manager(said: str, message: str, hint: str) -> None:
    error = apt._failure(Completed(("apt-get", "install", "podman"), 100, "", said + "\n"))
    assert message in error.message
    assert hint in (error.hint or "")
    assert int(error.exit_code) == 6
    assert any(said in line for line in error.details)


def test_the_driver_is_held() -> None:
    here = {"nvidia-driver-580": "1", "libnvidia-compute-580": "1", "nvidia-settings": "1",
            "nvidia-container-toolkit": "1", "libc6": "1"}  # fmt: skip
    found = item("driver-hold", packages=here, held=frozenset(["nvidia-settings"]))
    (change,) = found.changes
    assert getattr(change, "names", None) == ("libnvidia-compute-580", "nvidia-driver-580")
    assert item("driver-hold", packages={"libc6": "1"}).status == "skip"
    assert item("driver-hold", StackNeeds(gpu=False), packages=here).status == "skip"


def test_stackctl_is_copied_and_runs_alone(tmp_path: Path) -> None:
    folder = tmp_path / "lib" / "stackctl"
    folder.parent.mkdir()
    self_install.install_program(folder)
    done = subprocess.run(
        ["env", "-i", "PATH=/usr/bin:/bin", str(folder / "bin/stackctl"), "profiles"],
        cwd="/", capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "cpu-latency" in done.stdout
    assert self_install.is_current(folder)
    # Run from there, it is what is there.
    code = "import sys; sys.path.insert(0, sys.argv[1] + '/lib');" + (
        "from pathlib import Path; from stackctl.provision import self_install as p;"
        "print(p.is_current(Path(sys.argv[1])))"
    )
    words = [sys.executable, "-I", "-S", "-c", code, str(folder)]
    assert subprocess.check_output(words, text=True, timeout=60) == "True\n"
    names = {path.name for path in (folder / "lib").iterdir()}
    assert {"stackctl", "msgspec", "click"} <= names
    assert not {"pytest", "mypy", "ruff"} & names
    # Installed again it is one, not two in one.
    (folder / "lib" / "stray").write_text("x")
    self_install.install_program(folder)
    assert not (folder / "lib" / "stray").exists()
    assert [path.name for path in folder.parent.iterdir()] == ["stackctl"]
    (folder / "fingerprint").write_text("another\n")
    assert not self_install.is_current(folder)


def test_a_copy_that_others_can_write_is_replaced(place: Place) -> None:
    """The link, its folders and each file count: the program imports all of the copy's files."""
    folder = place.root / host_paths.PROGRAM_FOLDER[1:]
    folder.parent.mkdir(parents=True)
    self_install.install_program(folder)
    link = place.root / host_paths.LINK[1:]
    link.parent.mkdir(parents=True)
    link.symlink_to(folder / "bin/stackctl")
    assert place.plan("stackctl")["stackctl"].status == "ok"
    module = folder / "lib/stackctl/errors.py"
    for weak in (module, module.parent, folder, folder / "bin/stackctl"):
        mode = weak.stat().st_mode
        weak.chmod(mode | stat.S_IWOTH)
        found = place.plan("stackctl")["stackctl"]
        weak.chmod(mode)
        assert found.status == "change"
        assert f"{weak} can be written by everybody" in (found.now or "")
    # A new copy would not change the folder around it.
    folder.parent.chmod(0o777)
    found = place.plan("stackctl")["stackctl"]
    assert found.status == "refused"
    assert f"{folder.parent} can be written by everybody" in (found.problem or "")


def test_a_lock_of_another_program_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "lock-frontend"
    path.touch()
    assert record_lock_holder(path) is None
    code = (
        "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX);"
        "print(flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        other.stdout.readline()
        assert record_lock_holder(path) == other.pid
        other.communicate()
    assert record_lock_holder(path) is None


# GPUs


NO_CDI = {"tools": {"cdi": ()}}


@pytest.mark.parametrize(
    ("changes", "status", "units"),
    [
        ({"toolkit": None}, "refused", ()),
        ({"toolkit": "1.18.1-1"}, "change",
         ("nvidia-cdi-refresh.path", "nvidia-cdi-refresh.service")),
        ({"toolkit": "1.17.8-1"}, "change", ("stackctl-cdi-refresh.service",)),
        ({"packages": {host_paths.TOOLKIT: "1.17.8-1"}}, "change", ("stackctl-cdi-refresh.service",
                )),
        (
            {"packages": {host_paths.TOOLKIT: "1.18.0-1"},
             "enabled": frozenset(["nvidia-cdi-refresh.path", "nvidia-cdi-refresh.service"])},
            "refused", (),
        ),
    ],
)  # fmt: skip
def test_the_cdi_file_is_made_anew_at_each_boot(
    changes: dict[str, Any], status: str, units: Sequence[str]
) -> None:
    host = changed(**NO_CDI)
    host = msgspec.structs.replace(host, gpus=(msgspec.structs.replace(host.gpus[0], cdi=None),))
    found = item("cdi", host=host, **changes)
    assert found.status == status
    started = [one.unit for one in found.changes if isinstance(one, EnableChange)]
    assert started == list(units)
    files = [one.path for one in found.changes if isinstance(one, FileChange)]
    ours = "stackctl-cdi-refresh.service" in units
    assert (host_paths.FILES[host_paths.CDI_SERVICE] in files) == ours
    # The toolkit's own service is set up for this podman (4.9.3) before it first runs.
    assert (DROP_IN in files) == ("nvidia-cdi-refresh.service" in units)
    brought = any(isinstance(one, PackagesChange) for one in found.changes)
    assert brought == (changes.get("toolkit") is not None)


DROP_IN = host_paths.FILES[host_paths.CDI_DROP_IN]
REFRESH = frozenset(["nvidia-cdi-refresh.path", "nvidia-cdi-refresh.service"])
GIDS = CdiSpec(
    path="/run/cdi/nvidia.yaml",
    devices=("nvidia.com/gpu=0",),
    code="additional-gids",
    problem="it has additionalGids (CDI 0.7.0), which podman 4.9.3 cannot parse",
)


@pytest.mark.parametrize(
    ("podman_version", "packages"),
    [
        ("4.9.3", {host_paths.TOOLKIT: "1.19.0-1"}),
        ("4.7.2", {host_paths.TOOLKIT: "1.19.1-1"}),
        # Without dpkg the service itself shows that the toolkit is there.
        ("4.9.4", None),
    ],
)
def test_the_toolkit_writes_what_old_podman_parses(
    podman_version: str, packages: dict[str, str] | None
) -> None:
    host = changed(tools={"cdi": (GIDS,), "podman": podman_version})
    host = msgspec.structs.replace(host, gpus=(msgspec.structs.replace(host.gpus[0], cdi=None),))
    known: dict[str, Any] = {"host": host, "packages": packages}
    known |= {"enabled": REFRESH, "units": REFRESH}
    found = item("cdi", None, **known)
    drop_in, reload, restart = found.changes
    assert isinstance(drop_in, FileChange)
    assert drop_in.path == "/etc/systemd/system/nvidia-cdi-refresh.service.d/10-stackctl.conf"
    flags = "NVIDIA_CTK_CDI_GENERATE_FEATURE_FLAGS=no-additional-gids-for-device-nodes"
    assert f"\n[Service]\nEnvironment={flags}\n" in drop_in.text
    assert (reload, restart) == (ReloadChange(), RestartChange(unit="nvidia-cdi-refresh.service"))
    assert describe(restart, seen()).command == "systemctl restart nvidia-cdi-refresh.service"
    # A drop-in of somebody else is shown, and one that is there is no reason for another restart.
    files = dict.fromkeys(host_paths.FILES.values())
    other = item("cdi", None, **known, files=files | {DROP_IN: "[Service]\n"})
    assert (other.status, DROP_IN in (other.problem or "")) == ("refused", True)
    there = item("cdi", None, **known, files=files | {DROP_IN: drop_in.text})
    assert (there.status, "journalctl -u nvidia" in (there.remedy or "")) == ("refused", True)


@pytest.mark.parametrize(
    ("line", "status", "words"),
    [
        ("# NVIDIA_CTK_CDI_GENERATE_FEATURE_FLAGS=x", "change", ""),
        ("NVIDIA_CTK_CDI_OUTPUT_FILE_PATH=/x", "change", ""),
        ("NVIDIA_CTK_CDI_GENERATE_FEATURE_FLAGS=disable-nvsandboxutils", "refused",
         f"{host_paths.CDI_VARIABLES}:2 sets NVIDIA_CTK_CDI_GENERATE_FEATURE_FLAGS to disable-nv"),
        # The line is right, so something else is wrong.
        ('NVIDIA_CTK_CDI_GENERATE_FEATURE_FLAGS="a,no-additional-gids-for-device-nodes"',
         "refused", "nvidia-cdi-refresh.service runs, and yet"),
        # The last line counts, for example one that the remedy has appended.
        ("NVIDIA_CTK_CDI_GENERATE_FEATURE_FLAGS=x\n"
         "NVIDIA_CTK_CDI_GENERATE_FEATURE_FLAGS=no-additional-gids-for-device-nodes",
         "refused", "nvidia-cdi-refresh.service runs, and yet"),
    ],
)  # fmt: skip
def test_variables_of_the_toolkit_that_somebody_set(
    place: Place, line: str, status: str, words: str
) -> None:
    place.write(host_paths.CDI_VARIABLES, f"# The toolkit's own.\n{line}\n")
    host = changed(tools={"cdi": (GIDS,)})
    host = msgspec.structs.replace(host, gpus=(msgspec.structs.replace(host.gpus[0], cdi=None),))
    found = item(
        "cdi", host=host, packages={host_paths.TOOLKIT: "1.19.1-1"}, enabled=REFRESH, units=REFRESH,
        foreign=facts.read_facts(place.box, place.store, None).foreign,
    )  # fmt: skip
    assert (found.status, words in (found.problem or "")) == (status, True)


def test_our_service_is_restarted_when_its_text_changes() -> None:
    host = changed(tools={"cdi": (GIDS,)})
    host = msgspec.structs.replace(host, gpus=(msgspec.structs.replace(host.gpus[0], cdi=None),))
    path, unit = host_paths.FILES[host_paths.CDI_SERVICE], "stackctl-cdi-refresh.service"
    found = item(
        "cdi", host=host, packages={host_paths.TOOLKIT: "1.17.8-1"}, enabled=frozenset([unit]),
        files=dict.fromkeys(host_paths.FILES.values()) | {path: "old"}, written={path: "old"},
    )  # fmt: skip
    file, *then = found.changes
    assert isinstance(file, FileChange)
    assert "no-additional-gids-for-device-nodes" in file.text
    assert then == [ReloadChange(), RestartChange(unit=unit)]


def test_our_service_beside_the_toolkit_s_is_set_up_too() -> None:
    # The toolkit was updated under a service of an earlier stackctl, which runs at each boot, too.
    host = changed(tools={"cdi": (GIDS,)})
    host = msgspec.structs.replace(host, gpus=(msgspec.structs.replace(host.gpus[0], cdi=None),))
    path, unit = host_paths.FILES[host_paths.CDI_SERVICE], "stackctl-cdi-refresh.service"
    found = item(
        "cdi", host=host, packages={host_paths.TOOLKIT: "1.19.1-1"}, units=REFRESH | {unit},
        enabled=REFRESH | {unit}, written={path: "old"},
        files=dict.fromkeys(host_paths.FILES.values()) | {path: "old"},
    )  # fmt: skip
    *files, reload, restart = found.changes
    assert [one.path for one in files if isinstance(one, FileChange)] == [DROP_IN, path]
    assert (reload, restart) == (ReloadChange(), RestartChange(unit="nvidia-cdi-refresh.service"))


@pytest.mark.parametrize("version", ["5.1.0", "5.4.2"])
def test_new_podman_gets_what_the_toolkit_writes(version: str) -> None:
    host = changed(tools={"cdi": (), "podman": version})
    host = msgspec.structs.replace(host, gpus=(msgspec.structs.replace(host.gpus[0], cdi=None),))
    found = item("cdi", host=host, toolkit="1.19.1-1")
    assert not any(isinstance(one, FileChange) for one in found.changes)
    # A podman that is still to be installed counts too.
    bare = msgspec.structs.replace(host, tools=msgspec.structs.replace(host.tools, podman=None))
    for candidate, written in (("4.9.3+ds1-1ubuntu0.2", True), ("5.4.2+ds1-2", False)):
        found = item("cdi", host=bare, toolkit="1.19.1-1", podman_candidate=candidate)
        assert any(isinstance(one, FileChange) for one in found.changes) == written


@pytest.mark.parametrize(
    ("family", "release", "version", "network"),
    [
        ("debian", "13", "5.4.2+ds1-2", "passt"),
        ("debian", "13", "4.9.3", "slirp4netns"),
        ("linuxmint", "22", "4.9.3+ds1-1ubuntu0.2", "slirp4netns"),
        ("ubuntu", "24.04", "5.0.3", "passt"),
        ("ubuntu", "24.04", None, "slirp4netns"),
        ("ubuntu", "25.10", None, "passt"),
    ],
)
def test_the_network_of_a_rootless_podman(
    family: str, release: str, version: str | None, network: str
) -> None:
    wanted = podman.packages((family, "ubuntu", "debian"), release, version)
    assert [name for name in wanted if name in ("passt", "slirp4netns")] == [network]


def test_a_cdi_file_of_somebody_else_is_left() -> None:
    stale = CdiSpec(
        path="/etc/cdi/nvidia.yaml",
        code="other-driver",
        problem="it is for driver 570, loaded is 580",
    )
    host = changed(tools={"cdi": (stale,)})
    found = item("cdi", host=host, toolkit="1.18.0")
    assert found.status == "refused"
    assert "it is for driver 570" in (found.problem or "")
    assert "rm /etc/cdi/nvidia.yaml" in (found.remedy or "")
    # One that works is as good as ours.
    assert item("cdi").status == "ok"
    assert item("cdi", StackNeeds(gpu=False), host=host).status == "skip"


def test_no_driver_and_selinux() -> None:
    gpu = msgspec.structs.replace(READY.gpus[0], driver=None)
    found = item("cdi", host=msgspec.structs.replace(READY, gpus=(gpu,)))
    assert (found.status, "reboot" in (found.remedy or "")) == ("refused", True)
    assert item("cdi", host=msgspec.structs.replace(READY, gpus=())).status == "skip"
    enforcing = changed(tools={"selinux": "enforcing"})
    refused = item("selinux", host=enforcing)
    assert (refused.status, refused.remedy) == (
        "refused", "sudo setsebool -P container_use_devices=true",
    )  # fmt: skip
    assert item("selinux").status == "skip"


# StackNeeds, advice, texts


def test_what_profiles_need() -> None:
    profiles = Profiles((ROOT / "profiles",))

    def of(*names: str) -> StackNeeds:
        return items.needs_of_profiles(
            [profiles.resolve(name, Overrides()) for name in names], READY, ()
        )

    assert of() == StackNeeds(cpuset=False)
    assert of("cpu-latency") == StackNeeds(gpu=False, cpuset=False)
    assert of("gpu-nvfp4") == StackNeeds(memlock=False, cpuset=False)
    assert of("gpu-nvfp4", "cpu-latency") == StackNeeds(cpuset=False)
    assert not of("cpu-vllm").gpu


def test_firmware_is_spoken_of_and_never_touched() -> None:
    l3 = tuple(L3(id=n, bytes=32 << 20, cpus=CpuList([n])) for n in range(16))
    nodes = tuple(NumaNode(id=n, cpus=CpuList([n])) for n in range(16))
    one = changed(
        cpu={"model": "AMD EPYC 9175F", "l3": l3, "numa": nodes[:1], "sockets": 1, "smt": False}
    )
    told = {result.name: result.actual for result in firmware_advice.firmware_advice(one)}
    assert told == {
        "bios-l3-as-numa": "off", "bios-nps": "NPS1", "bios-smt": "off",
        "bios-determinism": "not visible from here",
    }  # fmt: skip
    many = changed(cpu={"model": "AMD EPYC 9175F", "l3": l3, "numa": nodes, "sockets": 1})
    assert {r.name: r.actual for r in firmware_advice.firmware_advice(many)}[
        "bios-l3-as-numa"
    ] == "on"
    assert firmware_advice.firmware_advice(changed(cpu={"model": "Intel Xeon", "l3": l3})) == ()


def test_every_item_that_a_fix_names_is_one() -> None:
    named = set()
    for path in (ROOT / "stackctl").rglob("*.py"):
        text = path.read_text()
        named |= set(re.findall(r"provision --only ([a-z-]+)", text))
    assert named >= {"memlock", "cpuset", "cdi"}
    assert named <= set(ITEMS)


def test_every_shipped_file_says_who_installs_it() -> None:
    for name, path in host_paths.FILES.items():
        text = (ROOT / "systemd" / name).read_text()
        assert re.search(r"stackctl provision --only [a-z-]+", text), name
        assert path.startswith("/etc/")


def test_shipped_files_hold_the_values_that_requirements_name() -> None:
    for wanted in ITEMS.values():
        if isinstance(wanted, UserManagerSetting):
            line = f"{wanted.key}={wanted.value}"
        elif isinstance(wanted, KernelSetting):
            sysctl = wanted.file.startswith("sysctl.d/")
            line = f"{wanted.key}{' = ' if sysctl else ' - - - - '}{wanted.value}"
        else:
            continue
        assert line in (ROOT / "systemd" / wanted.file).read_text(), wanted.name


def test_folders_that_podman_made_go_with_its_package(place: Place) -> None:
    change = PackagesChange(names=("podman",))
    place.write("/etc/containers/systemd/mine.container", "")
    absent = ("/var/lib/cni/networks", "/var/lib/cni", "/etc/containers/networks")
    old = PreviousState(folders=absent)
    for path in ("/etc/containers/networks", "/var/lib/cni/networks"):
        (place.root / path[1:]).mkdir(parents=True)
    # A folder that holds something is no reason to leave those after it.
    place.write("/var/lib/cni/networks/x", "")
    assert changes.revert(place.box, change, old) is None
    assert (place.root / "var/lib/cni/networks/x").exists()
    assert not (place.root / "etc/containers/networks").exists()
    assert (place.root / "etc/containers/systemd/mine.container").exists()


def test_every_change_can_be_shown() -> None:
    facts_now = seen(host=changed(tools={"podman": None}), toolkit="1.17")
    for plan in items.plan_items(facts_now, StackNeeds()):
        for change in plan.changes:
            told = describe(change, facts_now)
            assert told.what
            back = describe_revert(change, PreviousState())
            assert back.what
        assert plan.status != "change" or plan.undo


#: A change of every type as stackctl 1 has recorded it, with the description of its undo.
RECORDED = [
    ('{"type":"file","path":"/etc/a","text":"x","mode":420}', "remove /etc/a"),
    ('{"type":"setting","paths":["/proc/sys/a"],"value":"1"}', "set /proc/sys/a: 1 -> "),
    ('{"type":"folder","path":"/srv/a","owner":null}', "remove the folder /srv/a, if it is empty"),
    ('{"type":"packages","names":["a"],"all_names":["a","b"]}', "remove the packages "),
    ('{"type":"hold","names":["a"]}', "release"),
    ('{"type":"account","user":"u","home":"/h"}', "remove the account u, and /h if it is empty"),
    ('{"type":"subids","user":"u","uid":1,"gid":null,"count":65536}', "take 65536 ids from u"),
    ('{"type":"linger","user":"u"}', "services of u end with the last logout"),
    ('{"type":"reload"}', "have systemd read its files again"),
    ('{"type":"restart","unit":"a.service"}', "start a.service again"),
    ('{"type":"enable","unit":"a.service"}', "stop a.service"),
    ('{"type":"program","folder":"/opt/s","link":"/usr/s"}', "remove /opt/s and /usr/s"),
    ('{"type":"guard","user":null,"program":"/p"}', "stop the guard of the system"),
]


def test_changes_recorded_by_earlier_versions_are_understood(tmp_path: Path) -> None:
    ones = (
        f'{{"item":"i","change":{text},"before":{{}},"when":"t","user":"u"}}'
        for text, _ in RECORDED
    )
    path = tmp_path / "provision.json"
    path.write_text(f'{{"schema":"stackctl.provisioned/1","changes":[{",".join(ones)}]}}')
    found = UndoStore(path).read().changes
    assert {type(one.change) for one in found} == set(get_args(Change))
    said = [describe_revert(one.change, one.before).what for one in found]
    assert said == [text for _, text in RECORDED]


def test_an_item_that_does_not_exist() -> None:
    from stackctl.cli.main import run

    assert run(["provision", "--only", "memlok", "--dry-run"]) == 2
    assert run(["provision", "--dry-run", "--service-user", "-x"]) == 2


# Without root


@pytest.mark.parametrize(
    ("arguments", "need", "advises"),
    [
        (("provision",), "provisioning changes the machine, which needs root", True),
        # A dry run of --undo needs root as well, so it is no way out.
        (("provision", "--undo", "--dry-run"), "only root can read the record", False),
        (("provision", "--undo"), "only root can read the record", False),
    ],
)
def test_what_needs_root_says_so(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    need: str,
    advises: bool,
) -> None:
    sudo = tmp_path / "sudo"
    sudo.write_text("#!/bin/sh\nexit 1\n")
    sudo.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    monkeypatch.setattr("sys.stdin", io.StringIO())
    assert run(arguments) == 2
    said = capsys.readouterr().err
    assert need in said
    assert "sudo does not let this user without a password" in said
    assert ("--dry-run shows what it would do" in said) == advises
