"""A GPU through CDI: what the host lacks is refused before a launch, and podman proves the rest.

The card is not there. Its library is a real one that answers as the recorded RTX PRO 6000 does, its
CDI file gives containers a variable and a file; podman, crun and stackctl are as everywhere.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import zipfile
from collections.abc import Iterator

import pytest

from . import look
from .conftest import HERE, Seat
from .host import call, need
from .lab import IMAGE, Lab

FACTS = json.loads((HERE.parent / "machines/nvml-rtx-pro-6000-max-q.json").read_text())
DRIVER = FACTS["driver"]
LIBRARY = f"/srv/gpu/libcuda.so.{DRIVER}"
CDI = "/etc/cdi/nvidia.yaml"
IMAGE_HERE = ("--set", f"image={IMAGE}")
UP = ("up", "--yes", "gpu-gguf", *IMAGE_HERE, "--model")


def cdi(*, version: str = "0.5.0", library: str = LIBRARY, hook: str | None = None) -> str:
    """A CDI file for the card under its number and as "all"."""
    edits: dict[str, object] = {
        "env": ["LAB_GPU=edited"],
        "mounts": [
            {"hostPath": library, "containerPath": "/opt/libcuda.so", "options": ["ro", "rbind"]}
        ],
    }
    if hook is not None:
        edits["hooks"] = [{"hookName": "createContainer", "path": hook, "args": [hook]}]
    names = [{"name": name, "containerEdits": {"env": [f"GPU_{name}=1"]}} for name in ("0", "all")]
    document = {"cdiVersion": version, "kind": "nvidia.com/gpu", "devices": names}
    # JSON is YAML.
    return json.dumps({**document, "containerEdits": edits})


@pytest.fixture(scope="module")
def card(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """The lab with the card's library, the Python package that asks it, and the driver's device."""
    need({"gcc": "gcc"})
    folder = tmp_path_factory.mktemp("card")
    device = FACTS["devices"][0]
    major, minor = device["compute_capability"].split(".")
    texts = {"DRIVER": DRIVER, "NAME": device["name"], "UUID": device["uuid"]}
    numbers = {"TOTAL": f"{device['memory_bytes']}ULL", "FREE": f"{device['free_bytes']}ULL",
               "MAJOR": major, "MINOR": minor}  # fmt: skip
    built = folder / "libnvidia-ml.so.1"
    words: list[str | os.PathLike[str]] = [
        "gcc",
        "-shared",
        "-fPIC",
        "-O1",
        "-o",
        built,
        HERE / "nvml.c",
    ]
    words += [f'-D{key}="{value}"' for key, value in texts.items()]
    call([*words, *(f"-D{key}={value}" for key, value in numbers.items())])
    call([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder,
          "nvidia-ml-py"])  # fmt: skip
    wheel = zipfile.ZipFile(next(folder.glob("nvidia_ml_py-*.whl")))
    look.put(lab, "/usr/lib/libnvidia-ml.so.1", built.read_bytes(), mode=0o755)
    python = lab.run(["python3", "-c", "import sys; print(*sys.version_info[:2], sep='.')"])
    packages = f"/usr/local/lib/python{python.stdout.strip()}/dist-packages"
    look.put(lab, f"{packages}/pynvml.py", wheel.read("pynvml.py"))
    look.put(lab, "/dev/nvidiactl", b"")
    look.put(lab, LIBRARY, b"not really\n")
    return lab


@pytest.fixture
def gpu(card: Lab, seat: Seat) -> Iterator[Seat]:
    """A user of the machine with the card, and no CDI file yet."""
    assert seat.lab is card
    yield seat
    card.run(["rm", "-rf", "/etc/cdi"], check=True)


def test_the_card_is_seen_as_it_was_recorded(gpu: Seat) -> None:
    look.put(gpu.lab, CDI, cdi().encode())
    (seen,) = json.loads(gpu.stackctl("probe", "--json").stdout)["gpus"]
    device = FACTS["devices"][0]
    for key in ("name", "uuid", "memory_bytes", "free_bytes", "compute_capability"):
        assert seen[key] == device[key]
    assert (seen["driver"], seen["cdi"]) == (DRIVER, "nvidia.com/gpu=0")


def test_doctor_proves_the_device_with_podman(gpu: Seat, tiny: str) -> None:
    look.put(gpu.lab, CDI, cdi().encode())
    done = doctor(gpu, tiny)
    assert done["gpu-proof"]["status"] == "ok", done
    assert done["cdi"]["status"] == "ok"
    # And podman gives what the file says to whoever runs.
    words = ["podman", "run", "--rm", "--network=none", "--device=nvidia.com/gpu=0"]
    inside = gpu.run(*words, "--entrypoint=sh", IMAGE, "-c", "cat /opt/libcuda.so; env").stdout
    assert inside.startswith("not really\n")
    assert {"LAB_GPU=edited", "GPU_0=1"} <= set(inside.splitlines())
    assert "GPU_all=1" not in inside
    look.assert_clean(gpu, "gpu-gguf")


def test_a_hook_that_fails_is_found_by_the_proof_alone(gpu: Seat, tiny: str) -> None:
    look.put(gpu.lab, CDI, cdi(hook="/bin/false").encode())
    done = doctor(gpu, tiny, code=6)
    assert done["cdi"]["status"] == "ok"
    assert done["gpu-proof"]["status"] == "fail"
    assert done["gpu-proof"]["actual"] == "the hook that a CDI file names fails", done["gpu-proof"]
    assert "nvidia-container-toolkit" in done["gpu-proof"]["remedy"]
    look.assert_clean(gpu, "gpu-gguf")


@pytest.mark.parametrize(
    ("text", "mode", "words", "remedy"),
    [
        (None, 0o644, "no file in /etc/cdi or /run/cdi", "nvidia-ctk cdi generate"),
        (
            cdi(library="/srv/gpu/libcuda.so.570.86.10"), 0o644,
            r"/srv/gpu/libcuda.so.570.86.10 does not exist", "nvidia-ctk cdi generate",
        ),
        ("{", 0o644, "cannot be parsed", "nvidia-ctk cdi generate"),
        (cdi(), 0o600, "it cannot be read", f"sudo chmod a\\+r {CDI}"),
    ],
    ids=["absent", "stale", "broken", "unreadable"],
)  # fmt: skip
def test_a_cdi_file_that_is_no_use_is_refused_before_launch(
    gpu: Seat, tiny: str, text: str | None, mode: int, words: str, remedy: str
) -> None:
    if mode == 0o600 and gpu.user == "root":
        pytest.skip("root reads everything")
    if text is not None:
        look.put(gpu.lab, CDI, text.encode(), mode=mode)
    done = gpu.stackctl(*UP, tiny, code=6)
    look.assert_error(done, f"gpu-gguf cannot have its GPU: .*{words}", remedy)
    look.assert_clean(gpu, "gpu-gguf")


def test_the_driver_is_judged_by_the_image_that_is_here(gpu: Seat, tiny: str) -> None:
    look.put(gpu.lab, CDI, cdi().encode())
    name = "localhost/lab/cuda:14"
    change = ["--change", "ENV CUDA_VERSION=14.1.0", "--change", 'ENTRYPOINT ["llama-server"]']
    make = (
        f"podman create --name made {IMAGE} x && podman commit -q {shlex.join(change)} made {name}"
    )
    gpu.run("sh", "-c", f"{make} && podman rm made")
    try:
        words = ("doctor", "gpu-gguf", "--set", f"image={name}", "--model", tiny, "--json")
        results = json.loads(gpu.stackctl(*words, code=None).stdout)["results"]
        (found,) = (result for result in results if result["name"] == "gpu-driver")
        assert found["expected"] == "NVIDIA driver 580 or newer (the image has CUDA 14.1.0)"
    finally:
        gpu.run("podman", "rmi", "--force", name)


def doctor(seat: Seat, model: str, code: int = 0) -> dict[str, dict[str, str]]:
    """Doctor's findings by name."""
    words = ("doctor", "gpu-gguf", *IMAGE_HERE, "--model", model, "--json")
    done: subprocess.CompletedProcess[str] = seat.stackctl(*words, code=code)
    return {result["name"]: result for result in json.loads(done.stdout)["results"]}
