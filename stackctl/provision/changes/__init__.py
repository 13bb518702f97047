"""Kinds of changes: each reads the state before a change, makes it, reverts it, describes it."""

from __future__ import annotations

from typing import Any, Final

from stackctl.provision.changes.accounts import AccountKind, LingerKind, SubidsKind
from stackctl.provision.changes.files import FileKind, FolderKind
from stackctl.provision.changes.kernel_settings import SettingKind
from stackctl.provision.changes.kind import ChangeKind
from stackctl.provision.changes.packages import HoldKind, PackagesKind
from stackctl.provision.changes.services import EnableKind, GuardKind, ProgramKind, ReloadKind
from stackctl.values.provision import (
    AccountChange,
    Change,
    EnableChange,
    FileChange,
    FolderChange,
    GuardChange,
    HoldChange,
    LingerChange,
    PackagesChange,
    ProgramChange,
    ReloadChange,
    SettingChange,
    SubidsChange,
)

#: The kind of each type of change.
KINDS: Final[dict[type, ChangeKind[Any]]] = {
    FileChange: FileKind(),
    FolderChange: FolderKind(),
    SettingChange: SettingKind(),
    PackagesChange: PackagesKind(),
    HoldChange: HoldKind(),
    AccountChange: AccountKind(),
    SubidsChange: SubidsKind(),
    LingerChange: LingerKind(),
    ReloadChange: ReloadKind(),
    EnableChange: EnableKind(),
    GuardChange: GuardKind(),
    ProgramChange: ProgramKind(),
}


def kind_of(change: Change) -> ChangeKind[Any]:
    """Return the kind of a change, which makes, reverts and describes it."""
    return KINDS[type(change)]
