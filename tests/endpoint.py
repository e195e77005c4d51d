"""An OpenAI-compatible endpoint on loopback that behaves, or misbehaves, as a test tells it to."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = tuple[int, str | bytes, dict[str, str]]  # status, reply text (bytes: the whole body), headers
NOW = {"retry-after-ms": "1"}


class Endpoint:
    """What the server remembers; `behave` maps the user's text and the try's number to an answer.

    Among the headers, `finish`, `code`, `slow_headers` and `blanks` (sent before the body, one every 50 ms) and
    `lacking` (bytes promised and not sent) change the reply instead.
    """

    def __init__(self) -> None:
        self.behave: Callable[[str, int], Answer] = lambda text, attempt: (200, "8 7\nFine.", {})
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[Message] = []
        self.paths: list[str] = []
        self.keys: set[str | None] = set()
        self.most = 0  # requests at a time
        self.answered = 0  # replies that were sent whole
        self.usage: dict[str, int] | None = None
        self._busy = 0
        self._tries: dict[str, int] = {}
        self._lock = threading.Lock()
        self.address = ""

    def handle(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        is_chat = "messages" in body
        text = body["messages"][-1]["content"] if is_chat else json.dumps(body["prompt"])
        with self._lock:
            self.bodies.append(body)
            self.headers.append(handler.headers)
            self.paths.append(handler.path)
            self.keys.add(handler.headers["Authorization"])
            self._tries[text] = attempt = self._tries.get(text, 0) + 1
            self._busy += 1
            self.most = max(self.most, self._busy)
        status, content, given = self.behave(text, attempt)
        headers = {"Content-Type": "application/json", **given}
        finish, code = headers.pop("finish", "stop"), headers.pop("code", None)
        blanks, lacking = int(headers.pop("blanks", "0")), int(headers.pop("lacking", "0"))
        if isinstance(content, str):
            said = {"message": {"role": "assistant", "content": content}} if is_chat else {"text": content}
            choices = [{"index": 0, "finish_reason": finish, **said}]
            reply = {"id": "x", "object": "chat.completion", "created": 1, "model": "m", "choices": choices}
            reply |= {"usage": self.usage} if self.usage else {}
            error = {"error": {"message": content, "type": "t", "code": code}}
            content = json.dumps(reply if status == 200 else error).encode()
        with self._lock:
            self._busy -= 1
        slow_headers = int(headers.pop("slow_headers", "0"))
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(blanks + len(content) + lacking))
        with contextlib.suppress(OSError):  # the client gave up waiting
            for number in range(slow_headers):
                handler.send_header(f"X-{number}", "slow")
                handler.flush_headers()
                time.sleep(0.05)
            handler.end_headers()
            for _ in range(blanks):
                handler.wfile.write(b" ")
                time.sleep(0.05)
            handler.wfile.write(content)
            with self._lock:
                self.answered += 1


@contextmanager
def serving() -> Iterator[Endpoint]:
    """An endpoint with its address, until the end of the block."""
    ours = Endpoint()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            ours.handle(self)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        request_queue_size = 128  # connections that wait to be accepted; the default, 5, resets simultaneous ones

    with Server(("127.0.0.1", 0), Handler) as httpd:
        httpd.daemon_threads = True
        threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        ours.address = f"http://127.0.0.1:{httpd.server_address[1]}/v1"
        yield ours
        httpd.shutdown()
