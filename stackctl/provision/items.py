"""The plan of every provisioning item, and the changes that need a new user manager."""

from __future__ import annotations

from collections.abc import Collection

from stackctl.requirements import ITEMS
from stackctl.requirements.facts import MachineFacts, StackNeeds
from stackctl.requirements.user_managers import UserManagerSetting
from stackctl.values.provision import ItemPlan


def plan_items(
    facts: MachineFacts, needs: StackNeeds, only: Collection[str] = ()
) -> tuple[ItemPlan, ...]:
    """Return the plan of each item, or only of the items named in ``only``."""
    return tuple(
        item.plan(facts, needs) for name, item in ITEMS.items() if not only or name in only
    )


def pending_until_login(facts: MachineFacts) -> tuple[str, ...]:
    """Return one text for each setting that takes effect when the user's manager restarts."""
    if facts.user is None or facts.user.uid is None or not facts.user.running:
        return ()
    found = (item.pending(facts) for item in ITEMS.values() if isinstance(item, UserManagerSetting))
    return tuple(text for text in found if text is not None)
