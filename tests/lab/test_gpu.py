"""A GPU through CDI: a launch without it is refused, Podman proves it, an engine gets the device.

There is no real GPU. NVML is a compiled library that answers with the recorded facts of an RTX PRO
6000, and the CDI file gives containers a variable and a file. Podman, crun and stackctl are the
real ones. vLLM needs a real GPU, so the image contains a program that acts like it (fakevllm.pl).
"""

from __future__ import annotations

import json
import shlex
import subprocess
from collections.abc import Iterator

import pytest
from checkpoints import checkpoint

from . import look
from .card import DRIVER, FACTS, cdi
from .conftest import HERE, Seat
from .lab import IMAGE

CDI = "/etc/cdi/nvidia.yaml"
IMAGE_HERE = ("--set", f"image={IMAGE}")
UP = ("up", "--yes", "gpu-gguf", *IMAGE_HERE, "--model")
STACK, PORT = "gpu-nvfp4", 8000
VLLM_IMAGE = "localhost/stackctl/vllm:latest"
MODEL = "/srv/models/tiny-nvfp4"
#: An image whose nvfp4 kernels compute wrongly.
WRONG_KERNELS = "cp -p /srv/gpu/vllm usr/bin/vllm && touch broken-kernels"
UP_VLLM = ("up", "--yes", STACK, "--model", f"dir:{MODEL}")
#: One quantised matrix: two weights in each byte, a scale for 16 weights, and one for all.
_PART = "model.layers.0.mlp.up_proj"
NVFP4 = {
    "model.embed_tokens.weight": ("BF16", (32, 64)),
    f"{_PART}.weight": ("U8", (128, 32)),
    f"{_PART}.weight_scale": ("F8_E4M3", (128, 4)),
    f"{_PART}.weight_scale_2": ("F32", ()),
    "lm_head.weight": ("BF16", (32, 64)),
}


@pytest.fixture
def vllm(gpu: Seat) -> Iterator[Seat]:
    """Yield the user with an image of vLLM and a small checkpoint in nvfp4.

    The entry point of the image is that of the published one.
    """
    folder = look.lab_path(gpu.lab, MODEL)
    quantized = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
    checkpoint(folder, NVFP4, quantization_config=quantized)
    look.put(gpu.lab, "/srv/gpu/vllm", (HERE / "fakevllm.pl").read_bytes(), mode=0o755)
    made = look.derived_image(gpu, "vllm", "cp -p /srv/gpu/vllm usr/bin/vllm")
    committed(gpu, made, VLLM_IMAGE, "vllm", "serve")
    yield gpu
    gpu.reset()
    gpu.run("podman", "rmi", "--force", VLLM_IMAGE)


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
    # Podman gives any container the variable and the file of the CDI file.
    words = ["podman", "run", "--rm", "--network=none", "--device=nvidia.com/gpu=0"]
    inside = gpu.run(*words, "--entrypoint=sh", IMAGE, "-c", "cat /opt/libcuda.so; env").stdout
    assert inside.startswith("not really\n")
    assert {"LAB_GPU=edited", "GPU_0=1"} <= set(inside.splitlines())
    assert "GPU_all=1" not in inside
    look.assert_clean(gpu, "gpu-gguf")


@pytest.mark.deep
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


@pytest.mark.deep
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


def test_the_engine_has_the_card(vllm: Seat) -> None:
    lab = vllm.lab
    look.put(lab, CDI, cdi().encode())
    done = vllm.stackctl(*UP_VLLM)
    assert f"{STACK} is up (generation 1)" in done.stdout
    text = look.unit_text(vllm, STACK)
    for line in ("AddDevice=nvidia.com/gpu=0", f"Volume={MODEL}:/models:ro"):
        assert line in text.splitlines()
    # The engine sees the edits of the device, the model and the cache.
    pid = look.engine_pid(vllm, look.engine_container(vllm, STACK))
    variables = lab.read(f"/proc/{pid}/environ").split("\0")
    assert {"LAB_GPU=edited", "GPU_0=1", "HF_HUB_OFFLINE=1"} <= set(variables)
    assert "GPU_all=1" not in variables
    inside = f"/proc/{pid}/root"
    assert lab.read(f"{inside}/opt/libcuda.so") == "not really\n"
    shown = lab.read(f"/proc/{pid}/mountinfo").splitlines()
    options = {line.split()[4]: line.split()[5].split(",") for line in shown}
    assert "ro" in options["/models"]
    assert "ro" in options["/opt/libcuda.so"]
    assert "rw" in options["/cache"]
    assert "ro" in options["/"]
    (size,) = (line.rsplit("size=", 1)[1] for line in shown if line.split()[4] == "/dev/shm")
    assert int(size.split("k")[0]) == 8 * 2**20
    # fakevllm.pl exits at any option that vLLM does not have.
    words = lab.read(f"/proc/{pid}/cmdline").split("\0")[:-1]
    assert words[words.index("serve") + 1] == "/models"
    assert words[words.index("--max-num-seqs") + 1] == "1"
    plan = look.record(vllm, 1, STACK)["plan"]
    assert (plan["placement"]["gpus"], plan["model"]["quantization"]) == (["0"], "nvfp4")

    answer = look.chat(vllm, PORT)
    assert answer["choices"][0]["message"]["content"].startswith("amber copper")
    assert answer["usage"]["completion_tokens"] == 8
    checked = vllm.stackctl("check", STACK).stdout
    assert {line.split()[0] for line in checked.splitlines()} == {"ok"}
    again = vllm.stackctl(*UP_VLLM)
    assert "nothing to change (generation 1)" in again.stdout
    # The current state of the GPU comes from NVML.
    row = vllm.stackctl("top", "--once").stdout.splitlines()[-1].split()
    assert (row[0], row[-1]) == (STACK, "37%")
    found = json.loads(vllm.stackctl("diagnose", "--json").stdout)["results"][0]
    assert (found["name"], found["evidence"]) == ("thermal-limit", "93 °C")
    assert found["actual"] == "GPU 0 holds its clock down: heat (hardware)"

    vllm.stackctl("down", STACK)
    look.assert_clean(vllm, STACK)
    assert not look.listening(lab, PORT)


@pytest.mark.deep
def test_a_snapshot_of_the_hub_and_its_code(vllm: Seat) -> None:
    """The files of the snapshot are links to the blobs beside it."""
    look.put(vllm.lab, CDI, cdi().encode())
    repo, commit = "/srv/hub/models--Org--Tiny", "a1" * 20
    look.put(vllm.lab, f"{repo}/refs/main", commit.encode())
    snapshot = look.lab_path(vllm.lab, f"{repo}/snapshots/{commit}")
    snapshot.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "model.safetensors"):
        look.put(vllm.lab, f"{repo}/blobs/{name[:3]}", look.get(vllm.lab, f"{MODEL}/{name}"))
        if not (snapshot / name).is_symlink():
            (snapshot / name).symlink_to(f"../../blobs/{name[:3]}")
    words = ("up", "--yes", STACK, "--model", "hf:Org/Tiny", "--set", "trust_remote_code=true")
    vllm.stackctl(*words, env={"HF_HUB_CACHE": "/srv/hub"})
    told = look.argv(vllm, look.engine_container(vllm, STACK))
    assert told[told.index("serve") + 1] == f"/models/snapshots/{commit}"
    assert "--trust-remote-code" in told
    vllm.stackctl("down", STACK)
    look.assert_clean(vllm, STACK)
    # Without a commit the version of the code is unknown.
    done = vllm.stackctl(*UP_VLLM, "--set", "trust_remote_code=true", code=2)
    look.assert_error(done, "nothing tells the commit of dir:", "@COMMIT")
    look.assert_clean(vllm, STACK)


@pytest.mark.deep
def test_an_entry_point_outside_of_the_path(gpu: Seat, tiny: str) -> None:
    """llama.cpp's own images have such an entry point."""
    look.put(gpu.lab, CDI, cdi().encode())
    move = "mkdir app && mv $(find . -type f -perm -111 -name llama-server) app/"
    name = committed(
        gpu, look.derived_image(gpu, "app", move), "localhost/lab/app:2", "/app/llama-server"
    )
    try:
        words = ("up", "--yes", "gpu-gguf", "--set", f"image={name}", "--model", tiny)
        assert "gpu-gguf is up (generation 1)" in gpu.stackctl(*words).stdout
        assert "AddDevice=nvidia.com/gpu=0" in look.unit_text(gpu, "gpu-gguf").splitlines()
        container = look.engine_container(gpu, "gpu-gguf")
        variables = gpu.lab.read(f"/proc/{look.engine_pid(gpu, container)}/environ").split("\0")
        assert "LAB_GPU=edited" in variables
        _falls_back(gpu)
        gpu.stackctl("down", "gpu-gguf")
        look.assert_clean(gpu, "gpu-gguf")
    finally:
        gpu.reset()
        gpu.run("podman", "rmi", "--force", name)


def _falls_back(gpu: Seat) -> None:
    """Check that verify reports an engine that computes on the CPU.

    This image has no code for GPUs: llama-server accepts --n-gpu-layers and uses the CPU without a
    warning.
    """
    found = json.loads(gpu.stackctl("verify", "gpu-gguf", "--json", code=1).stdout)["results"]
    (wrong,) = [result for result in found if result["status"] == "fail"]
    assert wrong["name"] == "gpu"
    assert wrong["actual"] == "no process of it holds memory of GPU 0"
    assert "the engine computes on the CPU" in wrong["evidence"]
    assert wrong["remedy"].startswith("stackctl doctor gpu-gguf")


BROKEN = {
    "absent": (None, 0o644, "no file in /etc/cdi or /run/cdi", "nvidia-ctk cdi generate"),
    "stale": (
        cdi(library="/srv/gpu/libcuda.so.570.86.10"), 0o644,
        "/srv/gpu/libcuda.so.570.86.10 does not exist", "nvidia-ctk cdi generate",
    ),
    "unreadable": (cdi(), 0o600, "it cannot be read", f"sudo chmod a\\+r {CDI}"),
}  # fmt: skip


@pytest.mark.deep
@pytest.mark.parametrize("name", BROKEN)
def test_vllm_without_its_device_is_refused_and_what_runs_runs_on(
    vllm: Seat, tiny: str, name: str
) -> None:
    text, mode, words, remedy = BROKEN[name]
    if mode == 0o600 and vllm.user == "root":
        pytest.skip("root reads everything")
    vllm.stackctl("up", "demo", "--model", tiny)
    container = look.engine_container(vllm, "demo")
    before = (look.container_id(vllm, container), look.engine_pid(vllm, container))
    files = vllm.files(vllm.units)
    if text is not None:
        look.put(vllm.lab, CDI, text.encode(), mode=mode)

    done = vllm.stackctl(*UP_VLLM, code=6)
    look.assert_error(done, f"{STACK} cannot have its GPU: .*{words}", remedy)
    assert vllm.files(vllm.units) == files
    assert (look.container_id(vllm, container), look.engine_pid(vllm, container)) == before
    listed = vllm.run("podman", "ps", "--all", "--format", "{{.Names}}").stdout.split()
    assert not [entry for entry in listed if STACK in entry or "proof" in entry]
    assert vllm.stackctl("check", "demo").stdout
    vllm.stackctl("down", "demo")
    look.assert_clean(vllm, "demo")


def test_a_running_engine_outlives_a_refused_change(vllm: Seat) -> None:
    """For example, a driver's update can remove the device while running engines still have it."""
    look.put(vllm.lab, CDI, cdi().encode())
    vllm.stackctl(*UP_VLLM)
    container = look.engine_container(vllm, STACK)
    before = look.engine_pid(vllm, container)
    look.put(vllm.lab, CDI, cdi(hook="/bin/false").encode())
    done = vllm.stackctl(*UP_VLLM, "--set", "context=2048", code=6)
    look.assert_error(done, "the hook that a CDI file names fails", "nvidia-container-toolkit")
    done = vllm.stackctl("restart", STACK, code=6)
    look.assert_error(done, "the hook that a CDI file names fails", "nvidia-container-toolkit")
    assert look.engine_pid(vllm, container) == before
    assert look.chat(vllm, PORT)["usage"]["completion_tokens"] == 8
    look.put(vllm.lab, CDI, cdi().encode())
    vllm.stackctl("restart", STACK)
    assert look.engine_pid(vllm, container) != before
    vllm.stackctl("down", STACK)
    look.assert_clean(vllm, STACK)


def committed(seat: Seat, image: str, name: str, *entrypoint: str) -> str:
    """Return the image with another entry point, under another name."""
    change = shlex.quote(f"ENTRYPOINT {json.dumps(entrypoint)}")
    make = (
        f"id=$(podman create {image} x)",
        f"podman commit --quiet --change {change} $id {name}",
        "podman rm $id",
    )
    seat.run("sh", "-c", " && ".join(make))
    return name


def doctor(seat: Seat, model: str, code: int = 0) -> dict[str, dict[str, str]]:
    """Return the findings of ``doctor`` by name."""
    words = ("doctor", "gpu-gguf", *IMAGE_HERE, "--model", model, "--json")
    done: subprocess.CompletedProcess[str] = seat.stackctl(*words, code=code)
    return {result["name"]: result for result in json.loads(done.stdout)["results"]}


def test_kernels_that_compute_wrongly_are_replaced_once_and_for_all(vllm: Seat) -> None:
    look.put(vllm.lab, CDI, cdi().encode())
    made = look.derived_image(vllm, "broken", WRONG_KERNELS)
    committed(vllm, made, VLLM_IMAGE, "vllm", "serve")
    said = vllm.stackctl(*UP_VLLM).stderr
    assert 'answer is wrong: not text: "!!!!' in said
    assert "once more with --linear-backend marlin" in said
    first, second = look.record(vllm, 1, STACK), look.record(vllm, 2, STACK)
    assert first["outcome"]["state"] == "failed"
    assert second["outcome"]["state"] == "ready"
    (learned,) = [d for d in second["plan"]["decisions"] if d["field"] == "linear-backend"]
    assert (learned["value"], learned["source"]) == ("marlin", "measured")
    # The next start uses the other kernels at once.
    vllm.stackctl("down", STACK)
    assert "once more" not in vllm.stackctl(*UP_VLLM).stderr
    assert look.record(vllm, 3, STACK)["outcome"]["state"] == "ready"
    vllm.stackctl("down", STACK)
    vllm.assert_nothing_left()


@pytest.mark.deep
def test_kernels_that_the_user_chose_are_not_replaced(vllm: Seat) -> None:
    look.put(vllm.lab, CDI, cdi().encode())
    made = look.derived_image(vllm, "broken", WRONG_KERNELS)
    committed(vllm, made, VLLM_IMAGE, "vllm", "serve")
    # The user's choice is not replaced.
    words = ("--set", "engine_args.linear-backend=cutlass")
    said = vllm.stackctl(*UP_VLLM, *words, code=1).stderr
    assert "answer is wrong: not text" in said
    assert "once more" not in said
    assert not [path for path in vllm.files(vllm.state) if path.endswith("learned.json")]
    vllm.assert_nothing_left()
