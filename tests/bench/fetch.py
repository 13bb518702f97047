"""One download, for bench.py: prints its seconds without start-up, and its memory in KiB."""

from __future__ import annotations

import json
import resource
import sys
import time
import urllib.request
from pathlib import Path

from stackctl.store.download import download_files
from stackctl.store.download_queue import DownloadRequest


def main(site: str, place: str) -> None:
    """Fetch the one file of the repository a/b to a place."""
    with urllib.request.urlopen(f"{site}/api/models/a/b/revision/main") as answer:
        (file,) = json.load(answer)["siblings"]
    target = Path(place)
    wanted = DownloadRequest(
        name=file["rfilename"],
        url=f"{site}/a/b/resolve/main/{file['rfilename']}",
        size=file["size"],
        target=target,
        lock=target.with_name("lock"),
        sha256=file["lfs"]["sha256"],
    )
    begin = time.perf_counter()
    download_files([wanted])
    took = time.perf_counter() - begin
    print(took, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


main(*sys.argv[1:])
