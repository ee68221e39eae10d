"""A faulty S3: a loopback proxy before a real server that fails a seeded share of the requests.

    with moto_server() as url, proxied(url, rate=0.1) as proxy:
        run(command, env=client_environment(proxy.url))

A fault strikes before the server has seen the request, or after it has done what was asked, so that
the client cannot know. It answers 500 or 503, drops the connection, answers nothing until the
client's patience ends, or cuts the body of the answer. By this list a client's retries, and the
commit protocol behind them, are tried on what a store may do on a bad day.
"""

import http.client
import json
import logging
import random
import socket
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

FAULTS = ("500", "503", "drop", "hang", "500 after", "503 after", "drop after", "hang after", "cut")
"""`after`: the server has done the work, and its answer is lost."""
_CODES = {"500": "InternalError", "503": "SlowDown"}
_HOP = {"connection", "keep-alive", "transfer-encoding", "expect", "proxy-connection"}


class FaultyProxy(ThreadingHTTPServer):
    """Requests in the order of their arrival meet the faults of a seeded list."""

    daemon_threads = True

    def __init__(
        self,
        upstream: str,
        rate: float,
        seed: int,
        hang_seconds: float,
        kinds: Sequence[str],
        about: str,
    ) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream = urlsplit(upstream)
        self.rate, self.hang_seconds, self.kinds, self.about = rate, hang_seconds, kinds, about
        self.requests = 0
        self.faults: Counter[str] = Counter()
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self._closing = threading.Event()

    @property
    def url(self) -> str:
        """Where clients find it."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    def next_fault(self) -> str | None:
        """What the next request meets; most meet nothing."""
        with self._lock:
            self.requests += 1
            if self._random.random() >= self.rate:
                return None
            fault = self._random.choice(self.kinds)
            self.faults[fault] += 1
            return fault

    def hang(self) -> None:
        """Outlast the client's patience."""
        self._closing.wait(self.hang_seconds)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that gave up is what this is for."""

    def close(self) -> None:
        """Stop, with whatever still hangs."""
        self._closing.set()
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    """One connection of a client."""

    protocol_version = "HTTP/1.1"
    server: FaultyProxy

    def _meet(self) -> None:
        body = self._body()
        fault = self.server.next_fault() if self.server.about in self.path else None
        if fault is None or fault == "cut" or fault.endswith("after"):
            answer = self._forward(body)
            if fault is None:
                return self._answer(*answer)
            if fault == "cut":
                return self._cut(*answer)
        return self._fail(str(fault).removesuffix(" after"))

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _meet

    def _body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            return b"".join(iter(self._chunk, b""))
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _chunk(self) -> bytes:
        size = int(self.rfile.readline().partition(b";")[0], 16)
        data = self.rfile.read(size)
        self.rfile.readline()
        return data

    def _forward(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        """The real server's answer."""
        upstream = self.server.upstream
        connection = http.client.HTTPConnection(str(upstream.hostname), upstream.port, timeout=60)
        headers = {k: v for k, v in self.headers.items() if k.lower() not in _HOP}
        headers["Content-Length"] = str(len(body))
        try:
            connection.request(self.command, self.path, body=body, headers=headers)
            answer = connection.getresponse()
            return answer.status, answer.getheaders(), answer.read()
        finally:
            connection.close()

    def _answer(self, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
        self._send_head(status, headers, body)
        if self.command != "HEAD":
            self.wfile.write(body)

    def _send_head(self, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
        self.send_response(status)
        names = {name.lower() for name, _ in headers}
        for name, value in headers:
            if name.lower() not in _HOP:
                self.send_header(name, value)
        if "content-length" not in names:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()

    def _cut(self, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
        """The head of the answer and half of its body."""
        self._send_head(status, headers, body)
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
        self._drop()

    def _fail(self, fault: str) -> None:
        if fault in _CODES:
            text = f"<Error><Code>{_CODES[fault]}</Code><Message>a fault</Message></Error>"
            self._answer(int(fault), [("Content-Type", "application/xml")], text.encode())
            return
        if fault == "hang":
            self.server.hang()
        self._drop()

    def _drop(self) -> None:
        """Close without another word."""
        self.close_connection = True
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the counts are told at the end."""


@contextmanager
def proxied(
    upstream: str,
    rate: float,
    seed: int = 0,
    hang: float = 3.0,
    kinds: Sequence[str] = FAULTS,
    about: str = "",
) -> Iterator[FaultyProxy]:
    """The proxy before a server, serving until the block ends; `hang` in seconds.

    Only requests whose path holds `about` meet faults, and are counted.
    """
    proxy = FaultyProxy(upstream, rate, seed, hang, kinds, about)
    thread = threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield proxy
    finally:
        proxy.close()
        thread.join()


@contextmanager
def moto_server() -> Iterator[str]:
    """moto's S3 server on a free port of loopback: its URL."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # it tells of every request
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    try:
        yield f"http://{host}:{port}"
    finally:
        server.stop()


def client_environment(url: str, patience: float = 1.0, attempts: int = 5) -> dict[str, str]:
    """What makes s3fs and pyarrow use a server, by the names that users set.

    `patience`: seconds without a byte before a request counts as lost; `attempts`: how often the
    client tries each request, 1 for none but the first.
    """
    settings = {"config_kwargs": {"read_timeout": patience, "connect_timeout": patience}}
    return {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "testtest",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": url,
        "AWS_MAX_ATTEMPTS": str(attempts),
        "FSSPEC_S3": json.dumps(settings),
    }
