"""The front door of a stack: where it listens, what it guards, and which engine is behind it."""

from __future__ import annotations

import hashlib
from typing import Annotated

from msgspec import Meta

from stackctl.values.base import Value
from stackctl.values.profile import Port

#: The image built here comes first, else the one that HAProxy publishes (long-term support).
LOCAL_IMAGE = "localhost/stackctl/haproxy:latest"
DEFAULT_IMAGE = "docker.io/library/haproxy:lts"


class Door(Value, frozen=True, kw_only=True):
    """HAProxy in front of one engine.

    It listens on ``address`` (an IP address) and ``port``, and passes requests on to 127.0.0.1 and
    ``engine_port``. The engine is up while ``health_path`` answers 200; otherwise new requests
    wait, ``hold_s`` seconds at most. ``image`` is a pinned reference, ``key`` says whether clients
    must show an API key.
    """

    port: Port
    address: str = "127.0.0.1"
    engine_port: Port
    health_path: str
    hold_s: Annotated[int, Meta(ge=1, le=3600)] = 120
    image: str
    key: bool = False


def key_digest(key: str) -> str:
    """What the door keeps of an API key: its SHA-256 in upper-case hex, as HAProxy computes it.

    So neither the door's files nor its admin socket hold keys, and how long a comparison takes
    tells nothing about them.
    """
    return hashlib.sha256(key.encode()).hexdigest().upper()
