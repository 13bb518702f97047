"""The folders of stackctl, by scope."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from stackctl.resources import data_folder

Scope = Literal["user", "system"]


@dataclass(frozen=True)
class Paths:
    """Folders of one scope. ``units`` is Quadlet's folder, with one subfolder for each stack."""

    scope: Scope
    units: Path
    state: Path
    cache: Path
    runtime: Path
    profiles: tuple[Path, ...]

    @property
    def lock(self) -> Path:
        """Return the path of the lock that every writer of this scope holds."""
        return self.runtime / "lock"

    def proxy_folder(self, stack: str) -> Path:
        """Return the folder of the files that a stack's front door reads."""
        return self.state / "doors" / stack

    @property
    def compile_caches(self) -> Path:
        """Return the folder of compiled kernels, with one subfolder for each image."""
        return self.cache / "compiled"

    def compile_cache(self, image_id: str) -> Path:
        """Return the folder of the kernels that an image's engine has compiled."""
        return self.compile_caches / image_id.removeprefix("sha256:")[:12]

    def unit_folder(self, stack: str) -> Path:
        """Return the folder of a stack's unit files."""
        return self.units / stack


def scope_paths(
    scope: Scope, environment: Mapping[str, str], *, profile_folder: Path | None = None
) -> Paths:
    """Return the folders: XDG base directories (user) or the usual system folders (system)."""
    home = Path(environment.get("HOME") or "/")

    def xdg(name: str, default: str) -> Path:
        value = environment.get(name, "")
        # The XDG specification has relative paths ignored.
        return Path(value) if value.startswith("/") else home / default

    config = xdg("XDG_CONFIG_HOME", ".config")
    given = (profile_folder,) if profile_folder is not None else ()
    profiles = (
        *given,
        config / "stackctl" / "profiles",
        Path("/etc/stackctl/profiles"),
        data_folder("profiles"),
    )
    if scope == "system":
        return Paths(
            scope=scope,
            units=Path("/etc/containers/systemd/stackctl"),
            state=Path("/var/lib/stackctl"),
            cache=Path("/var/cache/stackctl"),
            runtime=Path("/run/stackctl"),
            profiles=profiles,
        )
    state = xdg("XDG_STATE_HOME", ".local/state") / "stackctl"
    runtime = Path(environment.get("XDG_RUNTIME_DIR") or f"/run/user/{os.getuid()}")
    return Paths(
        scope=scope,
        units=config / "containers" / "systemd" / "stackctl",
        state=state,
        cache=xdg("XDG_CACHE_HOME", ".cache") / "stackctl",
        # Without a login session there is no runtime folder, and no service can be started.
        runtime=(runtime if runtime.is_dir() else state) / "stackctl",
        profiles=profiles,
    )
