"""Downloads from a hub on loopback that has bad days."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub import Hub, hub

from stackctl.errors import StackctlError
from stackctl.store import partial_file
from stackctl.store.download import download_files
from stackctl.store.download_queue import (
    DownloadedFile,
    DownloadQueue,
    DownloadRequest,
    DownloadSettings,
    RetryPolicy,
)
from stackctl.store.download_rate import DownloadProgress

QUICK = RetryPolicy(attempts=4, first_s=0.01, most_s=0.05)
SHORT: dict[str, Any] = {"retries": QUICK, "timeout_s": 5}
CHECKOUT = Path(__file__).parents[2]
MIB = 1 << 20


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Hub]:
    (tmp_path / "hub").mkdir()
    with hub(tmp_path / "hub") as made:
        yield made


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of some MiB has many pieces."""
    for module in ("partial_file", "download"):
        monkeypatch.setattr(f"stackctl.store.{module}.PIECE_BYTES", MIB)


def noise(size: int, seed: int = 1) -> bytes:
    chance = random.Random(seed)
    return b"".join(chance.randbytes(min(MIB, size - at)) for at in range(0, size, MIB))


def wanted(
    site: Hub, folder: Path, content: bytes, name: str = "m.gguf", **what: Any
) -> DownloadRequest:
    """A file of a repository, as the hub tells of it."""
    if "a/b" not in site.repos or site.repos["a/b"].files.get(name) is None:
        old = site.repos["a/b"].files if "a/b" in site.repos else {}
        site.add("a/b", {**old, name: content})
    sha = hashlib.sha256(content).hexdigest()
    url = f"{site.url}/a/b/resolve/main/{name}"
    told: dict[str, Any] = {"sha256": sha, "size": len(content), **what}
    folder.mkdir(exist_ok=True)
    return DownloadRequest(
        name=name, url=url, target=folder / sha, lock=folder / f"{sha}.lock", **told
    )


def fetch(*files: DownloadRequest, **options: Any) -> list[DownloadedFile]:
    wiring = {name: options.pop(name) for name in ("secret", "tell") if name in options}
    return download_files(files, DownloadSettings(**{**SHORT, **options}), **wiring)


def left(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if not p.name.endswith(".lock"))


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("size", [0, 1, 999, 1000, MIB - 1, MIB, MIB + 1, 5 * MIB + 3])
def test_files_of_all_sizes_arrive_as_they_are(site: Hub, tmp_path: Path, size: int) -> None:
    content = noise(size)
    file = wanted(site, tmp_path / "to", content)
    (got,) = fetch(file)
    assert file.target.read_bytes() == content
    assert got.sha256 == hashlib.sha256(content).hexdigest()
    assert got.mtime_ns == file.target.stat().st_mtime_ns
    assert left(tmp_path / "to") == [file.target.name]
    assert site.sent("/(cdn|a/b).*") == size


@pytest.mark.usefixtures("small_pieces")
def test_pieces_of_one_file_come_over_several_connections(site: Hub, tmp_path: Path) -> None:
    content = noise(8 * MIB)
    site.speed = 2 * MIB
    fetch(wanted(site, tmp_path / "to", content), connections=4)
    assert site.most_at_once == 4
    ranges = [r.headers["Range"] for r in site.requests if r.cdn]
    assert len(set(ranges)) == 8


def test_many_files_at_once(site: Hub, tmp_path: Path) -> None:
    contents = [noise(1000 * n, n) for n in range(1, 30)]
    files = [wanted(site, tmp_path / "to", c, f"f{n}") for n, c in enumerate(contents)]
    got = fetch(*files)
    assert {g.request.name for g in got} == {f.name for f in files}
    assert all(f.target.read_bytes() == c for f, c in zip(files, contents, strict=True))


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize(
    "fault",
    [
        {"status": 429, "times": 3, "headers": {"Retry-After": "0"}},
        {"status": 503, "times": 4},
        {"status": 500, "times": 1},
        {"cut": 300_000, "times": 6},
        {"cut": 0, "times": 3},
        {"length": 1000, "times": 2},
        {"length": -1000, "times": 2},
        {"flip": 1_500_000, "times": 1},
        {"status": 403, "times": 2},
        {"chunked": True},
        {"chunked": True, "whole": True},
    ],
    ids=lambda fault: "-".join(f"{k}{v}" for k, v in fault.items() if k != "headers"),
)
def test_what_goes_wrong_for_a_while_is_got_over(
    site: Hub, tmp_path: Path, fault: dict[str, Any]
) -> None:
    content = noise(3 * MIB)
    file = wanted(site, tmp_path / "to", content)
    site.fault("/cdn/", **fault)
    fetch(file)
    assert file.target.read_bytes() == content


def test_what_a_busy_server_asks_for_is_waited(site: Hub, tmp_path: Path) -> None:
    file = wanted(site, tmp_path / "to", noise(5000))
    site.fault("/a/b/", status=429, times=1, headers={"Retry-After": "1"})
    notes: list[DownloadProgress] = []
    begin = time.monotonic()
    fetch(file, tell=notes.append)
    # What is asserted is waited at least: a busy machine only takes longer.
    assert time.monotonic() - begin >= 1
    assert any("busy (429)" in (p.note or "") for p in notes)


@pytest.mark.usefixtures("small_pieces")
def test_a_server_without_ranges_sends_all_by_one_connection(site: Hub, tmp_path: Path) -> None:
    content = noise(5 * MIB)
    file = wanted(site, tmp_path / "to", content)
    site.fault("/cdn/", whole=True)
    fetch(file)
    assert file.target.read_bytes() == content


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ({"status": 503}, "stays busy, 5 times in a row"),
        ({"status": 418}, "answers with status 418"),
        ({"status": 404}, "does not know it"),
        ({"cut": 0}, "broke the connection off, 5 times in a row"),
        ({"length": 5}, "would send"),
    ],
    ids=["503", "418", "404", "cut", "length"],
)
def test_what_stays_wrong_ends_with_the_reason(
    site: Hub, tmp_path: Path, fault: dict[str, Any], says: str
) -> None:
    file = wanted(site, tmp_path / "to", noise(5000))
    site.fault("/cdn/" if "status" not in fault else ".*", **fault)
    with pytest.raises(StackctlError) as error:
        fetch(file)
    assert says in error.value.message
    assert error.value.message.startswith("m.gguf: ")
    assert not file.target.exists()


@pytest.mark.parametrize(
    ("status", "code", "says"),
    [(401, "GatedRepo", "consent"), (403, "GatedRepo", "consent"), (401, "", "private")],
)
def test_what_is_not_for_everybody_says_how_to_get_it(
    site: Hub, tmp_path: Path, status: int, code: str, says: str
) -> None:
    file = wanted(site, tmp_path / "to", noise(5000))
    site.fault("/a/b/", status=status, headers={"X-Error-Code": code} if code else {})
    with pytest.raises(StackctlError) as error:
        fetch(file)
    assert says in error.value.message
    assert "HF_TOKEN" in (error.value.hint or "")


def test_nothing_that_listens_and_nothing_that_answers(site: Hub, tmp_path: Path) -> None:
    file = wanted(site, tmp_path / "to", noise(5000))
    site.close()
    with pytest.raises(StackctlError, match="refuses connections"):
        fetch(file)


@pytest.mark.usefixtures("small_pieces")
def test_a_byte_that_is_wrong_every_time_is_found(site: Hub, tmp_path: Path) -> None:
    file = wanted(site, tmp_path / "to", noise(2 * MIB))
    site.fault("/cdn/", flip=1_500_000)
    with pytest.raises(StackctlError, match="came damaged, twice"):
        fetch(file)
    assert not file.target.exists()
    # None of it counts as there the next time.
    assert partial_file.bytes_on_disk(file.target, file.size) == 0


def test_a_small_file_is_known_by_its_name_as_a_git_blob(site: Hub, tmp_path: Path) -> None:
    content = b'{"a": 1}'
    right = hashlib.sha1(b"blob 8\0" + content).hexdigest()
    file = wanted(site, tmp_path / "to", content, sha256=None, git_sha1=right)
    (got,) = fetch(file)
    assert got.sha256 == hashlib.sha256(content).hexdigest()
    file = wanted(site, tmp_path / "two", content, sha256=None, git_sha1="0" * 40)
    with pytest.raises(StackctlError, match="came damaged"):
        fetch(file)


# Secrets


def test_a_secret_goes_to_the_hub_and_not_where_it_redirects_to(site: Hub, tmp_path: Path) -> None:
    content = noise(9000)
    site.add("a/b", {"m.gguf": content}, gated=True)
    file = wanted(site, tmp_path / "to", content)
    fetch(file, secret=site.token)
    seen = {(r.cdn, r.headers.get("Authorization")) for r in site.requests}
    assert seen == {(False, f"Bearer {site.token}"), (True, None)}


def test_a_signed_address_may_be_long_and_written_badly(site: Hub, tmp_path: Path) -> None:
    content = noise(9000)
    file = wanted(site, tmp_path / "to", content)
    address = f"{site.cdn}/cdn/a/b/{file.sha256}/m \xfc.gguf?{'x' * 5000}="
    site.fault("/a/b/resolve", status=302, headers={"Location": address})
    fetch(file)
    assert file.target.read_bytes() == content


def test_a_body_that_is_not_the_file_s_is_refused(site: Hub, tmp_path: Path) -> None:
    file = wanted(site, tmp_path / "to", noise(9000))
    site.fault("/cdn/", status=200, headers={"Content-Encoding": "gzip"})
    with pytest.raises(StackctlError, match=r"sends it encoded \(gzip\)"):
        fetch(file)


def test_no_redirect_leads_out_of_http(site: Hub, tmp_path: Path) -> None:
    file = wanted(site, tmp_path / "to", noise(5000))
    for target in ("file:///etc/passwd", "ftp://127.0.0.1/x", "//", "http://[", ""):
        site.faults.clear()
        site.fault("/a/b/", status=302, headers={"Location": target})
        with pytest.raises(StackctlError):
            fetch(file)
    site.faults.clear()
    site.fault("/a/b/", status=302, headers={"Location": file.url})
    with pytest.raises(StackctlError, match="circles"):
        fetch(file)


# Between runs


def interrupted(site: Hub, file: DownloadRequest, bytes_at_most: int) -> None:
    """A run that ends after some bytes, as by Ctrl-C; more do not come."""

    def tell(progress: DownloadProgress) -> None:
        if progress.done >= bytes_at_most:
            raise KeyboardInterrupt

    # One connection: what it reads at once ends with a piece, however little comes after that.
    site.speed, site.hold = 100 * MIB, bytes_at_most + MIB // 2
    with pytest.raises(KeyboardInterrupt):
        fetch(file, tell=tell, connections=1)
    site.speed = site.hold = None


@pytest.mark.usefixtures("small_pieces")
def test_another_run_goes_on_where_one_ended(site: Hub, tmp_path: Path) -> None:
    content = noise(6 * MIB)
    file = wanted(site, tmp_path / "to", content)
    interrupted(site, file, 3 * MIB)
    there = partial_file.bytes_on_disk(file.target, file.size)
    assert there >= 3 * MIB
    site.requests.clear()
    fetch(file)
    assert file.target.read_bytes() == content
    assert site.sent("/cdn/.*") == len(content) - there
    assert any("If-Range" in r.headers for r in site.requests if r.cdn)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("at", [100, MIB + 5])
def test_a_part_that_was_changed_meanwhile_is_found_and_mended(
    site: Hub, tmp_path: Path, at: int
) -> None:
    content = noise(6 * MIB)
    file = wanted(site, tmp_path / "to", content)
    interrupted(site, file, 4 * MIB)
    with file.target.with_name(file.target.name + ".part").open("r+b") as stream:
        stream.seek(at)
        byte = stream.read(1)
        stream.seek(at)
        stream.write(bytes([byte[0] ^ 1]))
    site.requests.clear()
    fetch(file)
    assert file.target.read_bytes() == content
    # Only the piece with the wrong byte came again.
    assert site.sent("/cdn/.*") <= 3 * MIB


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("damage", ["truncate", "garbage", "state", "gone", "short"])
def test_a_part_of_any_kind_does_no_harm(site: Hub, tmp_path: Path, damage: str) -> None:
    content = noise(4 * MIB)
    file = wanted(site, tmp_path / "to", content)
    interrupted(site, file, MIB)
    part = file.target.with_name(file.target.name + ".part")
    state = part.with_name(part.name + ".state")
    if damage == "truncate":
        os.truncate(part, MIB)
    elif damage == "garbage":
        state.write_bytes(noise(5000))
    elif damage == "state":
        state.write_bytes(state.read_bytes()[:4096] + b"\xff" * 64)
    elif damage == "gone":
        part.unlink()
    else:
        os.truncate(state, 4100)
    fetch(file)
    assert file.target.read_bytes() == content


@pytest.mark.usefixtures("small_pieces")
def test_addresses_that_end_again_and_again_are_asked_for_again(site: Hub, tmp_path: Path) -> None:
    content = noise(8 * MIB)
    file = wanted(site, tmp_path / "to", content)
    for _ in range(7):
        site.fault("/cdn/", times=1)  # nothing goes wrong
        site.fault("/cdn/", times=1, status=403)
    fetch(file, connections=1)
    assert file.target.read_bytes() == content
    assert site.faults == []


@pytest.mark.usefixtures("small_pieces")
def test_an_address_that_ends_for_all_connections_is_asked_for_again(
    site: Hub, tmp_path: Path
) -> None:
    content = noise(10 * MIB)
    file = wanted(site, tmp_path / "to", content)
    site.fault("/cdn/", times=5)
    site.fault("/cdn/", times=5, status=403, together=threading.Barrier(5))
    fetch(file, connections=5)
    assert file.target.read_bytes() == content
    assert site.faults == []


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize(("where", "status", "times"), [("/a/b/", 503, 8), ("/cdn/", 403, 5)])
def test_what_breaks_all_connections_at_once_is_one_failure(
    site: Hub, tmp_path: Path, where: str, status: int, times: int
) -> None:
    content = noise(8 * MIB)
    file = wanted(site, tmp_path / "to", content)
    # So many failures, or refusals of an address, would end a download one after the other.
    site.fault(where, status=status, times=times, together=threading.Barrier(times))
    fetch(file, connections=times)
    assert file.target.read_bytes() == content


def test_no_more_files_are_open_than_a_process_may_have(site: Hub, tmp_path: Path) -> None:
    files = [wanted(site, tmp_path / "to", b"%d" % n, f"f{n}") for n in range(70)]
    board = DownloadQueue(files)
    assert all(board.next_piece() for _ in range(64))
    threading.Timer(0.3, board.stop_all).start()
    assert board.next_piece() is None
    board.close()


def test_a_planted_link_is_not_written_through(site: Hub, tmp_path: Path) -> None:
    file = wanted(site, tmp_path / "to", noise(5000))
    victim = tmp_path / "victim"
    victim.write_text("mine")
    part = file.target.with_name(file.target.name + ".part")
    for path in (part, part.with_name(part.name + ".state"), file.lock):
        path.unlink(missing_ok=True)
        path.symlink_to(victim)
        with pytest.raises(StackctlError):
            fetch(file)
        path.unlink()
    # A second name of a file is no link to be seen, and is cut to nothing all the same.
    part.unlink()
    part.hardlink_to(victim)
    with pytest.raises(StackctlError, match="not a file of its own"):
        fetch(file)
    assert victim.read_text() == "mine"


@pytest.mark.usefixtures("small_pieces")
def test_a_file_without_a_known_hash_is_begun_anew_when_it_has_changed(
    site: Hub, tmp_path: Path
) -> None:
    old, new = noise(4 * MIB, 1), noise(4 * MIB, 2)
    folder = tmp_path / "to"
    sha = hashlib.sha256(old).hexdigest()
    site.add("a/b", {"m.gguf": old})
    url = f"{site.cdn}/cdn/a/b/{sha}/m.gguf"
    folder.mkdir()
    file = DownloadRequest("m", url, len(old), folder / "m", folder / "m.lock")
    interrupted(site, file, 2 * MIB)
    # The same address, another content: the server says so by its ETag.
    place = site.repos["a/b"].files["m.gguf"]
    site.digests(place)
    place.write_bytes(new)
    key = (str(place), len(new), place.stat().st_mtime_ns)
    site._digests[key] = (sha, "")
    site.etag = '"2"'
    (got,) = fetch(file)
    assert file.target.read_bytes() == new
    assert got.sha256 == hashlib.sha256(new).hexdigest()


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("etag", ["", "no etag", '"' + "\xe9" * 900 + '"'])
def test_where_neither_hash_nor_etag_tells_nothing_is_gone_on_with(
    site: Hub, tmp_path: Path, etag: str
) -> None:
    old, new = noise(4 * MIB, 1), noise(4 * MIB, 2)
    folder = tmp_path / "to"
    sha = hashlib.sha256(old).hexdigest()
    site.add("a/b", {"m.gguf": old})
    folder.mkdir()
    file = DownloadRequest(
        "m", f"{site.cdn}/cdn/a/b/{sha}/m", len(old), folder / "m", folder / "m.lock"
    )
    site.etag = etag
    interrupted(site, file, 2 * MIB)
    place = site.repos["a/b"].files["m.gguf"]
    place.write_bytes(new)
    site._digests[str(place), len(new), place.stat().st_mtime_ns] = (sha, "")
    site.speed = None
    (got,) = fetch(file)
    assert file.target.read_bytes() == new
    assert got.sha256 == hashlib.sha256(new).hexdigest()


@pytest.mark.usefixtures("small_pieces")
def test_another_etag_of_a_file_with_a_known_hash_costs_nothing(site: Hub, tmp_path: Path) -> None:
    content = noise(4 * MIB)
    file = wanted(site, tmp_path / "to", content)
    interrupted(site, file, 2 * MIB)
    there = partial_file.bytes_on_disk(file.target, file.size)
    site.etag = '"2"'
    site.requests.clear()
    fetch(file)
    assert file.target.read_bytes() == content
    whole = sum(r.sent for r in site.requests if r.cdn and r.status == 206)
    assert whole == len(content) - there


def test_the_hub_may_not_change_its_mind(site: Hub, tmp_path: Path) -> None:
    file = wanted(site, tmp_path / "to", noise(5000))
    site.add("a/b", {"m.gguf": noise(5000, 2)})
    with pytest.raises(StackctlError, match="has changed on"):
        fetch(file)
    site.add("a/b", {"m.gguf": noise(5001, 2)})
    with pytest.raises(StackctlError, match="has changed on"):
        fetch(file)


@pytest.mark.usefixtures("small_pieces")
def test_two_downloads_share_the_work(site: Hub, tmp_path: Path) -> None:
    contents = [noise(2 * MIB, n) for n in range(4)]
    files = [wanted(site, tmp_path / "to", c, f"f{n}") for n, c in enumerate(contents)]
    site.speed = 2 * MIB
    found: list[list[DownloadedFile]] = []
    notes: list[DownloadProgress] = []
    threads = [
        threading.Thread(target=lambda: found.append(fetch(*files, tell=notes.append)))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [len(got) for got in found] == [4, 4]
    assert site.sent("/cdn/.*") == 8 * MIB
    assert all(f.target.read_bytes() == c for f, c in zip(files, contents, strict=True))
    assert any("another download has" in (p.note or "") for p in notes)


def test_a_limit_is_kept(site: Hub, tmp_path: Path) -> None:
    file = wanted(site, tmp_path / "to", noise(3 * MIB))
    begin = time.monotonic()
    fetch(file, limit=2 * MIB)
    # At least that long; how much longer is the machine's affair.
    assert time.monotonic() - begin > 1.2


# Killed

FETCH = """
import sys
from pathlib import Path
sys.path[:0] = [{checkout!r}]
from stackctl.store.download import download_files
from stackctl.store.download_queue import DownloadRequest, DownloadSettings
target = Path({target!r})
file = DownloadRequest("m", {url!r}, {size}, target, target.with_suffix(".lock"), {sha!r})
download_files([file], DownloadSettings(connections={connections}))
"""


def test_killed_at_random_it_ends_right_and_little_comes_twice(site: Hub, tmp_path: Path) -> None:
    # By hand, 1 GiB over the usual four connections, killed 20 times: FETCH_MIB=1024 (a minute).
    # What is on its way to a process that is killed is lost, and it is the more the busier this
    # machine is: a smaller file is killed less often.
    size = int(os.environ.get("FETCH_MIB", "160")) * MIB
    large = size >= 512 * MIB
    content = noise(size)
    file = wanted(site, tmp_path / "to", content)
    site.digests(site.repos["a/b"].files["m.gguf"])
    connections, kills = (4, 20) if large else (1, 8)
    site.speed = size / connections / (30 if large else 5)
    code = FETCH.format(
        checkout=str(CHECKOUT), connections=connections,
        target=str(file.target), url=file.url, size=size, sha=file.sha256,
    )  # fmt: skip
    chance = random.Random(7)
    for number in range(kills):
        with subprocess.Popen([sys.executable, "-c", code]) as process:
            stop = size * (number + chance.random()) / (kills + 2)
            end = time.monotonic() + 10
            while time.monotonic() < end and process.poll() is None:
                if partial_file.bytes_on_disk(file.target, size) > stop:
                    break
                time.sleep(0.005)
            process.send_signal(signal.SIGKILL)
    assert not file.target.exists()
    there = partial_file.bytes_on_disk(file.target, size)
    assert size / 10 < there < size
    site.speed = None
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    assert hashlib.sha256(file.target.read_bytes()).hexdigest() == file.sha256
    again = site.sent("/cdn/.*") - size
    print(f"{size / MIB:.0f} MiB, {kills} kills: {again / size:.2%} came twice")
    assert again < 0.05 * size
