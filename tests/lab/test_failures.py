"""Faults of the model, the machine or the unit: the launch is refused, and nothing remains."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator

import pytest

from . import look
from .conftest import Seat
from .lab import APP_PATHS, IMAGE, Lab

UP = ("up", "cpu-latency", "--model")
FAKE_BIN = "/srv/fake-bin"


# The model


def test_the_model_file_is_missing(one: Seat, tiny: str) -> None:
    done = one.stackctl(*UP, "file:/srv/models/tinny.gguf", code=1)
    look.assert_error(
        done, "model file not found: /srv/models/tinny.gguf", r"did you mean tiny\.gguf\?"
    )
    look.assert_clean(one)


@pytest.mark.deep
def test_the_model_is_no_gguf_file(one: Seat) -> None:
    look.put(one.lab, "/srv/bad/page.gguf", b"<!DOCTYPE html>\n<html>Sign in</html>\n" * 99)
    done = one.stackctl(*UP, "file:/srv/bad/page.gguf", code=1)
    look.assert_error(done, r"/srv/bad/page\.gguf .*GGUF")
    look.assert_clean(one)


@pytest.mark.deep
def test_the_model_is_cut_short(one: Seat, tiny: str) -> None:
    whole = look.get(one.lab, tiny.removeprefix("file:"))
    # In the header, in the first tensors, and at the last byte.
    for size in (1000, len(whole) // 2, len(whole) - 1):
        path = f"/srv/bad/cut-{size}.gguf"
        look.put(one.lab, path, whole[:size])
        done = one.stackctl(*UP, f"file:{path}", code=1)
        look.assert_error(done, f"{re.escape(path)}.*(ends|incomplete|truncated|cut|short)")
    look.assert_clean(one)


def test_the_engine_may_not_read_the_model(seat: Seat, tiny: str) -> None:
    path = "/srv/bad/secret.gguf"
    look.put(seat.lab, path, look.get(seat.lab, tiny.removeprefix("file:")))
    # Root's engine has no capability to read files of other users.
    seat.lab.run(["chown", "nolinger", path], check=True)
    seat.lab.run(["chmod", "600", path], check=True)
    done = seat.stackctl(*UP, f"file:{path}", code=1)
    if seat.user == "root":
        look.assert_error(done, "cpu did not start: the engine may not read", "chmod a\\+r")
    else:
        look.assert_error(done, f"cannot read {path}: Permission denied")
    look.assert_clean(seat)


# The port


@pytest.fixture
def listener(lab: Lab) -> Iterator[subprocess.Popen[str]]:
    """Yield a process of the user lab that listens on the port of the profile."""
    code = f"import socket; s = socket.create_server(('127.0.0.1', {look.PORT})); s.accept()"
    with lab.spawn(["python3", "-c", code], user="lab") as process:
        look.wait_for("somebody listens", lambda: bool(look.listening(lab, look.PORT)))
        yield process
        process.kill()


def test_the_port_is_taken(seat: Seat, tiny: str, listener: subprocess.Popen[str]) -> None:
    done = seat.stackctl(*UP, tiny, code=1)
    look.assert_error(
        done, rf"port {look.PORT} is taken by python3 \(process \d+\)", "--set port=8081"
    )
    listener.kill()
    listener.wait(5)
    look.assert_clean(seat)


@pytest.mark.deep
def test_the_port_is_taken_by_another_user(lab: Lab, tiny: str) -> None:
    root, seat = Seat(lab, "root"), Seat(lab, "lab")
    try:
        root.stackctl(*UP, tiny)
        done = seat.stackctl(*UP, tiny, code=1)
        look.assert_error(done, f"port {look.PORT} is taken by a process of another user")
        assert root.stackctl("check").stdout.startswith("ok    unit")
    finally:
        root.reset()
        seat.reset()
    look.assert_clean(seat)


# The machine


def test_podman_is_absent(seat: Seat, tiny: str) -> None:
    program = seat.lab.run(["sh", "-c", "command -v podman"], check=True).stdout.strip()
    seat.lab.run(["mv", program, f"{program}.away"], check=True)
    try:
        done = seat.stackctl(*UP, tiny, code=6)
    finally:
        seat.lab.run(["mv", f"{program}.away", program], check=True)
    look.assert_error(done, "podman is not installed", "install Podman 4.7 or newer")
    look.assert_clean(seat)


@pytest.mark.deep
def test_podman_is_too_old(one: Seat, tiny: str) -> None:
    script = '#!/bin/sh\n[ "$1" = --version ] && echo "podman version 4.3.1" && exit\nexit 1\n'
    look.put(one.lab, f"{FAKE_BIN}/podman", script.encode(), mode=0o755)
    path = f"{FAKE_BIN}:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"
    done = one.stackctl(*UP, tiny, code=6, env={"PATH": path})
    look.assert_error(done, "Podman 4.3.1 is too old", "install Podman 4.7 or newer")
    look.assert_clean(one)


def test_systemd_does_not_run(seat: Seat, tiny: str) -> None:
    hide = "mount -t tmpfs none /run/systemd; mount -t tmpfs none /run/user"
    done = look.in_namespace(seat, hide, *UP, tiny, code=6)
    look.assert_error(done, "systemd is not running on this machine", "booted with systemd")
    look.assert_clean(seat)


@pytest.mark.deep
def test_a_user_without_a_service_manager(lab: Lab, tiny: str) -> None:
    lab.run(["useradd", "--create-home", "--shell", "/bin/sh", "guest"], check=True)
    try:
        words = ["setpriv", "--reuid=guest", "--regid=guest", "--init-groups", "env", "-i"]
        words += ["PATH=/usr/local/bin:/usr/bin:/bin", "HOME=/home/guest", "USER=guest"]
        done = lab.run([*words, "stackctl", *UP, tiny])
        left = lab.run(["find", "/home/guest", "-path", "*stackctl*", "-type", "f"]).stdout
    finally:
        lab.run(["userdel", "--remove", "guest"])
    assert done.returncode == 6
    look.assert_error(
        done,
        "the service manager of this user cannot be reached",
        "loginctl enable-linger (USER|guest)",
    )
    assert left == ""


@pytest.mark.deep
def test_a_user_who_does_not_linger_is_told(lab: Lab, tiny: str) -> None:
    seat = Seat(lab, "nolinger")
    # The tests of remote commands have this user too, and keep its connections.
    seat.reset()
    lab.load_image("nolinger")
    try:
        done = seat.stackctl(*UP, tiny)
        assert "cpu is up (generation 1)" in done.stdout
        assert "warning: it ends when you log out" in done.stderr
        assert re.search(r"^  fix: .*loginctl enable-linger", done.stderr, re.MULTILINE)
        seat.stackctl("down")
        look.assert_clean(seat)
    finally:
        seat.reset()


@pytest.mark.deep
def test_cgroups_are_of_the_old_kind(seat: Seat, tiny: str) -> None:
    hide = "mount -t tmpfs none /sys/fs/cgroup; mkdir /sys/fs/cgroup/memory /sys/fs/cgroup/unified"
    done = look.in_namespace(seat, hide, *UP, tiny, code=6)
    look.assert_error(done, "Quadlet needs cgroup v2", "systemd.unified_cgroup_hierarchy=1")
    look.assert_clean(seat)


def test_a_normal_user_asks_for_system_units(lab: Lab, tiny: str) -> None:
    seat = Seat(lab, "lab")
    done = seat.stackctl("--system", *UP, tiny, code=2)
    look.assert_error(done, "--system needs root", "sudo")
    look.assert_clean(Seat(lab, "root"))


# The image


def test_the_image_is_absent_and_no_registry_answers(seat: Seat, tiny: str) -> None:
    # Nothing listens there.
    image = "127.0.0.1:9/engine:1"
    done = seat.stackctl(*UP, tiny, "--set", f"image={image}", code=6)
    look.assert_error(done, f"cannot pull image {image}", "stackctl image build llama-cpp")
    assert "\n  connection refused\n" in done.stderr
    look.assert_clean(seat)


@pytest.mark.deep
def test_nothing_is_pulled_for_a_plan_that_is_refused_or_for_a_dry_run(
    one: Seat, tiny: str
) -> None:
    image = "image=127.0.0.1:9/engine:1"
    words = ("--set", "context=32768", "--set", "concurrency=4096", "--set", image)
    done = one.stackctl(*UP, look.GEMMA, *words, code=5)
    look.assert_error(done, "cpu-latency does not fit")
    done = one.stackctl(*UP, tiny, "--set", image, "--dry-run", code=6)
    look.assert_error(done, "image 127.0.0.1:9/engine:1 is not here, and a dry run pulls nothing")
    look.assert_clean(one)


@pytest.mark.deep
def test_a_local_image_is_absent(one: Seat, tiny: str) -> None:
    done = one.stackctl(*UP, tiny, "--set", "image=localhost/nothing:1", code=6)
    look.assert_error(done, "no local image localhost/nothing:1", "stackctl image build llama-cpp")
    look.assert_clean(one)


@pytest.mark.deep
def test_the_image_holds_no_engine(seat: Seat, tiny: str) -> None:
    image = "localhost/lab/empty:1"
    script = f"tar -C / -c etc/hostname | podman import --quiet - {image}"
    seat.run("sh", "-c", script)
    done = seat.stackctl(*UP, tiny, "--set", f"image={image}", code=6)
    look.assert_error(
        done, f"image {image} holds no llama-server", "stackctl image build llama-cpp"
    )
    look.assert_clean(seat)


@pytest.mark.deep
def test_the_image_lacks_what_the_health_check_needs(seat: Seat, tiny: str) -> None:
    image = look.derived_image(seat, "no-curl", "rm $(find . -type f -perm -111 -name curl)")
    done = seat.stackctl(*UP, tiny, "--set", f"image={image}", code=6)
    look.assert_error(done, f"image {image} has no curl")
    look.assert_clean(seat)


# The start


def test_the_engine_exits_at_once(seat: Seat, tiny: str) -> None:
    done = seat.stackctl(*UP, tiny, "--set", "engine_args.rope-scaling=nonsense", code=1)
    look.assert_error(
        done,
        "cpu did not start: llama-server refuses the value of --rope-scaling: invalid value",
        r"correct it in engine_args\n  log: stackctl logs cpu --generation 1",
    )
    assert "ready" not in done.stdout
    look.assert_clean(seat)
    # The stack is gone, but its record and its log remain.
    assert look.record(seat, 1)["outcome"]["state"] == "failed"
    assert "--rope-scaling" in seat.stackctl("logs", "cpu", "--generation", "1").stdout


def test_the_engine_does_not_know_an_option(one: Seat, tiny: str) -> None:
    done = one.stackctl(*UP, tiny, "--set", "engine_args.thread=2", code=2)
    look.assert_error(done, "llama-server has no option --thread$", "did you mean threads")
    look.assert_clean(one)


def test_the_engine_never_becomes_healthy(seat: Seat, tiny: str) -> None:
    image = look.never_healthy(seat)
    words = ("--set", f"image={image}", "--timeout", "4s")
    done = seat.stackctl(*UP, tiny, *words, code=1)
    look.assert_error(
        done,
        "cpu was not healthy within 0:04",
        r"more time: --timeout .*\n  log: stackctl logs cpu --generation 1",
    )
    assert "pretending to load" in done.stderr
    look.assert_clean(seat)


def test_the_plan_does_not_fit(one: Seat) -> None:
    # Gemma keeps only a window in most layers, so only a very long context is too large.
    words = ("--set", "context=32768", "--set", "concurrency=4096")
    done = one.stackctl(*UP, look.GEMMA, *words, code=5)
    look.assert_error(done, "cpu-latency does not fit: .* too much", "a smaller context")
    look.assert_clean(one)


# The unit


def test_the_generator_rejects_the_unit(seat: Seat, tiny: str) -> None:
    find = "from stackctl.resources import data_folder; print(data_folder('templates'))"
    folder = seat.run("python3", "-c", find).stdout.strip()
    assert folder.startswith(APP_PATHS[0])
    template = f"{folder}/engine.container.j2"
    bad = seat.lab.read(template).replace("[Container]\n", "[Container]\nNoSuchKey=1\n")
    look.put(seat.lab, "/srv/bad/engine.container.j2", bad.encode())
    setup = f"mount --bind /srv/bad/engine.container.j2 {template}"
    done = look.in_namespace(seat, setup, *UP, tiny, code=1)
    look.assert_error(done, "Quadlet does not accept the unit of cpu", "stackctl render")
    assert "NoSuchKey" in done.stderr
    look.assert_clean(seat)


@pytest.mark.deep
def test_the_name_belongs_to_another_service(seat: Seat, tiny: str) -> None:
    folder = "/etc/systemd/system" if seat.user == "root" else ".config/systemd/user"
    text = "[Service]\nExecStart=/bin/sleep infinity\n"
    path = f"{seat.lab.home(seat.user) if seat.user != 'root' else ''}/{folder}/foo.service"
    path = path.replace("//", "/")
    seat.lab.write(path, text, user=seat.user)
    try:
        seat.systemctl("daemon-reload")
        seat.systemctl("start", "foo.service")
        pid = look.unit_properties(seat, "MainPID", unit="foo.service")
        done = seat.stackctl(*UP, tiny, "--name", "foo", code=5)
        look.assert_error(
            done, rf"already a foo\.service on this machine \({path}\)", "--name NAME"
        )
        assert look.unit_properties(seat, "MainPID", unit="foo.service") == pid
        assert not look.exists(seat.lab, seat.units)
    finally:
        seat.systemctl("stop", "foo.service", check=False)
        seat.run("rm", "-f", path)
        seat.systemctl("daemon-reload")
    look.assert_clean(seat, "foo")


FULL = """
$BECOME mkdir -p "{folder}"
mount -t tmpfs -o size=64k,mode=755,uid=$(id -u "$USER") none "{folder}"
dd if=/dev/zero of="{folder}/filler" bs=4k 2>/dev/null || true
"""


@pytest.mark.parametrize("folder", ["$UNITS", "$STATE"])
def test_the_disk_is_full(seat: Seat, tiny: str, folder: str) -> None:
    after = f'find "{folder}" -type f -not -name filler | sed "s/^/LEFT /"'
    done = look.in_namespace(seat, FULL.format(folder=folder), *UP, tiny, code=1, after=after)
    look.assert_error(done, r"cannot write /\S+/stackctl/\S+: No space left on device")
    assert [line for line in done.stdout.splitlines() if line.startswith("LEFT")] == []
    seat.run("rm", "-rf", seat.units)  # the folder on which this test mounted
    look.assert_clean(seat)


@pytest.mark.deep
def test_a_full_disk_elsewhere_does_not_matter(seat: Seat, tiny: str) -> None:
    look.in_namespace(seat, FULL.format(folder="/tmp"), *UP, tiny, code=0)
    seat.stackctl("down")
    look.assert_clean(seat)


@pytest.mark.deep
def test_a_current_folder_that_cannot_be_entered_does_not_matter(lab: Lab, tiny: str) -> None:
    # This happens after "su lab" or "sudo -u lab" in the folder of root.
    seat = Seat(lab, "lab")
    try:
        look.in_namespace(seat, "chmod 700 /root", *UP, tiny, code=0, folder="/root")
        seat.stackctl("down")
        look.assert_clean(seat)
    finally:
        seat.reset()


# Damage


def test_a_damaged_record_does_not_keep_a_stack_from_going_down(one: Seat, tiny: str) -> None:
    one.stackctl(*UP, tiny)
    path = f"{one.state}/stacks/cpu/1.json"
    one.lab.write(path, '{"schema": "stackctl.gen', user=one.user)
    done = one.stackctl("status", code=1)
    assert done.stdout.startswith("cpu   unknown")
    assert "warning: the record of generation 1 of cpu cannot be read" in done.stderr
    for words in (("check",), (*UP, tiny)):
        done = one.stackctl(*words, code=1)
        look.assert_error(
            done, "the record of generation 1 of cpu cannot be read", "stackctl down cpu"
        )
    done = one.stackctl("down")
    assert "cpu is down" in done.stdout
    assert "warning: not recorded: the record of generation 1 of cpu" in done.stderr
    look.assert_clean(one)
    # The number stays taken, because the record may still be useful.
    assert "generation 2" in one.stackctl(*UP, tiny).stdout
    one.stackctl("down")


@pytest.mark.deep
def test_a_unit_that_was_changed_by_hand_can_go_down(one: Seat, tiny: str) -> None:
    one.stackctl(*UP, tiny)
    path = f"{one.units}/cpu/cpu.container"
    one.run("sed", "-i", "/^Generation=/d", path)
    done = one.stackctl("status", code=1)
    assert "warning: the unit of cpu was changed by hand" in done.stderr
    assert "fix: stackctl down cpu" in done.stderr
    one.stackctl("down")
    look.assert_clean(one)


@pytest.mark.deep
def test_an_unknown_image_name_is_kept_out_of_the_unit(one: Seat, tiny: str) -> None:
    done = one.stackctl(*UP, tiny, "--set", f"image={IMAGE}\nPodmanArgs=--privileged", code=None)
    assert done.returncode in (2, 6)
    assert "Traceback" not in done.stderr
    look.assert_clean(one)
