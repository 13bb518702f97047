"""Engine images from Debian's packages, for machines without a container registry."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from stackctl.deploy.context import Report
from stackctl.engines import engine
from stackctl.errors import ExitCode, StackctlError
from stackctl.machine import podman, runner
from stackctl.quantity import format_bytes

#: llama.cpp is in Debian unstable only; its CPU code is chosen at run time. curl asks for health.
SUITE = "sid"
PACKAGES = ("llama.cpp-tools", "ca-certificates", "curl")


def build_llama_cpp(report: Report, output: Path | None, mirror: str | None) -> str:
    """Build the root file system; without ``output`` load it as the local image.

    Returns:
        The archive's path, or the image's name.

    Raises:
        StackctlError: exit 6 when mmdebstrap is absent; else with its words.
    """
    if output is not None:
        _bootstrap(report, output, mirror)
        return str(output)
    with tempfile.TemporaryDirectory(prefix="stackctl-image-", dir="/var/tmp") as folder:
        archive = Path(folder) / "root.tar"
        _bootstrap(report, archive, mirror)
        return load_llama_cpp(report, archive)


def load_llama_cpp(report: Report, archive: Path) -> str:
    """Load an archive under the name that plans look for first."""
    name = engine("llama.cpp").local_image
    report.progress("image", f"loading {archive.name}")
    podman.load_archive(archive, name)
    report.step("image", f"{name}, {format_bytes(archive.stat().st_size)}")
    return name


def _bootstrap(report: Report, target: Path, mirror: str | None) -> None:
    report.progress("image", f"installing {PACKAGES[0]} from Debian {SUITE}, about a minute")
    try:
        # A folder that nobody else can put a link into while the archive is written.
        folder = Path(
            tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent)
        )
    except OSError as error:
        raise StackctlError(f"cannot write {target}: {error.strerror}") from None
    partial = folder / target.name
    command = (
        "mmdebstrap", "--variant=apt", "--format=tar", "--quiet",
        f"--include={','.join(PACKAGES)}",
        '--aptopt=Acquire::Languages "none"',
        "--dpkgopt=path-exclude=/usr/share/man/*",
        "--dpkgopt=path-exclude=/usr/share/doc/*",
        # A mirror held at a day must not stop the build of a local image.
        '--aptopt=Acquire::Check-Valid-Until "false"',
        SUITE, str(partial), *((mirror,) if mirror else ()),
    )  # fmt: skip
    try:
        runner.run(command, timeout_s=1800)
        partial.replace(target)
    except StackctlError as error:
        if error.exit_code == ExitCode.HOST:
            error.hint = "apt-get install mmdebstrap (Debian and Ubuntu; needs root)"
        raise
    except OSError as error:
        raise StackctlError(f"cannot write {target}: {error.strerror}") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    report.step("image", f"{target}, {format_bytes(target.stat().st_size)}")
