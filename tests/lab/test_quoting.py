"""Values of a user reach the started service unchanged, or are refused.

Thousands of values go through our renderer, the real Quadlet generator, systemd and Podman,
hundreds in each started unit. The kernel's view of the process is compared with the original
values.
"""

from __future__ import annotations

import os
import random
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from stackctl.errors import ExitCode, StackctlError
from stackctl.units.render import UnitTarget, render_units, service_name
from stackctl.values.model import Model, ModelFile
from stackctl.values.plan import Claim, MemoryBudget, Placement, Plan, Prediction, Timing, Verdict

from . import look
from .conftest import Seat
from .lab import IMAGE, STORE_USERS, Lab

SEED = int(os.environ.get("STACKCTL_SEED") or time.time_ns() % 10**9)
WORDS = 480  # arguments of each unit, and half as many variables


@dataclass(frozen=True)
class Amount:
    """The number of values that a run tries."""

    user: str
    units: int  # started
    names: int  # units that are only loaded, to test the keys that systemd itself reads
    files: int  # mounted into each started unit


AMOUNTS = (
    pytest.param(Amount("lab", units=2, names=50, files=30), id="lab-few"),
    *(
        pytest.param(
            Amount(user, units=6, names=150, files=60), id=f"{user}-many", marks=pytest.mark.deep
        )
        for user in STORE_USERS
    ),
)

GENERATOR = "/usr/lib/systemd/system-generators/podman-system-generator"
#: Waits, so that its arguments and variables can be read from the kernel.
PROGRAM = ("sh", "-c", "sleep 1000; :", "sh")
KEEP = {"PATH", "HOME", "HOSTNAME", "TERM", "container", "NOTIFY_SOCKET"}

# Each of these is used once unchanged, then parts of them in any order.
ODD = [
    "", " ", "  ", "a b", " a", "a ", "\u00a0a\u00a0", "\u2003", "\u3000x", "\u200b", "\u2028",
    "\u2029", "\ufeff", "\u202e", "é", "模型", "😀", "a\u0301", "\ue000", "\U000f0000", "\u0378",
    "\n", "\r", "\t", "\v", "\f", "\0", "\x01", "\x1b[31m", "\x1f", "\x7f", "\x80", "\x85", "\x9f",
    "\ud800", "\udcff", "\udfff", "\ufdd0", "\ufdef", "\ufffe", "\uffff", "\U0001fffe",
    "\U0010ffff", "\ufffd", '"', '""', '"a', 'a"', '"a b"', "'", "''", "'a", "a'b", "'a b'", "`",
    "`id`", "$(id)", "\\", "\\\\", "a\\", "\\a", "\\n", "\\t", "\\s", "\\x2d", "\\x00", "\\u00e4",
    "\\U0001f600", "\\0", "\\141", "\\;", "\\$", "\\%", '\\"', "\\'", "$", "$$", "$$$", "$HOME",
    "${HOME}", "$${HOME}", "${HOME:-x}", "$HOME/x", "${", "${}", "$1", "$?", "%", "%%", "%h", "%n",
    "%i", "%%h", "%H", "100%", "%z", "a%", "%{x}", ";", ";;", " ;", "; ", "a;b", "; id", "#", "#a",
    "a#", "-", "--", "-x", "--privileged", "--volume=/:/host", "-v", "@", "@/bin/sh", "!", "!!",
    "+", "~", "*", "?", "[", "]", "[Install]", "[Service]", "[Service]\nExecStartPre=/bin/x",
    "[Install]\nX=", "a\nPodmanArgs=--privileged", "ExecStart=/bin/sh", "Image=x", "=", "a=b", "=a",
    "&", "&&", "|", "||", ">", "<", ">/tmp/x", "(", ")", "{", "}", "{{ 7 * 7 }}", "{% raw %}",
    "{a,b}", ":", "a:b", ",", ".", "..", "/", "//", "/etc/passwd", "\\\n", "a\\\nb", "\r\n", "null",
    "true", "0", "x" * 5000, "%" * 500, "$" * 501, "\\" * 777, '"' * 300, "ä" * 3000,
]  # fmt: skip
PARTS = [part for part in ODD if 0 < len(part) < 20] + ["a", "model", "/", " ", "-", "Z9"] * 8
#: The longest argument that the kernel accepts, and one byte more. For a variable the name counts
#: too.
LONG = ["y" * 131071, "y" * 131072, "ü" * 65535, "ü" * 65536]


def odd_values(chance: random.Random, number: int) -> list[str]:
    """Return that many values: every odd one, then mixtures and words of any characters."""
    values = list(ODD[:number])
    while len(values) < number:
        kind = chance.random()
        if kind < 0.7:
            values.append("".join(chance.choices(PARTS, k=chance.randint(1, 6))))
        elif kind < 0.9:
            values.append(
                "".join(map(chr, chance.choices(range(32, 127), k=chance.randint(1, 30))))
            )
        else:
            values.append("".join(chr(chance.randrange(1, 0x110000)) for _ in range(6)))
    return values


def cannot_be_text(value: str) -> bool:
    """Return True if a unit file cannot hold the value: control characters and non-characters."""
    for char in value:
        code = ord(char)
        if code < 32 or 0x7F <= code < 0xA0 or 0xD800 <= code < 0xE000:
            return True
        if 0xFDD0 <= code < 0xFDF0 or code % 0x10000 >= 0xFFFE:
            return True
    return False


def cannot_be_word(value: str) -> bool:
    """Return True if the value cannot be an argument."""
    return cannot_be_text(value) or value in ("", ";") or len(value.encode()) > 131071


def cannot_be_mounted(path: str) -> bool:
    """Return True if the path cannot be a volume.

    The kernel has no such name, or the path contains a colon.
    """
    return cannot_be_text(path) or ":" in path


def plan(
    stack: str,
    words: Iterable[str] = (),
    variables: Iterable[str] = (),
    served: str = "m",
    files: Iterable[str] = (),
    profile: str = "odd",
) -> Plan:
    """Return a plan with these values."""
    return Plan(
        profile=profile,
        stack=stack,
        objective="latency",
        engine="llama.cpp",
        image=IMAGE,
        argv=("engine", *words),
        environment=tuple(variables),
        placement=Placement(),
        memory=MemoryBudget(weights_bytes=1, kv_bytes=0, compute_bytes=0, total_bytes=1),
        prediction=Prediction(),
        verdict=Verdict(),
        decisions=(),
        model=Model(
            source="file:/m.gguf",
            name=served,
            architecture="llama",
            parameters=1,
            weights_bytes=1,
            layers=1,
            files=tuple(ModelFile(path=path, bytes=1) for path in files),
        ),
        served_name=served,
        port=8080,
        timing=Timing(deadline_s=600, ceiling_s=600),
    )


class Desk:
    """A user whose units come directly from the renderer."""

    def __init__(self, seat: Seat, amount: Amount) -> None:
        """Read the version of Podman, on which the text of a unit depends."""
        self.seat = seat
        self.amount = amount
        self.podman = seat.run("podman", "--version").stdout.split()[-1]
        self.refused = 0
        self.running: tuple[str, ...] = ()

    def text(self, made: Plan) -> str:
        """Return the text of the unit of a plan."""
        target = UnitTarget(
            scope="system" if self.seat.user == "root" else "user",
            podman=self.podman,
            image=IMAGE,
            program=PROGRAM,
            claim=Claim(stack=made.stack),
        )
        (file,) = render_units(made, target, 1).files
        return file.text

    def accepted(
        self, values: Sequence[str], made: Callable[[str], Plan], bad: Callable[[str], bool]
    ) -> list[str]:
        """Return the values that a unit accepts; check that the others are refused, and rightly."""
        kept = []
        for value in values:
            try:
                self.text(made(value))
            except StackctlError as error:
                assert bad(value), f"refused: {value!a}: {error.message} (seed {SEED})"
                assert error.exit_code == ExitCode.USAGE
                assert len(error.message) < 600
                assert error.message.isprintable(), repr(error.message)
                self.refused += 1
            else:
                assert not bad(value), f"not refused: {value!a} (seed {SEED})"
                kept.append(value)
        return kept

    def install(self, plans: Sequence[Plan]) -> None:
        """Write the units of these plans and reload systemd."""
        folder = look.lab_path(self.seat.lab, self.seat.units)
        self.seat.run("mkdir", "-p", *(f"{self.seat.units}/{made.stack}" for made in plans))
        for made in plans:
            path = folder / made.stack / f"{made.stack}.container"
            path.write_text(self.text(made), encoding="utf-8")
        self.seat.systemctl("daemon-reload")

    def generated(self) -> dict[str, list[tuple[str, str]]]:
        """Return section and key of each line of the services that the generator makes."""
        scope = [] if self.seat.user == "root" else ["--user"]
        done = self.seat.run(
            GENERATOR, *scope, "--dryrun", env={"QUADLET_UNIT_DIRS": self.seat.units}
        )
        found: dict[str, list[tuple[str, str]]] = {}
        for part in re.split(r"^---(?=\S+---$)", done.stdout, flags=re.MULTILINE)[1:]:
            name, _, text = part.partition("---\n")
            section, keys = "", []
            for line in text.split("\n"):
                assert not line.endswith("\\"), f"a line that goes on: {line!r}"
                if line.startswith("["):
                    section = line
                elif line.strip() and line[0] not in "#;":
                    keys.append((section, line.partition("=")[0]))
            found[name] = sorted(keys)
        return found

    def start(self, plans: Sequence[Plan]) -> dict[str, int]:
        """Start the units of these plans and return the process of each container, by stack."""
        self.running = services = tuple(service_name(made.stack) for made in plans)
        self.seat.systemctl("start", "--no-block", *services)
        found: dict[str, int] = {}

        def started() -> bool:
            words = ("podman", "ps", "--format", "{{.Names}} {{.Pid}}")
            lines = self.seat.run(*words).stdout.splitlines()
            found.update({name: int(pid) for name, pid in map(str.split, lines) if pid != "0"})
            if len(found) < len(plans):
                state = self.seat.systemctl("is-failed", *services, check=False)
                assert "failed" not in state.split(), self.seat.journal("-n", "40")[-3000:]
            return len(found) == len(plans)

        look.wait_for("the containers run", started, 60, step=0.2)
        return {made.stack: found[f"stackctl-{made.stack}"] for made in plans}

    def clear(self) -> None:
        """Kill all started units at once and remove them."""
        if self.running:
            self.seat.systemctl("kill", "--signal=SIGKILL", *self.running, check=False)
            self.seat.systemctl("stop", *self.running, check=False)
            self.running = ()
        self.seat.run("rm", "-rf", self.seat.units)
        self.seat.systemctl("daemon-reload")
        self.seat.reset()

    def strings(self, pid: int, name: str) -> list[bytes]:
        """Return the arguments (cmdline) or variables (environ) of a process from the kernel."""
        raw = look.get(self.seat.lab, f"/proc/{pid}/{name}")
        return raw.split(b"\0")[:-1]


@pytest.fixture(params=AMOUNTS)
def desk(request: pytest.FixtureRequest, lab: Lab) -> Iterator[Desk]:
    """Yield a user, and remove all units afterwards."""
    amount: Amount = request.param
    place = Desk(Seat(lab, amount.user), amount)
    yield place
    place.clear()


def tell(desk: Desk, began: float, what: str) -> None:
    """Print the numbers of a run; pytest shows them with -rP and after a failure."""
    spent = time.monotonic() - began
    print(f"{desk.seat.user}: {what}, {desk.refused} refused, {spent:.1f} s, seed {SEED}")


def test_arguments_and_variables_come_out_as_they_went_in(desk: Desk) -> None:
    began, chance, units = time.monotonic(), random.Random(SEED), desk.amount.units
    words = odd_values(chance, units * WORDS) + LONG
    words = desk.accepted(words, lambda value: plan("a", [value]), cannot_be_word)
    texts = odd_values(chance, units * WORDS // 2) + [text[5:] for text in LONG]
    texts = desk.accepted(
        texts,
        lambda value: plan("a", variables=["V000=" + value]),
        lambda value: cannot_be_word("V000=" + value),
    )
    assert min(len(words), len(texts)) > units * 60
    # In another order each time, so that the neighbours of a value differ.
    chance.shuffle(words)
    chance.shuffle(texts)
    plans = [
        plan(f"odd-{n}", words[n::units], [f"V{m:03}={v}" for m, v in enumerate(texts[n::units])])
        for n in range(units)
    ]
    plain = [
        plan(f"plain-{n}", ["x"] * 3, [f"V{m:03}=x" for m in range(len(texts[n::units]))])
        for n in range(units)
    ]
    desk.install([*plans, *plain])
    keys = desk.generated()
    assert len(keys) == 2 * units
    for n in range(units):
        assert keys[f"odd-{n}.service"] == keys[f"plain-{n}.service"], f"seed {SEED}"
    for made, pid in zip(plans, desk.start(plans).values(), strict=True):
        arguments = [*PROGRAM, *made.argv[1:]]
        assert desk.strings(pid, "cmdline") == [a.encode() for a in arguments], f"seed {SEED}"
        there = [
            v for v in desk.strings(pid, "environ") if v.partition(b"=")[0].decode() not in KEEP
        ]
        assert sorted(there) == sorted(v.encode() for v in made.environment), f"seed {SEED}"
    tell(desk, began, f"{len(words)} arguments and {len(texts)} variables came out")


def test_names_come_out_as_they_went_in(desk: Desk) -> None:
    began, chance = time.monotonic(), random.Random(SEED)
    names = desk.accepted(
        odd_values(chance, desk.amount.names), lambda value: plan("a", served=value), cannot_be_text
    )
    plans = [plan(f"n-{n}", served=name) for n, name in enumerate(names)]
    desk.install([*plans, plan("plain")])
    keys = desk.generated()
    assert len(keys) == len(plans) + 1
    assert {tuple(found) for found in keys.values()} == {tuple(keys["plain.service"])}
    services = [service_name(made.stack) for made in plans]
    shown = desk.seat.systemctl("show", "--property=Id,Description,LoadState", *services)
    found = dict(
        zip(re.findall(r"^Id=(.*)$", shown, re.M), re.findall(r"^Description=(.*)$", shown, re.M),
            strict=True)
    )  # fmt: skip
    assert found == {
        service_name(made.stack): f"stackctl {made.stack} (llama.cpp, {made.served_name})"
        for made in plans
    }, f"seed {SEED}"
    tell(desk, began, f"{len(names)} names came out")


def test_files_are_mounted_whatever_their_names(desk: Desk) -> None:
    began, chance = time.monotonic(), random.Random(SEED)
    below = f"/srv/odd-{desk.seat.user}"
    names = [
        name
        for value in dict.fromkeys(odd_values(chance, 4 * desk.amount.files))
        if (name := value.replace("/", "_")).strip(".") and len(name.encode(errors="replace")) < 200
    ]
    paths = [
        f"{below}/{n % 7}{name if n % 2 else ''}/{name}"
        for n, name in enumerate(dict.fromkeys(names))
    ]
    paths = desk.accepted(paths, lambda path: plan("a", files=[path]), cannot_be_mounted)
    plans = [plan(f"m-{n}", files=paths[n::3]) for n in range(3)]
    for path in paths:
        look.put(desk.seat.lab, path, path.encode())
    try:
        mixed = plan("plain", files=["/srv/models/x", "/srv/models/x y"])
        desk.install([*plans, mixed])
        keys = desk.generated()
        assert {tuple(sorted(set(found))) for found in keys.values()} == {
            tuple(sorted(set(keys["plain.service"])))
        }, f"seed {SEED}"
        for made, pid in zip(plans, desk.start(plans).values(), strict=True):
            models = look.lab_path(desk.seat.lab, f"/proc/{pid}/root/models")
            expected = {Path(file.path).name: file.path for file in made.model.files}
            assert {path.name: path.read_text() for path in models.iterdir()} == expected
    finally:
        desk.clear()
        desk.seat.lab.run(["rm", "-rf", below])
    tell(desk, began, f"{len(paths)} files were mounted")
