"""CDI files: they describe the GPUs to Podman, and each driver needs new ones.

A service writes them at each boot: the toolkit's own, or stackctl's if the toolkit has none. Podman
before 5.1 cannot parse the field additionalGids, which newer toolkits write, and then finds no GPU.
For such a Podman, provisioning installs a drop-in of the toolkit's service
(``host_paths.CDI_DROP_IN``), with which it leaves the field out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from stackctl.quantity import version_numbers
from stackctl.requirements import host_paths
from stackctl.requirements.facts import MachineFacts, StackNeeds
from stackctl.requirements.gpu import DEFAULT_CUDA, GpuDriver, GpuPresent, nvidia_gpus
from stackctl.requirements.podman import usable_version
from stackctl.requirements.requirement import ProvisionItem, provision_fix, shipped_file
from stackctl.units.quadlet import OLDEST_TEXT
from stackctl.values.host import CdiProblemCode, CdiSpec, Gpu, Host
from stackctl.values.provision import (
    Change,
    EnableChange,
    ItemPlan,
    PackagesChange,
    ReloadChange,
    RestartChange,
)
from stackctl.values.result import Result, Status

#: Podman before this version cannot parse additionalGids, which toolkits from 1.19 on write unless
#: they get the variable below. Older toolkits ignore it. (Sources of both programs at each tag.)
PODMAN_WITH_GIDS = (5, 1)
_TOOLKIT_WITH_GIDS = (1, 19)
_NO_GIDS = "no-additional-gids-for-device-nodes"
_WITHOUT_GIDS = f"{host_paths.CDI_FLAGS}={_NO_GIDS}"
#: Toolkits from this version on have a service that writes the files in /run at each boot.
_TOOLKIT_WITH_SERVICE = (1, 18)
_TOOLKIT_UNITS = ("nvidia-cdi-refresh.path", "nvidia-cdi-refresh.service")
_OUR_UNIT = "stackctl-cdi-refresh.service"
_REFRESH = "sudo systemctl restart nvidia-cdi-refresh.service"
_FIRST_WITH_GIDS = ".".join(map(str, PODMAN_WITH_GIDS))
_EXPECTED = "a CDI file that this podman can use names the GPUs"
#: Parts of problems in documents from before they had codes, in this order. They never change.
_TEXTS_WITHOUT_CODE: tuple[tuple[str, CdiProblemCode], ...] = (
    ("cannot be read", "unreadable"),
    ("additionalGids", "additional-gids"),
    ("takes neither", "duplicate-device"),
    ("upgrade podman", "newer-cdi"),
)


def _generate_command(podman: str | None, path: str = "/etc/cdi/nvidia.yaml") -> str:
    """Return the command that writes a CDI file which this podman can parse."""
    variable = f"{_WITHOUT_GIDS} " if _lacks_gids(podman) else ""
    return f"sudo {variable}nvidia-ctk cdi generate --output={path}"


def missing_device_remedy(host: Host) -> str:
    """Return the remedy for a GPU that podman cannot find, the same as the finding's."""
    found = CdiFiles().check(host, StackNeeds())
    remedies = (result.remedy for result in found if result.status == "fail")
    return next(filter(None, remedies), None) or _generate_command(host.tools.podman)


def _lacks_gids(podman: str | None) -> bool:
    return podman is not None and version_numbers(podman) < PODMAN_WITH_GIDS


class CdiFiles(ProvisionItem):
    """A CDI file that this podman can use names every GPU."""

    name = "cdi"
    why = "Podman gives a container its GPU by a CDI file, made anew for each driver"

    def check(self, host: Host, needs: StackNeeds) -> Iterator[Result]:
        """Yield a finding for each bad file, then one about the devices of usable files."""
        if not needs.gpu or not host.gpus:
            return
        specs = host.tools.cdi
        if not specs:
            yield self.result(
                "fail", "no file in /etc/cdi or /run/cdi", expected=_EXPECTED,
                remedy=provision_fix(self.name, _generate_command(host.tools.podman)),
            )  # fmt: skip
            return
        usable = [spec for spec in specs if spec.problem is None]
        unnamed = [gpu for gpu in nvidia_gpus(host) or host.gpus if gpu.cdi is None]
        status: Status = "warn" if usable and not unnamed else "fail"
        yield from (self._bad_file(host, spec, status) for spec in specs if spec.problem)
        if usable:
            yield self._devices(host, usable, unnamed)

    def _devices(self, host: Host, usable: Sequence[CdiSpec], unnamed: Sequence[Gpu]) -> Result:
        """Return the finding about the devices that usable files name."""
        if not unnamed:
            names = " ".join(gpu.cdi for gpu in host.gpus if gpu.cdi)
            return self.result("ok", names, expected=_EXPECTED)
        missing = ", ".join(gpu.uuid or gpu.name or str(gpu.index) for gpu in unnamed)
        return self.result(
            "fail", f"no device for {missing}", expected=_EXPECTED,
            evidence=" ".join(spec.path for spec in usable),
            remedy=_generate_command(host.tools.podman),
        )  # fmt: skip

    def _bad_file(self, host: Host, spec: CdiSpec, status: Status) -> Result:
        return self.result(
            status,
            f"{spec.path}: {spec.problem}",
            expected=_EXPECTED,
            evidence=f"podman {host.tools.podman}" if host.tools.podman else None,
            remedy=self._file_remedy(spec, host.tools.podman),
        )

    def unneeded(self, facts: MachineFacts, needs: StackNeeds) -> str | None:
        """Return the reason if no profile uses a GPU, or if there is none; else None."""
        if not needs.gpu:
            return "no profile that was named uses a GPU"
        return "no GPU" if not facts.host.gpus and self.name not in needs.named else None

    def changes(self, facts: MachineFacts, needs: StackNeeds) -> ItemPlan:  # noqa: ARG002
        """Return the plan that has a file generated at each boot, or a refusal."""
        any_stack = StackNeeds(cuda=DEFAULT_CUDA)
        for requirement in (GpuPresent(), GpuDriver()):
            for result in requirement.check(facts.host, any_stack):
                if result.status == "fail":
                    return self.refused(result.actual or requirement.name, result.remedy)
        # The last finding decides: others are about files for which another file may make up.
        state = next(reversed(list(self.check(facts.host, any_stack))), None)
        if state is not None and state.status != "fail":
            return self.already_set(state.actual or "")
        for spec in facts.host.tools.cdi:
            if spec.path.startswith("/etc/cdi/"):
                # The service does not touch files in /etc, which a person or program wrote.
                problem = spec.problem or "it names other devices"
                return self.refused(
                    f"{spec.path} is not stackctl's: {problem}", f"sudo rm {spec.path}, then again"
                )
        return self._refresh(facts, state.actual if state else None)

    def _refresh(self, facts: MachineFacts, now: str | None) -> ItemPlan:
        """Return the plan that installs the toolkit and enables the service that runs it.

        The service is the toolkit's own if it has one, else stackctl's. ``now`` describes the
        present state.
        """
        changes: list[Change] = []
        version = (facts.packages or {}).get(host_paths.TOOLKIT)
        own = "nvidia-cdi-refresh.service" in facts.units
        if version is None and not own:
            if facts.packages is None or facts.toolkit is None:
                return self.refused(
                    f"no package source here has {host_paths.TOOLKIT}",
                    "add NVIDIA's package source (see its guide: Installing the NVIDIA Container "
                    "Toolkit), then again",
                )
            version = facts.toolkit
            changes.append(PackagesChange(names=(host_paths.TOOLKIT,)))
        own = own or version_numbers(version or "") >= _TOOLKIT_WITH_SERVICE
        units = _TOOLKIT_UNITS if own else (_OUR_UNIT,)
        left = [unit for unit in units if unit not in facts.enabled]
        lacks = self._needs_drop_in(facts, version, left)
        wanted = not own or lacks
        lines = [one for one in facts.foreign if one.key == host_paths.CDI_FLAGS]
        if own and wanted and lines:
            # The last one decides (systemd.exec(5)).
            line = lines[-1]
            if _NO_GIDS not in re.split(r"[,\s]+", line.value):
                return self.refused(
                    f"{line.where} sets {line.key} to {line.value}, without {_NO_GIDS}, which "
                    f"podman before {_FIRST_WITH_GIDS} needs",
                    f"add it there, after a comma ({line.path}), then: {_REFRESH}",
                )
            wanted = False
        names = [host_paths.CDI_DROP_IN if own else host_paths.CDI_SERVICE] if wanted else []
        if own and lacks and _OUR_UNIT in facts.enabled:
            # From before the toolkit had a service: it writes the same file at boot.
            names.append(host_paths.CDI_SERVICE)
        files = [file for name in names if (file := shipped_file(facts, name)) is not None]
        for file in files:
            if refused := self.refuse_foreign_file(facts, file):
                return refused
        # Before the package: its installation starts the service.
        changes[:0] = files
        if not left and not changes:
            return self.refused(
                f"{units[-1]} runs, and yet: {now}",
                f"see why: journalctl -u {units[-1]}; then: sudo systemctl restart {units[-1]}",
            )
        if files and units[-1] not in left:
            changes += [ReloadChange(), RestartChange(unit=units[-1])]
        changes += [EnableChange(unit=unit) for unit in left]
        undo = "stops the service; removes what was installed" if left else "removes the file"
        return self.planned(now, undo, *changes)

    def _needs_drop_in(self, facts: MachineFacts, toolkit: str | None, left: Sequence[str]) -> bool:
        """Return True if the toolkit's service must not write fields that podman cannot parse.

        A service that provisioning enables gets the drop-in before the toolkit is updated to such a
        version.
        """
        if not _lacks_gids(usable_version(facts)):
            return False
        return bool(left) or toolkit is None or version_numbers(toolkit) >= _TOOLKIT_WITH_GIDS

    def _file_remedy(self, spec: CdiSpec, podman: str | None) -> str:
        """Return the remedy for one file that podman cannot use."""
        path, text = spec.path, spec.problem or ""
        made_at_boot = path.startswith(("/run/", "/var/run/"))
        match spec.code or next((c for part, c in _TEXTS_WITHOUT_CODE if part in text), None):
            case "unreadable":
                return f"sudo chmod a+r {path}"
            case "additional-gids" if not all(n.startswith("nvidia.com/") for n in spec.devices):
                return (
                    f"upgrade podman to {_FIRST_WITH_GIDS}, or leave additionalGids out of the file"
                )
            case "additional-gids" if made_at_boot:
                return provision_fix(
                    self.name,
                    f"echo {_WITHOUT_GIDS} | sudo tee -a {host_paths.CDI_VARIABLES} && {_REFRESH}",
                )
            case "additional-gids":
                return _generate_command(podman or OLDEST_TEXT, path)
            case "duplicate-device":
                return f"sudo rm {path}"
            case "newer-cdi":
                return "upgrade podman, or write the file with an older nvidia-container-toolkit"
        return _REFRESH if made_at_boot else _generate_command(podman)
