"""Changes that prepare a machine, the state before each change, and their reports."""

from __future__ import annotations

from typing import Literal

from stackctl.values.base import Value
from stackctl.values.result import Result


class FileChange(Value, frozen=True, kw_only=True, tag="file"):
    """A file of root with this text and mode."""

    path: str
    text: str
    mode: int = 0o644


class SettingChange(Value, frozen=True, kw_only=True, tag="setting"):
    """A value for files of the kernel (/proc/sys, /sys), in effect until the next boot."""

    paths: tuple[str, ...]
    value: str


class FolderChange(Value, frozen=True, kw_only=True, tag="folder"):
    """A folder with mode 0755 and its owner (None: root)."""

    path: str
    owner: str | None = None


class PackagesChange(Value, frozen=True, kw_only=True, tag="packages"):
    """Packages to install. ``all_names`` includes their dependencies; empty if unknown."""

    names: tuple[str, ...]
    all_names: tuple[str, ...] = ()


class HoldChange(Value, frozen=True, kw_only=True, tag="hold"):
    """Packages that are held at their version, so that an upgrade does not change them."""

    names: tuple[str, ...]


class AccountChange(Value, frozen=True, kw_only=True, tag="account"):
    """A system account with a home and without a password."""

    user: str
    home: str


class SubidsChange(Value, frozen=True, kw_only=True, tag="subids"):
    """Subordinate IDs of a user: the first of ``count`` new IDs; None if the user has enough."""

    user: str
    uid: int | None = None
    gid: int | None = None
    count: int = 65536


class LingerChange(Value, frozen=True, kw_only=True, tag="linger"):
    """Linger for a user: the user's services start at boot and keep running after logout."""

    user: str


class ReloadChange(Value, frozen=True, kw_only=True, tag="reload"):
    """A reload of systemd's configuration; it needs no undo."""


class RestartChange(Value, frozen=True, kw_only=True, tag="restart"):
    """A system unit that is started again to use its changed files; it needs no undo."""

    unit: str


class EnableChange(Value, frozen=True, kw_only=True, tag="enable"):
    """A system unit that is started now and at every boot."""

    unit: str


class ProgramChange(Value, frozen=True, kw_only=True, tag="program"):
    """A copy of this stackctl in a folder that only root can write, and a link in the PATH."""

    folder: str
    link: str


class GuardChange(Value, frozen=True, kw_only=True, tag="guard"):
    """The watchdog timer for the stacks of a user (None: the stacks of the system)."""

    user: str | None = None
    program: str


#: Changes that one command makes, also by hand.
CommandChange = (
    FolderChange
    | PackagesChange
    | HoldChange
    | AccountChange
    | SubidsChange
    | LingerChange
    | ReloadChange
    | RestartChange
    | EnableChange
    | GuardChange
)
Change = FileChange | SettingChange | ProgramChange | CommandChange


class PreviousState(Value, frozen=True, kw_only=True):
    """The state before a change. All fields are empty if nothing was there.

    ``data`` is a file's content in base64, ``values`` are the values of a setting's paths in their
    order, ``names`` the packages that were not installed or not held, ``folders`` the missing
    folders that the change or its packages create.
    """

    data: str | None = None
    mode: int | None = None
    uid: int | None = None
    gid: int | None = None
    values: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    folders: tuple[str, ...] = ()


class RecordedChange(Value, frozen=True, kw_only=True):
    """A change that was made or begun; it is recorded before it is made."""

    item: str
    change: Change
    before: PreviousState = PreviousState()
    when: str
    user: str


class UndoRecord(Value, frozen=True, kw_only=True):
    """All changes that ``stackctl provision --undo`` can revert, oldest first."""

    schema: Literal["stackctl.provisioned/1"] = "stackctl.provisioned/1"
    changes: tuple[RecordedChange, ...] = ()


ItemStatus = Literal["ok", "change", "skip", "refused"]
#: The event at which a change takes effect, for changes that have no effect at once.
Effect = Literal["login", "reboot"]


class ItemPlan(Value, frozen=True, kw_only=True):
    """One requirement of a machine: its present state (``now``), its reason, and its changes.

    ``problem`` is the reason why stackctl cannot meet it, ``remedy`` the action that would help.
    """

    item: str
    status: ItemStatus
    why: str
    now: str | None = None
    changes: tuple[Change, ...] = ()
    undo: str | None = None
    effect: Effect | None = None
    problem: str | None = None
    remedy: str | None = None


class ShownChange(Value, frozen=True, kw_only=True):
    """A change for display: a sentence, a diff, and a command with the same effect."""

    what: str
    diff: str | None = None
    command: str | None = None


class ItemReport(Value, frozen=True, kw_only=True):
    """The result, or the planned result, for one item."""

    item: str
    status: Literal["ok", "change", "changed", "skip", "refused", "undo", "undone", "kept"]
    why: str | None = None
    now: str | None = None
    changes: tuple[ShownChange, ...] = ()
    undo: str | None = None
    effect: Effect | None = None
    problem: str | None = None
    remedy: str | None = None


class ProvisionReport(Value, frozen=True, kw_only=True):
    """The result of ``stackctl provision``, or its preview (``dry_run``).

    ``changed`` counts items. ``pending`` lists changes that take effect after a login or a reboot.
    ``advice`` lists settings that only the firmware can change.
    """

    schema: Literal["stackctl.provision/1"] = "stackctl.provision/1"
    operation: Literal["provision", "undo"]
    dry_run: bool
    service_user: str | None = None
    items: tuple[ItemReport, ...]
    changed: int
    pending: tuple[str, ...] = ()
    advice: tuple[Result, ...] = ()
