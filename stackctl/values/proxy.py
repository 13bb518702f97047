"""The front door of a stack: its address, its key check, and the engine behind it."""

from __future__ import annotations

import hashlib
from typing import Annotated

from msgspec import Meta

from stackctl.values.base import Value
from stackctl.values.profile import Port

#: The image built on this machine is preferred to the one that HAProxy publishes (its long-term
#: support release).
LOCAL_IMAGE = "localhost/stackctl/haproxy:latest"
DEFAULT_IMAGE = "docker.io/library/haproxy:lts"


class Proxy(Value, frozen=True, kw_only=True):
    """HAProxy in front of one engine.

    It listens on ``address`` (an IP address) and ``port``, and passes requests on to 127.0.0.1 and
    ``engine_port``. The engine is up while ``health_path`` answers 200; otherwise new requests
    wait, ``hold_s`` seconds at most. ``image`` is a pinned reference. ``key``: clients must send an
    API key.
    """

    port: Port
    address: str = "127.0.0.1"
    engine_port: Port
    health_path: str
    hold_s: Annotated[int, Meta(ge=1, le=3600)] = 120
    image: str
    key: bool = False


def key_digest(key: str) -> str:
    """Return the SHA-256 of an API key in upper-case hex, the form that HAProxy computes.

    The front door stores this digest only: its files and its admin socket hold no keys, and the
    time of a comparison reveals nothing about a key.
    """
    return hashlib.sha256(key.encode()).hexdigest().upper()
