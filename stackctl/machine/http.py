"""HTTP to engines on loopback, never through a proxy of the environment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import requests


@dataclass(frozen=True)
class HttpAnswer:
    """An HTTP answer. ``json`` is None if it is not JSON; ``text`` has at most 2**20 characters."""

    status: int
    json: Any
    text: str


@dataclass(frozen=True)
class NoAnswer:
    """The reason why there is no answer.

    The port is closed (``refused``), the time ran out (``late``), or the connection broke off.
    """

    reason: str
    late: bool = False
    refused: bool = False


def get(url: str, *, timeout_s: float = 5, key: str | None = None) -> HttpAnswer | NoAnswer:
    """Send a GET request, with the API key if one is given, and return the answer."""
    return _request("GET", url, None, timeout_s, key)


def post(url: str, body: Any, *, timeout_s: float, key: str | None = None) -> HttpAnswer | NoAnswer:
    """Send a POST request with a JSON body; otherwise like ``get``."""
    return _request("POST", url, body, timeout_s, key)


def _request(
    method: str, url: str, body: Any, timeout_s: float, key: str | None
) -> HttpAnswer | NoAnswer:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    with requests.Session() as session:
        session.trust_env = False
        try:
            response = session.request(
                method,
                url,
                json=body,
                headers=headers,
                timeout=timeout_s,
                allow_redirects=False,
                stream=False,
            )
        except requests.Timeout:
            return NoAnswer(f"no answer within {timeout_s:.0f} s", late=True)
        except requests.ConnectionError as error:
            # requests wraps the exceptions of urllib3, so only the text shows the cause.
            if "refused" in str(error):
                return NoAnswer("connection refused", refused=True)
            return NoAnswer("the connection broke off")
        except requests.RequestException as error:
            return NoAnswer(type(error).__name__)
        try:
            data = response.json()
        except ValueError:
            data = None
        if "charset" not in response.headers.get("Content-Type", ""):
            # requests takes text for Latin-1; events and metrics are UTF-8.
            response.encoding = "utf-8"
        return HttpAnswer(response.status_code, data, response.text[: 2**20])
