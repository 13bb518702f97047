"""Podman's command line: one-off containers, archives, and questions about images.

Containers belong to systemd: nothing here creates, restarts or removes those of a stack.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from stackctl.errors import StackctlError
from stackctl.machine import runner

#: Seconds for a throw-away container to start: many times the usual, for machines that are busy or
#: slow.
_START_S = 60
_RUN_ONCE_S = 300


@dataclass(frozen=True)
class Container:
    """A container: Podman's words for its state and health, its main process (0: none), and the ID
    of its image."""

    state: str
    health: str | None
    pid: int
    image_id: str = ""


def run_once(
    image: str,
    arguments: Sequence[str],
    *,
    entrypoint: str | None = None,
    volumes: Sequence[str] = (),
    timeout_s: float = _RUN_ONCE_S,
) -> runner.Completed:
    """Run a command in a throw-away container without network, capabilities or a writable root."""
    return runner.run(
        (
            "podman", "run", "--rm", "--pull=never", "--network=none", "--read-only",
            "--cap-drop=all", "--security-opt=no-new-privileges", "--log-driver=none",
            "--security-opt=label=disable", *(f"--volume={volume}" for volume in volumes),
            *((f"--entrypoint={entrypoint}",) if entrypoint else ()),
            image, *arguments,
        ),
        check=False,
        timeout_s=timeout_s,
    )  # fmt: skip


def cuda_of(environment: Sequence[str]) -> str | None:
    """The CUDA that an image's environment names, as NVIDIA's base images do."""
    named = dict(pair.partition("=")[::2] for pair in environment)
    match = re.match(r"[0-9]+(\.[0-9]+)*", named.get("CUDA_VERSION", "")) or re.search(
        r"(?<=\bcuda>=)[0-9]+(\.[0-9]+)*", named.get("NVIDIA_REQUIRE_CUDA", "")
    )
    return match[0] if match else None


def image_cuda(image: str) -> str | None:
    """The CUDA of an image that is here; None when it is not, or does not say."""
    words = ("podman", "image", "inspect", "--format={{json .Config.Env}}", image)
    try:
        done = runner.run(words, check=False)
        return cuda_of(json.loads(done.stdout) or ()) if done.status == 0 else None
    except (StackctlError, ValueError):
        return None


def init_with(image: str, devices: Sequence[str]) -> runner.Completed:
    """Make a container with those CDI devices ready to start, and remove it again unstarted.

    Only what the machine does for devices is done: nothing of the image runs. What it would run is
    the shell, which every image has for its health check. Gives what failed first, else the last
    step.
    """
    name = f"stackctl-proof-{os.getpid()}"
    create = (
        "podman", "create", f"--name={name}", "--pull=never", "--network=none", "--read-only",
        "--cap-drop=all", "--security-opt=no-new-privileges", "--security-opt=label=disable",
        "--log-driver=none", *(f"--device={device}" for device in devices),
        "--entrypoint=sh", image,
    )  # fmt: skip
    try:
        done = runner.run(create, check=False, timeout_s=_START_S)
        if done.status == 0:
            done = runner.run(("podman", "init", name), check=False, timeout_s=_START_S)
        return done
    finally:
        runner.run(
            ("podman", "rm", "--force", "--ignore", "--time=0", name),
            check=False,
            timeout_s=_START_S,
        )


def load_archive(archive: Path, tag: str) -> None:
    """Make an image of an archive: one saved by Podman or Docker, or a plain root file system."""
    import tarfile

    try:
        with tarfile.open(archive) as stream:
            first = [
                member.name.removeprefix("./") for _, member in zip(range(4), stream, strict=False)
            ]
    except tarfile.TarError:
        raise StackctlError(
            f"{archive} is not an image archive",
            hint="one that stackctl image build -o or podman save wrote",
        ) from None
    except OSError as error:
        raise StackctlError(f"cannot read {archive}: {error.strerror or error}") from None
    saved = any(name in ("oci-layout", "index.json", "manifest.json", "blobs") or
                name.endswith((".json", "/layer.tar", "/VERSION")) for name in first)  # fmt: skip
    if not saved:
        runner.run(
            ("podman", "import", "--quiet", "--message", "stackctl image load", str(archive), tag),
            timeout_s=1800,
        )
        return
    done = runner.run(("podman", "load", "--quiet", f"--input={archive}"), timeout_s=1800)
    loaded = done.stdout.strip().rpartition("Loaded image: ")[2].strip()
    runner.run(("podman", "tag", loaded, tag))


def save_archive(image: str, archive: Path) -> None:
    """Write an image with its name to an archive that is not there yet."""
    words = ("podman", "save", "--quiet", "--format=docker-archive", f"--output={archive}", image)
    runner.run(words, timeout_s=3600)


@functools.cache
def version() -> str | None:
    """Podman's version; None when it does not tell. It does not change while we run."""
    done = runner.run(("podman", "--version"), check=False)
    match = re.search(r"\d+\.\d+\S*", done.stdout)
    return match[0] if match else None


@functools.cache
def exists(image: str) -> bool:
    """Whether an image of that name is here; False without Podman. Asked once."""
    try:
        return runner.run(("podman", "image", "exists", image), check=False).status == 0
    except StackctlError:
        return False


def containers(name: str) -> list[str]:
    """Names of containers, running or not, with exactly that name."""
    done = runner.run(
        ("podman", "ps", "--all", f"--filter=name=^{name}$", "--format={{.Names}}"), timeout_s=30
    )
    return done.stdout.split()


def remove_container(container: str) -> None:
    """Remove a container that outlived its unit, if there is one, whatever state it is in.

    Where systemd has killed its monitor, Podman finds out only by failing ("conmon exited
    prematurely"), and succeeds the next time.
    """
    words = ("podman", "rm", "--force", "--ignore", "--time=5", container)
    if runner.run(words, check=False).status != 0:
        runner.run(words)


def image_environment(image_id: str) -> tuple[str, ...]:
    """The names of the variables that an image sets; none where it cannot be asked."""
    words = ("podman", "image", "inspect", "--format={{json .Config.Env}}", image_id)
    try:
        done = runner.run(words, check=False)
        pairs = json.loads(done.stdout) if done.status == 0 else None
        return tuple(str(pair).partition("=")[0] for pair in pairs or ())
    except (StackctlError, ValueError, TypeError):
        return ()


def inspect(names: Sequence[str]) -> dict[str, Container]:
    """Those of the containers that are there, by name: one question for all of them.

    Raises StackctlError (exit 6) when Podman is absent.
    """
    if not names:
        return {}
    words = (
        "podman",
        "inspect",
        "--type=container",
        "--format={{.Name}} {{.Image}} {{json .State}}",
    )
    done = runner.run((*words, *names), check=False)
    found = {}
    for line in done.stdout.splitlines():
        name, image, text = (*line.split(" ", 2), "", "")[:3]
        with contextlib.suppress(ValueError, TypeError, AttributeError):
            state = json.loads(text)
            # Called Healthcheck by older versions.
            health = state.get("Health") or state.get("Healthcheck") or {}
            found[name] = Container(
                str(state["Status"]),
                health.get("Status") or None,
                int(state["Pid"]),
                image.removeprefix("sha256:"),
            )
    return found
