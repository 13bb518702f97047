"""Render the front door: its unit, and the files that HAProxy reads. Pure, as units/render.py."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from typing import Literal

from stackctl.engines import ENGINES
from stackctl.engines import engine as find_engine
from stackctl.errors import ExitCode, StackctlError
from stackctl.resources import data_folder
from stackctl.units import quoting
from stackctl.units.quadlet import Keys, parse_version
from stackctl.units.render import RESTARTS, sets_no_new_privileges, template_environment
from stackctl.values.generation import UnitFile
from stackctl.values.plan import Plan
from stackctl.values.profile import Profile
from stackctl.values.proxy import Proxy

#: Subfolder of the door's folder that holds the admin socket. The container can write nowhere else.
ADMIN = "admin"
#: The file of key digests in the door's folder, one a line (values.proxy.key_digest).
KEYS = "keys"

#: Seconds. HAProxy starts in well under one, but at boot it competes with engines that load for
#: minutes; a crash is followed by a start as soon as that.
_START_TIMEOUT_S = 300
_RESTART_PAUSE_S = 1

#: Paths besides /v1/ and health that clients of inference engines use (from their route tables).
#: Paths that one engine alone has stand in its ``client_paths``.
CLIENT_PATHS = (
    "/completion", "/completions", "/chat/completions", "/infill", "/embedding", "/embeddings",
    "/rerank", "/reranking", "/score", "/pooling", "/classify", "/tokenize", "/detokenize",
    "/apply-template", "/models", "/version",
)  # fmt: skip


def proxy_log_identifier(stack: str) -> str:
    """Return the identifier of the door's lines in the journal."""
    return f"{stack}-door"


@dataclass(frozen=True)
class ProxyFiles:
    """The door's unit, and the files of its folder."""

    unit: UnitFile
    files: tuple[UnitFile, ...]


def proxy_service(stack: str) -> str:
    """Return the service of a stack's door. Names of stacks have no underscore: no clash."""
    return f"{stack}_door.service"


def proxy_unit_file(stack: str) -> str:
    """Return the file name of the door's unit."""
    return f"{stack}_door.container"


def proxy_container(stack: str) -> str:
    """Return the name of the door's container."""
    return f"stackctl-{stack}_door"


def make_proxy(profile: Profile, plan: Plan, image: str) -> Proxy:
    """Return the front door of a plan that has given its engine a private port."""
    return Proxy(
        port=plan.port,
        address=profile.address,
        engine_port=plan.engine_listen_port,
        health_path=find_engine(plan.engine).health_path,
        image=image,
        key=profile.api_key,
    )


def render_proxy(
    stack: str,
    proxy: Proxy,
    *,
    scope: Literal["user", "system"],
    podman: str | None,
    folder: str,
    apparmor: bool = False,
) -> ProxyFiles:
    """Render the unit and the files of a door.

    The keys are those of the version ``podman`` (None: the newest). ``folder`` is the absolute path
    of the door's folder (0700). Before the start it must hold ``files``, an empty folder ADMIN and,
    when keys are required, the file KEYS (0600). ``apparmor`` is True if Podman confines root's
    containers with AppArmor.

    Raises:
        StackctlError: exit 2 for an invalid address, health path or folder, and for a door that
            others could reach without a key; 6 for a Podman without Quadlet.
    """
    address = _address(proxy)
    health = proxy.health_path
    if not re.fullmatch(r"/[A-Za-z0-9._/-]{0,100}", health):
        raise StackctlError(f"{health!r} is not the path of a URL", exit_code=ExitCode.USAGE)
    keys = Keys(parse_version(podman))
    templates = template_environment()
    unit = templates.get_template("door.container.j2").render(
        stack=stack,
        door=proxy,
        scope=scope,
        container=proxy_container(stack),
        identifier=proxy_log_identifier(stack),
        always_there=address.is_loopback or address.is_unspecified,
        mounts=[
            (folder, quoting.join_volume(folder, "/door", "ro")),
            (f"{folder}/{ADMIN}", quoting.join_volume(f"{folder}/{ADMIN}", "/admin", "rw")),
        ],
        no_new_privileges=sets_no_new_privileges(scope, apparmor=apparmor),
        restarts=RESTARTS,
        restart_pause=_RESTART_PAUSE_S,
        restart_window=(RESTARTS + 1) * (_START_TIMEOUT_S + _RESTART_PAUSE_S),
        start_timeout=_START_TIMEOUT_S,
        key=keys.key,
        argument=keys.argument,
        podman_args=keys.podman_args,
        version=keys.version,
    )
    config = templates.get_template("haproxy.cfg.j2").render(
        stack=stack, door=proxy, bind=f"{_url_host(address)}:{proxy.port}",
        open=address.is_loopback and not proxy.key,
        health_paths=sorted({"/health", health}), client_paths=_client_paths(), keys=KEYS,
    )  # fmt: skip
    hold = (data_folder("templates") / "hold.lua").read_text(encoding="utf-8")
    return ProxyFiles(
        unit=UnitFile(name=proxy_unit_file(stack), text=unit),
        files=(
            UnitFile(name="haproxy.cfg", text=config),
            UnitFile(name="hold.lua", text=hold),
        ),
    )


def _url_host(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> str:
    return f"[{address}]" if address.version == 6 else str(address)


def _client_paths() -> tuple[str, ...]:
    """Return the paths that a front door passes on, whichever engine is behind it now."""
    own = (path for engine in ENGINES.values() for path in engine.client_paths)
    return tuple(dict.fromkeys((*CLIENT_PATHS, *own)))


def _address(proxy: Proxy) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    try:
        address = ipaddress.ip_address(proxy.address)
        if "%" in proxy.address:
            raise ValueError  # the scope of an IPv6 address may be any text
    except ValueError:
        raise StackctlError(
            f"{proxy.address!r} is not an IP address",
            hint="127.0.0.1 for this machine only, 0.0.0.0 for all its networks",
            exit_code=ExitCode.USAGE,
        ) from None
    if not address.is_loopback and not proxy.key:
        raise StackctlError(
            f"{address} can be reached from other machines: that needs an API key",
            hint="stackctl key, or listen on 127.0.0.1",
            exit_code=ExitCode.USAGE,
        )
    return address
