"""A stand-in for `vllm serve`, for tests: it takes the same arguments and answers every prompt with what it was given.

It is no model. `--dies` ends it with an error, and `--child FILE` starts a process whose number it writes to the file.
"""

from __future__ import annotations

import json
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any


class Handler(BaseHTTPRequestHandler):
    def _send(self, content: Any) -> None:
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        self._send({"data": []})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        said = {"arguments": sys.argv[1:], "path": self.path, "body": body}
        self._send({"choices": [{"text": json.dumps(said), "finish_reason": "stop"}]})

    def log_message(self, format: str, *args: Any) -> None:
        pass


if "--dies" in sys.argv:
    sys.exit("the card has no memory left")
if "--child" in sys.argv:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    Path(sys.argv[sys.argv.index("--child") + 1]).write_text(str(child.pid))
HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
