"""HTTP for large files: reads into a buffer, own redirects, connections that stay open.

A secret goes only to the server of the first URL: a redirect to another server is followed without
it. http.client is used rather than requests because reading into one buffer is faster, and its
memory does not grow with the file.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import re
import socket
import ssl
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from urllib.parse import SplitResult, quote, unquote, urljoin, urlsplit

from stackctl.errors import StackctlError

_MOST_REDIRECTS = 6
#: The rest of an answer is read to keep the connection, if it has at most this many bytes.
_DRAIN_BYTES = 1 << 16
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_AGENT = "stackctl"
#: Characters of a URL that are sent unchanged; all others, such as blanks, are quoted.
_PRINTABLE = "".join(map(chr, range(0x21, 0x7F)))


class ConnectionLost(StackctlError):
    """The connection failed or broke off; another attempt may succeed."""


@dataclass(frozen=True)
class Origin:
    """The server of a URL: scheme, host and port, which identify it."""

    scheme: str
    host: str
    port: int


class Response:
    """An answer whose body is not read yet. ``url`` is its URL after all redirects."""

    def __init__(self, raw: http.client.HTTPResponse, url: str) -> None:
        self._raw = raw
        self.url = url
        self.status = raw.status

    def header(self, name: str) -> str | None:
        """Return the value of a header, or None if it is absent.

        http.client accepts lines of up to 64 KiB; signed URLs have thousands of characters.
        """
        return self._raw.getheader(name)

    @property
    def length(self) -> int | None:
        """Return Content-Length in bytes; None if it is absent or not a number."""
        text = self.header("Content-Length") or ""
        return int(text) if re.fullmatch(r"\d{1,18}", text) else None

    def readinto(self, view: memoryview) -> int:
        """Read the next bytes of the body into a buffer; return 0 at its end. Raises
        ConnectionLost."""
        with _breaks(self.url):
            return self._raw.readinto(view)

    def read(self, most: int) -> bytes:
        """Return the body.

        Raises:
            ConnectionLost: the connection broke off.
            StackctlError: the body has more than ``most`` bytes.
        """
        with _breaks(self.url):
            text = self._raw.read(most + 1)
        if len(text) > most:
            raise StackctlError(f"{host_of(self.url)} sent more than {most} bytes of an answer")
        return text


class Transfer:
    """The connections of one thread, one for each server. Close it, or use it in a ``with``."""

    def __init__(self, *, timeout_s: float = 30) -> None:
        self._timeout_s = timeout_s
        self._open: dict[Origin, http.client.HTTPConnection] = {}
        self._proxies = urllib.request.getproxies_environment()
        self._last: Response | None = None

    def get(
        self,
        url: str,
        headers: Mapping[str, str],
        *,
        secret: str | None = None,
        seen: Callable[[Response], None] = lambda _: None,
    ) -> Response:
        """Send a GET request and follow redirects; ``seen`` is called with each redirect's answer.

        Raises:
            ConnectionLost: the connection failed or broke off.
            StackctlError: a redirect leads in circles, away from https or to something other than
                HTTP, or the body is compressed.
        """
        url = quote(url, safe=_PRINTABLE)
        origin = self._place(url)
        for _ in range(_MOST_REDIRECTS):
            place = self._place(url)
            sent = {"User-Agent": _AGENT, "Accept-Encoding": "identity", **headers}
            if secret is not None and place == origin:
                sent["Authorization"] = f"Bearer {secret}"
            response = self._once(place, url, sent)
            if response.status not in _REDIRECTS:
                coding = response.header("Content-Encoding") or "identity"
                if coding.lower() != "identity":
                    raise StackctlError(
                        f"{place.host} sends it encoded ({ascii(coding)[1:-1][:20]}), which it was "
                        "asked not to do"
                    )
                return response
            seen(response)
            target = response.header("Location")
            if not target:
                raise StackctlError(f"{place.host} redirects without an address")
            url = self._next(place, url, target)
        raise StackctlError(f"{host_of(url)} redirects in circles")

    def _next(self, place: Origin, url: str, target: str) -> str:
        """Return the URL of a redirect. Errors hide most of it: a signed URL is a secret."""
        try:
            # http.client decodes bytes beyond ASCII as Latin-1; most servers quote them.
            there = urljoin(url, quote(target, safe=_PRINTABLE, encoding="latin-1"))
            parts = urlsplit(there)
        except ValueError:
            raise StackctlError(f"{place.host} redirects to an invalid URL") from None
        if parts.scheme not in ("http", "https"):
            raise StackctlError(
                f"{place.host} redirects to {parts.scheme[:20]}:..., which is not HTTP"
            )
        if place.scheme == "https" and parts.scheme != "https":
            raise StackctlError(f"{place.host} redirects from https to {parts.hostname} by http")
        return there

    def _place(self, url: str) -> Origin:
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError:
            raise StackctlError(f"{url[:200]!r} is not a URL") from None
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise StackctlError(f"{url[:200]!r} is not a URL of http or https")
        return Origin(
            parts.scheme, parts.hostname, port or (443 if parts.scheme == "https" else 80)
        )

    def _once(self, place: Origin, url: str, headers: Mapping[str, str]) -> Response:
        self._drain()
        parts = urlsplit(url)
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        proxy = self._proxy(place)
        if proxy is not None and place.scheme == "http":
            target = parts._replace(fragment="").geturl()
            headers = {**headers, **_credentials(proxy)}
        known = place in self._open
        for again in (known, False):
            connection = self._open.get(place) or self._connect(place, proxy)
            self._open[place] = connection
            try:
                with _breaks(url):
                    connection.request("GET", target, headers=headers)
                    self._last = Response(connection.getresponse(), url)
                    return self._last
            except ConnectionLost:
                self._drop(place)
                # The server may have closed a kept connection meanwhile: then a new one is tried.
                if not again:
                    raise
        raise AssertionError("unreachable")

    def _proxy(self, place: Origin) -> SplitResult | None:
        proxy = self._proxies.get(place.scheme)
        bypassed = urllib.request.proxy_bypass_environment(place.host)  # type: ignore[attr-defined]
        if not proxy or bypassed or place.host in ("127.0.0.1", "::1", "localhost"):
            return None
        try:
            parts = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
            _ = parts.port
        except ValueError:
            raise StackctlError(f"{place.scheme}_proxy is not the address of a proxy") from None
        return parts

    def _connect(self, place: Origin, proxy: SplitResult | None) -> http.client.HTTPConnection:
        host, port = place.host, place.port
        if proxy is not None:
            host, port = proxy.hostname or "", proxy.port or 3128
        if place.scheme == "http":
            return http.client.HTTPConnection(host, port, timeout=self._timeout_s)
        context = ssl.create_default_context()
        made = http.client.HTTPSConnection(host, port, timeout=self._timeout_s, context=context)
        if proxy is not None:
            made.set_tunnel(place.host, place.port, headers=_credentials(proxy))
        return made

    def _drain(self) -> None:
        """Read the rest of the last answer so that its connection can be reused, or close it."""
        last, self._last = self._last, None
        if last is None or last._raw.isclosed():
            return
        try:
            if (last.length or 0) <= _DRAIN_BYTES:
                last._raw.read(_DRAIN_BYTES)
        except (OSError, http.client.HTTPException, ValueError):
            pass
        if not last._raw.isclosed():
            self._drop(self._place(last.url))

    def _drop(self, place: Origin) -> None:
        connection = self._open.pop(place, None)
        if connection is not None:
            connection.close()

    def abort(self) -> None:
        """Shut all connections down, so that a read of another thread raises ConnectionLost."""
        for connection in list(self._open.values()):
            sock = connection.sock
            if sock is not None:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close all connections."""
        for place in list(self._open):
            self._drop(place)

    def __enter__(self) -> Transfer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def host_of(url: str) -> str:
    """Return the server of a URL for messages, which must not show a signed URL: it is a secret."""
    parts = urlsplit(url)
    return parts.netloc.rpartition("@")[2] or url[:80]


def _credentials(proxy: SplitResult) -> dict[str, str]:
    if proxy.username is None:
        return {}
    text = f"{unquote(proxy.username)}:{unquote(proxy.password or '')}"
    return {"Proxy-Authorization": "Basic " + base64.b64encode(text.encode()).decode()}


@contextlib.contextmanager
def _breaks(url: str) -> Iterator[None]:
    """Turn errors of the connection into ConnectionLost, with the server's name.

    An invalid certificate becomes a StackctlError: another attempt would not help.
    """
    where = host_of(url)
    try:
        yield
    except ssl.SSLCertVerificationError as error:
        raise StackctlError(
            f"the certificate of {where} is not valid: {error.verify_message}",
            hint="a company's own certificates: SSL_CERT_FILE=/path/to/ca.pem",
        ) from None
    except TimeoutError:
        raise ConnectionLost(f"{where} does not answer") from None
    except socket.gaierror:
        raise ConnectionLost(f"{where} is not known here: no network, or no such name") from None
    except ConnectionRefusedError:
        raise ConnectionLost(f"{where} refuses connections") from None
    except (http.client.IncompleteRead, http.client.RemoteDisconnected):
        raise ConnectionLost(f"{where} broke the connection off") from None
    except (http.client.HTTPException, ValueError) as error:
        raise ConnectionLost(f"{where} does not speak HTTP: {type(error).__name__}") from None
    except OSError as error:
        raise ConnectionLost(
            f"the connection to {where} broke off: {error.strerror or error}"
        ) from None
