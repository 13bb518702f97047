"""Podman: images through its API (podman-py), one-off commands through its command line.

Containers belong to systemd: nothing here creates, restarts or removes those of a stack.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stackctl.errors import ExitCode, StackctlError
from stackctl.machine import runner, trust
from stackctl.units.quadlet import INSTALL_PODMAN

#: Seconds without a request after which our API service ends by itself, should we be killed.
_IDLE_S = 60
#: Seconds for the service to come up, and for a throw-away container: many times what it takes, for
#: machines that are busy or slow.
_START_S = 60
_RUN_ONCE_S = 300


@dataclass(frozen=True)
class Image:
    """A local image; ``reference`` is pinned: name@digest from a registry, else the ID."""

    id: str
    reference: str
    entrypoint: tuple[str, ...]
    bytes: int
    #: The CUDA that it was built with, as it says itself ("13.0.2"); None when it does not.
    cuda: str | None = None


@dataclass(frozen=True)
class Container:
    """A container: Podman's words for its state and health, its main process (0: none), and the ID
    of its image."""

    state: str
    health: str | None
    pid: int
    image_id: str = ""


@dataclass(frozen=True)
class PullProgress:
    """Where a pull is: Podman's own words, and bytes where it tells them."""

    text: str
    done_bytes: int | None = None
    total_bytes: int | None = None


class Podman:
    """Podman's API, served for as long as this object is open.

    A service of our own rather than podman.socket: it works where that unit is not enabled, changes
    nothing on the machine, and ends with us.
    """

    def __init__(self, client: Any) -> None:
        self._client = client

    def image(self, reference: str) -> Image | None:
        """The local image of that name, digest or ID."""
        from podman.errors import ImageNotFound

        try:
            found = self._client.images.get(reference)
        except ImageNotFound:
            return None
        except Exception as error:
            raise _api_error(f"cannot inspect image {reference}", error) from None
        attributes = found.attrs
        digests = [text for text in attributes.get("RepoDigests") or () if "@" in text]
        local = reference.startswith("localhost/") or not digests
        image_id = str(attributes["Id"]).removeprefix("sha256:")
        config = attributes.get("Config") or {}
        entrypoint = config.get("Entrypoint") or ()
        name = reference.partition("@")[0]
        repository = name.rpartition(":")[0] if ":" in name.rpartition("/")[2] else name
        pinned = next((d for d in digests if d.startswith(repository + "@")), None)
        return Image(
            id=image_id,
            reference=image_id if local or pinned is None else pinned,
            entrypoint=tuple([entrypoint] if isinstance(entrypoint, str) else entrypoint),
            bytes=int(attributes.get("Size") or 0),
            cuda=cuda_of(config.get("Env") or ()),
        )

    def pull(
        self,
        reference: str,
        report: Callable[[PullProgress], None],
        *,
        built: str | None,
    ) -> None:
        """Pull an image; ``built`` is the name of one that "stackctl image build" makes instead.

        Raises:
            StackctlError: exit 6, with the registry's own words.
        """
        hint = "an image that is here: --set image=NAME"
        if built is not None:
            build = f"stackctl image build {built} (from Debian's packages)"
            hint = f"without a registry: {build},\nor {hint}"
        try:
            stream = self._client.images.pull(
                reference,
                stream=True,
                decode=True,
                compatMode=True,
                policy="missing",
                # None leaves it to registries.conf; podman-py would override that with True.
                tls_verify=None,
            )
            for message in stream:
                # podman-py does not raise for an error in the stream.
                if error := message.get("error"):
                    raise StackctlError(
                        f"cannot pull image {reference}",
                        details=(_words(str(error)),),
                        hint=hint,
                        exit_code=ExitCode.HOST,
                    )
                detail = message.get("progressDetail") or {}
                report(
                    PullProgress(
                        str(message.get("status") or message.get("stream") or "").strip(),
                        detail.get("current"),
                        detail.get("total"),
                    )
                )
        except StackctlError:
            raise
        except Exception as error:
            problem = _api_error(f"cannot pull image {reference}", error)
            problem.hint = hint
            raise problem from None


def _api_error(message: str, error: Exception) -> StackctlError:
    text = _words(str(getattr(error, "explanation", None) or error).strip())
    if error.__cause__ is not None:
        text += f": {error.__cause__}"
    return StackctlError(message, details=text.splitlines()[-5:], exit_code=ExitCode.HOST)


def _words(text: str) -> str:
    """What Podman said; some of its errors come wrapped in JSON."""
    try:
        return str(json.loads(text)["message"])
    except (ValueError, TypeError, KeyError):
        return text


@contextlib.contextmanager
def connect(runtime: Path) -> Iterator[Podman]:
    """Serve Podman's API on a socket in ``runtime`` (0700) and connect to it.

    Raises StackctlError (exit 6) when Podman is absent or its service does not start.
    """
    from podman import PodmanClient

    trust.private_folder(runtime)
    for stale in runtime.glob("podman-*.sock"):
        if not Path(f"/proc/{stale.stem.removeprefix('podman-')}").exists():
            stale.unlink(missing_ok=True)
    address = runtime / f"podman-{os.getpid()}.sock"
    command = ("podman", "system", "service", f"--time={_IDLE_S}", f"unix://{address}")
    try:
        service = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=runner.controlled_environment(),
            cwd=runner.working_folder(),
            start_new_session=True,
        )
    except FileNotFoundError:
        raise StackctlError(
            "podman is not installed",
            hint=f"{INSTALL_PODMAN}: apt-get install podman",
            exit_code=ExitCode.HOST,
        ) from None
    try:
        deadline = time.monotonic() + _START_S
        while not _listens(address):
            if service.poll() is not None or time.monotonic() > deadline:
                service.kill()
                _, errors = service.communicate()
                raise StackctlError(
                    "podman does not start its API",
                    details=(errors or "").strip().splitlines()[-5:],
                    hint="podman info shows what is wrong",
                    exit_code=ExitCode.HOST,
                )
            time.sleep(0.02)
        with PodmanClient(base_url=f"unix://{address}", timeout=600) as client:
            yield Podman(client)
    finally:
        service.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            service.wait(5)
        service.kill()
        if service.stderr is not None:
            service.stderr.close()
        service.wait()
        address.unlink(missing_ok=True)


def _listens(address: Path) -> bool:
    """Whether somebody answers on a socket; its file is there a moment earlier."""
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(address))
        except OSError:
            return False
    return True


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
