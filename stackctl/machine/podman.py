"""Podman's command line: one-off containers, archives, and questions about images.

systemd starts and stops the containers of a stack. Only remove_container touches one, if it has
outlived its unit.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from stackctl.errors import StackctlError
from stackctl.machine import runner

#: Seconds for a temporary container to start: many times the usual, for busy or slow machines.
_START_S = 60
_RUN_ONCE_S = 300
#: Options of temporary containers: without network, capabilities or a writable root.
_CONFINED = (
    "--pull=never", "--network=none", "--read-only", "--cap-drop=all",
    "--security-opt=no-new-privileges", "--security-opt=label=disable", "--log-driver=none",
)  # fmt: skip


@dataclass(frozen=True)
class Container:
    """A container. ``state`` and ``health`` are Podman's words; ``pid`` 0 is no process."""

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
    """Run a command in a temporary container without network, capabilities or a writable root."""
    return runner.run(
        (
            "podman", "run", "--rm", *_CONFINED, *(f"--volume={volume}" for volume in volumes),
            *((f"--entrypoint={entrypoint}",) if entrypoint else ()),
            image, *arguments,
        ),
        check=False,
        timeout_s=timeout_s,
    )  # fmt: skip


def cuda_version(environment: Sequence[str]) -> str | None:
    """Return the CUDA version that NVIDIA's base images put into the environment, or None."""
    named = dict(pair.partition("=")[::2] for pair in environment)
    match = re.match(r"[0-9]+(\.[0-9]+)*", named.get("CUDA_VERSION", "")) or re.search(
        r"(?<=\bcuda>=)[0-9]+(\.[0-9]+)*", named.get("NVIDIA_REQUIRE_CUDA", "")
    )
    return match[0] if match else None


def image_cuda(image: str) -> str | None:
    """Return the CUDA version of a local image; None if it is absent or names no version."""
    return cuda_version(_environment(image))


def create_with_devices(image: str, devices: Sequence[str]) -> runner.Completed:
    """Create and initialise a container with CDI devices, and remove it without starting it.

    That tests the machine's device setup; no program of the image runs. The entrypoint is the
    shell, which every image has for its health check.

    Returns:
        The first step that failed, or the last step if none did.
    """
    name = f"stackctl-proof-{os.getpid()}"
    create = (
        "podman", "create", f"--name={name}", *_CONFINED,
        *(f"--device={device}" for device in devices), "--entrypoint=sh", image,
    )  # fmt: skip
    try:
        done = runner.run(create, check=False, timeout_s=_START_S)
        if done.status == 0:
            done = runner.run(("podman", "init", name), check=False, timeout_s=_START_S)
        return done
    finally:
        remove = ("podman", "rm", "--force", "--ignore", "--time=0", name)
        runner.run(remove, check=False, timeout_s=_START_S)


def load_archive(archive: Path, tag: str) -> None:
    """Load an image from an archive of Podman or Docker, or from a tar of a root file system.

    Raises StackctlError if the file is not an archive or Podman fails.
    """
    import tarfile

    try:
        with tarfile.open(archive) as stream:
            first = [member.name.removeprefix("./") for member in itertools.islice(stream, 4)]
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
    """Write an image with its name to an archive that does not exist yet."""
    words = ("podman", "save", "--quiet", "--format=docker-archive", f"--output={archive}", image)
    runner.run(words, timeout_s=3600)


@functools.cache
def podman_version() -> str | None:
    """Return Podman's version, or None if it prints none. Cached.

    Raises StackctlError (exit 6) if Podman is absent.
    """
    done = runner.run(("podman", "--version"), check=False)
    match = re.search(r"\d+\.\d+\S*", done.stdout)
    return match[0] if match else None


@functools.cache
def image_exists(image: str) -> bool:
    """Return True if an image with that name is here, False without Podman. Cached."""
    try:
        return runner.run(("podman", "image", "exists", image), check=False).status == 0
    except StackctlError:
        return False


def remove_container(container: str) -> None:
    """Remove a container that outlived its unit, in any state; ignore a missing one.

    If systemd has killed the container's monitor, Podman fails the first time ("conmon exited
    prematurely") and succeeds the next time.
    """
    words = ("podman", "rm", "--force", "--ignore", "--time=5", container)
    if runner.run(words, check=False).status != 0:
        runner.run(words)


def image_environment(image_id: str) -> tuple[str, ...]:
    """Return the names of the variables that an image sets; empty if they cannot be read."""
    return tuple(pair.partition("=")[0] for pair in _environment(image_id))


def _environment(image: str) -> tuple[str, ...]:
    words = ("podman", "image", "inspect", "--format={{json .Config.Env}}", image)
    try:
        done = runner.run(words, check=False)
        pairs = json.loads(done.stdout) if done.status == 0 else None
        return tuple(str(pair) for pair in pairs or ())
    except (StackctlError, ValueError, TypeError):
        return ()


def inspect_containers(names: Sequence[str]) -> dict[str, Container]:
    """Return the containers that exist, by name, with one call of Podman.

    Raises StackctlError (exit 6) if Podman is absent.
    """
    if not names:
        return {}
    form = "--format={{.Name}} {{.Image}} {{json .State}}"
    done = runner.run(("podman", "inspect", "--type=container", form, *names), check=False)
    found = {}
    for line in done.stdout.splitlines():
        name, image, text = (*line.split(" ", 2), "", "")[:3]
        with contextlib.suppress(ValueError, TypeError, AttributeError):
            state = json.loads(text)
            # Older versions of Podman call it Healthcheck.
            health = state.get("Health") or state.get("Healthcheck") or {}
            found[name] = Container(
                str(state["Status"]),
                health.get("Status") or None,
                int(state["Pid"]),
                image.removeprefix("sha256:"),
            )
    return found
