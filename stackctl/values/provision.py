"""What makes a machine ready: single changes, what was there before them, and reports of both."""

from __future__ import annotations

from typing import Literal

from stackctl.values.base import Value
from stackctl.values.result import Result


class FileChange(Value, frozen=True, kw_only=True, tag="file"):
    """A file of root's with this text and mode."""

    path: str
    text: str
    mode: int = 0o644


class SettingChange(Value, frozen=True, kw_only=True, tag="setting"):
    """Files of the kernel (/proc/sys, /sys) that get a value until the next boot."""

    paths: tuple[str, ...]
    value: str


class FolderChange(Value, frozen=True, kw_only=True, tag="folder"):
    """A folder (0755) that belongs to a user; None: to root."""

    path: str
    owner: str | None = None


class PackagesChange(Value, frozen=True, kw_only=True, tag="packages"):
    """Packages of the distribution. ``all_names``: with those they bring along, where known."""

    names: tuple[str, ...]
    all_names: tuple[str, ...] = ()


class HoldChange(Value, frozen=True, kw_only=True, tag="hold"):
    """Packages that stay at their version until asked."""

    names: tuple[str, ...]


class AccountChange(Value, frozen=True, kw_only=True, tag="account"):
    """A system account without a password, with a home."""

    user: str
    home: str


class SubidsChange(Value, frozen=True, kw_only=True, tag="subids"):
    """Subordinate ids of a user: the first of ``count``; None where there are enough."""

    user: str
    uid: int | None = None
    gid: int | None = None
    count: int = 65536


class LingerChange(Value, frozen=True, kw_only=True, tag="linger"):
    """A user whose services start at boot and outlive logins."""

    user: str


class ReloadChange(Value, frozen=True, kw_only=True, tag="reload"):
    """systemd reads its files again; nothing to undo."""


class EnableChange(Value, frozen=True, kw_only=True, tag="enable"):
    """A unit of the system that is started, now and at every boot."""

    unit: str


class ProgramChange(Value, frozen=True, kw_only=True, tag="program"):
    """This stackctl, copied to where only root can write, and a link in the search path."""

    folder: str
    link: str


class GuardChange(Value, frozen=True, kw_only=True, tag="guard"):
    """The timer that looks after the stacks of a user; None: of the system."""

    user: str | None = None
    program: str


Change = (
    FileChange
    | SettingChange
    | FolderChange
    | PackagesChange
    | HoldChange
    | AccountChange
    | SubidsChange
    | LingerChange
    | ReloadChange
    | EnableChange
    | ProgramChange
    | GuardChange
)


class Before(Value, frozen=True, kw_only=True):
    """What was there before a change; nothing where everything is empty.

    ``data`` is a file's content in base64, ``values`` those of a setting's paths in their order,
    ``names`` the packages that were not installed or held, ``folders`` those that had to be made,
    or that come with packages.
    """

    data: str | None = None
    mode: int | None = None
    uid: int | None = None
    gid: int | None = None
    values: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    folders: tuple[str, ...] = ()


class Recorded(Value, frozen=True, kw_only=True):
    """A change that was made, or begun: it is recorded before it is made."""

    item: str
    change: Change
    before: Before = Before()
    when: str
    user: str


class Record(Value, frozen=True, kw_only=True):
    """All changes that ``stackctl provision --undo`` can take back, oldest first."""

    schema: Literal["stackctl.provisioned/1"] = "stackctl.provisioned/1"
    changes: tuple[Recorded, ...] = ()


ItemStatus = Literal["ok", "change", "skip", "refused"]
#: When a change takes effect where that is not at once.
Effect = Literal["login", "reboot"]


class ItemPlan(Value, frozen=True, kw_only=True):
    """One thing a machine needs: how it is (``now``), why it matters, and what would change.

    ``problem`` and ``remedy`` say why nothing can be done here, and what would help.
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
    """A change as people read it: in words, as a diff, as the command that does the same."""

    what: str
    diff: str | None = None
    command: str | None = None


class ItemReport(Value, frozen=True, kw_only=True):
    """What became, or would become, of one item."""

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
    """What ``stackctl provision`` did, or would do (``dry_run``).

    ``changed`` counts items; ``pending`` is what still needs a login or a reboot to take effect;
    ``advice`` is what only the firmware can change.
    """

    schema: Literal["stackctl.provision/1"] = "stackctl.provision/1"
    operation: Literal["provision", "undo"]
    dry_run: bool
    service_user: str | None = None
    items: tuple[ItemReport, ...]
    changed: int
    pending: tuple[str, ...] = ()
    advice: tuple[Result, ...] = ()
