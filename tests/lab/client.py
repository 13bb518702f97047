"""A client that sends requests without a pause, for switches under load, and prints the results.

    python3 client.py URL SECONDS THREADS [TOKENS]

It ends after SECONDS or at SIGTERM, when its running requests have ended. Each request is a new
connection. The last line is JSON: the number of answers, the failures, and the longest wait. An
answer counts if it is JSON and its usage has at least one token.
"""

from __future__ import annotations

import json
import signal
import sys
import threading
import time
import urllib.error
import urllib.request


class Client:
    """Threads that send requests to one endpoint until a time."""

    def __init__(self, url: str, seconds: float, tokens: int) -> None:
        """Prepare requests to URL for SECONDS, each for TOKENS tokens."""
        self.url, self.tokens = url, tokens
        self.end = time.monotonic() + seconds
        self.lock = threading.Lock()
        self.answered = 0
        self.failures: list[str] = []
        self.longest = 0.0

    def ask(self) -> None:
        """Send one request after the other, as one thread."""
        body = json.dumps(
            {
                "messages": [{"role": "user", "content": "Count."}],
                "max_tokens": self.tokens,
                "temperature": 0,
                "ignore_eos": True,
            }
        ).encode()
        while time.monotonic() < self.end:
            began = time.monotonic()
            request = urllib.request.Request(
                f"{self.url}/v1/chat/completions", body, {"Content-Type": "application/json"}
            )
            failure = None
            try:
                with urllib.request.urlopen(request, timeout=150) as response:
                    answer = json.load(response)
                if answer["usage"]["completion_tokens"] < 1:
                    failure = f"not whole: {answer}"
            except urllib.error.HTTPError as error:
                failure = f"HTTP {error.code}: {error.read()[:200]!r}"
            except Exception as error:
                failure = f"{type(error).__name__}: {error}"
            with self.lock:
                self.longest = max(self.longest, time.monotonic() - began)
                if failure is None:
                    self.answered += 1
                else:
                    self.failures.append(failure)
            if failure is not None:
                time.sleep(0.05)

    def stop(self, *_: object) -> None:
        """Start no further request."""
        self.end = 0.0

    def run(self, threads: int) -> None:
        """Send requests in that many threads, then print the result."""
        signal.signal(signal.SIGTERM, self.stop)
        crowd = [threading.Thread(target=self.ask) for _ in range(threads)]
        for one in crowd:
            one.start()
        print("asking", flush=True)
        for one in crowd:
            one.join()
        print(
            json.dumps(
                {
                    "answered": self.answered,
                    "failures": self.failures[:20],
                    "failed": len(self.failures),
                    "longest_s": round(self.longest, 3),
                }
            )
        )


if __name__ == "__main__":
    url, seconds, threads, *rest = sys.argv[1:]
    Client(url, float(seconds), int(rest[0]) if rest else 8).run(int(threads))
