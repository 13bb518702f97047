"""The last module of the virtual machine: the undo reverts all changes."""

from __future__ import annotations

import pytest

from .vmbox import STORAGE, Box, differences, give_back

pytestmark = pytest.mark.vm

#: Allowed differences at the end, with reasons. Patterns begin with the kind of the line.
ALLOWED = {
    r"(file|hash \w+|folder) var/lib/(apt|dpkg)/": "the package manager's own notes; packages "
    "themselves are compared",
    r"(file|folder) var/backups\b": "copies that a timer makes of the package manager's notes at "
    "midnight, and its folder's",
    r"(file|hash \w+|folder) var/cache/(apt|debconf|ldconfig)/": "caches",
    r"(file|hash \w+) etc/(passwd|group|shadow|gshadow|subuid|subgid)-( |$)": "copies that "
    "shadow's programs keep of their last change",
    r"\w+ (\w+ )?var/(lib|cache)/(containers|stackctl)\b": "root's images, and the history of "
    "root's stacks, which are no part of provisioning",
}


def test_all_is_as_it_was(served: Box) -> None:
    served.root("stackctl", "down", "cpu", code=None)
    # The file belongs to these tests. It would keep its folder from being removed.
    served.root("rm", STORAGE["root"])
    for command, said in served.follow("4. Go back"):
        assert "error:" not in said, f"{command}\n{said}"
    give_back(served)
    left = differences(served.before, served.record(), ALLOWED)
    assert not left, "\n".join(left)
    assert served.root("sh", "-c", "command -v podman stackctl", code=None).returncode != 0
