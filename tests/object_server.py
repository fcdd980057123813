"""A web server on loopback that serves byte ranges, and misbehaves on request."""

import re
import socket
import struct
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Fault = Callable[["Handler", bytes, int, int], None]  # gets the whole object and the range asked for, end excluded


class Handler(BaseHTTPRequestHandler):
    """Answers from `server.objects`, or lets the next of `server.faults` answer."""

    protocol_version = "HTTP/1.1"
    server: "ObjectServer"

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        data = self.server.objects.get(path)
        low, high = (int(match[1]), int(match[2]) + 1) if match else (0, len(data or b""))
        self.server.requests.append((path, low, high))
        fault = self.server.faults.pop(0) if self.server.faults else self.server.always
        if fault:
            fault(self, data or b"", low, high)
        elif data is None:
            status(404)(self, b"", low, high)
        elif low >= len(data):
            self.answer(416, b"", {"Content-Range": f"bytes */{len(data)}"})
        else:
            self.ranged(data, low, high)

    def ranged(self, data: bytes, low: int, high: int, **headers: str) -> None:
        part = data[low:high]
        headers = {"Content-Range": f"bytes {low}-{low + len(part) - 1}/{len(data)}"} | headers
        self.answer(206, part, headers)

    def answer(self, code: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(code)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        try:
            self.wfile.write(body)
        except ConnectionError:
            self.close_connection = True  # the client wants no more

    def log_message(self, format: str, *arguments: object) -> None:
        """Say nothing."""


class ObjectServer(ThreadingHTTPServer):
    """`objects` by path; `faults` answer the next requests, one each, then `always` does, if there is one."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.objects: dict[str, bytes] = {}
        self.faults: list[Fault | None] = []
        self.always: Fault | None = None
        self.requests: list[tuple[str, int, int]] = []
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing."""


def status(code: int) -> Fault:
    return lambda handler, data, low, high: handler.answer(code, b"no", {})


def reset(handler: Handler, data: bytes, low: int, high: int) -> None:
    """Reset the connection instead of an answer."""
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.close_connection = True
    handler.connection.close()


def cut(handler: Handler, data: bytes, low: int, high: int) -> None:
    """Promise the range, send half of it."""
    headers = {"Content-Range": f"bytes {low}-{high - 1}/{len(data)}", "Content-Length": str(high - low)}
    handler.answer(206, data[low : (low + high) // 2], headers)
    handler.close_connection = True


def short(handler: Handler, data: bytes, low: int, high: int) -> None:
    """Claim the range, and call half of it the whole."""
    body = data[low : (low + high) // 2]
    handler.answer(206, body, {"Content-Range": f"bytes {low}-{high - 1}/{len(data)}"})


def other(handler: Handler, data: bytes, low: int, high: int) -> None:
    """Send another range of the same length."""
    handler.ranged(data, low + 1, high + 1)


def longer(handler: Handler, data: bytes, low: int, high: int) -> None:
    """Claim the range, send more."""
    handler.answer(206, data[low:], {"Content-Range": f"bytes {low}-{high - 1}/{len(data)}"})


def flipped(handler: Handler, data: bytes, low: int, high: int) -> None:
    """Send the range with a wrong byte."""
    handler.ranged(data[:low] + bytes([data[low] ^ 1]) + data[low + 1 :], low, high)


def whole(handler: Handler, data: bytes, low: int, high: int) -> None:
    """Ignore that a range was asked for."""
    handler.answer(200, data, {})


def slow(seconds: float) -> Fault:
    def answer(handler: Handler, data: bytes, low: int, high: int) -> None:
        time.sleep(seconds)
        handler.ranged(data, low, high)

    return answer
