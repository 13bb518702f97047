"""Podman's API (podman-py): images, and pulls with their progress."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stackctl.errors import ExitCode, StackctlError
from stackctl.machine import path_security, podman, runner
from stackctl.units.quadlet import PODMAN_REMEDY

#: Seconds without a request after which the API service ends by itself, in case stackctl is killed.
_IDLE_S = 60
#: Seconds for the service to start: many times the usual, for machines that are busy or slow.
_START_S = 60


@dataclass(frozen=True)
class Image:
    """A local image. ``reference`` is pinned: name@digest if from a registry, else the ID."""

    id: str
    reference: str
    entrypoint: tuple[str, ...]
    bytes: int
    #: The CUDA version in its environment, such as "13.0.2"; None if it has none.
    cuda: str | None = None


@dataclass(frozen=True)
class PullProgress:
    """The progress of a pull: Podman's own text, and bytes if Podman reports them."""

    text: str
    done_bytes: int | None = None
    total_bytes: int | None = None


class Podman:
    """A client of Podman's API service, which ``connect`` starts for it.

    The service is stackctl's own rather than podman.socket. So it works if that unit is not
    enabled, changes nothing on the machine, and ends with stackctl.
    """

    def __init__(self, client: Any) -> None:
        self._client = client

    def image(self, reference: str) -> Image | None:
        """Return the local image with a name, digest or ID, or None if there is none.

        Raises StackctlError (exit 6) if Podman cannot inspect it.
        """
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
            cuda=podman.cuda_version(config.get("Env") or ()),
        )

    def pull(
        self, reference: str, report: Callable[[PullProgress], None], *, built: str | None
    ) -> None:
        """Pull an image if it is not here, and report each step of the progress.

        ``built`` is a name for ``stackctl image build``, which makes an image without a registry.
        The hint of an error mentions it; None if there is none for this image.

        Raises:
            StackctlError: exit 6, with the registry's own message.
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
                # With None registries.conf decides; the default of podman-py is True.
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
                text = str(message.get("status") or message.get("stream") or "").strip()
                report(PullProgress(text, detail.get("current"), detail.get("total")))
        except StackctlError:
            raise
        except Exception as error:
            raise _api_error(f"cannot pull image {reference}", error, hint) from None


def _api_error(message: str, error: Exception, hint: str | None = None) -> StackctlError:
    text = _words(str(getattr(error, "explanation", None) or error).strip())
    if error.__cause__ is not None:
        text += f": {error.__cause__}"
    lines = text.splitlines()[-5:]
    return StackctlError(message, details=lines, hint=hint, exit_code=ExitCode.HOST)


def _words(text: str) -> str:
    """Return the message of an error of Podman; some are wrapped in JSON."""
    try:
        return str(json.loads(text)["message"])
    except (ValueError, TypeError, KeyError):
        return text


@contextlib.contextmanager
def connect(runtime: Path) -> Iterator[Podman]:
    """Serve Podman's API on a socket in ``runtime`` (0700) and connect to it.

    Raises StackctlError (exit 6) if Podman is absent or its service does not start.
    """
    from podman import PodmanClient

    path_security.make_private_folder(runtime)
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
            hint=PODMAN_REMEDY,
            exit_code=ExitCode.HOST,
        ) from None
    except OSError as error:
        raise StackctlError(
            f"cannot run podman: {error.strerror}", exit_code=ExitCode.HOST
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
    """Return True if a connection to a socket succeeds; its file appears a moment earlier."""
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(address))
        except OSError:
            return False
    return True
