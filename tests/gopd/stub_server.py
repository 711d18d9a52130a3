"""
A server that answers as vLLM's does, with log-probabilities that are a function of position and id, and that
misbehaves as it is told to.
"""

import json
import socket
import threading
import time
from collections import deque
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def logp(position: int, token: int) -> float:
    """Exact in float32 and in JSON."""
    return -((token * 7 + position * 5) % 23 + 1) / 8


def proper(payload: dict) -> dict:
    """The answer to a request, as a dictionary that a test may spoil."""
    choices = []
    for number, ids in enumerate(payload["prompt"]):
        positions = [None]
        for position, token in enumerate(ids[1:], start=1):
            shown = dict.fromkeys([token, *range(payload["prompt_logprobs"])])
            positions.append({str(i): {"logprob": logp(position, i), "rank": 1, "decoded_token": "?"} for i in shown})
        choices.append({"index": number, "text": "", "prompt_logprobs": positions})
    return {"model": payload["model"], "choices": choices}


def fine(handler, body: bytes) -> None:
    head(handler, 200, {"Content-Length": len(body)})
    handler.wfile.write(body)


def head(handler, status: int, headers: dict | None = None) -> None:
    handler.send_response(status)
    for name, value in {"Connection": "close", **(headers or {})}.items():
        handler.send_header(name, str(value))
    handler.end_headers()


def status(code: int, headers: dict | None = None, text: bytes = b"out of memory"):
    """Answers with an error."""

    def behave(handler, body: bytes) -> None:
        head(handler, code, {"Content-Length": len(text), **(headers or {})})
        handler.wfile.write(text)

    return behave


def raw(*pieces: bytes, pause: float = 0.0):
    """Sends these bytes, and waits after each piece."""

    def behave(handler, body: bytes) -> None:
        for piece in pieces:
            handler.wfile.write(piece)
            handler.wfile.flush()
            if pause and handler.server.released.wait(pause):
                return

    return behave


def drip(pause: float):
    """Sends the right answer, a byte at a time."""

    def behave(handler, body: bytes) -> None:
        head(handler, 200, {"Content-Length": len(body)})
        raw(*(bytes([byte]) for byte in body), pause=pause)(handler, body)

    return behave


def endless(handler, body: bytes) -> None:
    """An answer that never ends, as fast as it is read."""
    head(handler, 200)
    while not handler.server.released.is_set():
        handler.wfile.write(b" " * 65536)


def cut(share: float):
    """Closes the connection when part of the answer is sent."""

    def behave(handler, body: bytes) -> None:
        head(handler, 200, {"Content-Length": len(body)})
        handler.wfile.write(body[: int(len(body) * share)])
        handler.wfile.flush()
        drop(handler, body)

    return behave


def drop(handler, body: bytes) -> None:
    handler.connection.shutdown(socket.SHUT_RDWR)


def edited(edit):
    """Sends what `edit` makes of the right answer: another value, or bytes."""

    def behave(handler, body: bytes) -> None:
        made = edit(json.loads(body))
        fine(handler, made if isinstance(made, bytes) else json.dumps(made).encode())

    return behave


class Stub(ThreadingHTTPServer):
    """
    Attributes:
        script (`deque`): What becomes of the next requests for log-probabilities, one each; then all goes well.
        always: What becomes of those after the script.
        requests (`list`): Path, headers and payload of all requests so far.
        cards (`list`): The models it has.
    """

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.script, self.always = deque(), fine
        self.cards = [{"id": "served", "root": "org/teacher", "max_model_len": 256}]
        self.requests, self.released = [], threading.Event()
        self.greets = fine

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address) -> None:
        """A client that hangs up is no fault here."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 20

    def do_GET(self):
        self.server.requests.append((self.path, dict(self.headers), None))
        self.close_connection = True
        self.server.greets(self, json.dumps({"data": self.server.cards}).encode())

    def do_POST(self):
        payload = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append((self.path, dict(self.headers), payload))
        behave = self.server.script.popleft() if self.server.script else self.server.always
        self.close_connection = True
        behave(self, json.dumps(proper(payload)).encode())

    def log_message(self, *args):
        pass


@contextmanager
def stub_server(port: int = 0):
    server = Stub(port)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.released.set()
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def late_server(port: int, seconds: float):
    """A server at a port that nobody listens at until so many seconds have passed."""
    made: list[Stub] = []

    def start() -> None:
        time.sleep(seconds)
        made.append(Stub(port))
        made[0].serve_forever(poll_interval=0.01)

    thread = threading.Thread(target=start)
    thread.start()
    try:
        yield made
    finally:
        while not made:
            time.sleep(0.01)
        made[0].released.set()
        made[0].shutdown()
        thread.join()
        made[0].server_close()
