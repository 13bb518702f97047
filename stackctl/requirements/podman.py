"""Podman with Quadlet: Podman runs the containers, and systemd starts Quadlet's units."""

from __future__ import annotations

from collections.abc import Iterator

from stackctl.quantity import version_numbers
from stackctl.requirements.facts import LaunchFacts, MachineFacts, StackNeeds
from stackctl.requirements.requirement import ProvisionItem, Requirement, as_root, provision_fix
from stackctl.units.quadlet import OLDEST, OLDEST_TEXT, WHY_OLDEST
from stackctl.values.host import Host, Problem
from stackctl.values.provision import ItemPlan, PackagesChange
from stackctl.values.result import Result

_INSTALL = {
    "debian": "apt-get install podman",
    "ubuntu": "apt-get install podman",
    "fedora": "dnf install podman",
    "rhel": "dnf install podman",
    "suse": "zypper install podman",
    "arch": "pacman -S podman",
}
#: Releases whose own podman is too old.
_OLD_RELEASES = (("debian", "11"), ("debian", "12"), ("ubuntu", "20.04"), ("ubuntu", "22.04"))
_UPGRADE = f"upgrade to Debian 13, Ubuntu 24.04 or newer, or install podman {OLDEST_TEXT} or newer"
#: The first version whose rootless networks are made by passt, not slirp4netns (release notes).
_WITH_PASST = (5, 0)
#: The first version whose AppArmor profile has rules for crun, and the mark of Ubuntu's patch.
_WITH_CRUN_RULES, _UBUNTU_PATCH = (5, 1), "-apparmor"
#: Packages of the distribution that a podman built by hand needs too.
_HELPERS = ("uidmap", "dbus-user-session")


def packages(
    families: tuple[str, ...], release: str | None, version: str | None
) -> tuple[str, ...]:
    """Return the Debian or Ubuntu packages that Podman needs; none for other distributions.

    ``version`` is that of Podman, installed or to be; if it is None, the release decides. Podman
    recommends more packages. stackctl's containers need only these: a runtime, a network stack,
    subordinate ids, and a bus for user services.
    """
    if not {"debian", "ubuntu"} & set(families):
        return ()
    if version is None:
        old = (families[0], release) == ("ubuntu", "24.04")
    else:
        old = version_numbers(version) < _WITH_PASST
    network = "slirp4netns" if old else "passt"
    return ("podman", "crun", "netavark", network, *_HELPERS)


def usable_version(facts: MachineFacts) -> str | None:
    """Return the version of podman that is installed or would be; None if it is unknown."""
    return facts.host.tools.podman or facts.podman_candidate


class PodmanVersion(ProvisionItem):
    """A version of podman that can run stackctl's units is installed and runs."""

    name = "podman"
    codes = ("podman-missing", "podman-no-answer", "podman-too-old")
    why = "containers run under Podman, and systemd starts them by its Quadlet"

    def problems(self, facts: LaunchFacts) -> Iterator[Problem]:
        """Yield a problem if podman is absent, fails or is too old."""
        seen = facts.probed
        version = seen.tools.podman
        if version is None and facts.live and seen.podman_absent:
            yield Problem(
                code="podman-missing",
                what="podman is not installed",
                why="containers run under podman",
                fix=self._install(facts),
            )
        elif version is None and facts.live:
            yield Problem(
                code="podman-no-answer",
                what="podman does not answer",
                why=seen.podman_error or "podman --version gives no version",
            )
        elif version is not None and version_numbers(version) < OLDEST:
            yield Problem(
                code="podman-too-old",
                what=f"podman {version} is too old",
                why=WHY_OLDEST,
                fix=_UPGRADE,
            )

    def _install(self, facts: LaunchFacts) -> str | None:
        families = facts.probed.families
        if (*families[:1], facts.probed.release) in _OLD_RELEASES:
            return _UPGRADE
        command = next((_INSTALL[name] for name in families if name in _INSTALL), None)
        if command is None:
            return None
        by_hand = as_root(facts, command)
        return provision_fix(self.name, by_hand) if command.startswith("apt-get") else by_hand

    def check(self, host: Host, needs: StackNeeds) -> Iterator[Result]:  # noqa: ARG002
        """Yield a finding with the version and the oldest usable one."""
        expected = f"podman {OLDEST_TEXT} or newer"
        version = host.tools.podman
        problem = self.problem_on(host)
        if problem is not None:
            yield self.failed(problem, expected)
        elif version is None:
            yield self.unknown(expected)
        else:
            old = version_numbers(version) < OLDEST
            yield self.result(
                "fail" if old else "ok", version, expected=expected,
                evidence=WHY_OLDEST if old else None, remedy=_UPGRADE if old else None,
            )  # fmt: skip

    def changes(self, facts: MachineFacts, needs: StackNeeds) -> ItemPlan:  # noqa: ARG002
        """Return the plan that installs missing packages.

        Without a usable package of the distribution, return a refusal.
        """
        version = facts.host.tools.podman
        if version is not None and version_numbers(version) < OLDEST:
            return self.refused(f"podman {version} is too old: {WHY_OLDEST}", _UPGRADE)
        if version is None and self._offers_old(facts):
            offered = " ".join(filter(None, ("podman", facts.podman_candidate)))
            return self.refused(
                f"{facts.host.tools.os}: its {offered} is too old: {WHY_OLDEST}", _UPGRADE
            )
        wanted = packages(facts.families, facts.release, usable_version(facts))
        if facts.packages is None or not wanted:
            if version is not None:
                return self.already_set(version)
            return self.refused(
                "packages are installed on Debian and Ubuntu only; this is "
                f"{facts.host.tools.os or 'another system'}",
                f"install podman {OLDEST_TEXT} or newer, uidmap and passt (before podman 5: "
                "slirp4netns) with its own tools, then again",
            )
        if version is not None and "podman" not in facts.packages:
            # A podman built by hand would conflict with the distribution's package.
            wanted = _HELPERS
        missing = tuple(name for name in wanted if name not in facts.packages)
        if not missing:
            return self.already_set(version or facts.packages.get("podman") or "")
        change = PackagesChange(names=missing, all_names=facts.simulated)
        now = f"podman {version}" if version else "not installed"
        undo = "removes these packages and their dependencies; images stay in /var/lib/containers"
        return self.planned(now, undo, change)

    def _offers_old(self, facts: MachineFacts) -> bool:
        """Return True if the package sources have too old a podman; if unknown, by the release."""
        if facts.podman_candidate is not None:
            return version_numbers(facts.podman_candidate) < OLDEST
        return (*facts.families[:1], facts.release) in _OLD_RELEASES


class QuadletGenerator(Requirement):
    """systemd finds podman's generator, which turns .container files into services."""

    name = "quadlet"
    codes = ("quadlet-missing",)

    def problems(self, facts: LaunchFacts) -> Iterator[Problem]:
        """Yield a problem if systemd lacks the generator of a podman that has Quadlet."""
        version = facts.probed.tools.podman
        if version is None or version_numbers(version) < OLDEST:
            return
        if facts.probed.generator_runs is False:
            yield Problem(
                code="quadlet-missing",
                what="no Quadlet generator",
                why=f"systemd finds no podman-{facts.scope}-generator, so .container files do "
                "nothing",
                fix="install podman with its systemd generators (the distribution's package has "
                "them)",
            )

    def check(self, host: Host, needs: StackNeeds) -> Iterator[Result]:  # noqa: ARG002
        """Yield a finding with the path of the generator."""
        expected = "podman's Quadlet generator where systemd finds it"
        problem = self.problem_on(host)
        if problem is not None:
            yield self.failed(problem, expected)
        elif host.tools.quadlet_generator is None:
            yield self.unknown(expected)
        else:
            yield self.result("ok", host.tools.quadlet_generator, expected=expected)


class ContainerProfile(Requirement):
    """Podman's AppArmor profile lets crun end root's containers.

    AppArmor 4 gave crun a profile of its own, so its signals no longer come from an unconfined
    process. Podman's profile allows them from 5.1 on (containers/common 0.59), Ubuntu's package
    before that by a patch, which marks the profile's name.
    """

    name = "apparmor"

    def check(self, host: Host, needs: StackNeeds) -> Iterator[Result]:  # noqa: ARG002
        """Yield a warning if a stop of root's containers would fail."""
        tools = host.tools
        if host.scope != "system" or not tools.apparmor or "crun" not in tools.apparmor_profiles:
            return
        if tools.podman is None or version_numbers(tools.podman) >= _WITH_CRUN_RULES:
            return
        loaded = [name for name in tools.apparmor_profiles if name != "crun"]
        # Podman loads its profile with its first container.
        patched = any(_UBUNTU_PATCH in name for name in loaded)
        if patched or (not loaded and (tools.os or "").startswith("Ubuntu")):
            return
        yield self.result(
            "warn", f"{loaded[-1] if loaded else f'the profile of podman {tools.podman}'} lacks it",
            expected="podman's AppArmor profile lets crun stop containers",
            evidence="crun's TERM and KILL are refused, so each stop of root's stacks fails",
            remedy="upgrade podman to 5.1 or newer, or install Ubuntu 24.04's own package",
        )  # fmt: skip
