"""The image of llama.cpp that is built on machines without a registry.

A module of its own, because the lab builds the image anew when this code changes.
"""

from __future__ import annotations

from typing import Final

from stackctl.engines.image_recipe import ImageRecipe

LOCAL_IMAGE: Final = "localhost/stackctl/llama-cpp:latest"

RECIPES: Final = (
    ImageRecipe(
        name="llama-cpp",
        image=LOCAL_IMAGE,
        about="the engine llama.cpp",
        # It is in Debian unstable only; its CPU code is chosen at run time. The health check needs
        # curl.
        suite="sid",
        packages=("llama.cpp-tools", "ca-certificates", "curl"),
    ),
)
