"""The front door as text: its unit and HAProxy's configuration."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from typing import Any, Literal

import pytest
from test_units import VERSIONS, expanded, sections, unit_words

from stackctl.errors import ExitCode, StackctlError
from stackctl.units import render
from stackctl.units.proxy_unit import ProxyFiles, proxy_container, proxy_service, render_proxy
from stackctl.values.base import from_json, to_json
from stackctl.values.proxy import Proxy, key_digest

FOLDER = "/var/lib/stackctl/doors/cpu"


def door(**given: Any) -> Proxy:
    basic: dict[str, Any] = {"port": 8080, "engine_port": 18080, "health_path": "/health"}
    return Proxy(**basic | {"image": "ab" * 32} | given)


def made(
    given: Proxy | None = None,
    podman: str | None = "5.4.2",
    scope: Literal["user", "system"] = "system",
    folder: str = FOLDER,
) -> ProxyFiles:
    return render_proxy("cpu", given or door(), scope=scope, podman=podman, folder=folder)


def config(given: Proxy | None = None) -> str:
    return next(file.text for file in made(given).files if file.name == "haproxy.cfg")


def podman_args(unit: dict[str, list[tuple[str, str]]]) -> list[str]:
    values = [value for key, value in unit["Container"] if key == "PodmanArgs"]
    return [expanded(word) for value in values for word in unit_words(value)]


@pytest.mark.parametrize(
    ("podman", "scope", "given"),
    [
        ("4.7.2", "user", door()),
        ("4.9.3", "user", door()),
        ("5.8.2", "system", door()),
        ("5.4.2", "system", door(address="0.0.0.0", key=True, hold_s=60)),
    ],
)
def test_golden_doors(
    podman: str,
    scope: Literal["user", "system"],
    given: Proxy,
    golden: Callable[[str, str], None],
) -> None:
    files = made(given, podman, scope)
    golden(f"units/door--podman-{podman}.container", files.unit.text)
    golden(f"units/door--podman-{podman}.cfg", config(given))


@pytest.mark.parametrize("podman", ["4.9.3", "5.4.2"])
def test_golden_doors_under_apparmor(podman: str, golden: Callable[[str, str], None]) -> None:
    files = render_proxy("cpu", door(), scope="system", podman=podman, folder=FOLDER, apparmor=True)
    golden(f"units/door-apparmor--podman-{podman}.container", files.unit.text)
    users = render_proxy("cpu", door(), scope="user", podman=podman, folder=FOLDER, apparmor=True)
    assert ("NoNewPrivileges", "true") in sections(users.unit.text)["Container"]


@pytest.mark.parametrize("podman", [*VERSIONS, None])
def test_what_every_door_says(podman: str | None) -> None:
    files = made(podman=podman)
    unit = sections(files.unit.text)
    container = dict(unit["Container"])
    assert files.unit.name == "cpu_door.container"
    assert proxy_service("cpu") == "cpu_door.service"
    assert container["ContainerName"] == proxy_container("cpu") == "stackctl-cpu_door"
    assert container["Image"] == "ab" * 32
    assert container["Network"] == "host"
    assert container["ReadOnly"] == container["NoNewPrivileges"] == container["Notify"] == "true"
    assert container["DropCapability"] == "all"
    assert container["Pull"] == "never"
    volumes = [value for key, value in unit["Container"] if key == "Volume"]
    assert volumes == [f"{FOLDER}:/door:ro", f"{FOLDER}/admin:/admin:rw"]
    assert {"--entrypoint=haproxy", "--user=0:0", "--stop-signal=SIGUSR1"} <= set(podman_args(unit))
    assert {file.name for file in files.files} == {"haproxy.cfg", "hold.lua"}
    for text in (files.unit.text, *(file.text for file in files.files)):
        assert text.endswith("\n")
        assert not text.endswith("\n\n")
        assert not re.search(r"\n\n\n| +$", text, re.MULTILINE)


def test_a_stop_is_over_before_systemd_loses_patience() -> None:
    unit = sections(made().unit.text)
    grace = re.search(r"hard-stop-after (\d+)s", config())
    (podman,) = [a for a in podman_args(unit) if a.startswith("--stop-timeout=")]
    assert grace is not None
    assert (
        int(grace[1]) < int(podman.partition("=")[2]) < int(dict(unit["Service"])["TimeoutStopSec"])
    )


def test_the_start_limit_spans_all_attempts() -> None:
    unit = sections(made().unit.text)
    start, service = dict(unit["Unit"]), dict(unit["Service"])
    attempt = int(service["TimeoutStartSec"]) + int(service["RestartSec"])
    assert int(start["StartLimitIntervalSec"]) > int(start["StartLimitBurst"]) * attempt


def test_only_a_door_on_an_address_of_the_network_waits_for_it() -> None:
    for given in (door(), door(address="0.0.0.0", key=True), door(address="::", key=True)):
        assert "DefaultDependencies=false" in made(given).unit.text
    assert "DefaultDependencies" not in made(door(address="10.0.0.1", key=True)).unit.text


@pytest.mark.parametrize("podman", ["4.9.3", "5.4.2"])
def test_a_door_that_is_not_final_is_not_started_at_boot(podman: str) -> None:
    for scope in ("user", "system"):
        unit = made(podman=podman, scope=scope).unit
        (pending,) = render.without_install(unit)
        assert "[Install]" in unit.text
        assert {**sections(pending.text), "Install": sections(unit.text)["Install"]} == (
            sections(unit.text)
        )
        assert "Install" not in pending.text


@pytest.mark.parametrize("folder", ["/home/a b/doors/cpu", "/h/100%/$x", "/h/größe"])
@pytest.mark.parametrize("podman", ["4.9.3", "5.4.2"])
def test_odd_folders(folder: str, podman: str) -> None:
    unit = sections(made(podman=podman, folder=folder).unit.text)
    volumes = [expanded(value) for key, value in unit["Container"] if key == "Volume"]
    volumes += [
        argument.removeprefix("--volume=")
        for argument in podman_args(unit)
        if argument.startswith("--volume=")
    ]
    assert volumes == [f"{folder}:/door:ro", f"{folder}/admin:/admin:rw"]


def test_the_door_listens_where_it_is_told() -> None:
    def binds(given: Proxy) -> list[str]:
        return re.findall(r"^    bind (\S+)", config(given), re.MULTILINE)

    assert binds(door()) == ["127.0.0.1:8080", "unix@/admin/again.sock"]
    assert binds(door(address="::1"))[0] == "[::1]:8080"
    assert binds(door(address="192.168.1.2", port=443, key=True))[0] == "192.168.1.2:443"


def test_the_engine_is_on_loopback_and_asked_for_its_health() -> None:
    text = config(door(health_path="/healthz", engine_port=1234, hold_s=7))
    assert "server engine 127.0.0.1:1234 check " in text
    assert "uri /healthz " in text
    assert "acl health path /health /healthz\n" in text
    assert "http-request lua.hold 7 if" in text


def test_routes_are_closed_where_others_can_reach_them() -> None:
    assert "acl client" not in config()
    for given in (door(key=True), door(address="0.0.0.0", key=True)):
        text = config(given)
        (paths,) = re.findall(r"^    acl client path (.*)$", text, re.MULTILINE)
        assert "/completion" in paths.split()
        assert not {"/metrics", "/slots", "/props", "/"} & set(paths.split())
        # Before the key is looked at, and so the same with and without one.
        assert text.index("if odd or !client !health") < text.index("if !known !health")


def test_keys() -> None:
    assert "401" not in config()
    assert "acl known http_auth_bearer,sha2(256),hex -m str -f /door/keys" in config(door(key=True))
    assert key_digest("schlüssel") == hashlib.sha256("schlüssel".encode()).hexdigest().upper()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"address": "localhost"}, "'localhost' is not an IP address"),
        ({"address": "127.0.0.1\n    bind :1"}, "is not an IP address"),
        ({"address": "fe80::1%eth0 x", "key": True}, "is not an IP address"),
        ({"address": "0.0.0.0"}, "needs an API key"),
        ({"address": "::"}, "needs an API key"),
        ({"health_path": "/health\n    bind :1"}, "is not the path"),
        ({"health_path": "health"}, "is not the path"),
        ({"health_path": "/a b"}, "is not the path"),
    ],
)
def test_what_cannot_be_written_or_should_not(given: dict[str, Any], words: str) -> None:
    with pytest.raises(StackctlError, match=words) as caught:
        made(door(**given))
    assert caught.value.exit_code == ExitCode.USAGE


@pytest.mark.parametrize("wrong", [{"port": 0}, {"engine_port": 65536}, {"hold_s": 0}])
def test_a_door_as_json(wrong: dict[str, int]) -> None:
    assert from_json(to_json(door(hold_s=5)), Proxy, where="x") == door(hold_s=5)
    with pytest.raises(StackctlError, match="Expected `int`"):
        from_json(to_json(door(**wrong)), Proxy, where="x")
